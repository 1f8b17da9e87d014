"""Kept experts in any number, with any number of active ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from searchlab.errors import ConfigError, SpaceError
from searchlab.space import Space
from searchlab.spaces.experts import ExpertLayout, pruning_space
from searchlab.spaces.experts.trade_off import TradeOffSpace, TradeOffVariation
from searchlab.testing.space import SpaceSuite
from searchlab.uniforms import uniforms

LAYOUT = ExpertLayout(
    family="mixtral",
    blocks=tuple(range(4)),
    layers=4,
    experts=6,
    top_k=2,
    expert_bytes=100,
    total_bytes=4 * 6 * 100 + 50,
    hidden=8,
    width=16,
)
GROUPED = ExpertLayout(
    family="deepseek_v3",
    blocks=(1, 2, 3),
    layers=4,
    experts=16,
    top_k=4,
    n_group=4,
    topk_group=2,
    group_best=2,
    expert_bytes=100,
    hidden=8,
    width=16,
)


class TestOneNumber(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return TradeOffSpace(LAYOUT)


class TestNumbersPerBlock(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return TradeOffSpace(LAYOUT, per_block=True, total=15)


class TestGroupsOfExperts(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return TradeOffSpace(GROUPED, top_k=4)


class TestGroupsOfBlocks(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return TradeOffSpace(LAYOUT, groups=2, most=4)


SPACES = [
    TradeOffSpace(LAYOUT),
    TradeOffSpace(LAYOUT, per_block=True, total=15),
    TradeOffSpace(GROUPED, per_block=True),
    TradeOffSpace(LAYOUT, groups=2, most=4, top_k=1),
]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.predicates[0].name)
def test_children_are_legal_and_of_every_size(space: TradeOffSpace) -> None:
    variation = TradeOffVariation()
    start = space.sample(uniforms(1, 0, 0, 200, space.sample_width))
    assert space.is_feasible(start).all()
    seen = set()
    for step in range(10):
        u = uniforms(2, step, 0, 200, variation.width(space))
        turned = start.take(np.arange(200)[::-1])
        start = variation.vary(space, start, turned, u)
        assert space.is_feasible(start).all()
        assert start.equals(space.canonicalise(start))
        seen |= set(zip(space.cost(start)["experts"], space.active_of(start), strict=True))
    counts, active = ({row[i] for row in seen} for i in (0, 1))
    blocks = len(space.layout.blocks)
    assert min(counts) == blocks * space._low[min(active)] * space.parts
    assert max(counts) == (space.total or blocks * space.most)
    assert active == set(range(1, space.layout.top_k + 1)) if space.top_k is None else {1}
    # One row decides its child alone.
    row = variation.vary(space, start.take([7]), turned.take([7]), u[7:8])
    assert row.equals(variation.vary(space, start, turned, u).take([7]))


def test_figures_follow_from_the_layout() -> None:
    space = TradeOffSpace(LAYOUT)
    full = space.of_masks(np.ones((2, 4, 6), dtype=bool), np.array([2, 1]))
    cost = space.cost(full)
    assert cost["bytes"].tolist() == [LAYOUT.total_bytes] * 2
    # Three matrices of 8 x 16 for each of 4 x 2 active experts, and 4 routers of 8 x 6.
    assert cost["flops"].tolist() == [2 * 8 * 3 * 128 + 2 * 4 * 48, 2 * 4 * 3 * 128 + 2 * 4 * 48]
    half = np.zeros((1, 4, 6), dtype=bool)
    half[:, :, :3] = True
    (plan,) = space.plans(space.of_masks(half))
    assert (plan.counts, plan.top_k) == ([3] * 4, 2)
    assert space.cost(space.of_masks(half))["bytes"] == [LAYOUT.total_bytes - 12 * 100]
    same = pruning_space(LAYOUT, keep=3)
    assert plan == same.plans(same.of_masks(half))[0]


def test_a_prior_says_who_rather_comes_and_goes() -> None:
    space = TradeOffSpace(LAYOUT, top_k=2)
    prior = ((0.0, 0.2, 0.4, 0.6, 0.8, 1.0),) * 4
    masks = np.zeros((400, 4, 6), dtype=bool)
    masks[:, :, [1, 2, 4]] = True
    start = space.of_masks(masks)
    came, went = [], []
    for known in (prior, ()):
        variation = TradeOffVariation(crossover=0, size=1, jump=0, active=0, group=0, prior=known)
        u = uniforms(5, 0, 0, 400, variation.width(space))
        found = space.masks(variation.vary(space, start, start, u))
        counts = found.sum(axis=2)[:, 0]
        assert set(counts.tolist()) == {2, 4}
        came.append(found[counts == 4][..., 5].mean())
        went.append(1 - found[counts == 2][..., 1].mean())
    # Of three outside the last one comes, of three inside the first one goes.
    assert came[0] > 0.6 > 0.4 > came[1] > 0.25
    assert went[0] > 0.6 > 0.4 > went[1] > 0.25
    assert variation.settings() != TradeOffVariation(prior=prior).settings()
    with pytest.raises(ConfigError, match="prior"):
        TradeOffVariation(prior=((2.0,),))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SpaceError, match="keep 7 experts"):
        TradeOffSpace(LAYOUT, most=7)
    with pytest.raises(SpaceError, match="counts per block with groups 2"):
        TradeOffSpace(LAYOUT, per_block=True, groups=2)
    with pytest.raises(SpaceError, match="total 3 experts; allowed: 4 or more"):
        TradeOffSpace(LAYOUT, per_block=True, total=3)
    with pytest.raises(SpaceError, match="keep 6 experts in 4 groups"):
        TradeOffSpace(GROUPED, most=6)
    one = np.zeros((1, 4, 6), dtype=bool)
    one[:, :, 0] = True
    with pytest.raises(SpaceError, match="2 active"):
        TradeOffSpace(LAYOUT).of_masks(one)
    uneven = one.copy()
    uneven[:, 1, 1] = True
    with pytest.raises(SpaceError, match="in all alike"):
        TradeOffSpace(replace(LAYOUT, top_k=1)).of_masks(uneven)
    with pytest.raises(ConfigError, match="rates"):
        TradeOffVariation(jump=2)
    plain = pruning_space(LAYOUT, keep=3)
    with pytest.raises(ConfigError, match="whose number is free"):
        TradeOffVariation().width(plain)
