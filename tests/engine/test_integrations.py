"""Other libraries over our spaces: a sampler of Optuna proposes, an algorithm of pymoo searches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import searchlab
from searchlab.algorithms.optuna import Sampled
from searchlab.config import SearchConfig, Stage
from searchlab.errors import ConfigError
from searchlab.evaluator import FunctionEvaluator, Objective
from searchlab.integrations.optuna import SamplerAlgorithm, distributions
from searchlab.integrations.pymoo import Codes, as_problem
from searchlab.outcomes import Constraint
from searchlab.population import Evaluations, Jobs
from searchlab.search import verify
from searchlab.space import Space
from searchlab.testing.algorithm import SPACES, AlgorithmSuite, Build
from searchlab.uniforms import uniforms
from searchlab.variables import Affine, Choice, Integer, Ordered, Real, Simplex, Subset


def _random(seed: int) -> Any:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def _tpe(seed: int) -> Any:
    from optuna.samplers import TPESampler

    return TPESampler(seed=seed, multivariate=False, n_startup_trials=5)


class TestSampled(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Sampled(
            space, sampler=_random, seed=seed, first_id=first_id, seeds=seeds
        )


def _space() -> Space:
    return Space(kind=Choice(("a", "b", "c")), bits=Choice((2, 4, 8), shape=(4,)), x=Real(0, 1))


def _loss(kind: str, bits: list[int], x: float) -> float:
    return (kind != "b") + sum(bits) / 8 + (x - 0.3) ** 2


# -- Optuna -------------------------------------------------------------------------------------


def test_a_users_sampler_searches_records_and_goes_on(tmp_path: Path) -> None:
    algorithm = SamplerAlgorithm(_tpe)

    def search(budget: int, name: str) -> Any:
        return searchlab.search(
            _space(), _loss, budget=budget, algorithm=algorithm, name=name, out=tmp_path / name
        )

    whole = search(40, "one")
    assert whole.best.value < 2.5
    assert {origin for origin in whole.records.origin if origin} <= {"optuna", "random"}
    search(15, "two")
    assert search(40, "two").records.keys == whole.records.keys


def test_what_a_sampler_proposed_can_be_recomputed() -> None:
    from searchlab.study import MemoryRun

    space = _space()
    stage = Stage(
        "search",
        space,
        FunctionEvaluator(_loss, space, version=1),
        SamplerAlgorithm(_tpe),
        searchlab.Budget(20),
    )
    config, store = SearchConfig((stage,)), MemoryRun("search")
    searchlab.run(config, store=store)
    assert verify(config, store) == []


def test_distributions_name_every_element() -> None:
    found = distributions(_space())
    assert list(found) == ["kind", "bits[0]", "bits[1]", "bits[2]", "bits[3]", "x"]
    assert found["kind"].choices == ("a", "b", "c")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "fits"),
    [("NSGAIISampler", "nsga2"), ("CmaEsSampler", "cma"), ("QMCSampler", "random")],
)
def test_samplers_with_a_state_are_refused(name: str, fits: str) -> None:
    import optuna

    kind: Callable[..., Any] = getattr(optuna.samplers, name)
    with pytest.raises(ConfigError, match=f"{name} keeps state.*'{fits}'"):
        searchlab.search(
            _space(), _loss, budget=5, algorithm=SamplerAlgorithm(lambda seed: kind(seed=seed))
        )


def test_a_sampler_that_writes_into_its_trials_is_found_out() -> None:
    from optuna.samplers import RandomSampler

    class Writing(RandomSampler):
        def before_trial(self, study: Any, trial: Any) -> None:
            study._storage.set_trial_system_attr(trial._trial_id, "generation", 3)

    algorithm = SamplerAlgorithm(lambda seed: Writing(seed=seed))
    with pytest.raises(ConfigError, match="Writing keeps 'generation' in its trials"):
        algorithm.build(_space(), seed=0, first_id=0, seeds=None).ask(0, 1)


@pytest.mark.parametrize("factory", ["TPESampler", lambda seed: 3])
def test_what_makes_no_sampler_is_refused(factory: Any) -> None:
    with pytest.raises(ConfigError, match="sampler factory"):
        SamplerAlgorithm(factory).build(_space(), seed=0, first_id=0, seeds=None)


# -- pymoo --------------------------------------------------------------------------------------


EVERY: dict[str, Callable[[], Space]] = {
    **SPACES,
    "grouped": lambda: Space(
        share=Simplex(3),
        w=Affine(3, 1.0, low=-1, high=2),
        t=Ordered(3, 0, 1, 0.1),
        pick=Subset(5, 2),
        n=Integer(1, 9, step=2),
    ),
}


@pytest.mark.parametrize("name", sorted(EVERY))
def test_rows_and_candidates(name: str) -> None:
    space = EVERY[name]()
    codes = Codes(space)
    population = space.sample(uniforms(1, 0, 0, 40, space.sample_width))
    rows = codes.rows(population)
    assert codes.population(rows).equals(population)
    wild = codes.low + np.random.default_rng(0).random((40, len(codes.low))) * (
        codes.high - codes.low
    )
    near = codes.population(wild)
    assert space.is_feasible(near).all()
    assert space.canonicalise(near).equals(near)
    one = codes.population(wild[7])
    assert space.keys(one) == space.keys(near.take([7]))


def test_an_algorithm_of_pymoo_finds_the_optimum() -> None:
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.optimize import minimize

    problem = as_problem(_space(), _loss)
    found = minimize(
        problem, GA(pop_size=20, sampling=problem.start(20)), ("n_gen", 40), seed=1, verbose=False
    )
    plan = problem.decode(found.X)[0]
    assert plan["kind"] == "b"
    assert plan["bits"] == [2, 2, 2, 2]
    assert plan["x"] == pytest.approx(0.3, abs=0.05)
    assert found.F[0] == pytest.approx(_loss(**plan))


def test_directions_constraints_and_failures_reach_pymoo() -> None:
    space = Space(n=Integer(0, 9))

    class Measured(FunctionEvaluator):
        constraints = (Constraint("bytes", 4.0), Constraint("speed", 2.0, ">="))

        def evaluate(self, jobs: Jobs) -> Evaluations:
            n = jobs.population["n"].astype(float)
            calls.append(len(n))
            return Evaluations(
                values=np.stack([np.where(n == 9, np.nan, n), -n], axis=1),
                constraints=np.stack([n, n], axis=1),
            )

    calls: list[int] = []
    both = (Objective("gain", "max"), Objective("loss", "min"))
    problem = as_problem(space, Measured(lambda n: 0, space, objectives=both))
    out = problem.evaluate(np.array([[0.0], [3.2], [8.0], [9.0], [2.8]]), return_as_dictionary=True)
    assert out["F"].tolist() == [[0, 0], [-3, -3], [-8, -8], [1e30, 1e30], [-3, -3]]
    assert out["G"].tolist() == [[0, 1], [0, 0], [1, 0], [1e30, 1e30], [0, 0]]
    assert calls == [4]  # 3.2 and 2.8 are one candidate


def test_bad_rows_and_fidelities_are_refused() -> None:
    problem = as_problem(Space(n=Integer(0, 9)), lambda n: n)
    with pytest.raises(ConfigError, match=r"rows of shape \(1, 2\)"):
        problem.population([1.0, 2.0])
    with pytest.raises(ConfigError, match="finite"):
        problem.population([np.nan])
    with pytest.raises(ConfigError, match="fidelity 3"):
        as_problem(Space(n=Integer(0, 9)), lambda n: n, fidelity=3)
