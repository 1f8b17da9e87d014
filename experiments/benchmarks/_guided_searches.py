"""Tasks of the benchmark `guided`, and searches of them that are kept between its parts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Told
from searchlab.auto import choose
from searchlab.config import AlgorithmSpec
from searchlab.evaluators.table import TableEvaluator
from searchlab.experiments.benchmarks._algorithms_choices import PLACES, hidden, nk, string_space
from searchlab.population import OK, Jobs, Population
from searchlab.space import Space

__all__ = [
    "Kept",
    "Task",
    "Trace",
    "cells",
    "landscape",
    "made",
    "mixture",
    "searched",
    "string",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """Something to search: losses of candidates, and signals where there are some."""

    name: str
    space: Space
    losses: Callable[[Population], Floats]
    signals: Any = None
    best: float = 0.0


@dataclass(frozen=True)
class Trace:
    """Losses in the order of evaluation, CPU seconds of all proposals, and candidates chosen."""

    losses: Floats
    seconds: float
    chosen: int = 0

    def regret(self, task: Task, evaluations: int) -> float:
        return float(self.losses[:evaluations].min()) - task.best


def searched(
    algorithm: Algorithm, task: Task, most: int, *, lag: int = 1, until: float = -np.inf
) -> Trace:
    """Asks and tells by the engine's rule until so many are evaluated or a loss is reached."""
    losses: list[float] = []
    asked: list[Told] = []
    told, seconds = 0, 0.0
    for i in range(4 * most):
        begun = time.process_time()
        while told < i + 1 - lag:
            algorithm.tell(asked[told])
            told += 1
        jobs = algorithm.ask(i, 1)
        seconds += time.process_time() - begun
        values = task.losses(jobs.population) if len(jobs) else np.empty(0)
        losses += values.tolist()
        none = np.zeros(len(jobs))
        asked.append(Told(jobs.ids, jobs.population, values[:, None], none, jobs.predicted))
        if len(losses) == most or (len(values) and values[0] <= until):
            break
    return Trace(np.array(losses), seconds, getattr(algorithm, "chosen", 0))


def made(task: Task, name: str, seed: int, **options: Any) -> Algorithm:
    """An algorithm by name; one that reads signals gets the task's. `auto` is what that chooses."""
    spec = AlgorithmSpec(name, options)
    if name == "auto":
        spec = choose(task.space, evaluations=50, signals=task.signals is not None).spec
    return spec.build(task.space, seed=seed, first_id=0, seeds=None, signals=task.signals)


@dataclass
class Kept:
    """Searches that were made already, in a folder; so a benchmark that was stopped goes on.

    Attributes:
        folder: one file per kind of search; None = nothing is kept.
        until: seconds of the clock after which no further search is begun.
    """

    folder: Path | None = None
    until: float = np.inf
    begun: float = field(default_factory=time.monotonic)

    def trace(self, kind: str, seed: int, search: Callable[[], Trace]) -> Trace:
        """The search of a kind and a seed, made or read.

        Raises:
            TimeoutError: it is not there yet and no further one may begin.
        """
        file = None if self.folder is None else self.folder / f"{kind.replace('/', '_')}.json"
        known: dict[str, Any] = {}
        if file is not None and file.exists():
            known = json.loads(file.read_text("utf-8"))
        if str(seed) not in known:
            if time.monotonic() - self.begun > self.until:
                raise TimeoutError
            trace = search()
            row = {
                "losses": trace.losses.tolist(),
                "seconds": trace.seconds,
                "chosen": trace.chosen,
            }
            if file is None:
                return trace
            known[str(seed)] = row
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(known), "utf-8")
        row = known[str(seed)]
        return Trace(np.array(row["losses"]), row["seconds"], row["chosen"])


# -- tasks --------------------------------------------------------------------------------------


def cells(evaluator: TableEvaluator, *, signals: Any) -> Task:
    """NAS-Bench-201 as a task: loss = minus accuracy in percent."""

    def losses(population: Population) -> Floats:
        keys = evaluator.space.keys(population)
        jobs = Jobs(np.arange(len(keys)), population, keys)
        out: Floats = -evaluator.evaluate(jobs).values[:, 0]
        return out

    best = -float(evaluator.values()[:, 0].max())
    return Task("NAS-Bench-201 CIFAR-10", evaluator.space, losses, signals, best)


def string(seed: int) -> Task:
    """The places that differ from a hidden string."""
    loss = hidden(seed)
    return Task("hidden string", string_space(), lambda p: loss(p["x"]))


def landscape(seed: int) -> Task:
    """An NK landscape; its best is unknown, so that the regret is the loss itself."""
    loss = nk(seed)
    return Task(f"NK landscape, {PLACES} choices of 8, K 2", string_space(), lambda p: loss(p["x"]))


@lru_cache(maxsize=1)
def _mixture() -> tuple[Space, Any]:
    import torch

    from searchlab.experiments.solver_schedule import SolverScheduleOptions, build

    torch.set_num_threads(1)
    options = SolverScheduleOptions(
        problem="mixture", nfe="5..6", budget=100, samples=512, held_out=1024
    )
    stage = build(options).stages[-1]
    stage.evaluator.setup()
    return stage.space, stage.evaluator


def mixture(seed: int) -> Task:
    """Solver schedules of 5 or 6 model calls on the mixture in closed form, without known points.

    The loss is the error against the reference solution on 512 samples, so the regret is it too.
    """
    space, evaluator = _mixture()

    def losses(population: Population) -> Floats:
        keys = space.keys(population)
        jobs = Jobs(np.arange(len(keys)), population, keys, fidelity=len(evaluator.fidelities) - 1)
        found = evaluator.evaluate(jobs)
        out: Floats = np.where(found.state == OK, found.values[:, 0], np.inf)
        return out

    return Task("solver schedules of the mixture, 5 or 6 calls", space, losses)
