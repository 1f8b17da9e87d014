"""Worker processes: one trace whatever happens, and how busy they are; one JSON line per case.

    python -m searchlab.experiments.benchmarks.executors [--quick] [--check] [--out FILE]

Candidates sleep for 5 to 50 ms, a function of the candidate. The ideal throughput is that of
workers that never wait; `limit_of_the_lag` is what the order of results leaves of it. The traces of
1, 2 and 8 workers, of workers that are killed again and again, and of a driver that is killed with
SIGKILL three times are held against the trace of one process. `--quick` has fewer candidates and at
most 4 workers.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.evaluator import Evaluator, FunctionEvaluator
from searchlab.executors import Executor, LocalExecutor, ProcessExecutor
from searchlab.experiments.benchmarks._common import Aim, Journal, flags, spread
from searchlab.loop import Callback
from searchlab.population import OK
from searchlab.records import Records
from searchlab.search import run
from searchlab.space import Space
from searchlab.study import MemoryRun
from searchlab.testing.faults import Hunter, recorded, stored
from searchlab.variables import Choice, Integer, Real

LAG = 16
KILLS = 3  # of the driver
LOG = "SEARCHLAB_BENCHMARK_LOG"


def _space() -> Space:
    return Space(kind=Choice(tuple(range(8)), shape=(16,)), x=Real(0, 1), n=Integer(0, 99))


def _fraction(kind: list[int], x: float, n: int) -> float:
    """A number in [0, 1) that looks random."""
    return (sum(k * (i + 1.7) for i, k in enumerate(kind)) * 0.618 + x * 97.3 + n * 0.377) % 1


def _score(kind: list[int], x: float, n: int) -> float:
    return sum(kind) + (x - 0.3) ** 2 + abs(n - 40) / 10


def sleeper(kind: list[int], x: float, n: int) -> float:
    """Sleeps for 5 to 50 ms; one candidate of fifty raises."""
    fraction = _fraction(kind, x, n)
    if LOG in os.environ:
        with open(os.environ[LOG], "a", encoding="utf-8") as file:
            file.write(f"{'-'.join(map(str, kind))}/{x!r}/{n}\n")
    time.sleep(0.005 + 0.045 * fraction)
    if fraction * 7919 % 1 < 0.02:
        raise ValueError("one of fifty")
    return _score(kind, x, n)


def neighbourly(plans: list[dict[str, Any]], fidelity: str, seed: int) -> list[float]:
    """Values depend on all rows before and on their number, as a device's kernels may."""
    carried, out = 0.1 * len(plans), []
    for plan in plans:
        carried = 0.25 * carried + _score(**plan)
        out.append(carried)
    time.sleep(0.005 + 0.02 * (carried * 7919 % 1))
    return out


def _config(evaluator: Evaluator, budget: int, *, quantum: int = 1, chunk: int = 1) -> SearchConfig:
    algorithm = AlgorithmSpec("evolution", {"quantum": quantum})
    stage = Stage("search", _space(), evaluator, algorithm, Budget(budget))
    return SearchConfig((stage,), seed=7, lag=LAG, chunk=chunk)


def _sleeping(budget: int) -> SearchConfig:
    return _config(FunctionEvaluator(sleeper, _space(), version=1), budget)


def _neighbouring(budget: int) -> SearchConfig:
    evaluator = FunctionEvaluator(neighbourly, _space(), batch=True, reproducibility="batch")
    return _config(evaluator, budget, quantum=8, chunk=4)


def _records(config: SearchConfig, executor: Executor, *callbacks: Callback) -> Records:
    store = MemoryRun()
    run(config, store=store, executor=executor, callbacks=callbacks)
    return store.records()


def _paid_twice(records: Records) -> int:
    """Candidates that were evaluated more than once although their first value was good."""
    keys = [records.keys[i] for i in np.flatnonzero((records.state == OK) & ~records.cached)]
    return len(keys) - len(set(keys))


def _equal(name: str, differs: int) -> Aim:
    return Aim(name, differs, "at most", 0)


