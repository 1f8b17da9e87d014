"""What may end a stage besides its number of evaluations: time, device hours, price, a target."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from searchlab.config import Stage

__all__ = ["Limits"]


class Limits:
    """Follows what a stage has spent and found.

    Device hours are the seconds of all paid evaluations, those of an earlier process included,
    times the devices that one evaluation holds (the evaluator's attribute `devices`, 1 by default).
    """

    def __init__(self, stage: Stage) -> None:
        self._budget = stage.budget
        self._sign = stage.sign
        # A number of devices; a command names the ones it may see, separated by commas.
        devices = getattr(stage.evaluator, "devices", None)
        self._devices = len(devices.split(",")) if isinstance(devices, str) else int(devices or 1)
        self._began = time.monotonic()
        self.device_seconds = 0.0

    def begin(self) -> None:
        """Starts the clock of this process."""
        self._began = time.monotonic()

    def spend(self, cost_s: NDArray[np.float64]) -> None:
        """Adds paid evaluations by their seconds."""
        self.spend_seconds(float(np.nansum(cost_s)))

    def spend_seconds(self, seconds: float) -> None:
        """Adds paid evaluations that took so long together; NaN = not known."""
        if seconds == seconds:
            self.device_seconds += seconds * self._devices

    def reached(self, best: Iterable[float]) -> str:
        """Why the stage ends here, or "" where it goes on.

        Args:
            best: the lowest loss of every group so far.
        """
        budget = self._budget
        hours = self.device_seconds / 3600
        if budget.seconds is not None and time.monotonic() - self._began > budget.seconds:
            return "time is up"
        if budget.device_hours is not None and hours >= budget.device_hours:
            return "device hours are spent"
        if budget.price is not None and hours * (budget.gpu_price or 0.0) >= budget.price:
            return "money is spent"
        if budget.target is not None:
            losses = list(best)
            if losses and min(losses) <= self._sign * budget.target:
                return "target"
        return ""
