"""The live line of a run: best so far, speed, cache hits, time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from searchlab.loop import Progress

__all__ = ["ProgressLine"]

QUIET_SECONDS = 10.0  # between lines where the output is no terminal
FAST_SECONDS = 0.2


class ProgressLine:
    """A callback that keeps one line up to date on a terminal, and prints few lines elsewhere."""

    def __init__(self, stream: TextIO | None = None, *, unit: str = "") -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty()
        self._unit = unit
        self._shown = 0.0
        self._stage = ""
        self._from = (0.0, 0)

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != self._stage:
            self._stage = progress.stage
            self._from = (now, progress.finished)
            self._shown = 0.0 if self._live else now - QUIET_SECONDS + 2
            if progress.chosen:
                self._stream.write(f"{progress.stage}: {progress.chosen}\n")
        if now - self._shown < (FAST_SECONDS if self._live else QUIET_SECONDS):
            return
        self._shown = now
        text = self.text(progress, now)
        self._stream.write(f"\r\x1b[2K{text[:200]}" if self._live else f"{text}\n")
        self._stream.flush()

    def text(self, progress: Progress, now: float) -> str:
        """The line."""
        seconds = max(1e-9, now - self._from[0])
        speed = (progress.finished - self._from[1]) / seconds
        parts = [f"{progress.stage}: {progress.finished} evaluated"]
        if progress.budget:
            parts[0] += f" ({progress.paid} of {progress.budget})"
            left = max(0, progress.budget - progress.paid)
            if speed > 0:
                parts.append(f"{_clock(left / speed)} left")
        parts.append(f"{speed:.1f}/s")
        if progress.hits:
            parts.append(f"{progress.hits} from cache")
        if progress.failed:
            parts.append(f"{progress.failed} failed")
        usage = progress.usage
        if usage is not None and usage.workers > 1:
            parts.append(f"{usage.workers} workers {100 * usage.utilisation:.0f} % busy")
            lost = usage.deaths + usage.timeouts
            if lost:
                parts.append(f"{lost} lost")
        if progress.front is not None:
            parts.append(f"{progress.front.members} on the front")
            if progress.front.hypervolume is not None:
                parts.append(f"hypervolume {progress.front.hypervolume:.4g}")
        best = sorted(progress.best.items())
        if len(best) == 1 and best[0][0] == 0:
            parts.append(f"best {best[0][1]:.4g}")
        elif best:
            shown = " ".join(f"{group}:{value:.3g}" for group, value in best[:12])
            parts.append(f"best by {self._unit or 'group'} {shown}")
        return ", ".join(parts)

    def done(self) -> None:
        """Ends the line."""
        if self._live and self._stage:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
