"""Successive halving: many candidates measured cheaply, few of them well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told, no_parents
from searchlab.algorithms.variation import UniformVariation, Variation
from searchlab.errors import ConfigError
from searchlab.population import Jobs, Population
from searchlab.space import Space

__all__ = ["SuccessiveHalving"]

PARENTS = 8  # the best at the highest fidelity that children are made of


class SuccessiveHalving(Algorithm):
    """Brackets of rungs over an evaluator's fidelities.

    A bracket measures `quantum` new candidates at the cheapest fidelity, the best 1 / `eta` of
    them at the next one, and so on up to the truth. A rung is an ask group, so that all candidates
    of a rung are known before the next one is chosen (`max_lag` is the quantum); ids of a rung
    that has fewer jobs are void. Further brackets follow, whose new candidates are to a share
    `learn` children of the best at the highest fidelity. Baselines and other seeds come first, at
    the highest fidelity.

    Source: arXiv 1502.07943, algorithm 1. Differences: brackets are repeated, and they learn.

    Args:
        space, seed, first_id, seeds: see `Algorithm`.
        fidelities: relative costs, cheapest first, the truth last; the evaluator's own by default.
        quantum: candidates of a bracket.
        eta: one of so many goes on to the next rung.
        learn: share of children in the brackets after the first.
        variation: makes children.

    Raises:
        ConfigError: fewer than two fidelities, or settings out of range.
    """

    name: ClassVar[str] = "successive_halving"
    pools = False
    levels = True

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        fidelities: Sequence[float] = (),
        quantum: int = 27,
        eta: float = 3.0,
        learn: float = 0.5,
        variation: Variation | None = None,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds)
        costs = tuple(float(cost) for cost in fidelities)
        if len(costs) < 2:
            raise ConfigError(
                f"successive_halving with {len(costs)} fidelities; allowed: two or more "
                "(evolution fits one)"
            )
        if list(costs) != sorted(costs) or costs[0] <= 0:
            raise ConfigError(f"fidelities cost {list(costs)}; allowed: above 0, cheapest first")
        if quantum < 2 or eta <= 1 or not 0 <= learn <= 1:
            raise ConfigError(
                f"quantum {quantum}, eta {eta}, learn {learn}; allowed: 2 or more, above 1, [0, 1]"
            )
        self.fidelities = costs
        self.quantum = quantum
        self.max_lag = quantum
        self.eta = eta
        self.learn = learn
        self.variation: Variation = variation or UniformVariation()
        self._variation_width = self.variation.width(space)
        # Seeds fill the groups before the first bracket.
        self._seed_groups = -(-len(self.seeds.population) // quantum)
        self._rung: tuple[int, Told | None] = (-1, None)  # a group, and the answers told of it
        self._best: Told | None = None  # the best at the highest fidelity, best first

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "fidelities": list(self.fidelities),
            "eta": self.eta,
            "learn": self.learn,
            "variation": self.variation.settings(),
        }

    def _width(self) -> int:
        return 3 + max(self._variation_width, self.space.sample_width)

    def _place(self, group: int) -> tuple[int, int]:
        """Bracket and rung of a group; seeds belong to bracket -1 and the highest rung."""
        number = group - self._seed_groups
        if number < 0:
            return -1, len(self.fidelities) - 1
        return number // len(self.fidelities), number % len(self.fidelities)

    # -- learning ---------------------------------------------------------------------------

    def _learn(self, told: Told) -> None:
        groups = (told.ids - self.first_id) // self.quantum
        for group in np.unique(groups).tolist():
            part = _rows(told, np.flatnonzero(groups == group))
            if self._place(group)[1] == len(self.fidelities) - 1:
                self._best = _ranked(_joined(self._best, part))
                self._best = _rows(self._best, np.arange(min(PARENTS, len(self._best.ids))))
            known = self._rung[1] if self._rung[0] == group else None
            self._rung = group, _joined(known, part)

    # -- proposing --------------------------------------------------------------------------

    def ask(self, first_id: int, n: int) -> Jobs:
        """See `Algorithm.ask`; at most up to the end of the group that holds the first id."""
        group = (first_id - self.first_id) // self.quantum
        end = self.first_id + (group + 1) * self.quantum
        n = max(0, min(n, end - first_id))
        bracket, rung = self._place(group)
        if bracket < 0:  # what is left of the seeds' groups is void
            left = self.first_id + len(self.seeds.population) - first_id
            jobs = super().ask(first_id, max(0, min(n, left)))
        elif rung == 0:
            jobs = super().ask(first_id, n)
        else:
            jobs = self._promoted(first_id, n, group, rung)
        return replace(jobs, fidelity=rung)

    def _promoted(self, first_id: int, n: int, group: int, rung: int) -> Jobs:
        known = self._rung[1] if self._rung[0] == group - 1 else None
        wanted = max(1, int(self.quantum / self.eta**rung))
        start = first_id - self.first_id - group * self.quantum
        best = np.arange(start, min(start + n, wanted))
        if known is not None:
            known = _ranked(known)
            best = best[best < len(known.ids)]
        if known is None or not len(best):
            return super().ask(first_id, 0)
        chosen = _rows(known, best)
        return Jobs(
            ids=first_id + np.arange(len(best), dtype=np.int64),
            population=chosen.population,
            keys=self.space.keys(chosen.population),
            told_at_ask=self.n_told,
            origin=("promoted",) * len(best),
            parents=np.column_stack([chosen.ids, chosen.ids]),
        )

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        bracket = ((ids - self.first_id) // self.quantum - self._seed_groups) // len(
            self.fidelities
        )
        best = self._best
        vary = (bracket > 0) & (u[:, 0] < self.learn) & (best is not None and len(best.ids) > 0)
        columns = {}
        sampled = self.space.sample(u[:, 3 : 3 + self.space.sample_width])
        origin, parents = np.array(["random"] * len(ids), dtype=object), no_parents(len(ids))
        if not vary.any() or best is None:
            return Draw(sampled, origin.tolist(), parents)
        rows = (u[vary, 1:3] ** 2 * len(best.ids)).astype(np.int64)
        children = self.variation.vary(
            self.space,
            best.population.take(rows[:, 0]),
            best.population.take(rows[:, 1]),
            u[vary, 3 : 3 + self._variation_width],
            strength=strength,
        )
        for name, column in sampled.columns.items():
            columns[name] = np.array(column)
            columns[name][vary] = children[name]
        origin[vary] = "vary"
        parents[vary] = best.ids[rows]
        return Draw(Population(columns), origin.tolist(), parents)


def _rows(told: Told, rows: NDArray[np.int64]) -> Told:
    return Told(told.ids[rows], told.population.take(rows), told.losses[rows], told.violation[rows])


def _joined(first: Told | None, second: Told) -> Told:
    if first is None:
        return second
    return Told(
        np.concatenate([first.ids, second.ids]),
        Population.concat([first.population, second.population]),
        np.concatenate([first.losses, second.losses]),
        np.concatenate([first.violation, second.violation]),
    )


def _ranked(told: Told) -> Told:
    """The successes, best first; ties in the order of ids."""
    order = np.lexsort((told.ids, told.losses[:, 0], told.violation))
    return _rows(told, order[np.isfinite(told.losses[order, 0])])
