"""Searched solver schedules on a mixture in closed form, against 224 known solvers.

    python -m searchlab.experiments.benchmarks.solver_schedule_mixture [--quick] [--check] [--out F]

One run per number of model calls and seed; every seed has noise banks of its own. A ratio is the
error of the searched schedule over that of the best known solver, both chosen on one bank and
reported on four others. The operator of the released code runs beside ours on the same budget.

`published` repeats the case with the start noise that the known figures of this problem were
measured on, where the best known solver is chosen by hindsight, and compares with what 2,500 steps
of plain evolution reached there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from searchlab.evaluators.gaussian_mixture import MixtureProblem
from searchlab.evaluators.trajectories import PrefixTree
from searchlab.experiments.benchmarks import _schedule_runs as runs
from searchlab.experiments.benchmarks._common import Aim, Journal, flags, spread
from searchlab.experiments.solver_schedule import SolverScheduleOptions
from searchlab.spaces.solver_schedule.families import fixed_family
from searchlab.spaces.solver_schedule.schedule import Schedule
from searchlab.spaces.solver_schedule.table import compile_schedule

BEST_FIXED = {5: 0.1079, 6: 0.0948, 8: 0.0591, 10: 0.0407}
PLAIN_EVOLUTION = {5: 0.0721, 6: 0.0599, 8: 0.0467, 10: 0.0316}
"""RMSE on the published noise: best of the 224 points there, and 2,500 steps of evolution."""


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    nfe: tuple[int, ...] = (5, 6, 8, 10)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    budget: int = 1000
    held_out: int = 2048
    samples: int = 2048
    banks: int = 4
    ratio: float = 0.85


QUICK = Sizes(nfe=(5,), seeds=(0,), budget=200, held_out=512, samples=256, banks=2, ratio=0.95)


@dataclass(frozen=True)
class PublishedNoise:
    """The 2,048 start states after the first 256 of ``default_rng(5)``, with their solutions."""

    start: torch.Tensor
    solution: torch.Tensor
    problem: MixtureProblem

    @staticmethod
    def make() -> PublishedNoise:
        problem = MixtureProblem()
        rng = np.random.default_rng(5)
        rng.normal(size=(256, problem.dimension))
        start = torch.from_numpy(rng.normal(size=(2048, problem.dimension)))
        ends = problem.noise.start, problem.noise.end
        solution = problem.reference_solution(start, start=ends[0], end=ends[1])
        return PublishedNoise(start, solution, problem)

    def rmse(self, schedules: Sequence[Schedule]) -> NDArray[np.float64]:
        """(C,) root mean square errors."""
        tree = PrefixTree(self.problem.denoise, self.start)
        finals = tree.run([compile_schedule(schedule) for schedule in schedules])
        return np.asarray(((finals - self.solution) ** 2).mean(dim=(1, 2)).sqrt())


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments, add=runs.add_flags)
    torch.set_num_threads(options.threads)
    sizes = QUICK if options.quick else Sizes()
    journal = Journal("solver_schedule_mixture", options)
    noise = PublishedNoise.make()
    with runs.database(options.folder) as base:
        for nfe in sizes.nfe:
            found: dict[runs.Preset, list[runs.Outcome]] = {"default": [], "released": []}
            errors: list[float] = []
            for seed in sizes.seeds:
                for preset, into in found.items():
                    result = runs.search(
                        base,
                        f"{preset} nfe {nfe} seed {seed}",
                        SolverScheduleOptions(
                            preset=preset,
                            problem="mixture",
                            nfe=str(nfe),
                            budget=sizes.budget,
                            samples=sizes.samples,
                            held_out=sizes.held_out,
                            report_banks=sizes.banks,
                            seed=seed,
                            data_seed=seed,
                        ),
                    )
                    outcome = runs.outcomes(result)[nfe]
                    into.append(outcome)
                    if preset == "default":
                        plan = result.space.plans(outcome.winner.population)
                        errors += noise.rmse(plan).tolist()
            _report(journal, sizes, nfe, found)
            _published(journal, sizes, nfe, noise, errors)
    return journal.close()


def _report(
    journal: Journal, sizes: Sizes, nfe: int, found: dict[runs.Preset, list[runs.Outcome]]
) -> None:
    worst = max(outcome.ratio for outcome in found["default"])
    journal.case(
        f"rmse, nfe {nfe}",
        {
            "nfe": nfe,
            "evaluations": sizes.budget,
            "known_points": 224,
            "samples": sizes.samples,
            "report": f"{len(found['default'][0].winner.report)} banks of {sizes.held_out}",
            **runs.figures(found),
        },
        seeds=sizes.seeds,
        aims=[Aim("highest ratio of all seeds", worst, "at most", sizes.ratio)],
    )


def _published(
    journal: Journal, sizes: Sizes, nfe: int, noise: PublishedNoise, errors: Sequence[float]
) -> None:
    family = fixed_family(noise.problem.noise, nfe, family="mixture")
    fixed = noise.rmse(list(family.values()))
    best = int(np.argmin(fixed))
    full = sizes.budget >= 1000
    journal.case(
        f"published noise, nfe {nfe}",
        {
            "nfe": nfe,
            "evaluations": sizes.budget,
            "searched": spread(errors),
            "best_fixed_by_hindsight": float(f"{fixed[best]:.5g}"),
            "best_fixed_name": list(family)[best],
            "best_fixed_published": BEST_FIXED[nfe],
            "plain_evolution_published": PLAIN_EVOLUTION[nfe],
            "ratio": spread([error / float(fixed[best]) for error in errors]),
        },
        seeds=sizes.seeds,
        aims=[
            Aim(
                "best fixed differs from the published value by",
                abs(float(fixed[best]) - BEST_FIXED[nfe]),
                "at most",
                1e-4,
            ),
            Aim(
                "median over seeds", float(np.median(errors)), "at most", PLAIN_EVOLUTION[nfe], full
            ),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
