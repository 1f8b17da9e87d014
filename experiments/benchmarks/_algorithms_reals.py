"""Part "reals": evaluations on a sphere of 50 dimensions, and what a proposal costs late.

The sphere: 50 reals in [-5, 5], the loss is the squared distance to an optimum drawn uniformly from
[-2, 2] in each dimension by `numpy.random.default_rng(seed)`. Every algorithm begins in the middle,
at 0. Counted are evaluations up to the first loss below 1e-3.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Told
from searchlab.algorithms.cma import CMA
from searchlab.algorithms.es11 import OnePlusOne
from searchlab.algorithms.optuna import TPE
from searchlab.experiments.benchmarks._common import Aim, Journal, lacking, spread
from searchlab.space import Space
from searchlab.uniforms import uniforms
from searchlab.variables import Real

__all__ = ["run"]

SIZE, REACH = 50, 5.0
GOOD = 1e-3
MOST = 10_000  # evaluations after which a run is stopped
SEEDS = range(15)
Losses = Callable[[NDArray[Any]], NDArray[np.float64]]


def run(journal: Journal, quick: bool) -> None:
    """All cases of this part."""
    sphere(journal, quick)
    costs(journal, quick)


def _space() -> Space:
    return Space(x=Real(-REACH, REACH, shape=(SIZE,)))


def _sphere(seed: int) -> Losses:
    optimum = np.random.default_rng(seed).uniform(-2, 2, SIZE)

    def losses(x: NDArray[Any]) -> NDArray[np.float64]:
        squares: NDArray[np.float64] = ((x - optimum) ** 2).sum(axis=-1)
        return squares

    return losses


def evaluations(algorithm: Algorithm, losses: Losses, *, lag: int = 0) -> int:
    """Evaluations up to the first good one; `MOST` = there was none. Lag 0 = the quantum."""
    q = algorithm.quantum
    lag = lag or q
    waiting: list[Told] = []
    for start in range(0, MOST, q):
        while waiting and waiting[0].ids[-1] < start + q - lag:
            algorithm.tell(waiting.pop(0))
        jobs = algorithm.ask(start, q)
        values = losses(jobs.population["x"])
        found = np.flatnonzero(values < GOOD)
        if len(found):
            return int(jobs.ids[found[0]]) + 1
        waiting.append(Told(jobs.ids, jobs.population, values[:, None], np.zeros(len(jobs))))
    return MOST


def sphere(journal: Journal, quick: bool) -> None:
    """Median evaluations of ours and of the peers."""
    seeds = SEEDS[:2] if quick else SEEDS
    what = f"sphere of {SIZE}"
    ours: tuple[tuple[str, Callable[[int], Algorithm], int, float], ...] = (
        ("es11, lag 1", lambda seed: OnePlusOne(_space(), seed=seed), 1, 1750),
        ("es11, lag 8", lambda seed: OnePlusOne(_space(), seed=seed, lag=8), 8, math.nan),
        ("es11, lag 16", lambda seed: OnePlusOne(_space(), seed=seed, lag=16), 16, math.nan),
        (
            "cma, population 8, sigma 0.05",
            lambda seed: CMA(_space(), seed=seed, sigma=0.05),
            0,
            2400,
        ),
        (
            "cma, default (population 8, sigma 0.1)",
            lambda seed: CMA(_space(), seed=seed),
            0,
            math.nan,
        ),
    )
    for name, build, lag, aim in ours:
        if quick and math.isnan(aim):
            continue
        counts = [evaluations(build(seed), _sphere(seed), lag=lag) for seed in seeds]
        # A median of few seeds may lie on either side.
        aims = [Aim("median evaluations", statistics.median(counts), "at most", aim, not quick)]
        journal.case(
            f"{what}, {name}",
            {"evaluations": spread(counts)},
            seeds=seeds,
            aims=[] if math.isnan(aim) else aims,
        )
    peers: tuple[tuple[str, str, Callable[[Losses, int], int]], ...] = (
        ("Nevergrad OnePlusOne", "nevergrad", _nevergrad),
        ("pycma, sigma0 2", "cma", lambda losses, seed: _pycma(losses, seed, 2.0, None)),
        ("pycma, population 8, sigma0 0.5", "cma", lambda f, seed: _pycma(f, seed, 0.5, 8)),
    )
    few: Sequence[int] = SEEDS[:1] if quick else SEEDS
    for name, package, peer in peers:
        reason = lacking(package)
        if quick and package == "nevergrad":
            reason = "left out of the short form: its import takes seconds"
        if reason is not None:
            journal.skip(f"{what}, {name}", reason)
            continue
        counts = [peer(_sphere(seed), seed) for seed in few]
        journal.case(f"{what}, {name}", {"evaluations": spread(counts)}, seeds=few)


def _nevergrad(losses: Losses, seed: int) -> int:
    """Nevergrad's (1+1) strategy with its own settings, from 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nevergrad

        start = nevergrad.p.Array(shape=(SIZE,))
        start.random_state.seed(seed)
        optimizer = nevergrad.optimizers.OnePlusOne(parametrization=start, budget=MOST)
        for count in range(1, MOST + 1):
            candidate = optimizer.ask()
            value = float(losses(candidate.value))
            if value < GOOD:
                return count
            optimizer.tell(candidate, value)
    return MOST


