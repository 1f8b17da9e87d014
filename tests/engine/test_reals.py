"""CMA-ES, the (1+1) strategy and Optuna's samplers: conformance, rebuilding, known behaviour."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import searchlab
from searchlab._variable import normals
from searchlab.algorithms._coordinates import Coordinates
from searchlab.algorithms.base import Algorithm, Seeds, Told
from searchlab.algorithms.cma import CMA
from searchlab.algorithms.es11 import OnePlusOne
from searchlab.algorithms.optuna import GP, TPE, Parameters
from searchlab.config import AlgorithmSpec
from searchlab.constraints import Predicate
from searchlab.errors import ConfigError
from searchlab.population import Jobs, Population
from searchlab.space import Space
from searchlab.testing.algorithm import SPACES, AlgorithmSuite, Build, drive, proposals
from searchlab.uniforms import uniforms, uniforms_of
from searchlab.variables import ActiveIf, Affine, Choice, Integer, Ordered, Real, Simplex, Subset
from tests.engine.loop_tools import digest_elsewhere


def _sums() -> Space:
    return Space(
        share=Simplex(4),
        weight=Affine(3, 1.0, low=-0.5, high=1.5, shape=(2,)),
        rate=Real(1e-4, 1, log=True),
    )


def _steps() -> Space:
    return Space(x=Real(0, 1, shape=(3,), step=0.05), fixed=Real(2, 2), only=Simplex(1))


REALS: dict[str, Callable[[], Space]] = {"real": SPACES["real"], "sums": _sums, "steps": _steps}


class OfReals(AlgorithmSuite):
    enumerates = False  # there are no small spaces of reals

    @pytest.fixture(params=sorted(REALS))
    def space(self, request: pytest.FixtureRequest) -> Space:
        return REALS[request.param]()


class TestCMA(OfReals, AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: CMA(
            space, seed=seed, first_id=first_id, seeds=seeds, population=6
        )


class TestCMAForWorkers(OfReals, AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: CMA(
            space, seed=seed, first_id=first_id, seeds=seeds, workers=5
        )


class TestOnePlusOne(OfReals, AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: OnePlusOne(
            space, seed=seed, first_id=first_id, seeds=seeds
        )


class TestOnePlusOneWithLag(OfReals, AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: OnePlusOne(
            space, seed=seed, first_id=first_id, seeds=seeds, lag=8
        )


class TestTPE(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: TPE(
            space, seed=seed, first_id=first_id, seeds=seeds
        )

    def generations(self, algorithm: Algorithm) -> int:
        return 16


SMALL: dict[str, Callable[[], Space]] = {
    "mixed": lambda: Space(kind=Choice(("a", "b")), n=Integer(0, 9), share=Simplex(3)),
    "conditional": lambda: Space(
        kind=Choice(("a", "b")), x=Real(0, 1, when=(ActiveIf("kind", ("b",)),)), pick=Subset(4, 2)
    ),
}


class TestGP(AlgorithmSuite):
    """Fewer candidates and smaller spaces: every proposal is a fit."""

    @pytest.fixture(params=sorted(SMALL))
    def space(self, request: pytest.FixtureRequest) -> Space:
        return SMALL[request.param]()

    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: GP(
            space, seed=seed, first_id=first_id, seeds=seeds, startup=7
        )

    def generations(self, algorithm: Algorithm) -> int:
        return 8

    def test_no_candidate_is_proposed_twice(self, build: Build, space: Space) -> None:
        keys = [key for _, key in proposals(drive(self.new(build, space), 11))]
        assert len(set(keys)) == len(keys)


def trace_digest() -> str:
    """All proposals of some runs, as one digest."""
    out = hashlib.blake2b(digest_size=16)
    for build, space in (
        (CMA, _sums()),
        (OnePlusOne, _sums()),
        (TPE, Space(kind=Choice(("a", "b"), shape=(3,)), x=Real(0, 1))),
    ):
        for i, key in proposals(drive(build(space, seed=5), 24)):
            out.update(i.to_bytes(8, "big") + key)
    return out.hexdigest()


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_another_process_proposes_the_same(hash_seed: str) -> None:
    assert digest_elsewhere(Path(__file__), hash_seed) == trace_digest()


# -- coordinates --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REALS))
def test_candidates_and_vectors_are_one_to_one(name: str) -> None:
    space = REALS[name]()
    coordinates = Coordinates(space, name="test")
    population = space.sample(uniforms(1, 0, 0, 50, space.sample_width))
    vectors = coordinates.vectors(population)
    again = coordinates.population(vectors, np.empty((50, space.repair_width)))
    for key in space.variables:
        assert np.allclose(again[key], population[key], rtol=1e-12, atol=1e-12)
    whole = coordinates.population(vectors, np.empty((50, 0)))
    single = [coordinates.population(vectors[i : i + 1], np.empty((1, 0))) for i in range(50)]
    assert Population.concat(single).equals(whole)


def test_sums_lose_one_coordinate_each() -> None:
    assert Coordinates(_sums(), name="test").size == 3 + 2 * 2 + 1
    assert Coordinates(_steps(), name="test").size == 3


def test_affine_coordinates_keep_lengths() -> None:
    """All directions within the sum count alike: the basis is orthonormal."""
    space = Space(w=Affine(6, 0.0, low=-10, high=10))
    coordinates = Coordinates(space, name="test")
    a = np.random.default_rng(0).normal(size=(20, 5)) * 0.1
    w = coordinates.population(a, np.empty((20, 0)))["w"]
    ratio = np.linalg.norm(w, axis=1) / np.linalg.norm(a, axis=1)
    assert np.allclose(ratio, ratio[0])
    assert np.allclose(w.sum(axis=1), 0)


@pytest.mark.parametrize("make", [CMA, OnePlusOne])
@pytest.mark.parametrize(
    "space",
    [
        Space(c=Choice((0, 1)), x=Real(0, 1)),
        Space(n=Integer(0, 5), x=Real(0, 1)),
        Space(s=Subset(4, 2)),
        Space(c=Choice((0, 1)), x=Real(0, 1, when=(ActiveIf("c", (1,)),))),
    ],
)
def test_other_variables_are_refused_by_name(make: Any, space: Space) -> None:
    with pytest.raises(ConfigError, match=r"'[cns]', a (choice|integer|subset).*'evolution'"):
        make(space)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CMA(Space(x=Real(0, 1))), "1 coordinates.*'es11'"),
        (lambda: CMA(_sums(), population=3), "population 3"),
        (lambda: CMA(_sums(), workers=0), "workers 0"),
        (lambda: CMA(_sums(), sigma=0), "sigma 0"),
        (lambda: OnePlusOne(_sums(), lag=0), "lag 0"),
        (lambda: OnePlusOne(_sums(), rate=9), "rate 9"),
        (lambda: OnePlusOne(_sums(), sigma=2), "sigma 2"),
        (lambda: TPE(_sums(), startup=0), "startup 0"),
    ],
)
def test_wrong_settings_are_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


# -- CMA-ES -------------------------------------------------------------------------------------


def _told(jobs: Jobs, losses: NDArray[np.float64], violation: Any = None) -> Told:
    broken = np.zeros(len(jobs)) if violation is None else violation
    return Told(jobs.ids, jobs.population, losses[:, None], broken)


def _run(
    algorithm: Algorithm, f: Callable[[Population], NDArray[np.float64]], n: int
) -> tuple[float, list[Jobs]]:
    best, parts = np.inf, []
    for start in range(0, n, algorithm.quantum):
        jobs = algorithm.ask(start, algorithm.quantum)
        losses = f(jobs.population)
        algorithm.tell(_told(jobs, losses))
        best = min(best, float(losses.min()))
        parts.append(jobs)
    return best, parts


def test_cma_is_the_package_with_our_normals() -> None:
    """Away from the bounds the trace is the package's own, generation by generation."""
    import cma

    space = Space(x=Real(-1, 1, shape=(5,)))
    target = np.array([0.1, -0.2, 0.05, 0.0, 0.15])

    def f(x: NDArray[np.float64]) -> NDArray[np.float64]:
        losses: NDArray[np.float64] = ((x - target) ** 2 * np.array([1, 4, 9, 1, 2])).sum(axis=1)
        return losses

    stock: list[NDArray[np.float64]] = []
    theirs = cma.CMAEvolutionStrategy(
        [0.5] * 5,
        0.05,
        {"popsize": 8, "randn": lambda *n: stock.pop().reshape(n), "seed": np.nan, "verbose": -9},
    )
    ours = CMA(space, seed=4, sigma=0.05)
    for start in range(0, 480, 8):
        ids = np.arange(start, start + 8)
        stock.append(normals(uniforms_of(4, 0, ids, 5)))
        wanted = np.array(theirs.ask())
        jobs = ours.ask(start, 8)
        assert np.allclose(jobs.population["x"], -1 + 2 * wanted, atol=1e-9)
        losses = f(jobs.population["x"])
        theirs.tell(list(wanted), losses.tolist())
        ours.tell(_told(jobs, losses))
    assert losses.min() < 1e-6


