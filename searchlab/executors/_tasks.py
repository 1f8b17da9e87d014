"""What an executor keeps of a chunk that has not come back."""

from __future__ import annotations

from dataclasses import dataclass, field

from searchlab.executors.base import Chunk

__all__ = ["Broken", "Retries", "Task"]


@dataclass(frozen=True)
class Retries:
    """How often a chunk is begun again, per cause.

    Attributes:
        death: after the worker died with it.
        timeout: after it took longer than the deadline.
        error: after the evaluator raised.
        memory: after the worker used more than it may; a new one has not leaked anything yet.
    """

    death: int = 3
    timeout: int = 1
    error: int = 0
    memory: int = 1


@dataclass(frozen=True)
class Broken:
    """Why a worker could not start.

    Attributes:
        step: "boot", "main" (importing the main module), "load" (unpickling) or "setup".
        error: name of the exception's class.
        text: one line.
        traceback: of the worker.
    """

    step: str
    error: str
    text: str
    traceback: str = ""


@dataclass(eq=False)
class Task:
    """A chunk that has not come back, with the attempts so far."""

    chunk: Chunk
    message: bytes
    attempts: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    begun: float = 0.0
