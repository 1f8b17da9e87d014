"""Guided search: evaluations saved, few evaluations, and what the guard prevents.

    python -m searchlab.experiments.benchmarks.guided [--quick] [--check] [--out FILE]
        [--part NAME]... [--folder FOLDER] [--minutes M]

NAS-Bench-201 is read below $SEARCHLAB_DATA; its cases are skipped where it is not. All searches are
in memory, one evaluation after another unless a lag is given; peers have the same instances and
seeds. Seconds are CPU time of proposing, fits included.

With `--folder` finished searches are kept there, so that a benchmark which was stopped, by
`--minutes` too, goes on; a case is written when all of its searches are there. With `--part` and
`--out` the lines of the other parts stay in the file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Told
from searchlab.algorithms.guided import Guided
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.evaluator import Signal
from searchlab.evaluators.nasbench201 import nasbench201
from searchlab.evaluators.table import TableEvaluator
from searchlab.experiments.benchmarks._algorithms_choices import PLACES
from searchlab.experiments.benchmarks._common import (
    Aim,
    Journal,
    data_folder,
    flags,
    other_parts,
    spread,
)
from searchlab.experiments.benchmarks._guided_searches import (
    Kept,
    Task,
    Trace,
    cells,
    landscape,
    made,
    mixture,
    searched,
    string,
)
from searchlab.population import Population
from searchlab.predictor import Predictor, Table
from searchlab.predictors.gp import GaussianProcess
from searchlab.search import run
from searchlab.space import Space
from searchlab.study import MemoryRun

__all__ = ["main"]

Floats = NDArray[np.float64]
TOP = 16  # cells of NAS-Bench-201 that count as found
FEW = (20, 30, 50)
PARTS = ("strings", "cells", "few", "few_gp", "guard", "decisions", "fidelities")


# -- evaluations that are saved -----------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What the parts share."""

    journal: Journal
    kept: Kept
    quick: bool
    evaluator: TableEvaluator | None

    def seeds(self, count: int, short: int) -> range:
        return range(short if self.quick else count)

    def traces(
        self,
        make: Callable[[int], Task],
        label: str,
        seeds: Sequence[int],
        most: int,
        name: str,
        *,
        lag: int = 1,
        until: float = -np.inf,
        **options: Any,
    ) -> list[Trace]:
        """Searches of one kind, by the algorithm of a name."""
        task = make(seeds[0])

        def search(seed: int) -> Trace:
            task = make(seed)
            return searched(made(task, name, seed, **options), task, most, lag=lag, until=until)

        kind = f"{task.name}, {label}, {most}, lag {lag}"
        return [self.kept.trace(kind, seed, partial(search, seed)) for seed in seeds]


def _proposing(traces: Sequence[Trace]) -> float:
    total = sum(len(trace.losses) for trace in traces)
    return round(sum(trace.seconds for trace in traces) / total, 5)


def strings(bench: Bench) -> None:
    """Evaluations until a hidden string of 32 choices of 8 is found."""
    for predictor, limit, count in (("ridge", 350, 15), ("stack", 400, 5)):
        for lag in (1,) if bench.quick else (1, 16):
            if bench.quick and predictor == "stack":
                continue
            seeds = bench.seeds(count, 1)
            traces = bench.traces(
                string, predictor, seeds, 1000, "guided", lag=lag, until=0.0, predictor=predictor
            )
            counts = [len(trace.losses) for trace in traces]
            median = statistics.median(counts)
            bench.journal.case(
                f"{PLACES} choices of 8, hidden string, guided by {predictor}, lag {lag}",
                {
                    "evaluations": spread(counts),
                    "proposing, s per evaluation": _proposing(traces),
                },
                seeds=seeds,
                aims=[Aim("median evaluations", median, "at most", limit, not bench.quick)],
            )


