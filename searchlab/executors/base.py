"""What carries chunks of jobs to an evaluator and brings their evaluations back."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from searchlab.errors import EvaluationError
from searchlab.evaluator import Evaluator
from searchlab.executors.out_of_memory import evaluate_within_memory
from searchlab.population import Evaluations, Jobs

__all__ = ["Chunk", "Done", "Executor", "Usage", "evaluate_chunk", "failed_chunk", "usage_of"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive jobs of one ask group, one fidelity and one replicate, for one evaluator.

    Attributes:
        jobs: what to evaluate.
        evaluator: index into the evaluators the executor was started with.
        rows: jobs are padded to this many rows for evaluators whose values depend on the chunk;
            0 = as they are.
        forget: drop what the evaluator keeps between calls first (its method `forget`, if any).
    """

    jobs: Jobs
    evaluator: int = 0
    rows: int = 0
    forget: bool = False


@dataclass(frozen=True)
class Done:
    """A finished chunk; failures are rows of the evaluations, never exceptions.

    Attributes:
        started, finished: seconds since the epoch, of the attempt that counts.
        worker: who evaluated it.
        attempts: how often it was begun, this one included.
        traceback: of the first exception that the evaluator raised, "" without one.
        cached: another run of the database has evaluated it meanwhile.
    """

    chunk: Chunk
    evaluations: Evaluations
    started: float
    finished: float
    worker: str = "local"
    attempts: int = 1
    traceback: str = ""
    cached: bool = False


@dataclass(frozen=True)
class Usage:
    """How busy an executor's workers were.

    Attributes:
        workers: how many.
        busy_s: seconds spent in evaluations that gave a result, summed over workers.
        wall_s: seconds from the first chunk to now, or to the last result if nothing is open.
        deaths: workers that died with a chunk.
        timeouts: attempts that took longer than the deadline.
        repeats: attempts beyond the first.
        overruns: workers that were replaced because they used more memory than they may.
    """

    workers: int
    busy_s: float
    wall_s: float
    deaths: int = 0
    timeouts: int = 0
    repeats: int = 0
    overruns: int = 0

    @property
    def utilisation(self) -> float:
        """Share of the workers' time that was spent in evaluations, 0 to 1."""
        return min(1.0, self.busy_s / (self.workers * self.wall_s)) if self.wall_s > 0 else 0.0

    def to_json(self) -> dict[str, float]:
        """The figures that a result shows."""
        return {
            "workers": self.workers,
            "utilisation": round(self.utilisation, 4),
            "deaths": self.deaths,
            "timeouts": self.timeouts,
            "repeats": self.repeats,
            "overruns": self.overruns,
        }


class Executor(Protocol):
    """Runs chunks. `submit` never blocks; `wait` returns what has finished.

    Methods that an executor may have besides: `usage() -> Usage`; `withdraw() -> list[Chunk]`,
    which takes back what no worker has begun (see `searchlab.interruption`); `log_to(folder)`,
    called before `start`, says where what workers print is kept; `activity()` is JSON for those who
    watch: {"queued": N, "workers": [{"worker", "state", "job", "since"}]}.
    """

    @property
    def workers(self) -> int: ...
    def start(self, evaluators: tuple[Evaluator, ...]) -> None:
        """Sets the evaluators up, once per worker."""

    def has_room(self) -> bool:
        """Whether another chunk could begin soon."""

    def submit(self, chunk: Chunk) -> None: ...
    def wait(self, timeout: float | None = None) -> list[Done]:
        """All chunks finished by now; waits for at least one if any is open."""

    def close(self) -> None: ...


def usage_of(executor: Executor) -> Usage | None:
    """What an executor says about its workers' time; None if it does not measure that."""
    measured: Callable[[], Usage] | None = getattr(executor, "usage", None)
    return measured() if measured is not None else None


def failed_chunk(
    chunk: Chunk,
    evaluator: Evaluator,
    reason: str,
    *,
    worker: str,
    started: float,
    finished: float,
    attempts: int = 1,
) -> Done:
    """A chunk that failed as a whole."""
    evaluations = Evaluations.failed(len(chunk.jobs), len(evaluator.objectives), reason)
    return Done(chunk, evaluations, started, finished, worker, attempts)


def evaluate_chunk(evaluator: Evaluator, chunk: Chunk, *, worker: str = "local") -> Done:
    """Evaluates one chunk; whatever the evaluator raises becomes `failed` rows with a reason.

    The chunk stays whole out of memory: an evaluator that has a `micro_batch` takes fewer rows at
    once, and `notes["micro_batch"]` of the evaluations says how many.
    """
    jobs = chunk.jobs
    n = len(jobs)
    padded = jobs
    if chunk.rows > n:
        padded = jobs.take([*range(n), *[n - 1] * (chunk.rows - n)])
    if chunk.forget:
        forget: Callable[[], None] = getattr(evaluator, "forget", lambda: None)
        forget()
    raised, micro_batch = "", 0
    started = time.time()
    try:
        answer, micro_batch = evaluate_within_memory(evaluator, padded)
        if not isinstance(answer, Evaluations):
            raise EvaluationError(
                f"evaluator returned {type(answer).__name__}; allowed: Evaluations"
            )
        evaluations = answer
        noted = evaluations.notes.get("traceback")
        raised = noted if isinstance(noted, str) else ""
        if len(evaluations) != len(padded):
            evaluations = Evaluations.failed(
                n,
                len(evaluator.objectives),
                f"evaluator returned {len(evaluations)} rows for {len(padded)} jobs",
            )
        elif evaluations.values.shape[1] != len(evaluator.objectives):
            evaluations = Evaluations.failed(
                n,
                len(evaluator.objectives),
                f"evaluator returned {evaluations.values.shape[1]} values per candidate; "
                f"allowed: {len(evaluator.objectives)}",
            )
        elif len(padded) > n:
            evaluations = evaluations.take(range(n))
    except (Exception, SystemExit) as error:  # a candidate that breaks its evaluator is a result
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        evaluations = Evaluations.failed(n, len(evaluator.objectives), text)
        raised = traceback.format_exc()
    finished = time.time()
    if micro_batch:
        evaluations.notes["micro_batch"] = micro_batch
    if evaluations.cost_s is not None and not evaluations.cost_s.any():
        evaluations.cost_s = evaluations.cost_s + (finished - started) / max(1, n)
    return Done(chunk, evaluations, started, finished, worker, traceback=raised)
