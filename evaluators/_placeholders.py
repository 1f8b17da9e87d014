"""Words in braces that a command line is filled in with: {plan}, {out}, {{literally}}."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from searchlab.errors import ConfigError

__all__ = ["check_placeholders", "filled", "has_placeholder", "words_of"]

_MARK = re.compile(r"\{\{([a-z_]+)\}\}|(?<!\$)\{([a-z_]+)\}")


def check_placeholders(command: str, known: Sequence[str], required: Sequence[str]) -> None:
    """Makes sure that a command names known placeholders only, and all that it must.

    Raises:
        ConfigError: it does not.
    """
    found = [match[2] for match in _MARK.finditer(command) if match[2]]
    for name in found:
        if name not in known:
            listed = " ".join(f"{{{p}}}" for p in known)
            raise ConfigError(
                f"placeholder {{{name}}} in the command; allowed: {listed} "
                f"({{{{{name}}}}} stands for the word in braces itself)"
            )
    for name in required:
        if name not in found:
            raise ConfigError(f"the command {command!r} does not use {{{name}}}")


def has_placeholder(text: str) -> bool:
    """Whether something in a text is in braces."""
    return _MARK.search(text) is not None


def words_of(command: str) -> list[str]:
    """The command's words, as a shell splits them.

    Raises:
        ConfigError: quotes that are left open.
    """
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"command {command!r} cannot be split: {error}") from None


def filled(text: str, values: Mapping[str, str], quote: Callable[[str], str] = str) -> str:
    """The text with values in the place of names; a doubled brace stands for itself."""

    def value(match: re.Match[str]) -> str:
        return quote(values[match[2]]) if match[2] else f"{{{match[1]}}}"

    return _MARK.sub(value, text)
