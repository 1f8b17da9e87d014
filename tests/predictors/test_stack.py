"""`gp` and `stack`: the suite, the kernel's slopes, weights, calibration and folders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from searchlab.errors import ConfigError, DataError
from searchlab.predictor import DRAW_WIDTH
from searchlab.predictors.artifact import load_predictor
from searchlab.predictors.gp import _MEDIAN, GaussianProcess, _Distances, _misfit
from searchlab.predictors.preprocess import Inputs
from searchlab.predictors.stack import Stack
from searchlab.testing.predictor import PredictorSuite, labelled, plain_space, tau
from searchlab.uniforms import uniforms


class TestGaussianProcess(PredictorSuite):
    with_data = True

    @pytest.fixture
    def build(self):
        return GaussianProcess


class TestStack(PredictorSuite):
    @pytest.fixture
    def build(self):
        return lambda: Stack(members=("ridge", "gbdt"))


class TestStackWithData(PredictorSuite):
    with_data = True
    learns = 0.6

    @pytest.fixture
    def build(self):
        return lambda: Stack(members=("gp", "ridge"))

    def test_without_data_it_refuses_or_has_none(self, build, tmp_path) -> None:
        table, losses = labelled(plain_space(), 14, signals=1)
        stack = self.fitted(build, table, losses)
        stack.save(tmp_path / "p")
        loaded = load_predictor(tmp_path / "p", plain_space())
        assert list(loaded.members) == ["ridge"]
        assert loaded.weights.tolist() == [1.0]


@pytest.mark.parametrize("signals", [0, 3])
def test_the_slope_of_the_evidence(signals: int) -> None:
    table, losses = labelled(plain_space(), 15, signals=signals)
    features = Inputs(table)(table)
    distances = _Distances.of(features, features)
    targets = (losses - losses.mean()) / losses.std()
    at = _MEDIAN + np.random.default_rng(0).normal(size=len(_MEDIAN)) * 0.3
    slope = approx_fprime(at, lambda log: _misfit(log, distances, targets)[0], 1e-6)
    assert np.allclose(_misfit(at, distances, targets)[1], slope, rtol=1e-3, atol=1e-3)


def test_the_process_reproduces_labels_without_noise() -> None:
    table, losses = labelled(plain_space(), 80, signals=1, noise=0.0)
    gp = GaussianProcess()
    gp.fit(table, losses, seed=0)
    assert tau(gp.rank(table), losses) > 0.9


def test_draws_of_a_process_have_its_spread() -> None:
    table, losses = labelled(plain_space(), 30, signals=1)
    fresh, _ = labelled(plain_space(), 25, first=400, signals=1)
    gp = GaussianProcess()
    gp.fit(table, losses, seed=0)
    features = gp._inputs(fresh)
    draws = gp._draw(features, uniforms(0, 0, 0, 4000, DRAW_WIDTH))
    mean, sd = gp._scores(features)
    latent = np.sqrt(sd**2 - np.exp(gp._log[-1]))
    assert np.abs(draws.mean(axis=0) - mean).max() < 0.1
    assert np.abs(draws.std(axis=0) / latent - 1).max() < 0.1


def test_weights_are_shares_and_a_member_that_knows_gets_more() -> None:
    table, losses = labelled(plain_space(), 120, signals=1)
    stack = Stack()
    stack.fit(table, losses, seed=0)
    assert stack.weights.sum() == pytest.approx(1.0)
    assert (stack.weights >= 0).all()
    fresh, truth = labelled(plain_space(), 300, first=900, signals=1)
    features = stack._inputs(fresh)
    alone = [tau(member._scores(features)[0], truth) for member in stack.members.values()]
    assert tau(stack.rank(fresh), truth) > max(alone) - 0.03


def test_intervals_cover_fresh_labels() -> None:
    table, losses = labelled(plain_space(), 80, signals=2, noise=0.5)
    fresh, truth = labelled(plain_space(), 400, first=900, signals=2, noise=0.5)
    stack = Stack(members=("gp", "ridge"))
    stack.fit(table, losses, seed=0)
    mean, sd = stack.predict(fresh)
    assert 0.8 < np.mean(np.abs(mean - truth) < 1.645 * sd) < 0.98


def test_thirteen_poisoned_signals_do_little_harm() -> None:
    table, losses = labelled(plain_space(), 60, signals=2)
    fresh, truth = labelled(plain_space(), 300, first=900, signals=2)
    generator = np.random.default_rng(0)

    def poisoned(one):
        more = generator.normal(size=(len(one), 10))
        columns = np.concatenate([one.signals, more, -one.signals[:, :1]], axis=1)
        names = tuple(f"s{i}" for i in range(columns.shape[1]))
        return replace(one, signals=columns, signal_names=names, directions=("min",) * len(names))

    plain, harmed = Stack(), Stack()
    plain.fit(table, losses, seed=0)
    harmed.fit(poisoned(table), losses, seed=0)
    assert tau(harmed.rank(poisoned(fresh)), truth) > tau(plain.rank(fresh), truth) - 0.06


def test_members_that_are_not_there_are_named() -> None:
    for wrong in ((), ("gp", "gp"), ("gp", "tabpfn")):
        with pytest.raises(ConfigError, match="members"):
            Stack(members=wrong)


def test_an_unknown_predictor_in_a_folder_is_named(tmp_path) -> None:
    table, losses = labelled(plain_space(), 14)
    stack = Stack(members=("ridge",))
    stack.fit(table, losses, seed=0)
    stack.save(tmp_path)
    settings = tmp_path / "predictor.json"
    text = settings.read_text()
    settings.write_text(text.replace('"predictor": "stack"', '"predictor": "oracle"'))
    with pytest.raises(DataError, match="unknown predictor 'oracle'"):
        load_predictor(tmp_path, plain_space())
    settings.write_text("[]")
    with pytest.raises(DataError, match="no format number"):
        load_predictor(tmp_path, plain_space())
    settings.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        load_predictor(tmp_path, plain_space())
