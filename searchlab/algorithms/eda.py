"""Estimation of distribution: one probability table per element, learnt from the best."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told, no_parents
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.variables import Choice, Integer, Subset, Variable

__all__ = ["EDA"]

MAX_VALUES = 4096  # of one element; a table of more has little to learn from
Table = NDArray[np.float64]


@dataclass(frozen=True)
class _Coder:
    """One variable as categories: labels, whole numbers, or the members of subsets.

    Attributes:
        variable: the variable.
        rows: tables: elements, or subsets of n members.
        width: categories per table.
        floor: categories that a table keeps at least.
    """

    variable: Variable
    rows: int
    width: int
    floor: int

    @property
    def is_subset(self) -> bool:
        return isinstance(self.variable, Subset)

    def counts(self, values: NDArray[Any], active: NDArray[Any]) -> tuple[Table, Table]:
        """How often each category occurs where active (rows, width), and of how many (rows, 1)."""
        n, variable = len(values), self.variable
        if self.is_subset:
            members = np.where(active, values, 0).reshape(n, self.rows, self.width)
            alive = active.reshape(n, self.rows, self.width).any(axis=2)
            return members.sum(axis=0, dtype=np.float64), alive.sum(axis=0)[:, None] * 1.0
        codes = values.reshape(n, self.rows).astype(np.int64)
        if isinstance(variable, Integer):
            codes = (codes - variable.low) // variable.step
        flags = active.reshape(n, self.rows)
        out = np.zeros((self.rows, self.width))
        places = np.broadcast_to(np.arange(self.rows), codes.shape)
        np.add.at(out, (places[flags], codes[flags]), 1.0)
        return out, flags.sum(axis=0)[:, None] * 1.0

    def draw(self, table: Table, u: NDArray[np.float64]) -> NDArray[Any]:
        """Values (n, *shape) from the tables; u is (n, rows) or (n, rows * width) for subsets."""
        n, variable = len(u), self.variable
        if isinstance(variable, Subset):
            # Sequential draws without replacement, by exponential clocks.
            clocks = -np.log1p(-u.reshape(n, self.rows, self.width))
            with np.errstate(divide="ignore", invalid="ignore"):
                late = np.where(table > 0, clocks / table, np.inf)
            order = np.argsort(late, axis=2, kind="stable")[:, :, : variable.k]
            mask = np.zeros(late.shape, dtype=variable.dtype)
            np.put_along_axis(mask, order, 1, axis=2)
            return mask.reshape(n, *variable.shape)
        edges = np.cumsum(table, axis=1)
        edges /= edges[:, -1:]
        codes = (u[:, :, None] >= edges[None, :, :-1]).sum(axis=2)
        if isinstance(variable, Integer):
            codes = variable.low + codes * variable.step
        drawn: NDArray[Any] = codes.astype(variable.dtype).reshape(n, *variable.shape)
        return drawn


class EDA(Algorithm):
    """Univariate estimation of distribution with truncation, and a support that shrinks.

    Every element has a table of probabilities over its values; a subset has one over its members.
    After each generation the tables move towards the frequencies of its best candidates. With
    `shrink` below 1 the least probable values of every table are left out, a few more after each
    generation, so that fewer and fewer values remain to be compared: the two-level search by which
    representative evaluation subsets are found (sets are scored, members are counted, the pool is
    cut to the members that occur most).

    A generation is so many answers, whatever ids they have: an id that found nothing new belongs
    to none.

    Source: arXiv 2403.16379, section 4 (as released, see the differences), and univariate marginal
    distributions with a learning rate for everything else. Differences: members of a set are
    drawn without replacement; tables are smoothed by one pseudo-count, spread over their support;
    the rest of a table is found again only by redraws of known candidates, which mix it in.

    Args:
        space: of choices, integers and subsets; budgets and conditions are kept by repair.
        seed, first_id, seeds: see `Algorithm`.
        quantum: candidates per generation.
        elite: share of a generation that is learnt from.
        rate: how far the tables move towards them, 1 = all the way.
        shrink: share of a table's values that stay after each generation; at least one label, or
            twice the members that a subset takes.

    Raises:
        ConfigError: a real, ordered or sum-constrained variable, or settings out of range.
    """

    name: ClassVar[str] = "eda"

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        quantum: int = 32,
        elite: float = 0.25,
        rate: float = 0.5,
        shrink: float = 1.0,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds)
        if quantum < 2 or not (0 < elite <= 1 and 0 < rate <= 1 and 0 < shrink <= 1):
            raise ConfigError(
                f"quantum {quantum}, elite {elite}, rate {rate}, shrink {shrink}; "
                "allowed: 2 or more, the others above 0 and at most 1"
            )
        self.quantum = quantum
        self.max_lag = 2 * quantum
        self.elite = elite
        self.rate = rate
        self.shrink = shrink
        self._coders = {key: _coder(key, part) for key, part in space.variables.items()}
        self._tables = {
            key: np.full((coder.rows, coder.width), 1.0 / coder.width)
            for key, coder in self._coders.items()
        }
        self._generation = 0
        self._waiting: list[Told] = []
        self._n_waiting = 0

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "elite": self.elite,
            "rate": self.rate,
            "shrink": self.shrink,
        }

    @cached_property
    def _drawn(self) -> dict[str, int]:
        return {
            key: coder.rows * (coder.width if coder.is_subset else 1)
            for key, coder in self._coders.items()
        }

    def _width(self) -> int:
        return sum(self._drawn.values()) + self.space.repair_width

    # -- learning ---------------------------------------------------------------------------

    def _learn(self, told: Told) -> None:
        start = 0
        while start < len(told.ids):
            rows = slice(start, start + self.quantum - self._n_waiting)
            part = Told(
                told.ids[rows],
                told.population.take(rows),
                told.losses[rows],
                told.violation[rows],
            )
            start += len(part.ids)
            self._waiting.append(part)
            self._n_waiting += len(part.ids)
            if self._n_waiting == self.quantum:
                self._update()
                self._waiting, self._n_waiting = [], 0

    def _update(self) -> None:
        losses = np.concatenate([part.losses[:, 0] for part in self._waiting])
        violation = np.concatenate([part.violation for part in self._waiting])
        population = Population.concat([part.population for part in self._waiting])
        order = np.lexsort((losses, violation))
        order = order[np.isfinite(losses[order])][: max(1, round(self.elite * self.quantum))]
        self._generation += 1
        if not len(order):
            return
        best = population.take(order)
        active = self.space.active(best)
        for key, coder in self._coders.items():
            table = self._tables[key]
            counts, total = coder.counts(best[key], active[key])
            support = table > 0
            prior = support / support.sum(axis=1, keepdims=True)
            counts = np.where(support, counts, 0.0) + prior
            aim = counts / counts.sum(axis=1, keepdims=True)
            moved = np.where(total > 0, (1 - self.rate) * table + self.rate * aim, table)
            self._tables[key] = self._shrunk(moved, coder)

    def _shrunk(self, table: Table, coder: _Coder) -> Table:
        keep = max(coder.floor, int(np.ceil(coder.width * self.shrink**self._generation)))
        if keep < coder.width:
            order = np.argsort(-table, axis=1, kind="stable")[:, keep:]
            np.put_along_axis(table, order, 0.0, axis=1)
        out: Table = table / table.sum(axis=1, keepdims=True)
        return out

    # -- proposing --------------------------------------------------------------------------

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        even = min(1.0, 0.01 * strength) if strength > 1 else 0.0
        columns, start = {}, 0
        for key, coder in self._coders.items():
            table = (1 - even) * self._tables[key] + even / coder.width
            columns[key] = coder.draw(table, u[:, start : start + self._drawn[key]])
            start += self._drawn[key]
        population = self.space.repair(Population(columns), u[:, start:])
        return Draw(population, ["eda"] * len(ids), no_parents(len(ids)))


def _coder(key: str, variable: Variable) -> _Coder:
    if isinstance(variable, Subset):
        return _Coder(
            variable, variable.size // variable.n, variable.n, min(2 * variable.k, variable.n)
        )
    if isinstance(variable, Choice):
        width = len(variable.labels)
    elif isinstance(variable, Integer):
        width = (variable.high - variable.low) // variable.step + 1
    else:
        raise ConfigError(
            f"eda on {key!r}, a {variable.kind}; allowed: choices, integers and subsets "
            "(cma fits real numbers, evolution fits everything)"
        )
    if width > MAX_VALUES:
        raise ConfigError(
            f"eda on {key!r} with {width} values; allowed: at most {MAX_VALUES} (evolution fits)"
        )
    return _Coder(variable, variable.size, width, 1)
