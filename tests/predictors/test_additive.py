"""`additive`: the suite, the evidence's slopes, which variables matter, numbers among choices."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from searchlab.predictor import DRAW_WIDTH, table_of
from searchlab.predictors.additive import APART, Additive, Parts, _misfit
from searchlab.predictors.gp import GaussianProcess
from searchlab.space import Space
from searchlab.testing.predictor import PredictorSuite, labelled, plain_space, tau
from searchlab.uniforms import uniforms
from searchlab.variables import Choice, Integer, Real


class TestAdditive(PredictorSuite):
    with_data = True

    @pytest.fixture
    def build(self):
        return Additive


def test_the_slope_of_the_evidence() -> None:
    generator = np.random.default_rng(0)
    columns = generator.normal(size=(3, 15, 4))
    stack = columns @ columns.transpose(0, 2, 1)
    median, width = np.log([0.5, 0.3, 0.2, 0.1]), np.full(4, 0.7)
    at, targets = median + generator.normal(size=4) * 0.3, generator.normal(size=15)
    slope = approx_fprime(at, lambda log: _misfit(log, stack, targets, median, width)[0], 1e-6)
    assert np.allclose(_misfit(at, stack, targets, median, width)[1], slope, rtol=1e-3, atol=1e-3)


def settings() -> Space:
    return Space(
        model=Choice(tuple("abcdef")),
        solver=Choice(tuple("xyz")),
        steps=Choice((10, 20, 50)),
        other=Choice(tuple("pqrstu")),
    )


def sample(space: Space, n: int, first: int = 0):
    return space.sample(uniforms(3, 0, first, n, space.sample_width))


def test_variables_that_do_not_matter_get_little() -> None:
    space = settings()
    generator = np.random.default_rng(1)
    model, solver = 2 * generator.normal(size=6), 0.3 * generator.normal(size=3)

    def losses(population):
        return model[population["model"]] + solver[population["solver"]] - population["steps"]

    known, fresh = sample(space, 24), sample(space, 200, 500)
    own, other = Additive(), GaussianProcess()
    for one in (own, other):
        one.fit(table_of(space, known), losses(known), seed=0)
    parts = own.parts
    assert parts is not None
    effects = dict(zip(range(len(parts.kind)), np.exp(own._log), strict=False))
    line = np.flatnonzero(parts.kind == 0)
    assert len(line) == 1  # of the steps; other choices are names
    labels = [effects[at] for at in np.flatnonzero(parts.kind == 1)]
    assert labels[0] > 2 * labels[3]
    found = [tau(one.rank(table_of(space, fresh)), losses(fresh)) for one in (own, other)]
    assert found[0] > 0.8
    assert found[0] > found[1] + 0.05


def test_numbers_of_a_choice_are_a_line_in_their_logs() -> None:
    parts = Parts.of(Space(a=Choice((10, 20, 50)), b=Choice((1, 2, 3)), c=Choice((True, 2, "x"))))
    assert parts.kind.tolist() == [0, 0, 1, 1, 1]
    one, other = (parts.maps[:, parts.part == at][:, 0] for at in (0, 1))
    logs = np.log([10, 20, 50])
    assert np.allclose(one[:3], (logs - logs.mean()) / logs.std())
    assert np.allclose(other[3:6], np.array([-1, 0, 1]) / np.std([-1, 0, 1]))
    array = Parts.of(Space(operations=Choice((0, 1, 2, 3, 4), shape=(6,))))
    assert array.kind.tolist() == [1]


def test_many_variables_share_their_numbers() -> None:
    variables = {f"v{i}": Choice(tuple("abc")) for i in range(APART + 1)}
    space = Space(**variables, x=Real(0, 1), n=Integer(0, 9))
    parts = Parts.of(space)
    assert parts.kind.tolist() == [0, 1, 2]
    blocks = parts(space.encode(sample(space, 5)).astype(np.float64))[:, parts.part == 1]
    assert np.allclose((blocks**2).sum(axis=1), (APART + 1) / (APART + 3))


def test_draws_have_the_spread_of_what_is_not_known() -> None:
    table, losses = labelled(plain_space(), 30, signals=1)
    fresh, _ = labelled(plain_space(), 25, first=400, signals=1)
    one = Additive()
    one.fit(table, losses, seed=0)
    features = one._inputs(fresh)
    draws = one._draw(features, uniforms(0, 0, 0, 4000, DRAW_WIDTH))
    mean, sd = one._scores(features)
    latent = np.sqrt(sd**2 - np.exp(one._log[-1]))
    assert np.abs(draws.mean(axis=0) - mean).max() < 0.1
    assert np.abs(draws.std(axis=0) / latent - 1).max() < 0.1
