"""Runs that are killed, a soak under faults, and memory; one JSON line per case.

    python -m searchlab.experiments.benchmarks.faults [--quick] [--check] [--out FILE]
        [--only NAMES] [--runs N] [--soak SECONDS] [--first SEED]

Every run of the kill cases is disturbed by a plan that follows from its seed (`Fault`s of
`searchlab.testing.faults`) and held against the run that nobody disturbed: equal traces, nothing
lost, nothing recorded evaluated again, no process left. `--only` takes names separated by commas:
kills, soak, memory, journal. `--quick` has few runs, a soak of seconds and 6,000 evaluations.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from searchlab.callbacks import Progress
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.evaluator import FunctionEvaluator
from searchlab.executors import LocalExecutor, ProcessExecutor
from searchlab.experiments.benchmarks._common import Aim, Journal, flags
from searchlab.search import run
from searchlab.space import Space
from searchlab.study import Database
from searchlab.testing.faults import (
    Hunter,
    Unreliable,
    config_of,
    descendants,
    disturbed,
    plan_of,
    recorded,
    undisturbed,
)
from searchlab.variables import Choice

CASES = ("kills", "soak", "memory", "journal")
EVALUATIONS = 60
BLOCK = 10  # runs of one line


def _none(name: str, value: float) -> Aim:
    return Aim(name, value, "at most", 0)


# -- kills --------------------------------------------------------------------------------------


def _kills(journal: Journal, runs: int, first: int, executor: str = "processes") -> None:
    """One random kill each, of a worker or of the driver; real processes."""
    wanted = undisturbed(EVALUATIONS).trace()
    done: Counter[str] = Counter()
    differ = lost = again = left = 0
    began = time.monotonic()
    seed, missed = first - 1, 0
    while sum(done.values()) < runs and missed < runs:
        seed += 1
        with tempfile.TemporaryDirectory() as name:
            outcome = disturbed(
                Path(name) / "run",
                plan_of(seed, EVALUATIONS),
                EVALUATIONS,
                plan_seed=seed,
                executor=("--executor", executor, "--workers", "2"),
            )
        done.update(fault.kind for fault in outcome.done)
        missed += not outcome.done  # it ended before anybody looked: the next plan takes its place
        wrong = outcome.records.trace() != wanted
        if wrong or outcome.lost or outcome.again or outcome.left:
            print(f"plan {seed}: {outcome.done}, {outcome.lost} {outcome.again}", file=sys.stderr)
        differ, lost = differ + wrong, lost + outcome.lost
        again, left = again + outcome.again, left + outcome.left
    journal.case(
        f"kills, {executor}, plans from {first}",
        {
            "runs": runs,
            "ended_before_the_kill": missed,
            "evaluations_each": EVALUATIONS,
            "killed": dict(done),
            "seconds": round(time.monotonic() - began, 1),
        },
        seeds=(first, seed),
        aims=[
            _none("traces that differ", differ),
            _none("records lost", lost),
            _none("evaluations begun although they were recorded", again),
            _none("processes left over", left),
            Aim("kills", sum(done.values()), "at least", runs),
        ],
    )


# -- soak ---------------------------------------------------------------------------------------


def _holdings() -> dict[str, float]:
    """What this process has of what may leak."""
    gc.collect()
    ours = ("psm_", "torch_", "sem.mp-", "searchlab")
    shared = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return {
        "processes": len(descendants(os.getpid())),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "shared_memory": sum(name.startswith(ours) for name in shared),
        "memory_mb": round(_memory_mb(), 1),
    }


def _memory_mb() -> float:
    """Memory that this process has for itself."""
    parts = Path("/proc/self/statm").read_text().split()
    return (int(parts[1]) - int(parts[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _soak(journal: Journal, seconds: float) -> None:
    """Run after run in one driver, with workers killed and stopped, answers late and twice."""
    wanted = undisturbed(EVALUATIONS).trace()
    hunter = Hunter(lambda: descendants(os.getpid()), 3, pause=(0.8, 1.8), stops=0.2)
    runs = differ = 0
    with tempfile.TemporaryDirectory() as name, hunter:

        def once(number: int) -> bool:
            hunter.armed = False
            executor = ProcessExecutor(workers=2, deadline=2.0, retries=30)
            path = Path(name) / f"{number}.db"
            disorder = Unreliable(executor, number)
            records = recorded(path, config_of(EVALUATIONS), disorder, callbacks=[hunter])
            path.unlink()
            return records.trace() == wanted

        once(0)  # what is loaded only once is no leak
        before = _holdings()
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            runs += 1
            differ += not once(runs)
        lasted = time.monotonic() - began
        after = _holdings()
    growth = after["memory_mb"] - before["memory_mb"]
    journal.case(
        "soak",
        {
            "seconds": round(lasted, 1),
            "runs": runs,
            "struck": dict(hunter.struck),
            "before": before,
            "after": after,
        },
        seeds=(3,),
        aims=[
            _none("traces that differ", differ),
            *[
                _none(f"more {what.replace('_', ' ')} than before", after[what] - before[what])
                for what in ("processes", "handles", "threads", "shared_memory")
            ],
            Aim("growth of the driver in MB", growth, "at most", 30),
            Aim("workers struck", hunter.strikes, "at least", seconds // 10),
        ],
    )


# -- memory -------------------------------------------------------------------------------------


def cheap(x: list[int]) -> float:
    """Costs nothing."""
    return float(sum(x))


def _memory(journal: Journal, evaluations: int, from_: int, limit: float) -> None:
    """The driver's memory while cheap evaluations go through the study."""
    space = Space(x=Choice(tuple(range(8)), shape=(32,)))
    evaluator = FunctionEvaluator(cheap, space, version=1)
    algorithm = AlgorithmSpec("evolution", {"quantum": 100})
    stage = Stage("search", space, evaluator, algorithm, Budget(evaluations))
    config = SearchConfig((stage,), seed=0, lag=100, chunk=100)
    seen: dict[int, float] = {}

    def look(progress: Progress) -> None:
        step = progress.finished // 5000 * 5000
        if step not in seen:
            gc.collect()
            seen[step] = _memory_mb()

    began, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "study.db"
        with Database(path) as base:
            store = base.open_run(
                "run", config=config.describe(), space=space.fingerprint, seed=0, out=""
            )
            run(config, store=store, executor=LocalExecutor(), callbacks=[look])
            gc.collect()
            seen[evaluations] = _memory_mb()
        size = path.stat().st_size
    last = max(seen)
    growth = seen[last] - seen[from_]
    journal.case(
        "memory of the driver",
        {
            "evaluations": evaluations,
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "memory_mb": {step: round(value, 1) for step, value in sorted(seen.items())},
            "from": from_,
            "growth_mb": round(growth, 2),
            "bytes_per_row": round(growth * 1e6 / (last - from_), 1),
            "bytes_per_row_in_the_file": round(size / evaluations, 1),
        },
        aims=[Aim("growth of the driver in MB", growth, "at most", limit)],
    )


