"""Routing: against token by token, ties, masks, maps, and what is refused."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from searchlab.cuda_ext import route_topk
from searchlab.cuda_ext.route_topk import route_topk_reference


def logits_of(tokens: int, experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(1)).to(dtype)


def cases(tokens: int, experts: int, device: str = "cpu") -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 3, (tokens,), generator=generator)
    masks = torch.rand(3, experts, generator=generator) < 0.6
    masks[:, :4] = True
    maps = torch.randn(3, max(4, experts // 2), experts, generator=generator) * 0.2
    maps[:, torch.arange(4), torch.arange(4)] += 1
    every: dict[str, dict[str, Any]] = {
        "plain": {},
        "not renormalised": {"renormalise": False},
        "one mask": {"masks": masks[:1]},
        "a mask per token": {"masks": masks, "rows": rows},
        "maps of probabilities": {"maps": maps, "rows": rows},
        "maps of logits": {"maps": maps, "mapped": "logits", "rows": rows},
    }
    return {
        name: {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        for name, options in every.items()
    }


@pytest.mark.parametrize("name", list(cases(1, 8)))
@pytest.mark.parametrize("experts", [8, 60])
def test_equals_token_by_token(name: str, experts: int) -> None:
    logits, options = logits_of(40, experts), cases(40, experts)[name]
    weights, indices = route_topk(logits, 3, **options)
    expected, chosen = route_topk_reference(logits, 3, **options)
    assert torch.equal(indices, chosen)
    assert torch.allclose(weights, expected, rtol=1e-5, atol=1e-6)
    if options.get("renormalise", True):
        assert torch.allclose(weights.sum(1), torch.ones(40))


def test_equals_a_router_without_the_masked_experts() -> None:
    logits = logits_of(30, 12)
    kept = torch.tensor([1, 3, 4, 8, 11])
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, kept] = True
    weights, indices = route_topk(logits, 2, masks=mask)
    share, local = torch.softmax(logits[:, kept], 1).topk(2)
    assert torch.equal(indices, kept[local])
    assert torch.allclose(weights, share / share.sum(1, keepdim=True))


def test_equals_go_by_index() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    _, indices = route_topk(logits, 3)
    assert indices.tolist() == [[1, 2, 4], [0, 1, 2]]


def test_the_order_of_the_kernel_is_that_of_a_stable_sort(bodies: ctypes.CDLL) -> None:
    values = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(0)).float()
    values[[7, 90]] = torch.nan
    out = torch.empty(200, dtype=torch.int64)
    bodies.cpu_order(ctypes.c_void_p(values.data_ptr()), 200, ctypes.c_void_p(out.data_ptr()))
    assert torch.equal(out, torch.sort(values, descending=True, stable=True)[1])


@pytest.mark.parametrize(
    ("logits", "k", "options", "message"),
    [
        (torch.ones(3), 1, {}, "logits of shape"),
        (torch.ones(2, 513), 1, {}, "E from 1 to"),
        (torch.ones(2, 4), 5, {}, "k 5; allowed: 1 to 4"),
        (torch.ones(2, 4), 0, {}, "k 0"),
        (torch.ones(2, 4), 1, {"masks": torch.ones(1, 3)}, "masks of shape"),
        (torch.ones(2, 4), 1, {"maps": torch.ones(1, 3)}, "maps of shape"),
        (torch.ones(2, 4), 3, {"maps": torch.ones(1, 2, 4)}, "k 3; allowed: 1 to 2"),
        (torch.ones(2, 4), 1, {"masks": torch.ones(1, 4), "maps": torch.ones(1, 2, 4)}, "together"),
        (torch.ones(2, 4), 1, {"rows": torch.zeros(3, dtype=torch.int64)}, "rows of shape"),
        (torch.ones(2, 4), 1, {"mapped": "x"}, "mapped 'x'"),
    ],
)
def test_what_does_not_fit_is_named(
    logits: Tensor, k: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        route_topk(logits, k, **options)


def test_torch_checks_the_operation() -> None:
    masks = torch.ones(2, 8, dtype=torch.uint8)
    rows = torch.tensor([0, 1, 1])
    arguments = (logits_of(3, 8), 2, masks, None, False, rows, True)
    torch.library.opcheck(torch.ops.searchlab.route_topk.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(cases(1, 8)))
@pytest.mark.parametrize("experts", [4, 8, 60, 128, 256, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_the_plain_path(
    gpu: torch.device, name: str, experts: int, dtype: torch.dtype
) -> None:
    logits = logits_of(1000, experts, dtype)
    k = min(4, experts)
    weights, indices = route_topk(logits.to(gpu), k, **cases(1000, experts, "cuda")[name])
    expected, chosen = route_topk(logits, k, **cases(1000, experts)[name])
    # Sums in another order may swap experts that are equal to the last bits.
    assert (indices.cpu() == chosen).float().mean() > 0.999
    assert torch.allclose(weights.cpu(), expected, rtol=1e-4, atol=1e-5)
