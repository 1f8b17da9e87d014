"""The options of `run` that say which earlier run or predictor it begins with."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab.errors import ConfigError

if TYPE_CHECKING:
    from searchlab.config import SearchConfig

__all__ = ["add_data_flag", "add_flags", "refuse", "warm_start", "with_earlier"]


def add_data_flag(parser: Any) -> None:
    """Adds what `resume` has too."""
    parser.add_argument(
        "--with-data",
        action="store_true",
        help="the predictor that is left keeps the candidates it was fitted to",
    )


def add_flags(parser: argparse.ArgumentParser, *, taken: Collection[str] = ()) -> None:
    """Adds the options, apart from those that a recipe has itself."""
    group = parser.add_argument_group("earlier runs")
    if "predictor" not in taken:
        group.add_argument(
            "--predictor", metavar="DIR", help="an earlier run's predictor to begin with"
        )
    if "refit" not in taken:
        group.add_argument(
            "--refit",
            choices=("never", "warm", "scratch"),
            default=None,
            help="what fits make of it: never = it stays, warm = they begin at it (default), "
            "scratch = they forget it",
        )
    if "warm_start" not in taken:
        text = (
            "name or folder of another run over this space or one of its kind, whose best are "
            "proposed first"
        )
        group.add_argument("--warm-start", metavar="RUN", help=text)
    add_data_flag(group)


def with_earlier(
    config: SearchConfig, given: argparse.Namespace, taken: Collection[str]
) -> SearchConfig:
    """The configuration with the predictor and the seeds that the options ask for."""
    folder = None if "predictor" in taken else getattr(given, "predictor", None)
    refit = None if "refit" in taken else getattr(given, "refit", None)
    run = None if "warm_start" in taken else getattr(given, "warm_start", None)
    if refit is not None and folder is None:
        raise ConfigError(f"--refit {refit} without a predictor; allowed: with --predictor DIR")
    if run is not None:
        from searchlab.warm_start import with_warm_start

        config = with_warm_start(config, run)
    if folder is not None:
        from searchlab.prior import PriorRequest, with_prior

        config = with_prior(config, PriorRequest(Path(folder), refit or "warm"))
    return config


def refuse(given: argparse.Namespace, recipe: str) -> None:
    """Raises ConfigError where a run that is only opened is to begin with an earlier one."""
    for name in ("predictor", "refit", "warm_start"):
        if getattr(given, name, None) is not None:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} with recipe {recipe!r}; allowed: recipes that evaluate")


def warm_start(given: argparse.Namespace) -> str | None:
    """The run whose best are asked for."""
    run: str | None = getattr(given, "warm_start", None)
    return run
