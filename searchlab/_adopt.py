"""Candidates of an earlier space of the same variables, as near as another space can hold them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from searchlab.population import Population
from searchlab.space import Space
from searchlab.uniforms import uniforms
from searchlab.variables import Choice, Variable

__all__ = ["Adopted", "Adopts", "adopted", "places", "recoded", "variables_of"]

Array = NDArray[Any]


class Adopted(NamedTuple):
    """Feasible candidates, and the row of the earlier population that each one comes from.

    Several may come from one row: other ways to say what the new space has no word for, the
    likeliest first.
    """

    population: Population
    rows: NDArray[np.int64]


@runtime_checkable
class Adopts(Protocol):
    """A space that knows more of its candidates than `adopted`: how they grow and shrink, say."""

    def adopted(self, earlier: Space, population: Population, k: int) -> Adopted:
        """Candidates of an earlier space of the same variables as this space's own.

        Args:
            earlier: of the same names and kinds of variables; budgets and a domain's own forms may
                be left out.
            population: candidates of it, the best first.
            k: so many of each group are wanted.

        Raises:
            SpaceError: they mean nothing here; says why.
        """


def variables_of(space: Space) -> str:
    """Names and kinds of a space's variables, without shapes, labels and ranges."""
    return ", ".join(f"{name}:{variable.kind}" for name, variable in space.variables.items())


def adopted(space: Space, earlier: Space, population: Population) -> Adopted:
    """Labels that both spaces have stay, numbers go to the nearest allowed ones, budgets are met.

    Elements of a variable of another shape are read at the same relative place, axis by axis. Rows
    with a label that is unknown here are left out.
    """
    columns: dict[str, Array] = {}
    fits = np.ones(len(population), dtype=bool)
    for name, variable in space.variables.items():
        old = earlier.variables[name]
        column, known = recoded(variable, earlier, population, name)
        column = column.reshape(len(column), old.size)[:, places(variable, old)]
        columns[name] = column.reshape(len(column), *variable.shape)
        fits &= known
    rows = np.flatnonzero(fits)
    moved = Population({name: column[rows] for name, column in columns.items()})
    moved = space.repair(moved, uniforms(0, 0, 0, len(rows), space.repair_width))
    good = np.flatnonzero(space.is_feasible(moved))
    return Adopted(moved.take(good), rows[good])


def recoded(
    variable: Variable, earlier: Space, population: Population, name: str
) -> tuple[Array, NDArray[np.bool_]]:
    """A column of another space in a variable's codes, and the rows all of whose labels it has."""
    old, column = earlier.variables[name], np.asarray(population[name])
    if not (isinstance(variable, Choice) and isinstance(old, Choice)):
        return column.astype(variable.dtype), np.ones(len(column), dtype=bool)
    labels = list(variable.labels)
    codes = np.array([labels.index(label) if label in labels else -1 for label in old.labels])
    found = codes[column]
    unknown = (found < 0) & earlier.active(population)[name]
    known = ~unknown.reshape(len(column), old.size).any(axis=1)
    return np.where(found < 0, variable.neutral, found).astype(variable.dtype), known


def places(wanted: Variable, there: Variable) -> NDArray[np.int64]:
    """The element of `there` at the relative place of each element of `wanted`, (wanted.size,)."""
    if wanted.shape == there.shape:
        return np.arange(wanted.size)
    shapes = (wanted.shape, there.shape)
    if len(wanted.shape) != len(there.shape):
        shapes = ((wanted.size,), (there.size,))
    axes = [
        ((np.arange(mine) + 0.5) / mine * other).astype(np.int64)
        for mine, other in zip(*shapes, strict=True)
    ]
    grid = np.arange(there.size).reshape(shapes[1] or (1,))
    return np.asarray(grid[np.ix_(*axes)] if axes else grid).reshape(-1)
