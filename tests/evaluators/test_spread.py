"""Models on several devices: pieces follow each other, nothing is read back on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from searchlab.errors import ConfigError
from searchlab.evaluators.language.batches import Batch, Query, lay_out
from searchlab.evaluators.language.calibration import calibrate
from searchlab.evaluators.language.layered import LayeredForward
from searchlab.evaluators.language.spread import SpreadForward, devices_of
from searchlab.spaces.experts import ResidentExperts
from searchlab.spaces.experts.routing import Rule, choose, fused
from searchlab.testing.tiny_moe import TINY_MOE, tiny_moe

# What makes a host wait for a GPU: a number, a truth value or a size that depends on values.
WAITS = ("local_scalar", "is_nonzero", "nonzero", "equal.default", "unique", "masked_select")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Calls(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def waits(self) -> dict[str, int]:
        return {n: c for n, c in self.counts.items() if any(word in n for word in WAITS)}


def resident_of(name: str) -> ResidentExperts:
    model = tiny_moe(name).eval()
    model.set_experts_implementation("batched_mm")  # as on a GPU: without reading back
    return ResidentExperts(model)


def masks_of(resident: ResidentExperts, n: int) -> Any:
    layout, rng = resident.layout, np.random.default_rng(0)
    each = layout.experts // layout.n_group
    kept = np.zeros((n, len(layout.blocks), layout.n_group, each), dtype=bool)
    for row in kept.reshape(-1, each):
        row[rng.permutation(each)[: each // 2]] = True
    return kept.reshape(n, len(layout.blocks), -1)


def batches_of(packed: bool) -> list[Batch]:
    rng = np.random.default_rng(1)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, 60, n).tolist())

    queries = [Query(item, tokens(5 + item), tokens(2)) for item in range(6)]
    return lay_out(queries, pad=0, tokens=64, packed=packed)


def collected(forward: LayeredForward, batches: list[Batch], kept: Any) -> dict[Any, torch.Tensor]:
    return {
        (number, int(candidate)): logits[row]
        for number, who, logits in forward.sweep(batches, kept)
        for row, candidate in enumerate(who)
    }


@pytest.mark.parametrize(
    ("name", "packed"), [*((name, True) for name in TINY_MOE), ("mixtral", False)]
)
def test_stages_change_no_bit_and_the_host_waits_for_nothing(name: str, packed: bool) -> None:
    resident = resident_of(name)
    batches, kept = batches_of(packed), masks_of(resident, 5)
    layers = list(range(len(resident.model.model.layers)))
    halves = SpreadForward(resident, stages=[layers[:1], layers[1:]])
    collected(halves, batches, kept)  # layers are looked at once
    calls = Calls()
    with calls:
        found = collected(halves, batches, kept)
    assert calls.counts["aten.mm.default"] + calls.counts["aten.addmm.default"] > 0
    assert calls.waits() == {}
    assert halves.most == 2
    assert len(found) == 5 * len(batches)
    whole = SpreadForward(resident, stages=[layers], pieces=1)
    plain = LayeredForward(resident, remember=0)
    plain.steady = False
    for other in (collected(whole, batches, kept), collected(plain, batches, kept)):
        assert all(torch.equal(found[key], other[key]) for key in found)


def test_hooks_of_a_device_map_do_not_disturb() -> None:
    accelerate = pytest.importorskip("accelerate")
    resident = resident_of("qwen2_moe")
    batches, kept = batches_of(True), masks_of(resident, 3)
    want = collected(SpreadForward(resident, stages=[[0], [1, 2]]), batches, kept)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{n}": "cpu" for n in range(3)} | {"lm_head": "cpu"}
    model = accelerate.dispatch_model(resident.model, places, force_hooks=True)
    assert hasattr(model.model.layers[0], "_hf_hook")
    forward = SpreadForward(ResidentExperts(model), stages=[[0], [1, 2]])
    collected(forward, batches, kept)
    calls = Calls()
    with calls:
        found = collected(forward, batches, kept)
    assert calls.waits() == {}
    assert all(torch.equal(found[key], want[key]) for key in want)


def test_a_host_that_waits_is_noticed() -> None:
    resident = resident_of("mixtral")
    forward = LayeredForward(resident, remember=0)  # with steady experts, which look at counts
    calls = Calls()
    with calls:
        collected(forward, batches_of(True), masks_of(resident, 2))
    assert calls.waits()


def test_it_runs_where_nothing_can_be_read() -> None:
    """Tensors without values: every look at one would raise."""
    resident = resident_of("mixtral")
    batches, kept = batches_of(True), masks_of(resident, 4)
    here = SpreadForward(resident, stages=[[0], [1]])
    want = collected(here, batches, kept)
    bare = ResidentExperts(resident.model.to("meta"))
    forward = SpreadForward(bare, stages=[[0], [1]])
    forward._pairs = here._pairs  # what the first look at the layers said
    meta = torch.device("meta")
    found = collected(forward, [batch.to(meta) for batch in batches], kept)
    assert {key: logits.shape for key, logits in found.items()} == {
        key: logits.shape for key, logits in want.items()
    }
    assert all(logits.device == meta for logits in found.values())


def test_rankings_come_from_such_a_model_too() -> None:
    resident = resident_of("olmoe")
    one = calibrate(LayeredForward(resident, remember=0), batches_of(True))
    two = calibrate(SpreadForward(resident, stages=[[0], [1]]), batches_of(True))
    assert np.array_equal(one.counts, two.counts)
    assert np.allclose(one.scores("reap"), two.scores("reap"), rtol=1e-4)


def test_stages_that_cannot_be_are_refused() -> None:
    resident = resident_of("mixtral")
    assert set(devices_of(resident.model)) == {torch.device("cpu")}
    assert SpreadForward(resident).stages == [[0, 1]]
    with pytest.raises(ConfigError, match="allowed: layers 0 to 1"):
        SpreadForward(resident, stages=[[1], [0]])
    with pytest.raises(ConfigError, match="0 pieces"):
        SpreadForward(resident, pieces=0)


@pytest.mark.parametrize("renormalise", [True, False])
def test_one_kernel_routes_as_the_steps_do(renormalise: bool) -> None:
    rng = np.random.default_rng(3)
    rule = Rule("softmax", renormalise, cast=False, scale=1.5)
    logits = torch.from_numpy(rng.normal(size=(40, 16)).astype(np.float32))
    mask = np.zeros((3, 16), dtype=bool)
    for row in mask:
        row[rng.permutation(16)[:6]] = True
    tokens = torch.from_numpy(rng.integers(0, 3, 40))
    index = torch.from_numpy(np.nonzero(mask)[1].reshape(3, 6))
    want, places, _ = choose(logits, rule, 4, index=index, tokens=tokens)
    weights, experts = fused(logits, rule, 4, torch.from_numpy(mask), tokens)
    assert torch.equal(experts, places)
    assert torch.allclose(weights, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v2", "gpt_oss"])
def test_models_can_be_routed_by_it(name: str) -> None:
    resident = resident_of(name)
    batches, kept = batches_of(True), masks_of(resident, 3)
    forward = LayeredForward(resident, remember=0)
    want = collected(forward, batches, kept)
    for routing in resident._routing:
        routing.fused = True
    found = collected(forward, batches, kept)
    assert all(torch.allclose(found[key], want[key], atol=1e-5) for key in want)


@pytest.mark.gpu
def test_gpus_are_not_waited_for() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    resident = resident_of("mixtral")
    plain = {
        key: logits
        for key, logits in collected(
            SpreadForward(resident, stages=[[0, 1]]), batches_of(True), masks_of(resident, 4)
        ).items()
    }
    model = resident.model.to("cuda:0")
    if torch.cuda.device_count() > 1:
        model.model.layers[1].to("cuda:1")
        model.model.norm.to("cuda:1")
        model.lm_head.to("cuda:1")
    moved = ResidentExperts(model)
    forward = SpreadForward(moved, stages=[[0], [1]])
    batches = [batch.to(torch.device("cuda:0")) for batch in batches_of(True)]
    kept = masks_of(moved, 4)
    collected(forward, batches, kept)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = collected(forward, batches, kept)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert forward.most == 2
    for key, logits in found.items():
        assert torch.allclose(logits.cpu(), plain[key], atol=2e-3)
