"""Predictors of earlier tasks: the suite of `warm`, other sizes, wrong ones, folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from searchlab.errors import ConfigError
from searchlab.predictor import Predictor, Table, table_of
from searchlab.predictor_folder import SignalSchema
from searchlab.predictors._mapping import mapped_table, matched
from searchlab.predictors.artifact import load_predictor, read_artifact
from searchlab.predictors.reuse import Earlier, Warm, with_prediction
from searchlab.predictors.ridge import Ridge
from searchlab.predictors.stack import Stack
from searchlab.space import Space
from searchlab.testing.predictor import PredictorSuite, labelled, plain_space, tau
from searchlab.uniforms import uniforms
from searchlab.variables import Choice, Integer


class TestWarm(PredictorSuite):
    """Without an earlier predictor."""

    @pytest.fixture
    def build(self) -> Callable[[], Predictor]:
        return lambda: Warm(make=Ridge)


def small() -> Predictor:
    return Stack(members=("gp", "ridge"))


def fitted(n: int, *, seed: int = 1) -> tuple[Earlier, Space]:
    """An earlier predictor of the plain space with two signals."""
    table, losses = labelled(plain_space(), n, signals=2)
    old = small()
    old.fit(table, losses, seed=seed)
    signals = tuple(
        SignalSchema(name, "min", quantiles=tuple(np.quantile(column, np.linspace(0, 1, 33))))
        for name, column in zip(table.signal_names, table.signals.T, strict=True)
    )
    return Earlier(old, table.space, signals), table.space


@pytest.mark.parametrize("n", [4, 12, 25])
def test_few_labels_do_not_overrule_a_good_predictor(n: int) -> None:
    earlier, space = fitted(150)
    fresh, truth = labelled(space, 400, first=2000, signals=2)
    table, losses = labelled(space, n, first=1000, signals=2, noise=1.0)
    warm, cold = Warm(earlier, make=small), small()
    warm.fit(table, losses, seed=0)
    cold.fit(table, losses, seed=0)
    before = tau(earlier.rank(fresh), truth)
    assert tau(warm.rank(fresh), truth) > before - 0.01
    assert tau(warm.rank(fresh), truth) > tau(cold.rank(fresh), truth)


def test_a_wrong_predictor_is_found_out() -> None:
    earlier, space = fitted(100)
    table, losses = labelled(space, 60, first=1000, signals=2)
    fresh, truth = labelled(space, 300, first=2000, signals=2)
    wrong, cold = Warm(earlier, make=small), small()
    wrong.fit(table, -losses, seed=0)
    cold.fit(table, -losses, seed=0)
    assert wrong.refined is not None
    assert wrong.refined._slope < 0  # its reverse is worth much
    assert tau(wrong.rank(fresh), -truth) > tau(cold.rank(fresh), -truth) - 0.03


def test_many_labels_teach_what_is_new() -> None:
    earlier, space = fitted(40)
    table, losses = labelled(space, 200, first=1000, signals=2)
    fresh, truth = labelled(space, 300, first=2000, signals=2)
    bent = losses + 3 * table.x[:, 0]
    warm = Warm(earlier, make=small)
    warm.fit(table, bent, seed=0)
    there = truth + 3 * fresh.x[:, 0]
    assert warm.refined is not None
    assert warm.refined.share > 0.5 or warm.refined.belief < 0.5
    assert tau(warm.rank(fresh), there) > tau(earlier.rank(fresh), there) + 0.05


def test_what_is_said_of_labels_left_out_follows_them() -> None:
    earlier, space = fitted(100)
    table, losses = labelled(space, 20, first=1000, signals=2)
    warm = Warm(earlier, make=small)
    warm.fit(table, losses, seed=0)
    said = warm.held_out()
    assert said is not None
    assert tau(said, losses) > 0.5
    noise = np.random.default_rng(0).permutation(losses)
    warm.fit(table, noise, seed=0)
    said = warm.held_out()
    assert said is not None
    assert tau(said, noise) < 0.5


def test_frozen_learns_nothing_but_the_unit() -> None:
    earlier, space = fitted(80)
    table, losses = labelled(space, 30, first=1000, signals=2)
    fresh, _ = labelled(space, 50, first=2000, signals=2)
    frozen = Warm(earlier, frozen=True)
    assert np.array_equal(frozen.rank(fresh), earlier.rank(fresh))  # before any label
    frozen.fit(table, -1000 * losses, seed=0)
    assert np.array_equal(np.argsort(frozen.rank(fresh)), np.argsort(earlier.rank(fresh)))
    mean, sd = frozen.predict(fresh)
    assert np.abs(mean).max() < 2000 * np.abs(losses).max()
    assert (sd > 0).all()
    draws = frozen.draw(fresh, uniforms(0, 0, 0, 5, 2))
    assert len(np.unique(draws, axis=0)) == 5


@pytest.mark.parametrize("adapted", [False, True])
def test_it_is_read_back_with_what_it_began_at(tmp_path: Path, adapted: bool) -> None:
    earlier, space = fitted(60)
    table, losses = labelled(space, 20, first=1000, signals=2)
    fresh, _ = labelled(space, 50, first=2000, signals=2)
    if adapted:
        earlier = Earlier(
            earlier.predictor, space, earlier.signals, adapted=True, background=lambda: table
        )
    warm = Warm(earlier, make=Ridge)
    warm.fit(table, losses, seed=0)
    warm.save(tmp_path, with_data=True)
    again = load_predictor(tmp_path, plain_space())
    for one, other in zip(warm.predict(fresh), again.predict(fresh), strict=True):
        assert np.allclose(one, other, atol=1e-6)
    without = tmp_path / "without"
    warm.save(without)
    assert read_artifact(without).left_out == ["gp"]
    assert read_artifact(tmp_path).left_out == []
    assert load_predictor(without).predict(fresh)[0].shape == (50,)


def sized(layers: int, labels: tuple[object, ...] = (2, 4, 8)) -> Space:
    return Space(bits=Choice(labels, shape=(layers, 2)), depth=Integer(0, layers))


def worth(space: Space, n: int, first: int) -> tuple[Table, np.ndarray]:
    """Layers matter the more the later they come."""
    population = space.sample(uniforms(3, 0, first, n, space.sample_width))
    bits = np.array([np.array(plan["bits"], float) for plan in space.decode(population)])
    weights = np.linspace(0.2, 1, bits.shape[1])[:, None] * np.array([1.0, 0.3])
    losses = (2.0 ** (-bits / 2) * weights).mean(axis=(1, 2))
    return table_of(space, population), losses


def test_a_predictor_of_another_size_orders_candidates() -> None:
    table, losses = worth(sized(6), 120, 0)
    old = Ridge()
    old.fit(table, losses, seed=0)
    earlier = Earlier(old, table.space, ())
    for layers, labels in ((6, (2, 4, 8, 16)), (12, (2, 4, 8)), (4, (8, 4, 2))):
        fresh, truth = worth(sized(layers, labels), 300, 5000)
        assert tau(earlier.rank(fresh), truth) > 0.5
    mapped = mapped_table(worth(sized(12), 5, 0)[0], table.space)
    assert mapped.x.shape == (5, table.space.code_width)
    assert [part.shape for part in mapped.tokens] == [(5, table.space.size)] * 3


def test_an_equal_space_is_mapped_to_itself() -> None:
    table, _ = labelled(plain_space(), 20)
    again = mapped_table(table, plain_space())
    assert np.array_equal(again.x, table.x)
    assert all(map(np.array_equal, again.tokens, table.tokens))


def test_signals_of_another_unit_are_matched_by_rank() -> None:
    table, _ = labelled(plain_space(), 200, signals=2)
    column = table.signals[:, 0]
    quantiles = {"s0": np.quantile(column, np.linspace(0, 1, 65))}
    other = Table(
        table.space, table.x, table.tokens, np.exp(column / 3)[:, None] * 1e6, ("s0",), ("min",)
    )
    found = matched(other, {"s0": "min", "s9": "max"}, other, quantiles)
    assert found.signal_names == ("s0", "s9")
    assert np.isnan(found.signals[:, 1]).all()
    assert np.abs(found.signals[:, 0] - column).max() < 0.1 * np.ptp(column)
    same = matched(table, {"s1": "min"}, None, quantiles)
    assert np.array_equal(same.signals[:, 0], table.signals[:, 1])


def test_a_prediction_becomes_a_signal() -> None:
    earlier, space = fitted(30)
    table, _ = labelled(space, 10, first=500, signals=2)
    more = with_prediction(table, earlier.predictor)
    assert more.signal_names == ("s0", "s1", "predicted")
    with pytest.raises(ConfigError, match="signal 'predicted' is in the table"):
        with_prediction(more, earlier.predictor)
