"""NAS-Bench-201: experts that learn the order of signals, beside the same network without them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from searchlab.experiments.benchmarks._common import Aim, Journal, spread
from searchlab.experiments.benchmarks._predictors_cells import Cells, bare, fitted, kendall

__all__ = ["Found", "run"]

EPOCHS = 30  # of step 1; step 2 has the predictor's own
LEADS = {25: 0.05, 78: 0.06, 390: 0.0}
TAUS = {25: 0.0, 78: 0.62, 390: 0.73}
SECONDS = 300.0  # of step 1, on a processor


@dataclass
class Found:
    """Taus of a seed that were measured already.

    Attributes:
        folder: one file per seed; None = nothing is kept.
        seconds: of the clock after which no further seed is begun.
    """

    folder: Path | None = None
    seconds: float = np.inf
    begun: float = field(default_factory=time.monotonic)

    def of(self, cells: Cells, seed: int, sizes: tuple[int, ...]) -> dict[str, Any] | None:
        """What `_measured` says; None = it is not there and no further seed may begin."""
        file = None if self.folder is None else self.folder / f"experts-{seed}.json"
        if file is not None and file.exists():
            known: dict[str, Any] = json.loads(file.read_text("utf-8"))
            if known["sizes"] == list(sizes):
                return known
        if time.monotonic() - self.begun > self.seconds:
            return None
        row = _measured(cells, seed, sizes)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(row), "utf-8")
        return row


def _measured(cells: Cells, seed: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Taus on the test cells for each number of labels, and seconds of the processor.

    Step 1 is that of the seed and is made once; networks without experts have no step 1, and the
    same step 2.
    """
    from searchlab.predictors.dele import Dele

    losses, shown, none = cells.losses["cifar10"], cells.table, bare(cells.table)
    pool, test = shown.take(cells.pool), shown.take(cells.test)
    dele = Dele(pretrain=EPOCHS)
    start = time.process_time()
    dele.imitate(pool, seed=seed)
    row: dict[str, Any] = {"sizes": list(sizes), "step_1_cpu_s": time.process_time() - start}
    for n in sizes:
        rows = cells.labels(n, seed)
        start = time.process_time()
        dele.fit(shown.take(rows), losses[rows], seed=seed, pool=pool)
        seconds = time.process_time() - start
        plain = Dele()
        plain.fit(none.take(rows), losses[rows], seed=seed)
        dynamic = fitted("dynamic", shown, losses, rows, seed, pool)
        truth = losses[cells.test]
        row[str(n)] = {
            "dele": kendall(dele.rank(test), truth),
            "without experts": kendall(plain.rank(none.take(cells.test)), truth),
            "dynamic": kendall(dynamic.rank(test), truth),
            "step_2_cpu_s": seconds,
        }
    return row


def run(journal: Journal, cells: Cells, sizes: tuple[int, ...], seeds: range, found: Found) -> bool:
    """Cases of `dele` and `dynamic`; False = stopped before all seeds were there."""
    rows = [found.of(cells, seed, sizes) for seed in seeds]
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return False
    first = [row["step_1_cpu_s"] for row in known]
    for n in sizes:
        parts = [row[str(n)] for row in known]
        taus = {name: [part[name] for part in parts] for name in ("dele", "without experts")}
        means = {name: float(np.mean(values)) for name, values in taus.items()}
        figures = {
            "predictor": "dele",
            "labels": n,
            "tau": {name: spread(values) for name, values in taus.items()},
            "step_1_cpu_s": spread(first),
            "step_2_cpu_s": spread([part["step_2_cpu_s"] for part in parts]),
        }
        lead = means["dele"] - means["without experts"]
        journal.case(
            f"experts: dele, {n} labels",
            figures,
            seeds=seeds,
            aims=[
                Aim("lead over no experts", lead, "at least", LEADS[n]),
                Aim("mean tau", means["dele"], "at least", TAUS[n]),
                Aim("processor seconds of step 1", max(first), "at most", SECONDS),
            ],
        )
        figures = {"predictor": "dynamic", "labels": n}
        figures["tau"] = spread([part["dynamic"] for part in parts])
        journal.case(f"experts: dynamic, {n} labels", figures, seeds=seeds)
    return True
