"""Subsets of experts as spaces: counts, groups, budgets, and what users write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchlab.errors import ConfigError, DataError, SpaceError
from searchlab.space import Space
from searchlab.spaces.experts import ExpertLayout, kept, pruning_space, resolve_keep
from searchlab.spaces.experts.plan import ExpertPlan, read_plan
from searchlab.testing.space import SpaceSuite, random_population

LAYOUT = ExpertLayout(
    family="mixtral", blocks=tuple(range(6)), layers=6, experts=8, top_k=2, expert_bytes=100
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
    total_bytes=3 * 16 * 100 + 1000,
)


class TestEveryBlock(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return pruning_space(LAYOUT, keep=4)


class TestGroupsOfBlocks(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return pruning_space(LAYOUT, keep=3, groups=4)


class TestGroupsOfExperts(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return pruning_space(GROUPED, keep=8)


class TestTotal(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return pruning_space(LAYOUT, total=20)


class TestTotalWithGroupsOfExperts(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return pruning_space(GROUPED, total=32)


def test_masks_have_the_counts_that_were_asked_for() -> None:
    space = pruning_space(LAYOUT, keep=3, groups=4)
    masks = kept(space, random_population(space, 50))
    assert masks.shape == (50, 6, 8)
    assert (masks.sum(axis=2) == 3).all()
    assert space.of_block.tolist() == [0, 0, 1, 2, 2, 3]
    assert (masks[:, 0] == masks[:, 1]).all()
    assert (masks[:, 1] != masks[:, 2]).any()
    assert space.of_masks(masks).equals(random_population(space, 50))


def test_counts_differ_under_a_total_and_never_fall_below_what_is_active() -> None:
    space = pruning_space(LAYOUT, total=20)
    counts = kept(space, random_population(space, 400)).sum(axis=2)
    assert (counts.sum(axis=1) == 20).all()
    assert counts.min() == 2
    assert counts.max() >= 6
    space = pruning_space(GROUPED, total=32)
    masks = kept(space, random_population(space, 200)).reshape(200, 3, 4, 4)
    parts = masks.sum(axis=3)
    assert (parts == parts[..., :1]).all()
    assert parts.min() == 2
    assert (parts.sum(axis=(1, 2)) == 32).all()


def test_small_spaces_are_listed_in_full() -> None:
    tiny = replace(LAYOUT, blocks=(0, 1), experts=6)
    assert pruning_space(tiny, keep=3).count() == 400
    assert pruning_space(tiny, keep=3, groups=1).count() == 20
    two = replace(LAYOUT, blocks=(0, 1), experts=4)
    # 5 of 8 with 2 or 3 in each block: C(4,2) C(4,3) twice.
    assert pruning_space(two, total=5).count() == 48
    assert len(pruning_space(two, total=5).enumerate()) == 48


def test_equal_subsets_have_equal_keys() -> None:
    space = pruning_space(LAYOUT, keep=2, groups=1)
    one = space.population([{"experts": [[5, 1]]}])
    other = space.population([{"experts": [[1, 5]]}])
    assert space.keys(one) == space.keys(other)
    assert space.decode(one) == [{"experts": [[1, 5]]}]


def test_what_users_write() -> None:
    assert resolve_keep(LAYOUT, keep=4) == (4, None)
    assert resolve_keep(LAYOUT, keep="50%") == (4, None)
    assert resolve_keep(LAYOUT, keep="40%") == (3, None)
    assert resolve_keep(LAYOUT, keep="40%", per_block=True) == (None, 19)
    assert resolve_keep(LAYOUT, keep="total=21", per_block=True) == (None, 21)
    assert resolve_keep(GROUPED, keep="70%") == (8, None)
    assert resolve_keep(GROUPED, keep="70%", flat=True) == (11, None)
    assert resolve_keep(GROUPED, memory="4KB") == (8, None)
    assert resolve_keep(GROUPED, memory="4KB", per_block=True) == (None, 28)
    assert resolve_keep(GROUPED, memory="4.2KB", per_block=True) == (None, 32)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (LAYOUT, {"keep": 1}, r"keep 1 experts; allowed: 2 \(active ones\) to 8"),
        (LAYOUT, {"keep": 9}, r"keep 9 experts; allowed: 2"),
        (LAYOUT, {"keep": "10%"}, r"keep 0 experts; allowed: 2"),
        (LAYOUT, {"keep": "0%"}, "more than 0%"),
        (LAYOUT, {"keep": "half"}, "keep 'half'; allowed: a number such as 64"),
        (LAYOUT, {"keep": "total=20"}, "per_block"),
        (LAYOUT, {}, "one of them"),
        (LAYOUT, {"memory": "24GiB"}, "needs the model's files"),
        (GROUPED, {"keep": 6}, "keep 6 experts in 4 groups; allowed: 8, 12, 16, or routing"),
        (GROUPED, {"keep": 4}, "allowed: 8, 12, 16, or routing without groups"),
        (GROUPED, {"memory": "2KB"}, "with 8 experts per block the model still takes"),
        (GROUPED, {"memory": "much"}, "a size such as 24GiB"),
    ],
)
def test_what_cannot_be_kept_is_said_before_a_model_is_loaded(
    layout: ExpertLayout, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, SpaceError), match=message):
        resolve_keep(layout, **options)


def test_spaces_that_cannot_be_are_refused() -> None:
    with pytest.raises(SpaceError, match="total 30 experts; allowed: 24 to 48, a multiple of 4"):
        pruning_space(GROUPED, total=30)
    with pytest.raises(SpaceError, match="allowed: 12 to 48"):
        pruning_space(LAYOUT, total=11)
    with pytest.raises(SpaceError, match="7 groups of 6 blocks"):
        pruning_space(LAYOUT, keep=4, groups=7)
    with pytest.raises(SpaceError, match="3 active experts; allowed: 1 to 2"):
        pruning_space(LAYOUT, keep=4, top_k=3)
    with pytest.raises(SpaceError, match=r"mask 0 keeps \[5, 5"):
        pruning_space(LAYOUT, keep=4).of_masks(np.arange(8) < np.full((1, 6, 1), 5))


def test_fewer_active_experts_allow_fewer_kept_ones() -> None:
    assert resolve_keep(LAYOUT, keep=1, top_k=1) == (1, None)
    space = pruning_space(LAYOUT, keep=1, top_k=1)
    assert space.plans(random_population(space, 1))[0].top_k == 1
    assert space.fingerprint != pruning_space(LAYOUT, keep=1, top_k=1, groups=2).fingerprint


def test_costs_are_experts_and_bytes() -> None:
    space = pruning_space(GROUPED, keep=8)
    cost = space.cost(random_population(space, 3))
    assert cost["experts"].tolist() == [24.0] * 3
    assert cost["bytes"].tolist() == [1000.0 + 2400] * 3


def test_plans_are_written_and_read(tmp_path: Path) -> None:
    space = pruning_space(GROUPED, total=32)
    plan = space.plans(random_population(space, 1))[0].with_about(base="x/y", seed=3)
    [path] = space.export({0: plan}, tmp_path)
    assert read_plan(path) == plan
    plan.check(GROUPED)
    with pytest.raises(SpaceError, match="a plan for deepseek_v3 with 16 experts"):
        plan.check(LAYOUT)
    data = plan.to_json()
    with pytest.raises(DataError, match="genotype version 9; allowed: 1"):
        ExpertPlan.from_json({**data, "genotype_version": 9})
    with pytest.raises(DataError, match="layer 1 keeps"):
        ExpertPlan.from_json({**data, "kept": {**data["kept"], "1": [99]}})
    (tmp_path / "genotype.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(DataError, match="genotype cannot be read"):
        read_plan(tmp_path)
