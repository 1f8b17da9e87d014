"""What running many schedules at once saves: model calls by shared first steps, time by batches.

    python -m searchlab.experiments.benchmarks.trajectories [--quick] [--check] [--out FILE]

The schedules are the known solvers, and what a search of the digits model proposed, in its order.

- counts: model evaluations that the schedules need over those that were run, chunk by chunk as the
  recipe does, within the bound of memory. They depend on the schedules alone, so that a model
  that does nothing stands in.
- times: populations of 8 (a search's chunk) and 64 (a screening's) against the same schedules one
  by one, both with the tree, taking turns. Beside them stands the time of the bare model calls.
- bits: the same final states, in populations and alone, with and without the padding of few rows.
  The digits model pads for itself, so that a plain network of dense layers shows the difference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from searchlab.evaluators.sampling import SamplingProblem
from searchlab.evaluators.trajectories import MIN_ROWS, PrefixTree
from searchlab.experiments.benchmarks import _schedule_runs as runs
from searchlab.experiments.benchmarks._common import Aim, Journal, Time, flags, spread, timed
from searchlab.experiments.solver_schedule import SolverScheduleOptions, build
from searchlab.experiments.solver_schedule_problems import digits_problem
from searchlab.search import run
from searchlab.spaces.solver_schedule.families import fixed_family
from searchlab.spaces.solver_schedule.table import CoefficientTable, compile_schedule

Tables = Sequence[CoefficientTable]
Model = Callable[[Tensor, Tensor], Tensor]

FAMILY_CHUNK = 64
SEARCH_CHUNK = 8
MAX_ROWS = 4000
NOISE_SEED = 7
FAMILY_SAVES, SEARCH_SAVES = 2.3, 1.15


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        nfe: lowest and highest number of model calls of the known solvers.
        search_nfe: the same of the search that the candidates come from.
        budget: evaluations of that search.
        search_samples: samples per evaluation of that search; None = the recipe's own.
        timed: schedules per side of a timing.
        repeats: of every timing.
        samples: sample counts, with the limit of the time of a population of 8 over one by one.
        few: sample counts of the comparison of bits.
    """

    nfe: tuple[int, int]
    search_nfe: tuple[int, int]
    budget: int
    search_samples: int | None
    timed: int
    repeats: int
    samples: dict[int, float | None]
    few: tuple[int, ...]


FULL = Sizes(
    nfe=(5, 10),
    search_nfe=(5, 10),
    budget=1200,
    search_samples=None,
    timed=64,
    repeats=5,
    samples={64: 1 / 1.5, 256: None, 1000: 1.05},
    few=(1, 2, 3, 4, 5, 6, 7),
)
QUICK = Sizes(
    nfe=(5, 6),
    search_nfe=(5, 5),
    budget=80,
    search_samples=16,
    timed=8,
    repeats=2,
    samples={64: 0.85, 500: 1.15},
    few=(1, 7),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments, add=runs.add_threads)
    torch.set_num_threads(options.threads)
    sizes = QUICK if options.quick else FULL
    journal = Journal("trajectories", options)
    problem, _ = digits_problem()
    for samples in (64, 500):
        _family(journal, problem, sizes.nfe, samples)
    found = proposed(sizes)
    for samples in (256, 2000):
        figures = {
            "chunk": SEARCH_CHUNK,
            "samples": samples,
            **_count(found, SEARCH_CHUNK, samples),
        }
        aim = Aim("needed over run", figures["needed_over_run"], "at least", SEARCH_SAVES)
        journal.case(f"model calls saved, a search, {samples} samples", figures, aims=[aim])
    chosen = _spaced(found, sizes.timed)
    for samples, limit in sizes.samples.items():
        for size in (SEARCH_CHUNK, FAMILY_CHUNK):
            if size <= len(chosen):
                bound = limit if size == SEARCH_CHUNK else None
                _times(journal, problem, chosen, (samples, size, sizes.repeats), bound)
    _bits(journal, problem, chosen, sizes.few)
    return journal.close()


def proposed(sizes: Sizes) -> list[CoefficientTable]:
    """What a search proposed beyond the known points, in its order."""
    low, high = sizes.search_nfe
    small = sizes.search_samples is not None
    settings = SolverScheduleOptions(
        nfe=f"{low}..{high}",
        budget=sizes.budget,
        samples=sizes.search_samples,
        held_out=16 if small else 64,
        report_banks=2,
    )
    result = run(build(settings))
    assert result.records is not None
    varied = np.array([origin == "vary" for origin in result.records.origin])
    first_final = 1000
    records = result.records.take(np.flatnonzero(varied & (result.records.stage < first_final)))
    population = result.space.unpack(records.genotypes)
    return [compile_schedule(schedule) for schedule in result.space.plans(population)]


