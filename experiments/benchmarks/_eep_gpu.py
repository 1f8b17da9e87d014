"""The benchmark `eep` on a GPU: a large model with random weights, resident and merged."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from searchlab.experiments.benchmarks._common import Aim, Journal, spread
from searchlab.spaces.experts import ResidentExperts, pruning_space
from searchlab.uniforms import uniforms

__all__ = ["gpu"]

_LAYERS = 22  # of Mixtral 8x7B's shape: 60 GB in bfloat16
_ROWS, _LENGTH, _TOGETHER = 64, 128, 4


def gpu(journal: Journal, quick: bool, folder: Path) -> None:
    """Seconds per candidate, bandwidth of a merge, memory and tokens/s at 8, 4 and 2 experts."""
    if not torch.cuda.is_available():
        journal.skip("random Mixtral on a GPU", "no CUDA device")
        return
    resident = ResidentExperts(_random_mixtral(1 if quick else _LAYERS))
    ids = torch.randint(3, 32000, (_ROWS, _LENGTH), device="cuda")
    _candidates(journal, resident, ids)
    _merge(journal, resident)
    _sizes(journal, resident, ids)


def _random_mixtral(layers: int) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(num_hidden_layers=layers, dtype=torch.bfloat16)
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = MixtralForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def _timed(call: Any, repeats: int = 5) -> list[float]:
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times


@torch.no_grad()
def _candidates(journal: Journal, resident: ResidentExperts, ids: torch.Tensor) -> None:
    space = pruning_space(resident.layout, keep=4)
    masks = space.masks(space.sample(uniforms(0, 0, 0, _TOGETHER, space.sample_width)))
    rows = torch.arange(_TOGETHER, device="cuda").repeat_interleave(len(ids))
    many = ids.repeat(_TOGETHER, 1)

    def together() -> None:
        with resident.masked(masks, rows):
            resident.model(input_ids=many, use_cache=False, logits_to_keep=1)

    def alone() -> None:
        with resident.masked(masks[:1]):
            resident.model(input_ids=ids, use_cache=False, logits_to_keep=1)

    figures = {
        "weight_bytes": sum(p.numel() * p.element_size() for p in resident.model.parameters()),
        "tokens": ids.numel(),
        "alone_s": spread(_timed(alone)),
        "together_s_per_candidate": spread([t / _TOGETHER for t in _timed(together)]),
    }
    journal.case("random Mixtral on a GPU, candidates", figures)


@torch.no_grad()
def _merge(journal: Journal, resident: ResidentExperts) -> None:
    blocks, experts = len(resident.layout.blocks), resident.layout.experts
    generator = np.random.default_rng(0)

    def merge() -> None:
        tables = [generator.normal(size=(4, experts)) for _ in range(blocks)]
        with resident.merged(tables):
            pass

    weights = [p for part in resident.experts for p in part.parameters()]
    moved = sum(p.numel() * p.element_size() for p in weights) * (1 + 4 / experts)
    source = weights[0]
    target = torch.empty_like(source)
    copy = 2 * source.numel() * source.element_size() / min(_timed(lambda: target.copy_(source)))
    rate = moved / min(_timed(merge))
    resident.release()
    share = rate / copy
    journal.case(
        "random Mixtral on a GPU, merge",
        {"bytes_per_s": rate, "copy_bytes_per_s": copy, "share_of_copy": share},
        aims=[Aim("share of copy bandwidth", share, "at least", 0.6)],
    )


@torch.no_grad()
def _sizes(journal: Journal, resident: ResidentExperts, ids: torch.Tensor) -> None:
    rows = {}
    for keep in (8, 4, 2):
        mask = np.zeros((1, len(resident.layout.blocks), resident.layout.experts), dtype=bool)
        mask[:, :, :keep] = True

        def ask(mask: Any = mask) -> None:
            with resident.masked(mask):
                resident.model(input_ids=ids, use_cache=False, logits_to_keep=1)

        layout = resident.layout
        dropped = len(layout.blocks) * (layout.experts - keep) * layout.expert_bytes
        whole = sum(p.numel() * p.element_size() for p in resident.model.parameters())
        rows[str(keep)] = {
            "weight_bytes": whole - dropped,
            "tokens_per_s": ids.numel() / min(_timed(ask)),
        }
    journal.case("random Mixtral on a GPU, 8, 4 and 2 experts", {"experts": rows})
