"""Spaces of real numbers as plain vectors, for algorithms that move in all directions at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._variable import Variable, reflect
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.variables import Affine, Ordered, Real

__all__ = ["Coordinates"]

Array = NDArray[Any]

_MARGIN = 0.05  # of a range: where its ends begin to be felt
_ROUNDING = 1e-7  # what a coordinate at the very end may lose on the way there and back


@dataclass(frozen=True)
class _Part:
    """One variable's share of the vector: `width` places from `start` on."""

    key: str
    variable: Variable
    start: int
    width: int


class Coordinates:
    """A one-to-one map between the candidates of a space of real numbers and vectors.

    - `Real` and `Ordered`: one coordinate per element. From 0.05 to 0.95 it is the place within
      the range (of the logarithm with `log`); nearer to the ends it goes on to -0.05 and 1.05 on
      a parabola, where it turns around, so that a value depends smoothly on any coordinate
      (the transformation of Hansen's `cma`, with a margin in parts of the range).
    - `Affine` and `Simplex` of n elements: n - 1 coordinates, an orthonormal basis (Helmert's) of
      the directions that keep the sum; 0 is the point of equal elements, and the unit is an
      element's usual spread. What leaves the bounds goes to the nearest point within them.
    - Constants have no coordinate. `Space.repair` then sorts ordered values, snaps steps and sees
      to predicates.

    So several vectors stand for one candidate: `vectors` gives the nearest, `distances` how far
    others were moved. Rows never depend on their neighbours, not even in the last bit.

    Args:
        space: Real, Ordered, Affine and Simplex variables without conditions.
        name: the algorithm that asks, for the error.

    Raises:
        ConfigError: any other kind of variable, or a condition; names what fits.
    """

    def __init__(self, space: Space, *, name: str) -> None:
        self.space = space
        parts, start = [], 0
        for key, variable in space.variables.items():
            if not isinstance(variable, Real | Ordered | Affine) or variable.when:
                what = variable.kind + " with a condition" * bool(variable.when)
                raise ConfigError(
                    f"{name} on {key!r}, a {what}; allowed: Real, Ordered, Affine and Simplex "
                    "without conditions (the algorithm 'evolution' takes every space)"
                )
            part = _Part(key, variable, start, _width_of(variable))
            parts.append(part)
            start += part.width
        self._parts = tuple(parts)
        self.size = start
        """How many coordinates there are."""

    @property
    def centre(self) -> NDArray[np.float64]:
        """The middle of every range, and equal elements where a sum is given."""
        out = np.zeros(self.size)
        for part in self._parts:
            if not isinstance(part.variable, Affine):
                out[part.start : part.start + part.width] = 0.5
        return out

    def population(self, vectors: Array, u: Array) -> Population:
        """Valid candidates at, or next to, these vectors.

        Args:
            vectors: float64 (n, size).
            u: uniforms (n, space.repair_width).
        """
        columns = {}
        for part in self._parts:
            block = vectors[:, part.start : part.start + part.width]
            shape = (len(vectors), *part.variable.shape)
            columns[part.key] = _values(part.variable, block, len(vectors)).reshape(shape)
        return self.space.repair(Population(columns), u)

    def distances(self, vectors: Array, population: Population) -> NDArray[np.float64]:
        """Squares of how far vectors were moved to become these candidates, float64 (n,).

        Turning around at the end of a range is no distance.
        """
        folded = np.array(vectors)
        for part in self._parts:
            if not isinstance(part.variable, Affine):
                block = slice(part.start, part.start + part.width)
                folded[:, block] = reflect(folded[:, block], -_MARGIN, 1 + _MARGIN)
        moved = np.abs(folded - self.vectors(population))
        squares: NDArray[np.float64] = (np.where(moved > _ROUNDING, moved, 0.0) ** 2).sum(axis=1)
        return squares

    def vectors(self, population: Population) -> NDArray[np.float64]:
        """The vectors of candidates, float64 (n, size)."""
        out = np.empty((len(population), self.size))
        for part in self._parts:
            flat = population[part.key].reshape(len(population), part.variable.size)
            out[:, part.start : part.start + part.width] = _places(part.variable, flat, part.width)
        return out


