"""Crossover and mutation of kept and merged experts.

The numbers of the published search are the defaults of `PruningVariation.released` and
`MergingVariation`; those of `PruningVariation` were measured to find more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._variable import normals
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.spaces.experts.merging import REACH, STEP, MergingSpace
from searchlab.spaces.experts.space import PruningSpace
from searchlab.uniforms import derived

__all__ = ["MergingVariation", "PruningVariation", "moved"]

Array = NDArray[Any]
_TRIES = 64
_LEAST_SUM = 0.05  # a row with less is not divided by it


def moved(members: Array, experts: int, rate: float, u: Array) -> Array:
    """Some members of subsets go to experts that no other member of theirs holds.

    One after the other, each with probability `rate`, to one drawn uniformly; its own place is
    among those. So a share of rate (1 - 1 / (E - E' + 1)) really moves.

    Args:
        members: (m, E') int64, different ones in each row.
        experts: E.
        rate: probability of a move.
        u: (m, 2 E') uniforms.

    Returns:
        (m, E') int64, different ones in each row, in the order of before.

    Source: the released code of arXiv 2407.00945.
    """
    out, count = np.array(members), members.shape[1]
    rows = np.arange(len(out))
    used = np.zeros((len(out), experts), dtype=bool)
    used[rows[:, None], out] = True
    for j in range(count):
        free = ~used
        free[rows, out[:, j]] = True
        rank = (u[:, 2 * j + 1] * free.sum(axis=1)).astype(np.int64)
        target = (np.cumsum(free, axis=1) > rank[:, None]).argmax(axis=1)
        target = np.where(u[:, 2 * j] < rate, target, out[:, j])
        used[rows, out[:, j]] = False
        used[rows, target] = True
        out[:, j] = target
    return out


def some(u: Array, rate: float) -> Array:
    """Flags (n, m), each with probability `rate`, drawn again until a row has one."""
    flags: Array = u < rate
    for attempt in range(_TRIES):
        none = np.flatnonzero(~flags.any(axis=1))
        if not len(none):
            return flags
        flags[none] = derived(u[none], attempt, u.shape[1]) < rate
    none = np.flatnonzero(~flags.any(axis=1))
    flags[none, u[none].argmin(axis=1)] = True
    return flags


@dataclass(frozen=True)
class PruningVariation:
    """A child whose groups of blocks keep some other experts.

    Works on pruned models of a `PruningSpace` with one count for all blocks, and on those of a
    `MergingSpace`, whose router then follows. Under a total, the variation of subsets is as good
    (`UniformVariation`).

    Attributes:
        group: probability that a group of blocks is changed; at least one is.
        row: probability that an expert of such a group moves.
        crossover: probability that whole groups come from two parents.
        single: probability that one group alone is changed, more often a late one: what stands
            before it need not be computed again.

    Source: the released code of arXiv 2407.00945 (`released`). The defaults are ours, see the
    benchmark of a planted optimum.
    """

    group: float = 0.5
    row: float = 0.34
    crossover: float = 0.5
    single: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.crossover, self.single)
        rates = 0 < self.group <= 1 and 0 < self.row <= 1
        if not (rates and all(0 <= share <= 1 for share in shares)):
            raise ConfigError(
                f"group {self.group}, row {self.row}, crossover {self.crossover}, single "
                f"{self.single}; allowed: in (0, 1] twice, in [0, 1] twice"
            )

    @staticmethod
    def released() -> PruningVariation:
        """The published numbers: 0.25, 0.15, and no crossover in this phase."""
        return PruningVariation(group=0.25, row=0.15, crossover=0.0)

    def settings(self) -> dict[str, Any]:
        return {
            "name": "kept_experts",
            "group": self.group,
            "row": self.row,
            "crossover": self.crossover,
            **({"single": self.single} if self.single else {}),
        }

    def _sizes(self, space: Space) -> tuple[int, int, int, int]:
        """Groups of blocks, groups of experts, members and experts of one of those."""
        if not isinstance(space, PruningSpace | MergingSpace) or space.keep is None:
            raise ConfigError(
                f"variation of kept experts on space {space.name!r}; allowed: experts with one "
                "count for all blocks (with a total: the uniform variation)"
            )
        parts, groups = space.parts, int(space.of_block[-1]) + 1
        return groups, parts, space.keep // parts, space.layout.experts // parts

    def width(self, space: Space) -> int:
        groups, parts, members, _ = self._sizes(space)
        return 2 + 2 * groups + groups * parts * members * 2

    def vary(
        self,
        space: Space,
        a: Population,
        b: Population,
        u: Array,
        *,
        strength: float = 1.0,
        targets: Array | None = None,
    ) -> Population:
        groups, parts, members, experts = self._sizes(space)
        n = len(u)
        first, second = self._members(space, a), self._members(space, b)
        alone = u[:, 1] < self.single
        swap = (u[:, 2 : 2 + groups] < 0.5) & (u[:, :1] < self.crossover) & ~alone[:, None]
        child = np.where(swap[:, :, None, None], second, first)
        drawn = u[:, 2 + groups : 2 + 2 * groups]
        hit = some(drawn, min(1.0, self.group * strength))
        late = (np.sqrt(drawn[:, 0]) * groups).astype(np.int64)
        hit = np.where(alone[:, None], np.arange(groups) == late[:, None], hit)
        block = u[:, 2 + 2 * groups :].reshape(n * groups * parts, 2 * members)
        flat = child.reshape(n * groups * parts, members)
        other = moved(flat, experts, min(1.0, self.row * strength), block)
        other = other.reshape(child.shape)
        child = np.where(hit[:, :, None, None], other, child)
        parted = np.zeros((n, groups, parts, experts), dtype=bool)
        np.put_along_axis(parted, child, True, axis=3)
        mask = parted.reshape(n, groups, -1)
        if isinstance(space, MergingSpace):
            return space.of_masks(mask[:, space.of_block])
        shape = space.variables["experts"].shape
        return Population({"experts": mask.astype(np.uint8).reshape(n, *shape)})

    def _members(self, space: Space, population: Population) -> Array:
        """(n, groups, parts, members) numbers within their part."""
        groups, parts, members, experts = self._sizes(space)
        if isinstance(space, MergingSpace):
            most: Array = np.asarray(population["merge"]).argmax(axis=3)
            within: Array = most.reshape(len(most), groups, parts, members) % experts
            return within
        column = np.asarray(population["experts"]).reshape(len(population), groups, parts, experts)
        found: Array = np.nonzero(column)[3].reshape(len(column), groups, parts, members)
        return found


@dataclass(frozen=True)
class MergingVariation:
    """A child of merged models, as published: rows from two parents, then normal steps.

    Of selected groups of blocks, each row comes from the first parent with probability `first`; of
    the others, the whole matrix does. Parents that are one and the same give a copy, so that the
    algorithm's rule of mates says how often there is a crossover. Then other groups are selected,
    where some coefficients get a normal step.

    Attributes:
        group: probability that a group of blocks (of experts, and of the router apart) is selected;
            at least one is.
        first: share of the first parent.
        entry: probability that a coefficient of a selected group is changed.
        sigma: standard deviation of its step.
        normalise: probability that every row of the experts' matrices is divided by its sum.

    Source: the released code of arXiv 2407.00945. Rows whose sum is near 0 are left as they are.
    """

    group: float = 0.25
    first: float = 0.6
    entry: float = 0.25
    sigma: float = STEP
    normalise: float = 0.1

    def __post_init__(self) -> None:
        shares = (self.group, self.first, self.entry, self.normalise)
        if not (all(0 <= share <= 1 for share in shares) and self.group > 0 and self.sigma > 0):
            raise ConfigError(
                f"group {self.group}, first {self.first}, entry {self.entry}, normalise "
                f"{self.normalise}, sigma {self.sigma}; allowed: in [0, 1], group and sigma above 0"
            )

    def settings(self) -> dict[str, Any]:
        return {
            "name": "merged_experts",
            "group": self.group,
            "first": self.first,
            "entry": self.entry,
            "sigma": self.sigma,
            "normalise": self.normalise,
        }

    def _sizes(self, space: Space) -> tuple[int, int, int]:
        if not isinstance(space, MergingSpace):
            raise ConfigError(
                f"variation of merged experts on space {space.name!r}; allowed: merged experts"
            )
        return len(space.variables), int(space.of_block[-1]) + 1, space.keep

    def width(self, space: Space) -> int:
        normals(np.zeros(0))  # loads what it needs, before workers wait for the first one
        tables, groups, rows = self._sizes(space)
        return 1 + tables * groups * (3 + rows) + 2 * space.size

    def vary(
        self,
        space: Space,
        a: Population,
        b: Population,
        u: Array,
        *,
        strength: float = 1.0,
        targets: Array | None = None,
    ) -> Population:
        tables, groups, rows = self._sizes(space)
        n, wide = len(u), tables * groups
        cuts = np.cumsum([1, wide, wide, wide, wide * rows, space.size])
        _, crossed, whole, hit, by_row, by_entry, steps = np.split(u, cuts, axis=1)
        shape = (n, tables, groups, rows)
        one = np.stack([a[key] for key in space.variables], axis=1)
        two = np.stack([b[key] for key in space.variables], axis=1)
        selected = some(crossed, self.group).reshape(shape[:3])
        pick = np.where(
            selected[..., None],
            by_row.reshape(shape) < self.first,
            (whole < self.first).reshape(*shape[:3], 1),
        )
        child = np.where(pick[..., None], one, two)
        chosen = some(hit, min(1.0, self.group * strength)).reshape(*shape[:3], 1, 1)
        change = (by_entry < min(1.0, self.entry * strength)).reshape(child.shape) & chosen
        step = np.zeros(child.shape)
        step[change] = normals(steps.reshape(child.shape)[change]) * self.sigma
        child = child + step
        divided = u[:, 0] < self.normalise
        total = child[divided, 0].sum(axis=-1, keepdims=True)
        child[divided, 0] /= np.where(total > _LEAST_SUM, total, 1.0)
        child = np.clip(child, -REACH, REACH)
        columns = {key: child[:, i] for i, key in enumerate(space.variables)}
        return space.canonicalise(Population(columns))
