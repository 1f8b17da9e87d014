"""How many experts stay and how many are active, as things that may vary: a space for fronts.

Beside which experts stay, their number is free, and the number of active experts. What a candidate
takes follows from the layout alone: bytes of the weights, operations per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.constraints import Predicate
from searchlab.errors import ConfigError, SpaceError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.spaces.experts.families import ExpertLayout
from searchlab.spaces.experts.plan import ExpertPlan
from searchlab.spaces.experts.space import block_groups
from searchlab.uniforms import derived
from searchlab.variables import Choice, Integer, Variable

__all__ = ["TradeOffSpace", "TradeOffVariation"]

Array = NDArray[Any]
_FLIPS = 2.0  # experts of a changed group that are exchanged, about
_ROW = 0.34  # and the largest share of them


class TradeOffSpace(Space):
    """Kept experts, in any number, and the number of active ones.

    A candidate is a mask of experts per group of blocks; `active` is a column of its own where it
    is free. Candidates have one spelling each.

    Args:
        layout: of the model.
        most: most experts that a block keeps; None = all.
        total: most experts of all blocks together, with counts per block.
        groups: blocks are split by depth into so many groups that keep the same experts.
        per_block: blocks may keep different numbers; otherwise all keep equally many.
        top_k: experts per token; None = free, from 1 to the model's.
        flat: routing without groups, for families that have them.
        router_mode: see `routing.choose`.

    Raises:
        SpaceError: what the model cannot be cut to.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        *,
        most: int | None = None,
        total: int | None = None,
        groups: int | Literal["block"] = "block",
        per_block: bool = False,
        top_k: int | None = None,
        flat: bool = False,
        router_mode: Literal["slice", "prob"] = "slice",
    ) -> None:
        if per_block and groups != "block":
            raise SpaceError(f"counts per block with groups {groups!r}; allowed: 'block'")
        if total is not None and not per_block:
            raise SpaceError(f"total {total} with one count for all; allowed: per_block")
        if router_mode not in ("slice", "prob"):
            raise SpaceError(f"router mode {router_mode!r}; allowed: slice, prob")
        self.layout = layout
        self.top_k = top_k
        self.flat = flat and layout.n_group > 1
        self.router_mode = router_mode
        self.per_block = per_block
        self.parts = 1 if self.flat else layout.n_group
        self.of_block = block_groups(len(layout.blocks), groups)
        self.most = layout.experts if most is None else most
        layout.check_count(self.most, top_k=top_k or 1, flat=self.flat)
        # Experts of a part of a block, by the number of active ones.
        self._low = np.array([self._least(k) for k in range(layout.top_k + 1)])
        self._high = self.most // self.parts
        first = int(self._low[top_k or 1])
        count, each = int(self.of_block[-1]) + 1, layout.experts // self.parts
        least = count * first * self.parts
        self.total = None if total is None else min(total, count * self.most)
        if self.total is not None and self.total < least:
            raise SpaceError(f"total {total} experts; allowed: {least} or more")
        variables: dict[str, Variable] = {
            "kept": Choice((0, 1), shape=(count, self.parts, each)),
        }
        if top_k is None:
            # With so many active ones the least that a block keeps must fit in.
            fits = [k for k in range(1, layout.top_k + 1) if self._fits(k, count)]
            variables["active"] = Integer(1, max(fits))
        name = f"{first * self.parts} to {self.most} experts in each of {count} blocks"
        name += "" if per_block else ", in all alike"
        name += f", equal in {self.parts} groups" if self.parts > 1 else ""
        name += "" if self.total is None else f", at most {self.total} in all"
        super().__init__(
            variables, constraints=(Predicate(self._legal, name),), name="experts, any number"
        )

    def _least(self, k: int) -> int:
        allowed = self.layout.counts_allowed(top_k=max(1, k), flat=self.flat)
        return allowed[0] // self.parts

    def _fits(self, k: int, count: int) -> bool:
        low = int(self._low[k])
        return low <= self._high and (self.total is None or low * count * self.parts <= self.total)

    # -- legality -------------------------------------------------------------------------------

    def _counts(self, kept: Array) -> Array:
        """(n, G, parts) from (n, G, parts, E / parts)."""
        counts: Array = kept.sum(axis=3, dtype=np.int64)
        return counts

    def active_of(self, population: Mapping[str, Array] | Population) -> NDArray[np.int64]:
        """Experts per token of each candidate, int64 (n,)."""
        if self.top_k is not None:
            return np.full(len(population["kept"]), self.top_k, dtype=np.int64)
        return np.asarray(population["active"], dtype=np.int64)

    def _legal(self, columns: Mapping[str, Array]) -> NDArray[np.bool_]:
        counts = self._counts(columns["kept"])
        low = self._low[self.active_of(columns)][:, None, None]
        ok = ((counts >= low) & (counts <= self._high) & (counts == counts[..., :1])).all((1, 2))
        if not self.per_block:
            ok &= (counts == counts[:, :1]).all(axis=(1, 2))
        if self.total is not None:
            ok &= counts.sum(axis=(1, 2)) <= self.total
        return np.asarray(ok, dtype=bool)

    def _repair_bounds(self, population: Population) -> Population:
        population = super()._repair_bounds(population)
        if not len(population):
            return population
        wrong = np.flatnonzero(~self._legal(population.columns))
        if not len(wrong):
            return population
        column = np.array(population["kept"])
        parts = column[wrong] > 0
        noise = derived(parts.reshape(len(wrong), -1).astype(np.uint64), 1, self._width)
        had = self._counts(parts).mean(axis=2)
        active = self.active_of(population)[wrong]
        column[wrong] = self._cut(
            np.where(parts, 1.0, 0.0) - noise.reshape(parts.shape), had, active
        )
        return population.replace(kept=column)

    @property
    def _width(self) -> int:
        return int(np.prod(self.variables["kept"].shape))

    def _cut(self, value: Array, had: Array, active: Array) -> Array:
        """Legal masks of the most valuable experts.

        Args:
            value: (n, G, parts, E / parts), different numbers.
            had: (n, G), how many should stay in each part.
            active: (n,), experts per token.
        """
        low = self._low[active][:, None]
        if not self.per_block:
            had = np.broadcast_to(had.mean(axis=1, keepdims=True), had.shape)
        counts = np.clip(np.floor(had + 0.5).astype(np.int64), low, self._high)
        if self.total is not None:
            allowed = self.total // self.parts
            while (over := counts.sum(axis=1) > allowed).any():
                largest = np.where(counts > low, counts, -1).argmax(axis=1)
                counts[np.flatnonzero(over), largest[over]] -= 1
        rank = (-value).argsort(axis=3, kind="stable")
        out = np.zeros(value.shape, dtype=np.uint8)
        chosen = (np.arange(value.shape[3]) < counts[:, :, None, None]).astype(np.uint8)
        np.put_along_axis(out, rank, np.broadcast_to(chosen, out.shape), axis=3)
        return out

    def sample(self, u: Array) -> Population:
        """Random candidates: numbers of experts are drawn uniformly, then which ones.

        A row of uniforms is stretched, so that it decides its candidate alone.
        """
        n, groups = len(u), int(self.of_block[-1]) + 1
        if not n:
            return self.empty()
        u = derived(u[:, :2], 0, 2 + groups + self._width)
        columns: dict[str, Array] = {}
        if self.top_k is None:
            high = self.variables["active"].high  # type: ignore[attr-defined]
            columns["active"] = 1 + (u[:, 0] * high).astype(np.int64)
        active = columns.get("active", np.full(n, self.top_k or 1))
        low = self._low[active]
        level = low + (u[:, 1] * (self._high - low + 1)).astype(np.int64)
        had = level[:, None] + (u[:, 2 : 2 + groups] * 3).astype(np.int64) - 1
        if not self.per_block:
            had = np.broadcast_to(level[:, None], (n, groups))
        value = u[:, 2 + groups :].reshape(n, *self.variables["kept"].shape)
        columns["kept"] = self._cut(value, had.astype(np.float64), active)
        return Population({key: columns[key] for key in self.variables})

    # -- what candidates mean -------------------------------------------------------------------

    def masks(self, population: Population) -> NDArray[np.bool_]:
        """Bool (n, L, E)."""
        column = np.asarray(population["kept"]) > 0
        table: NDArray[np.bool_] = column.reshape(len(column), column.shape[1], self.layout.experts)
        return table[:, self.of_block]

    def of_masks(
        self, masks: NDArray[np.bool_], active: NDArray[np.int64] | None = None
    ) -> Population:
        """The candidates of masks (n, L, E) with so many active experts (n,).

        With groups, a group's first block speaks for it.

        Raises:
            SpaceError: another shape, or masks that are not of this space.
        """
        want = (len(self.layout.blocks), self.layout.experts)
        if masks.ndim != 3 or masks.shape[1:] != want:
            raise SpaceError(f"masks of shape {masks.shape}; allowed: (n, {want[0]}, {want[1]})")
        first = np.searchsorted(self.of_block, np.arange(self.of_block[-1] + 1))
        shape = self.variables["kept"].shape
        columns: dict[str, Array] = {
            "kept": masks[:, first].astype(np.uint8).reshape(len(masks), *shape)
        }
        if self.top_k is None:
            if active is None:
                active = np.full(len(masks), self.layout.top_k, dtype=np.int64)
            columns["active"] = np.asarray(active, dtype=np.int64)
        population = Population(columns)
        feasible = self.is_feasible(population)
        if not feasible.all():
            row = int(np.flatnonzero(~feasible)[0])
            raise SpaceError(
                f"mask {row} keeps {masks[row].sum(axis=1).tolist()} experts of its blocks, "
                f"{self.active_of(population)[row]} active; allowed: {self.predicates[0].name}"
            )
        return population

    def cost(self, population: Population) -> dict[str, NDArray[np.float64]]:
        """What candidates take, by the layout.

        "experts" in all blocks; "bytes" of the model's weights (of its experts alone where the
        files are not known); "flops", floating point operations of one token in its experts and
        routers, multiplications and additions counted apart. Attention, shared experts and what
        else stays are the same for all.
        """
        out = super().cost(population)
        layout = self.layout
        count = self.masks(population).sum(axis=(1, 2)).astype(np.float64)
        expert, row = 6.0 * layout.hidden * layout.width, 2.0 * layout.hidden
        out["experts"] = count
        out["bytes"] = layout.other_bytes + count * layout.expert_bytes
        active = self.active_of(population).astype(np.float64)
        out["flops"] = len(layout.blocks) * active * expert + count * row
        return out

    def plans(self, population: Population) -> list[Any]:
        """One `ExpertPlan` per candidate."""
        active = self.active_of(population).tolist()
        return [
            ExpertPlan.of_mask(self.layout, mask, k, self.router_mode, flat=self.flat)
            for mask, k in zip(self.masks(population), active, strict=True)
        ]

    def export(self, plans: Mapping[int, Any], directory: Path) -> list[Path]:
        """Genotypes only; recipes write checkpoints beside them."""
        from searchlab.result import write_plans

        return write_plans(plans, directory)

    def to_json(self) -> dict[str, Any]:
        """With what candidates stand for: the layout's shape, groups, routing."""
        return {
            **super().to_json(),
            "layers": list(self.layout.blocks),
            "of_block": self.of_block.tolist(),
            "family": self.layout.family,
            "top_k": self.top_k,
            "flat": self.flat,
            "router_mode": self.router_mode,
        }


