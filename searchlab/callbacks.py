"""The one callback protocol: what hears of a run's progress, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from searchlab._stage_best import FrontSize
    from searchlab.executors.base import Done, Usage

__all__ = ["Callback", "Progress"]


@dataclass(frozen=True)
class Progress:
    """What a callback hears after every recorded batch; `best` is in the user's sign.

    `paid` is in evaluations at the stage's fidelity: a job of a lower one counts its share.
    `chosen` is the algorithm that `auto` settled on, and why; empty where it was named. `front` is
    what there is where several objectives are traded off; `best` is empty then. `device_hours` are
    those of paid evaluations; `gpu_price` is in US dollars per hour, None where nobody said.
    """

    stage: str
    issued: int
    finished: int
    paid: float
    hits: int
    failed: int
    budget: int | None
    seconds: float
    best: dict[int, float]
    done: tuple[Done, ...] = ()
    usage: Usage | None = None
    chosen: str = ""
    front: FrontSize | None = None
    device_hours: float = 0.0
    gpu_price: float | None = None

    def scalars(self) -> dict[str, float]:
        """The figures as one flat mapping, as loggers want them.

        The best value is "best", or "best/GROUP" where there are groups; of several objectives
        there are "front" (how many candidates) and "hypervolume". `finished` is a good step
        number: it grows with every call of a stage.
        """
        out: dict[str, float] = {
            "finished": self.finished,
            "paid": self.paid,
            "hits": self.hits,
            "failed": self.failed,
            "seconds": self.seconds,
        }
        for group, value in sorted(self.best.items()):
            out["best" if list(self.best) == [0] else f"best/{group}"] = value
        if self.front is not None:
            out["front"] = self.front.members
            if self.front.hypervolume is not None:
                out["hypervolume"] = self.front.hypervolume
        return out


class Callback(Protocol):
    """Hears of progress; what it raises stops the run after everything finished was recorded."""

    def __call__(self, progress: Progress) -> None: ...
