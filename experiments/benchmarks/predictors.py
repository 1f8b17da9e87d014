"""Predictors on NAS-Bench-201: order of unseen cells after few labels, harm, calibration, time.

    python -m searchlab.experiments.benchmarks.predictors [--quick] [--check] [--out FILE]

Cells are split as the data's README says: labels come from one half of the 15,625 cells, Kendall's
tau is that of all cells of the other half with their accuracy after 200 epochs on CIFAR-10. The
signals are six zero-shot scores, FLOPs, parameters and two latencies; none needs training; those
of the whole first half are shown, its other labels are not. The table is read below
$SEARCHLAB_DATA.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.config import PREDICTORS, resolve
from searchlab.evaluator import Signal
from searchlab.experiments.benchmarks._common import Aim, Journal, data_folder, flags, spread
from searchlab.predictor import Predictor, Table, table_of
from searchlab.predictors.artifact import load_predictor
from searchlab.predictors.reuse import with_prediction
from searchlab.space import Space
from searchlab.variables import Choice

__all__ = ["main"]

Floats = NDArray[np.float64]

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
TAU = {25: 0.67, 78: 0.72, 390: 0.79, 781: 0.82}
TAU_12 = {25: 0.70, 78: 0.78, 390: 0.855}
TABULAR = ("ridge", "rf", "gbdt", "gp", "stack")
BEST_SIGNAL = 0.577  # tau of the best signal alone
NEGATED = ("zc_naswot", "zc_log10_synflow", "params_m")


@dataclass(frozen=True)
class Cells:
    """All cells with their signals and losses (minus the accuracy).

    Attributes:
        table: all 15,625 cells.
        losses: dataset -> float64 (15625,).
        early: dataset -> float64 (15625,), validation accuracy after 12 epochs.
        pool, test: rows that labels come from, and rows that tau is taken on.
    """

    table: Table
    losses: dict[str, Floats]
    early: dict[str, Floats]
    pool: NDArray[np.int64]
    test: NDArray[np.int64]

    def labels(self, n: int, seed: int) -> NDArray[np.int64]:
        """The rows whose losses are known."""
        return np.random.default_rng(100 + seed).choice(self.pool, n, replace=False)


def read_cells(folder: Path) -> Cells:
    """The table and its standard split."""
    import pandas as pd

    frame = pd.read_csv(folder / "nasbench201.csv.gz", dtype={"genotype": str})
    space = Space(operation=Choice((0, 1, 2, 3, 4), shape=(6,)), name="nasbench201")
    rows = [{"operation": [int(digit) for digit in text]} for text in frame["genotype"]]
    columns = frame[list(SIGNALS)].to_numpy(dtype=np.float64)
    table = table_of(
        space, space.population(rows), signals=columns, of=[Signal(name) for name in SIGNALS]
    )
    order = np.random.default_rng(0).permutation(len(frame))
    data = ("cifar10", "cifar100")
    return Cells(
        table,
        {name: -frame[f"{name}_acc200"].to_numpy(dtype=np.float64) for name in data},
        {name: frame[f"{name}_val12"].to_numpy(dtype=np.float64) for name in data},
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
    name: str, table: Table, losses: Floats, rows: NDArray[np.int64], seed: int, pool: Table
) -> Predictor:
    """A predictor that has seen the losses of some rows, and the signals of the pool."""
    predictor = build(name)
    predictor.fit(table.take(rows), losses[rows], seed=seed, pool=pool)
    return predictor


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


@dataclass
class Suite:
    """The cases, with what they share."""

    journal: Journal
    cells: Cells
    quick: bool

    @property
    def seeds(self) -> range:
        return range(2 if self.quick else 5)

    def taus(self, name: str, table: Table, n: int) -> list[float]:
        """Tau on the test cells, one for each seed."""
        cells, losses = self.cells, self.cells.losses["cifar10"]
        test, pool = table.take(cells.test), table.take(cells.pool)
        out = []
        for seed in self.seeds:
            predictor = fitted(name, table, losses, cells.labels(n, seed), seed, pool)
            out.append(kendall(predictor.rank(test), losses[cells.test]))
        return out

    def order(self, sizes: Sequence[int]) -> None:
        """Tau of every predictor, without any signal that needs training."""
        for n in sizes:
            for name in TABULAR:
                taus = self.taus(name, self.cells.table, n)
                aims = []
                if name == "stack":
                    aims.append(Aim("mean tau", float(np.mean(taus)), "at least", TAU[n]))
                if name == "stack" and n == 25:
                    lead = min(taus) - BEST_SIGNAL
                    aims.append(Aim("least lead over the best signal", lead, "at least", 0.05))
                figures = {"predictor": name, "labels": n, "tau": spread(taus)}
                self.journal.case("order", figures, seeds=self.seeds, aims=aims)

    def experts(self, sizes: Sequence[int], seeds: range) -> None:
        """`dele` beside the same network without experts: 10 epochs of step 1, 120 of step 2."""
        from searchlab.predictors.dele import Dele

        cells, losses = self.cells, self.cells.losses["cifar10"]
        bare = replace(
            cells.table, signals=np.empty((len(losses), 0)), signal_names=(), directions=()
        )
        for n in sizes:
            taus: dict[str, list[float]] = {"experts": [], "none": []}
            seconds = []
            for seed in seeds:
                rows = cells.labels(n, seed)
                for name, table in (("experts", cells.table), ("none", bare)):
                    start = time.perf_counter()
                    dele = Dele(pretrain=10, epochs=120)
                    pool = table.take(cells.pool)
                    dele.fit(table.take(rows), losses[rows], seed=seed, pool=pool)
                    if name == "experts":
                        seconds.append(time.perf_counter() - start)
                    scores = dele.rank(table.take(cells.test))
                    taus[name].append(kendall(scores, losses[cells.test]))
            lead = float(np.mean(taus["experts"]) - np.mean(taus["none"]))
            least = {25: 0.05, 78: 0.06}.get(n, 0.0)
            figures: dict[str, Any] = {name: spread(values) for name, values in taus.items()}
            self.journal.case(
                "experts",
                {"predictor": "dele", "labels": n, "tau": figures, "fit_s": spread(seconds)},
                seeds=seeds,
                aims=[Aim("lead over no experts", lead, "at least", least)],
            )

    def trained(self, sizes: Sequence[int]) -> None:
        """The same with the accuracy after 12 epochs as one more signal."""
        table = more_signals(self.cells.table, self.cells.early["cifar10"][:, None], "epochs12_")
        for n in sizes:
            taus = self.taus("stack", table, n)
            self.journal.case(
                "order with 12 epochs",
                {"predictor": "stack", "labels": n, "tau": spread(taus)},
                seeds=self.seeds,
                aims=[Aim("mean tau", float(np.mean(taus)), "at least", TAU_12[n])],
            )

    def harm(self) -> None:
        """Random, negated and missing signals, at 78 labels."""
        table, generator = self.cells.table, np.random.default_rng(1)
        clean = float(np.mean(self.taus("stack", table, 78)))
        noise = generator.normal(size=(len(table), 10))
        negated = [table.signal_names.index(name) for name in NEGATED]
        poison = np.concatenate([noise, -table.signals[:, negated]], axis=1)
        holes = table.signals.copy()
        holes[generator.random(holes.shape) < 0.3] = np.nan
        cases: dict[str, tuple[Table, Callable[[float], Aim]]] = {
            "10 random and 3 negated signals more": (
                more_signals(table, poison, "poison"),
                lambda tau: Aim("tau lost", clean - tau, "at most", 0.02),
            ),
            "random signals only": (
                replace(table, signals=noise),
                lambda tau: Aim("tau", tau, "at least", 0.539 - 0.02),
            ),
            "30 % of the signals missing": (
                replace(table, signals=holes),
                lambda tau: Aim("tau lost", clean - tau, "at most", 0.04),
            ),
        }
        for case, (harmed, aim) in cases.items():
            taus = self.taus("stack", harmed, 78)
            figures = {"predictor": "stack", "labels": 78, "tau": spread(taus), "clean": clean}
            mean = float(np.mean(taus))
            self.journal.case(case, figures, seeds=self.seeds, aims=[aim(mean)])

    def intervals(self, n: int) -> None:
        """How many test cells lie within the 90 % interval."""
        cells, losses = self.cells, self.cells.losses["cifar10"]
        test, pool = cells.table.take(cells.test), cells.table.take(cells.pool)
        shares = []
        for seed in self.seeds:
            predictor = fitted("stack", cells.table, losses, cells.labels(n, seed), seed, pool)
            mean, sd = predictor.predict(test)
            shares.append(float(np.mean(np.abs(mean - losses[cells.test]) < 1.645 * sd)))
        covered = float(np.mean(shares))
        self.journal.case(
            "90 % interval",
            {"predictor": "stack", "labels": n, "covered": spread(shares)},
            seeds=self.seeds,
            aims=[
                Aim("covered", covered, "at least", 0.85),
                Aim("covered", covered, "at most", 0.95),
            ],
        )

    def times(self) -> None:
        """Seconds of a fit at 78 labels and of a prediction of all cells."""
        cells, losses = self.cells, self.cells.losses["cifar10"]
        rows, pool = cells.labels(78, 0), cells.table.take(cells.pool)
        for name in TABULAR:
            start = time.perf_counter()
            predictor = fitted(name, cells.table, losses, rows, 0, pool)
            middle = time.perf_counter()
            predictor.predict(cells.table)
            end = time.perf_counter()
            aims = []
            if name == "stack":
                aims.append(Aim("fit seconds", middle - start, "at most", 20.0))
                aims.append(Aim("predict seconds", end - middle, "at most", 2.0))
            figures = {"predictor": name, "fit_s": middle - start, "predict_s": end - middle}
            self.journal.case("time", {**figures, "labels": 78, "cells": 15625}, aims=aims)

    def transfer(self, n: int) -> None:
        """CIFAR-10 to CIFAR-100: saved, loaded, and refined by 25 labels of the new task."""
        cells = self.cells
        old, new = cells.losses["cifar10"], cells.losses["cifar100"]
        pool = cells.table.take(cells.pool)
        taus: dict[str, list[float]] = {"from scratch": [], "as it is": [], "refined": []}
        for seed in self.seeds:
            rows = cells.labels(25, seed)
            first = fitted("stack", cells.table, old, cells.labels(n, seed), seed, pool)
            with TemporaryDirectory() as folder:
                first.save(Path(folder), with_data=True)
                loaded = load_predictor(folder, cells.table.space)
            wide = with_prediction(cells.table, loaded)
            scratch = fitted("stack", cells.table, new, rows, seed, pool)
            refined = fitted("stack", wide, new, rows, seed, wide.take(cells.pool))
            scores = {
                "from scratch": scratch.rank(cells.table),
                "as it is": loaded.rank(cells.table),
                "refined": refined.rank(wide),
            }
            for name, values in scores.items():
                taus[name].append(kendall(values[cells.test], new[cells.test]))
        means = {name: float(np.mean(values)) for name, values in taus.items()}
        figures: dict[str, Any] = {name: spread(values) for name, values in taus.items()}
        self.journal.case(
            "CIFAR-10 to CIFAR-100",
            {"predictor": "stack", "labels": n, "new labels": 25, "tau": figures},
            seeds=self.seeds,
            aims=[
                Aim("tau, refined", means["refined"], "at least", 0.79),
                Aim("lead", means["refined"] - means["from scratch"], "at least", 0.10),
            ],
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments)
    journal = Journal("predictors", options)
    folder = data_folder("nasbench201")
    if folder is None:
        journal.skip("order", "no nasbench201 below $SEARCHLAB_DATA")
        return journal.close()
    quick = bool(options.quick)
    suite = Suite(journal, read_cells(folder), quick)
    suite.order((25, 78) if quick else tuple(TAU))
    suite.times()
    if not quick:
        suite.trained(tuple(TAU_12))
        suite.harm()
        suite.intervals(390)
        suite.transfer(781)
        suite.experts((25, 78), range(2))
    return journal.close()


if __name__ == "__main__":
    sys.exit(main())
