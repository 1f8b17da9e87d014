"""Part "choices": a hidden string, an interacting landscape, and what a proposal costs late.

Evaluations are counted up to the first candidate that is the hidden string, one evaluation after
another (lag 1), or with 16 open at once by the engine's rule. The peers have their own settings:
Optuna's NSGA-II with categorical suggestions, pymoo's GA rounded to integers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms import Algorithm, Evolution, ParentRule, Random, Told
from searchlab.config import ALGORITHMS, AlgorithmSpec
from searchlab.errors import ConfigError
from searchlab.experiments.benchmarks._common import Aim, Journal, lacking, spread
from searchlab.space import Space
from searchlab.variables import Choice, Real

__all__ = ["evaluations", "hidden", "nk", "run", "string_space"]

PLACES, LABELS = 32, 8
MOST = 10_000  # evaluations after which a peer is stopped
SEEDS = range(15)
MANY_SEEDS = range(45)
Losses = Callable[[NDArray[Any]], NDArray[np.float64]]


def run(journal: Journal, quick: bool) -> None:
    """All cases of this part."""
    hidden_string(journal, quick)
    landscape(journal, quick)
    costs(journal, quick)


def string_space() -> Space:
    """32 choices of 8."""
    return Space(x=Choice(tuple(range(LABELS)), shape=(PLACES,)))


# -- the hidden string --------------------------------------------------------------------------

WHAT = f"{PLACES} choices of {LABELS}, hidden string"


def hidden(seed: int) -> Losses:
    """How many places differ from the string of this seed."""
    string = np.random.default_rng(seed).integers(0, LABELS, PLACES)

    def losses(x: NDArray[Any]) -> NDArray[np.float64]:
        missed: NDArray[np.float64] = (x != string).sum(axis=1).astype(np.float64)
        return missed

    return losses


def evaluations(algorithm: Algorithm, losses: Losses, *, lag: int, most: int = MOST) -> int:
    """Evaluations up to the first loss of 0 at a quantum of one; `most` = it was not found."""
    told, paid = 0, 0
    asked: list[Told] = []
    for i in range(4 * most):
        while told < i + 1 - lag:  # job i knows what the ids below i + 1 - lag came to
            algorithm.tell(asked[told])
            told += 1
        jobs = algorithm.ask(i, 1)
        values = losses(jobs.population["x"]) if len(jobs) else np.empty(0)
        none = np.zeros(len(jobs))
        asked.append(Told(jobs.ids, jobs.population, values[:, None], none, jobs.predicted))
        paid += len(jobs)
        if (values == 0).any() or paid == most:
            return paid
    return most


def hidden_string(journal: Journal, quick: bool) -> None:
    """Median evaluations of the default evolution and of the peers."""
    _ours(journal, quick)
    _peers(journal, quick)


def _ours(journal: Journal, quick: bool) -> None:
    """The default evolution; medians of 15 seeds differ by hundreds, so there are more of them."""
    seeds = SEEDS[:2] if quick else MANY_SEEDS
    for lag, aim in ((1, 1350), (16, 1450)):
        counts = [evaluations(Evolution(string_space(), seed=s), hidden(s), lag=lag) for s in seeds]
        of_peers = statistics.median(counts[: len(SEEDS)])
        figures = {"evaluations": spread(counts), "median_of_the_peers_seeds": of_peers, "lag": lag}
        aims = [Aim("median evaluations", statistics.median(counts), "at most", aim, not quick)]
        journal.case(f"{WHAT}, evolution, lag {lag}", figures, seeds=seeds, aims=aims)


def _peers(journal: Journal, quick: bool) -> None:
    few, most = (SEEDS[:1], 300) if quick else (SEEDS, MOST)
    peers: tuple[tuple[str, str, Callable[[Losses, int, int], int]], ...] = (
        ("Optuna NSGA-II", "optuna", _optuna),
        ("pymoo GA", "pymoo", _pymoo),
        ("pymoo GA as its page on discrete variables", "pymoo", _pymoo_page),
    )
    for name, package, peer in peers:
        reason = lacking(package)
        if reason is not None:
            journal.skip(f"{WHAT}, {name}", reason)
            continue
        counts = [peer(hidden(s), s, most) for s in few]
        figures = {"evaluations": spread(counts), "stopped_after": most}
        journal.case(f"{WHAT}, {name}", figures, seeds=few)


def _optuna(losses: Losses, seed: int, most: int) -> int:
    """Optuna's NSGA-II with its own settings: a population of 50, categorical suggestions."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.NSGAIISampler(seed=seed))
    labels = tuple(range(LABELS))
    for count in range(1, most + 1):
        trial = study.ask()
        row = [trial.suggest_categorical(f"x{i}", labels) for i in range(PLACES)]
        value = float(losses(np.array([row]))[0])
        study.tell(trial, value)
        if value == 0:
            return count
    return most


