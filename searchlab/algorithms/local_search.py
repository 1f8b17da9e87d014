"""Local search: all smallest moves around the best, then a new start elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told, no_parents
from searchlab.errors import ConfigError
from searchlab.population import Jobs, Population
from searchlab.space import Space
from searchlab.uniforms import PARENTS, uniforms

__all__ = ["LocalSearch"]


class LocalSearch(Algorithm):
    """Climbs over `Space.neighbours`, with restarts.

    Each climb begins with random candidates. With "first" improvement the neighbours of the best
    found since then are proposed, in a random order; whatever is better takes its place at once.
    With "best" improvement all neighbours of a centre are proposed before the best so far becomes
    the next centre. Where all neighbours of a best are known, a new climb begins; candidates of
    earlier climbs count no more, unless an answer that came late is better than what ended its
    climb, which then goes on.

    Which centre an id belongs to is a function of what was told and of which ids were given the
    neighbours: nothing else is remembered.

    Args:
        space, seed, first_id, seeds: see `Algorithm`; seeds belong to the first climb.
        improvement: see above.
        n_random: random candidates at the beginning of a climb.
        quantum: candidates per ask group.

    Raises:
        ConfigError: an unknown improvement, n_random or quantum below 1.
    """

    name: ClassVar[str] = "local_search"
    pools = False

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        improvement: Literal["first", "best"] = "first",
        n_random: int = 8,
        quantum: int = 1,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds)
        if improvement not in ("first", "best"):
            raise ConfigError(f"improvement {improvement!r}; allowed: first, best")
        if n_random < 1 or quantum < 1:
            raise ConfigError(f"n_random {n_random}, quantum {quantum}; allowed: 1 or more")
        self.improvement = improvement
        self.n_random = n_random
        self.quantum = quantum
        self._told_ids: list[int] = []
        self._told_rank: list[tuple[float, float]] = []
        self._told_rows: list[Population] = []
        # Places of told successes, each better than all that came later; ids and losses increase.
        self._best_since: list[int] = []
        self._last_told = -1
        self._around: dict[int, tuple[Population, tuple[bytes, ...]]] = {}
        self._ended: dict[int, int] = {}  # place -> id of its last neighbour
        self._at = (first_id, -1, -1)  # climb's start, its centre, the id up to which it is settled

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "improvement": self.improvement,
            "n_random": self.n_random,
        }

    def _learn(self, told: Told) -> None:
        self._last_told = int(told.ids[-1])
        rows = np.flatnonzero(np.isfinite(told.losses[:, 0]))
        ids, violation = told.ids[rows].tolist(), told.violation[rows].tolist()
        for row, i, v, f in zip(rows, ids, violation, told.losses[rows, 0].tolist(), strict=True):
            place = len(self._told_ids)
            self._told_ids.append(i)
            self._told_rank.append((v, f))
            self._told_rows.append(told.population.take(slice(row, row + 1)))
            while self._best_since and self._told_rank[self._best_since[-1]] > (v, f):
                self._best_since.pop()
            self._best_since.append(place)

    # -- proposing --------------------------------------------------------------------------

    def ask(self, first_id: int, n: int) -> Jobs:
        """See `Algorithm.ask`; one after another, as each takes what the ones before left."""
        parts = [super(LocalSearch, self).ask(i, 1) for i in range(first_id, first_id + n)]
        return Jobs.concat(parts) if parts else super().ask(first_id, 0)

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        (i,) = ids.tolist()
        place = self._centre(i) if strength == 1.0 else None
        if place is not None:
            around, keys = self._neighbours(place)
            for row, key in enumerate(keys):
                if not self.issued_before(key, i):
                    parents = np.full((1, 2), self._told_ids[place], dtype=np.int64)
                    return Draw(around.take(slice(row, row + 1)), ["neighbour"], parents)
        return Draw(self.space.sample(u), ["random"], no_parents(1))

    def _neighbours(self, place: int) -> tuple[Population, tuple[bytes, ...]]:
        """All neighbours of a told candidate and their keys, in its own random order."""
        found = self._around.get(place)
        if found is None:
            around = self.space.neighbours(self._told_rows[place])
            draws = uniforms(self.seed, PARENTS, self._told_ids[place], 1, len(around))
            around = around.take(np.argsort(draws[0], kind="stable"))
            found = around, self.space.keys(around) if len(around) else ()
            if len(self._around) > 64:
                self._around.clear()
            self._around[place] = found
        return found

    def _end(self, place: int, before: int) -> int | None:
        """The id that was given a candidate's last neighbour; None while one is left."""
        known = self._ended.get(place)
        if known is not None and known < before:
            return known
        _, keys = self._neighbours(place)
        if not all(self.issued_before(key, before) for key in keys):
            return None
        end = max((self._issued[key] for key in keys), default=self._told_ids[place])
        self._ended[place] = end
        return end

    def _centre(self, i: int) -> int | None:
        """The place whose neighbours id i belongs to; None = a random start."""
        follow = self._first if self.improvement == "first" else self._steepest
        return follow(i)

    def _random_until(self, start: int) -> int:
        more = len(self.seeds.population) if start == self.first_id else 0
        return start + more + self.n_random

    def _first(self, i: int) -> int | None:
        start = self.first_id
        while True:
            at = bisect_left(self._best_since, start, key=lambda place: self._told_ids[place])
            if i < self._random_until(start) or at == len(self._best_since):
                return None
            place = self._best_since[at]
            end = self._end(place, i)
            if end is None:
                return place
            start = max(end, self._told_ids[place], start) + 1

    def _steepest(self, i: int) -> int | None:
        start, centre, reached = self._at
        if reached >= i:
            start, centre, reached = self.first_id, -1, -1
        while True:
            # The best of the climb up to where the centre's neighbours end.
            end = self._random_until(start) - 1 if centre < 0 else self._end(centre, i)
            if end is None:
                return centre
            if i <= end:
                return None
            reached = max(reached, end)
            low = bisect_left(self._told_ids, start)
            high = bisect_left(self._told_ids, reached + 1)
            best = min(range(low, high), key=self._order, default=-1)
            if best == centre:  # nothing better around it, or nothing succeeded
                start, centre = reached + 1, -1
            else:
                centre = best
            if self._last_told >= reached:  # no answer can change this any more
                self._at = start, centre, reached

    def _order(self, place: int) -> tuple[float, float, int]:
        return (*self._told_rank[place], place)