@dataclass(frozen=True)
class TradeOffVariation:
    """A child of two models of different size: groups of blocks of either, another size, exchanges.

    Attributes:
        crossover: probability that groups of blocks come from two parents.
        size: probability that the numbers of experts change: by one, or seldom to any number.
        jump: probability of the latter.
        active: probability that the number of active experts is drawn anew.
        group: probability that a group of blocks has experts exchanged.
        prior: per group of blocks and expert a number in [0, 1], how useful it may be: where
            numbers change, experts with more of it rather come and rather stay. Empty = all alike.
    """

    crossover: float = 0.5
    size: float = 0.5
    jump: float = 0.1
    active: float = 0.15
    group: float = 0.5
    prior: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if any(not 0 <= value <= 1 for row in self.prior for value in row):
            raise ConfigError("a prior of a variation; allowed: numbers in [0, 1]")
        rates = (self.crossover, self.size, self.jump, self.active, self.group)
        if not all(0 <= rate <= 1 for rate in rates):
            raise ConfigError(f"rates {rates} of a variation; allowed: in [0, 1]")

    def settings(self) -> dict[str, Any]:
        return {
            "name": "experts_of_any_number",
            "crossover": self.crossover,
            "size": self.size,
            "jump": self.jump,
            "active": self.active,
            "group": self.group,
            **(
                {"prior": blake2b(repr(self.prior).encode()).hexdigest()[:16]} if self.prior else {}
            ),
        }

    def _space(self, space: Space) -> TradeOffSpace:
        if not isinstance(space, TradeOffSpace):
            raise ConfigError(
                f"variation of any number of experts on space {space.name!r}; allowed: a space of "
                "kept experts whose number is free"
            )
        return space

    def width(self, space: Space) -> int:
        own = self._space(space)
        groups = int(own.of_block[-1]) + 1
        return 6 + 4 * groups + 2 * own._width

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
        own = self._space(space)
        n, groups, shape = len(u), int(own.of_block[-1]) + 1, own.variables["kept"].shape
        cuts = np.cumsum([6, groups, groups, groups, groups, own._width])
        head, swap, move, far, hit, flip, value = np.split(u, cuts, axis=1)
        columns: dict[str, Array] = {}
        active = own.active_of(a)
        if own.top_k is None:
            other = np.where(head[:, 1] < 0.5, own.active_of(b), active)
            high = own.variables["active"].high  # type: ignore[attr-defined]
            drawn = 1 + (head[:, 2] * high).astype(np.int64)
            fresh = head[:, 3] < min(1.0, self.active * strength)
            columns["active"] = active = np.where(fresh, drawn, other)
        second = (swap < 0.5) & (head[:, :1] < self.crossover)
        child = np.where(second[:, :, None, None], b["kept"], a["kept"]) > 0
        had = own._counts(child).mean(axis=2)
        if not own.per_block:  # of one parent, not between them
            ours, theirs = (own._counts(p["kept"]).mean(axis=(1, 2)) for p in (a, b))
            had = np.where(head[:, 4] < 0.5, ours, theirs)[:, None].repeat(groups, axis=1)
            move, far = move[:, :1], far[:, :1]
        anywhere = 1 + (far / max(self.jump, 1e-9) * own._high).astype(np.int64)
        step = np.where(move < 0.5 * min(1.0, self.size * strength), -1.0, 0.0)
        step = np.where(move > 1 - 0.5 * min(1.0, self.size * strength), 1.0, step)
        had = np.where((far < self.jump) & (step != 0), anywhere, had + step)
        rate = min(_ROW, _FLIPS / shape[-1]) * strength
        changed = (hit < min(1.0, self.group * strength))[:, :, None, None]
        luck = value.reshape(child.shape)
        if self.prior:
            luck = 0.5 * luck + 0.5 * np.array(self.prior).reshape(shape)
        flipped = child ^ ((flip.reshape(n, *shape) < rate) & changed)
        columns["kept"] = own._cut(flipped + 0.9 * luck, had, active)
        return own.canonicalise(Population({key: columns[key] for key in own.variables}))
