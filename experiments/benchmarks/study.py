"""How fast the study writes, reads and looks up records; one JSON line per case.

    python -m searchlab.experiments.benchmarks.study [--quick] [--check] [--out F] [--folder DIR]

A case of writing includes building the rows from jobs and evaluations.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from searchlab.experiments.benchmarks._common import Aim, Journal, flags, spread
from searchlab.population import Evaluations, Jobs, Population
from searchlab.study import Database, MemoryRun, Store

_EVALUATOR = "ab" * 16


@dataclass(frozen=True)
class Case:
    """One measurement: `run(folder, records)` gives records per second."""

    name: str
    records: int
    run: Callable[[Path, int], float]
    aim: float | None = None


def _chunks(records: int, batch: int, genotype: int) -> list[tuple[Jobs, Evaluations, list[bytes]]]:
    rng = np.random.default_rng(0)
    out = []
    for first in range(0, records, batch):
        n = min(batch, records - first)
        keys = rng.bytes(16 * n)
        packed = rng.bytes(genotype * n)
        jobs = Jobs(
            ids=np.arange(first, first + n),
            population=Population({}),
            keys=tuple(keys[16 * i : 16 * i + 16] for i in range(n)),
            fidelity=0,
            told_at_ask=max(0, first - batch),
            origin=("vary",) * n,
            parents=rng.integers(0, first + 1, (n, 2)),
        )
        rows = [packed[genotype * i : genotype * (i + 1)] for i in range(n)]
        out.append((jobs, Evaluations(rng.random(n)), rows))
    return out


def _fill(store: Store, chunks: Sequence[tuple[Jobs, Evaluations, list[bytes]]]) -> float:
    """Seconds to record and commit all chunks, one transaction each."""
    started = time.perf_counter()
    for jobs, told, packed in chunks:
        store.record(jobs, told, packed=packed, evaluator=_EVALUATOR, started=1.0, finished=2.0)
        store.commit()
    return time.perf_counter() - started


def _open(folder: Path, durability: Any = "process", name: str = "a") -> Any:
    database = Database(folder / "study.db", durability=durability)
    return database.open_run(name, config={}, space="s", seed=0, out="", create=True)


def _write(durability: str, batch: int, genotype: int) -> Callable[[Path, int], float]:
    def run(folder: Path, records: int) -> float:
        chunks = _chunks(records, batch, genotype)
        store: Any = MemoryRun() if durability == "memory" else _open(folder, durability)
        try:
            return records / _fill(store, chunks)
        finally:
            store.close("finished")

    return run


def _read(folder: Path, records: int) -> float:
    run = _open(folder)
    _fill(run, _chunks(records, 1000, 32))
    started = time.perf_counter()
    count = len(run.records())
    taken = time.perf_counter() - started
    run.close("finished")
    return count / taken


def _lookup(other_runs: bool, batch: int) -> Callable[[Path, int], float]:
    def run(folder: Path, records: int) -> float:
        chunks = _chunks(records, 1000, 32)
        first = _open(folder)
        _fill(first, chunks)
        asking = _open(folder, name="b") if other_runs else first
        keys = [key for jobs, _, _ in chunks for key in jobs.keys]
        order = np.random.default_rng(1).permutation(len(keys))[: min(len(keys), 5000)]
        settings: Any = {"evaluator": _EVALUATOR, "fidelity": 0, "replicate": 0}
        found = 0
        started = time.perf_counter()
        for at in range(0, len(order), batch):
            part = [keys[i] for i in order[at : at + batch]]
            found += len(asking.lookup(part, other_runs=other_runs, **settings))
        taken = time.perf_counter() - started
        if found != len(order):
            raise RuntimeError(f"{found} of {len(order)} keys were found")
        for store in {id(first): first, id(asking): asking}.values():
            store.close("finished")
        return len(order) / taken

    return run


def cases(quick: bool) -> list[Case]:
    """All cases; the aims hold for the full sizes on one core of a server."""
    n = 2_000 if quick else 20_000
    large = 5_000 if quick else 100_000
    return [
        Case("memory, batch 100, 32 B", n, _write("memory", 100, 32)),
        Case("process, batch 100, 32 B", n, _write("process", 100, 32), aim=15_000),
        Case("process, batch 100, 400 B", n, _write("process", 100, 400)),
        Case("process, batch 100, 32 B, to 100k", large, _write("process", 100, 32), aim=15_000),
        Case("process, batch 8, 32 B", n // 2, _write("process", 8, 32)),
        Case("process, batch 1, 32 B", n // 4, _write("process", 1, 32)),
        Case("power, batch 100, 32 B", n, _write("power", 100, 32), aim=8_000),
        Case("power, batch 8, 32 B", n // 2, _write("power", 8, 32)),
        Case("power, batch 1, 32 B", n // 4, _write("power", 1, 32)),
        Case("read", large, _read, aim=50_000),
        Case("look up 100, own run", large, _lookup(False, 100)),
        Case("look up 100, other run", large, _lookup(True, 100)),
        Case("look up 1, other run", large, _lookup(True, 1)),
    ]


def _folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="where the files are made and removed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments, add=_folder)
    journal = Journal("study", options)
    for case in cases(options.quick):
        rates = []
        for _ in range(1 if options.quick else 5):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                rates.append(case.run(Path(folder), case.records))
        rate = spread([round(rate) for rate in rates])
        aims = []
        if case.aim is not None:
            # The sizes of the short form are too small for the aims of the full one.
            aims = [Aim("per s, median", rate["median"], "at least", case.aim, not options.quick)]
        figures = {"records": case.records, "per_s": rate, "sqlite": sqlite3.sqlite_version}
        journal.case(case.name, figures, aims=aims)
    return journal.close()


if __name__ == "__main__":
    sys.exit(main())
