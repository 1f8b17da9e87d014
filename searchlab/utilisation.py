"""How busy workers can be with a lag: what the order of results leaves of their time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from searchlab.errors import ConfigError

__all__ = ["lag_for", "share_at"]


def share_at(seconds: Sequence[float], workers: int, lag: int | None) -> float:
    """Share of the workers' time that evaluations fill, if nothing else takes time.

    Evaluation i may begin when all up to i - lag have ended, and a worker is free.

    Args:
        seconds: what each evaluation takes, by id.
        workers: how many there are.
        lag: at most this many are open; None = there is no such rule (free running).

    Raises:
        ConfigError: no workers, or a lag below 1.
    """
    if workers < 1 or (lag is not None and lag < 1):
        raise ConfigError(f"workers {workers}, lag {lag}; allowed: 1 or more")
    free = [0.0] * workers
    told: list[float] = []  # when all up to each one had ended
    for number, length in enumerate(seconds):
        waits = told[number - lag] if lag is not None and number >= lag else 0.0
        start = max(heapq.heappop(free), waits)
        heapq.heappush(free, start + length)
        told.append(max(told[-1] if told else 0.0, start + length))
    return sum(seconds) / workers / told[-1] if told and told[-1] > 0 else 1.0


def lag_for(seconds: Sequence[float], workers: int, share: float = 0.95) -> int | None:
    """The smallest lag, in steps of a worker, that keeps workers busy for a share of their time.

    The end of a run, when workers run out of work, is left out by repeating what was measured.

    Returns:
        The lag; None where even free running does not reach the share.
    """
    repeated = list(seconds) * max(1, -(-40 * workers // max(1, len(seconds))))
    if not repeated or share_at(repeated, workers, None) < share:
        return None
    low, high = 1, 2
    while share_at(repeated, workers, high * workers) < share:
        low, high = high, 2 * high
        if high * workers > len(repeated):
            return len(repeated)
    while high - low > 1:
        middle = (low + high) // 2
        if share_at(repeated, workers, middle * workers) < share:
            low = middle
        else:
            high = middle
    return (low if share_at(repeated, workers, low * workers) >= share else high) * workers
