"""Merged experts as a space: weights of all experts in each one that stays, second stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.spaces.experts.families import ExpertLayout
from searchlab.spaces.experts.model import one_hot
from searchlab.spaces.experts.plan import ExpertPlan
from searchlab.spaces.experts.routing import MODES, RouterMode
from searchlab.spaces.experts.space import PruningSpace
from searchlab.variables import Real

if TYPE_CHECKING:
    from searchlab.algorithms.base import Seeds
    from searchlab.config import Answers

__all__ = ["REACH", "AdoptPruned", "MergingSpace", "merging_space"]

Array = NDArray[Any]
REACH = 2.0
"""No coefficient goes beyond it; published ones lie between -0.26 and 1.21."""
STEP = 0.065
"""Standard deviation of a mutated coefficient."""


def merging_space(
    layout: ExpertLayout,
    *,
    keep: int,
    groups: int | Literal["block"] = "block",
    router_mode: RouterMode = "slice",
    top_k: int | None = None,
    flat: bool = False,
) -> MergingSpace:
    """The space of merged experts.

    Args:
        layout: of the model.
        keep: experts that every block has afterwards; as many as before merges without pruning.
        groups: blocks are split by depth into so many groups with the same matrices.
        router_mode: "slice": an expert gets the logit of the one it has most of; "prob" and
            "logit" search the router's matrix too.
        top_k, flat: as in `pruning_space`.

    Raises:
        SpaceError: what the model cannot be cut to.

    Source: arXiv 2407.00945, section 3.2, which has "prob" only.
    """
    return MergingSpace(
        layout, keep=keep, groups=groups, router_mode=router_mode, top_k=top_k, flat=flat
    )


class MergingSpace(Space):
    """See `merging_space`. Random candidates are pruned models: rows with a single 1.

    The order of rows means nothing (within a group of experts where routing has them), so that they
    are kept in the order of the expert each has most of.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        *,
        keep: int,
        groups: int | Literal["block"] = "block",
        router_mode: RouterMode = "slice",
        top_k: int | None = None,
        flat: bool = False,
    ) -> None:
        if router_mode not in MODES:
            raise SpaceError(f"router mode {router_mode!r}; allowed: {', '.join(MODES)}")
        self.pruning = PruningSpace(layout, keep=keep, groups=groups, top_k=top_k, flat=flat)
        self.layout, self.keep = layout, keep
        self.router_mode: RouterMode = router_mode
        self.top_k, self.flat = self.pruning.top_k, self.pruning.flat
        self.parts, self.of_block = self.pruning.parts, self.pruning.of_block
        shape = (int(self.of_block[-1]) + 1, keep, layout.experts)
        matrix = Real(-REACH, REACH, sigma=STEP / (2 * REACH), default=0.0, shape=shape)
        variables = {"merge": matrix}
        if router_mode != "slice":
            variables["route"] = matrix
        super().__init__(variables, name="merged_experts")

    @property
    def sample_width(self) -> int:
        """Uniforms per candidate that `sample` consumes."""
        return self.pruning.sample_width

    def sample(self, u: Array) -> Population:
        """Pruned models, each as likely as any other."""
        return self.of_masks(self.pruning.masks(self.pruning.sample(u)))

    def canonicalise(self, population: Population) -> Population:
        """Rows by the expert each has most of, then by their numbers."""
        merge = np.asarray(population["merge"], dtype=np.float64)
        most = merge.argmax(axis=-1)
        rising = (np.diff(most, axis=-1) > 0).all()
        if rising:
            return population
        order = self._order(merge, most)
        columns = {
            key: np.take_along_axis(np.asarray(column), order[..., None], axis=2)
            for key, column in population.columns.items()
        }
        return Population(columns)

    def _order(self, merge: Array, most: Array) -> Array:
        """(n, G, E') int64: which row comes first, second, ..."""
        place = np.arange(self.keep) * self.parts // self.keep
        order = np.empty(most.shape, dtype=np.int64)
        for index in np.ndindex(*most.shape[:2]):
            # The last key counts most.
            order[index] = np.lexsort((*merge[index].T[::-1], most[index], place))
        return order

    def of_masks(self, masks: NDArray[np.bool_]) -> Population:
        """Pruned models (n, L, E) as matrices; a group's first block speaks for it."""
        first = np.searchsorted(self.of_block, np.arange(self.of_block[-1] + 1))
        table = masks[:, first]
        rows = np.nonzero(table)[2].reshape(*table.shape[:2], self.keep)
        matrix = np.zeros((*rows.shape, self.layout.experts))
        np.put_along_axis(matrix, rows[..., None], 1.0, axis=3)
        return Population({key: matrix.copy() for key in self.variables})

    def matrices(self, population: Population, name: str = "merge") -> NDArray[np.float64]:
        """(n, L, E', E): of the experts ("merge") or of the router ("route")."""
        if name == "route" and name not in self.variables:
            merge = np.asarray(population["merge"])
            made = one_hot(merge.reshape(-1, merge.shape[-1])).reshape(merge.shape)
            return made[:, self.of_block]
        table: NDArray[np.float64] = np.asarray(population[name], dtype=np.float64)
        return table[:, self.of_block]

    def cost(self, population: Population) -> dict[str, NDArray[np.float64]]:
        """Experts in all blocks, and where the layout knows them, bytes of the weights."""
        count = np.full(len(population), float(len(self.layout.blocks) * self.keep))
        out = {**super().cost(population), "experts": count}
        if self.layout.total_bytes:
            out["bytes"] = self.layout.other_bytes + count * self.layout.expert_bytes
        return out

    def plans(self, population: Population) -> list[Any]:
        """One `ExpertPlan` per candidate; without matrices where it is a pruned model."""
        merges, routes = self.matrices(population), self.matrices(population, "route")
        return [self._plan(merge, route) for merge, route in zip(merges, routes, strict=True)]

    def _plan(self, merge: Array, route: Array) -> ExpertPlan:
        most = merge.argmax(axis=2)
        pure = all(np.array_equal(table, one_hot(table)) for table in merge)
        apart = bool((np.diff(most, axis=1) > 0).all())
        pruned = pure and apart and np.array_equal(merge, route)
        mode = self.router_mode
        if pruned:
            mode = "slice" if mode == "logit" else mode  # the same function there
        return ExpertPlan(
            family=self.layout.family,
            blocks=self.layout.blocks,
            experts=self.layout.experts,
            top_k=self.top_k,
            kept=tuple(tuple(row) for row in most.tolist()),
            flat=self.flat,
            router_mode=mode,
            merge=() if pruned else _nested(merge),
            route=() if pruned or mode == "slice" else _nested(route),
        )

    def export(self, plans: Mapping[int, Any], directory: Path) -> list[Path]:
        """Genotypes only; recipes write checkpoints beside them."""
        from searchlab.result import write_plans

        return write_plans(plans, directory)

    def to_json(self) -> dict[str, Any]:
        """With what candidates stand for."""
        own = {key: value for key, value in self.pruning.to_json().items() if key != "variables"}
        return {**super().to_json(), **own, "router_mode": self.router_mode}


