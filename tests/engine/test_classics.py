"""Regularised evolution, local search and estimation of distribution."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab.algorithms import Random, Seeds, Told
from searchlab.algorithms.aging import RegularisedEvolution
from searchlab.algorithms.base import Algorithm
from searchlab.algorithms.eda import EDA
from searchlab.algorithms.local_search import LocalSearch
from searchlab.errors import ConfigError
from searchlab.space import Space
from searchlab.testing.algorithm import SPACES, AlgorithmSuite, Build
from searchlab.variables import ActiveIf, Choice, Integer, Real, Subset


class TestRegularisedEvolution(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: RegularisedEvolution(
            space, seed=seed, first_id=first_id, seeds=seeds, population=10, tournament=4
        )


class TestRegularisedEvolutionInGroups(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: RegularisedEvolution(
            space, seed=seed, first_id=first_id, seeds=seeds, population=7, quantum=8
        )


class TestLocalSearch(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: LocalSearch(
            space, seed=seed, first_id=first_id, seeds=seeds, n_random=4
        )


class TestSteepestLocalSearch(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: LocalSearch(
            space, seed=seed, first_id=first_id, seeds=seeds, n_random=3, improvement="best"
        )


def _switched() -> Space:
    return Space(
        solver=Choice(("one", "many")),
        order=Choice((1, 2, 3), shape=(4,), when=(ActiveIf("solver", ("many",)),)),
        members=Subset(9, 3),
        even=Integer(0, 10, step=2),
    )


class TestEDA(AlgorithmSuite):
    kinds: ClassVar = {k: SPACES[k] for k in ("plain", "budgeted")} | {"switched": _switched}

    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: EDA(
            space, seed=seed, first_id=first_id, seeds=seeds, quantum=12, shrink=0.9
        )

    @pytest.fixture(params=["budgeted", "plain", "switched"])
    def space(self, request: pytest.FixtureRequest) -> Space:
        return self.kinds[request.param]()


@pytest.mark.parametrize("name", sorted(set(SPACES) - set(TestEDA.kinds)))
def test_eda_names_what_it_cannot_learn(name: str) -> None:
    with pytest.raises(ConfigError, match=r"eda on '\w+', a \w+; allowed: .*cma.*evolution"):
        EDA(SPACES[name]())


@pytest.mark.parametrize(
    "make",
    [
        lambda space: RegularisedEvolution(space, population=0),
        lambda space: RegularisedEvolution(space, tournament=0),
        lambda space: LocalSearch(space, improvement="worst"),
        lambda space: LocalSearch(space, n_random=0),
        lambda space: EDA(space, elite=0.0),
        lambda space: EDA(space, shrink=1.5),
        lambda space: EDA(space, quantum=1),
        lambda space: EDA(Space(big=Integer(0, 10**6))),
    ],
)
def test_wrong_settings_are_refused(make: Callable[[Space], Algorithm]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        make(Space(a=Integer(0, 5)))


Losses = Callable[[NDArray[Any]], NDArray[np.float64]]


def run(algorithm: Algorithm, loss: Losses, n: int, lag: int = 0) -> list[float]:
    """Losses of n ids in order; each group is told `lag` ids late. Void ids are left out."""
    out: list[float] = []
    open_: list[Told] = []
    q = algorithm.quantum
    for start in range(0, n, q):
        while open_ and start + q - int(open_[0].ids[0]) > lag + q:
            algorithm.tell(open_.pop(0))
        jobs = algorithm.ask(start, q)
        if len(jobs):
            values = loss(jobs.population["x"])
            out += values.tolist()
            open_.append(Told(jobs.ids, jobs.population, values[:, None], np.zeros(len(jobs))))
    return out


def hidden(seed: int, shape: int = 12, k: int = 6) -> tuple[Space, Losses]:
    wanted = np.random.default_rng(seed).integers(0, k, shape)
    return Space(x=Choice(range(k), shape=(shape,))), lambda x: (x != wanted).sum(1).astype(float)


@pytest.mark.parametrize("lag", [0, 7])
@pytest.mark.parametrize(
    "make",
    [
        lambda space, seed: RegularisedEvolution(space, seed=seed, population=20, tournament=5),
        lambda space, seed: LocalSearch(space, seed=seed),
        lambda space, seed: LocalSearch(space, seed=seed, improvement="best"),
        lambda space, seed: EDA(space, seed=seed, quantum=16),
    ],
    ids=["aging", "first", "best", "eda"],
)
def test_each_finds_much_more_than_random_search(
    make: Callable[[Space, int], Algorithm], lag: int
) -> None:
    for seed in range(3):
        space, loss = hidden(seed)
        found = min(run(make(space, seed), loss, 600, lag))
        assert found <= min(run(Random(space, seed=seed), loss, 600)) - 3


# -- regularised evolution ----------------------------------------------------------------------


def _tell(algorithm: Algorithm, values: list[int], losses: list[float]) -> None:
    population = algorithm.space.population([{"a": value} for value in values])
    rows = np.array(losses)[:, None]
    algorithm.tell(Told(np.arange(len(values)), population, rows, np.zeros(len(values))))


def test_the_old_die_and_the_failed_never_join() -> None:
    algorithm = RegularisedEvolution(Space(a=Integer(0, 1000)), population=3, tournament=50)
    _tell(algorithm, [0, 1, 2, 3, 4, 5], [0.0, 1.0, 7.0, np.inf, 6.0, 9.0])
    jobs = algorithm.ask(6, 20)
    assert jobs.parents is not None
    assert set(jobs.parents.ravel().tolist()) == {4}  # the best of 2, 4 and 5


def test_one_element_changes() -> None:
    space = Space(a=Integer(0, 9), x=Choice(range(4), shape=(6,)))
    algorithm = RegularisedEvolution(space, population=2, tournament=1)
    parts = [algorithm.ask(0, 2)]
    algorithm.tell(Told(parts[0].ids, parts[0].population, np.zeros((2, 1)), np.zeros(2)))
    jobs = algorithm.ask(2, 12)
    assert jobs.parents is not None
    for row, (parent, _) in enumerate(jobs.parents.tolist()):
        a = jobs.population["a"][row] != parts[0].population["a"][parent]
        x = (jobs.population["x"][row] != parts[0].population["x"][parent]).sum()
        assert int(a) + int(x) == 1 or jobs.origin[row] != "vary"


# -- local search -------------------------------------------------------------------------------


def test_first_improvement_moves_on_at_once_and_best_improvement_waits() -> None:
    space = Space(x=Choice(range(5), shape=(4,)))
    start = Seeds(space.population([{"x": [4, 4, 4, 4]}]), ("seed",))

    def loss(x: NDArray[Any]) -> NDArray[np.float64]:
        return x.sum(axis=1).astype(float)

    for improvement, steps in (("first", None), ("best", 16)):
        algorithm = LocalSearch(
            space,
            seeds=start,
            n_random=1,
            improvement=improvement,  # type: ignore[arg-type]
        )
        centres = []
        told: dict[int, float] = {}
        for i in range(28):
            jobs = algorithm.ask(i, 1)
            assert jobs.parents is not None
            told[i] = float(loss(jobs.population["x"])[0])
            algorithm.tell(Told(jobs.ids, jobs.population, np.array([[told[i]]]), np.zeros(1)))
            if jobs.origin == ("neighbour",):
                centres.append(int(jobs.parents[0, 0]))
        if steps is None:  # every proposal is around the best that was known then
            ids = list(range(2, 28))
            best = [min(range(i), key=lambda j: (told[j], j)) for i in ids]
            assert centres == best
        else:  # both starts may share neighbours; the centre is the best when it was chosen
            changes = [k for k in range(1, len(centres)) if centres[k] != centres[k - 1]]
            assert changes
            assert all(b - a >= 8 for a, b in zip([0, *changes], changes, strict=False))
            for k in changes:
                i = k + 2
                assert told[centres[k]] == min(told[j] for j in range(i))


@pytest.mark.parametrize("improvement", ["first", "best"])
def test_a_climb_that_ends_starts_again(improvement: Any) -> None:
    space = Space(x=Choice(range(3), shape=(5,)))
    algorithm = LocalSearch(space, n_random=2, improvement=improvement)
    origins: list[str] = []
    for i in range(200):
        jobs = algorithm.ask(i, 1)
        origins += jobs.origin
        flat = Told(jobs.ids, jobs.population, np.ones((len(jobs), 1)), np.zeros(len(jobs)))
        algorithm.tell(flat)
    starts = [
        i for i in range(1, len(origins)) if origins[i - 1 : i + 1] == ["neighbour", "random"]
    ]
    assert len(starts) >= 5


# -- estimation of distribution -----------------------------------------------------------------


def test_tables_follow_the_best_and_the_support_shrinks() -> None:
    space = Space(x=Choice(range(8), shape=(6,)))
    algorithm = EDA(space, quantum=40, shrink=0.6, rate=1.0)
    kept = []
    for generation in range(6):
        jobs = algorithm.ask(40 * generation, 40)
        x = jobs.population["x"]
        losses = (x != 3).sum(axis=1).astype(float)[:, None]
        algorithm.tell(Told(jobs.ids, jobs.population, losses, np.zeros(len(jobs))))
        table = algorithm._tables["x"]
        kept.append((table > 0).sum(axis=1).tolist())
        assert table.sum(axis=1) == pytest.approx(1.0)
    assert kept == [[keep] * 6 for keep in (5, 3, 2, 2, 1, 1)]
    assert (table[:, 3] == 1.0).sum() >= 5


def test_a_subset_keeps_the_members_that_matter() -> None:
    space = Space(x=Subset(60, 6))
    good = np.zeros(60)
    good[:6] = 1
    algorithm = EDA(space, quantum=60, shrink=0.7)
    found = run(algorithm, lambda x: 6.0 - x @ good, 1200)
    assert min(found) == 0.0


def test_redraws_reach_what_was_left_out() -> None:
    space = Space(x=Choice(range(3), shape=(2,)))
    algorithm = EDA(space, quantum=4, shrink=0.1)
    assert len(run(algorithm, lambda x: (x != 1).sum(1).astype(float), 400)) == 9


# -- speed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [RegularisedEvolution, LocalSearch, EDA])
def test_a_proposal_costs_no_more_after_many_answers(make: Callable[..., Algorithm]) -> None:
    """Loose, as machines are shared: a cost that grows with the history would be tenfold."""
    space = Space(x=Choice(range(8), shape=(32,)), y=Integer(0, 10**3))
    algorithm, rng = make(space, seed=1), np.random.default_rng(0)
    spent = []
    q = algorithm.quantum
    for start in range(0, 4096, q):
        before = time.perf_counter()
        jobs = algorithm.ask(start, q)
        losses = rng.random((len(jobs), 1))
        algorithm.tell(Told(jobs.ids, jobs.population, losses, np.zeros(len(jobs))))
        spent.append((time.perf_counter() - before) / q)
    assert np.median(spent[-512 // q :]) < 5 * np.median(spent[512 // q : 1024 // q]) + 1e-3


def test_a_real_variable_has_neighbours_too() -> None:
    space = Space(x=Real(0, 1, shape=(2,)))
    found = run(LocalSearch(space, seed=2), lambda x: ((x - 0.3) ** 2).sum(1), 200)
    assert min(found) < 0.02
