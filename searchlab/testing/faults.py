"""Runs that are disturbed on purpose: processes killed and stopped, answers late and twice.

    python -m searchlab.testing.faults FOLDER [--executor NAME] [--workers N] ...

drives one small run in a folder to its end; whoever disturbs it starts that command again until it
ends by itself. `disturbed` does so by a plan that follows from a seed, and says what became of the
run. The rules it checks hold for every executor: the records end as those of a run that nobody
disturbed, what was recorded stays, and nothing recorded is evaluated again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from searchlab.callbacks import Callback, Progress
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.errors import ConfigError, SearchlabError
from searchlab.evaluator import Evaluator, FunctionEvaluator
from searchlab.executors import Chunk, Done, Executor, ExecutorOptions
from searchlab.records import Records
from searchlab.search import run
from searchlab.space import Space
from searchlab.study import Database, MemoryRun
from searchlab.variables import Choice, Integer, Real

__all__ = [
    "Fault",
    "Hunter",
    "Outcome",
    "Unreliable",
    "config_of",
    "descendants",
    "disturbed",
    "is_alive",
    "plan_of",
    "recorded",
    "stored",
    "undisturbed",
]

LOG = "SEARCHLAB_FAULTS_LOG"
LAG = 8
DEADLINE = 2.0  # a worker that was stopped is replaced after so many seconds
RETRIES = 20
PATIENCE = 120.0  # seconds without any new record, then a run counts as stuck
Kind = Literal["driver", "worker", "hang"]
_DATABASE, _NAME = "study.db", "run"
_ROOT = str(Path(__file__).resolve().parents[2])  # drivers run this very code


# -- the run that is disturbed ------------------------------------------------------------------


def faults_space() -> Space:
    """Some hundred thousand candidates."""
    return Space(kind=Choice(tuple(range(5)), shape=(4,)), x=Real(0, 1), n=Integer(0, 9))


def label(kind: list[int], x: float, n: int) -> str:
    """A candidate as one word."""
    return f"{'-'.join(map(str, kind))}/{float(x)!r}/{n}"


def slow(kind: list[int], x: float, n: int) -> float:
    """Takes 5 to 25 ms, by the candidate; notes when it began; one candidate of twenty raises."""
    if LOG in os.environ:
        line = f"{time.time()!r} {label(kind, x, n)}\n"
        handle = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.write(handle, line.encode())
        os.close(handle)
    value = float(sum(k * (i + 1) for i, k in enumerate(kind))) + (x - 0.3) ** 2 + abs(n - 4)
    time.sleep(0.005 + value * 7919 % 1 * 0.02)
    if value * 104729 % 1 < 0.05:
        raise ValueError("one of twenty fails")
    return value


def config_of(evaluations: int, *, seed: int = 0, lag: int = LAG) -> SearchConfig:
    """The run; its trace is a function of these."""
    evaluator = FunctionEvaluator(slow, faults_space(), version=1)
    stage = Stage("search", faults_space(), evaluator, AlgorithmSpec("evolution"),
                  Budget(evaluations))  # fmt: skip
    return SearchConfig((stage,), seed=seed, lag=lag, chunk=1)


def undisturbed(evaluations: int, *, seed: int = 0) -> Records:
    """The records of the run when nobody disturbs it, made in this process."""
    store = MemoryRun()
    run(config_of(evaluations, seed=seed), store=store)
    return store.records()


def recorded(
    path: Path,
    config: SearchConfig,
    executor: Executor,
    *,
    callbacks: Sequence[Callback] = (),
    out: str = "",
) -> Records:
    """The records of a run in a database, which is begun or gone on with there."""
    with Database(path) as base:
        store = base.open_run(
            _NAME,
            config=config.describe(),
            space=config.stages[0].space.fingerprint,
            seed=config.seed,
            out=out,
        )
        run(config, store=store, executor=executor, callbacks=callbacks)
        return base.read(_NAME).records()


def drive(folder: Path, options: ExecutorOptions, evaluations: int, seed: int) -> None:
    """Runs or resumes the run of a folder."""
    config = config_of(evaluations, seed=seed)
    recorded(folder / _DATABASE, config, options.build(), out=str(folder))


def stored(folder: Path) -> Records | None:
    """What a folder's run has recorded; None as long as there is none."""
    if not (folder / _DATABASE).is_file():
        return None
    try:
        with Database(folder / _DATABASE) as base:
            return base.read(_NAME).records()
    except SearchlabError:  # the file is being made
        return None


def _count(folder: Path) -> int:
    with suppress(SearchlabError):
        if (folder / _DATABASE).is_file():
            with Database(folder / _DATABASE) as base:
                return sum(info.records for info in base.runs())
    return 0


