"""Predictors on published tables: order of what was not evaluated, harm, calibration, time.

    python -m searchlab.experiments.benchmarks.predictors [--quick] [--check] [--out FILE]
        [--part NAME]... [--folder FOLDER] [--minutes M]

NAS-Bench-201: cells are split as the data's README says; labels come from one half of the 15,625
cells, Kendall's tau is that of all cells of the other half with their accuracy after 200 epochs on
CIFAR-10. The signals are six zero-shot scores, FLOPs, parameters and two latencies; none needs
training; those of the whole first half are shown, its other labels are not. FlashEval: labels are
of random settings, tau is that of the others. The tables are read below $SEARCHLAB_DATA. With
`--out` the lines of parts that are not measured stay in the file. With `--folder` what was found of
a seed of the part `experts` is kept there, so that it goes on where `--minutes` stopped it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.experiments.benchmarks._common import (
    Aim,
    Journal,
    data_folder,
    flags,
    other_parts,
    spread,
)
from searchlab.experiments.benchmarks._predictors_cells import (
    Cells,
    bare,
    fitted,
    kendall,
    more_signals,
    read_cells,
)
from searchlab.experiments.benchmarks._predictors_experts import Found
from searchlab.predictor import HoldsOut, Table
from searchlab.predictors.artifact import load_predictor
from searchlab.predictors.reuse import with_prediction

__all__ = ["PARTS", "main"]

Floats = NDArray[np.float64]

TAU = {25: 0.67, 78: 0.72, 390: 0.79, 781: 0.82}
TAU_12 = {25: 0.70, 78: 0.78, 390: 0.855}
TABULAR = ("ridge", "rf", "gbdt", "gp", "stack")
MANY = ("ridge", "gp", "stack")  # those that are measured where labels are many
BEST_SIGNAL = 0.577  # tau of the best signal alone
NEGATED = ("zc_naswot", "zc_log10_synflow", "params_m")


@dataclass
class Suite:
    """The cases, with what they share."""

    journal: Journal
    cells: Cells
    quick: bool
    found: Found

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

    def order(self, sizes: Sequence[int], names: Sequence[str] = TABULAR) -> None:
        """Tau of every predictor, without any signal that needs training."""
        for n in sizes:
            for name in names:
                taus = self.taus(name, self.cells.table, n)
                aims = []
                if name == "stack":
                    aims.append(Aim("mean tau", float(np.mean(taus)), "at least", TAU[n]))
                if name == "stack" and n == 25:
                    lead = min(taus) - BEST_SIGNAL
                    aims.append(Aim("least lead over the best signal", lead, "at least", 0.05))
                figures = {"predictor": name, "labels": n, "tau": spread(taus)}
                self.journal.case(
                    f"order: {name}, {n} labels", figures, seeds=self.seeds, aims=aims
                )

    def experts(self) -> None:
        """`dele` beside the same network without experts, and `dynamic`."""
        from searchlab.experiments.benchmarks._predictors_experts import run

        if not run(self.journal, self.cells, (25, 78, 390), self.seeds, self.found):
            raise TimeoutError

    def trained(self, sizes: Sequence[int]) -> None:
        """The same with the accuracy after 12 epochs as one more signal."""
        table = more_signals(self.cells.table, self.cells.early["cifar10"][:, None], "epochs12_")
        for n in sizes:
            taus = self.taus("stack", table, n)
            self.journal.case(
                f"order with 12 epochs: stack, {n} labels",
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
            self.journal.case(f"harm: {case}", figures, seeds=self.seeds, aims=[aim(mean)])

    def intervals(self, n: int) -> None:
        """How many test cells lie within the 90 % interval, and the density of their losses."""
        cells, losses = self.cells, self.cells.losses["cifar10"]
        truth = losses[cells.test]
        shares: list[float] = []
        scores: dict[str, list[float]] = {"stack": [], "gp without signals": []}
        for seed in self.seeds:
            rows = cells.labels(n, seed)
            for name, kind, table in (
                ("stack", "stack", cells.table),
                ("gp without signals", "gp", bare(cells.table)),
            ):
                pool, test = table.take(cells.pool), table.take(cells.test)
                mean, sd = fitted(kind, table, losses, rows, seed, pool).predict(test)
                away = (mean - truth) / sd
                scores[name].append(float(np.mean(0.5 * away**2 + np.log(sd) + 0.919)))
                if name == "stack":
                    shares.append(float(np.mean(np.abs(away) < 1.645)))
        covered = float(np.mean(shares))
        lead = float(np.mean(scores["gp without signals"]) - np.mean(scores["stack"]))
        figures = {
            "predictor": "stack",
            "labels": n,
            "covered": spread(shares),
            "negative log density": {name: spread(values) for name, values in scores.items()},
        }
        aims = [
            Aim("covered", covered, "at least", 0.85),
            Aim("covered", covered, "at most", 0.95),
            Aim("lead over gp without signals", lead, "at least", 0.0),
        ]
        self.journal.case("90 % interval", figures, seeds=self.seeds, aims=aims)

    def times(self) -> None:
        """Seconds of a fit at 78 labels and of a prediction of all cells; files give both back."""
        cells, losses = self.cells, self.cells.losses["cifar10"]
        rows, pool = cells.labels(78, 0), cells.table.take(cells.pool)
        for name in TABULAR:
            start = time.perf_counter(), time.process_time()
            predictor = fitted(name, cells.table, losses, rows, 0, pool)
            middle = time.perf_counter(), time.process_time()
            mean, _ = predictor.predict(cells.table)
            end = time.perf_counter(), time.process_time()
            with TemporaryDirectory() as folder:
                predictor.save(Path(folder), with_data=True)
                again, _ = load_predictor(folder, cells.table.space).predict(cells.table)
            moved = float(np.abs(again - mean).max())
            aims = [Aim("change by save and load", moved, "at most", 1e-6)]
            if name == "stack":
                aims.append(Aim("fit seconds", middle[0] - start[0], "at most", 20.0))
                aims.append(Aim("predict seconds", end[0] - middle[0], "at most", 2.0))
            figures = {
                "predictor": name,
                "fit_s": middle[0] - start[0],
                "fit_cpu_s": middle[1] - start[1],
                "predict_s": end[0] - middle[0],
                "predict_cpu_s": end[1] - middle[1],
                "holds_out": isinstance(predictor, HoldsOut) and predictor.held_out() is not None,
            }
            self.journal.case(f"time: {name}", {**figures, "labels": 78, "cells": 15625}, aims=aims)

    def transfer(self, n: int, *, by_class: bool = False) -> None:
        """CIFAR-10 to CIFAR-100: saved, loaded, and refined by 25 labels of the new task."""
        taus: dict[str, list[float]] = {"from scratch": [], "as it is": [], "refined": []}
        for seed in self.seeds:
            cells = self.cells.split_by_class(seed) if by_class else self.cells
            for name, tau in _transferred(cells, n, seed).items():
                taus[name].append(tau)
        means = {name: float(np.mean(values)) for name, values in taus.items()}
        tau, scratch, old = means["refined"], means["from scratch"], means["as it is"]
        figures: dict[str, Any] = {name: spread(values) for name, values in taus.items()}
        aims = [Aim("gain over the old predictor", tau - old, "at least", -0.005)]
        if not by_class:
            aims.append(Aim("tau, refined", tau, "at least", 0.79))
            aims.append(Aim("lead over from scratch", tau - scratch, "at least", 0.10))
        split = "split by class" if by_class else "standard split"
        self.journal.case(
            f"CIFAR-10 to CIFAR-100, {split}",
            {"predictor": "stack", "labels": n, "new labels": 25, "tau": figures},
            seeds=self.seeds,
            aims=aims,
        )


def _transferred(cells: Cells, n: int, seed: int) -> dict[str, float]:
    """Tau on the new task: from scratch, of the old predictor, and of the old one refined."""
    old, new = cells.losses["cifar10"], cells.losses["cifar100"]
    rows, pool = cells.labels(25, seed), cells.table.take(cells.pool)
    first = fitted("stack", cells.table, old, cells.labels(n, seed), seed, pool)
    with TemporaryDirectory() as folder:
        first.save(Path(folder), with_data=True)
        loaded = load_predictor(folder, cells.table.space)
    wide = with_prediction(cells.table, loaded)
    scratch = fitted("stack", cells.table, new, rows, seed, pool)
    refined = fitted("refined", wide, new, rows, seed, wide.take(cells.pool))
    scores = {
        "from scratch": scratch.rank(cells.table),
        "as it is": loaded.rank(cells.table),
        "refined": refined.rank(wide),
    }
    return {name: kendall(said[cells.test], new[cells.test]) for name, said in scores.items()}


def _flasheval(suite: Suite) -> None:
    from searchlab.experiments.benchmarks._predictors_flasheval import run

    run(suite.journal, suite.quick)


def _ceiling(suite: Suite) -> None:
    from searchlab.experiments.benchmarks._predictors_flasheval import ceiling

    ceiling(suite.journal, suite.quick)


PARTS: dict[str, Callable[[Suite], None]] = {
    "few": lambda suite: suite.order((25, 78), TABULAR if suite.quick else (*TABULAR, "mfes")),
    "middle": lambda suite: suite.order((390,), MANY),
    "many": lambda suite: suite.order((781,), MANY),
    "times": Suite.times,
    "trained": lambda suite: suite.trained(tuple(TAU_12)),
    "harm": Suite.harm,
    "intervals": lambda suite: suite.intervals(390),
    "transfer": lambda suite: suite.transfer(781),
    "classes": lambda suite: suite.transfer(781, by_class=True),
    "experts": Suite.experts,
    "flasheval": _flasheval,
    "ceiling": _ceiling,
}
QUICK = ("few", "times")  # what the short form measures


def _parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part", action="append", choices=list(PARTS), help="only this part; may be repeated"
    )
    parser.add_argument("--folder", type=Path, help="keep finished seeds there")
    parser.add_argument("--minutes", type=float, help="begin no seed after so long")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments, add=_parts)
    folder, quick = data_folder("nasbench201"), bool(options.quick)
    cells, status = None if folder is None else read_cells(folder), 0
    found = Found(options.folder, np.inf if options.minutes is None else 60 * options.minutes)
    for name in options.part or (QUICK if quick else PARTS):
        journal = Journal("predictors", options, part=name)
        if cells is None:
            journal.skip(name, "no nasbench201 below $SEARCHLAB_DATA")
        else:
            try:
                PARTS[name](Suite(journal, cells, quick, found))
            except TimeoutError:
                print("stopped by --minutes; the same command goes on", file=sys.stderr)
                return 1
        # Read late: parts may run beside each other.
        journal.lines[:0] = other_parts(options, name)
        status = max(status, journal.close())
    return status


if __name__ == "__main__":
    sys.exit(main())
