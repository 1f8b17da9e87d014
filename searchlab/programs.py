"""Separable integer programs: one label per element, losses that add up, linear budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._exact import Found, solve_one_budget, whole_units
from searchlab._hull import Hull, hull_of
from searchlab._label_program import Many
from searchlab._many_budgets import solve_many_budgets
from searchlab.errors import ConfigError

__all__ = ["Front", "Limit", "SeparableProgram", "Solution"]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Limit:
    """lower <= sum over elements of costs[element, label] <= upper.

    Args:
        costs: float64 (elements, labels), or what broadcasts to it.
        upper, lower: of the sum; inf and -inf where there is none.
        name: how the sum is called in errors and solutions.
    """

    costs: Any
    upper: float = np.inf
    lower: float = -np.inf
    name: str = "budget"

    @property
    def slip(self) -> float:
        """What rounding of the sum may cost."""
        return 1e-9 * max(1.0, *(abs(x) for x in (self.lower, self.upper, 0.0) if np.isfinite(x)))


@dataclass(frozen=True, eq=False)
class Solution:
    """A plan, what it costs, and how good it provably is.

    Attributes:
        labels: int64 (e,), the label of every element.
        loss: sum of the losses as they were given.
        bound: no plan within the budgets loses less.
        gap: (loss - bound) / (loss - sum of every element's least loss); 0 = proved optimal.
        costs: the sum of every budget, by name.
        prices: what one more unit of each budget would save, by name (in the relaxed program).
    """

    labels: NDArray[np.int64]
    loss: float
    bound: float
    gap: float
    costs: dict[str, float]
    prices: dict[str, float]


@dataclass(frozen=True, eq=False)
class Front:
    """The supported plans within one budget, cheapest first; each is optimal for its own cost.

    Attributes:
        costs: float64 (p,), rising.
        losses: float64 (p,), falling.
    """

    costs: NDArray[np.float64]
    losses: NDArray[np.float64]
    _numbers: NDArray[np.int64] = field(repr=False)
    _hull: Hull = field(repr=False)
    _leader: NDArray[np.int64] = field(repr=False)

    def __len__(self) -> int:
        return len(self.costs)

    def labels(self, points: Any) -> NDArray[np.int64]:
        """The plans of some points, int64 (n, e)."""
        return self._hull.plans(self._numbers[np.atleast_1d(points)])[:, self._leader]


@dataclass(frozen=True, eq=False)
class SeparableProgram:
    """Chooses one label per element so that the sum of losses is least within linear budgets.

    Args:
        losses: float (e, k), to be minimised. Only differences within a row matter.
        budgets: what the sums of the costs have to keep; none, one or several.
        allowed: bool (e, k), for elements with fewer labels; everything by default.
        ties: groups of element numbers that take one label.
        max_distinct: how many different labels the elements of a group may take; None = any.
        groups: int (e,), the group of every element for `max_distinct`.

    Raises:
        ConfigError: losses or costs that are missing or not finite, an element without a label,
            ties or groups that do not fit.
    """

    losses: Any
    budgets: Sequence[Limit] = ()
    allowed: Any = None
    ties: Sequence[Sequence[int]] = ()
    max_distinct: int | None = None
    groups: Any = None

    def __post_init__(self) -> None:
        losses = np.array(self.losses, dtype=np.float64)
        if losses.ndim != 2 or not losses.size:
            raise ConfigError(f"losses of shape {losses.shape}; allowed: (elements, labels)")
        allowed = np.ones(losses.shape, bool) if self.allowed is None else np.array(self.allowed)
        if allowed.shape != losses.shape or allowed.dtype != np.bool_:
            raise ConfigError(f"allowed of shape {allowed.shape}; allowed: bool {losses.shape}")
        if not allowed.any(axis=1).all():
            number = int(np.flatnonzero(~allowed.any(axis=1))[0])
            raise ConfigError(f"element {number} has no label; allowed: one label or more")
        self._finite(losses, allowed, "loss")
        limits = []
        for limit in self.budgets:
            try:
                costs = np.broadcast_to(np.asarray(limit.costs, dtype=np.float64), losses.shape)
            except ValueError:
                raise ConfigError(
                    f"costs of budget {limit.name!r} have shape {np.shape(limit.costs)}; "
                    f"allowed: {losses.shape}"
                ) from None
            self._finite(costs, allowed, f"cost in budget {limit.name!r}")
            if not limit.lower <= limit.upper:
                raise ConfigError(
                    f"budget {limit.name!r}: lower {limit.lower}, upper {limit.upper}; "
                    "allowed: lower <= upper"
                )
            limits.append(replace(limit, costs=costs))
        names = [limit.name for limit in limits]
        if len(set(names)) < len(names):
            raise ConfigError(f"budgets {names}; allowed: different names")
        object.__setattr__(self, "losses", losses)
        object.__setattr__(self, "allowed", allowed)
        object.__setattr__(self, "budgets", tuple(limits))
        self._check_groups(len(losses))

    @staticmethod
    def _finite(values: Array, allowed: Array, what: str) -> None:
        bad = np.argwhere(allowed & ~np.isfinite(values))
        if len(bad):
            e, k = bad[0].tolist()
            raise ConfigError(
                f"{what} of label {k} of element {e} is {values[e, k]} ({len(bad)} such entries); "
                "allowed: finite numbers (mask labels that do not exist with `allowed`)"
            )

    def _check_groups(self, e: int) -> None:
        for tie in self.ties:
            if len(set(tie)) < len(tie) or not all(0 <= i < e for i in tie):
                raise ConfigError(f"tie {list(tie)}; allowed: different elements of 0..{e - 1}")
        if (self.max_distinct is None) != (self.groups is None):
            raise ConfigError("max_distinct and groups; allowed: both or none")
        if self.groups is None:
            return
        groups = np.unique(np.asarray(self.groups), return_inverse=True)[1].reshape(-1)
        if len(groups) != e or self.max_distinct is None or self.max_distinct < 1:
            raise ConfigError(
                f"max_distinct {self.max_distinct} with {len(groups)} groups of elements; "
                f"allowed: 1 or more, and {e} group numbers"
            )
        object.__setattr__(self, "groups", groups.astype(np.int64))
        leaders = self._leader
        if (groups[leaders] != groups).any():
            raise ConfigError("a tie across groups; allowed with max_distinct: within one group")

    # -- the program without ties ---------------------------------------------------------------

    @cached_property
    def _leader(self) -> NDArray[np.int64]:
        """The row of the tied program that stands for each element."""
        first = np.arange(len(self.losses))
        for tie in self.ties:
            met = np.isin(first, first[list(tie)])
            first[met] = first[met].min()
        return np.unique(first, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def _joined(self, table: Array) -> Array:
        if not self.ties:
            return np.array(table, dtype=np.float64)
        out = np.zeros((int(self._leader.max()) + 1, table.shape[1]))
        np.add.at(out, self._leader, table)
        return out

    @cached_property
    def _rows(self) -> tuple[Array, Array]:
        """Losses of the tied program, each row's least at zero and +inf where nothing stands."""
        allowed = self._joined(~self.allowed) == 0
        if not allowed.any(axis=1).all():
            raise ConfigError("tied elements have no label in common; allowed: one or more")
        # Shifted before they are joined: a large common part would cost digits.
        least = np.where(self.allowed, self.losses, np.inf).min(axis=1, keepdims=True)
        losses = self._joined(np.where(self.allowed, self.losses - least, 0.0))
        losses = np.where(allowed, losses, np.inf)
        return losses - losses.min(axis=1, keepdims=True), allowed

    @cached_property
    def _costs(self) -> list[Array]:
        return [self._joined(np.where(self.allowed, b.costs, 0.0)) for b in self.budgets]

    # -- answers --------------------------------------------------------------------------------

    def front(self) -> Front:
        """All supported plans within the budget, in milliseconds.

        Raises:
            ConfigError: not exactly one budget, a limit on distinct labels, no plan within it.
        """
        if len(self.budgets) != 1 or self.max_distinct is not None:
            raise ConfigError(
                f"front of {len(self.budgets)} budgets and max_distinct {self.max_distinct}; "
                "allowed: one budget and no such limit (see `solve`)"
            )
        losses, _ = self._rows
        limit, costs = self.budgets[0], self._costs[0]
        hull = hull_of(losses, costs)
        own = np.arange(len(losses))
        start = float(costs[own, hull.start].sum())
        cost = start + hull.added
        loss = float(losses[own, hull.start].sum()) + np.concatenate(
            [[0.0], np.cumsum(hull.loss_step)]
        )
        loss = np.maximum(loss, 0.0)
        keep = (cost <= limit.upper + limit.slip) & (cost >= limit.lower - limit.slip)
        # Steps below the rounding of the sum would stand as equal points.
        keep[1:] &= (loss[1:] < np.minimum.accumulate(loss)[:-1]) & (cost[1:] > cost[:-1])
        numbers = np.flatnonzero(keep)
        if not len(numbers) and cost[0] > limit.upper:
            raise self._too_small(limit, float(cost[0]))
        return Front(cost[numbers], loss[numbers] + self._least, numbers, hull, self._leader)

    @cached_property
    def _least(self) -> float:
        """The sum of the losses that the shifted program counts from."""
        shifted, _ = self._rows
        labels = shifted.argmin(axis=1)[self._leader]
        return float(self.losses[np.arange(len(self.losses)), labels].sum())

    def solve(
        self, *, upper: float | Mapping[str, float] | None = None, gap: float | None = None
    ) -> Solution:
        """The best plan within the budgets, with a proof of how good it is.

        One budget is solved exactly, in well under a second for a thousand elements. Several
        budgets, or a limit on distinct labels, are solved by column generation and integer
        programs of limited size, usually to the gap; what was proved is in the solution. Equal
        programs have equal answers, no clock decides.

        Args:
            upper: replaces the budget's upper bound, or several by name.
            gap: relative, how much more than the optimum the plan may lose. By default 0 for one
                budget and 1e-3 for several.

        Raises:
            ConfigError: no plan keeps the budgets (names the smallest feasible value).
        """
        if gap is not None and not 0 <= gap < np.inf:
            raise ConfigError(f"gap {gap}; allowed: 0 or more")
        if upper is not None:
            return self._with(upper).solve(gap=gap)
        losses, allowed = self._rows
        scale = float(losses[allowed].max()) or 1.0
        single = len(self.budgets) <= 1 and self.max_distinct is None
        if single:
            found = self._one(losses / scale, allowed, 0.0 if gap is None else gap)
        else:
            found = self._several(losses / scale, 1e-3 if gap is None else gap)
        if found.labels is None:
            raise self._infeasible()
        return self._solution(found, losses, scale)

    def _with(self, upper: float | Mapping[str, float]) -> SeparableProgram:
        names = [limit.name for limit in self.budgets]
        if not isinstance(upper, Mapping):
            if len(names) != 1:
                raise ConfigError(f"upper {upper} for budgets {names}; allowed: one per name")
            upper = {names[0]: upper}
        if not set(upper) <= set(names):
            raise ConfigError(f"upper of {sorted(set(upper) - set(names))}; known: {names}")
        budgets = [replace(b, upper=float(upper.get(b.name, b.upper))) for b in self.budgets]
        return replace(self, budgets=budgets)

    def _one(self, losses: Array, allowed: Array, gap: float) -> Found:
        limit = self.budgets[0] if self.budgets else Limit(np.zeros_like(losses))
        costs = self._costs[0] if self.budgets else np.zeros_like(losses)
        whole = whole_units(costs, allowed, limit.lower, limit.upper, limit.slip)
        found = solve_one_budget(losses, whole, gap)
        return replace(found, price=np.array([found.price / whole.unit]))

    def _several(self, losses: Array, gap: float) -> Found:
        room = np.array([float(np.ptp(c, axis=1).sum()) or 1.0 for c in self._costs])
        costs = np.stack(self._costs) / room[:, None, None] if self._costs else None
        groups = None
        if self.groups is not None:
            groups = np.empty(len(losses), dtype=np.int64)
            groups[self._leader] = self.groups
        problem = Many(
            losses,
            np.zeros((0, *losses.shape)) if costs is None else costs,
            np.array([(b.lower - b.slip) for b in self.budgets]) / room,
            np.array([(b.upper + b.slip) for b in self.budgets]) / room,
            groups,
            self.max_distinct or 0,
        )
        found = solve_many_budgets(problem, gap)
        return replace(found, price=np.asarray(found.price) / room)

    def _solution(self, found: Found, losses: Array, scale: float) -> Solution:
        assert found.labels is not None
        excess = float(losses[np.arange(len(losses)), found.labels].sum())
        away = max(excess - found.bound * scale, 0.0)
        if away <= 1e-12 * excess:
            away = 0.0
        labels = found.labels[self._leader]
        own = np.arange(len(labels))
        loss = float(self.losses[own, labels].sum())
        return Solution(
            labels,
            loss,
            loss - away,
            away / excess if away else 0.0,
            {b.name: float(b.costs[own, labels].sum()) for b in self.budgets},
            {b.name: float(p) * scale for b, p in zip(self.budgets, found.price, strict=False)},
        )

    # -- budgets that nothing keeps -------------------------------------------------------------

    def _too_small(self, limit: Limit, least: float) -> ConfigError:
        return ConfigError(
            f"budget {limit.name!r} of at most {limit.upper:.12g} is below the cheapest plan; "
            f"allowed: {least:.12g} or more"
        )

    def _infeasible(self) -> ConfigError:
        """Names the smallest (or largest) feasible value of the budget that is in the way."""
        _, allowed = self._rows
        for limit, costs in zip(self.budgets, self._costs, strict=True):
            least = float(np.where(allowed, costs, np.inf).min(axis=1).sum())
            most = float(np.where(allowed, costs, -np.inf).max(axis=1).sum())
            if least > limit.upper + limit.slip:
                return self._too_small(limit, least)
            if most < limit.lower - limit.slip:
                return ConfigError(
                    f"budget {limit.name!r} of at least {limit.lower:.12g} is above the dearest "
                    f"plan; allowed: {most:.12g} or less"
                )
        names = ", ".join(repr(limit.name) for limit in self.budgets)
        if len(self.budgets) > 1:
            last = self.budgets[-1]
            others = replace(self, losses=last.costs, budgets=self.budgets[:-1])
            try:
                least = others.solve(gap=1e-6).bound
            except ConfigError as error:
                return error
            return ConfigError(
                f"budgets {names} have no plan in common; allowed: {last.name!r} of "
                f"{max(least, last.lower):.12g} or more beside the others"
            )
        return ConfigError(
            f"budget {names}: no plan lies between {self.budgets[0].lower:.12g} and "
            f"{self.budgets[0].upper:.12g}; allowed: a range that holds one"
        )
