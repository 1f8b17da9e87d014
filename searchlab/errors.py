"""Every error that searchlab raises on purpose; all are subclasses of `SearchlabError`."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "EvaluationError",
    "RunInUseError",
    "SearchlabError",
    "SearchlabWarning",
    "SpaceError",
    "StudyError",
    "unknown_name",
]


class SearchlabError(Exception):
    """Root of all errors here; its text is one line that names the value and the rule."""


class ConfigError(SearchlabError, ValueError):
    """An option, a setting or a configuration file that cannot be used as given."""


class SpaceError(SearchlabError, ValueError):
    """A space, variable, constraint or candidate that is not valid."""


class DataError(SearchlabError, ValueError):
    """A file or artefact from outside that is missing, corrupt, too new or of the wrong shape."""


class EvaluationError(SearchlabError, RuntimeError):
    """An evaluator that cannot be set up, or that answered with something else than evaluations."""


class StudyError(SearchlabError, RuntimeError):
    """A study database that cannot be opened, read or written."""


class RunInUseError(StudyError):
    """A run whose driver lease is held by another live process."""


class SearchlabWarning(UserWarning):
    """Something worked, but not in the way that was asked for."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """The error for a name that is in no registry; lists the known ones."""
    return ConfigError(f"unknown {kind} {name!r}; known: {', '.join(sorted(known)) or 'none'}")
