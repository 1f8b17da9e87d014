"""Runs of the solver-schedule recipe for the benchmarks, and what they came to per NFE."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from searchlab.experiments.benchmarks._common import spread
from searchlab.experiments.solver_schedule import SolverScheduleOptions, build
from searchlab.final import Contender
from searchlab.result import Result
from searchlab.search import run
from searchlab.study import Database

__all__ = [
    "Outcome",
    "Preset",
    "add_flags",
    "add_threads",
    "database",
    "figures",
    "names",
    "outcomes",
    "search",
]

Preset = Literal["default", "released"]
DIGITS = 5


@dataclass(frozen=True)
class Outcome:
    """One number of model calls of one run, all on the report split.

    Attributes:
        seed: of the search.
        winner: the schedule that the selection split chose among the searched ones.
        fixed: the known solver chosen likewise.
        analytic: the known solver with an analytic first evaluation chosen likewise; None where
            the problem has none.
        seconds: of the whole run, which may cover several numbers of calls.
    """

    seed: int
    winner: Contender
    fixed: Contender
    analytic: Contender | None
    seconds: float

    @property
    def value(self) -> float:
        """Mean of the winner over the report banks."""
        return float(np.mean(self.winner.report))

    @property
    def fixed_value(self) -> float:
        return float(np.mean(self.fixed.report))

    @property
    def ratio(self) -> float:
        """Winner over the best known solver, both as means over the same report banks."""
        return self.value / self.fixed_value

    @property
    def analytic_ratio(self) -> float:
        if self.analytic is None:
            return float("nan")
        return self.value / float(np.mean(self.analytic.report))


def add_threads(parser: argparse.ArgumentParser) -> None:
    """`--threads`."""
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--folder` and `--threads`."""
    add_threads(parser)
    parser.add_argument(
        "--folder",
        type=Path,
        help="keep the runs in a database there, so that a stopped benchmark goes on",
    )


@contextmanager
def database(folder: Path | None) -> Iterator[Database]:
    """The runs' database; runs that score the same points on the same noise share the values."""
    with tempfile.TemporaryDirectory() as scratch:
        target = folder if folder is not None else Path(scratch)
        target.mkdir(parents=True, exist_ok=True)
        base = Database(target / "benchmark.db")
        try:
            yield base
        finally:
            base.close()


def search(base: Database, name: str, options: SolverScheduleOptions) -> Result:
    """Runs the recipe, or goes on with the run of this name."""
    config = build(options)
    store = base.open_run(
        name,
        config=config.describe(),
        space=config.stages[-1].space.fingerprint,
        seed=config.seed,
        out="",
    )
    return run(config, store=store)


def outcomes(result: Result) -> dict[int, Outcome]:
    """What a finished run came to, by number of model calls."""
    out = {}
    for group in result.groups:
        fixed = group.best_baseline()
        assert group.winner is not None
        assert fixed is not None
        out[group.group] = Outcome(
            result.meta["seed"],
            group.winner,
            fixed,
            group.best_baseline("baseline-analytic"),
            result.meta["seconds"],
        )
    return out


def names(contenders: Sequence[Contender | None]) -> list[str]:
    """Names of known solvers without repeats."""
    return sorted({contender.name for contender in contenders if contender is not None})


def figures(runs: Mapping[Preset, Sequence[Outcome]]) -> dict[str, Any]:
    """The figures of one number of model calls: the default's runs, and others beside them."""
    default = runs["default"]
    out: dict[str, Any] = {
        "searched": spread([outcome.value for outcome in default], DIGITS),
        "best_fixed": spread([outcome.fixed_value for outcome in default], DIGITS),
        "best_fixed_names": names([outcome.fixed for outcome in default]),
        "ratio": spread([outcome.ratio for outcome in default]),
        "ratio_per_bank": [
            [round(a / b, 4) for a, b in zip(o.winner.report, o.fixed.report, strict=True)]
            for o in default
        ],
        "gap_search_to_report": spread([o.value / o.winner.search for o in default]),
        "run_seconds": spread([outcome.seconds for outcome in default]),
    }
    if all(outcome.analytic is not None for outcome in default):
        out["best_analytic_first_names"] = names([outcome.analytic for outcome in default])
        out["ratio_to_analytic_first"] = spread([outcome.analytic_ratio for outcome in default])
    for preset, others in runs.items():
        if preset == "default":
            continue
        same = {outcome.seed: outcome for outcome in default}
        out[preset] = {
            "seeds": [outcome.seed for outcome in others],
            "searched": spread([outcome.value for outcome in others], DIGITS),
            "ratio": spread([outcome.ratio for outcome in others]),
            "default_over_this": spread([same[o.seed].value / o.value for o in others]),
        }
    return out
