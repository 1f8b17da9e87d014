"""What a driver says of itself every few seconds, for those who watch its run."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from searchlab.callbacks import Progress
from searchlab.errors import StudyError
from searchlab.executors.base import usage_of

if TYPE_CHECKING:
    from searchlab.executors.base import Executor
    from searchlab.study import Store

__all__ = ["LIVE", "LiveStatus"]

LIVE = "live"
EVERY_S = 2.0


class LiveStatus:
    """A callback that keeps the newest progress, and a thread that writes it into the run."""

    def __init__(self, executor: Executor | None) -> None:
        self._executor = executor
        self._progress: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def kept(self, store: Store, every_s: float = EVERY_S) -> Iterator[None]:
        """Writes the status while the block runs, and once more at its end."""
        note: Callable[[str, Any], None] | None = getattr(store, "note", None)
        if note is None:
            yield
            return
        stop = threading.Event()

        def write() -> None:
            while not stop.wait(every_s):
                try:
                    note(LIVE, self.to_json())
                except StudyError:  # lost, or closed meanwhile
                    return

        thread = threading.Thread(target=write, name="searchlab-live", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON."""
        out: dict[str, Any] = {"time": time.time(), "pid": os.getpid()}
        progress, executor = self._progress, self._executor
        if progress is not None:
            out |= {
                "stage": progress.stage,
                "issued": progress.issued,
                "finished": progress.finished,
                "paid": progress.paid,
                "budget": progress.budget,
                "hits": progress.hits,
                "failed": progress.failed,
                "seconds": progress.seconds,
                "best": {str(group): value for group, value in progress.best.items()},
                "device_hours": progress.device_hours,
                "gpu_price": progress.gpu_price,
            }
        if executor is not None:
            usage = usage_of(executor)
            if usage is not None:
                out["usage"] = usage.to_json()
            activity: Callable[[], dict[str, Any]] | None = getattr(executor, "activity", None)
            if activity is not None:
                out["activity"] = activity()
        return out