def top_cells(bench: Bench) -> None:
    """How many seeds find one of the best 16 cells within 50 and within 100 evaluations."""
    evaluator = bench.evaluator
    assert evaluator is not None
    top = float(np.sort(-evaluator.values()[:, 0])[TOP - 1])
    rows: tuple[tuple[str, str, dict[str, Any], Any, int], ...] = (
        ("auto, signals", "auto", {}, evaluator, 50),
        ("auto, no signals", "auto", {}, None, 50),
        ("evolution", "evolution", {}, None, 50),
        ("Optuna TPE", "tpe", {}, None, 50),
        ("random", "random", {}, None, 50),
    )
    for what, name, options, signals, count in rows:
        seeds = bench.seeds(count, 2)
        task = cells(evaluator, signals=signals)
        traces = bench.traces(lambda _: task, what, seeds, 100, name, until=top, **options)  # noqa: B023
        needed = [len(t.losses) if t.losses[-1] <= top else np.inf for t in traces]
        share = {mark: 100 * float(np.mean(np.array(needed) <= mark)) for mark in (50, 100)}
        aims = []
        if what == "auto, signals":
            aims = [
                Aim("% of seeds by 50", share[50], "at least", 85, not bench.quick),
                Aim("% of seeds by 100", share[100], "at least", 98, not bench.quick),
            ]
        bench.journal.case(
            f"{task.name}: one of the best {TOP} cells, {what}",
            {
                "percent of seeds after evaluations": {str(k): v for k, v in share.items()},
                "proposing, s per evaluation": _proposing(traces),
            },
            seeds=seeds,
            aims=aims,
        )


# -- few evaluations ----------------------------------------------------------------------------


def few(bench: Bench) -> None:
    """Regret after 20, 30 and 50 evaluations, beside evolution and Optuna's TPE."""
    _few(bench, (("Optuna TPE", "tpe"), ("evolution", "evolution"), ("auto", "auto")))


def few_gp(bench: Bench) -> None:
    """The same beside Optuna's Gaussian process, whose proposals take a second and more."""
    _few(bench, (("auto", "auto"), ("Optuna GP", "gp")))


def _few(bench: Bench, searches: Sequence[tuple[str, str]]) -> None:
    """Cases of all searches; the last one has the aims, auto beside the first or the last."""
    tasks: list[Callable[[int], Task]] = [landscape] if bench.quick else [mixture, landscape]
    evaluator = bench.evaluator
    if evaluator is not None:
        tasks.append(lambda seed: cells(evaluator, signals=evaluator))
    seeds = bench.seeds(15, 1)
    most = 30 if bench.quick else max(FEW)
    marks = [mark for mark in FEW if mark <= most]
    for make in tasks:
        name = make(0).name
        medians: dict[str, list[float]] = {}
        lines: list[tuple[str, dict[str, Any]]] = []
        for label, algorithm in searches:
            traces = bench.traces(make, f"few, {label}", seeds, most, algorithm)
            figures: dict[str, Any] = {
                f"regret at {mark}": spread(
                    [trace.regret(make(s), mark) for s, trace in zip(seeds, traces, strict=True)]
                )
                for mark in marks
            }
            medians[label] = [figures[f"regret at {mark}"]["median"] for mark in marks]
            figures["proposing, s per evaluation"] = _proposing(traces)
            lines.append((label, figures))
        own = medians.pop("auto")
        peer, others = next((p, m) for p, m in medians.items() if p.startswith("Optuna"))
        aims = [
            Aim(f"median regret of auto at {mark}, beside {peer}", value, "at most", other, False)
            for mark, value, other in zip(marks, own, others, strict=True)
        ]
        for label, figures in lines:
            beside = f", beside {peer}" if label == "auto" else ""
            bench.journal.case(
                f"{name}: few evaluations, {label}{beside}",
                figures,
                seeds=seeds,
                aims=aims if label == "auto" else (),
            )


# -- several fidelities -------------------------------------------------------------------------