def _nested(tables: Array) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(tuple(row) for row in table) for table in tables.tolist())


@dataclass(frozen=True)
class AdoptPruned:
    """The best pruned models of a stage as seeds of the merging stage.

    Attributes:
        k: how many.
    """

    k: int = 10

    def __call__(self, answers: Answers, space: Space) -> Seeds:
        from searchlab.algorithms.base import Seeds
        from searchlab.config import best_rows

        assert isinstance(space, MergingSpace)
        rows = best_rows(answers, self.k, None, ("",))
        best, before = answers.population.take(rows), answers.space
        if isinstance(before, MergingSpace):
            table = before.matrices(best)
            population = Population({key: before.matrices(best, key) for key in space.variables})
            first = np.searchsorted(space.of_block, np.arange(space.of_block[-1] + 1))
            if table.shape[2] == space.keep:
                population = space.canonicalise(
                    Population(
                        {key: column[:, first] for key, column in population.columns.items()}
                    )
                )
                return Seeds(population, tuple(answers.origin[i] for i in rows))
        if not isinstance(before, PruningSpace) or before.keep != space.keep:
            raise SpaceError(
                f"merging {space.keep} experts of each block after {before.name!r}; allowed: after "
                "pruning to as many in every block"
            )
        masks = before.masks(best)
        return Seeds(space.of_masks(masks), tuple(answers.origin[i] for i in rows))
