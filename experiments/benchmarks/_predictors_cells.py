"""NAS-Bench-201 as predictors are measured on it: its cells, their split, and taus of fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.config import PREDICTORS, resolve
from searchlab.evaluator import Signal
from searchlab.predictor import Predictor, Table, table_of
from searchlab.space import Space
from searchlab.variables import Choice

__all__ = ["SIGNALS", "Cells", "bare", "build", "fitted", "kendall", "more_signals", "read_cells"]

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

SIGNALS = (
    "zc_naswot",
    "zc_jacob_cov",
    "zc_grad_norm",
    "zc_snip",
    "zc_plain",
    "zc_log10_synflow",
    "flops_m",
    "params_m",
    "lat_1080ti_256",
    "lat_raspi4",
)


@dataclass(frozen=True)
class Cells:
    """All cells with their signals and losses (minus the accuracy).

    Attributes:
        table: all 15,625 cells.
        losses: dataset -> float64 (15625,).
        early: dataset -> float64 (15625,), validation accuracy after 12 epochs.
        iso: int64 (15625,), cells of one class compute the same function.
        pool, test: rows that labels come from, and rows that tau is taken on.
    """

    table: Table
    losses: dict[str, Floats]
    early: dict[str, Floats]
    iso: Rows
    pool: Rows
    test: Rows

    def labels(self, n: int, seed: int) -> Rows:
        """The rows whose losses are known."""
        return np.random.default_rng(100 + seed).choice(self.pool, n, replace=False)

    def split_by_class(self, seed: int) -> Cells:
        """Another split: no cell that is tested computes the function of one in the pool."""
        classes = np.random.default_rng(1000 + seed).permutation(np.unique(self.iso))
        first = np.isin(self.iso, classes[: len(classes) // 2])
        return replace(self, pool=np.flatnonzero(first), test=np.flatnonzero(~first))


def read_cells(folder: Path) -> Cells:
    """The table and its standard split."""
    import pandas as pd

    frame = pd.read_csv(folder / "nasbench201.csv.gz", dtype={"genotype": str})
    space = Space(operation=Choice((0, 1, 2, 3, 4), shape=(6,)), name="nasbench201")
    rows = [{"operation": [int(digit) for digit in text]} for text in frame["genotype"]]
    columns = frame[list(SIGNALS)].to_numpy(dtype=np.float64)
    table = table_of(
        space,
        space.population(rows),
        signals=columns,
        of=[Signal(name, "max") for name in SIGNALS],  # experts learn that more is better
    )
    order = np.random.default_rng(0).permutation(len(frame))
    data = ("cifar10", "cifar100")
    return Cells(
        table,
        {name: -frame[f"{name}_acc200"].to_numpy(dtype=np.float64) for name in data},
        {name: frame[f"{name}_val12"].to_numpy(dtype=np.float64) for name in data},
        frame["iso_class"].to_numpy(dtype=np.int64),
        order[:7813],
        order[7813:],
    )


def kendall(scores: Floats, losses: Floats) -> float:
    """Kendall's tau-b."""
    from scipy.stats import kendalltau

    return float(kendalltau(scores, losses).statistic)


def build(name: str) -> Predictor:
    """A new predictor by its name."""
    made: Predictor = resolve(PREDICTORS, name, "predictor")()
    return made


def fitted(
    name: str, table: Table, losses: Floats, rows: Rows, seed: int, pool: Table
) -> Predictor:
    """A predictor that has seen the losses of some rows, and the signals of the pool."""
    predictor = build(name)
    predictor.fit(table.take(rows), losses[rows], seed=seed, pool=pool)
    return predictor


def bare(table: Table) -> Table:
    """The table without signals."""
    return replace(table, signals=np.empty((len(table), 0)), signal_names=(), directions=())


def more_signals(table: Table, columns: Floats, name: str) -> Table:
    """The table with further signals (n, k)."""
    k = columns.shape[1]
    directions: list[Literal["min", "max"]] = ["min"] * k
    return replace(
        table,
        signals=np.concatenate([table.signals, columns], axis=1),
        signal_names=(*table.signal_names, *(f"{name}{i}" for i in range(k))),
        directions=(*table.directions, *directions),
    )
