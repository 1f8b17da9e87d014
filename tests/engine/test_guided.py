"""Guided search: the wrapped algorithm's trace, the guard, refits, stored predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import searchlab as sl
from searchlab.algorithms import Seeds, Told
from searchlab.algorithms._guard import Evidence, Gain, correlation, gain, ranks, trusts
from searchlab.algorithms.base import Algorithm
from searchlab.algorithms.guided import Guided
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.errors import ConfigError
from searchlab.evaluator import FunctionEvaluator, Signal
from searchlab.population import Evaluations, Jobs, Population
from searchlab.search import run, verify
from searchlab.space import Space
from searchlab.study import Database, MemoryRun
from searchlab.testing.algorithm import AlgorithmSuite, Build, drive
from searchlab.variables import Choice, Real

CHOICES = Space(x=Choice(range(6), shape=(12,)))
WEIGHTS = np.random.default_rng(5).normal(size=(12, 6))


def additive(x: list[int]) -> float:
    return float(WEIGHTS[np.arange(12), x].sum())


def spec(**options: Any) -> AlgorithmSpec:
    return AlgorithmSpec("guided", {"pool": 100, **options})


def config(algorithm: AlgorithmSpec, budget: int = 60, **more: Any) -> SearchConfig:
    evaluator = FunctionEvaluator(additive, CHOICES, version=1)
    stage = Stage("search", CHOICES, evaluator, algorithm, Budget(budget))
    return SearchConfig((stage,), **{"seed": 4, **more})


def records_of(algorithm: AlgorithmSpec, budget: int = 60, **more: Any) -> Any:
    store = MemoryRun()
    run(config(algorithm, budget, **more), store=store)
    return store.records()


# -- the suite ----------------------------------------------------------------------------------


class TestGuided(AlgorithmSuite):
    """As it comes: the suite's losses cannot be predicted, so it does not trust."""

    @pytest.fixture
    def build(self) -> Build:
        def made(space: Space, seed: int, first_id: int, seeds: Seeds | None) -> Algorithm:
            return Guided(
                space, seed=seed, first_id=first_id, seeds=seeds, pool=40, predictor="ridge"
            )

        return made


class TestTrustingGuided(AlgorithmSuite):
    """The predictor chooses as soon as it can."""

    @pytest.fixture
    def build(self) -> Build:
        def made(space: Space, seed: int, first_id: int, seeds: Seeds | None) -> Algorithm:
            return Guided(space, seed=seed, first_id=first_id, seeds=seeds, pool=20, guard="always")

        return made


class TestGuidedGenerations(AlgorithmSuite):
    """Around an algorithm that proposes whole generations."""

    @pytest.fixture
    def build(self) -> Build:
        def made(space: Space, seed: int, first_id: int, seeds: Seeds | None) -> Algorithm:
            return Guided(
                space,
                seed=seed,
                first_id=first_id,
                seeds=seeds,
                options={"quantum": 8},
                predictor="ridge",
                pool=20,
                guard="always",
            )

        return made


# -- the wrapped algorithm ----------------------------------------------------------------------


@pytest.mark.parametrize("wraps", ["evolution", "regularised_evolution", "random"])
def test_without_trust_the_trace_is_that_of_the_wrapped_algorithm(wraps: str) -> None:
    alone = records_of(AlgorithmSpec(wraps))
    guided = records_of(spec(wraps=wraps, guard="never"))
    assert guided.trace() == alone.trace()
    assert guided.origin == alone.origin
    assert np.isfinite(guided.predicted_mean[20:]).all()  # it goes on predicting
    assert np.isnan(alone.predicted_mean).all()


def test_with_trust_the_predictor_chooses_and_finds_more() -> None:
    best = float(WEIGHTS.min(axis=1).sum())
    left: dict[str, list[float]] = {"evolution": [], "guided": []}
    for seed in range(6):
        for algorithm in (AlgorithmSpec("evolution"), spec()):
            records = records_of(algorithm, 80, seed=seed)
            left[algorithm.name].append(float(np.nanmin(records.values)) - best)
    origins = records.origin
    assert not any(text.startswith("guided") for text in origins[:12])
    assert sum(text.startswith("guided") for text in origins) > 40
    assert np.mean(left["guided"]) < 0.5 * np.mean(left["evolution"])