# -- who disturbs it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What happens to a run.

    Attributes:
        kind: "driver" or "worker" is killed with SIGKILL; "hang": a worker is stopped for good.
        at: how many records are there when it happens, at the earliest.
        after: seconds that pass from then on.
    """

    kind: Kind
    at: int
    after: float


@dataclass
class Outcome:
    """What became of a disturbed run.

    Attributes:
        seed: of the plan.
        records: at the end.
        done: the faults that happened.
        starts: how often the driver was started.
        lost: records that were there once, and not in the same way afterwards.
        again: evaluations that began although the candidate was recorded.
        left: processes that outlived their driver by more than a few seconds.
    """

    seed: int
    records: Records
    done: list[Fault] = field(default_factory=list)
    starts: int = 0
    lost: int = 0
    again: int = 0
    left: int = 0


def plan_of(
    seed: int, evaluations: int, *, faults: int = 1, kinds: Sequence[Kind] = ("driver", "worker")
) -> list[Fault]:
    """The faults of one run; equal seeds give equal plans."""
    draw = random.Random(seed)
    # Early enough that the run cannot end before somebody looks.
    at = sorted(draw.randrange(1, max(2, evaluations // 2)) for _ in range(faults))
    return [Fault(draw.choice(kinds), one, draw.random() * 0.02) for one in at]


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    out, family = [], [pid]
    while family:
        one = family.pop()
        with suppress(OSError, ValueError):
            for thread in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{thread}/children") as file:
                    found = [int(word) for word in file.read().split()]
                out += found
                family += found
    return out


def is_alive(pid: int) -> bool:
    """Whether a process runs; zombies do not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def disturbed(
    folder: Path,
    plan: Sequence[Fault],
    evaluations: int,
    *,
    seed: int = 0,
    plan_seed: int = 0,
    executor: Sequence[str] = ("--executor", "processes", "--workers", "2"),
    workers: Callable[[int], list[int]] = descendants,
) -> Outcome:
    """Drives a run to its end while a plan is carried out.

    Args:
        folder: an empty one.
        plan: what happens, in order.
        evaluations, seed: of the run.
        plan_seed: for the outcome, and for which worker is meant.
        executor: options of the driver's command line.
        workers: the processes that may be killed as workers, by the driver's number.

    Raises:
        SearchlabError: the run ends with an error, or makes no progress.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "calls"
    command = [sys.executable, "-m", "searchlab.testing.faults", str(folder), *executor,
               "--evaluations", str(evaluations), "--seed", str(seed)]  # fmt: skip
    paths = os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    draw, left = random.Random(plan_seed), list(plan)
    outcome = Outcome(plan_seed, MemoryRun().records())
    seen: dict[int, float] = {}
    while True:
        process = subprocess.Popen(
            command,
            env={**os.environ, LOG: str(log), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        outcome.starts += 1
        killed, family = _carry_out(process, folder, left, outcome, draw, workers)
        _, said = process.communicate()
        outcome.left += _outliving(family)
        records = stored(folder)
        now = {}
        if records is not None:
            now = dict(zip(records.ids.tolist(), records.finished.tolist(), strict=True))
            outcome.records = records
        outcome.lost += sum(now.get(i) != finished for i, finished in seen.items())
        seen = now
        if not killed:
            break
    if process.returncode != 0:
        raise SearchlabError(
            f"plan {plan_seed}: the driver ended with {process.returncode}: "
            f"{said.decode(errors='replace')[-2000:]}"
        )
    outcome.again = _begun_after_recorded(log, outcome.records)
    return outcome


def _carry_out(
    process: subprocess.Popen[bytes],
    folder: Path,
    left: list[Fault],
    outcome: Outcome,
    draw: random.Random,
    workers: Callable[[int], list[int]],
) -> tuple[bool, list[int]]:
    """Waits for a driver to end, or ends it; whether it was killed, and its last processes."""
    count, since = -1, time.monotonic()
    family: list[int] = []
    while process.poll() is None:
        found = _count(folder)
        if found != count:
            count, since = found, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            process.kill()
            raise SearchlabError(f"plan {outcome.seed}: no progress at {count} records")
        family = descendants(process.pid) or family
        if not left or count < left[0].at:
            time.sleep(0.02)  # looking takes 7 ms
            continue
        fault = left[0]
        time.sleep(fault.after)
        if fault.kind == "driver":
            family = descendants(process.pid) or family
            process.kill()
        elif there := workers(process.pid):
            with suppress(ProcessLookupError):
                os.kill(draw.choice(there), _SIGNALS[fault.kind])
        else:
            continue  # between two workers
        outcome.done.append(left.pop(0))
        if fault.kind == "driver":
            return True, family
    return False, family


_SIGNALS: dict[str, signal.Signals] = {"worker": signal.SIGKILL, "hang": signal.SIGSTOP}


def _outliving(family: Sequence[int]) -> int:
    until = time.monotonic() + 5
    while any(map(is_alive, family)) and time.monotonic() < until:
        time.sleep(0.01)
    return sum(map(is_alive, family))


def _begun_after_recorded(log: Path, records: Records) -> int:
    begun: dict[str, list[float]] = defaultdict(list)
    for line in log.read_text("utf-8").splitlines():
        when, _, name = line.partition(" ")
        begun[name].append(float(when))
    space = faults_space()
    plans = space.decode(space.unpack(records.genotypes))
    ends = zip(plans, records.finished.tolist(), records.cached.tolist(), strict=True)
    return sum(
        when > finished
        for plan, finished, cached in ends
        if not cached
        for when in begun[label(**plan)]
    )


class Hunter:
    """A callback of runs that kills or stops random workers of theirs, for as long as it is open.

    Nobody is struck before a run's first result: what comes before it is no fault of a worker. A
    driver of several runs sets `armed` to False before each.

    Args:
        workers: the processes that may be struck now.
        seed: of who is struck, when and how.
        pause: seconds between two strikes, (the least, the most).
        stops: share of the strikes that stop a worker for good; the others kill it.

    Attributes:
        armed: whether the run has had a result.
        struck: number of strikes by the signal's name.
    """

    def __init__(
        self,
        workers: Callable[[], Sequence[int]],
        seed: int,
        *,
        pause: tuple[float, float],
        stops: float = 0.0,
    ) -> None:
        self.armed = False
        self.struck: Counter[str] = Counter()
        self._workers, self._pause, self._stops = workers, pause, stops
        self._draw = random.Random(seed)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._hunt, daemon=True)

    def __call__(self, progress: Progress) -> None:
        self.armed = True

    def __enter__(self) -> Hunter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def strikes(self) -> int:
        """How many workers were struck."""
        return self.struck.total()

    def _hunt(self) -> None:
        while not self._ended.wait(self._draw.uniform(*self._pause)):
            there = self._workers() if self.armed else ()
            if not there:
                continue
            how = signal.SIGSTOP if self._draw.random() < self._stops else signal.SIGKILL
            try:
                os.kill(self._draw.choice(there), how)
            except ProcessLookupError:  # it has ended by itself
                continue
            self.struck[how.name] += 1


class Unreliable:
    """An executor whose answers come late, in another order, and some of them twice.

    Args:
        inner: who evaluates.
        seed: of the disorder.
        held: how many answers are held back at most.
        twice: share of the answers that come a second time.
    """

    def __init__(self, inner: Executor, seed: int, *, held: int = 4, twice: float = 0.3) -> None:
        self.inner, self.workers = inner, inner.workers
        self._draw = random.Random(seed)
        self._most, self._twice = held, twice
        self._held: list[Done] = []
        self._again: list[Done] = []
        self._open = 0
        self.repeated = 0

    def start(self, evaluators: tuple[Evaluator, ...]) -> None:
        """Starts the executor."""
        self.inner.start(evaluators)

    def has_room(self) -> bool:
        """Whether the executor has room."""
        return self.inner.has_room()

    def submit(self, chunk: Chunk) -> None:
        """Passes a chunk on."""
        self._open += 1
        self.inner.submit(chunk)

    def wait(self, timeout: float | None = None) -> list[Done]:
        """Some of the answers, and some of those that were given before."""
        while self._open > len(self._held) and len(self._held) < self._most:
            self._held += self.inner.wait(timeout)
            if timeout is not None or self._draw.random() < 0.5:
                break
        count = self._draw.randint(1, max(1, len(self._held)))
        self._draw.shuffle(self._held)
        out, self._held = self._held[:count], self._held[count:]
        self._open -= len(out)
        late = [done for done in self._again if self._draw.random() < 0.5]
        self._again = [done for done in out if self._draw.random() < self._twice]
        self.repeated += len(late)
        return out + late

    def close(self) -> None:
        """Closes the executor."""
        self.inner.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Drives the run of a folder; see the module."""
    parser = argparse.ArgumentParser(description="Drives one small run to its end.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--executor", default="processes")
    parser.add_argument("--ray-address")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    more: dict[str, Any] = {}
    if given.executor != "local":
        more = {"workers": given.workers, "deadline": DEADLINE, "retries": RETRIES}
    if given.executor == "ray":
        calls = {"env_vars": {LOG: os.environ[LOG]}}
        more["more"] = {"address": given.ray_address, "runtime_env": calls}
    try:
        drive(given.folder, ExecutorOptions(given.executor, **more), given.evaluations, given.seed)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # By its name, so that workers find the evaluator in this module and not in `__main__`.
    from searchlab.testing import faults

    sys.exit(faults.main())
