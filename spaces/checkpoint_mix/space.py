"""Mixes of checkpoints as spaces: all of them, or those along a few main directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.uniforms import uniforms
from searchlab.variables import Affine, Real, Simplex

if TYPE_CHECKING:
    from searchlab.algorithms.base import Seeds
    from searchlab.config import Answers

__all__ = ["LIMIT", "AdoptMixes", "CheckpointMixSpace", "Mix", "MixSubspace"]

LIMIT = 32.0
"""No coefficient goes beyond it, up or down: several times what searches have been seen to use."""

Array = NDArray[np.float64]
Constraint = Literal["affine", "simplex"]


@dataclass(frozen=True)
class Mix:
    """One candidate.

    Attributes:
        coefficients: (G, K), every row with sum one; G is 1 without groups.
        checkpoints: K names, oldest first.
        groups: G names; empty without groups.
    """

    coefficients: tuple[tuple[float, ...], ...]
    checkpoints: tuple[str, ...]
    groups: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Checkpoint name -> coefficient, for each group."""
        rows = [dict(zip(self.checkpoints, row, strict=True)) for row in self.coefficients]
        if not self.groups:
            return {"coefficients": rows[0]}
        return {"coefficients": dict(zip(self.groups, rows, strict=True))}


class CheckpointMixSpace(Space):
    """Coefficients of K checkpoints, each row with sum one; negative ones are allowed.

    A sum other than one would rescale the whole network, so it is kept exactly (to rounding).
    Nothing is clipped to [0, 1]: what training overshot is taken back by negative coefficients.

    Args:
        checkpoints: K names, oldest first; 2 or more.
        groups: names of layer groups that are mixed apart; empty = one row for all layers.
        constraint: "affine", or "simplex" for coefficients of 0 or more.
        sigma: standard deviation of a mutation of one coefficient.

    Source: arXiv 2404.02241, section 4. Groups are an addition.
    """

    def __init__(
        self,
        checkpoints: Sequence[str],
        *,
        groups: Sequence[str] = (),
        constraint: Constraint = "affine",
        sigma: float | None = None,
    ) -> None:
        self.checkpoints = tuple(checkpoints)
        self.groups = tuple(groups)
        k = len(self.checkpoints)
        if k < 2:
            raise SpaceError(f"{k} checkpoints; allowed: two or more")
        if len(set(self.groups)) < len(self.groups):
            raise SpaceError(f"groups {list(groups)} repeat a name; allowed: different ones")
        if constraint not in ("affine", "simplex"):
            raise SpaceError(f"constraint {constraint!r}; allowed: affine, simplex")
        shape = (len(self.groups),) if self.groups else ()
        reach = 0.2 / math.sqrt(k) if sigma is None else sigma
        if reach <= 0:
            raise SpaceError(f"sigma {sigma}; allowed: more than 0")
        if constraint == "simplex":
            variable: Affine = Simplex(k, shape=shape, sigma=min(1.0, reach * k / 4))
        else:
            spread = min(2 * LIMIT, 4 * (LIMIT - 1 / k))  # `Affine`'s own unit for these bounds
            part = min(1.0, reach / spread)
            variable = Affine(k, low=-LIMIT, high=LIMIT, shape=shape, sigma=part)
        self.unit = variable._spread
        super().__init__({"alpha": variable}, name="checkpoint_mix")

    @property
    def group_count(self) -> int:
        """Rows of a candidate."""
        return len(self.groups) or 1

    def coefficients(self, population: Population) -> Array:
        """(n, G, K) float64, with a sum of one up to the last bit or two."""
        table = np.asarray(population["alpha"], dtype=np.float64)
        return table.reshape(len(table), self.group_count, len(self.checkpoints))

    def of_coefficients(self, table: NDArray[Any]) -> Population:
        """The candidates of (n, K) or (n, G, K) coefficients; (n, K) is used for all groups.

        Raises:
            SpaceError: another shape, or sums other than one.
        """
        values = np.asarray(table, dtype=np.float64)
        if values.ndim == 2:
            values = np.repeat(values[:, None], self.group_count, axis=1)
        if values.shape[1:] != (self.group_count, len(self.checkpoints)):
            raise SpaceError(
                f"coefficients of shape {np.shape(table)}; allowed: (n, {len(self.checkpoints)})"
                f" or (n, {self.group_count}, {len(self.checkpoints)})"
            )
        values = values.reshape(len(values), *self.variables["alpha"].shape)
        population = Population({"alpha": values})
        feasible = self.is_feasible(population)
        if not feasible.all():
            row = table[int(np.flatnonzero(~feasible)[0])]
            raise SpaceError(
                f"coefficients {np.asarray(row).tolist()} with sum {float(np.sum(row)):.6g}; "
                "allowed: a sum of one, within the bounds"
            )
        return population

    def plans(self, population: Population) -> list[Any]:
        """One `Mix` per candidate."""
        return [
            Mix(tuple(map(tuple, table.tolist())), self.checkpoints, self.groups)
            for table in self.coefficients(population)
        ]

    def export(self, plans: Mapping[int, Any], directory: Path) -> list[Path]:
        """Coefficients only; recipes write merged weights beside them."""
        from searchlab.result import write_plans

        return write_plans(plans, directory)