def test_many_mixed_elements_are_also_looked_for_afar() -> None:
    wide = Space(x=Choice(range(4), shape=(20,)), y=Real(0, 1, shape=(10,)))
    for space, options, wanted in (
        (wide, {"guard": "always"}, {18, 21, 24, 27}),
        (wide, {"guard": "always", "predictor": "gp"}, {18, 21, 24, 27}),
        (wide, {"guard": "always", "predictor": "ridge"}, set()),
        (CHOICES, {"guard": "always", "predictor": "gp"}, set()),
    ):
        algorithm = Guided(space, seed=1, pool=50, first_fit=16, **options)
        afar = set()
        for i in range(29):
            jobs = algorithm.ask(i, 1)
            if jobs.origin[0] == "guided:random":
                afar.add(i)
            losses = jobs.population["x"].sum(axis=1)[:, None].astype(float)
            algorithm.tell(Told(jobs.ids, jobs.population, losses, np.zeros(1), jobs.predicted))
        assert afar == wanted


def test_what_cannot_be_wrapped_is_refused() -> None:
    for name in ("nsga2", "tpe", "listed", "successive_halving", "local_search", "guided"):
        options = {"fidelities": (0.1, 1.0)} if name == "successive_halving" else {}
        with pytest.raises(ConfigError, match=r"guided around|allowed: algorithms"):
            Guided(CHOICES, wraps=name, options=options)
    with pytest.raises(ConfigError, match="guided around 'evolution'"):
        Guided(CHOICES, options={"race": True})
    with pytest.raises(ConfigError, match="options of evolution"):
        Guided(CHOICES, options={"speed": 3})
    with pytest.raises(ConfigError, match="unknown predictor 'ridges'"):
        Guided(CHOICES, predictor="ridges")
    with pytest.raises(ConfigError, match="options of additive"):
        Guided(CHOICES, predictor_options={"speed": 3})
    with pytest.raises(ConfigError, match="guard 'perhaps'"):
        Guided(CHOICES, guard="perhaps")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="first_fit 3"):
        Guided(CHOICES, first_fit=3)


# -- prefixes, resuming, verifying --------------------------------------------------------------


@pytest.mark.parametrize("lag", [1, 8])
def test_a_larger_budget_continues_a_smaller_one(lag: int) -> None:
    short, long = (records_of(spec(), budget, lag=lag) for budget in (35, 60))
    first = long.take(np.arange(len(short)))
    assert first.trace() == short.trace()
    np.testing.assert_array_equal(first.predicted_mean, short.predicted_mean)


@pytest.mark.parametrize("lag", [1, 8])
def test_a_resumed_run_is_the_straight_one_and_keeps_its_predictions(
    tmp_path: Path, lag: int
) -> None:
    whole = records_of(spec(), lag=lag)
    with Database(tmp_path / "a.db") as database:
        for budget in (33, 60):
            wanted = config(spec(), budget, lag=lag)
            store = database.open_run(
                "r",
                config=wanted.describe(),
                space=CHOICES.fingerprint,
                seed=4,
                out=str(tmp_path),
            )
            result = run(wanted, store=store)
        assert result.records is not None
        assert result.records.trace() == whole.trace()
        np.testing.assert_array_equal(result.records.predicted_mean, whole.predicted_mean)
        np.testing.assert_array_equal(result.records.predicted_sd, whole.predicted_sd)


def test_verify_recomputes_every_proposal() -> None:
    store = MemoryRun()
    run(config(spec(), lag=6), store=store)
    assert verify(config(spec(), lag=6), store) == []


def test_refits_come_at_fixed_counts_and_do_not_depend_on_how_answers_come() -> None:
    algorithm = Guided(CHOICES, seed=1, pool=40)
    fitted = set()
    for i in range(70):
        jobs = algorithm.ask(i, 1)
        fitted.add(algorithm.report()["fitted_on"])
        algorithm.tell(told(jobs))
    assert sorted(fitted) == [0, 12, 16, 20, 24, 28, 33, 38, 44, 51, 59, 68]


def told(jobs: Jobs, late: float = 0.0) -> Told:
    losses = np.array([additive(row) for row in jobs.population["x"].tolist()])
    losses += late * (jobs.ids >= 12)
    return Told(jobs.ids, jobs.population, losses[:, None], np.zeros(len(jobs)), jobs.predicted)


# -- the guard ----------------------------------------------------------------------------------


