"""What a predictor learns from and what it promises: the seam between the engine and predictors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError
from searchlab.evaluator import Signal
from searchlab.population import Population
from searchlab.space import Space, Tokens

__all__ = ["DRAW_WIDTH", "HoldsOut", "Predictor", "Table", "table_of"]

DRAW_WIDTH = 2  # uniforms per Thompson draw; a predictor derives what it needs from them

Direction = Literal["min", "max"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Candidates as predictors see them, one row each; the arrays are read-only.

    Attributes:
        space: what the candidates are of.
        x: float32 (n, space.code_width), `Space.encode`.
        tokens: `Space.tokens`, one token per element.
        signals: float64 (n, s), cheap quantities; NaN = missing. Infinite values are allowed.
        signal_names: s different names.
        directions: s times "min" or "max": which side of a signal is thought to be good.

    Raises:
        ConfigError: arrays of different lengths, names that repeat, an unknown direction.
    """

    space: Space
    x: NDArray[np.float32]
    tokens: Tokens
    signals: Floats
    signal_names: tuple[str, ...] = ()
    directions: tuple[Direction, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.x)
        shapes = {"tokens": len(self.tokens.codes), "signals": len(self.signals)}
        for name, rows in shapes.items():
            if rows != n:
                raise ConfigError(f"{name} have {rows} rows; allowed: {n}, as many as codes")
        wanted = (n, len(self.signal_names))
        if self.signals.shape != wanted or len(self.directions) != wanted[1]:
            raise ConfigError(
                f"signals of shape {self.signals.shape} with {len(self.directions)} directions; "
                f"allowed: {wanted}, a column for each of {list(self.signal_names)}"
            )
        if len(set(self.signal_names)) < wanted[1]:
            raise ConfigError(f"signals {list(self.signal_names)}; allowed: different names")
        for name, direction in zip(self.signal_names, self.directions, strict=True):
            if direction not in ("min", "max"):
                raise ConfigError(f"direction {direction!r} of signal {name!r}; allowed: min, max")
        for array in (self.x, self.signals, *self.tokens):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Any) -> Table:
        """The rows that an index array, a boolean mask or a slice selects."""
        return replace(
            self,
            x=self.x[rows],
            tokens=Tokens(*(array[rows] for array in self.tokens)),
            signals=self.signals[rows],
        )


def table_of(
    space: Space,
    population: Population,
    *,
    signals: NDArray[Any] | None = None,
    of: Sequence[Signal] = (),
) -> Table:
    """The table of some candidates.

    Args:
        space: what the candidates are of.
        population: n canonical candidates.
        signals: (n, s) with NaN where a signal is missing; None = there are none.
        of: names and directions of the s columns.

    Raises:
        ConfigError: as many rows or columns as there are candidates or signals are not there.
    """
    n = len(population)
    columns = np.empty((n, 0)) if signals is None else np.array(signals, dtype=np.float64)
    return Table(
        space,
        space.encode(population),
        space.tokens(population),
        columns,
        tuple(signal.name for signal in of),
        tuple(signal.direction for signal in of),
    )


@runtime_checkable
class Predictor(Protocol):
    """Learns losses of candidates from few labels.

    Everything is a pure function of the tables, the losses and the seed; `predict`, `rank` and
    `draw` change nothing. Losses are minimised; predictions are in their unit. Before the first
    `fit`, `predict` raises `ConfigError`.

    A predictor may also be a `HoldsOut`.
    """

    @property
    def name(self) -> str:
        """The name in the registry."""

    def fit(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        """Learns from scratch.

        Args:
            table: n candidates, 1 or more.
            losses: float64 (n,); +inf = failed, which counts as no better than the worst.
            seed: of everything random in the fit.
            pool: further candidates without labels, whose signals show how these are spread.

        Raises:
            ConfigError: no candidates, or losses of another length or with NaN.
        """

    def update(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        """Learns from all candidates again, perhaps starting at what is known; see `fit`."""

    def predict(self, table: Table) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the true losses, float64 (n,) each; sd > 0.

        Raises:
            ConfigError: not fitted, or a table of another space or other signals.
        """

    def rank(self, table: Table) -> Floats:
        """Scores whose order is that of the losses, float64 (n,); smaller = better."""

    def draw(self, table: Table, u: Floats) -> Floats:
        """Thompson draws: losses that are plausible given what is known.

        Args:
            table: n candidates.
            u: uniforms (d, DRAW_WIDTH), a row for each draw.

        Returns:
            float64 (d, n); row i is one drawn function at all candidates.
        """

    def save(self, path: Path, *, with_data: bool = False) -> None:
        """Writes a folder that `load` reads; labels and candidates only `with_data`."""

    @classmethod
    def load(cls, path: Path, space: Space) -> Self:
        """Reads a folder that `save` wrote.

        Raises:
            DataError: a missing, changed or newer file, or another space.
        """


@runtime_checkable
class HoldsOut(Protocol):
    """What a predictor may offer besides: what it would have said of labels it had not seen."""

    def held_out(self) -> Floats | None:
        """Each label of the last fit as a fit to others says it, float64 (n,), losses' unit.

        The mean of the others, which is the higher the lower the label, is taken off, so that
        labels without any pattern correlate with it as with noise. None = the last fit knows too
        few labels, it was read from a folder, or the predictor cannot tell without fits anew.
        """
