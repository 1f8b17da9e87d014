"""What a candidate says: which experts of which layers stay, or how they are merged."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import DataError, SpaceError
from searchlab.spaces.experts.families import ExpertLayout
from searchlab.spaces.experts.routing import MODES, RouterMode

__all__ = ["GENOTYPE_VERSION", "ExpertPlan", "read_plan"]

GENOTYPE_VERSION = 1


@dataclass(frozen=True)
class ExpertPlan:
    """One candidate, complete: no model is needed to read it.

    Attributes:
        family: name of the family.
        blocks: layer numbers, L of them.
        experts: E, of each mixture before.
        top_k: active experts per token.
        kept: per block the numbers of the experts that stay, increasing; where experts are merged,
            those that give the router's rows.
        flat: routing without groups, in a model that has them.
        router_mode: "slice", "prob" or "logit".
        merge: per block a matrix (E', E) of the experts' weights; empty where nothing is merged.
        route: per block a matrix (E', E) of the router; empty with "slice".
        about: what else is worth keeping: base model, metric, hashes of data.
    """

    family: str
    blocks: tuple[int, ...]
    experts: int
    top_k: int
    kept: tuple[tuple[int, ...], ...]
    flat: bool = False
    router_mode: RouterMode = "slice"
    merge: tuple[tuple[tuple[float, ...], ...], ...] = ()
    route: tuple[tuple[tuple[float, ...], ...], ...] = ()
    about: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of_mask(
        cls,
        layout: ExpertLayout,
        mask: NDArray[np.bool_],
        top_k: int,
        router_mode: RouterMode,
        *,
        flat: bool,
    ) -> ExpertPlan:
        """The plan of a mask (L, E), True where an expert stays; nothing is merged."""
        return cls(
            family=layout.family,
            blocks=layout.blocks,
            experts=layout.experts,
            top_k=top_k,
            kept=tuple(tuple(np.flatnonzero(row).tolist()) for row in mask),
            flat=flat,
            router_mode=router_mode,
        )

    def __post_init__(self) -> None:
        if len(self.kept) != len(self.blocks):
            raise SpaceError(
                f"{len(self.kept)} lists of kept experts for {len(self.blocks)} blocks; "
                "allowed: one for each"
            )
        for layer, row in zip(self.blocks, self.kept, strict=True):
            rising = all(a < b for a, b in itertools.pairwise(row))
            inside = all(0 <= number < self.experts for number in row)
            if not (inside and (rising or self.merge) and len(row) >= self.top_k >= 1):
                raise SpaceError(
                    f"layer {layer} keeps {list(row)}; allowed: at least {self.top_k} increasing "
                    f"numbers from 0 to {self.experts - 1}"
                )
        if self.router_mode not in MODES:
            raise SpaceError(f"router mode {self.router_mode!r}; allowed: {', '.join(MODES)}")
        if not self.merge and self.router_mode == "logit":
            raise SpaceError("router mode 'logit' without matrices; allowed: slice, prob")
        for name in ("merge", "route"):
            table = getattr(self, name)
            if table and [len(matrix) for matrix in table] != self.counts:
                raise SpaceError(f"{name}: a matrix per block with a row per expert is needed")
            for matrix in table:
                if any(len(row) != self.experts for row in matrix):
                    raise SpaceError(f"{name}: rows of {self.experts} numbers are needed")
                if not np.isfinite(np.array(matrix)).all():
                    raise SpaceError(f"{name}: a coefficient is not finite")
        if bool(self.route) != bool(self.merge and self.router_mode != "slice"):
            raise SpaceError(
                f"router mode {self.router_mode!r} with {len(self.merge)} merge and "
                f"{len(self.route)} route matrices; allowed: route with merge, but for 'slice'"
            )

    @property
    def counts(self) -> list[int]:
        """Experts per block afterwards."""
        return [len(row) for row in self.kept]

    @property
    def uniform(self) -> bool:
        """Whether every block has as many."""
        return len(set(self.counts)) == 1

    @property
    def one_hot(self) -> bool:
        """Whether experts are only kept, and routers only cut."""
        return not self.merge and self.router_mode == "slice"

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Bool (L, E)."""
        out = np.zeros((len(self.blocks), self.experts), dtype=bool)
        for number, row in enumerate(self.kept):
            out[number, list(row)] = True
        return out

    def matrices(self, name: str) -> list[NDArray[np.float64]]:
        """One matrix (E', E) per block: `merge` or `route`."""
        return [np.array(matrix, dtype=np.float64) for matrix in getattr(self, name)]

    def with_about(self, **about: Any) -> ExpertPlan:
        """The same plan with more to keep about it."""
        return replace(self, about=tuple({**dict(self.about), **about}.items()))

    def check(self, layout: ExpertLayout) -> None:
        """Raises SpaceError where a model of that layout cannot take this plan."""
        mine = (self.family, self.blocks, self.experts)
        theirs = (layout.family, layout.blocks, layout.experts)
        if mine != theirs:
            raise SpaceError(
                f"a plan for {mine[0]} with {mine[2]} experts in layers {list(mine[1])}; the model "
                f"is {theirs[0]} with {theirs[2]} in layers {list(theirs[1])}"
            )
        for count in sorted(set(self.counts)):
            layout.check_count(count, top_k=self.top_k, flat=self.flat)
        if layout.n_group == 1 or self.flat or self.merge:
            return
        each = self.mask.reshape(len(self.blocks), layout.n_group, -1).sum(axis=2)
        uneven = np.flatnonzero((each != each[:, :1]).any(axis=1))
        if len(uneven):
            raise SpaceError(
                f"layer {self.blocks[uneven[0]]} keeps {each[uneven[0]].tolist()} experts of its "
                "groups; allowed: equal numbers, or routing without groups (flat)"
            )

    def to_json(self) -> dict[str, Any]:
        """The content of genotype.json."""
        out: dict[str, Any] = {
            "genotype_version": GENOTYPE_VERSION,
            "family": self.family,
            "experts": self.experts,
            "top_k": self.top_k,
            "router_mode": self.router_mode,
            "flat": self.flat,
            "kept": {
                str(layer): list(row) for layer, row in zip(self.blocks, self.kept, strict=True)
            },
        }
        for name in ("merge", "route"):
            if getattr(self, name):
                out[name] = {
                    str(layer): [list(row) for row in matrix]
                    for layer, matrix in zip(self.blocks, getattr(self, name), strict=True)
                }
        if self.about:
            out["about"] = dict(self.about)
        return out

    @staticmethod
    def from_json(data: Any) -> ExpertPlan:
        """The inverse of `to_json`.

        Raises:
            DataError: another version, or a key that is missing or of the wrong kind.
        """
        try:
            version = data["genotype_version"]
            if version != GENOTYPE_VERSION:
                raise DataError(f"genotype version {version!r}; allowed: {GENOTYPE_VERSION}")
            layers = list(data["kept"])
            mode: RouterMode = data["router_mode"]
            tables = {
                name: tuple(
                    tuple(tuple(map(float, row)) for row in data[name][layer]) for layer in layers
                )
                for name in ("merge", "route")
                if name in data
            }
            return ExpertPlan(
                family=str(data["family"]),
                blocks=tuple(map(int, layers)),
                experts=int(data["experts"]),
                top_k=int(data["top_k"]),
                kept=tuple(tuple(map(int, data["kept"][layer])) for layer in layers),
                flat=bool(data["flat"]),
                router_mode=mode,
                about=tuple(data.get("about", {}).items()),
                **tables,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"genotype cannot be read: {reason}") from None


def read_plan(path: str | Path) -> ExpertPlan:
    """A plan from genotype.json, a folder with one, or a plan file of a run.

    Raises:
        DataError: a file that is missing or no genotype.
    """
    path = Path(path)
    path = path / "genotype.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"plan {str(path)!r} cannot be read: {reason}") from None
    if (
        isinstance(data, dict)
        and "genotype_version" not in data
        and isinstance(data.get("plan"), dict)
    ):
        data = data["plan"]
    return ExpertPlan.from_json(data)
