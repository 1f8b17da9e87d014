"""`dynamic`: the suite, the gate over what is there, signs, and stopping."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from searchlab.predictor import Table
from searchlab.predictors.dynamic import Dynamic, _forward, _members, _Seen, _trunk_of
from searchlab.predictors.preprocess import Inputs
from searchlab.testing.predictor import PredictorSuite, labelled, plain_space, tau


class TestDynamic(PredictorSuite):
    learns = 0.4

    @pytest.fixture
    def build(self):
        return lambda: Dynamic(most=40, pretrain=40)


def negated(table: Table) -> Table:
    return replace(table, signals=-table.signals)


def test_a_signal_that_orders_backwards_is_as_good() -> None:
    table, losses = labelled(plain_space(), 40, signals=1)
    fresh, truth = labelled(plain_space(), 200, first=900, signals=1)
    plain, turned = Dynamic(most=100), Dynamic(most=100)
    plain.fit(table, losses, seed=0)
    turned.fit(negated(table), losses, seed=0)
    there, back = tau(plain.rank(fresh), truth), tau(turned.rank(negated(fresh)), truth)
    assert back == pytest.approx(there, abs=0.08)
    assert back > 0.4


def test_an_expert_that_is_not_there_has_no_say() -> None:
    table, _ = labelled(plain_space(), 30, signals=2)
    columns = table.signals.copy()
    columns[:10, 0] = np.nan
    holed = replace(table, signals=columns)
    seen = _Seen.of(Inputs(holed)(holed))
    assert (seen.there[:10, 0] == 0).all()
    net = _members(_trunk_of(seen, 20), torch.tensor([[1.0, 0.0]]))
    said = _forward(net, seen)[0][0]
    assert torch.allclose(said[:10], torch.zeros(10), atol=1e-6)
    assert (said[10:].abs() > 1e-3).any()
    # Where no expert is there, what the trunk foresees of them is used.
    none = _Seen(seen.x, torch.zeros_like(seen.scores), torch.zeros_like(seen.there))
    assert (_forward(net, none)[0].abs() > 1e-4).any()


def test_labels_without_a_pattern_stop_the_training_early() -> None:
    early = []
    for seed in range(2):
        table, losses = labelled(plain_space(), 40, first=100 * seed, signals=1)
        dynamic = Dynamic()
        dynamic.fit(table, np.random.default_rng(seed).permutation(losses), seed=seed)
        early.append(dynamic.epochs)
    assert max(early) < 200
