"""The executor of one process: chunks are evaluated when the loop waits."""

from __future__ import annotations

from collections import deque

from searchlab.evaluator import Evaluator
from searchlab.executors.base import Chunk, Done, evaluate_chunk

__all__ = ["LocalExecutor"]


class LocalExecutor:
    """Evaluates in this process, one chunk per `wait`."""

    workers = 1

    def __init__(self) -> None:
        self._evaluators: tuple[Evaluator, ...] = ()
        self._queue: deque[Chunk] = deque()

    def start(self, evaluators: tuple[Evaluator, ...]) -> None:
        """Sets each evaluator up."""
        for evaluator in evaluators:
            evaluator.setup()
        self._evaluators = evaluators

    def has_room(self) -> bool:
        """Whether nothing is queued."""
        return not self._queue

    def submit(self, chunk: Chunk) -> None:
        """Queues a chunk."""
        self._queue.append(chunk)

    def wait(self, timeout: float | None = None) -> list[Done]:
        """Evaluates the oldest queued chunk."""
        if not self._queue:
            return []
        chunk = self._queue.popleft()
        return [evaluate_chunk(self._evaluators[chunk.evaluator], chunk)]

    def close(self) -> None:
        """Drops what is queued."""
        self._queue.clear()
