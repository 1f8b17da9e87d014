"""Guided search: evaluations saved, few evaluations, and what the guard prevents.

    python -m searchlab.experiments.benchmarks.guided [--quick] [--check] [--out FILE]

NAS-Bench-201 is read below $SEARCHLAB_DATA; its cases are skipped where it is not. All searches are
in memory, one evaluation after another unless a lag is given; peers have the same instances and
seeds. Seconds are CPU time of proposing, fits included.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Told
from searchlab.algorithms.guided import Guided
from searchlab.config import AlgorithmSpec
from searchlab.evaluator import Signal
from searchlab.evaluators.nasbench201 import nasbench201
from searchlab.evaluators.table import TableEvaluator
from searchlab.experiments.benchmarks._algorithms_choices import PLACES, hidden, nk, string_space
from searchlab.experiments.benchmarks._common import Aim, Journal, data_folder, flags, spread
from searchlab.population import Jobs, Population
from searchlab.predictor import Predictor, Table
from searchlab.predictors.ridge import Ridge
from searchlab.space import Space

__all__ = ["main"]

Floats = NDArray[np.float64]
TOP = 16  # cells of NAS-Bench-201 that count as found
FEW = (20, 30, 50)


@dataclass(frozen=True)
class Task:
    """Something to search: losses of candidates, and signals where there are some."""

    name: str
    space: Space
    losses: Callable[[Population], Floats]
    signals: Any = None
    best: float = 0.0


@dataclass(frozen=True)
class Trace:
    """Losses in the order of evaluation, and CPU seconds of all proposals."""

    losses: Floats
    seconds: float

    def regret(self, task: Task, evaluations: int) -> float:
        return float(self.losses[:evaluations].min()) - task.best


def searched(
    algorithm: Algorithm, task: Task, most: int, *, lag: int = 1, until: float = -np.inf
) -> Trace:
    """Asks and tells by the engine's rule until so many are evaluated or a loss is reached."""
    losses: list[float] = []
    asked: list[Told] = []
    told, seconds = 0, 0.0
    for i in range(4 * most):
        begun = time.process_time()
        while told < i + 1 - lag:
            algorithm.tell(asked[told])
            told += 1
        jobs = algorithm.ask(i, 1)
        seconds += time.process_time() - begun
        values = task.losses(jobs.population) if len(jobs) else np.empty(0)
        losses += values.tolist()
        none = np.zeros(len(jobs))
        asked.append(Told(jobs.ids, jobs.population, values[:, None], none, jobs.predicted))
        if len(losses) == most or (len(values) and values[0] <= until):
            break
    return Trace(np.array(losses), seconds)


def made(task: Task, name: str, seed: int, **options: Any) -> Algorithm:
    """An algorithm by name; one that reads signals gets the task's."""
    return AlgorithmSpec(name, options).build(
        task.space, seed=seed, first_id=0, seeds=None, signals=task.signals
    )


def cells(evaluator: TableEvaluator, *, signals: Any) -> Task:
    """NAS-Bench-201 as a task: loss = minus accuracy in percent."""

    def losses(population: Population) -> Floats:
        keys = evaluator.space.keys(population)
        jobs = Jobs(np.arange(len(keys)), population, keys)
        out: Floats = -evaluator.evaluate(jobs).values[:, 0]
        return out

    best = -float(evaluator.values()[:, 0].max())
    return Task("NAS-Bench-201 CIFAR-10", evaluator.space, losses, signals, best)


# -- evaluations that are saved -----------------------------------------------------------------


def string(seed: int) -> Task:
    """The places that differ from a hidden string."""
    loss = hidden(seed)
    return Task("hidden string", string_space(), lambda p: loss(p["x"]))


