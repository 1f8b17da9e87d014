"""Crossover and mutation of any space: the default operator of evolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from searchlab._variable import normals
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space

__all__ = ["UniformVariation", "Variation"]

Array = NDArray[Any]


class Variation(Protocol):
    """Makes children of parents.

    `vary` gets n pairs of parents, uniforms (n, width(space)), a strength (1 normally, 4, 16, ...
    on redraws) and, in a niched search, the niche (n,) that each child is meant for (or None).
    It returns n valid canonical candidates; row i depends on row i of the arguments only.
    """

    def width(self, space: Space) -> int: ...
    def vary(
        self,
        space: Space,
        a: Population,
        b: Population,
        u: Array,
        *,
        strength: float = 1.0,
        targets: Array | None = None,
    ) -> Population: ...
    def settings(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class UniformVariation:
    """Uniform crossover, then at least one changed element.

    Attributes:
        crossover: probability that a child has two parents (then each element is drawn from
            either); otherwise it copies the first.
        rate: expected number of mutated elements beyond the sure one.
        sure: whether one active element always mutates.
    """

    crossover: float = 0.8
    rate: float = 0.2
    sure: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.crossover <= 1 or self.rate < 0:
            raise ConfigError(
                f"crossover {self.crossover} and rate {self.rate}; allowed: [0, 1] and >= 0"
            )

    def settings(self) -> dict[str, Any]:
        return {
            "name": "uniform",
            "crossover": self.crossover,
            "rate": self.rate,
            "sure": self.sure,
        }

    def width(self, space: Space) -> int:
        if any(variable.dtype.kind == "f" for variable in space.variables.values()):
            normals(np.zeros(0))  # loads what mutations need, before workers wait for the first one
        values = sum(variable.width for variable in space.variables.values())
        return 2 + 2 * space.size + values + space.repair_width

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
        n, d = len(u), space.size
        mix = u[:, 2 : 2 + d] < 0.5
        mix &= u[:, :1] < self.crossover
        conditional = space.conditional
        active_a = space.active(a) if conditional else None
        active_b = space.active(b) if conditional else None
        columns: dict[str, Array] = {}
        alive: dict[str, Array] = {}
        start = 0
        for name, variable in space.variables.items():
            part = mix[:, start : start + variable.size].reshape(n, *variable.shape)
            columns[name] = variable.cross(a[name], b[name], part)
            if active_a is not None and active_b is not None:
                alive[name] = np.where(part, active_b[name], active_a[name])
            start += variable.size
        mask = self._mask(space, u[:, 1], u[:, 2 + d : 2 + 2 * d], alive, strength)
        mask = space.spread_ties(mask) if space.tied else mask
        active: dict[str, Array] = {}
        start, at = 0, 2 + 2 * d
        for name, variable in space.variables.items():
            flags = mask[:, start : start + variable.size].reshape(n, *variable.shape)
            block = u[:, at : at + variable.width]
            where = alive.get(name) if variable.when else None
            columns[name] = variable.mutate(columns[name], flags, block, where)
            if conditional:
                active[name] = space.activity(name, columns, active, n)
                born = active[name] & ~alive[name]
                if born.any():
                    fresh = variable.sample(block, active[name] if variable.when else None)
                    columns[name] = np.where(born, fresh, columns[name]).astype(variable.dtype)
            start += variable.size
            at += variable.width
        return space.repair(Population._of(columns, n), u[:, at:])

    def _mask(
        self, space: Space, u_sure: Array, u: Array, alive: dict[str, Array], strength: float
    ) -> Array:
        n, d = u.shape
        if alive:
            flags = np.concatenate([alive[k].reshape(n, -1) for k in space.variables], axis=1)
            count = np.maximum(flags.sum(axis=1), 1)
            mask: Array = (u < np.minimum(1.0, self.rate * strength / count)[:, None]) & flags
            if self.sure:
                rank = (u_sure * count).astype(np.int64)
                chosen = (np.cumsum(flags, axis=1) - 1 == rank[:, None]) & flags
                mask |= chosen
            return mask
        mask = u < min(1.0, self.rate * strength / d)
        if self.sure:
            mask[np.arange(n), (u_sure * d).astype(np.int64)] = True
        return mask
