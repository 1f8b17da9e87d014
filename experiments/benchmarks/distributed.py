"""A cluster of Ray: busy workers, cheap evaluations, the driver's cost; one JSON line per case.

    python -m searchlab.experiments.benchmarks.distributed [--quick] [--check] [--out FILE]

Large clusters are stood in for by candidates that sleep for a time that follows from the candidate:
8 actors of 8 threads are 64 workers. `share_of_ideal` is against workers that never wait, from the
first start to the last end; `steady` is the share of the workers' time that was spent in
evaluations up to the last start, without the end at which nothing is left to begin;
`limit_of_the_lag` is what the order of results leaves if nothing else takes time. Ray Tune runs the
same sleeping candidates in the same process. The last cases use real nodes (`ray start`): solver
schedules are searched on two, with the trace held against that of worker processes, 20 runs lose
a worker, a node or their driver, and for five minutes runs go on while their workers are killed.

The long form takes a quarter of an hour on a machine with nothing else to do; with `--part NAMES
--out FILE --join` it is run piece by piece into one file. `--quick` has fewer workers, shorter
evaluations, every path of ours once, and neither Ray Tune nor further nodes.
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.evaluator import FunctionEvaluator
from searchlab.executors import Chunk, Executor, RayExecutor
from searchlab.experiments.benchmarks._common import Aim, Journal, flags
from searchlab.experiments.benchmarks._distributed_kills import run_kills
from searchlab.experiments.benchmarks._distributed_soak import run_soak
from searchlab.experiments.benchmarks._distributed_tune import run_tune
from searchlab.population import Evaluations, Jobs
from searchlab.records import Records
from searchlab.search import run
from searchlab.space import Space
from searchlab.study import Database, MemoryRun
from searchlab.testing.evaluator import jobs_of
from searchlab.testing.ray_nodes import Node, environment, head
from searchlab.uniforms import uniforms
from searchlab.variables import Choice, Integer, Real

Shape = Literal["uniform", "lognormal"]
SEED = 7


def _space() -> Space:
    return Space(kind=Choice(tuple(range(8)), shape=(16,)), x=Real(0, 1), n=Integer(0, 99))


def _fraction(kind: Sequence[int], x: float, n: int) -> float:
    """A number in [0, 1) that looks random."""
    return (sum(k * (i + 1.7) for i, k in enumerate(kind)) * 0.618 + x * 97.3 + n * 0.377) % 1


def _length(plan: dict[str, Any], shape: Shape, mean: float) -> float:
    """How long a candidate takes: mean +-50 %, or lognormal with sigma 1; seconds."""
    fraction = _fraction(**plan)
    if shape == "uniform":
        return mean * (0.5 + fraction)
    z = statistics.NormalDist().inv_cdf(min(max(fraction, 1e-4), 1 - 1e-4))
    return mean * float(np.exp(z - 0.5))


class Sleeper(FunctionEvaluator):
    """Takes as long as its candidates say, what it computes included; values do not matter here."""

    thread_safe = True

    def __init__(self, shape: Shape, mean: float) -> None:
        super().__init__(_fraction, _space(), version=1)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "mean", mean)

    def evaluate(self, jobs: Jobs) -> Evaluations:
        began = time.perf_counter()
        shape: Shape = vars(self)["shape"]
        plans = self.space.decode(jobs.population)
        until = began + sum(_length(plan, shape, vars(self)["mean"]) for plan in plans)
        values = np.array([_fraction(**plan) for plan in plans])
        time.sleep(max(0.0, until - time.perf_counter()))
        return Evaluations(values)


def _config(evaluator: FunctionEvaluator, budget: int, **more: Any) -> SearchConfig:
    algorithm = AlgorithmSpec("evolution", {"quantum": more.pop("quantum", 1)})
    stage = Stage("search", evaluator.space, evaluator, algorithm, Budget(budget))
    return SearchConfig((stage,), seed=SEED, **more)


def _executor(actors: int, threads: int = 1) -> RayExecutor:
    """On the cluster that this process has joined."""
    return RayExecutor(workers=actors, at_once=threads, cpus=0.01)


@contextmanager
def _joined() -> Iterator[None]:
    """A connection to a cluster of one node for all cases in this process."""
    import ray

    with head(cpus=1) as (address, _):
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()


def _records(config: SearchConfig, executor: Executor) -> Records:
    store = MemoryRun()
    run(config, store=store, executor=executor)
    return store.records()


# -- busy workers -----------------------------------------------------------------------------


def _lengths(records: Records, shape: Shape, mean: float) -> NDArray[np.float64]:
    plans = _space().decode(_space().unpack(records.genotypes))
    return np.array([_length(plan, shape, mean) for plan in plans])


def _limit(seconds: NDArray[np.float64], lag: float, workers: int) -> tuple[float, float]:
    """Share of the ideal with a lag if nothing but evaluations took time: in all, and steady."""
    free = [0.0] * workers
    told: list[float] = []  # when all evaluations up to each one had ended
    starts: list[float] = []
    for number, length in enumerate(seconds.tolist()):
        start = max(heapq.heappop(free), told[number - int(lag)] if number >= lag else 0.0)
        starts.append(start)
        heapq.heappush(free, start + length)
        told.append(max(told[-1] if told else 0.0, start + length))
    whole = float(seconds.sum()) / workers / told[-1]
    return whole, _steady(np.array(starts), np.array(starts) + seconds, workers)


def _steady(started: NDArray[np.float64], finished: NDArray[np.float64], workers: int) -> float:
    """Share of the workers' time in evaluations, from the first start to the last one."""
    last = started.max()
    return float((np.minimum(finished, last) - started).sum() / workers / (last - started.min()))