class MixSubspace(Space):
    """Mixes along the main directions of what training did, a cheap stand-in for all mixes.

    A candidate is origin + sum over j of z_j direction_j, where the directions are those in which
    the checkpoints spread most (the leading eigenvectors of their centred Gram matrix, as
    coefficients), scaled so that z_j = 1 moves the weights by one standard deviation of that
    direction. Every direction sums to zero, so every candidate sums to one.

    Args:
        checkpoints: K names, oldest first.
        gram: (K, K) products of the checkpoints, or of their differences from any one of them.
        rank: directions, 1 to K - 1.
        origin: (K,) coefficients with sum one that z = 0 stands for; None = uniform.
        reach: largest |z_j|.
    """

    def __init__(
        self,
        checkpoints: Sequence[str],
        gram: NDArray[Any],
        *,
        rank: int,
        origin: NDArray[Any] | None = None,
        reach: float = 6.0,
    ) -> None:
        self.checkpoints = tuple(checkpoints)
        self.groups: tuple[str, ...] = ()
        k = len(self.checkpoints)
        table = np.asarray(gram, dtype=np.float64)
        if table.shape != (k, k) or not np.isfinite(table).all():
            raise SpaceError(f"gram of shape {table.shape}; allowed: ({k}, {k}) and finite")
        if not 1 <= rank < k:
            raise SpaceError(f"rank {rank}; allowed: 1 to {k - 1}")
        if not reach > 0:
            raise SpaceError(f"reach {reach}; allowed: more than 0")
        self.origin = np.full(k, 1 / k) if origin is None else np.asarray(origin, np.float64)
        if self.origin.shape != (k,) or abs(self.origin.sum() - 1) > 1e-9:
            raise SpaceError(f"origin with sum {self.origin.sum():.6g}; allowed: ({k},), sum one")
        centred = table - table.mean(axis=0) - table.mean(axis=1)[:, None] + table.mean()
        values, vectors = np.linalg.eigh((centred + centred.T) / 2)
        order = np.argsort(values)[::-1][:rank]
        values, vectors = values[order].clip(min=0.0), vectors[:, order]
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(rank)])
        self.share = values / max(float(np.trace(centred)), 1e-300)
        """Of the checkpoints' spread, what each direction holds."""
        # A unit of coefficients along vector j moves the weights by sqrt(value_j); their standard
        # deviation over the K checkpoints is sqrt(value_j / K). So 1 / sqrt(K) is one deviation.
        self.directions = vectors.T / math.sqrt(k)
        self.directions -= self.directions.mean(axis=1, keepdims=True)
        variable = Real(-reach, reach, shape=(rank,))
        super().__init__({"z": variable}, name="checkpoint_mix_subspace")

    @property
    def group_count(self) -> int:
        """Rows of a candidate: one."""
        return 1

    def coefficients(self, population: Population) -> Array:
        """(n, 1, K) float64."""
        z = np.asarray(population["z"], dtype=np.float64)
        mixed: Array = (self.origin + z @ self.directions)[:, None]
        return mixed

    def plans(self, population: Population) -> list[Any]:
        """One `Mix` per candidate."""
        return [
            Mix(tuple(map(tuple, table.tolist())), self.checkpoints)
            for table in self.coefficients(population)
        ]

    def to_json(self) -> dict[str, Any]:
        """With origin and directions: they say what a candidate stands for."""
        return {
            **super().to_json(),
            "origin": self.origin.tolist(),
            "directions": self.directions.tolist(),
        }


@dataclass(frozen=True)
class AdoptMixes:
    """The best mixes of a stage, of any mix space, as seeds of the next one.

    Attributes:
        k: how many.
    """

    k: int = 10

    def __call__(self, answers: Answers, space: Space) -> Seeds:
        from searchlab.algorithms.base import Seeds
        from searchlab.config import best_rows

        assert isinstance(space, CheckpointMixSpace)
        rows = best_rows(answers, self.k, None, ("",))
        table = answers.space.coefficients(answers.population.take(rows))  # type: ignore[attr-defined]
        table = np.repeat(table, space.group_count, axis=1) if table.shape[1] == 1 else table
        shape = space.variables["alpha"].shape
        population = Population({"alpha": table.reshape(len(table), *shape)})
        repaired = space.repair(population, uniforms(0, 0, 0, len(rows), space.repair_width))
        return Seeds(repaired, tuple(answers.origin[i] for i in rows))
