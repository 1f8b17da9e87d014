"""What a worker does when an evaluator runs out of memory: the same chunk in smaller pieces."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

from searchlab.errors import SearchlabError
from searchlab.evaluator import Evaluator
from searchlab.population import Jobs

__all__ = ["evaluate_within_memory", "is_out_of_memory"]

_FIRST = "micro_batch_at_first"
# What torch's CPU allocator and libraries below it say, for which there is no class.
_SAID = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
_halving = threading.Lock()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or this machine has no memory left."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, SearchlabError) or not isinstance(error, RuntimeError):
        return False
    return any(text in str(error) for text in _SAID)


def evaluate_within_memory(evaluator: Evaluator, jobs: Jobs) -> tuple[object, int]:
    """Calls the evaluator; out of memory, it is called again with half of its `micro_batch`.

    Halves stay for as long as the worker holds the evaluator.

    Returns:
        The answer, and with which micro-batch if that is smaller than it was at first, else 0.

    Raises:
        Exception: what the evaluator raises, also for want of memory where it has no `micro_batch`
            or its smallest one does not fit.
    """
    while True:
        size = _size(evaluator)
        try:
            answer: object = evaluator.evaluate(jobs)
        except Exception as error:
            if not is_out_of_memory(error) or not _halve(evaluator, size):
                raise
        else:
            first = int(getattr(evaluator, _FIRST, 0))
            return answer, size if size < first else 0
        _free(evaluator)  # here, as the exception above holds what the call had


def _size(evaluator: Evaluator) -> int:
    return int(getattr(evaluator, "micro_batch", 0) or 0)


def _halve(evaluator: Any, size: int) -> bool:
    """Whether the evaluator takes fewer rows at once than in the call that failed."""
    with _halving:
        now = _size(evaluator)
        if now < 2 or now < size:  # another thread has halved it meanwhile
            return 0 < now < size
        try:
            if not hasattr(evaluator, _FIRST):
                object.__setattr__(evaluator, _FIRST, now)
            evaluator.micro_batch = now // 2
        except AttributeError:  # it can be read only
            return False
        return _size(evaluator) < now


def _free(evaluator: Evaluator) -> None:
    """Gives memory back that nobody needs."""
    forget: Callable[[], None] | None = getattr(evaluator, "forget", None)
    if forget is not None:
        forget()
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
