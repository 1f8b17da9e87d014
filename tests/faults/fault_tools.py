"""What the tests of faults share: evaluators that workers can import, small disks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.evaluator import FunctionEvaluator
from searchlab.executors import ExecutorOptions
from searchlab.search import run
from searchlab.space import Space
from searchlab.study import Database
from searchlab.variables import Integer

ROOT = Path(__file__).resolve().parents[2]
MB = 10**6
_kept: list[np.ndarray] = []  # type: ignore[type-arg]


def number_space() -> Space:
    return Space(a=Integer(0, 9999))


def hungry(a: int) -> float:
    """Every fifth candidate needs 300 MB for itself."""
    if a % 5 == 0:
        block = np.ones(300 * MB // 8)
        time.sleep(2.0)
        return float(block[0])
    return float(a)


def leaky(a: int) -> float:
    """Keeps 30 MB of every call."""
    _kept.append(np.ones(30 * MB // 8))
    time.sleep(0.1)
    return float(a)


def chatty(a: int) -> float:
    """Prints, and raises for every fifth candidate."""
    print(f"candidate {a}")
    if a % 5 == 0:
        raise ValueError(f"no value for {a}")
    return float(a)


class Shared(FunctionEvaluator):
    """Exact, and not measured before the search, so that every call is a job."""

    probe = False


def noted(a: int) -> float:
    """Takes 20 ms; notes when it began and ended."""
    began = time.time()
    time.sleep(0.02)
    with open(os.environ["SEARCHLAB_TESTS_LOG"], "a", encoding="utf-8") as file:
        file.write(f"{a} {began!r} {time.time()!r}\n")
    return float((a * 7919) % 10007)


def shared_config(seed: int, budget: int = 40) -> SearchConfig:
    evaluator = Shared(noted, number_space(), version=1)
    algorithm = AlgorithmSpec("evolution")
    stage = Stage("search", number_space(), evaluator, algorithm, Budget(budget))
    return SearchConfig((stage,), seed=seed, lag=4, chunk=1)


def drive_shared(url: str, name: str, seed: int, executor: str, claims: bool) -> None:
    """One of several runs of a database, to its end."""
    config = shared_config(seed)
    with Database(url, claims=claims) as base:
        store = base.open_run(
            name,
            config=config.describe(),
            space=config.stages[0].space.fingerprint,
            seed=seed,
            out="",
        )
        workers = 2 if executor == "processes" else 1
        run(config, store=store, executor=ExecutorOptions(executor, workers).build())


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def python(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    """Python on some arguments, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **more,  # type: ignore[call-overload]
    )


@contextmanager
def small_disk(point: Path, size: str) -> Iterator[bool]:
    """A file system of a few bytes; False where none can be mounted."""
    point.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)]
    mounted = subprocess.run(["mount", *options], capture_output=True, check=False)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(point)], check=True)


def enlarge(point: Path, size: str) -> None:
    """Gives a small disk more room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(point)], check=True)