def _busy(
    journal: Journal,
    shape: Shape,
    mean: float,
    budget: int,
    lag: int | Literal["free"],
    size: tuple[int, int],
    *,
    aim: tuple[str, float] | None,
) -> None:
    actors, threads = size
    workers = actors * threads
    executor = _executor(actors, threads)
    config = _config(Sleeper(shape, mean), budget, lag=lag)
    cpu = time.process_time()
    records = _records(config, executor)
    cpu = time.process_time() - cpu
    seconds = _lengths(records, shape, mean)
    bound, steady_bound = _limit(seconds, np.inf if lag == "free" else lag, workers)
    started, finished = records.started, records.finished
    wall = float(finished.max() - started.min())
    figures = {
        "workers": workers,
        "lag": lag,
        "evaluations": len(records),
        "mean_s": round(float(seconds.mean()), 3),
        "longest_s": round(float(seconds.max()), 2),
        "seconds": round(wall, 2),
        "share_of_ideal": round(float(seconds.sum()) / workers / wall, 4),
        "limit_of_the_lag": round(bound, 4),
        "steady": round(_steady(started, finished, workers), 4),
        "steady_limit_of_the_lag": round(steady_bound, 4),
        "driver_cpu_ms_per_evaluation": round(1e3 * cpu / len(records), 3),
    }
    aims = []
    if aim is not None:
        name, least = aim
        aims = [
            Aim(name, float(figures[name]), "at least", least, binding=not journal.options.quick)
        ]
    journal.case(f"{shape} times, lag {lag}", figures, seeds=(SEED,), aims=aims)


def _by_lag(journal: Journal, mean: float, budget: int, workers: int) -> None:
    """What each lag leaves of a cluster, in virtual time."""
    space = _space()
    drawn = space.decode(space.sample(uniforms(SEED, 0, 0, budget, space.sample_width)))
    figures: dict[str, Any] = {"workers": workers, "evaluations": budget}
    for shape in ("uniform", "lognormal"):
        seconds = np.array([_length(plan, shape, mean) for plan in drawn])
        figures[shape] = {
            str(lag): round(_limit(seconds, lag, workers)[1], 3)
            for lag in [workers * 2**i for i in range(6)] + [np.inf]
        }
    journal.case("utilisation by lag, virtual time", figures, seeds=(SEED,))