def test_cma_leaves_numpys_own_generator_alone() -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]  # noqa: NPY002
    _run(CMA(_sums()), lambda p: p["rate"], 80)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr,index]  # noqa: NPY002


def _rastrigin(population: Population) -> NDArray[np.float64]:
    x = population["x"] - 1.3
    losses: NDArray[np.float64] = (x**2 - 10 * np.cos(2 * np.pi * x) + 10).sum(axis=1)
    return losses


def test_cma_restarts_with_larger_populations_and_is_rebuilt_across_them() -> None:
    space = Space(x=Real(-5, 5, shape=(3,)))
    stepwise = CMA(space, seed=1)
    best, parts = _run(stepwise, _rastrigin, 8000)
    assert stepwise._number >= 2
    assert best < 1e-6
    one = CMA(space, seed=1, restarts=False)
    assert _run(one, _rastrigin, 2400)[0] >= best
    assert one._number == 0
    population = Population.concat([jobs.population for jobs in parts])
    ids = np.concatenate([jobs.ids for jobs in parts])
    rebuilt = CMA(space, seed=1)
    rebuilt.issue(ids, [key for jobs in parts for key in jobs.keys])
    rebuilt.tell(Told(ids, population, _rastrigin(population)[:, None], np.zeros(len(ids))))
    assert proposals([rebuilt.ask(8000, 16)]) == proposals([stepwise.ask(8000, 16)])