def _spaced(found: Tables, count: int) -> list[CoefficientTable]:
    """Whole chunks of the search, spread over its course."""
    chunks = [found[at : at + SEARCH_CHUNK] for at in range(0, len(found), SEARCH_CHUNK)]
    wanted = count // SEARCH_CHUNK
    return [table for at in range(wanted) for table in chunks[at * len(chunks) // wanted]]


def _chunks(tables: Tables, size: int) -> list[Tables]:
    return [tables[at : at + size] for at in range(0, len(tables), size)]


def _family(journal: Journal, problem: SamplingProblem, nfe: tuple[int, int], samples: int) -> None:
    """The known solvers of all numbers of calls as the recipe scores them, then each number."""
    parts = {}
    every: list[CoefficientTable] = []
    for calls in range(nfe[0], nfe[1] + 1):
        family = [compile_schedule(s) for s in fixed_family(problem.noise, calls).values()]
        parts[calls] = _count(family, FAMILY_CHUNK, samples)
        every += family
    figures = {"chunk": FAMILY_CHUNK, "samples": samples, **_count(every, FAMILY_CHUNK, samples)}
    aim = Aim("needed over run", figures["needed_over_run"], "at least", FAMILY_SAVES)
    journal.case(
        f"model calls saved, known solvers, {samples} samples",
        {**figures, "by_nfe": parts},
        aims=[aim],
    )


def _count(tables: Tables, chunk: int, samples: int) -> dict[str, Any]:
    # Rows are counted, whatever their width.
    tree = PrefixTree(
        lambda x, t: x, torch.zeros((samples, 1)), mean=torch.zeros(1), max_rows=MAX_ROWS
    )
    for part in _chunks(tables, chunk):
        tree.run(part)
    return {
        "schedules": len(tables),
        "needed": tree.work.evaluations,
        "run": tree.work.run,
        "needed_over_run": round(tree.work.evaluations / tree.work.run, 4),
    }


def _tree(model: Model, problem: SamplingProblem, start: Tensor) -> PrefixTree:
    return PrefixTree(model, start, mean=problem.mean, max_rows=MAX_ROWS)


def _times(
    journal: Journal,
    problem: SamplingProblem,
    tables: Tables,
    shape: tuple[int, int, int],
    limit: float | None,
) -> None:
    """Populations against one by one; `shape` is (samples, population, repeats)."""
    samples, size, repeats = shape
    start = problem.start(NOISE_SEED, samples)
    groups = _chunks(tables, size)
    calls: list[tuple[Tensor, Tensor]] = []

    def listening(x: Tensor, t: Tensor) -> Tensor:
        calls.append((x, t))
        return problem.denoise(x, t)

    with torch.no_grad():
        _populations(_tree(listening, problem, start), groups)
        bare = [timed(lambda: [problem.denoise(x, t) for x, t in calls]) for _ in range(repeats)]
        together: list[Time] = []
        apart: list[Time] = []
        for repeat in range(repeats):
            sides: list[tuple[list[Time], Callable[[], object]]] = [
                (together, lambda: _populations(_tree(problem.denoise, problem, start), groups)),
                (apart, lambda: _one_by_one(_tree(problem.denoise, problem, start), groups)),
            ]
            for into, side in sides if repeat % 2 else reversed(sides):
                into.append(timed(side))
    pairs = list(zip(together, apart, strict=True))
    cpu = spread([a.cpu / b.cpu for a, b in pairs])
    rows = [len(x) for x, _ in calls]
    figures: dict[str, Any] = {
        "samples": samples,
        "population": size,
        "schedules": len(tables),
        "repeats": repeats,
        "cpu_over_one_by_one": cpu,
        "wall_over_one_by_one": spread([a.wall / b.wall for a, b in pairs]),
        "population_cpu_s": spread([a.cpu for a, _ in pairs]),
        "one_by_one_cpu_s": spread([b.cpu for _, b in pairs]),
        "bare_model_calls_cpu_s": spread([part.cpu for part in bare]),
        "model_calls": len(calls),
        "most_rows_per_call": max(rows),
    }
    aims = [Aim("rows per model call", max(rows), "at most", max(MAX_ROWS, samples))]
    if limit is not None:
        aims.append(Aim("cpu over one by one, median", cpu["median"], "at most", limit))
    journal.case(f"time, {samples} samples, populations of {size}", figures, aims=aims)


def _populations(tree: PrefixTree, groups: Sequence[Tables]) -> list[Tensor]:
    return [tree.run(group) for group in groups]


def _one_by_one(tree: PrefixTree, groups: Sequence[Tables]) -> list[Tensor]:
    return [tree.run([table]) for group in groups for table in group]


def _bits(journal: Journal, problem: SamplingProblem, tables: Tables, few: Sequence[int]) -> None:
    """Largest difference between a population and the same schedules alone."""
    chosen = tables[:SEARCH_CHUNK]
    more = (*few, 16, 64, 100) if len(few) > 2 else (*few, 16)
    for model, named, padding, counts in (
        (problem.denoise, "the digits model", MIN_ROWS, more),
        (_dense(), "dense layers", MIN_ROWS, more),
        (_dense(), "dense layers, no padding", 1, few),
    ):
        differing = {}
        for samples in counts:
            start = problem.start(NOISE_SEED, samples)
            one = _finals(model, problem, start, padding, [chosen])
            other = _finals(model, problem, start, padding, [[table] for table in chosen])
            differing[samples] = float((one - other).abs().max())
        count = sum(value > 0 for value in differing.values())
        kind: Literal["at most", "at least"] = "at most" if padding > 1 else "at least"
        figures = {"rows_padded_to": padding, "largest_difference_by_samples": differing}
        aim = Aim("sample counts with other bits", count, kind, 0 if padding > 1 else 1)
        journal.case(f"bits, {named}", figures, aims=[aim])


def _dense() -> Model:
    """Dense layers with fixed weights and nothing that pads or cuts calls."""
    generator = torch.Generator().manual_seed(0)
    widths = ((64, 256), (256, 256), (256, 64))
    weights = [torch.randn(shape, generator=generator) / shape[0] ** 0.5 for shape in widths]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        for weight in weights:
            x = torch.tanh(x @ weight)
        return x

    return denoise


def _finals(
    model: Model, problem: SamplingProblem, start: Tensor, padding: int, groups: Sequence[Tables]
) -> Tensor:
    """Final states (C, B, d), every group run on its own without anything remembered."""
    finals = []
    for group in groups:
        tree = PrefixTree(model, start, mean=problem.mean, max_rows=MAX_ROWS, min_rows=padding)
        with torch.no_grad():
            finals.append(tree.run(group))
    return torch.cat(finals)


if __name__ == "__main__":
    sys.exit(main())