def test_correlations_are_of_ranks_within_batches() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=30)
    perfect, reversed_ = correlation([(a, np.exp(a))]), correlation([(a, -a)])
    assert perfect.low > 0.99
    assert reversed_.high < -0.99
    assert correlation([]) == correlation([(a[:3], a[:3])]) == Evidence()
    # A common trend of batches says nothing about the order within them.
    trend = [(rng.normal(size=10) - 50 * b, rng.normal(size=10) - 50 * b) for b in range(3)]
    assert abs(correlation(trend).rho) < 0.4
    assert correlation([(np.concatenate(parts), np.concatenate(parts)) for parts in [trend[0]]]).n
    assert correlation([(np.ones(10), a[:10])]).rho == 0  # equal predictions
    failed = np.where(a > 1, np.inf, a)
    assert correlation([(a, failed)]).rho > 0.8
    assert correlation([(np.where(a > 1, np.nan, a), a)]).n == int((a <= 1).sum())
    # A few labels far off the rest are seen by the values, the order of the rest by the ranks.
    far = np.concatenate([rng.permutation(a), [20.0, 30.0]])
    said = np.concatenate([a, [9.0, 9.0]])
    alone, both = correlation([(said, far)]), correlation([(said, far)], values=True)
    assert both.rho > alone.rho + 0.1
    assert correlation([(a, failed)], values=True).rho > 0.5
    assert ranks(np.array([2.0, 1.0, 2.0, np.inf])).tolist() == [1.5, 0.0, 1.5, 3.0]


def test_the_interval_covers_what_it_says() -> None:
    rng = np.random.default_rng(1)
    truth = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman's of normals with correlation .5
    hits = 0
    for _ in range(400):
        a = rng.normal(size=24)
        b = 0.5 * a + np.sqrt(0.75) * rng.normal(size=24)
        found = correlation([(a, b)])
        hits += found.low <= truth <= found.high
    assert 0.85 <= hits / 400 <= 0.95


def test_trust_needs_held_out_skill_and_no_reversed_batches() -> None:
    good, bad = Evidence(0.7, 0.5, 0.8, 30, 4.5), Evidence(-0.6, -0.8, -0.2, 12, -2.0)
    unsure = Evidence(0.3, -0.1, 0.6, 12, 0.9)
    fine, idle = Gain(0.2, 8), Gain(0.5, 8)
    assert trusts(good, Evidence(), Gain())
    assert trusts(good, unsure, fine)
    assert not trusts(good, unsure, idle)
    assert trusts(good, bad, fine)  # what is overrated is chosen most
    assert not trusts(good, bad, Gain(0.3, 8))
    assert not trusts(unsure, good, fine)
    assert not trusts(Evidence(), Evidence(), Gain())


def test_a_gain_is_the_share_of_late_labels_that_are_worse() -> None:
    early = np.array([1.0, 2.0, 3.0, np.inf])
    assert gain(early, np.array([0.0, 0.0, 0.5, 0.9])) == Gain(0.0, 4)
    assert gain(early, np.array([4.0, 4.0, 4.0, 4.0])) == Gain(0.75, 4)
    assert gain(early, early) == Gain(0.5, 4)
    assert gain(early, early[:3]) == gain(early[:3], early) == Gain()


def test_choices_that_came_out_worse_end_the_trust() -> None:
    states = []
    for late in (0.0, 40.0):
        algorithm = Guided(CHOICES, seed=1, pool=40)
        for i in range(36):
            algorithm.tell(told(algorithm.ask(i, 1), late))
        algorithm.ask(36, 1)
        states.append(algorithm.report()["guard"])
    assert states == ["trusted", "not trusted"]


def test_losses_without_order_are_seldom_trusted() -> None:
    chosen = 0
    for seed in range(5):
        for jobs in drive(Guided(CHOICES, seed=seed, pool=40), 50):
            chosen += sum(text.startswith("guided") for text in jobs.origin)
    assert chosen <= 0.1 * 5 * 50


# -- odd input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [Space(a=Choice((0, 1))), Space(a=Choice(range(40))), Space(z=Real(0, 1))],
    ids=["two candidates", "one choice", "one real"],
)
def test_small_spaces_are_searched(space: Space) -> None:
    def loss(**values: Any) -> float:
        return float(next(iter(values.values())))

    result = sl.search(space, loss, budget=40, algorithm=spec())
    assert result.best.value <= 0.1