def test_cma_finds_an_optimum_on_the_bound_and_one_on_a_face_of_the_simplex() -> None:
    space = Space(x=Real(0, 1, shape=(4,)), share=Simplex(4))
    target = np.array([0.0, 1.0, 0.3, 0.7])
    share = np.array([0.7, 0.3, 0.0, 0.0])

    def f(p: Population) -> NDArray[np.float64]:
        losses: NDArray[np.float64] = ((p["x"] - target) ** 2).sum(1) + (
            (p["share"] - share) ** 2
        ).sum(1)
        return losses

    assert _run(CMA(space, seed=2), f, 2000)[0] < 1e-8
    assert _run(OnePlusOne(space, seed=2), f, 1200)[0] < 1e-3


def test_cma_finds_the_nearest_share_to_a_point_outside() -> None:
    """Without the penalty for what is moved, both seeds stop a long way off."""
    space = Space(share=Simplex(6))
    outside = np.array([0.9, -0.4, 0.5, -0.6, 0.3, -0.2])
    nearest = space.variables["share"].repair(outside[None])
    least = float(((nearest - outside) ** 2).sum())

    def f(p: Population) -> NDArray[np.float64]:
        losses: NDArray[np.float64] = ((p["share"] - outside) ** 2).sum(axis=1) - least
        return losses

    for seed in (1, 2):
        assert _run(CMA(space, seed=seed, restarts=False), f, 1000)[0] < 1e-6


def test_cma_starts_at_the_best_seed() -> None:
    space = Space(x=Real(0, 1, shape=(6,)))
    values = [{"x": [0.1] * 6}, {"x": [0.9] * 6}, {"x": [0.5] * 6}]
    seeds = Seeds(space.population(values), ("baseline:a", "seed:b", "seed:c"))

    def told(algorithm: CMA, losses: list[float]) -> NDArray[np.float64]:
        jobs = algorithm.ask(0, 8)
        given = np.concatenate([losses, np.full(5, 9.0)])
        algorithm.tell(_told(jobs, given))
        x: NDArray[np.float64] = algorithm.ask(8, 8).population["x"].mean(axis=0)
        return x

    build = lambda: CMA(space, seeds=seeds, sigma=0.01)  # noqa: E731
    assert np.allclose(told(build(), [1.0, 0.0, 2.0]), 0.9, atol=0.03)
    assert np.allclose(told(build(), [1.0, np.inf, 2.0]), 0.1, atol=0.03)
    fillers = build().ask(0, 8).population["x"][3:]
    assert np.allclose(fillers, 0.5, atol=0.06)


