"""Cheap fidelities before dear ones: which group is measured at which, and who may go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms._guard import Evidence, correlation
from searchlab.algorithms._learner import rows_of
from searchlab.algorithms.base import Told
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space

__all__ = ["Ladder", "Part", "Waiting"]

Floats = NDArray[np.float64]

SHARE = 0.5  # of a true evaluation goes to each cheaper fidelity per true evaluation
MOST = 8  # measurements at one fidelity per true evaluation
LEAST = 2  # a fidelity that is too dear for so many is left out
FRONT = 256  # so many of those that wait are ranked
USEFUL = 0.2  # rank correlation with the truth below which a fidelity is not worth its cost


@dataclass(frozen=True)
class Part:
    """The answers at one level of the ladder."""

    level: int
    told: Told


@dataclass(frozen=True)
class Waiting:
    """Candidates measured at one level and not asked for at the next.

    Attributes:
        ids: int64 (n,), of the jobs that measured them.
        population: n candidates.
        keys: theirs.
        losses: float64 (n,), finite.
    """

    ids: NDArray[np.int64]
    population: Population
    keys: tuple[bytes, ...]
    losses: Floats


class Ladder:
    """Several fidelities as levels, the cheapest 0 and the truth the last.

    Ids follow a fixed cycle in which every level gets at most `SHARE` of what its next true
    evaluation costs, and at most `MOST` measurements: with costs (0.05, 1) eight cheap ones and a
    true one. So the level of an id depends on nothing but the id.

    Args:
        at: numbers of the levels among the evaluator's fidelities, increasing.
        costs: relative costs, one for each level.
        own: the first id that is not a seed's; seeds are measured at the truth.
    """

    def __init__(self, at: Sequence[int], costs: Sequence[float], *, own: int) -> None:
        self.at, self.costs, self.own = tuple(at), tuple(costs), own
        self.top = len(self.costs) - 1
        self.cycle = _cycle(self.costs)
        self.names = tuple(f"fidelity_{number}:loss" for number in self.at[:-1])
        self._told: list[list[Told]] = [[] for _ in self.costs]
        self._keys: list[list[bytes]] = [[] for _ in self.costs]
        self._values: list[dict[bytes, float]] = [{} for _ in self.costs]
        self._issued: dict[bytes, list[int]] = {}

    @staticmethod
    def of(fidelities: Sequence[float], *, own: int) -> Ladder | None:
        """The ladder of an evaluator's fidelities; None where no cheaper one pays.

        Raises:
            ConfigError: costs that are not positive or not in order.
        """
        costs = [float(cost) for cost in fidelities]
        if costs != sorted(costs) or any(not cost > 0 for cost in costs):
            raise ConfigError(f"fidelities cost {costs}; allowed: above 0, cheapest first")
        cheap = [at for at, cost in enumerate(costs[:-1]) if cost * LEAST <= SHARE * costs[-1]]
        if not cheap:
            return None
        at = [*cheap, len(costs) - 1]
        return Ladder(at, [costs[i] / costs[-1] for i in at], own=own)

    def level_of(self, i: int) -> int:
        """The level that an id is meant for."""
        place = i - self.own
        return self.top if place < 0 else self.cycle[place % len(self.cycle)]

    def to_json(self) -> dict[str, Any]:
        return {
            "costs": [round(cost, 6) for cost in self.costs],
            "measured": [sum(len(part.ids) for part in told) for told in self._told],
            "correlation": self.evidence().to_json(),
        }

    # -- learning ---------------------------------------------------------------------------

    def split(self, told: Told) -> list[Part]:
        """The answers of each level that has some."""
        if told.fidelity is None:
            return [Part(self.top, told)] if len(told.ids) else []
        fidelity = np.where(told.fidelity < 0, self.at[-1], told.fidelity)
        rows = [np.flatnonzero(fidelity == number) for number in self.at]
        return [Part(level, rows_of(told, row)) for level, row in enumerate(rows) if len(row)]

    def learn(self, told: Told, space: Space) -> None:
        """Takes answers in."""
        for part in self.split(told):
            keys = space.keys(part.told.population)
            self._told[part.level].append(part.told)
            self._keys[part.level] += keys
            losses = np.where(part.told.violation > 0, np.inf, part.told.losses[:, 0])
            self._values[part.level].update(zip(keys, losses.tolist(), strict=True))

    def issue(self, ids: NDArray[np.int64], keys: Sequence[bytes | None]) -> None:
        """Notes which ids were given which candidates."""
        for i, key in zip(ids.tolist(), keys, strict=True):
            if key is not None:
                self._issued.setdefault(key, []).append(i)

    def columns(self, keys: Sequence[bytes]) -> Floats:
        """Losses (n, levels - 1) at the cheaper levels; NaN where not measured."""
        nan = float("nan")
        out = [[values.get(key, nan) for key in keys] for values in self._values[:-1]]
        return np.array(out, dtype=np.float64).reshape(self.top, len(keys)).T

    def evidence(self) -> Evidence:
        """How the cheapest level's order agrees with the truth's, among those that have both."""
        cheap, full = self._values[0], self._values[-1]
        both = [key for key in full if key in cheap]
        a, b = (np.array([values[key] for key in both]) for values in (cheap, full))
        return correlation([(a, b)])

    def pays(self) -> bool:
        """Whether the cheapest level says anything of the truth, as far as is known."""
        return self.evidence().rho >= USEFUL

    def misleads(self) -> bool:
        """Whether the cheapest level's order is the reverse of the truth's beyond doubt."""
        return self.evidence().high < 0

    # -- going on ---------------------------------------------------------------------------

    def measured(self, level: int, before: int, most: int) -> Population | None:
        """The last candidates that a level measured for ids below `before`."""
        parts = [part.population.take(part.ids < before) for part in self._told[level]]
        parts = [part for part in parts if len(part)]
        if not parts:
            return None
        every = Population.concat(parts)
        return every.take(np.arange(max(0, len(every) - most), len(every)))

    def waiting(self, level: int, i: int) -> Waiting | None:
        """Who may go on from a level at this id: the best `FRONT` of them, in the order of ids."""
        if not self._told[level]:
            return None
        if len(self._told[level]) > 1:
            self._told[level] = [_joined(self._told[level])]
        told, keys = self._told[level][0], self._keys[level]
        losses = np.where(told.violation > 0, np.inf, told.losses[:, 0])
        free = [
            row
            for row, (key, t) in enumerate(zip(keys, told.ids.tolist(), strict=True))
            if not any(t < j < i for j in self._issued.get(key, ()))
        ]
        rows = np.array(free, dtype=np.int64)
        rows = rows[np.isfinite(losses[rows])]
        if not len(rows):
            return None
        rows = np.sort(rows[np.argsort(losses[rows], kind="stable")[:FRONT]])
        some = tuple(keys[row] for row in rows.tolist())
        return Waiting(told.ids[rows], told.population.take(rows), some, losses[rows])


def _joined(parts: Sequence[Told]) -> Told:
    return Told(
        np.concatenate([part.ids for part in parts]),
        Population.concat([part.population for part in parts]),
        np.concatenate([part.losses for part in parts]),
        np.concatenate([part.violation for part in parts]),
    )


def _cycle(costs: Sequence[float]) -> tuple[int, ...]:
    """Levels of the ids up to and with one true evaluation."""
    cycle: tuple[int, ...] = ()
    counts: list[int] = []
    for cost in costs[:-1]:
        count = min(MOST, int(SHARE / cost))
        if counts:  # one that takes nearly all of those below it chooses nothing
            count = min(count, counts[-1] // 2)
        counts.append(max(1, count))
    counts.append(1)
    for level, count in enumerate(counts):
        below = counts[level - 1] // count if level else 1
        cycle = cycle * max(1, below) + (level,)
    return cycle
