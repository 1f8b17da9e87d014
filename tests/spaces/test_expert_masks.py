"""Masks on one resident model against models that the experts were really cut out of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from searchlab.errors import ConfigError, SpaceError
from searchlab.spaces.experts import ResidentExperts, families, family_of, layout_of
from searchlab.spaces.experts.cut import cut_model
from searchlab.testing.tiny_moe import TINY_MOE, tiny_config, tiny_moe


@pytest.fixture(scope="module")
def models() -> dict[str, ResidentExperts]:
    return {name: ResidentExperts(tiny_moe(name)) for name in TINY_MOE}


def tokens(seed: int = 0, rows: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def random_masks(resident: ResidentExperts, keep: int, n: int, seed: int = 0) -> Any:
    """(n, L, E) masks with equal numbers from each group."""
    layout, rng = resident.layout, np.random.default_rng(seed)
    out = np.zeros((n, len(layout.blocks), layout.n_group, layout.experts // layout.n_group), bool)
    order = rng.random(out.shape).argsort(axis=-1)
    out[order < keep // layout.n_group] = True
    return out.reshape(n, len(layout.blocks), layout.experts)


def state(model: Any) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {key: value.clone() for key, value in tensors.items()}


@pytest.mark.parametrize("name", TINY_MOE)
def test_all_experts_give_the_base_bit_for_bit(name: str, models: dict[str, Any]) -> None:
    resident = models[name]
    base = logits(resident.model, tokens())
    everything = np.ones((len(resident.blocks), resident.layout.experts), bool)
    with resident.masked(everything):
        assert torch.equal(logits(resident.model, tokens()), base)
    assert torch.equal(logits(cut_model(resident, everything), tokens()), base)


@pytest.mark.parametrize("name", TINY_MOE)
@pytest.mark.parametrize("keep", [4, 6])
def test_a_mask_is_the_model_that_was_cut(name: str, keep: int, models: dict[str, Any]) -> None:
    resident = models[name]
    for kept in random_masks(resident, keep, 3):
        cut = cut_model(resident, kept)
        assert cut.config.num_experts_per_tok == 2
        with resident.masked(kept):
            masked = logits(resident.model, tokens(1))
        assert torch.equal(masked, logits(cut, tokens(1)))
        assert not torch.equal(masked, logits(resident.model, tokens(1)))


@pytest.mark.parametrize("name", TINY_MOE)
def test_rows_of_a_batch_have_masks_of_their_own(name: str, models: dict[str, Any]) -> None:
    resident = models[name]
    masks = random_masks(resident, 4, 4)
    ids = tokens(2)
    rows = torch.arange(4).repeat_interleave(len(ids))
    with resident.masked(masks, rows):
        together = logits(resident.model, ids.repeat(4, 1)).reshape(4, *ids.shape, -1)
    for mask, own in zip(masks, together, strict=True):
        with resident.masked(mask):
            alone = logits(resident.model, ids)
        torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-5)
        assert torch.equal(own.argmax(-1), alone.argmax(-1))


@pytest.mark.parametrize("name", TINY_MOE)
def test_counts_may_differ_between_blocks_and_masks(name: str, models: dict[str, Any]) -> None:
    resident = models[name]
    masks = np.concatenate([random_masks(resident, 4, 1), random_masks(resident, 6, 1)])
    masks = np.concatenate([masks, masks[::-1]])
    masks[2, 0], masks[3, 0] = masks[3, 0].copy(), masks[2, 0].copy()
    ids = tokens(3)
    with resident.masked(masks, torch.arange(4).repeat_interleave(len(ids))):
        together = logits(resident.model, ids.repeat(4, 1)).reshape(4, *ids.shape, -1)
    for mask, own in zip(masks, together, strict=True):
        torch.testing.assert_close(
            own, logits(cut_model(resident, mask), ids), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_routing_without_groups_keeps_any_experts(name: str, models: dict[str, Any]) -> None:
    resident = models[name]
    kept = np.zeros((2, 8), bool)
    kept[0, [0, 1, 2]] = kept[1, [1, 2, 7]] = True
    with pytest.raises(SpaceError, match="keep 3 experts in 2 groups; allowed: 4, 6, 8"):
        cut_model(resident, kept)
    cut = cut_model(resident, kept, flat=True)
    assert (cut.config.n_group, cut.config.topk_group) == (1, 1)
    with resident.masked(kept, flat=True):
        assert torch.equal(logits(resident.model, tokens()), logits(cut, tokens()))
    kept[:, 3] = True
    with pytest.raises(SpaceError, match="equal numbers"), resident.masked(kept):
        pass


@pytest.mark.parametrize("name", TINY_MOE)
def test_the_model_ends_as_it_began_after_an_exception(name: str, models: dict[str, Any]) -> None:
    resident = models[name]
    before, base = state(resident.model), logits(resident.model, tokens())

    def stopped() -> None:
        with resident.masked(random_masks(resident, 4, 1)):
            logits(resident.model, tokens())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    after = state(resident.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(resident.model, tokens()), base)
    assert all("forward" not in router.__dict__ for router in resident.routers)
    assert all(getattr(block, "top_k", 2) == 2 for block in (*resident.blocks, *resident.routers))


@pytest.mark.parametrize("name", TINY_MOE)
def test_fewer_active_experts(name: str, models: dict[str, Any]) -> None:
    resident = models[name]
    everything = np.ones((len(resident.blocks), resident.layout.experts), bool)
    seen: list[torch.Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _m, _i, out: seen.append(out[1]))
        for router in resident.routers
    ]
    with resident.masked(everything, top_k=1):
        one = logits(resident.model, tokens())
        assert all(router.top_k == 1 for router in resident.routers)
    for hook in hooks:
        hook.remove()
    cut = cut_model(resident, everything, top_k=1)
    assert cut.config.num_experts_per_tok == 1
    assert cut.config.to_dict()["num_experts_per_tok"] == 1
    assert torch.equal(one, logits(cut, tokens()))
    assert all(weights.shape[1] == 1 for weights in seen)
    if name in ("mixtral", "qwen3_moe", "gpt_oss"):
        assert all((weights == 1).all() for weights in seen)
    else:
        assert not all((weights == 1).all() for weights in seen)


def test_scoring_all_experts_first_is_another_function_without_renormalisation() -> None:
    def largest(name: str, **changes: Any) -> float:
        resident = ResidentExperts(tiny_moe(name, **changes))
        kept = random_masks(resident, 4, 1)
        with resident.masked(kept):
            cut = logits(resident.model, tokens())
        with resident.masked(kept, router_mode="prob"):
            return float((cut - logits(resident.model, tokens())).abs().max())

    assert largest("mixtral") <= 1e-5
    assert largest("gpt_oss") <= 1e-5
    assert largest("olmoe", norm_topk_prob=False) > 1e-2
    assert largest("olmoe", norm_topk_prob=True) <= 1e-5


def test_layouts_come_from_the_configuration_alone() -> None:
    config = tiny_config("deepseek_v3").to_dict()
    layout = layout_of(config, family_of(config))
    assert layout.blocks == (1, 2)
    assert (layout.experts, layout.top_k, layout.n_group, layout.topk_group) == (8, 2, 2, 1)
    assert layout_of(tiny_config("qwen2_moe"), families()["qwen2_moe"]).blocks == (0, 2)
    assert layout.expert_bytes == 3 * 32 * 16 * 2


def test_other_models_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'llama' is dense.*known: deepseek_v2.*qwen3_moe"):
        family_of({"model_type": "llama"})
    with pytest.raises(ConfigError, match=r"no table for model type 'jamba'.*YAML table"):
        family_of({"model_type": "jamba", "num_experts": 16})


def test_masks_that_do_not_fit_are_refused(models: dict[str, Any]) -> None:
    resident = models["mixtral"]
    kept = np.ones((2, 8), bool)
    kept[1, :7] = False
    with pytest.raises(SpaceError, match=r"layer 1: keep 1 experts; allowed: 2 .*to 8"):
        resident.masked(kept).__enter__()
    with pytest.raises(SpaceError, match="allowed: "):
        resident.masked(np.ones((3, 8), bool)).__enter__()
    full = np.ones((2, 2, 8), bool)
    with pytest.raises(ConfigError, match="2 masks without rows"):
        resident.masked(full).__enter__()
    with pytest.raises(ConfigError, match="from 0 to 2; allowed"):
        resident.masked(full, torch.tensor([0, 2])).__enter__()
    with resident.masked(full, torch.tensor([0, 1])):
        with pytest.raises(ConfigError, match="one pass at a time"):
            resident.masked(full, torch.tensor([0, 1])).__enter__()
        with pytest.raises(ConfigError, match="33 tokens for 2 rows"):
            logits(resident.model, tokens())


@pytest.mark.parametrize("count", [1, 2])
def test_all_masks_are_served_by_one_compilation(count: int) -> None:
    import torch._dynamo

    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    model = tiny_moe("mixtral")
    model.set_experts_implementation("batched_mm")  # the others look at the data
    resident = ResidentExperts(model)
    fast = torch.compile(model, backend=backend)
    ids = tokens(4, rows=2)
    for seed in range(4):
        masks = random_masks(resident, 4, count, seed)
        with resident.masked(masks, torch.arange(2) % count), torch.no_grad():
            assert torch.equal(fast(ids).logits, model(ids).logits)
    assert len(compiled) == 1