def test_cma_puts_feasible_ones_first_and_failed_ones_last() -> None:
    space = Space(x=Real(0, 1, shape=(2,)))

    def mean_after(losses: Callable[[Any], Any], broken: Callable[[Any], Any]) -> Any:
        algorithm = CMA(space, seed=3)
        for start in range(0, 400, 8):
            jobs = algorithm.ask(start, 8)
            x = jobs.population["x"]
            algorithm.tell(_told(jobs, losses(x), broken(x)))
        return algorithm.ask(400, 8).population["x"].mean(axis=0)

    none = lambda x: np.zeros(len(x))  # noqa: E731
    assert np.allclose(mean_after(lambda x: x.sum(1), none), 0, atol=0.01)
    # Small losses are not allowed: the smallest that are lie at x[0] = 0.4.
    at = mean_after(lambda x: x.sum(1), lambda x: np.maximum(0, 0.4 - x[:, 0]))
    assert np.allclose(at, [0.4, 0.0], atol=0.02)
    failing = mean_after(lambda x: np.where(x[:, 0] < 0.4, np.inf, x.sum(1)), none)
    assert np.allclose(failing, [0.4, 0.0], atol=0.02)


def test_cma_keeps_predicates() -> None:
    def inside(columns: Any) -> Any:
        return columns["x"].sum(axis=1) >= 1

    space = Space(x=Real(0, 1, shape=(3,)), constraints=[Predicate(inside, name="sum")])
    best, parts = _run(CMA(space, seed=1), lambda p: p["x"].sum(axis=1), 400)
    assert all(space.is_feasible(jobs.population).all() for jobs in parts)
    assert best < 1.1


# -- the (1+1) strategy -------------------------------------------------------------------------


def test_es11_begins_in_the_middle_and_keeps_the_better_one() -> None:
    space = Space(x=Real(0, 4, shape=(3,)), share=Simplex(2))
    algorithm = OnePlusOne(space, seed=1)
    first = algorithm.ask(0, 1)
    assert np.allclose(first.population["x"], 2)
    assert np.allclose(first.population["share"], 0.5)
    algorithm.tell(_told(first, np.array([1.0])))
    worse = algorithm.ask(1, 1)
    algorithm.tell(_told(worse, np.array([2.0])))
    child = algorithm.ask(2, 1)
    assert child.parents is not None
    assert child.parents[0, 0] == 0
    algorithm.tell(_told(child, np.array([0.5])))
    after = algorithm.ask(3, 1)
    assert after.parents is not None
    assert after.parents[0, 0] == 2


def test_es11_steps_follow_the_one_fifth_rule() -> None:
    space = Space(x=Real(0, 1, shape=(8,)))
    algorithm = OnePlusOne(space, seed=1, rate=0.5, sigma=0.1)
    losses = [5.0, 4.0, 6.0, 6.0, 6.0, 6.0]  # one success in five leaves the step as it was
    for i, loss in enumerate(losses):
        algorithm.tell(_told(algorithm.ask(i, 1), np.array([loss])))
    assert algorithm._step == pytest.approx(0.1)
    algorithm.tell(_told(algorithm.ask(6, 1), np.array([np.inf])))
    assert algorithm._step == pytest.approx(0.1 * np.exp(-0.1))


def test_es11_with_a_lag_judges_a_child_by_the_parent_it_had() -> None:
    space = Space(x=Real(0, 1, shape=(8,)))
    algorithm = OnePlusOne(space, seed=1, rate=0.4, sigma=0.1, lag=8)
    jobs = algorithm.ask(0, 8)
    algorithm.tell(_told(jobs.take([0]), np.array([9.0])))
    # Made before the first was told, so that there is no parent to compare them with.
    algorithm.tell(_told(jobs.take(range(1, 8)), np.array([3.0, 2, 1, 4, 5, 6, 7])))
    assert algorithm._step == 0.1
    # Job 8 was made from job 0 (9.0): 8.0 is a success although job 3 is better by now.
    algorithm.tell(_told(algorithm.ask(8, 1), np.array([8.0])))
    assert algorithm._step == pytest.approx(0.1 * np.exp(0.2 * 0.8))


# -- Optuna's samplers --------------------------------------------------------------------------


