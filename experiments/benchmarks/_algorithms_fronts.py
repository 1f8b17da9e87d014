"""Fronts: hypervolume after 2,000 evaluations beside pymoo's NSGA-II, as its users call it."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms import NSGA2, Told
from searchlab.experiments.benchmarks._common import Aim, Journal, data_folder, lacking, spread
from searchlab.experiments.benchmarks._fronts_instances import (
    Instance,
    Mixed,
    published_bits,
    synthetic_bits,
)
from searchlab.fronts import hypervolume

__all__ = ["run"]

EVALUATIONS = 2000
SEEDS = 15
POPULATION = 100  # pymoo's default, and that of our search in generations


def run(journal: Journal, quick: bool) -> None:
    """All cases of this part."""
    evaluations = 400 if quick else EVALUATIONS
    seeds = range(2 if quick else SEEDS)
    names = f"hypervolume at {evaluations}"
    cases: dict[str, Instance] = {"ZDT1 of 12 reals and 12 choices": Mixed()}
    if not quick:
        cases["ZDT3 of 12 reals and 12 choices"] = Mixed(waves=True)
    folder = data_folder("mixdq")
    if quick or folder is None:
        layers = 40 if quick else 200
        cases[f"made-up loss against bits, {layers} layers"] = synthetic_bits(layers)
    if not quick and folder is None:
        journal.skip("MixDQ's loss against bits, 420 layers", "no data folder")
    elif not quick and folder is not None:
        cases["MixDQ's loss against bits, 420 layers"] = published_bits(folder)
    missing = lacking("pymoo")
    for name, instance in cases.items():
        ours = [_ours(instance, seed, evaluations) for seed in seeds]
        whole = [_ours(instance, seed, evaluations, generations=True) for seed in seeds]
        figures: dict[str, Any] = {
            names: spread(ours),
            "in generations of 100": spread(whole),
            "reference": list(instance.reference),
        }
        aims = []
        if missing is None:
            peer = [_pymoo(instance, seed, evaluations) for seed in seeds]
            figures["pymoo NSGA-II"] = spread(peer)
            floor = statistics.median(peer)
            aims = [Aim("median hypervolume", statistics.median(ours), "at least", floor)]
        else:
            figures["pymoo NSGA-II"] = missing
        journal.case(name, figures, seeds=seeds, aims=aims)


def _covered(instance: Instance, parts: list[NDArray[np.float64]], n: int) -> float:
    return hypervolume(np.concatenate(parts)[:n], np.array(instance.reference))


def _ours(instance: Instance, seed: int, n: int, *, generations: bool = False) -> float:
    space = instance.space()
    algorithm = NSGA2(space, seed=seed)
    if generations:
        algorithm = NSGA2(
            space,
            seed=seed,
            population=POPULATION,
            n_random=POPULATION,
            quantum=POPULATION,
            every=POPULATION,
        )
    parts: list[NDArray[np.float64]] = []
    start = told = 0
    while told < n:
        jobs = algorithm.ask(start, algorithm.quantum)
        columns = jobs.population.columns
        nothing = np.empty((len(jobs), 0))
        losses = instance.losses(columns.get("x", nothing), columns["c"].astype(np.int64))
        algorithm.tell(Told(jobs.ids, jobs.population, losses, np.zeros(len(jobs))))
        parts.append(losses)
        start += algorithm.quantum
        told += len(jobs)
    return _covered(instance, parts, n)


def _pymoo(instance: Instance, seed: int, n: int) -> float:
    from pymoo.algorithms.moo.nsga2 import NSGA2 as Peer
    from pymoo.core.mixed import (
        MixedVariableDuplicateElimination,
        MixedVariableMating,
        MixedVariableSampling,
    )
    from pymoo.core.problem import Problem
    from pymoo.core.variable import Choice, Real
    from pymoo.optimize import minimize

    n_reals, labels = instance.parts()
    parts: list[NDArray[np.float64]] = []
    variables: dict[str, Any] = {f"x{i}": Real(bounds=(0, 1)) for i in range(n_reals)}
    variables |= {f"c{i}": Choice(options=list(range(k))) for i, k in enumerate(labels)}

    def column(X: Any, letter: str, count: int) -> NDArray[np.float64]:
        rows = [[row[f"{letter}{i}"] for i in range(count)] for row in X]
        return np.array(rows, dtype=np.float64).reshape(len(X), count)

    class Given(Problem):  # type: ignore[misc]
        """The instance with pymoo's names."""

        def __init__(self) -> None:
            super().__init__(vars=variables, n_obj=2)

        def _evaluate(self, X: Any, out: dict[str, Any], *args: Any, **more: Any) -> None:
            codes = column(X, "c", len(labels)).astype(np.int64)
            out["F"] = instance.losses(column(X, "x", n_reals), codes)
            parts.append(out["F"])

    unequal = MixedVariableDuplicateElimination()
    algorithm = Peer(
        pop_size=POPULATION,
        sampling=MixedVariableSampling(),
        mating=MixedVariableMating(eliminate_duplicates=unequal),
        eliminate_duplicates=unequal,
    )
    minimize(Given(), algorithm, ("n_evals", n), seed=seed, verbose=False)
    return _covered(instance, parts, n)