# -- the journal --------------------------------------------------------------------------------


def _cuts(journal: Journal, stride: int) -> None:
    """A journal cut everywhere: whole batches from the first one on, whatever is missing."""
    config = config_of(12)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Database(folder / "study.db") as base:
            space = config.stages[0].space.fingerprint
            store = base.open_run("run", config=config.describe(), space=space, seed=0, out="")

            def copy(progress: Progress) -> None:
                for end in ("", "-wal"):
                    shutil.copy(folder / f"study.db{end}", folder / f"left.db{end}")

            run(config, store=store, callbacks=[copy])
        size = (folder / "left.db-wal").stat().st_size
        cuts = range(size, -1, -stride)
        counts, broken = [], 0
        for cut in cuts:
            (folder / "left.db-shm").unlink(missing_ok=True)
            os.truncate(folder / "left.db-wal", cut)
            try:
                counts.append(_whole_rows(folder / "left.db"))
            except (sqlite3.Error, ValueError):
                broken += 1
    journal.case(
        "journal cut",
        {"bytes": size, "cuts": len(cuts), "stride": stride, "records": counts[0]},
        aims=[
            _none("cuts that cannot be read", broken),
            _none("cuts that lose more than shorter ones", int((np.diff(counts) > 0).sum())),
        ],
    )


def _whole_rows(path: Path) -> int:
    uri = f"{path.as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        if not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            return 0
        ids = [i for (i,) in connection.execute("SELECT id FROM records ORDER BY id")]
        (counted,) = connection.execute("SELECT coalesce(sum(records), 0) FROM runs").fetchone()
    if ids != list(range(counted)):
        raise ValueError(f"{len(ids)} rows of {counted}")
    return len(ids)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases; returns the exit code."""
    options = flags(__doc__, arguments, add=_own_flags)
    journal = Journal("faults", options)
    quick = bool(options.quick)
    wanted = options.only.split(",")
    if "kills" in wanted:
        runs = options.runs or (2 if quick else 100)
        for first in range(options.first, options.first + runs, BLOCK):
            _kills(journal, min(BLOCK, options.first + runs - first), 100 * first)
    if "soak" in wanted:
        _soak(journal, options.soak or (4.0 if quick else 300.0))
    if "memory" in wanted:
        _memory(journal, *((6000, 5000, 50.0) if quick else (200_000, 50_000, 100.0)))
    if "journal" in wanted:
        _cuts(journal, 211 if quick else 1)
    return journal.close()


def _own_flags(parser: argparse.ArgumentParser) -> None:
    more: dict[str, Any] = {"--runs": int, "--soak": float}
    parser.add_argument("--only", default=",".join(CASES), help="of " + ", ".join(CASES))
    parser.add_argument("--first", type=int, default=0, help="seed of the first plan")
    for name, kind in more.items():
        parser.add_argument(name, type=kind)


if __name__ == "__main__":
    sys.exit(main())
