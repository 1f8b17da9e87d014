"""What carries chunks of jobs to an evaluator and brings their evaluations back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from searchlab.errors import EvaluationError
from searchlab.evaluator import Evaluator
from searchlab.population import Evaluations, Jobs

__all__ = ["Chunk", "Done", "Executor", "evaluate_chunk"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive jobs of one ask group, one fidelity and one replicate, for one evaluator.

    Attributes:
        jobs: what to evaluate.
        evaluator: index into the evaluators the executor was started with.
        rows: jobs are padded to this many rows for evaluators whose values depend on the chunk;
            0 = as they are.
    """

    jobs: Jobs
    evaluator: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Done:
    """A finished chunk; failures are rows of the evaluations, never exceptions."""

    chunk: Chunk
    evaluations: Evaluations
    started: float
    finished: float
    worker: str = "local"
    attempts: int = 1


class Executor(Protocol):
    """Runs chunks. `submit` never blocks; `wait` returns what has finished."""

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


def evaluate_chunk(evaluator: Evaluator, chunk: Chunk, *, worker: str = "local") -> Done:
    """Evaluates one chunk; whatever the evaluator raises becomes `failed` rows with a reason."""
    jobs = chunk.jobs
    n = len(jobs)
    padded = jobs
    if chunk.rows > n:
        padded = jobs.take([*range(n), *[n - 1] * (chunk.rows - n)])
    started = time.time()
    try:
        answer: object = evaluator.evaluate(padded)
        if not isinstance(answer, Evaluations):
            raise EvaluationError(
                f"evaluator returned {type(answer).__name__}; allowed: Evaluations"
            )
        evaluations = answer
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
    except Exception as error:  # a candidate that breaks its evaluator is a result
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        evaluations = Evaluations.failed(n, len(evaluator.objectives), text)
    finished = time.time()
    if evaluations.cost_s is not None and not evaluations.cost_s.any():
        evaluations.cost_s = evaluations.cost_s + (finished - started) / max(1, n)
    return Done(chunk, evaluations, started, finished, worker)