def _traces(journal: Journal, wanted: Records, workers: Sequence[int], budget: int) -> None:
    for count in workers:
        executor = ProcessExecutor(workers=count)
        began = time.process_time()
        records = _records(_sleeping(budget), executor)
        cpu = time.process_time() - began
        usage = executor.usage()
        nominal = _nominal_seconds(records)
        figures = {
            "workers": count,
            "lag": LAG,
            "evaluations": len(records),
            "seconds": round(usage.wall_s, 3),
            "share_of_ideal": round(float(nominal.sum()) / count / usage.wall_s, 4),
            "limit_of_the_lag": round(_limit(nominal, LAG, count), 4),
            "busy": round(usage.utilisation, 4),
            "driver_cpu_ms_per_evaluation": round(1e3 * cpu / len(records), 3),
        }
        aims = [
            _equal("traces that differ", int(records.trace() != wanted.trace())),
            _equal("evaluations paid twice", _paid_twice(records)),
        ]
        journal.case(f"trace, {count} workers", figures, seeds=(7,), aims=aims)


def _throughput(journal: Journal, workers: int, budget: int, repeats: int) -> None:
    """How busy workers are, with an order of results and without, beside processes that only sleep.

    The three take turns: a shared machine stops for tens of milliseconds now and then.
    """
    shares: dict[int | Literal["free"], list[float]] = {LAG: [], "free": []}
    bare: list[float] = []
    seconds: dict[int | Literal["free"], NDArray[np.float64]] = {}
    for _ in range(repeats):
        for lag, found in shares.items():
            executor = ProcessExecutor(workers=workers)
            records = _records(replace(_sleeping(budget), lag=lag), executor)
            seconds[lag] = _nominal_seconds(records)
            found.append(float(seconds[lag].sum()) / workers / executor.usage().wall_s)
        bare.append(_bare(seconds[LAG], workers))
    for lag, least in zip(shares, (0.95, 0.97), strict=True):
        share = statistics.median(shares[lag])
        figures: dict[str, Any] = {
            "workers": workers,
            "evaluations": budget,
            "share_of_ideal": spread(shares[lag]),
        }
        if lag == LAG:
            figures["limit_of_the_lag"] = round(_limit(seconds[LAG], LAG, workers), 4)
        figures["processes_that_only_sleep"] = spread(bare)
        # A quick run mostly shows how the last evaluations are waited for.
        binding = not journal.options.quick
        aim = Aim("share of the ideal throughput", share, "at least", least, binding=binding)
        journal.case(f"throughput, lag {lag}", figures, seeds=(7,), aims=[aim])


SLEEPER = """
import json, sys, time
began = time.perf_counter()
for seconds in json.load(sys.stdin):
    time.sleep(seconds)
print(time.perf_counter() - began)
"""