def _at_costs(
    evaluator: TableEvaluator, spec: AlgorithmSpec, marks: Sequence[int], seed: int
) -> Trace:
    """The best losses in full that a search knows when so much is spent."""
    stage = Stage("search", evaluator.space, evaluator, spec, Budget(max(marks)))
    store = MemoryRun()
    result = run(SearchConfig((stage,), seed=seed), store=store)
    (note,) = result.meta["proposals"].values()
    records = store.records()
    price = np.array([fidelity.cost for fidelity in evaluator.fidelities])
    cost = np.cumsum(price[records.fidelity])
    full = records.fidelity == len(price) - 1
    found = [
        float(np.min(-records.values[full & (cost <= mark + 1e-9), 0], initial=0.0))
        for mark in marks
    ]
    return Trace(np.array(found), note["seconds"])


def fidelities(bench: Bench) -> None:
    """Regret at a cost of 10 and 20 full trainings where 12 epochs may be looked at first."""
    evaluator = bench.evaluator
    assert evaluator is not None
    best = -float(evaluator.values()[:, 0].max())
    seeds = bench.seeds(15, 1)
    marks = (10,) if bench.quick else (10, 20)
    rows: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("guided, 12 epochs first", "guided", {}),
        ("guided, in full only", "guided", {"fidelities": (1.0,)}),
        ("successive halving", "successive_halving", {}),
    )
    medians: dict[str, float] = {}
    for label, name, options in rows:
        kind = f"{evaluator.space.size} elements, {label}"
        search = partial(_at_costs, evaluator, AlgorithmSpec(name, options), marks)
        traces = [bench.kept.trace(kind, seed, partial(search, seed)) for seed in seeds]
        figures: dict[str, Any] = {
            f"regret at a cost of {mark}": spread([float(t.losses[at]) - best for t in traces])
            for at, mark in enumerate(marks)
        }
        medians[label] = figures[f"regret at a cost of {marks[-1]}"]["median"]
        aims = []
        if label == "successive halving":
            own = medians["guided, 12 epochs first"]
            aims = [
                Aim(f"median regret of guided at {marks[-1]}", own, "at most", other, False)
                for other in (medians["guided, in full only"], medians[label])
            ]
        bench.journal.case(
            f"NAS-Bench-201 CIFAR-10: fidelities, {label}", figures, seeds=seeds, aims=aims
        )


# -- the guard ----------------------------------------------------------------------------------