# -- cheap evaluations, and the driver ------------------------------------------------------------


def _cheap(journal: Journal, mean: float, budget: int, least: float, chunk: int) -> None:
    """Chunks through the executor alone, then the same through a search."""
    evaluator = Sleeper("uniform", mean)
    space = evaluator.space
    population = space.sample(uniforms(SEED, 0, 0, budget, space.sample_width))
    jobs = jobs_of(space, population)
    executor = _executor(2)
    executor.start((evaluator,))
    parts = [jobs.take(range(i, min(i + chunk, budget))) for i in range(0, budget, chunk)]
    for part in parts[:8]:  # connections are made, durations are known
        executor.submit(Chunk(part))
    _collect(executor, 8)
    began, cpu = time.perf_counter(), time.process_time()
    for part in parts:
        executor.submit(Chunk(part))
    _collect(executor, len(parts))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    executor.close()
    searching = _executor(2)
    config = _config(evaluator, budget, quantum=10 * chunk, chunk=chunk, lag=50 * chunk)
    records = _records(config, searching)
    wall = float(records.finished.max() - records.started.min())
    through = len(records) / wall
    rate = budget / seconds
    quick = bool(journal.options.quick)
    journal.case(
        f"evaluations of {1e3 * mean:g} ms, two actors",
        {
            "evaluations": budget,
            "chunk": chunk,
            "per_s": round(rate, 1),
            "limit_per_s": round(2 / mean, 1),
            "driver_cpu_ms_per_evaluation": round(1e3 * cpu / budget, 4),
            "per_s_through_a_search": round(through, 1),
        },
        seeds=(SEED,),
        aims=[
            Aim("evaluations per second", rate, "at least", least, binding=not quick),
            Aim("the same in a search", through, "at least", least, binding=not quick),
        ],
    )


def _collect(executor: Executor, n: int) -> None:
    while n > 0:
        n -= len(executor.wait(1.0))


