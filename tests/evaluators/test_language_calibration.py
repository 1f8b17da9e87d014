"""Experts ranked by one pass over prompts: counts, norms, errors of blocks, masks of baselines."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from searchlab.errors import ConfigError
from searchlab.evaluators.language.batches import Batch, Query, lay_out
from searchlab.evaluators.language.calibration import (
    SCORES,
    Calibration,
    baselines,
    calibrate,
    keep_best,
    naee,
)
from searchlab.evaluators.language.layered import LayeredForward
from searchlab.testing.tiny_moe import TINY_MOE, tiny_moe

pytest.importorskip("transformers")

from searchlab.spaces.experts import ResidentExperts, pruning_space


def some_batches(n: int = 6) -> list[Batch]:
    rng = np.random.default_rng(2)
    queries = [
        Query(item, tuple(rng.integers(3, 60, rng.integers(4, 14)).tolist()), (5,))
        for item in range(n)
    ]
    return lay_out(queries, pad=0, tokens=100, packed=False)


def made(name: str, **more: Any) -> tuple[ResidentExperts, Calibration]:
    resident = ResidentExperts(tiny_moe(name))
    return resident, calibrate(LayeredForward(resident), some_batches(), **more)


def seen_by_hooks(resident: ResidentExperts) -> list[list[tuple[Any, ...]]]:
    """(inputs, logits, weights, experts) of real tokens, block by block, from the plain model."""
    seen: list[list[tuple[Any, ...]]] = [[] for _ in resident.routers]
    for batch in some_batches():
        handles = [
            router.register_forward_hook(
                lambda module, args, out, number=number, real=batch.real: seen[number].append(
                    tuple(
                        part.reshape(-1, part.shape[-1])[real.flatten()] for part in (args[0], *out)
                    )
                )
            )
            for number, router in enumerate(resident.routers)
        ]
        with torch.no_grad():
            resident.model(
                input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions
            )
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("name", TINY_MOE)
def test_sums_are_those_of_the_plain_model(name: str) -> None:
    resident, found = made(name)
    seen = seen_by_hooks(resident)
    experts_count = resident.layout.experts
    assert found.tokens == sum(len(part[0]) for part in seen[0])
    for number, parts in enumerate(seen):
        x, _, weights, index = (torch.cat([part[k] for part in parts]) for k in range(4))
        counts = torch.bincount(index.flatten(), minlength=experts_count)
        np.testing.assert_array_equal(found.counts[number], counts.numpy())
        module = resident.blocks[number].experts
        gates = weights.float() / weights.float().sum(dim=1, keepdim=True)
        want = np.zeros(experts_count)
        for token in range(len(x)):
            for place in range(index.shape[1]):
                with torch.no_grad():
                    out = module(  # type: ignore[operator]
                        x[token : token + 1],
                        index[token : token + 1, place : place + 1],
                        torch.ones(1, 1),
                    )
                want[int(index[token, place])] += float(gates[token, place] * out.norm())
        np.testing.assert_allclose(found.gated[number], want, rtol=1e-4)
        np.testing.assert_allclose(
            found.scores("reap")[number], want / np.maximum(counts.numpy(), 1), rtol=1e-4
        )
        if name in ("mixtral", "olmoe", "deepseek_v2"):
            np.testing.assert_allclose(found.soft[number].sum(), len(x), rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss"])
def test_block_errors_are_those_of_masked_blocks(name: str) -> None:
    resident, found = made(name, sample=10_000)
    space = pruning_space(resident.layout, keep=4, groups="block")
    masks = keep_best(space, found.scores("frequency"))[None]
    errors = found.block_errors(masks)
    every = np.ones_like(masks)
    assert (found.block_errors(every) == 0).all()
    for number, parts in enumerate(seen_by_hooks(resident)):
        x = torch.cat([part[0] for part in parts])
        block = resident.blocks[number]
        with torch.no_grad():
            outs = []
            for mask in (every, masks):
                with resident.masked(mask):
                    _, weights, index = resident.routers[number](x)
                    outs.append(block.experts(x, index, weights))  # type: ignore[operator]
        want = float((outs[1] - outs[0]).norm() / outs[0].norm())
        assert errors[0, number] == pytest.approx(want, rel=1e-4)


def test_naee_is_the_least_error_of_all_subsets() -> None:
    resident, found = made("mixtral")
    space = pruning_space(resident.layout, keep=3, groups="block")
    best = naee(space, found)
    assert best is not None
    for block in range(2):
        subsets = list(itertools.combinations(range(8), 3))
        masks = np.zeros((len(subsets), 8), dtype=bool)
        for row, subset in enumerate(subsets):
            masks[row, list(subset)] = True
        errors = found.errors(block, masks)
        assert tuple(np.flatnonzero(best[block])) == subsets[int(errors.argmin())]


def test_the_best_scores_fit_the_space() -> None:
    resident, found = made("mixtral")
    scores = found.scores("frequency")
    space = pruning_space(resident.layout, keep=5, groups=1)
    kept = keep_best(space, scores)
    share = (scores / scores.sum(axis=1, keepdims=True)).sum(axis=0)
    assert set(np.flatnonzero(kept[0])) == set(np.argsort(-share, kind="stable")[:5])
    assert (kept[0] == kept[1]).all()
    total = pruning_space(resident.layout, total=9)
    wide = np.array([[8.0, 7, 6, 5, 4, 3, 2, 1], [100.0, 1, 1, 1, 1, 1, 1, 1]])
    counts = keep_best(total, wide).sum(axis=1)
    assert counts.tolist() == [7, 2]
    for name in ("mixtral", "deepseek_v2", "deepseek_v3"):
        resident, found = made(name)
        for space in (
            pruning_space(resident.layout, keep=4, groups="block"),
            pruning_space(resident.layout, total=len(resident.layout.blocks) * 6),
        ):
            for mask in baselines(space, found).values():
                space.of_masks(mask[None])
    assert naee(total, found) is None
    with pytest.raises(ConfigError, match="unknown score of experts 'x'"):
        found.scores("x")
    assert set(SCORES) < set(baselines(pruning_space(resident.layout, keep=4), found))