class Shuffled(GaussianProcess):
    """A process whose labels are somebody else's."""

    name: ClassVar[str] = "shuffled"

    def fit(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        mixed = np.random.default_rng(seed).permutation(losses)
        super().fit(table, mixed, seed=seed, pool=pool)

    def held_out(self) -> None:
        """It would compare with the shuffled labels."""


class Misled(Guided):
    """Guided by a predictor that learns shuffled labels."""

    def _new_predictor(self) -> Predictor:
        return Shuffled()


@dataclass(frozen=True)
class Poisoned:
    """Ten signals that are noise."""

    space: Space
    signals: tuple[Signal, ...] = tuple(Signal(f"noise_{i}", when="static") for i in range(10))

    def static_signals(self, population: Population) -> Floats:
        words = np.frombuffer(b"".join(self.space.keys(population)), dtype=np.uint64)
        number: NDArray[Any] = words.reshape(len(population), 2)[:, :1] + np.arange(
            1, 11, dtype=np.uint64
        )
        mixed: NDArray[Any] = (number ^ (number >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        out: Floats = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
        return out


def _misled(make: Callable[[int], Task], what: str, most: int, seed: int) -> Trace:
    task = make(seed)
    algorithm: Guided
    if what == "ten noise signals":
        algorithm = Guided(task.space, seed=seed, signals=Poisoned(task.space))
    elif "without" in what:
        algorithm = Misled(task.space, seed=seed, guard="always")
    else:
        algorithm = Misled(task.space, seed=seed)
    return searched(algorithm, task, most)


def guard(bench: Bench) -> None:
    """Mean regret beside the wrapped algorithm's where nothing can be predicted, paired seeds."""
    tasks: list[Callable[[int], Task]] = [landscape]
    evaluator = bench.evaluator
    if evaluator is not None:
        tasks.append(lambda seed: cells(evaluator, signals=evaluator))
    most = 30 if bench.quick else 50
    for make in tasks:
        seeds = bench.seeds(30, 2)
        name = make(0).name
        plain = bench.traces(make, "guard, evolution", seeds, most, "evolution")
        for what in ("shuffled labels", "shuffled labels, without the guard", "ten noise signals"):
            kind = f"{name}, guard, {what}, {most}"
            search = partial(_misled, make, what, most)
            traces = [bench.kept.trace(kind, seed, partial(search, seed)) for seed in seeds]
            own, base = (
                float(np.mean([t.regret(make(s), most) for s, t in zip(seeds, some, strict=True)]))
                for some in (traces, plain)
            )
            figures: dict[str, Any] = {
                "share the predictor chose, mean": float(np.mean([t.chosen for t in traces]))
                / most,
                f"mean regret at {most}": own,
                f"mean regret of evolution at {most}": base,
            }
            aims = []
            if "without" not in what:
                aims = [Aim(f"ratio at {most}", own / base, "at most", 1.05, binding=False)]
            bench.journal.case(f"{name}: guard, {what}", figures, seeds=seeds, aims=aims)


def decisions(bench: Bench) -> None:
    """Whether the guard is right about fits to noisy labels, half of the draws shuffled."""
    evaluator = bench.evaluator
    assert evaluator is not None
    draws = bench.seeds(100, 4)
    task = cells(evaluator, signals=evaluator)
    spread_ = float(np.std(evaluator.values()[:, 0]))
    for labels in (20, 30):
        right, trusted = 0, [0, 0]
        for draw in draws:
            rng = np.random.default_rng(draw)
            algorithm = Guided(task.space, seed=draw, signals=evaluator, first_fit=labels)
            width = task.space.sample_width
            population = task.space.sample(rng.random((labels, width)))
            losses = task.losses(population) + 0.3 * spread_ * rng.normal(size=labels)
            shuffled = draw % 2
            if shuffled:
                losses = rng.permutation(losses)
            ids = np.arange(labels)
            algorithm.tell(Told(ids, population, losses[:, None], np.zeros(labels)))
            algorithm.ask(labels, 1)
            says = algorithm.report()["guard"] == "trusted"
            right += says != bool(shuffled)
            trusted[shuffled] += says
        share = 100 * right / len(draws)
        bench.journal.case(
            f"{task.name}: the guard's decision at {labels} labels, noise 30 % of the spread",
            {
                "percent right": share,
                "trusted, labels as they are": trusted[0],
                "trusted, labels shuffled": trusted[1],
            },
            seeds=draws,
            aims=[Aim("% right", share, "at least", 80, not bench.quick)],
        )


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    parser.add_argument("--folder", type=Path, help="keep finished searches there")
    parser.add_argument("--minutes", type=float, help="begin no search after so long")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments, add=_flags)
    journal = Journal("guided", options, lines=other_parts(options))
    seconds = np.inf if options.minutes is None else 60 * options.minutes
    folder = data_folder("nasbench201")
    evaluator = None if folder is None else nasbench201(folder)
    bench = Bench(journal, Kept(options.folder, seconds), bool(options.quick), evaluator)
    tables = {"cells": top_cells, "decisions": decisions, "fidelities": fidelities}
    parts = {"strings": strings, "few": few, "few_gp": few_gp, "guard": guard} | tables
    try:
        for part in PARTS:
            if options.part is not None and part not in options.part:
                continue
            if options.part is None and options.quick and part == "few_gp":
                continue  # a second and more for every proposal
            journal.part = part
            if part in tables and evaluator is None:
                journal.skip(f"NAS-Bench-201 CIFAR-10: {part}", "no nasbench201 in $SEARCHLAB_DATA")
            else:
                parts[part](bench)
    except TimeoutError:
        journal.close()
        print("stopped by --minutes; the same command goes on", file=sys.stderr)
        return 1
    return journal.close()


if __name__ == "__main__":
    sys.exit(main())
