"""Two-objective problems of the fronts' benchmark, as columns in and losses out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from searchlab.space import Space
from searchlab.variables import Choice, Real

__all__ = ["Bits", "Instance", "Mixed", "published_bits", "synthetic_bits"]

BITS = (2, 4, 8)
Table = NDArray[np.float64]


class Instance(Protocol):
    """A problem of two losses."""

    @property
    def reference(self) -> tuple[float, float]:
        """From where the hypervolume is measured."""

    def space(self) -> Space: ...
    def parts(self) -> tuple[int, Sequence[int]]:
        """How many reals in [0, 1], and how many labels each choice has."""

    def losses(self, reals: Table, choices: NDArray[np.int64]) -> Table:
        """Losses (n, 2) of reals (n, r) and codes of choices (n, c)."""


@dataclass(frozen=True)
class Mixed:
    """ZDT1 or ZDT3 whose distance function counts reals and wrong choices alike.

    With f1 = x1 and g = 1 + 9 (mean of the other reals + share of wrong choices) / 2, f2 is
    g (1 - sqrt(f1 / g)), and ZDT3's less sin(10 pi f1) f1. Source: Zitzler, Deb and Thiele 2000;
    the choices are ours.
    """

    waves: bool = False
    n_reals: int = 12
    n_choices: int = 12
    n_labels: int = 6
    reference: tuple[float, float] = (1.1, 6.0)

    def space(self) -> Space:
        return Space(
            x=Real(0, 1, shape=(self.n_reals,)),
            c=Choice(tuple(range(self.n_labels)), shape=(self.n_choices,)),
        )

    def parts(self) -> tuple[int, Sequence[int]]:
        return self.n_reals, [self.n_labels] * self.n_choices

    def losses(self, reals: Table, choices: NDArray[np.int64]) -> Table:
        right = np.random.default_rng(7).integers(0, self.n_labels, self.n_choices)
        first = reals[:, 0]
        g = 1 + 4.5 * (reals[:, 1:].mean(axis=1) + (choices != right).mean(axis=1))
        second = g * (1 - np.sqrt(first / g))
        if self.waves:
            second = second - first * np.sin(10 * np.pi * first)
        return np.column_stack([first, second])


@dataclass(frozen=True)
class Bits:
    """A bit-width per layer: summed loss against mean bits, both as shares of their ranges.

    Attributes:
        size: parameters of each layer as shares of all, (layers,).
        loss: what a layer loses at 2, 4 and 8 bits, (layers, 3), 0 or more.
    """

    size: Table
    loss: Table
    reference: tuple[float, float] = (1.0, 1.0)

    def space(self) -> Space:
        return Space(c=Choice(BITS, shape=(len(self.size),)))

    def parts(self) -> tuple[int, Sequence[int]]:
        return 0, [len(BITS)] * len(self.size)

    def losses(self, reals: Table, choices: NDArray[np.int64]) -> Table:
        lost = self.loss[np.arange(len(self.size)), choices].sum(axis=1)
        bits = np.array(BITS)[choices] @ self.size
        worst = self.loss.max(axis=1).sum()
        return np.column_stack([lost / worst, (bits - BITS[0]) / (BITS[-1] - BITS[0])])


def synthetic_bits(layers: int) -> Bits:
    """A made-up table: losses fall by a power of four per bit and are log-normal over layers."""
    rng = np.random.default_rng(0)
    sizes = rng.choice([409600, 1310720, 1638400, 2621440, 3276800, 6553600, 13107200], layers)
    scale = 10 ** rng.normal(-5, 0.8, layers)
    loss = scale[:, None] * 4.0 ** (-0.85 * (np.array(BITS) - 2))
    return Bits(sizes / sizes.sum(), loss)


def published_bits(folder: Path) -> Bits:
    """The content layers of MixDQ's SDXL-turbo table: what SSIM loses against the best width."""
    with open(folder / "sdxl_turbo_layers.csv", newline="") as file:
        rows: list[dict[str, Any]] = [r for r in csv.DictReader(file) if r["group"] == "content"]
    size = np.array([float(row["w_params"]) for row in rows])
    ssim = np.array([[float(row[f"w_ssim_{bits}"]) for bits in BITS] for row in rows])
    return Bits(size / size.sum(), ssim.max(axis=1, keepdims=True) - ssim)