def _mixed() -> Space:
    return Space(
        label=Choice(("a", ["b", 1])),
        flag=Choice((True, None, "x"), shape=(2,)),
        n=Integer(2, 10, step=2),
        size=Integer(1, 1000, log=True),
        rate=Real(1e-3, 1, log=True),
        share=Simplex(3),
        times=Ordered(3, 0, 1, 0.1),
        pick=Subset(4, 2),
        more=Real(0, 1, when=(ActiveIf("label", ("a",)),)),
    )


def test_parameters_say_what_optuna_can_express() -> None:
    import optuna

    space = _mixed()
    parameters = Parameters(space)
    population = space.sample(uniforms(3, 0, 0, 30, space.sample_width))
    kinds = parameters.distributions
    assert kinds["flag[1]"].choices == (True, None, "x")  # type: ignore[attr-defined]
    assert kinds["label"].choices == ('"a"', '["b", 1]')  # type: ignore[attr-defined]
    assert kinds["rate"].log  # type: ignore[attr-defined]
    for row, params in enumerate(parameters.of(population)):
        assert ("more" in params) == (population["label"][row] == 0)
        fixed = optuna.trial.FixedTrial(params)
        u = np.full((1, space.repair_width), 0.5)
        assert parameters.suggest(fixed, u).equals(population.take([row]))  # type: ignore[arg-type]


def test_tpe_learns() -> None:
    space = Space(kind=Choice(tuple("abcdef"), shape=(3,)), x=Real(0, 1))

    def f(p: Population) -> NDArray[np.float64]:
        losses: NDArray[np.float64] = (p["kind"] != 2).sum(axis=1) + np.abs(p["x"] - 0.3)
        return losses

    found = [_run(TPE(space, seed=s), f, 60)[0] for s in range(3)]
    drawn = [
        float(f(space.sample(uniforms(s, 0, 0, 60, space.sample_width))).min()) for s in range(3)
    ]
    assert np.median(found) < np.median(drawn)


def test_gp_learns() -> None:
    space = Space(x=Real(0, 1, shape=(2,)))
    best, _ = _run(GP(space, seed=1), lambda p: ((p["x"] - 0.3) ** 2).sum(axis=1), 20)
    assert best < 1e-3


@pytest.mark.parametrize("make", [TPE, GP])
def test_samplers_hear_of_violations_whenever_the_first_one_comes(make: Any) -> None:
    """A split of what was told, at the first violation or elsewhere, changes no proposal."""
    space = Space(x=Real(0, 1, shape=(2,)))
    population = space.sample(uniforms(1, 0, 0, 14, space.sample_width))
    ids = np.arange(14)
    losses = population["x"].sum(axis=1, keepdims=True)
    broken = np.where(ids < 6, 0.0, np.maximum(0, 0.5 - population["x"][:, 0]))
    assert (broken > 0).any()
    answers = []
    for cut in (0, 3, 8):
        algorithm = make(space, seed=2)
        for rows in (slice(0, cut), slice(cut, None)):
            algorithm.tell(Told(ids[rows], population.take(rows), losses[rows], broken[rows]))
        answers.append(algorithm.ask(14, 1).population["x"].tolist())
    free = make(space, seed=2)
    free.tell(Told(ids, population, losses, np.zeros(14)))
    assert answers[0] == answers[1] == answers[2]
    assert free.ask(14, 1).population["x"].tolist() != answers[0]


def test_tpe_takes_several_objectives() -> None:
    space = Space(x=Real(0, 1, shape=(2,)))
    algorithm = TPE(space, seed=1)
    for i in range(14):
        jobs = algorithm.ask(i, 1)
        algorithm.tell(Told(jobs.ids, jobs.population, jobs.population["x"], np.zeros(1)))
    assert len(algorithm.ask(14, 1)) == 1


# -- whole searches -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cma", "es11", "tpe", "gp"])
def test_a_search_runs_by_name_and_a_larger_budget_continues_it(name: str, tmp_path: Any) -> None:
    space = Space(x=Real(-1, 2, shape=(3,)))
    options = {"startup": 6} if name == "gp" else {}

    def f(x: list[float]) -> float:
        return sum(part**2 for part in x)

    def keys(budget: int, folder: str) -> list[Any]:
        result = searchlab.search(
            space,
            f,
            budget=budget,
            algorithm=AlgorithmSpec(name, options),
            out=tmp_path / folder,
            seed=3,
        )
        assert result.records is not None
        return [key for key in result.records.keys if key]

    whole = keys(18, "one")
    assert keys(11, "two") == whole[:11]
    assert keys(18, "two") == whole
