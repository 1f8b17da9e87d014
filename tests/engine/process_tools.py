"""What the tests of worker processes share: functions that workers can import, and scripts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from searchlab.callbacks import Progress
from searchlab.errors import DataError
from searchlab.evaluator import FunctionEvaluator, evaluator
from searchlab.population import Evaluations, Jobs
from searchlab.space import Space
from searchlab.variables import Choice, Integer, Real

ROOT = Path(__file__).resolve().parents[2]
LOG = "SEARCHLAB_TESTS_LOG"


class Culler:
    """Kills a random worker whenever so many more candidates are evaluated."""

    def __init__(self, workers: Callable[[], Sequence[int]], *, every: int) -> None:
        self.workers, self.every = workers, every
        self.draw = random.Random(0)
        self.killed: list[int] = []

    def __call__(self, progress: Progress) -> None:
        there = self.workers()
        if there and progress.finished >= self.every * (len(self.killed) + 1):
            self.killed.append(self.draw.choice(there))
            with suppress(ProcessLookupError):
                os.kill(self.killed[-1], signal.SIGKILL)


def mixed_space() -> Space:
    """Some thousand candidates."""
    return Space(kind=Choice(range(5), shape=(4,)), x=Real(0, 1), n=Integer(0, 9))


def a_second(**values: Any) -> float:
    """Long enough that none ends while a few are handed out on a busy machine."""
    time.sleep(1.0)
    return 0.0


def slow(kind: list[int], x: float, n: int) -> float:
    """Takes 0 to 8 ms, by the candidate; notes every call where a log is wanted."""
    value = float(sum(k * (i + 1) for i, k in enumerate(kind))) + (x - 0.3) ** 2 + abs(n - 4)
    time.sleep(value * 7919 % 1 * 0.008)
    if LOG in os.environ:
        with open(os.environ[LOG], "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {value!r}\n")
    if value * 104729 % 1 < 0.05:
        raise ValueError("one of twenty fails")
    return value


def neighbourly(plans: list[dict[str, Any]], fidelity: str, seed: int) -> list[float]:
    """Every value depends on all rows before it, and on how many there are."""
    carried, out = 0.1 * len(plans), []
    for plan in plans:
        carried = 0.5 * carried + plan["n"] + plan["x"] + sum(plan["kind"])
        out.append(carried)
    time.sleep(carried * 7919 % 1 * 0.005)
    return out


@evaluator(objectives={"low": "min"}, version=1)
def decorated(plans: list[dict[str, Any]], fidelity: str, seed: int) -> list[float]:
    """A decorated function: the module's attribute is no function any more."""
    return [plan["n"] + plan["x"] for plan in plans]


def environment_of(kind: list[int], x: float, n: int) -> float:
    """How many threads libraries are told to use here."""
    return float(os.environ["OMP_NUM_THREADS"])


class Picky(FunctionEvaluator):
    """Cannot be set up."""

    def setup(self) -> None:
        raise DataError("file 'weights' is missing")


class Clumsy(FunctionEvaluator):
    """Cannot be set up, for a reason of its own."""

    def setup(self) -> None:
        raise KeyError("weights")


class OnlyOnce(FunctionEvaluator):
    """Can be set up once for each worker that there is room for in a folder."""

    def setup(self) -> None:
        folder = Path(os.environ[LOG])
        for number in range(2):
            try:
                (folder / str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            return
        os._exit(7)

    def evaluate(self, jobs: Jobs) -> Evaluations:
        os._exit(8)


def script(folder: Path, text: str, *, name: str = "job.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def start(arguments: Sequence[object], folder: Path, **more: Any) -> subprocess.Popen[str]:
    """Python in a process group of its own, as a shell starts jobs."""
    paths = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests in the background of a script have Ctrl-C ignored, and would hand that on.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def alive(pid: int) -> bool:
    """Whether a process runs; zombies do not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def until(condition: Any, seconds: float = 30.0) -> bool:
    """Waits for something to become true."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if condition():
            return True
        time.sleep(0.01)
    return False
