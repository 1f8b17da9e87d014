"""Merged experts: what is summed, how the router follows, and the operators of the search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from searchlab.algorithms.evolution import Evolution, ParentRule
from searchlab.config import Answers
from searchlab.errors import ConfigError, SpaceError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.spaces.experts import ExpertLayout, ResidentExperts, pruning_space
from searchlab.spaces.experts.cut import cut_model
from searchlab.spaces.experts.merging import AdoptPruned, merging_space
from searchlab.spaces.experts.plan import ExpertPlan
from searchlab.spaces.experts.variation import MergingVariation, PruningVariation, moved
from searchlab.testing.algorithm import drive
from searchlab.testing.space import SpaceSuite, random_population
from searchlab.testing.tiny_moe import TINY_MOE, tiny_moe
from searchlab.uniforms import uniforms

LAYOUT = ExpertLayout(family="mixtral", blocks=(0, 1, 2, 3), layers=4, experts=8, top_k=2)
GROUPED = replace(LAYOUT, family="deepseek_v3", n_group=2, topk_group=1, group_best=2)


class TestMergedExperts(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return merging_space(LAYOUT, keep=3, groups=2)


class TestMergedExpertsAndRouters(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return merging_space(GROUPED, keep=4, groups=1, router_mode="prob")


@pytest.fixture(scope="module")
def models() -> dict[str, ResidentExperts]:
    return {name: ResidentExperts(tiny_moe(name)) for name in TINY_MOE}


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(seed))


def logits(resident: ResidentExperts) -> torch.Tensor:
    with torch.no_grad():
        return resident.model(tokens()).logits


def eye(resident: ResidentExperts) -> list[Any]:
    return [np.eye(resident.layout.experts)] * len(resident.blocks)


def chosen(rows: list[int], experts: int = 8) -> Any:
    return np.eye(experts)[rows]


@pytest.mark.parametrize("name", TINY_MOE)
def test_the_identity_is_the_base_bit_for_bit(name: str, models: dict[str, Any]) -> None:
    resident = models[name]
    base = logits(resident)
    with resident.merged(eye(resident)):
        assert torch.equal(logits(resident), base)
    for mode in ("prob", "logit"):
        with resident.merged(eye(resident), route=eye(resident), router_mode=mode):
            torch.testing.assert_close(logits(resident), base, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(resident), base)
    assert resident.floored == 0


@pytest.mark.parametrize("name", TINY_MOE)
def test_one_hot_rows_are_the_model_that_was_cut(name: str, models: dict[str, Any]) -> None:
    resident = models[name]
    kept = np.zeros((len(resident.blocks), 8), bool)
    kept[:, [0, 2, 5, 7]] = True
    merge = [chosen([0, 2, 5, 7])] * len(resident.blocks)
    with torch.no_grad():
        cut = cut_model(resident, kept)(tokens()).logits
    with resident.merged(merge):
        assert torch.equal(logits(resident), cut)
    with resident.merged(merge, route=merge, router_mode="logit"):
        torch.testing.assert_close(logits(resident), cut, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY_MOE)
def test_sums_are_linear_and_the_base_is_not_touched(name: str, models: dict[str, Any]) -> None:
    resident = models[name]
    before = {key: value.clone() for key, value in resident.model.named_parameters()}
    rng = np.random.default_rng(1)
    u, v = (rng.normal(size=(2, len(resident.blocks), 4, 8))).astype(np.float32)

    def buffers(table: Any) -> dict[str, torch.Tensor]:
        with resident.merged(list(table)):
            found = dict(resident.model.named_parameters())
            return {key: found[key].clone() for key in before if ".experts." in key}

    first, second, both = buffers(u), buffers(v), buffers(2 * u - 0.5 * v)
    names = {key.rsplit(".", 1)[1] for key in both}
    assert names >= {"gate_up_proj", "down_proj"}
    assert (name == "gpt_oss") == ("down_proj_bias" in names)
    for key, value in both.items():
        assert len(value) == 4
        torch.testing.assert_close(value, 2 * first[key] - 0.5 * second[key], rtol=1e-5, atol=1e-5)
    after = dict(resident.model.named_parameters())
    assert all(torch.equal(before[key], after[key]) for key in before)
    resident.release()


@pytest.mark.parametrize("mode", ["slice", "prob", "logit"])
def test_the_order_of_rows_means_nothing(mode: Any, models: dict[str, Any]) -> None:
    resident = models["mixtral"]
    rng = np.random.default_rng(2)
    merge = chosen([1, 3, 4, 6]) + 0.1 * rng.normal(size=(4, 8))
    route = None if mode == "slice" else chosen([1, 3, 4, 6]) + 0.1 * rng.normal(size=(4, 8))
    order, out = [2, 0, 3, 1], []
    for rows in (slice(None), order):
        table = None if route is None else [route[rows]] * 2
        with resident.merged([merge[rows]] * 2, route=table, router_mode=mode):
            out.append(logits(resident))
    torch.testing.assert_close(*out, rtol=1e-5, atol=1e-5)
    assert not torch.equal(out[0], logits(resident))


def test_shares_that_are_all_cut_to_zero_do_no_harm(models: dict[str, Any]) -> None:
    resident = models["mixtral"]
    merge = [chosen([0, 1, 2])] * 2
    with resident.merged(merge, route=[-chosen([0, 1, 2])] * 2, router_mode="prob"):
        assert torch.isfinite(logits(resident)).all()
    assert resident.floored == 2 * 33


def test_matrices_that_do_not_fit_are_refused(models: dict[str, Any]) -> None:
    resident = models["mixtral"]
    good = [chosen([0, 1, 2])] * 2
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"merge": good[:1]}, SpaceError, "1 matrices for 2 blocks"),
        ({"merge": [np.ones((3, 7))] * 2}, SpaceError, r"allowed: \(E', 8\)"),
        ({"merge": [good[0] * np.nan] * 2}, SpaceError, "not finite"),
        ({"merge": [chosen([0])] * 2}, SpaceError, "keep 1 experts; allowed: 2"),
        ({"merge": good, "router_mode": "prob"}, ConfigError, "without route"),
        ({"merge": good, "router_mode": "other"}, ConfigError, "slice, prob, logit"),
        ({"merge": good, "route": [0.5 * good[0]] * 2}, SpaceError, "not one-hot"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            resident.merged(options.pop("merge"), **options).__enter__()
    assert torch.isfinite(logits(resident)).all()


# -- the space --------------------------------------------------------------------------------


def test_pruned_models_are_adopted_and_say_so() -> None:
    before = pruning_space(LAYOUT, keep=3, groups=2)
    rows = random_population(before, 6)
    losses = np.array([[3.0], [1.0], [np.inf], [0.5], [2.0], [4.0]])
    answers = Answers(before, rows, tuple("abcdef"), losses)
    for mode in ("slice", "prob", "logit"):
        after = merging_space(LAYOUT, keep=3, groups=2, router_mode=mode)  # type: ignore[arg-type]
        seeds = AdoptPruned(2)(answers, after)
        assert seeds.origin == ("d", "b")
        assert after.is_feasible(seeds.population).all()
        [plan, _] = after.plans(seeds.population)
        assert plan.kept == before.plans(rows.take([3]))[0].kept
        assert not plan.merge
        assert ExpertPlan.from_json(plan.to_json()) == plan


def test_plans_of_merged_experts_are_written_and_read() -> None:
    space = merging_space(LAYOUT, keep=3, groups=2, router_mode="prob")
    a = random_population(space, 2)
    variation = MergingVariation()
    child = variation.vary(space, a, a, uniforms(0, 0, 0, 2, variation.width(space)))
    [plan, _] = space.plans(child)
    assert plan.router_mode == "prob"
    assert plan.route or plan.merge
    assert ExpertPlan.from_json(plan.to_json()) == plan


# -- operators --------------------------------------------------------------------------------


def test_moves_keep_experts_apart_at_the_true_rate() -> None:
    before = np.tile(np.arange(4), (10_000, 1))
    after = moved(before, 8, 0.15, uniforms(0, 0, 0, 10_000, 8))
    assert (np.diff(np.sort(after, axis=1), axis=1) > 0).all()
    assert abs((after != before).mean() - 0.12) < 0.01


def test_pruning_children_keep_the_space() -> None:
    variation = PruningVariation.released()
    # A share of 0.15 (1 - 1 / (8 - 4 + 1)) moves, or with 2 of 4 in each group 0.15 (1 - 1 / 3).
    for layout, rate in ((LAYOUT, 0.12), (GROUPED, 0.10)):
        space = pruning_space(layout, keep=4, groups=4)
        a, b = random_population(space, 10_000), random_population(space, 10_000, seed=1)
        u = uniforms(2, 0, 0, 10_000, variation.width(space))
        child = variation.vary(space, a, b, u)
        assert space.is_feasible(child).all()
        changed = (space.masks(child) != space.masks(a)).any(axis=2).mean()
        # A selected group (0.25, one at least: 0.366) changes unless all of its rows stay.
        assert abs(changed - 0.366 * (1 - (1 - rate) ** 4)) < 0.01
        merging = merging_space(layout, keep=4, groups=4)
        start = merging.of_masks(space.masks(a.take(range(100))))
        pair = variation.vary(merging, start, start, u[:100])
        wanted = merging.of_masks(space.masks(child.take(range(100))))
        if layout is LAYOUT:
            assert pair.equals(wanted)


def test_one_late_group_alone_may_change() -> None:
    space = pruning_space(LAYOUT, keep=4)
    variation = PruningVariation(single=1.0, row=1.0)
    a, b = random_population(space, 2000), random_population(space, 2000, seed=1)
    child = variation.vary(space, a, b, uniforms(6, 0, 0, 2000, variation.width(space)))
    changed = (space.masks(child) != space.masks(a)).any(axis=2)
    assert changed.sum(axis=1).max() == 1
    share = changed.sum(axis=0) / changed.sum()
    assert np.abs(share - np.array([1, 3, 5, 7]) / 16).max() < 0.03


def test_merging_children_have_the_published_rates() -> None:
    space = merging_space(LAYOUT, keep=4, groups=4, router_mode="prob")
    a = random_population(space, 3000)
    variation = MergingVariation(normalise=0.0)
    u = uniforms(3, 0, 0, 3000, variation.width(space))
    child = variation.vary(space, a, a, u)
    step = np.concatenate([child[key] - a[key] for key in ("merge", "route")])
    changed = step != 0
    assert abs(step[changed].std() - 0.065) < 0.02 * 0.065
    groups = changed.any(axis=(2, 3))
    per_group = changed.sum(axis=(2, 3))[groups].mean() / 32
    assert abs(per_group - 0.25) < 0.01
    assert np.abs(step).max() < 0.5


def test_crossover_takes_rows_of_the_parents_only() -> None:
    space = merging_space(LAYOUT, keep=4, groups=1, router_mode="prob")
    rng = np.random.default_rng(0)
    rows = np.eye(8)[[0, 2, 4, 6]]
    a, b = (
        Population({key: rows + rng.uniform(0, 0.1, (4000, 1, 4, 8)) for key in space.variables})
        for _ in range(2)
    )
    variation = MergingVariation(entry=0.0, normalise=0.0)
    child = variation.vary(space, a, b, uniforms(4, 0, 0, 4000, variation.width(space)))
    for key in space.variables:
        of_a = (child[key] == a[key]).all(axis=-1)
        of_b = (child[key] == b[key]).all(axis=-1)
        assert (of_a ^ of_b).all()
        assert abs(of_a.mean() - 0.6) < 0.02


def test_rows_are_divided_by_their_sums() -> None:
    space = merging_space(LAYOUT, keep=4, groups=2)
    a = Population({"merge": np.tile(0.5 * np.eye(8)[[0, 2, 4, 6]], (2000, 2, 1, 1))})
    variation = MergingVariation(entry=0.0)
    child = variation.vary(space, a, a, uniforms(5, 0, 0, 2000, variation.width(space)))
    whole = (child["merge"].sum(axis=-1) == 1).all(axis=(1, 2))
    assert abs(whole.mean() - 0.1) < 0.02
    assert np.array_equal(child["merge"][~whole], a["merge"][~whole])


def released(space: Space, seed: int = 0) -> Evolution:
    return Evolution(
        space,
        seed=seed,
        n_random=31,
        parents=ParentRule("threshold", margin=3.0, limit=402),
        variation=MergingVariation(),
        mating=0.3,
        mates=ParentRule("threshold", margin=1.0, limit=402, least=6),
        early=PruningVariation.released(),
        early_until=101,
    )


def test_the_published_search_has_31_random_70_pruned_and_301_merged() -> None:
    space = merging_space(LAYOUT, keep=4, groups=4, router_mode="prob")
    parts = drive(released(space), 402)
    rows = Population.concat([jobs.population for jobs in parts])
    keys = [key for jobs in parts for key in jobs.keys]
    assert len(rows) == len(set(keys)) == 402
    pure = np.array([not plan.merge for plan in space.plans(rows)])
    assert pure[:101].all()
    assert pure[101:].mean() < 0.05
    origin = [text for jobs in parts for text in jobs.origin]
    assert origin == ["random"] * 31 + ["vary"] * 371
    parents = np.concatenate([jobs.parents for jobs in parts])  # type: ignore[arg-type]
    assert (parents[31:101, 0] == parents[31:101, 1]).all()
    assert abs((parents[101:, 0] != parents[101:, 1]).mean() - 0.3) < 0.08


def test_wrong_uses_of_operators_are_named() -> None:
    with pytest.raises(ConfigError, match="one count for all blocks"):
        PruningVariation().width(pruning_space(LAYOUT, total=20))
    with pytest.raises(ConfigError, match="merged experts on space 'experts'"):
        MergingVariation().width(pruning_space(LAYOUT, keep=4))
    with pytest.raises(ConfigError, match="allowed: in"):
        PruningVariation(group=0.0)
    with pytest.raises(ConfigError, match="with `early`"):
        Evolution(pruning_space(LAYOUT, keep=4), early_until=3)
