"""`steps`: the suite, and what reading step by step means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from searchlab.errors import ConfigError
from searchlab.predictor import table_of
from searchlab.predictors.preprocess import Inputs
from searchlab.predictors.steps import Steps, _hinge, _inputs, _Net
from searchlab.space import Space
from searchlab.testing.predictor import PredictorSuite, labelled, plain_space, tau
from searchlab.uniforms import uniforms
from searchlab.variables import ActiveBelow, Choice, Integer, Real


class TestSteps(PredictorSuite):
    learns = 0.2

    @pytest.fixture
    def build(self):
        return lambda: Steps(width=16, epochs=60, rate=0.01)


STEPPED = Space(
    points=Integer(2, 6),
    kind=Choice(("a", "b", "c"), shape=(6,), when=(ActiveBelow("points"),)),
    size=Real(0.0, 1.0, shape=(6,), when=(ActiveBelow("points"),)),
)


def net_and_inputs(n: int = 20):
    population = STEPPED.sample(uniforms(3, 0, 0, n, STEPPED.sample_width))
    table = table_of(STEPPED, population)
    torch.manual_seed(0)
    return _Net(STEPPED, width=8), population, _inputs(Inputs(table)(table))


def test_a_step_reads_its_own_tokens_and_those_of_all() -> None:
    net, _, _ = net_and_inputs()
    reads = net.get_buffer("reads")
    assert net.steps == 6
    assert reads.shape == (6, 13)
    assert reads[:, 0].tolist() == [1.0] * 6
    assert reads[2].nonzero()[:, 0].tolist() == [0, 3, 9]


def test_steps_that_are_not_there_change_nothing_and_places_do() -> None:
    net, population, (codes, values, active) = net_and_inputs()
    short = int(np.argmin(population["points"]))
    count = int(population["points"][short])
    assert count < 6
    said = net(codes, values, active)
    moved = values.clone()
    moved[short, 7 + count :] = 0.9
    assert net(codes, moved, active)[short].item() == said[short].item()
    moved[short, 7] += 0.3
    assert net(codes, moved, active)[short].item() != said[short].item()
    swapped = values.clone()
    swapped[short, [7, 8]] = values[short, [8, 7]]
    assert net(codes, swapped, active)[short].item() != said[short].item()


def test_it_orders_what_depends_on_neighbouring_steps() -> None:
    population = STEPPED.sample(uniforms(4, 0, 0, 360, STEPPED.sample_width))
    count = population["points"][:, None]
    inside = np.arange(6) < count
    size = np.where(inside, population["size"], 0.0)
    losses = np.abs(np.diff(size, axis=1)).sum(axis=1) / count[:, 0]
    table = table_of(STEPPED, population)
    steps = Steps(width=32, epochs=120, rate=0.005)
    steps.fit(table.take(np.arange(240)), losses[:240], seed=1)
    assert tau(steps.rank(table.take(np.arange(240, 360))), losses[240:]) > 0.5


def test_pairs_that_are_close_are_no_pairs() -> None:
    torch.manual_seed(0)
    truth = torch.tensor([0.0, 0.01, 0.02])
    assert _hinge(torch.tensor([3.0, 2.0, 1.0]), truth).item() == 0.0
    assert _hinge(torch.tensor([0.0, 2.0, 4.0]), 10 * truth).item() == 0.0
    assert _hinge(torch.tensor([4.0, 2.0, 0.0]), 10 * truth).item() > 2.0


def test_options_that_cannot_be_are_named() -> None:
    with pytest.raises(ConfigError, match="width 0"):
        Steps(width=0)
    with pytest.raises(ConfigError, match="rate 2"):
        Steps(rate=2.0)


def test_a_space_without_steps_is_read_too() -> None:
    table, losses = labelled(plain_space(), 40)
    assert _Net(plain_space(), width=8).steps == 6
    single = Space(a=Choice(("x", "y")), b=Real(0.0, 1.0))
    assert _Net(single, width=8).steps == 1
    steps = Steps(width=16, epochs=100, rate=0.02)
    steps.fit(table, losses, seed=0)
    assert tau(steps.rank(table), losses) > 0.5
