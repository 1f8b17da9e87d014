"""Models larger than the device: weights are read once, values are the resident model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from searchlab.errors import ConfigError, DataError
from searchlab.evaluators.language.batches import Batch, Query, lay_out
from searchlab.evaluators.language.calibration import calibrate
from searchlab.evaluators.language.layered import LayeredForward
from searchlab.evaluators.language.streaming import FolderWeights, streamed
from searchlab.testing.tiny_moe import TINY_MOE, tiny_moe
from searchlab.uniforms import uniforms

pytest.importorskip("transformers")

from searchlab.spaces.experts import ResidentExperts, pruning_space


def some_batches(n: int, seed: int = 4) -> list[Batch]:
    rng = np.random.default_rng(seed)
    queries = [
        Query(
            item,
            tuple(rng.integers(3, 60, rng.integers(4, 14)).tolist()),
            tuple(rng.integers(3, 60, rng.integers(1, 4)).tolist()),
        )
        for item in range(n)
        for _ in range(2)
    ]
    return lay_out(queries, pad=0, tokens=200, packed=False)


def some_masks(resident: ResidentExperts, n: int) -> Any:
    space = pruning_space(resident.layout, keep=4, groups="block")
    return space.masks(space.sample(uniforms(1, 0, 0, n, space.sample_width)))


def swept(forward: LayeredForward, batches: list[Batch], masks: Any) -> dict[Any, torch.Tensor]:
    return {
        (number, int(k)): logits[place].clone()
        for number, who, logits in forward.sweep(batches, masks)
        for place, k in enumerate(who)
    }


@pytest.mark.parametrize("name", [*TINY_MOE, "tied"])
def test_streamed_equals_resident_in_every_bit(name: str, tmp_path: Path) -> None:
    tied = name == "tied"
    model = tiny_moe("mixtral", tie_word_embeddings=True) if tied else tiny_moe(name)
    resident = ResidentExperts(model)
    batches, masks = some_batches(6), some_masks(resident, 4)
    want: dict[Any, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        for who, logits in LayeredForward(resident).logits(batch, masks):
            want.update({(number, int(k)): logits[i].clone() for i, k in enumerate(who)})
    model.save_pretrained(tmp_path)
    for source in (tmp_path, model):
        other, store = streamed(source, attention="eager", experts="eager")
        forward = LayeredForward(other, store=store)
        got = swept(forward, batches, masks)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
        assert store.bytes_read == store.total
        assert set(store.reads.values()) == {1}
        swept(forward, batches, masks)
        assert store.bytes_read == 2 * store.total
        store.close()


def test_a_model_eight_times_the_limit(tmp_path: Path) -> None:
    model = tiny_moe("mixtral", num_hidden_layers=20)
    model.save_pretrained(tmp_path)
    total = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    limit = total // 8
    other, store = streamed(tmp_path, attention="eager", experts="eager", limit=limit)
    assert store.total == total >= 8 * limit
    batches, masks = some_batches(5), some_masks(other, 32)
    got = swept(LayeredForward(other, store=store), batches, masks)
    assert store.peak <= limit
    assert store.bytes_read == total
    resident = LayeredForward(ResidentExperts(model), remember=0)
    for number, batch in enumerate(batches):
        for who, logits in resident.logits(batch, masks):
            for place, k in enumerate(who):
                assert torch.equal(got[number, int(k)], logits[place])
    # Two parts of the model fit: the next one was read while one computed.
    assert store.peak > max(store._size.values())
    store.close()
    with pytest.raises(ConfigError, match=r"part 0 has .* the limit is 9"):
        streamed(tmp_path, limit=9_000)


def test_one_streamed_pass_gives_every_baseline(tmp_path: Path) -> None:
    model = tiny_moe("deepseek_v3")
    model.save_pretrained(tmp_path)
    other, store = streamed(tmp_path, attention="eager", experts="eager")
    resident = ResidentExperts(model)
    batches = some_batches(6)
    here = calibrate(LayeredForward(resident), batches)
    there = calibrate(LayeredForward(other, store=store), batches)
    assert store.bytes_read == store.total
    for name in ("counts", "soft", "norms", "gated"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
    masks = some_masks(resident, 5)
    np.testing.assert_array_equal(here.block_errors(masks), there.block_errors(masks))
    store.close()


def test_a_sweep_that_is_broken_off_can_be_repeated() -> None:
    model = tiny_moe("olmoe")
    other, store = streamed(model)
    forward = LayeredForward(other, store=store)
    batches, masks = some_batches(3), some_masks(other, 2)
    want = swept(forward, batches, masks)
    broken = forward.sweep(batches, masks)
    next(broken)
    broken.close()
    got = swept(forward, batches, masks)
    assert all(torch.equal(got[key], want[key]) for key in want)
    store.close()


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(DataError, match="no safetensors files"):
        FolderWeights(tmp_path)
    tiny_moe("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    gone = next(name for name in state if "experts.3.w1" in name)
    save_file({k: v for k, v in state.items() if k != gone}, file)
    with pytest.raises(DataError, match=r"lack 'model\.layers\.0\.mlp\.experts\.gate_up_proj'"):
        streamed(tmp_path)
    save_file({**state, "model.strange": torch.zeros(2)}, file)
    with pytest.raises(DataError, match=r"'model\.strange' has no place in MixtralForCausalLM"):
        streamed(tmp_path)
