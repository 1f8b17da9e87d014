"""The predictor of an earlier search as the start of a guided one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from searchlab.config import PREDICTORS, resolve
from searchlab.errors import ConfigError, DataError
from searchlab.predictor import Predictor, Table
from searchlab.predictor_folder import folder_digest
from searchlab.space import Space

__all__ = ["REFITS", "Prior"]

REFITS = ("never", "warm", "scratch")
_KEYS = {"folder", "digest", "refit", "adapted", "trusted", "line"}


class Prior:
    """What guided search takes from an earlier predictor.

    Args:
        options: JSON: `folder` (of the predictor), `digest` (of its files), `refit` ("never" = it
            stays as it is, "warm" = fits begin at it, "scratch" = fits forget it), `adapted` (its
            task or space is another one), `trusted` (it may choose every candidate from the first
            on; else every other one until labels judge it) and `line` (what is said of it).
        space: of the candidates.
        make: a new predictor.
        background: random candidates with their signals.

    Raises:
        ConfigError: other options.
        DataError: the folder cannot be read, or its files are others by now.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        space: Space,
        make: Callable[[], Predictor],
        background: Callable[[], Table],
    ) -> None:
        if set(options) != _KEYS or options["refit"] not in REFITS:
            raise ConfigError(
                f"prior {dict(options)!r}; allowed: {', '.join(sorted(_KEYS))}, refit "
                f"{', '.join(REFITS)}"
            )
        folder = Path(options["folder"])
        if folder_digest(folder) != options["digest"]:
            raise DataError(
                f"predictor in {str(folder)!r} has other content than the run began with; "
                "allowed: the same"
            )
        self.refit, self.line = str(options["refit"]), str(options["line"])
        self.adapted, self.trusted = bool(options["adapted"]), bool(options["trusted"])
        self._digest, self._plain = str(options["digest"]), make
        warm: Any = resolve(PREDICTORS, "warm", "predictor")
        self._begin: Callable[[], Predictor] = warm.begins_at(
            folder,
            space,
            adapted=self.adapted,
            background=background,
            make=make,
            frozen=self.refit == "never",
        )

    def start(self) -> Predictor:
        """What chooses before the first fit."""
        return self._begin()

    def make(self) -> Predictor:
        """What is fitted."""
        return self._plain() if self.refit == "scratch" else self._begin()

    def settings(self) -> dict[str, Any]:
        """What proposals depend on; where the folder lies is none of it."""
        return {
            "digest": self._digest,
            "refit": self.refit,
            "adapted": self.adapted,
            "trusted": self.trusted,
        }