def strings(journal: Journal, quick: bool) -> None:
    """Evaluations until a hidden string of 32 choices of 8 is found."""
    seeds = range(1) if quick else range(15)
    for lag in (1,) if quick else (1, 16):
        counts, seconds = [], 0.0
        for seed in seeds:
            task = string(seed)
            trace = searched(made(task, "guided", seed), task, 2000, lag=lag, until=0.0)
            counts.append(len(trace.losses))
            seconds += trace.seconds
        median = statistics.median(counts)
        journal.case(
            f"{PLACES} choices of 8, hidden string, guided by ridge, lag {lag}",
            {
                "evaluations": spread(counts),
                "proposing, s per evaluation": round(seconds / sum(counts), 4),
            },
            seeds=seeds,
            aims=[Aim("median evaluations", median, "at most", 350, not quick)],
        )


def top_cells(journal: Journal, evaluator: TableEvaluator, quick: bool) -> None:
    """How many seeds find one of the best 16 cells within 50 and within 100 evaluations."""
    seeds = range(2) if quick else range(50)
    top = float(np.sort(-evaluator.values()[:, 0])[TOP - 1])
    rows: tuple[tuple[str, str, dict[str, Any], Any], ...] = (
        ("guided by gp, signals", "guided", {"predictor": "gp"}, evaluator),
        ("guided by ridge, signals", "guided", {}, evaluator),
        ("guided by ridge, no signals", "guided", {}, None),
        ("evolution", "evolution", {}, None),
        ("Optuna TPE", "tpe", {}, None),
        ("random", "random", {}, None),
    )
    for what, name, options, signals in rows:
        task = cells(evaluator, signals=signals)
        needed, seconds, paid = [], 0.0, 0
        for seed in seeds:
            trace = searched(made(task, name, seed, **options), task, 100, until=top)
            needed.append(len(trace.losses) if trace.losses[-1] <= top else np.inf)
            seconds += trace.seconds
            paid += len(trace.losses)
        share = {mark: 100 * float(np.mean(np.array(needed) <= mark)) for mark in (50, 100)}
        aims = []
        if signals is not None:
            binding = what.startswith("guided by gp") and not quick
            aims = [
                Aim("% of seeds by 50", share[50], "at least", 85, binding),
                Aim("% of seeds by 100", share[100], "at least", 98, binding),
            ]
        journal.case(
            f"{task.name}: one of the best {TOP} cells, {what}",
            {
                "percent of seeds after evaluations": {str(k): v for k, v in share.items()},
                "proposing, s per evaluation": round(seconds / paid, 4),
            },
            seeds=seeds,
            aims=aims,
        )


# -- few evaluations ----------------------------------------------------------------------------


def few(journal: Journal, tasks: Sequence[Callable[[int], Task]], quick: bool) -> None:
    """Regret after 20, 30 and 50 evaluations, beside evolution and Optuna's TPE."""
    seeds = range(1) if quick else range(15)
    for make in tasks:
        medians: dict[str, list[float]] = {}
        for name, algorithm, options in (
            ("Optuna TPE", "tpe", {}),
            ("evolution", "evolution", {}),
            ("guided by ridge", "guided", {}),
            ("guided by gp", "guided", {"predictor": "gp"}),
        ):
            given = [(make(s), s) for s in seeds]
            found = [(t, searched(made(t, algorithm, s, **options), t, max(FEW))) for t, s in given]
            figures = {
                f"regret at {mark}": spread([trace.regret(t, mark) for t, trace in found])
                for mark in FEW
            }
            medians[name] = [figures[f"regret at {mark}"]["median"] for mark in FEW]
            aims = []
            if algorithm == "guided":
                pairs = zip(FEW, medians[name], medians["Optuna TPE"], strict=True)
                aims = [
                    Aim(f"median regret at {mark}", own, "at most", peer, binding=False)
                    for mark, own, peer in pairs
                ]
            journal.case(
                f"{found[0][0].name}: few evaluations, {name}", figures, seeds=seeds, aims=aims
            )


def landscapes(seed: int) -> Task:
    """NK landscapes, K 2; their best is unknown, so that the regret is the loss itself."""
    loss = nk(seed)
    return Task(f"NK landscape, {PLACES} choices of 8, K 2", string_space(), lambda p: loss(p["x"]))


