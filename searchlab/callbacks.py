"""The one callback protocol: what hears of a run's progress, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from searchlab.executors.base import Done, Usage

__all__ = ["Callback", "Progress"]


@dataclass(frozen=True)
class Progress:
    """What a callback hears after every recorded batch; `best` is in the user's sign."""

    stage: str
    issued: int
    finished: int
    paid: int
    hits: int
    failed: int
    budget: int | None
    seconds: float
    best: dict[int, float]
    done: tuple[Done, ...] = ()
    usage: Usage | None = None


class Callback(Protocol):
    """Hears of progress; what it raises stops the run after everything finished was recorded."""

    def __call__(self, progress: Progress) -> None: ...