def _pycma(losses: Losses, seed: int, sigma: float, population: int | None) -> int:
    """The package `cma` from 0; its own population where none is given."""
    import cma

    options: dict[str, Any] = {"seed": seed + 1, "verbose": -9}  # it takes 0 for the clock
    if population is not None:
        options["popsize"] = population
    strategy, count = cma.CMAEvolutionStrategy(np.zeros(SIZE), sigma, options), 0
    while count < MOST:
        asked = strategy.ask()
        values = losses(np.array(asked))
        found = np.flatnonzero(values < GOOD)
        if len(found):
            return count + int(found[0]) + 1
        count += len(asked)
        strategy.tell(asked, values.tolist())
    return MOST


# -- what a proposal costs ----------------------------------------------------------------------


def costs(journal: Journal, quick: bool) -> None:
    """Milliseconds of CPU time of ask and tell per proposal, late in a run of random losses."""
    told = 400 if quick else 10_000
    for name, build in (
        ("cma", lambda: CMA(_space(), seed=0)),
        ("es11", lambda: OnePlusOne(_space(), seed=0)),
    ):
        made: Algorithm = build()
        figures = _cost(made, told, 40 if quick else 200)
        aim = Aim("ms per proposal", figures["ms_per_proposal"], "at most", 1.0, not quick)
        journal.case(
            f"cost of a proposal, sphere of 50, {name}, {told:,} told", figures, aims=[aim]
        )
    ours = _cost(TPE(_space(), seed=0), told, 3, drive=False)
    journal.case(f"cost of a proposal, sphere of 50, tpe, {told:,} told", ours)
    reason = lacking("optuna")
    if reason is not None:
        journal.skip(f"cost of a proposal, sphere of 50, Optuna TPE, {told:,} told", reason)
        return
    journal.case(
        f"cost of a proposal, sphere of 50, Optuna TPE, {told:,} told", _optuna_cost(told, 3)
    )


def _answers(first_id: int, x: NDArray[Any]) -> Told:
    from searchlab.population import Population

    ids = np.arange(first_id, first_id + len(x))
    losses = _sphere(0)(x)[:, None]
    return Told(ids, Population({"x": x}), losses, np.zeros(len(x)))


def _cost(algorithm: Algorithm, told: int, asks: int, *, drive: bool = True) -> dict[str, float]:
    """Told by its own proposals, or by random ones where those would take too long."""
    q = algorithm.quantum
    if drive:
        parts = []
        for start in range(0, told, q):
            parts.append(algorithm.ask(start, q).population["x"])
            algorithm.tell(_answers(start, parts[-1]))
        x = np.concatenate(parts)
    else:
        x = _space().sample(uniforms(1, 0, 0, told, SIZE))["x"]
    fresh = type(algorithm)(algorithm.space, seed=algorithm.seed)
    begun = time.process_time()
    fresh.tell(_answers(0, x))
    rebuilt = time.process_time() - begun
    begun = time.process_time()
    for start in range(len(x), len(x) + asks, q):
        jobs = fresh.ask(start, q)
        fresh.tell(_answers(start, jobs.population["x"]))
    taken = time.process_time() - begun
    proposals = -(-asks // q) * q
    return {
        "ms_per_proposal": float(f"{1e3 * taken / proposals:.3g}"),
        "rebuilt_by_one_tell_s": float(f"{rebuilt:.3g}"),
        "proposals": proposals,
    }


def _optuna_cost(told: int, asks: int) -> dict[str, float]:
    """Optuna's TPE as a user calls it, in memory."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    x = _space().sample(uniforms(1, 0, 0, told, SIZE))["x"]
    losses = _sphere(0)(x).tolist()
    kind = optuna.distributions.FloatDistribution(-REACH, REACH)
    kinds: dict[str, optuna.distributions.BaseDistribution] = {f"x{i}": kind for i in range(SIZE)}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.add_trials(
        optuna.trial.create_trial(
            value=loss, params=dict(zip(kinds, row, strict=True)), distributions=kinds
        )
        for loss, row in zip(losses, x.tolist(), strict=True)
    )
    begun = time.process_time()
    for _ in range(asks):
        trial = study.ask()
        row = np.array([trial.suggest_float(name, -REACH, REACH) for name in kinds])
        study.tell(trial, float(_sphere(0)(row)))
    taken = time.process_time() - begun
    return {"ms_per_proposal": float(f"{1e3 * taken / asks:.3g}"), "proposals": asks}