def test_equal_values_are_not_trusted_and_the_search_goes_on() -> None:
    result = sl.search(CHOICES, lambda x: 1.0, budget=40, algorithm=spec())
    assert result.counts["evaluations"] == 40
    assert result.meta["proposals"]["search"]["state"]["guard"] == "not trusted"


def test_few_labels_among_failures_are_no_reason_to_stop() -> None:
    def failing(x: list[int]) -> float:
        if sum(x) % 3:
            raise ValueError("no")
        return additive(x)

    result = sl.search(CHOICES, failing, budget=60, algorithm=spec())
    assert result.counts["evaluations"] == 60


@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("predictor", ["ridge", "stack"])
def test_signals_without_a_word_are_survived(count: int, predictor: str) -> None:
    class Odd(Signalled):
        signals = tuple(Signal(f"s{i}", when="static") for i in range(count))

        def static_signals(self, population: Population) -> NDArray[np.float64]:
            same = self.losses(population)[:, None] * np.arange(1, count + 1)
            return np.full(same.shape, np.nan) if count == 1 else same

    algorithm = spec(predictor=predictor, pool=30)
    stage = Stage("search", CHOICES, Odd(), algorithm, Budget(24))
    result = run(SearchConfig((stage,), seed=2))
    assert result.counts["evaluations"] == 24
    state = result.meta["proposals"]["search"]["state"]
    assert state["labels"] == 23  # as of the last proposal
    assert state["chosen"] + 12 <= 24
    if count < 40:  # they change nothing
        none = spec(predictor=predictor, pool=30, signals=None)
        alone = run(SearchConfig((replace(stage, algorithm=none),), seed=2))
        assert result.records is not None
        assert alone.records is not None
        assert result.records.keys == alone.records.keys


@pytest.mark.parametrize("guard", ["measured", "always"])
def test_one_label_and_equal_labels_are_not_trusted(guard: Any) -> None:
    for fine in (1, 24):
        algorithm = Guided(CHOICES, seed=1, pool=20, predictor="stack", first_fit=4, guard=guard)
        for i in range(24):
            jobs = algorithm.ask(i, 1)
            assert len(jobs) == 1
            loss = 3.0 if i < fine else np.inf
            algorithm.tell(Told(jobs.ids, jobs.population, np.array([[loss]]), np.zeros(1)))
        state = algorithm.report()
        assert state["labels"] == fine
        assert (state["guard"] == "trusted") == (guard == "always" and fine == 24)


# -- signals ------------------------------------------------------------------------------------


class Signalled:
    """A loss that codes say little about, and signals: the loss itself, noise, nothing."""

    objectives = (sl.Objective("value"),)
    fidelities = (sl.Fidelity("full"),)
    signals = (Signal("same", when="static"), Signal("late"), Signal("none", when="static"))
    reproducibility = "exact"

    def setup(self) -> None:
        """Nothing to load."""

    def losses(self, population: Population) -> NDArray[np.float64]:
        x = population["x"].astype(np.int64)
        return np.sin(7.0 * x[:, :-1] * x[:, 1:] + x[:, 1:]).sum(axis=1)

    def static_signals(self, population: Population) -> NDArray[np.float64]:
        same = self.losses(population)
        return np.column_stack([same, np.full(len(same), np.inf), np.full(len(same), np.nan)])

    def evaluate(self, jobs: Jobs) -> Evaluations:
        return Evaluations(self.losses(jobs.population))

    def identity(self) -> Mapping[str, Any]:
        return {"version": 1}


def test_static_signals_of_an_evaluator_are_used() -> None:
    best = []
    for options in ({}, {"signals": None}):
        stage = Stage("search", CHOICES, Signalled(), spec(**options), Budget(40))
        result = run(SearchConfig((stage,), seed=2))
        best.append(result.best.value)
        algorithm = stage.build_algorithm(seed=2, first_id=0, seeds=None)
        names = [name for name, _ in algorithm.settings()["signals"]]
        assert names == ([] if options else ["same", "none"])
    assert best[0] < best[1] - 1


def test_a_run_states_what_proposing_took() -> None:
    result = sl.search(CHOICES, additive, budget=40, algorithm=spec())
    (note,) = result.meta["proposals"].values()
    assert note["seconds"] > 0
    assert note["seconds_per_evaluation"] == pytest.approx(note["seconds"] / 40)
    assert note["state"]["guard"] == "trusted"
    assert note["state"]["fitted_on"] == 38
