"""The search by a smooth model: conformance, and that it needs few evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Told
from searchlab.algorithms.cma import CMA
from searchlab.algorithms.kriging import Kriging, _Process
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.testing.algorithm import AlgorithmSuite, Build, drive, proposals
from searchlab.variables import Affine, Choice, Real, Simplex

REALS: dict[str, Callable[[], Space]] = {
    "real": lambda: Space(x=Real(-1, 2, shape=(3,)), rate=Real(1e-4, 1, log=True)),
    "sums": lambda: Space(share=Simplex(3), weight=Affine(4, 1.0, low=-8, high=8)),
}


class TestKriging(AlgorithmSuite):
    enumerates = False  # there are no small spaces of reals

    @pytest.fixture(params=sorted(REALS))
    def space(self, request: pytest.FixtureRequest) -> Space:
        return REALS[request.param]()

    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Kriging(
            space, seed=seed, first_id=first_id, seeds=seeds, population=4, first=8, keep=40
        )

    def generations(self, algorithm: Algorithm) -> int:
        return 24

    def test_no_candidate_is_proposed_twice(self, build: Build, space: Space) -> None:
        """Fewer than elsewhere: every group is a fit."""
        keys = [key for _, key in proposals(drive(self.new(build, space), 48))]
        assert len(set(keys)) == len(keys)


def valley(population: Population) -> NDArray[np.float64]:
    """A curved quadratic valley in nine directions of very different slopes."""
    w = population["w"] - np.linspace(-0.5, 0.7, 10)
    out: NDArray[np.float64] = (w**2 * np.geomspace(10, 0.1, 10)).sum(axis=1) + (
        w[:, 0] * w[:, 9]
    ) ** 2
    return out


def best_of(make: Callable[..., Algorithm], seed: int, n: int) -> float:
    space = Space(w=Affine(10, 1.0, low=-8, high=8))
    algorithm = make(space, seed=seed, sigma=0.03)
    best = np.inf
    for start in range(0, n, algorithm.quantum):
        jobs = algorithm.ask(start, algorithm.quantum)
        losses = valley(jobs.population)
        algorithm.tell(Told(jobs.ids, jobs.population, losses[:, None], np.zeros(len(jobs))))
        best = min(best, float(losses.min()))
    return best


def test_it_needs_a_fraction_of_the_evaluations_of_cma() -> None:
    assert best_of(Kriging, 1, 64) < best_of(CMA, 1, 160)


def test_the_slope_of_the_bound_is_its_slope() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(30, 4))
    process = _Process.fitted(x, np.sin(x).sum(axis=1))
    at, step = generator.normal(size=4), 1e-6
    _, slope = process.bound(at, 0.7)
    found = [
        (process.bound(at + step * e, 0.7)[0] - process.bound(at - step * e, 0.7)[0]) / (2 * step)
        for e in np.eye(4)
    ]
    np.testing.assert_allclose(slope, found, rtol=1e-4, atol=1e-6)


def test_a_believed_value_is_where_the_mean_was_and_leaves_no_doubt() -> None:
    x = np.random.default_rng(1).normal(size=(20, 3))
    process = _Process.fitted(x, (x**2).sum(axis=1))
    at = np.array([0.3, -0.2, 0.9])
    after = process.believing(at)
    assert after.bound(at, 0.0)[0] == pytest.approx(process.bound(at, 0.0)[0], abs=1e-3)
    before, now = (p.bound(at, 0.0)[0] - p.bound(at, 1.0)[0] for p in (process, after))
    assert now < 0.5 * before


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"population": 0}, "population 0"),
        ({"first": 3}, "first 3"),
        ({"sigma": 0.0}, "sigma 0"),
        ({"kappa": -1.0}, "kappa -1"),
        ({"keep": 2}, "keep 2"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Kriging(REALS["real"](), **values)


def test_other_spaces_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'c', a choice.*'evolution'"):
        Kriging(Space(c=Choice((0, 1)), x=Real(0, 1)))
    with pytest.raises(ConfigError, match=r"1 coordinates.*'es11'"):
        Kriging(Space(x=Real(0, 1)))