def _width_of(variable: Variable) -> int:
    if variable.unit_count == 1:
        return 0
    if isinstance(variable, Affine):
        return variable.size // variable.n * (variable.n - 1)
    return variable.size


def _values(variable: Variable, block: Array, n: int) -> Array:
    """Values of one variable, (n, size), not yet repaired."""
    if not block.shape[1]:
        whole: Array = np.resize(variable.unit_values()[0], (n, variable.size))
        return whole
    if isinstance(variable, Affine):
        groups = block.reshape(-1, variable.n - 1)
        moved = variable.total / variable.n + _unit(variable) * _from_basis(groups)
        return moved.reshape(n, variable.size)
    assert isinstance(variable, Real | Ordered)
    place = _bounded(block)
    low, high = variable.low, variable.high
    if getattr(variable, "log", False):
        values = np.exp(math.log(low) + place * math.log(high / low))
    else:
        values = low + place * (high - low)
    clipped: Array = np.clip(values, low, high)
    return clipped


def _places(variable: Variable, values: Array, width: int) -> Array:
    """The inverse of `_values`, (n, width)."""
    if not width:
        return np.empty((len(values), 0))
    if isinstance(variable, Affine):
        groups = values.reshape(-1, variable.n) - variable.total / variable.n
        return (_to_basis(groups) / _unit(variable)).reshape(len(values), width)
    assert isinstance(variable, Real | Ordered)
    low, high = variable.low, variable.high
    if getattr(variable, "log", False):
        return _unbounded(np.log(values / low) / math.log(high / low))
    return _unbounded((values - low) / ((high - low) or 1.0))


def _bounded(vectors: Array) -> Array:
    """Places in [0, 1] of any coordinates."""
    folded = reflect(vectors, -_MARGIN, 1 + _MARGIN)
    low = (folded + _MARGIN) ** 2 / (4 * _MARGIN)
    high = 1 - (1 + _MARGIN - folded) ** 2 / (4 * _MARGIN)
    places: Array = np.where(folded < _MARGIN, low, np.where(folded > 1 - _MARGIN, high, folded))
    return places


def _unbounded(places: Array) -> Array:
    """The coordinates in [-0.05, 1.05] of places in [0, 1]."""
    places = np.clip(places, 0.0, 1.0)
    low = 2 * np.sqrt(_MARGIN * places) - _MARGIN
    high = 1 + _MARGIN - 2 * np.sqrt(_MARGIN * (1 - places))
    out: Array = np.where(places < _MARGIN, low, np.where(places > 1 - _MARGIN, high, places))
    return out


def _unit(variable: Affine) -> float:
    """How far an element usually lies from the end that it is near to."""
    return variable._spread


def _lengths(n: int) -> Array:
    """k = 1 .. n - 1 and the lengths of (1, .. 1, -k, 0, ..) with k ones."""
    k = np.arange(1, n)
    return np.stack([k, np.sqrt(k * (k + 1.0))])


def _from_basis(z: Array) -> Array:
    """Sums over the basis vectors: (m, n - 1) -> (m, n), every row adding up to zero."""
    k, length = _lengths(z.shape[1] + 1)
    share = z / length
    out = np.zeros((len(z), z.shape[1] + 1))
    out[:, :-1] = np.cumsum(share[:, ::-1], axis=1)[:, ::-1]
    out[:, 1:] -= k * share
    return out


def _to_basis(x: Array) -> Array:
    """Products with the basis vectors: (m, n) -> (m, n - 1)."""
    k, length = _lengths(x.shape[1])
    products: Array = (np.cumsum(x, axis=1)[:, :-1] - k * x[:, 1:]) / length
    return products