def _pymoo(losses: Losses, seed: int, most: int) -> int:
    """pymoo's genetic algorithm with its own settings, rounded to integers."""
    return _pymoo_with(losses, seed, most, population=100)


def _pymoo_page(losses: Losses, seed: int, most: int) -> int:
    """The same with the settings of the example for discrete variables."""
    return _pymoo_with(losses, seed, most, population=20, prob=1.0, eta=3.0)


def _pymoo_with(losses: Losses, seed: int, most: int, *, population: int, **more: float) -> int:
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling

    first: list[int] = []
    count = 0

    class Hidden(Problem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(n_var=PLACES, n_obj=1, xl=0, xu=LABELS - 1, vtype=int)

        def _evaluate(self, x: NDArray[Any], out: dict[str, Any], *rest: Any, **more: Any) -> None:
            nonlocal count
            values = losses(x)
            if not first and (values == 0).any():
                first.append(count + int(np.flatnonzero(values == 0)[0]) + 1)
            count += len(x)
            out["F"] = values[:, None]

    integers: dict[str, Any] = {"vtype": float, "repair": RoundingRepair(), **more}
    algorithm = GA(
        pop_size=population,
        sampling=IntegerRandomSampling(),
        crossover=SBX(**integers),
        mutation=PM(**integers),
        eliminate_duplicates=True,
    )
    algorithm.setup(Hidden(), termination=("n_eval", most), seed=seed, verbose=False)
    while algorithm.has_next() and not first:
        algorithm.next()
    return first[0] if first else most


# -- interacting choices ------------------------------------------------------------------------


def nk(seed: int, k: int = 2) -> Losses:
    """An NK landscape: each place has a random table over itself and k random other places."""
    rng = np.random.default_rng(seed)
    tables = rng.random((PLACES, LABELS ** (k + 1)))
    others = np.array([rng.permutation(np.delete(np.arange(PLACES), i))[:k] for i in range(PLACES)])
    weights = LABELS ** np.arange(k + 1)

    def losses(x: NDArray[Any]) -> NDArray[np.float64]:
        total = np.zeros(len(x))
        for i in range(PLACES):
            at = x[:, [i, *others[i]]].astype(np.int64) @ weights
            total += tables[i, at]
        return total / PLACES

    return losses


def landscape(journal: Journal, quick: bool) -> None:
    """Best loss on NK landscapes early and late; for information."""
    seeds = SEEDS[:1] if quick else SEEDS[:10]
    marks = (500,) if quick else (500, 2000, 5000)
    algorithms: dict[str, Callable[[int], Algorithm]] = {
        "evolution": lambda seed: Evolution(string_space(), seed=seed),
        "evolution with mu 20": lambda seed: Evolution(
            string_space(), seed=seed, parents=ParentRule(mu=20)
        ),
        "random": lambda seed: Random(string_space(), seed=seed),
    }
    for name, build in algorithms.items():
        best = np.array([_best_at(build(seed), nk(seed), marks) for seed in seeds])
        figures = {f"best_at_{mark}": spread(best[:, j].tolist()) for j, mark in enumerate(marks)}
        journal.case(
            f"NK landscape, {PLACES} choices of {LABELS}, K 2, {name}", figures, seeds=seeds
        )


def _best_at(algorithm: Algorithm, losses: Losses, marks: Sequence[int]) -> list[float]:
    best, out = np.inf, []
    for i in range(marks[-1]):
        jobs = algorithm.ask(i, 1)
        values = losses(jobs.population["x"])
        best = min([best, *values.tolist()])
        algorithm.tell(Told(jobs.ids, jobs.population, values[:, None], np.zeros(len(jobs))))
        if i + 1 in marks:
            out.append(best)
    return out


# -- the cost of a proposal ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Setup:
    """How an algorithm is driven: over which space, with how many objectives and which options."""

    space: Space
    objectives: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


def _setups() -> tuple[_Setup, ...]:
    reals = Space(x=Real(-5, 5, shape=(50,)))
    return (
        _Setup(string_space()),
        _Setup(string_space(), objectives=2),
        _Setup(reals),
        _Setup(string_space(), options={"fidelities": (0.1, 1.0)}),
    )


GIVEN = {"listed", "paired_race", "profile", "race"}  # a list or a plan that ends: no search
BY_OPTUNA = {"gp", "tpe"}  # rebuilt from Optuna's samplers, at Optuna's cost
PREDICTS = {
    "guided",
    "kriging",
    "staged",
}  # measured beside what they save, in benchmarks of their own


def costs(journal: Journal, quick: bool) -> None:
    """CPU time of one proposal, told to the algorithm, after 1,000 and after 10,000 told."""
    at = (100, 1000) if quick else (1000, 10_000)
    for name in sorted(set(ALGORITHMS) - GIVEN - BY_OPTUNA - PREDICTS):
        found = next((f for setup in _setups() if (f := _costs(name, setup, at)) is not None), None)
        case = f"cost of a proposal, {name}"
        if found is None:
            journal.skip(case, "takes none of this part's spaces")
            continue
        early, late = found
        figures = {
            "ms": [round(early, 4), round(late, 4)],
            "told": at,
            "growth": round(late / early, 3),
        }
        aim = Aim(f"ms at {at[1]} told", late, "at most", 1, not quick)
        journal.case(case, figures, aims=[aim])
    reason = lacking("optuna")
    if reason is not None:
        journal.skip("cost of a proposal, Optuna TPE", reason)
        return
    early, late = (_tpe_cost(n) for n in at)
    figures = {
        "ms": [round(early, 2), round(late, 2)],
        "told": at,
        "growth": round(late / early, 3),
    }
    journal.case("cost of a proposal, Optuna TPE", figures)


def _costs(name: str, setup: _Setup, at: Sequence[int]) -> list[float] | None:
    """Milliseconds of CPU per proposal after so many ids; None where it does not fit."""
    try:
        spec = AlgorithmSpec(name, setup.options)
        algorithm = spec.build(setup.space, seed=0, first_id=0, seeds=None)
        algorithm.tell(_answers(algorithm, 0, algorithm.quantum, setup.objectives))
    except ConfigError:
        return None
    q = algorithm.quantum
    wide = q * -(-100 // q)
    step = wide if algorithm.max_lag is None or algorithm.max_lag >= wide else q
    out, first = [], q
    for told in at:
        while first < told:
            algorithm.tell(_answers(algorithm, first, step, setup.objectives))
            first += step
        groups = -(-200 // q)
        taken, proposed = 0.0, 0
        for _ in range(groups):
            begun = time.process_time()
            jobs = algorithm.ask(first, q)
            middle = time.process_time()
            told_now = _valued(jobs.ids, jobs.population, setup.objectives)
            again = time.process_time()
            algorithm.tell(told_now)
            taken += middle - begun + time.process_time() - again
            proposed += len(jobs)
            first += q
        if not proposed:
            return None
        out.append(1e3 * taken / proposed)
    return out


def _answers(algorithm: Algorithm, first: int, n: int, objectives: int) -> Told:
    jobs = algorithm.ask(first, n)
    return _valued(jobs.ids, jobs.population, objectives)


def _valued(ids: NDArray[np.int64], population: Any, objectives: int) -> Told:
    """Random values, which never let a search converge."""
    first = int(ids[0]) if len(ids) else 0
    losses = np.random.default_rng(first).random((len(ids), objectives))
    return Told(ids, population, losses, np.zeros(len(ids)))


def _tpe_cost(told: int) -> float:
    """Milliseconds of CPU per proposal of Optuna's TPE over the same choices."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    labels = optuna.distributions.CategoricalDistribution(tuple(range(LABELS)))
    names = {f"x{i}": labels for i in range(PLACES)}
    rng = np.random.default_rng(0)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    rows = rng.integers(0, LABELS, (told, PLACES)).tolist()
    study.add_trials(
        [
            optuna.trial.create_trial(
                params=dict(zip(names, row, strict=True)), distributions=dict(names), value=value
            )
            for row, value in zip(rows, rng.random(told).tolist(), strict=True)
        ]
    )
    begun = time.process_time()
    for _ in range(3):
        study.tell(study.ask(dict(names)), 0.5)
    return 1e3 * (time.process_time() - begun) / 3
