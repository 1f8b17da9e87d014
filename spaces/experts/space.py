"""Which experts stay, as a space: subsets per group of blocks, or one subset under a budget."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
from searchlab.uniforms import derived
from searchlab.variables import Subset

__all__ = ["Keep", "PruningSpace", "block_groups", "kept", "pruning_space", "resolve_keep"]

Array = NDArray[Any]
Keep = tuple[int | None, int | None]
"""What is kept: experts of every block, or of all blocks together; the other one is None."""

_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def resolve_keep(
    layout: ExpertLayout,
    *,
    keep: str | int | None = None,
    memory: str | None = None,
    per_block: bool = False,
    top_k: int | None = None,
    flat: bool = False,
) -> Keep:
    """How many experts stay, from what a user writes; no model is needed.

    Args:
        layout: of the model; its bytes are needed for `memory`.
        keep: 64 (of each block), "50%" (the largest number allowed that is not more), or a total
            such as "total=900".
        memory: what the model's weights may take, such as "24GiB".
        per_block: counts may differ between blocks, under one total.
        top_k: active experts, if others than the model's.
        flat: routing without groups.

    Raises:
        ConfigError: both or neither given, or a text that is no number, share or size.
        SpaceError: a number that the model cannot be cut to.
    """
    if (keep is None) == (memory is None):
        raise ConfigError(f"keep {keep!r} and memory {memory!r}; allowed: one of them")
    allowed = layout.counts_allowed(top_k=top_k, flat=flat)
    blocks = len(layout.blocks)
    step = 1 if flat else layout.n_group
    if memory is not None:
        size = _bytes(memory)
        if not (layout.total_bytes and layout.expert_bytes):
            raise ConfigError(f"memory {memory!r} needs the model's files; allowed: keep")
        fit = (size - layout.other_bytes) // layout.expert_bytes
        if fit < blocks * allowed[0]:
            least = layout.other_bytes + blocks * allowed[0] * layout.expert_bytes
            raise SpaceError(
                f"memory {memory!r}: with {allowed[0]} experts per block the model still takes "
                f"{least / 2**30:.4g}GiB; allowed: that or more"
            )
        if per_block:
            return None, min(fit // step * step, blocks * layout.experts)
        return max(n for n in allowed if n * blocks <= fit), None
    text = str(keep).strip()
    if text.startswith("total="):
        total = _number(text.removeprefix("total="), keep)
        if not per_block:
            raise ConfigError(f"keep {keep!r} needs counts per block; allowed: with per_block")
        return None, total
    if text.endswith("%"):
        share = _number(text[:-1], keep, whole=False) / 100
        if not 0 < share <= 1:
            raise ConfigError(f"keep {keep!r}; allowed: more than 0% to 100%")
        if per_block:
            return None, max(
                blocks * allowed[0], int(blocks * layout.experts * share) // step * step
            )
        below = [n for n in allowed if n <= layout.experts * share + 1e-9]
        if not below:
            layout.check_count(int(layout.experts * share), top_k=top_k, flat=flat)
            raise SpaceError(f"keep {keep!r}; allowed: {allowed[0]} experts or more")
        return below[-1], None
    count = int(_number(text, keep))
    layout.check_count(count, top_k=top_k, flat=flat)
    return (None, count * blocks) if per_block else (count, None)


def _number(text: str, given: object, *, whole: bool = True) -> Any:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise ConfigError(
            f"keep {given!r}; allowed: a number such as 64, a share such as 50%, or total=900"
        ) from None


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _SIZES:
        raise ConfigError(f"memory {text!r}; allowed: a size such as 24GiB or 500MB")
    return int(float(match.group(1)) * _SIZES[unit])


def block_groups(blocks: int, groups: int | Literal["block"]) -> NDArray[np.int64]:
    """Which group each of the blocks is in: groups of equal depth, as even as they can be."""
    count = blocks if groups == "block" else groups
    if not isinstance(count, int) or not 1 <= count <= blocks:
        raise SpaceError(f"{groups!r} groups of {blocks} blocks; allowed: 1 to {blocks}, 'block'")
    return np.arange(blocks) * count // blocks


def pruning_space(
    layout: ExpertLayout,
    *,
    keep: int | None = None,
    groups: int | Literal["block"] = "block",
    total: int | None = None,
    top_k: int | None = None,
    flat: bool = False,
    router_mode: Literal["slice", "prob"] = "slice",
) -> PruningSpace:
    """The space of kept experts.

    Args:
        layout: of the model.
        keep: experts that stay in every block.
        groups: blocks are split by depth into so many groups that keep the same ones.
        total: experts that stay in all blocks together, instead of `keep`; every block keeps at
            least as many as are active.
        top_k: active experts per token; None = the model's.
        flat: routing without groups, for families that have them. It changes the model.
        router_mode: see `routing.choose`.

    Raises:
        SpaceError: what the model cannot be cut to.
    """
    return PruningSpace(
        layout,
        keep=keep,
        groups=groups,
        total=total,
        top_k=top_k,
        flat=flat,
        router_mode=router_mode,
    )


def kept(space: PruningSpace, population: Population) -> NDArray[np.bool_]:
    """Which experts candidates keep, bool (n, L, E)."""
    return space.masks(population)


class PruningSpace(Space):
    """See `pruning_space`. A candidate has one spelling, so that equal ones have equal keys.

    Where routing looks at groups of experts, equal numbers stay in each of them.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        *,
        keep: int | None = None,
        groups: int | Literal["block"] = "block",
        total: int | None = None,
        top_k: int | None = None,
        flat: bool = False,
        router_mode: Literal["slice", "prob"] = "slice",
    ) -> None:
        if (keep is None) == (total is None):
            raise SpaceError(f"keep {keep} and total {total}; allowed: one of them")
        if total is not None and groups != "block":
            raise SpaceError(f"total {total} with groups {groups!r}; allowed: 'block'")
        if router_mode not in ("slice", "prob"):
            raise SpaceError(f"router mode {router_mode!r}; allowed: slice, prob")
        self.layout = layout
        self.top_k = layout.top_k if top_k is None else top_k
        self.flat = flat and layout.n_group > 1
        self.router_mode = router_mode
        self.keep, self.total = keep, total
        self.parts = 1 if self.flat else layout.n_group
        self.of_block = block_groups(len(layout.blocks), groups)
        count, each = int(self.of_block[-1]) + 1, layout.experts // self.parts
        limits: tuple[Predicate, ...] = ()
        if keep is not None:
            layout.check_count(keep, top_k=self.top_k, flat=self.flat)
            shape = (count, self.parts) if self.parts > 1 else (count,)
            variable = Subset(each, keep // self.parts, shape=shape)
        else:
            assert total is not None
            self.least = layout.counts_allowed(top_k=self.top_k, flat=self.flat)[0]
            low, high = count * self.least, count * layout.experts
            if not low <= total <= high or total % self.parts:
                step = f", a multiple of {self.parts}" if self.parts > 1 else ""
                raise SpaceError(f"total {total} experts; allowed: {low} to {high}{step}")
            variable = Subset(count * layout.experts, total)
            name = f"at least {self.least} experts in each of {count} blocks"
            name += f", equal in {self.parts} groups" if self.parts > 1 else ""
            limits = (Predicate(self._legal, name),)
        super().__init__({"experts": variable}, constraints=limits, name="experts")

    # -- legality under a total -----------------------------------------------------------------

    def _legal(self, columns: Mapping[str, Array]) -> NDArray[np.bool_]:
        counts = self._parts_of(columns["experts"]).sum(axis=3, dtype=np.int64)
        enough = counts.sum(axis=2).min(axis=1) >= self.least
        even: NDArray[np.bool_] = enough & (counts == counts[..., :1]).all(axis=(1, 2))
        return even

    def _parts_of(self, column: Array) -> Array:
        """(n, L, parts, E / parts)."""
        return column.reshape(len(column), len(self.layout.blocks), self.parts, -1)

    def _repair_bounds(self, population: Population) -> Population:
        population = super()._repair_bounds(population)
        if self.total is None or not len(population):
            return population
        wrong = np.flatnonzero(~self._legal(population.columns))
        if not len(wrong):
            return population
        column = np.array(population["experts"])
        column[wrong] = self._nearest(column[wrong])
        return Population({"experts": column})

    def _nearest(self, column: Array) -> Array:
        """Legal masks that differ in few experts; ties by a hash of the mask."""
        parts = self._parts_of(column) > 0
        n, blocks, groups, each = parts.shape
        noise = derived(parts.reshape(n, -1).astype(np.uint64), 1, blocks * (1 + groups * each))
        order, inner = noise[:, :blocks], noise[:, blocks:].reshape(parts.shape)
        had = parts.sum(axis=(2, 3)) / groups
        assert self.total is not None
        low, want = self.least // groups, self.total // groups
        counts = np.clip(np.rint(had), low, each).astype(np.int64)
        while (off := counts.sum(axis=1) - want).any():
            # The block that is furthest from what it had, in the direction that is needed.
            sign = np.sign(off)[:, None]
            can = np.where(sign > 0, counts > low, counts < each)
            drift = sign * (counts - had) + 0.5 * order
            block = np.where(can, drift, -np.inf).argmax(axis=1)
            counts[np.arange(n), block] -= np.sign(off)
        rank = (np.where(parts, 0.0, 1.0) + inner).argsort(axis=3, kind="stable")
        out = np.zeros(parts.shape, dtype=np.uint8)
        chosen = (np.arange(each) < counts[:, :, None, None]).astype(np.uint8)
        np.put_along_axis(out, rank, np.broadcast_to(chosen, out.shape), axis=3)
        return out.reshape(column.shape)

    # -- what candidates mean -------------------------------------------------------------------

    def masks(self, population: Population) -> NDArray[np.bool_]:
        """Bool (n, L, E)."""
        column = np.asarray(population["experts"]) > 0
        if self.total is not None:
            return column.reshape(len(column), len(self.layout.blocks), self.layout.experts)
        table: NDArray[np.bool_] = column.reshape(
            len(column), int(self.of_block[-1]) + 1, self.layout.experts
        )
        return table[:, self.of_block]

    def of_masks(self, masks: NDArray[np.bool_]) -> Population:
        """The candidates of masks (n, L, E), canonical.

        With groups, a group's first block speaks for it.

        Raises:
            SpaceError: another shape, or masks that are not of this space.
        """
        want = (len(self.layout.blocks), self.layout.experts)
        if masks.ndim != 3 or masks.shape[1:] != want:
            raise SpaceError(f"masks of shape {masks.shape}; allowed: (n, {want[0]}, {want[1]})")
        first = np.searchsorted(self.of_block, np.arange(self.of_block[-1] + 1))
        shape = self.variables["experts"].shape
        column = masks[:, first].astype(np.uint8).reshape(len(masks), *shape)
        population = Population({"experts": column})
        feasible = self.is_feasible(population)
        if not feasible.all():
            row = int(np.flatnonzero(~feasible)[0])
            raise SpaceError(
                f"mask {row} keeps {masks[row].sum(axis=1).tolist()} experts of its blocks; "
                f"allowed: {self.keep or self.total} "
                f"{'in each' if self.keep else 'in all'}, by the rules of the space"
            )
        return population

    def cost(self, population: Population) -> dict[str, NDArray[np.float64]]:
        """Experts kept in all blocks, and where the layout knows them, bytes of the weights."""
        out = super().cost(population)
        count = self.masks(population).sum(axis=(1, 2)).astype(np.float64)
        out["experts"] = count
        if self.layout.total_bytes:
            out["bytes"] = self.layout.other_bytes + count * self.layout.expert_bytes
        return out

    def plans(self, population: Population) -> list[Any]:
        """One `ExpertPlan` per candidate."""
        return [
            ExpertPlan.of_mask(self.layout, mask, self.top_k, self.router_mode, flat=self.flat)
            for mask in self.masks(population)
        ]

    def export(self, plans: Mapping[int, Any], directory: Path) -> list[Path]:
        """Genotypes only; recipes write checkpoints beside them."""
        from searchlab.result import write_plans

        return write_plans(plans, directory)

    def to_json(self) -> dict[str, Any]:
        """With what candidates stand for: the layout's shape, groups, active experts, routing."""
        return {
            **super().to_json(),
            "layers": list(self.layout.blocks),
            "of_block": self.of_block.tolist(),
            "family": self.layout.family,
            "top_k": self.top_k,
            "flat": self.flat,
            "router_mode": self.router_mode,
        }