def _bare(seconds: NDArray[np.float64], workers: int) -> float:
    """The share of processes that do nothing but sleep for so long, each every n-th time."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SLEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(workers)
    ]
    for i, process in enumerate(processes):
        assert process.stdin is not None
        process.stdin.write(json.dumps(seconds[i::workers].tolist()))
        process.stdin.close()
        process.stdin = None
    return float(seconds.sum()) / sum(float(process.communicate()[0]) for process in processes)


def _nominal_seconds(records: Records) -> NDArray[np.float64]:
    """How long each evaluation sleeps, float64 (n,), by id."""
    population = _space().unpack(records.genotypes)
    return np.array([0.005 + 0.045 * _fraction(**plan) for plan in _space().decode(population)])


def _limit(seconds: NDArray[np.float64], lag: int, workers: int) -> float:
    """The share of the ideal throughput with a lag if nothing but the evaluations took time."""
    free = [0.0] * workers
    told: list[float] = []  # when all evaluations up to each one had ended
    for number, length in enumerate(seconds.tolist()):
        start = max(heapq.heappop(free), told[number - lag] if number >= lag else 0.0)
        heapq.heappush(free, start + length)
        told.append(max(told[-1] if told else 0.0, start + length))
    return float(seconds.sum()) / workers / told[-1]


def _killed_workers(journal: Journal, wanted: Records, workers: int, every: float) -> None:
    executor = ProcessExecutor(workers=workers, retries=20)
    with Hunter(executor.pids, 1, pause=(every, every)) as hunter:
        records = _records(_sleeping(len(wanted)), executor, hunter)
    usage = executor.usage()
    journal.case(
        "trace, killed workers",
        {
            "workers": workers,
            "kill_every_s": every,
            "kills": hunter.strikes,
            "repeated": usage.repeats,
            "seconds": round(usage.wall_s, 3),
            "busy": round(usage.utilisation, 4),
        },
        seeds=(7,),
        aims=[
            _equal("traces that differ", int(records.trace() != wanted.trace())),
            _equal("evaluations paid twice", _paid_twice(records)),
            Aim("kills", hunter.strikes, "at least", 1),
        ],
    )


# -- a driver that is killed --------------------------------------------------------------------


def _killed_driver(journal: Journal, wanted: Records, workers: int) -> None:
    budget, kills, recorded = len(wanted), 0, 0
    draw = random.Random(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "log"
        more = ["--drive", name, "--budget", str(budget), "--workers", str(workers)]
        command = [sys.executable, "-m", __spec__.name if __spec__ else "", *more]
        for attempt in range(KILLS + 1):
            target = draw.randint(budget * attempt // 4 + 1, budget * (attempt + 1) // 4 - 1)
            process = subprocess.Popen(command, env={**os.environ, LOG: str(log)})
            while attempt < KILLS and process.poll() is None:
                records = stored(folder)
                if records is not None and len(records) >= target:
                    process.kill()
                    kills += 1
                    break
                time.sleep(0.01)
            process.wait()
            if attempt < KILLS:
                now = stored(folder)
                recorded = 0 if now is None else len(now)
        records = stored(folder)
        calls = log.read_text("utf-8").split()
    assert records is not None
    # Lost with the driver: what was at work, or done and not recorded, and the first measurement.
    again = len(calls) - len(set(calls))
    journal.case(
        "trace, killed driver",
        {
            "workers": workers,
            "kills": kills,
            "recorded_at_last_kill": recorded,
            "begun_again": again,
        },
        seeds=(7,),
        aims=[
            _equal("traces that differ", int(records.trace() != wanted.trace())),
            _equal("evaluations paid twice", _paid_twice(records)),
            Aim("kills", kills, "at least", KILLS),
            Aim("evaluations begun again", again, "at most", LAG * KILLS + 4),
        ],
    )


def _neighbours(journal: Journal, workers: Sequence[int], budget: int) -> None:
    wanted = _records(_neighbouring(budget), LocalExecutor())
    for count in workers:
        executor = ProcessExecutor(workers=count)
        records = _records(_neighbouring(budget), executor)
        journal.case(
            f"neighbours, {count} workers",
            {"workers": count, "evaluations": len(records)},
            seeds=(7,),
            aims=[
                _equal("traces that differ", int(records.trace() != wanted.trace())),
                _equal("evaluations paid twice", _paid_twice(records)),
            ],
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases; returns the exit code."""
    options = flags(__doc__, arguments, add=_own_flags)
    if options.drive is not None:
        executor = ProcessExecutor(workers=options.workers)
        recorded(options.drive / "study.db", _sleeping(options.budget), executor)
        return 0
    journal = Journal("executors", options)
    workers: tuple[int, ...] = (1, 4) if options.quick else (1, 2, 8)
    budget, every = (120, 0.5) if options.quick else (1500, 2.0)
    wanted = _records(_sleeping(budget), LocalExecutor())
    _traces(journal, wanted, workers, budget)
    _throughput(journal, max(workers), budget, 1 if options.quick else 5)
    _killed_workers(journal, wanted, max(workers), every)
    _killed_driver(journal, wanted, max(workers))
    _neighbours(journal, workers, budget)
    return journal.close()


def _own_flags(parser: argparse.ArgumentParser) -> None:
    for name, kind in (("--drive", Path), ("--budget", int), ("--workers", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)


if __name__ == "__main__":
    sys.exit(main())
