"""Tables: how soon a top cell of NAS-Bench-201 is found, by halving too, and what a race saves.

Where the benchmark's table is not there, the same is measured on a twin whose values are made up,
without aims.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Seeds, Told
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.evaluator import Fidelity, FunctionEvaluator, Objective
from searchlab.experiments.benchmarks._common import Aim, Journal, data_folder, spread
from searchlab.population import OK
from searchlab.search import run as run_search
from searchlab.space import Space
from searchlab.study import MemoryRun
from searchlab.variables import Choice

__all__ = ["run"]

SPACE = Space(op=Choice((0, 1, 2, 3, 4), shape=(6,)))
POWERS = 5 ** np.arange(6)[::-1]
TOP = 16
MARKS = (50, 100, 200)
PLAIN = ("evolution", "regularised_evolution", "local_search", "eda", "random")
CHEAP = 0.03  # 12 of 200 epochs on half of the training set
# A race: so many cells, with noise that all cells of a block share and noise of their own.
ENTRANTS, SHARED, OWN = 24, 1.0, 0.5


@dataclass(frozen=True)
class Cells:
    """Accuracy (%) of all 15,625 cells, by the number that their six digits are."""

    name: str
    full: NDArray[np.float64]
    cheap: NDArray[np.float64]

    @property
    def top(self) -> float:
        """What one of the best 16 cells reaches."""
        return float(np.sort(self.full)[-TOP])

    def evaluator(self) -> FunctionEvaluator:
        def accuracy(columns: Any, fidelity: str, seed: int) -> NDArray[np.float64]:
            return (self.full if fidelity == "full" else self.cheap)[_number(columns["op"])]

        return FunctionEvaluator(
            accuracy,
            SPACE,
            (Objective("accuracy", "max"),),
            (Fidelity("12 epochs", CHEAP), Fidelity("full")),
            columns=True,
        )


def _number(cells: NDArray[Any]) -> NDArray[np.int64]:
    number: NDArray[np.int64] = cells.astype(np.int64) @ POWERS
    return number


def _real(folder: Path) -> Cells:
    import pandas as pd

    frame = pd.read_csv(folder / "nasbench201.csv.gz", dtype={"genotype": str})
    number = _number(np.array([list(text) for text in frame["genotype"]]))
    columns = []
    for name in ("cifar10_acc200", "cifar10_val12"):
        column = np.empty(len(frame))
        column[number] = frame[name]
        columns.append(column)
    return Cells("nasbench201 cifar10", *columns)


def _twin() -> Cells:
    """Additive and pairwise parts, a few cells that do not work, and a noisy cheap measurement."""
    rng = np.random.default_rng(201)
    cells = np.arange(5**6)[:, None] // POWERS % 5
    quality = rng.normal(size=(6, 5))[np.arange(6), cells].sum(axis=1)
    for a in range(6):
        for b in range(a):
            quality += 0.4 * rng.normal(size=(5, 5))[cells[:, a], cells[:, b]]
    full = 90 + 1.2 * (quality - quality.max())
    full[(cells[:, [0, 1, 3]] == 0).all(axis=1)] = 10.0
    return Cells("twin", full, full - 8 + rng.normal(size=len(full)))


# -- how soon a top cell is found ---------------------------------------------------------------


def _first_top(algorithm: Algorithm, cells: Cells, most: int) -> float:
    """Evaluations until a top cell, inf where it takes more than `most`."""
    paid, start = 0, 0
    while paid < most:
        jobs = algorithm.ask(start, algorithm.quantum)
        start += algorithm.quantum
        found = cells.full[_number(jobs.population["op"])]
        good = np.flatnonzero(found >= cells.top)
        if len(good) and paid + int(good[0]) < most:
            return paid + int(good[0]) + 1
        paid += len(jobs)
        algorithm.tell(Told(jobs.ids, jobs.population, -found[:, None], np.zeros(len(jobs))))
    return float("inf")


def _shares(needed: list[float]) -> dict[str, float]:
    """Percentage of the seeds that had a top cell by each mark."""
    return {str(mark): 100 * float(np.mean(np.array(needed) <= mark)) for mark in MARKS}


def _row(journal: Journal, cells: Cells, seeds: range, *, judged: bool) -> None:
    for name in PLAIN:
        spec = AlgorithmSpec(name)
        needed = [
            _first_top(spec.build(SPACE, seed=seed, first_id=0, seeds=None), cells, max(MARKS))
            for seed in seeds
        ]
        shares = _shares(needed)
        aims = []
        if name == "evolution" and judged:
            aims = [
                Aim("% of seeds with a top cell at 50", shares["50"], "at least", 38.0),
                Aim("% of seeds with a top cell at 100", shares["100"], "at least", 85.0),
            ]
        journal.case(
            f"{cells.name}: a top-{TOP} cell, {name}",
            {"percent of seeds after evaluations": shares},
            seeds=seeds,
            aims=aims,
        )


def _halving(journal: Journal, cells: Cells, seeds: range) -> None:
    """The same by successive halving over 12 epochs and the truth; marks are total cost."""
    needed, cheap = [], []
    for seed in seeds:
        stage = Stage(
            "search", SPACE, cells.evaluator(), AlgorithmSpec("successive_halving"), Budget(200)
        )
        store = MemoryRun()
        run_search(SearchConfig((stage,), seed=seed), store=store)
        records = store.records()
        records = records.take(np.flatnonzero(records.state == OK))
        cost = np.cumsum(np.where(records.fidelity == 0, CHEAP, 1.0))
        good = (records.fidelity == 1) & (records.values[:, 0] >= cells.top)
        needed.append(float(cost[good][0]) if good.any() else float("inf"))
        cheap.append(int((records.fidelity == 0).sum()))
    journal.case(
        f"{cells.name}: a top-{TOP} cell, successive_halving",
        {
            "percent of seeds after cost": _shares(needed),
            "cheap measurements": spread([float(n) for n in cheap]),
            "cost of a cheap measurement": CHEAP,
        },
        seeds=seeds,
    )


# -- what a race saves --------------------------------------------------------------------------


def _race(journal: Journal, cells: Cells, seeds: range, *, judged: bool) -> None:
    """Which of 24 good cells is the best, under noise: racing beside measuring all alike."""
    blocks = 64
    jobs_paid, losses, even_losses, kept = [], [], [], 0
    numbers = np.argsort(-cells.cheap)[:1000]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        chosen = rng.choice(numbers, ENTRANTS, replace=False)
        truth = cells.full[chosen]
        codes = (chosen[:, None] // POWERS % 5).tolist()
        population = SPACE.population([{"op": code} for code in codes])
        entrants = Seeds(population, ("seed",) * ENTRANTS)
        noise = SHARED * rng.normal(size=(blocks, 1)) + OWN * rng.normal(size=(blocks, ENTRANTS))
        values = truth + noise
        race = AlgorithmSpec("paired_race", {"blocks": blocks}).build(
            SPACE, seed=seed, first_id=0, seeds=entrants
        )
        paid = 0
        for block in range(blocks):
            jobs = race.ask(block * ENTRANTS, ENTRANTS)
            if not len(jobs):
                break
            rows = jobs.ids - block * ENTRANTS
            paid += len(rows)
            told = -values[block, rows][:, None]
            race.tell(Told(jobs.ids, jobs.population, told, np.zeros(len(rows))))
        alive = np.flatnonzero(race.survivors(block + 1))  # type: ignore[attr-defined]
        winner = alive[np.argmax(values[: block + 1, alive].mean(axis=0))]
        even = np.argmax(values[: max(1, paid // ENTRANTS)].mean(axis=0))
        jobs_paid.append(float(paid))
        losses.append(float(truth.max() - truth[winner]))
        even_losses.append(float(truth.max() - truth[even]))
        kept += int(np.argmax(truth) in alive)
    share = kept / len(seeds)
    journal.case(
        f"{cells.name}: racing {ENTRANTS} cells, alpha .05",
        {
            "jobs": spread(jobs_paid),
            "jobs without a race": blocks * ENTRANTS,
            "share of races that kept the best": share,
            "accuracy lost, mean": float(np.mean(losses)),
            "accuracy lost by equal blocks of as many jobs, mean": float(np.mean(even_losses)),
        },
        seeds=seeds,
        aims=[
            Aim("share that kept the best", share, "at least", 0.95, binding=judged),
            Aim("jobs, median", float(np.median(jobs_paid)), "at most", 768.0, binding=judged),
        ],
    )


def run(journal: Journal, quick: bool) -> None:
    """Prints this part's cases."""
    seeds = range(8) if quick else range(50)
    folder = data_folder("nasbench201")
    if folder is None:
        journal.skip("nasbench201 cifar10", "no nasbench201 in $SEARCHLAB_DATA; a twin instead")
    cells = _twin() if folder is None else _real(folder)
    _row(journal, cells, seeds, judged=folder is not None and not quick)
    _halving(journal, cells, seeds)
    _race(journal, cells, seeds, judged=folder is not None)