# -- the guard ----------------------------------------------------------------------------------


class Shuffled(Ridge):
    """A ridge whose labels are somebody else's."""

    name: ClassVar[str] = "shuffled"

    def fit(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        mixed = np.random.default_rng(seed).permutation(losses)
        super().fit(table, mixed, seed=seed, pool=pool)


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
        out = np.empty((len(population), len(self.signals)))
        for row, key in enumerate(self.space.keys(population)):
            words = np.frombuffer(key, dtype=np.uint32)
            out[row] = np.random.default_rng(words).normal(size=len(self.signals))
        return out


def guard(journal: Journal, tasks: Sequence[Callable[[int], Task]], quick: bool) -> None:
    """Mean regret beside the wrapped algorithm's where nothing can be predicted, paired seeds."""
    seeds, most = (range(2), 30) if quick else (range(30), 100)
    for make in tasks:
        plain = [searched(made(make(s), "evolution", s), make(s), most) for s in seeds]
        for what in ("shuffled labels", "shuffled labels, without the guard", "ten noise signals"):
            traces, chosen = [], []
            for seed in seeds:
                task = make(seed)
                algorithm: Guided
                if what == "ten noise signals":
                    algorithm = Guided(task.space, seed=seed, signals=Poisoned(task.space))
                else:
                    says = "always" if "without" in what else "measured"
                    algorithm = Misled(task.space, seed=seed, guard=says)  # type: ignore[arg-type]
                traces.append(searched(algorithm, task, most))
                chosen.append(algorithm.chosen / most)
            marks = [mark for mark in (50, 100) if mark <= most] or [most]
            figures: dict[str, Any] = {"share the predictor chose, mean": float(np.mean(chosen))}
            aims = []
            for mark in marks:
                own = _mean_regret(traces, make, seeds, mark)
                base = _mean_regret(plain, make, seeds, mark)
                figures[f"mean regret at {mark}"] = own
                figures[f"mean regret of evolution at {mark}"] = base
                if "without" not in what:
                    ratio = Aim(f"ratio at {mark}", own / base, "at most", 1.05, binding=False)
                    aims.append(ratio)
            journal.case(f"{make(0).name}: guard, {what}", figures, seeds=seeds, aims=aims)


def _mean_regret(
    traces: Sequence[Trace], make: Callable[[int], Task], seeds: Sequence[int], mark: int
) -> float:
    pairs = zip(traces, seeds, strict=True)
    return float(np.mean([trace.regret(make(seed), mark) for trace, seed in pairs]))


def decisions(journal: Journal, evaluator: TableEvaluator, quick: bool) -> None:
    """Whether the guard is right about fits to noisy labels, half of the draws shuffled."""
    draws = range(4) if quick else range(100)
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
        journal.case(
            f"{task.name}: the guard's decision at {labels} labels, noise 30 % of the spread",
            {
                "percent right": share,
                "trusted, labels as they are": trusted[0],
                "trusted, labels shuffled": trusted[1],
            },
            seeds=draws,
            aims=[Aim("% right", share, "at least", 80, not quick)],
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments)
    journal = Journal("guided", options)
    quick = bool(options.quick)
    strings(journal, quick)
    tasks: list[Callable[[int], Task]] = [landscapes]
    folder = data_folder("nasbench201")
    if folder is None:
        journal.skip("NAS-Bench-201 CIFAR-10", "no nasbench201 in $SEARCHLAB_DATA")
    else:
        evaluator = nasbench201(folder)
        top_cells(journal, evaluator, quick)
        decisions(journal, evaluator, quick)
        tasks.append(lambda seed: cells(evaluator, signals=evaluator))
    few(journal, tasks, quick)
    guard(journal, tasks, quick)
    return journal.close()


if __name__ == "__main__":
    sys.exit(main())
