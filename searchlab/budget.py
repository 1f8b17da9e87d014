"""Budgets that are linear in the one-hot code: cost, feasibility and repair, written once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import SpaceError
from searchlab.variables import Choice, Integer, Variable

if TYPE_CHECKING:
    from searchlab.population import Population

__all__ = ["REPAIR_WIDTH", "LinearBudget"]

REPAIR_WIDTH = 16  # uniforms per candidate that one repair consumes (two per change, reused)


@dataclass(frozen=True)
class LinearBudget:
    """lower <= sum of table entries of the active elements <= upper.

    Args:
        table: variable name -> costs, float64 (*shape, labels) for a choice, or a number per unit
            for an integer variable (its value times that number counts).
        upper: the largest allowed sum.
        lower: the smallest allowed sum, -inf by default.
        name: how the sum is called in tables, records and errors.
        offset: added to every sum.
    """

    table: Mapping[str, Any]
    upper: float
    lower: float = -np.inf
    name: str = "budget"
    offset: float = 0.0

    def __post_init__(self) -> None:
        table = {key: np.asarray(value, dtype=np.float64) for key, value in self.table.items()}
        if not table:
            raise SpaceError(f"budget {self.name!r} has an empty table")
        for key, costs in table.items():
            if not np.isfinite(costs).all():
                raise SpaceError(f"budget {self.name!r}: costs of {key!r} are not all finite")
        if not self.lower <= self.upper:
            raise SpaceError(f"budget {self.name!r}: lower {self.lower} > upper {self.upper}")
        object.__setattr__(self, "table", table)

    def check(self, variables: Mapping[str, Variable]) -> None:
        """Raises SpaceError where the table does not fit the variables or no candidate can."""
        low = high = self.offset
        for key, costs in self.table.items():
            variable = variables.get(key)
            if variable is None:
                raise SpaceError(f"budget {self.name!r} names {key!r}; known: {sorted(variables)}")
            if isinstance(variable, Choice):
                want = (*variable.shape, len(variable.labels))
                if np.broadcast_shapes(costs.shape, want) != want:
                    raise SpaceError(
                        f"budget {self.name!r}: table of {key!r} has shape {costs.shape}; "
                        f"allowed: {want}"
                    )
                full = np.broadcast_to(costs, want)
                floor = np.minimum(full.min(-1), 0) if variable.when else full.min(-1)
                low, high = low + floor.sum(), high + np.maximum(full.max(-1), 0).sum()
            elif isinstance(variable, Integer):
                ends = [costs * variable.low, costs * variable.high]
                low = low + np.broadcast_to(np.minimum(*ends), variable.shape).sum()
                high = high + np.broadcast_to(np.maximum(*ends), variable.shape).sum()
            else:
                raise SpaceError(f"budget {self.name!r}: {key!r} is a {variable.kind}; "
                                 "allowed: choices and integers")
        if low > self.upper or high < self.lower:
            raise SpaceError(
                f"budget {self.name!r} allows [{self.lower}, {self.upper}] but every candidate "
                f"lies in [{low:g}, {high:g}]"
            )

    def element_costs(
        self, key: str, variable: Variable, values: NDArray[Any], active: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Cost of each element, float64 (n, size); zero where inactive."""
        costs = self.table[key]
        if isinstance(variable, Choice):
            full = np.broadcast_to(costs, (*variable.shape, len(variable.labels)))
            flat = full.reshape(-1, len(variable.labels))
            codes = values.reshape(len(values), -1).astype(np.int64)
            paid = flat[np.arange(flat.shape[0]), codes]
        else:
            paid = (values * costs).reshape(len(values), -1)
        return np.where(active.reshape(len(values), -1), paid, 0.0)

    def cost(
        self,
        variables: Mapping[str, Variable],
        population: Population,
        active: Mapping[str, NDArray[Any]],
    ) -> NDArray[np.float64]:
        """The sum per candidate, float64 (n,)."""
        total = np.full(len(population), self.offset)
        for key in self.table:
            total += self.element_costs(
                key, variables[key], population[key], active[key]
            ).sum(axis=1)
        return total

    def holds(self, cost: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which sums are allowed, bool (n,)."""
        slip = 1e-9 * max(1.0, abs(self.upper) if np.isfinite(self.upper) else 1.0)
        return (cost <= self.upper + slip) & (cost >= self.lower - slip)
