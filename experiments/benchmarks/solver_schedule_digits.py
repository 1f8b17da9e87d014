"""Searched solver schedules on the digits model, against the whole family of known solvers.

    python -m searchlab.experiments.benchmarks.solver_schedule_digits [--quick] [--check] [--out F]
        [--objective rmse|fd]

The family is 6 grids x 4 endings x 15 solvers, most with and without a lower order at the end: 648
points per number of model calls, all of them scored on few samples, the best 24 on as many as the
search uses, the best 5 on the selection split, the best one on the report banks, exactly as for
searched schedules. Solvers with an analytic first evaluation (2 x 648 points) are listed apart.
One run per seed covers all numbers of calls; seeds share the noise banks, so that the family is
paid for once. By hindsight is the smallest value that any point of the family has on the first
report bank itself, a bound that no rule of choosing beats.

"rmse" is the error against the solution of 60 calls, "fd" the Fréchet distance of a classifier's
features to those of the real images; an fd below that of the 60 calls means that the error of few
steps cancels an error of the model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from searchlab.evaluator import REPORT_REPLICATE
from searchlab.experiments.benchmarks import _schedule_runs as runs
from searchlab.experiments.benchmarks._common import Aim, Journal, flags
from searchlab.experiments.solver_schedule import SolverScheduleOptions, build
from searchlab.population import Jobs

Objective = Literal["rmse", "fd"]

CHUNK = 64


@dataclass(frozen=True)
class Sizes:
    """How much is run for one objective.

    Attributes:
        nfe: lowest and highest number of model calls.
        seeds: of the searches.
        released: how many of the seeds the released operator runs too.
        per_nfe: evaluations beyond the family, per number of calls.
        samples: per evaluation of the search; None = the recipe's own.
        held_out: samples per bank of the selection and report splits; None = the recipe's own.
        reference_steps: calls of the reference solution; None = the recipe's own.
        banks: of the report split.
        hindsight: numbers of calls at which the whole family is scored on a report bank.
        ratio: by number of calls, the limit of the ratio.
        of: what the limit holds for, the worst seed or the mean.
    """

    nfe: tuple[int, int]
    seeds: tuple[int, ...]
    released: int
    per_nfe: int
    samples: int | None
    held_out: int | None
    reference_steps: int | None
    banks: int
    hindsight: tuple[int, ...]
    ratio: dict[int, float]
    of: Literal["highest", "mean"]


FULL: dict[Objective, Sizes] = {
    "rmse": Sizes(
        nfe=(5, 10),
        seeds=(0, 1, 2),
        released=1,
        per_nfe=400,
        samples=None,
        held_out=None,
        reference_steps=None,
        banks=4,
        hindsight=(5, 10),
        ratio={5: 0.7, 6: 0.7, 8: 0.7, 10: 0.7},
        of="highest",
    ),
    "fd": Sizes(
        nfe=(3, 10),
        seeds=(0, 1, 2),
        released=0,
        per_nfe=150,
        samples=None,
        held_out=None,
        reference_steps=None,
        banks=4,
        hindsight=(),
        ratio={3: 0.85, 4: 0.85, 5: 0.85, 6: 1.0, 7: 1.0, 8: 1.0, 9: 1.0, 10: 1.0},
        of="mean",
    ),
}

QUICK: dict[Objective, Sizes] = {
    "rmse": Sizes(
        nfe=(4, 4),
        seeds=(0,),
        released=0,
        per_nfe=80,
        samples=64,
        held_out=200,
        reference_steps=20,
        banks=2,
        hindsight=(),
        ratio={4: 0.85},
        of="highest",
    ),
    "fd": Sizes(
        nfe=(4, 4),
        seeds=(0,),
        released=0,
        per_nfe=64,
        samples=120,
        held_out=300,
        reference_steps=20,
        banks=2,
        hindsight=(),
        ratio={4: 1.0},
        of="mean",
    ),
}


def _options(
    objective: Objective, preset: runs.Preset, sizes: Sizes, seed: int
) -> SolverScheduleOptions:
    low, high = sizes.nfe
    return SolverScheduleOptions(
        preset=preset,
        problem="digits",
        objective=objective,
        nfe=f"{low}..{high}",
        budget=sizes.per_nfe * (high - low + 1),
        samples=sizes.samples,
        held_out=sizes.held_out,
        reference_steps=sizes.reference_steps,
        report_banks=sizes.banks,
        seed=seed,
    )


def hindsight(options: SolverScheduleOptions) -> dict[str, Any]:
    """The known solver that is best on the first report bank, among all of one number of calls."""
    config = build(options)
    seeds = config.stages[0].seeds
    assert seeds is not None
    plain = [row for row, origin in enumerate(seeds.origin) if origin.startswith("baseline:")]
    evaluator = config.stages[-1].evaluator
    keys = config.stages[-1].space.keys(seeds.population)
    values: list[float] = []
    for first in range(0, len(plain), CHUNK):
        rows = plain[first : first + CHUNK]
        jobs = Jobs(
            ids=np.arange(first, first + len(rows)),
            population=seeds.population.take(rows),
            keys=tuple(keys[row] for row in rows),
            fidelity=len(evaluator.fidelities) - 1,
            told_at_ask=0,
            origin=("known",) * len(rows),
            parents=np.full((len(rows), 2), -1),
            replicate=REPORT_REPLICATE,
        )
        values += evaluator.evaluate(jobs).values[:, 0].tolist()
    best = int(np.nanargmin(values))
    name = seeds.origin[plain[best]].split(":", 1)[1]
    return {"value": values[best], "name": name, "points": len(plain)}


def _objective(parser: argparse.ArgumentParser) -> None:
    runs.add_flags(parser)
    parser.add_argument("--objective", choices=("rmse", "fd"), help="only this one")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments, add=_objective)
    torch.set_num_threads(options.threads)
    journal = Journal("solver_schedule_digits", options)
    wanted: tuple[Objective, ...] = (options.objective,) if options.objective else ("rmse", "fd")
    for objective in wanted:
        with runs.database(options.folder) as base:
            _measure(journal, base, objective, (QUICK if options.quick else FULL)[objective])
    return journal.close()


def _measure(journal: Journal, base: Any, objective: Objective, sizes: Sizes) -> None:
    found: dict[runs.Preset, list[dict[int, runs.Outcome]]] = {"default": [], "released": []}
    for at, seed in enumerate(sizes.seeds):
        for preset, into in found.items():
            if preset == "released" and at >= sizes.released:
                continue
            name = f"{objective} {preset} seed {seed}"
            settings = _options(objective, preset, sizes, seed)
            into.append(runs.outcomes(runs.search(base, name, settings)))
    used: dict[runs.Preset, list[dict[int, runs.Outcome]]]
    used = {preset: outcomes for preset, outcomes in found.items() if outcomes}
    for nfe in range(sizes.nfe[0], sizes.nfe[1] + 1):
        _one(journal, objective, sizes, nfe, used)
    _over_calls(journal, objective, sizes, found["default"])


def _one(
    journal: Journal,
    objective: Objective,
    sizes: Sizes,
    nfe: int,
    found: dict[runs.Preset, list[dict[int, runs.Outcome]]],
) -> None:
    here = {preset: [outcome[nfe] for outcome in all_] for preset, all_ in found.items()}
    line: dict[str, Any] = {
        "nfe": nfe,
        "evaluations": sizes.per_nfe,
        "report_banks": len(here["default"][0].winner.report),
        **runs.figures(here),
    }
    if nfe in sizes.hindsight:
        settings = _options(objective, "default", sizes, sizes.seeds[0])
        best = hindsight(replace(settings, nfe=str(nfe), budget=None))
        first = here["default"][0]
        line["hindsight_on_first_bank"] = {
            **best,
            "searched": first.winner.report[0],
            "fixed_as_chosen": first.fixed.report[0],
            "ratio": first.winner.report[0] / best["value"],
        }
    aims = []
    if nfe in sizes.ratio:
        ratios = [outcome.ratio for outcome in here["default"]]
        value = max(ratios) if sizes.of == "highest" else float(np.mean(ratios))
        aims = [Aim(f"{sizes.of} ratio of the seeds", value, "at most", sizes.ratio[nfe])]
    journal.case(f"{objective}, nfe {nfe}", line, seeds=sizes.seeds, aims=aims)


def _over_calls(
    journal: Journal,
    objective: Objective,
    sizes: Sizes,
    default: Sequence[dict[int, runs.Outcome]],
) -> None:
    """How the searched value changes as the number of model calls grows."""
    low, high = sizes.nfe
    if low == high:
        return
    curves = [[run[nfe].value for nfe in range(low, high + 1)] for run in default]
    rises = [b / a for curve in curves for a, b in pairwise(curve)]
    aims = []
    if objective == "rmse":
        aims = [Aim("value over that of one call less, highest", max(rises), "at most", 1.0)]
    journal.case(
        f"{objective} as the calls grow",
        {"nfe": list(range(low, high + 1)), "searched": curves, "highest_rise": max(rises)},
        seeds=sizes.seeds,
        aims=aims,
    )


if __name__ == "__main__":
    sys.exit(main())
