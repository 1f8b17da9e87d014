"""The profile and the search that a separable program seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import searchlab
from searchlab.algorithms.base import Seeds, Told
from searchlab.algorithms.profile import (
    Elements,
    Profile,
    ProfileTable,
    Replicated,
    isotonic,
    profile_space,
)
from searchlab.algorithms.separable import (
    AdoptProfile,
    ProgramSeeds,
    Separable,
    additivity,
    stages,
)
from searchlab.budget import LinearBudget
from searchlab.config import Answers, SearchConfig
from searchlab.constraints import Tie
from searchlab.errors import ConfigError
from searchlab.evaluator import FunctionEvaluator
from searchlab.population import Jobs
from searchlab.search import run
from searchlab.space import Space
from searchlab.testing.algorithm import SPACES, AlgorithmSuite, Build, drive
from searchlab.variables import Choice, Integer


class TestProfile(AlgorithmSuite):
    only_seeds = True

    @pytest.fixture(params=["plain"])
    def space(self, request: pytest.FixtureRequest) -> Space:
        return SPACES[request.param]()

    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Profile(
            space, seed=seed, first_id=first_id, seeds=seeds, quantum=4
        )


def predicted(space: Space, seeds: Seeds | None) -> Seeds:
    """Seeds with predictions of some kind."""
    shape = Elements(space).allowed.shape
    priced = np.random.default_rng(3).random(shape)
    given = seeds or Seeds(space.empty(), ())
    return ProgramSeeds(given.population, given.origin, priced)


class TestSeparable(AlgorithmSuite):
    @pytest.fixture(params=["plain", "budgeted"])
    def space(self, request: pytest.FixtureRequest) -> Space:
        return SPACES[request.param]()

    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Separable(
            space, seed=seed, first_id=first_id, seeds=predicted(space, seeds), n_random=3
        )


class TestSeparableAlone(AlgorithmSuite):
    @pytest.fixture(params=["plain", "budgeted"])
    def space(self, request: pytest.FixtureRequest) -> Space:
        return SPACES[request.param]()

    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Separable(
            space, seed=seed, first_id=first_id, seeds=seeds, n_random=3, quantum=4
        )


@pytest.mark.parametrize("make", [Profile, Separable])
@pytest.mark.parametrize("name", ["real", "conditional"])
def test_spaces_without_labels_are_refused_by_name(make: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed for a separable program.*evolution"):
        make(SPACES[name]())


def test_a_budget_that_refuses_the_profile_is_named() -> None:
    with pytest.raises(ConfigError, match="profile_space"):
        Profile(SPACES["budgeted"]())


def space_of(e: int = 6, upper: float = 20, **more: Any) -> Space:
    return Space(
        bits=Choice((2, 4, 8), shape=(e,)),
        constraints=[LinearBudget({"bits": [2.0, 4.0, 8.0]}, upper=upper), *more.get("also", ())],
    )


def evaluator_of(space: Space, noise: float = 0.0, mixed: float = 0.0) -> FunctionEvaluator:
    rng = np.random.default_rng(5)
    table = np.sort(rng.random((space.size, 3)), axis=1)[:, ::-1] * rng.random((space.size, 1))
    pairs = rng.normal(size=(space.size, space.size))

    def value(columns: Any, fidelity: str, seed: int) -> Any:
        x = columns["bits"].astype(int)
        own = table[np.arange(space.size), x]
        cross = np.einsum("ni,ij,nj->n", own, pairs, own)
        common = np.random.default_rng(seed).normal()  # the same for all: pairs take it off
        return own.sum(axis=1) + mixed * cross + noise * common

    return FunctionEvaluator(value, profile_space(space), columns=True, version=1)


def test_the_profile_has_the_reference_and_every_single_change() -> None:
    space = Space(a=Choice(tuple("xyz")), n=Integer(0, 6, step=3), b=Choice(tuple("xyz")))
    tied = Space(space.variables, constraints=[Tie(("a", "b"))])
    for some, count in ((space, 7), (tied, 5)):
        algorithm = Profile(some)
        rows = [jobs for jobs in drive(algorithm, 40, most_empty=3) if len(jobs)]
        plans = [plan for jobs in rows for plan in some.decode(jobs.population)]
        assert len(plans) == count
        assert plans[0] == {"a": "z", "n": 6, "b": "z"}
        assert {(p["a"], p["b"]) for p in plans if p["n"] == 6} >= {("z", "z")}
    assert all(plan["a"] == plan["b"] for plan in plans)
    assert len(Profile(space, reference={"a": "x", "n": 0, "b": "y"}).seeds.origin) == 7


def test_costs_of_tied_elements_add_up() -> None:
    space = space_of(4, 26, also=[Tie((("bits", 0), ("bits", 2)))])
    elements = Elements(space)
    assert elements.costs.shape == (1, 3, 3)
    assert elements.costs[0, 0].tolist() == [4, 8, 16]
    some = elements.population(np.array([[1, 0, 2]]))
    assert space.decode(some) == [{"bits": [4, 2, 4, 8]}]
    assert elements.codes(some).tolist() == [[1, 0, 2]]


def test_two_stages_reach_the_optimum_of_a_separable_problem() -> None:
    space = space_of()
    evaluator = evaluator_of(space)
    first, second = stages(space, evaluator, 40)
    assert (first.budget.evaluations, second.budget.evaluations) == (13, 27)
    result = run(SearchConfig((first, second)))
    every = space.enumerate()
    values = evaluator.function(dict(every.columns), "full", 0)
    assert result.best.value == pytest.approx(values.min(), rel=1e-12)
    assert result.counts["evaluations"] == 40
    records = result.records
    assert records is not None
    optimum = records.origin.index("program:optimum")
    assert records.values[optimum, 0] == pytest.approx(values.min(), rel=1e-12)
    found = additivity(result)
    assert found.kendall_tau == pytest.approx(1.0)
    assert "Kendall tau 1.000" in str(found)


def test_the_short_form_makes_both_stages(tmp_path: Any) -> None:
    space = space_of(4, 14)

    def objective(bits: list[int]) -> float:
        return sum((i + 1) / b for i, b in enumerate(bits))

    result = searchlab.search(space, objective, budget=20, algorithm="separable")
    assert result.counts["evaluations"] == 20
    assert sum(result.best.plan["bits"]) <= 14
    assert additivity(result).kendall_tau == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="profile alone takes 9; allowed: 10 or more"):
        searchlab.search(space, objective, budget=9, algorithm="separable")
    again = searchlab.search(space, objective, budget=14, algorithm="separable", out=tmp_path / "r")
    more = searchlab.search(space, objective, budget=20, algorithm="separable", out=tmp_path / "r")
    assert (again.counts["evaluations"], more.counts["evaluations"]) == (14, 20)
    assert more.best.value == result.best.value


def test_interactions_show_in_the_additivity_and_are_searched() -> None:
    space = space_of(8, 34)
    evaluator = evaluator_of(space, mixed=3.0)
    result = run(SearchConfig(stages(space, evaluator, 150)))
    records = result.records
    assert records is not None
    optimum = records.values[records.origin.index("program:optimum"), 0]
    assert result.best.value < optimum
    assert additivity(result).kendall_tau < 0.9


def test_replicates_pair_differences_and_give_standard_errors() -> None:
    space = space_of()
    plain, noisy = evaluator_of(space), evaluator_of(space, noise=10.0)
    wide = profile_space(space)
    plan = Profile(wide).seeds
    tables = []
    for evaluator in (Replicated(plain, 3), Replicated(noisy, 3)):
        jobs = Jobs(np.arange(len(plan.origin)), plan.population, wide.keys(plan.population))
        values = evaluator.evaluate(jobs).values
        assert values.shape == (13, 3)
        tables.append(ProfileTable.of(Answers(wide, plan.population, plan.origin, values)))
    assert tables[1].losses == pytest.approx(tables[0].losses, abs=1e-12)
    assert np.nanmax(tables[1].std_error) < 1e-12
    result = run(SearchConfig(stages(space, noisy, 60, replicates=3)))
    assert result.counts["evaluations"] == 13 + 60 - 39


def test_isotonic_pools_what_runs_against_the_order() -> None:
    assert isotonic([1, 3, 2, 4]).tolist() == [1, 2.5, 2.5, 4]
    assert isotonic([3, 2, 1]).tolist() == [2, 2, 2]
    assert isotonic([2.0, 0.0], np.array([3.0, 1.0])).tolist() == [1.5, 1.5]


def test_a_table_is_cleaned_along_the_cost() -> None:
    losses = np.array([[5.0, 1.0, 2.0], [4.0, 3.0, 0.5]])
    table = ProfileTable(losses, np.full((2, 3), np.nan), np.array([2, 2]), 0.0)
    order = np.array([[2.0, 4, 8], [2, 4, 8]])
    assert table.monotone(order, floor=0.5).losses.tolist() == [[4.5, 1, 1], [3.5, 2.5, 0]]


@pytest.mark.parametrize("bad", ["missing", "failed", "reference"])
def test_an_incomplete_profile_is_named(bad: str) -> None:
    space = profile_space(space_of(3, 12))
    plan = Profile(space).seeds
    losses = np.ones((7, 1))
    rows = np.arange(7)
    if bad == "missing":
        rows = np.array([0, 1, 2, 3, 5, 6])
    else:
        losses[4 if bad == "failed" else 0] = np.inf
    answers = Answers(
        space, plan.population.take(rows), tuple(plan.origin[i] for i in rows), losses[rows]
    )
    with pytest.raises(ConfigError, match=r"no finite value of (label 1 of element bits\[1\]|.*)"):
        ProfileTable.of(answers)


def test_adopted_seeds_keep_the_budget_and_come_with_predictions() -> None:
    space = space_of()
    wide, plan = profile_space(space), Profile(profile_space(space)).seeds
    values = evaluator_of(space).function(dict(plan.population.columns), "full", 0)[:, None]
    seeds = AdoptProfile(front=3, monotone=True)(
        Answers(wide, plan.population, plan.origin, values), space
    )
    assert isinstance(seeds, ProgramSeeds)
    assert seeds.origin == ("program:optimum", "program:front0", "program:front1", "program:front2")
    assert space.is_feasible(seeds.population).all()
    assert seeds.priced is not None
    assert seeds.priced.shape == (6, 3)


def test_moves_keep_budgets_and_use_them() -> None:
    space = space_of(20, 80)
    algorithm = Separable(space, seeds=predicted(space, None), n_random=4, share=1.0)
    for start in range(0, 60):
        jobs = algorithm.ask(start, 1)
        assert space.is_feasible(jobs.population).all()
        losses = -space.cost(jobs.population)["budget"]
        algorithm.tell(Told(jobs.ids, jobs.population, losses[:, None], np.zeros(len(jobs))))
    assert losses[0] < -70


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, f: stages(s, f, 13), "profile alone takes 13"),
        (lambda s, f: Separable(s, share=2), "share"),
        (lambda s, f: Replicated(f, 1), "replicates"),
        (lambda s, f: Separable(s, seeds=ProgramSeeds(s.empty(), (), np.ones((1, 1)))), "shape"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    space = space_of()
    with pytest.raises(ConfigError, match=message) as caught:
        make(space, evaluator_of(space))
    assert "allowed" in str(caught.value)
