"""What the tests of the loop share: instrumented algorithms, executors and runs in memory."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms import Draw, Evolution, Told
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.evaluator import Evaluator, FunctionEvaluator, Objective
from searchlab.executors import Chunk, Done, evaluate_chunk
from searchlab.population import Evaluations, Jobs
from searchlab.search import run
from searchlab.space import Space
from searchlab.study import MemoryRun
from searchlab.variables import Choice, Integer, Real

ROOT = Path(__file__).resolve().parents[2]


def digest_elsewhere(module: Path, hash_seed: str) -> str:
    """What `trace_digest()` of a test module gives in another process."""
    code = (
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('t', {str(module)!r})\n"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m); print(m.trace_digest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.strip()


class Watched(Evolution):
    """Evolution that notes which ids it had been told whenever it drew."""

    name = "watched"
    log: list[tuple[int, int, tuple[int, ...]]]

    def __init__(self, space: Space, **more: Any) -> None:
        super().__init__(space, **more)
        self.told_ids: list[int] = []
        Watched.log = []

    def _learn(self, told: Told) -> None:
        self.told_ids += told.ids.tolist()
        super()._learn(told)

    def ask(self, first_id: int, n: int) -> Jobs:
        jobs = super().ask(first_id, n)
        Watched.log.append((first_id, n, tuple(self.told_ids)))
        return jobs

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        return super()._draw(ids, u, strength)


class Shuffled:
    """Holds several chunks open and finishes them in a random order."""

    def __init__(self, seed: int, *, held: int = 4, workers: int = 4) -> None:
        self.workers = workers
        self._random = random.Random(seed)
        self._held = held
        self._open: list[Chunk] = []
        self._evaluators: tuple[Evaluator, ...] = ()
        self.most_open = 0

    def start(self, evaluators: tuple[Evaluator, ...]) -> None:
        self._evaluators = evaluators

    def has_room(self) -> bool:
        return len(self._open) < self._held

    def submit(self, chunk: Chunk) -> None:
        self._open.append(chunk)
        self.most_open = max(self.most_open, len(self._open))

    def wait(self, timeout: float | None = None) -> list[Done]:
        done = []
        for _ in range(min(len(self._open), self._random.randint(1, 2))):
            chunk = self._open.pop(self._random.randrange(len(self._open)))
            done.append(evaluate_chunk(self._evaluators[chunk.evaluator], chunk))
        return done

    def close(self) -> None:
        self._open.clear()


class Counted:
    """A function that notes every call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls: list[dict[str, Any]] = []
        self.__module__, self.__qualname__ = "tests", "counted"

    def __call__(self, **values: Any) -> Any:
        self.calls.append(values)
        return self.function(**values)


def mixed_space() -> Space:
    return Space(kind=Choice(range(5), shape=(4,)), x=Real(0, 1), n=Integer(0, 9))


def mixed_value(kind: list[int], x: float, n: int) -> float:
    return float(sum(k * (i + 1) for i, k in enumerate(kind))) + (x - 0.3) ** 2 + abs(n - 4)


def make_config(
    function: Callable[..., Any] | Evaluator = mixed_value,
    *,
    space: Space | None = None,
    budget: Budget | int = 40,
    algorithm: str = "evolution",
    lag: int | None = None,
    chunk: int | None = None,
    seed: int = 1,
    final: Any = None,
    seeds: Any = None,
    direction: Any = "min",
    **options: Any,
) -> SearchConfig:
    """A configuration of one stage."""
    space = space or mixed_space()
    made = (
        function
        if isinstance(function, Evaluator)
        else FunctionEvaluator(function, space, (Objective("value", direction),))
    )
    stage = Stage(
        "search",
        space,
        made,
        AlgorithmSpec(algorithm, options),
        budget if isinstance(budget, Budget) else Budget(budget),
        seeds=seeds,
    )
    return SearchConfig((stage,), seed=seed, lag=lag, chunk=chunk, final=final)


def reopened(store: MemoryRun, keep: Callable[[int], bool] = lambda i: True) -> MemoryRun:
    """A copy of a closed run that holds only the records whose ids are kept."""
    fresh = MemoryRun(store.name)
    fresh._stored = [row for row in store._stored if keep(row[0])]
    fresh._note(np.array(sorted(row[0] for row in fresh._stored), np.int64))
    fresh._meta_stored = copy.deepcopy(store._meta_stored)
    fresh._digests = dict(store._digests)
    return fresh


def chunk_dependent(evaluations: Evaluations) -> Evaluations:
    """Adds to every value what its neighbours in the call are."""
    values = evaluations.values
    return Evaluations(values + 1e-3 * np.cumsum(values[::-1])[::-1, None] / len(values))


class Neighbourly(FunctionEvaluator):
    """An evaluator whose values depend on the whole chunk, as a device's kernels may."""

    shapes: Sequence[int] = ()

    def evaluate(self, jobs: Jobs) -> Evaluations:
        self.shapes = [*self.shapes, len(jobs)]
        return chunk_dependent(super().evaluate(jobs))


def run_in(config: SearchConfig, store: MemoryRun | None = None, **more: Any) -> MemoryRun:
    store = store if store is not None else MemoryRun()
    run(config, store=store, **more)
    return store


def trace(store: Any) -> Any:
    return store.records().trace()
