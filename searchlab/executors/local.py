"""The executor of one process: chunks are evaluated when the loop waits."""

from __future__ import annotations

import time
from collections import deque

from searchlab.errors import ConfigError
from searchlab.evaluator import Evaluator
from searchlab.executors.base import Chunk, Done, Usage, evaluate_chunk

__all__ = ["LocalExecutor"]


class LocalExecutor:
    """Evaluates in this process, one chunk per `wait`.

    Args:
        workers, deadline, retries, memory: as executors with processes have them; here there is one
            worker, nothing can be stopped and nothing is lost, so that only defaults are allowed.

    Raises:
        ConfigError: something that needs processes.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        deadline: float | None = None,
        retries: int | None = None,
        memory: int | None = None,
    ) -> None:
        for name, value, only in (
            ("workers", workers, 1),
            ("deadline", deadline, None),
            ("retries", retries, None),
            ("memory", memory, None),
        ):
            if value != only:
                raise ConfigError(
                    f"{name} {value!r} with executor 'local'; allowed: {only}, or executor "
                    "'processes'"
                )
        self.workers = 1
        self._evaluators: tuple[Evaluator, ...] = ()
        self._queue: deque[Chunk] = deque()
        self._busy_s = 0.0
        self._began: float | None = None
        self._last = 0.0

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
        if self._began is None:
            self._began = time.monotonic()
        self._queue.append(chunk)

    def wait(self, timeout: float | None = None) -> list[Done]:
        """Evaluates the oldest queued chunk."""
        if not self._queue:
            return []
        chunk = self._queue.popleft()
        done = evaluate_chunk(self._evaluators[chunk.evaluator], chunk)
        self._busy_s += done.finished - done.started
        self._last = time.monotonic()
        return [done]

    def withdraw(self) -> list[Chunk]:
        """Takes back what was queued and has not begun."""
        chunks = list(self._queue)
        self._queue.clear()
        return chunks

    def usage(self) -> Usage:
        """How much of the time went into evaluations."""
        began = self._last if self._began is None else self._began
        return Usage(1, self._busy_s, max(0.0, self._last - began))

    def close(self) -> None:
        """Drops what is queued."""
        self._queue.clear()