def _thousand(journal: Journal, mean: float, budget: int, actors: int, threads: int) -> None:
    executor = _executor(actors, threads)
    evaluator = Sleeper("uniform", mean)
    workers = executor.workers
    config = _config(evaluator, budget, quantum=max(1, workers // 4), chunk=1, lag=2 * workers)
    spent: list[float] = []
    store = MemoryRun()
    run(
        config,
        store=store,
        executor=executor,
        callbacks=(lambda progress: spent.append(time.process_time()),),
    )
    records = store.records()
    cost = 1e3 * (spent[-1] - spent[0]) / (len(records) - 1)
    journal.case(
        "driver of many workers",
        {
            "workers": workers,
            "evaluations": len(records),
            "steady": round(_steady(records.started, records.finished, workers), 4),
            "driver_cpu_ms_per_evaluation": round(cost, 4),
        },
        seeds=(SEED,),
        aims=[
            Aim(
                "driver's ms per candidate",
                cost,
                "at most",
                1.0,
                binding=not journal.options.quick,
            )
        ],
    )


# -- two real nodes -------------------------------------------------------------------------------


def _room(journal: Journal, budget: int) -> None:
    """The solver-schedule room on two nodes, and on worker processes."""
    with tempfile.TemporaryDirectory() as name, head(cpus=1) as (address, _):
        second = Node("--num-cpus", "1", address=address).wait()
        try:
            there, figures = _schedules(Path(name, "ray"), budget, "ray", "--ray-address", address)
        finally:
            second.kill()
        here, plain = _schedules(Path(name, "processes"), budget, "processes")
    journal.case(
        "solver schedules on two nodes",
        {"ray": figures, "processes": plain},
        aims=[
            Aim("traces that differ", int(there.trace() != here.trace()), "at most", 0),
            # Each node has room for one of the two workers.
            Aim("workers that evaluated", len(figures["by_worker"]), "at least", 2),
        ],
    )


def _schedules(
    folder: Path, budget: int, executor: str, *more: str
) -> tuple[Records, dict[str, Any]]:
    """One run of the command line in a folder of its own, so that no cache answers."""
    folder.mkdir()
    words = ["run", "solver_schedule", "--nfe", "5", "--budget", str(budget), "--name", "room"]
    words += ["--executor", executor, "--workers", "2", "--quiet", *more]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "searchlab", *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{words}: {done.stderr[-2000:]}")
    seconds = time.perf_counter() - began
    result = json.loads((folder / "runs" / "room" / "result.json").read_text("utf-8"))
    with Database(folder / "runs" / "searchlab.db") as base:
        records = base.read("room").records()
    return records, {
        "seconds": round(seconds, 1),
        "evaluations": len(records),
        "busy": result["usage"]["utilisation"],
        "by_worker": _shares(records),
        "verdict": result["verdict"],
    }


def _shares(records: Records) -> dict[str, int]:
    names, counts = np.unique(
        [w for w in records.worker if w not in ("", "cache")], return_counts=True
    )
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


PARTS = ("busy", "tails", "cheap", "driver", "tune", "nodes", "kills", "soak")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases; returns the exit code."""
    options = flags(__doc__, arguments, add=_own_flags)
    environment()
    journal = Journal("distributed", options)
    if {"busy", "tails", "cheap", "driver"} & set(options.part):
        with _joined():
            (_short if options.quick else _sleeping)(journal)
    elsewhere: tuple[tuple[str, str, Callable[[], None]], ...] = (
        ("tune", "ray tune, uniform times", lambda: _tune(journal)),
        ("nodes", "solver schedules on two nodes", lambda: _room(journal, 200)),
        ("kills", "runs with a kill each", lambda: run_kills(journal, 20)),
        ("soak", "soak", lambda: run_soak(journal, 300.0)),
    )
    for part, name, case in elsewhere:
        if part in options.part:
            if options.quick:
                journal.skip(name, "not in the short form")
            else:
                case()
    return journal.close()


def _short(journal: Journal) -> None:
    """Both kinds of lag and of times, chunks alone and in a search, many threads."""
    size = (2, 4)
    _busy(journal, "uniform", 0.2, 80, 16, size, aim=("share_of_ideal", 0.95))
    _busy(journal, "lognormal", 0.2, 80, "free", size, aim=("steady", 0.9))
    _by_lag(journal, 0.2, 80, 8)
    _cheap(journal, 1e-4, 4_000, 5_000, 20)
    _thousand(journal, 0.5, 200, 1, 40)


def _sleeping(journal: Journal) -> None:
    """What runs on the cluster that this process has joined."""
    part, size, budget = journal.options.part, (8, 8), 2560
    if "busy" in part:
        for lag in ("free", 128):
            _busy(journal, "uniform", 1.0, budget, lag, size, aim=("share_of_ideal", 0.95))
    if "tails" in part:
        _busy(journal, "lognormal", 1.0, budget, "free", size, aim=("steady", 0.9))
        _busy(journal, "lognormal", 1.0, budget, 512, size, aim=None)
        _by_lag(journal, 1.0, budget, 64)
    if "cheap" in part:
        _cheap(journal, 1e-4, 100_000, 5_000, 20)
        _cheap(journal, 1e-3, 20_000, 1_800, 20)
    if "driver" in part:
        _thousand(journal, 2.0, 10_000, 8, 125)


def _tune(journal: Journal) -> None:
    run_tune(journal, lambda plan: _length(plan, "uniform", 1.0), _steady, 2560, 64)


def _own_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, help="not all of it")


if __name__ == "__main__":
    sys.exit(main())
