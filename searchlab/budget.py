"""Budgets that are linear in the one-hot code: cost, feasibility and repair, written once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import SpaceError
from searchlab.variables import Choice, Integer, Subset, Variable

if TYPE_CHECKING:
    from searchlab.population import Population

__all__ = ["REPAIR_WIDTH", "LinearBudget"]

REPAIR_WIDTH = 16  # uniforms per candidate and budget in one repair (two per change, reused)
_MOST_VALUES = 2**16  # of an integer in a budget: a repair looks at all of them


@dataclass(frozen=True, eq=False)
class LinearBudget:
    """lower <= sum of table entries of the active elements <= upper.

    Args:
        table: variable name -> costs, float64 (*shape, labels) for a choice; (*shape, n), what each
            member costs, for a subset; or a number per unit for an integer variable (its value
            times that number counts). Smaller shapes broadcast.
        upper: the largest allowed sum, inf by default.
        lower: the smallest allowed sum, -inf by default.
        name: how the sum is called in tables, records and errors.
        offset: added to every sum.

    Raises:
        SpaceError: an empty table, costs that are not finite numbers, lower > upper.
    """

    table: Mapping[str, Any]
    upper: float = np.inf
    lower: float = -np.inf
    name: str = "budget"
    offset: float = 0.0

    def __post_init__(self) -> None:
        table: dict[str, NDArray[np.float64]] = {}
        if not isinstance(self.table, Mapping):
            raise SpaceError(f"budget {self.name!r}: table {self.table!r}; allowed: a mapping")
        for key, value in self.table.items():
            try:
                table[key] = np.array(value, dtype=np.float64)
            except (TypeError, ValueError, OverflowError):
                raise SpaceError(
                    f"budget {self.name!r}: costs of {key!r} are {value!r}; allowed: numbers"
                ) from None
        if not table:
            raise SpaceError(f"budget {self.name!r} has an empty table")
        for key, costs in table.items():
            if not np.isfinite(costs).all():
                raise SpaceError(f"budget {self.name!r}: costs of {key!r} are not all finite")
            costs.flags.writeable = False
        if not self.lower <= self.upper:
            raise SpaceError(f"budget {self.name!r}: lower {self.lower} > upper {self.upper}")
        if not np.isfinite(self.offset):
            raise SpaceError(f"budget {self.name!r}: offset {self.offset}; allowed: finite")
        object.__setattr__(self, "table", table)
        # Whole numbers become floats, so that a budget read from a file has the same text.
        for name in ("upper", "lower", "offset"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def check(self, variables: Mapping[str, Variable]) -> None:
        """Raises SpaceError where the table does not fit the variables or no candidate can."""
        low = high = self.offset
        for key, costs in self.table.items():
            variable = variables.get(key)
            if variable is None:
                raise SpaceError(f"budget {self.name!r} names {key!r}; known: {sorted(variables)}")
            if isinstance(variable, Choice):
                want: tuple[int, ...] = (*variable.shape, len(variable.labels))
            elif isinstance(variable, Integer | Subset):
                want = variable.shape
            else:
                raise SpaceError(
                    f"budget {self.name!r}: {key!r} is a {variable.kind}; "
                    "allowed: choices, integers and subsets"
                )
            if isinstance(variable, Integer) and variable.unit_count > _MOST_VALUES:
                raise SpaceError(
                    f"budget {self.name!r}: {key!r} has {variable.unit_count} values; "
                    f"allowed: at most {_MOST_VALUES} (see `step`)"
                )
            try:
                full = np.broadcast_to(costs, want)
            except ValueError:
                raise SpaceError(
                    f"budget {self.name!r}: table of {key!r} has shape {costs.shape}; "
                    f"allowed: {want}"
                ) from None
            if isinstance(variable, Integer):
                full = np.stack([full * variable.low, full * variable.high], axis=-1)
            if isinstance(variable, Subset):
                ranked = np.sort(full, axis=-1)
                least = ranked[..., : variable.k].sum(axis=-1)
                most = ranked[..., variable.n - variable.k :].sum(axis=-1)
            else:
                least, most = full.min(-1), full.max(-1)
            if variable.when:  # an inactive element pays nothing
                least, most = np.minimum(least, 0), np.maximum(most, 0)
            low, high = low + float(least.sum()), high + float(most.sum())
        slip = self.slip
        if low > self.upper + slip or high < self.lower - slip:
            raise SpaceError(
                f"budget {self.name!r} allows [{self.lower}, {self.upper}] but every candidate "
                f"lies in [{low:g}, {high:g}]"
            )

    def choice_table(self, key: str, variable: Choice) -> NDArray[np.float64]:
        """The costs of a choice in full, float64 (size, labels)."""
        labels = len(variable.labels)
        full = np.broadcast_to(self.table[key], (*variable.shape, labels))
        return full.reshape(variable.size, labels)

    def unit_costs(self, key: str, variable: Variable) -> NDArray[np.float64]:
        """What one unit of an integer, or one member of a subset, costs; float64 (size,)."""
        return np.broadcast_to(self.table[key], variable.shape).reshape(-1)

    def element_costs(
        self, key: str, variable: Variable, values: NDArray[Any], active: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Cost of each element, float64 (n, size); zero where inactive."""
        flat = values.reshape(len(values), variable.size)
        if isinstance(variable, Choice):
            paid = self.choice_table(key, variable)[np.arange(variable.size), flat.astype(np.int64)]
        else:
            paid = flat * self.unit_costs(key, variable)
        return np.where(active.reshape(flat.shape), paid, 0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "table": {key: table.tolist() for key, table in self.table.items()},
            "upper": self.upper if np.isfinite(self.upper) else None,
            "lower": self.lower if np.isfinite(self.lower) else None,
            "offset": self.offset,
        }

    def cost(
        self,
        variables: Mapping[str, Variable],
        population: Population,
        active: Mapping[str, NDArray[Any]],
    ) -> NDArray[np.float64]:
        """The sum per candidate, float64 (n,)."""
        total = np.full(len(population), self.offset)
        for key in self.table:
            total += self.element_costs(key, variables[key], population[key], active[key]).sum(
                axis=1
            )
        return total

    def holds(self, cost: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which sums are allowed, bool (n,)."""
        return (cost <= self.upper + self.slip) & (cost >= self.lower - self.slip)

    @property
    def slip(self) -> float:
        """What rounding of a sum may cost."""
        ends = [abs(end) for end in (self.lower, self.upper) if np.isfinite(end)]
        return 1e-9 * max([1.0, *ends])
