"""`dele`: the suite with each encoder, and what its two steps promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from searchlab.errors import ConfigError
from searchlab.predictors.dele import Dele, _hinge
from searchlab.predictors.encoders import Encoder, batch_of, read_together
from searchlab.predictors.preprocess import Inputs
from searchlab.testing.predictor import SPACES, PredictorSuite, labelled, plain_space, tau


class TestDele(PredictorSuite):
    learns = 0.4

    @pytest.fixture
    def build(self):
        return lambda: Dele(encoder="mlp", width=16, pretrain=10, epochs=30, rate=0.02)


@pytest.mark.parametrize("encoder", ["lstm", "transformer"])
def test_every_encoder_learns_and_is_kept(encoder: str, tmp_path) -> None:
    table, losses = labelled(plain_space(), 60, signals=2)
    fresh, _ = labelled(plain_space(), 50, first=1000, signals=2)
    dele = Dele(encoder=encoder, width=16, pretrain=10, epochs=40, rate=0.01)
    dele.fit(table, losses, seed=0)
    assert tau(dele.rank(table), losses) > 0.6
    dele.save(tmp_path)
    assert np.array_equal(Dele.load(tmp_path, plain_space()).rank(fresh), dele.rank(fresh))


def test_a_pool_with_signals_helps_few_labels() -> None:
    table, losses = labelled(plain_space(), 12, signals=1)
    pool, _ = labelled(plain_space(), 400, first=2000, signals=1)
    fresh, truth = labelled(plain_space(), 200, first=1000, signals=1)
    reached = []
    for shown in (None, pool):
        dele = Dele(encoder="mlp", width=32, pretrain=60, epochs=20, rate=0.005)
        dele.fit(table, losses, seed=0, pool=shown)
        reached.append(tau(dele.rank(fresh), truth))
    assert reached[1] > reached[0] + 0.05


def test_the_hinge_is_zero_for_a_right_order_and_counts_wrong_pairs() -> None:
    truth = torch.tensor([0.0, 1.0, 2.0])
    assert _hinge(truth, truth).item() == 0.0
    assert _hinge(-truth, truth).item() == pytest.approx((1.1 + 1.1 + 2.1) / 3)
    assert _hinge(truth, torch.zeros(3)).item() == 0.0


def test_places_are_seen_by_every_encoder() -> None:
    space = plain_space()
    table, _ = labelled(space, 8)
    batch = batch_of(Inputs(table)(table))
    for kind in ("lstm", "transformer"):
        torch.manual_seed(0)
        net = Encoder(space, kind=kind, width=16)
        turned = batch._replace(codes=batch.codes[:, [5, 4, 3, 2, 1, 0, 6, 7]])
        assert not torch.allclose(net(batch), net(turned), atol=1e-3)


def test_options_that_make_no_network_are_refused() -> None:
    for wrong in ({"encoder": "gru"}, {"epochs": 0}, {"rate": 0.0}):
        with pytest.raises(ConfigError, match="allowed"):
            Dele(**wrong)


@pytest.mark.parametrize("name", sorted(SPACES))
def test_lstms_that_are_run_together_read_as_torch_does(name: str) -> None:
    space = SPACES[name]()
    table, _ = labelled(space, 20)
    batch = batch_of(Inputs(table)(table))
    encoders = [Encoder(space, kind="lstm", width=8) for _ in range(3)]
    for encoder, read in zip(encoders, read_together(encoders, batch), strict=True):
        places = batch.codes + encoder.get_buffer("offsets")
        numbers = encoder.numbers(encoder.get_buffer("owners"))
        tokens = encoder.codes(places) + batch.values[..., None] * numbers
        last = encoder.net(tokens * batch.active[..., None].float())[1][0][0]
        assert torch.allclose(read, last, atol=1e-6)


def test_experts_that_were_made_before_serve_fits_to_any_number_of_labels() -> None:
    pool, losses = labelled(plain_space(), 200, signals=2)
    dele = Dele(encoder="mlp", width=16, pretrain=20, epochs=20, rate=0.01)
    dele.imitate(pool, seed=3)
    for rows in (slice(0, 12), slice(0, 40)):
        dele.fit(pool.take(rows), losses[rows], seed=3, pool=pool)
        anew = Dele(encoder="mlp", width=16, pretrain=20, epochs=20, rate=0.01)
        anew.fit(pool.take(rows), losses[rows], seed=3, pool=pool)
        assert np.allclose(dele.rank(pool), anew.rank(pool))


def test_experts_of_other_signals_are_not_used() -> None:
    pool, losses = labelled(plain_space(), 60, signals=2)
    other, _ = labelled(plain_space(), 60, signals=1)
    said = []
    for first in (None, other):
        dele = Dele(encoder="mlp", width=16, pretrain=10, epochs=10, rate=0.01)
        if first is not None:
            dele.imitate(first, seed=5)
        dele.fit(pool, losses, seed=0)
        said.append(dele.rank(pool))
    assert np.array_equal(*said)


def test_a_signal_that_is_declared_the_wrong_way_does_no_harm() -> None:
    table, losses = labelled(plain_space(), 20, signals=1)
    pool, _ = labelled(plain_space(), 400, first=2000, signals=1)
    fresh, truth = labelled(plain_space(), 200, first=1000, signals=1)
    reached = []
    for direction in ("min", "max"):
        dele = Dele(encoder="mlp", width=32, pretrain=60, epochs=5, rate=0.005)
        shown = [replace(part, directions=(direction,)) for part in (table, pool, fresh)]
        dele.fit(shown[0], losses, seed=0, pool=shown[1])
        reached.append(tau(dele.rank(shown[2]), truth))
    assert min(reached) > 0.4
    assert abs(reached[0] - reached[1]) < 0.1
