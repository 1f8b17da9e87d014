"""Outcome constraints: what a candidate must reach besides its objectives, and by how much not."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError

if TYPE_CHECKING:
    from searchlab.evaluator import Evaluator

__all__ = ["Constraint", "constraints_of", "parse_constraint", "violation"]

_TEXT = re.compile(r"\s*([A-Za-z_][\w.@/:+-]*?)\s*(<=|>=)\s*([^\s<>=]+)\s*")


@dataclass(frozen=True)
class Constraint:
    """A measured quantity with a bound.

    Attributes:
        name: of the quantity, as the evaluator reports it.
        bound: what it is held against.
        sense: "<=" (at most the bound) or ">=" (at least).
        scale: a violation of this size counts as one, so that several constraints can be added;
            None = the bound's magnitude, or 1 where that is zero.

    Raises:
        ConfigError: no name, a bound that is not finite, an unknown sense, a scale that is not
            positive.
    """

    name: str
    bound: float
    sense: Literal["<=", ">="] = "<="
    scale: float | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a constraint without a name; allowed: the name of a measured value")
        if self.sense not in ("<=", ">="):
            raise ConfigError(f"constraint {self.name!r}: {self.sense!r}; allowed: <=, >=")
        if not math.isfinite(self.bound):
            raise ConfigError(f"constraint {self.name!r}: bound {self.bound}; allowed: finite")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"constraint {self.name!r}: scale {self.scale}; allowed: above 0")

    def excess(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """By how many scales the bound is broken, float64 like `values`; 0 where it holds."""
        over = values - self.bound if self.sense == "<=" else self.bound - values
        scale = self.scale if self.scale is not None else abs(self.bound) or 1.0
        excess: NDArray[np.float64] = np.maximum(over, 0.0) / scale
        return excess

    def __str__(self) -> str:
        return f"{self.name}{self.sense}{self.bound:g}"


def parse_constraint(text: str) -> Constraint:
    """Reads `NAME>=BOUND` or `NAME<=BOUND`. Raises ConfigError naming the text."""
    match = _TEXT.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        bound = float(match[3])
    except ValueError:
        raise ConfigError(f"constraint {text!r}; allowed: NAME>=NUMBER or NAME<=NUMBER") from None
    return Constraint(match[1], bound, "<=" if match[2] == "<=" else ">=")


def constraints_of(evaluator: Evaluator) -> tuple[Constraint, ...]:
    """An evaluator's outcome constraints; most have none and need not say so."""
    declared: tuple[Constraint, ...] = getattr(evaluator, "constraints", ())
    return declared


def violation(values: Any, constraints: Sequence[Constraint]) -> NDArray[np.float64]:
    """Sum over the constraints of max(0, (g - b) / scale), float64 (n,).

    Args:
        values: float64 (n, c), one column per constraint; NaN and missing columns count as
            infinitely broken.
        constraints: c of them.
    """
    table = np.asarray(values, dtype=np.float64)
    out = np.zeros(len(table))
    for column, constraint in enumerate(constraints):
        if column >= table.shape[1]:
            return np.full(len(table), np.inf)
        excess = constraint.excess(table[:, column])
        out += np.where(np.isnan(excess), np.inf, excess)
    return out
