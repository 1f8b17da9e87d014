"""Modules with other forwards for a while: products whose last bits do not depend on company."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from searchlab.evaluators.language.batches import MIN_ROWS

__all__ = ["forwards", "shared_experts", "steady_experts"]


@contextmanager
def forwards(replaced: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Modules with other forwards, for a while; what was there before is there afterwards."""
    before = [module.__dict__.get("forward") for module, _ in replaced]
    try:
        for module, forward in replaced:
            module.__dict__["forward"] = forward
        yield
    finally:
        for (module, _), old in reversed(list(zip(replaced, before, strict=True))):
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


def shared_experts(experts: Any, base: Tensor, copy_of: Tensor) -> Callable[..., Any]:
    """A forward of experts for tokens of which many are the same.

    Each expert's output for a token is computed once, then weighted and summed in the order of the
    experts for each copy, as one by one they would be, bit for bit.

    Args:
        experts: the module.
        base: (n, d) different tokens.
        copy_of: int64 (T,), which of them each token of the call is.
    """
    compute = experts.forward

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        count = int(experts.num_experts)
        index, order = index.sort(dim=1)
        weights = weights.gather(1, order)
        keys = copy_of[:, None] * count + index
        used = torch.zeros(len(base) * count, dtype=torch.bool, device=base.device)
        used[keys.reshape(-1)] = True
        pairs = used.nonzero()[:, 0]
        number = used.cumsum(0) - 1
        ones = torch.ones((len(pairs), 1), dtype=weights.dtype, device=base.device)
        outputs = compute(base[pairs // count], (pairs % count)[:, None], ones)
        out = torch.zeros_like(hidden)
        for place in range(index.shape[1]):
            out += outputs[number[keys[:, place]]] * weights[:, place, None]
        return out

    return forward


def _steady(experts: nn.Module) -> Callable[..., Any]:
    original = type(experts).forward

    def forward(hidden: Tensor, index: Tensor, weights: Tensor, *args: Any) -> Any:
        counts = torch.bincount(index.flatten())
        few = ((counts > 0) & (counts < MIN_ROWS)).nonzero()[:, 0]
        if not len(few):
            return original(experts, hidden, index, weights, *args)
        extra = torch.repeat_interleave(few, MIN_ROWS - counts[few])
        short = -len(extra) % index.shape[1]
        extra = torch.cat([extra, extra[-1:].expand(short)]).view(-1, index.shape[1])
        out: Tensor = original(
            experts,
            torch.cat([hidden, hidden.new_zeros(len(extra), hidden.shape[1])]),
            torch.cat([index, extra.to(index.dtype)]),
            torch.cat([weights, weights.new_zeros(extra.shape)]),
            *args,
        )
        return out[: len(hidden)]

    return forward


def _steady_column(linear: nn.Linear) -> Callable[..., Any]:
    def forward(x: Tensor) -> Tensor:
        weight = torch.cat([linear.weight, linear.weight.new_zeros(MIN_ROWS - 1, x.shape[-1])])
        out = nn.functional.linear(x, weight)[..., :1]
        return out if linear.bias is None else out + linear.bias

    return forward


@contextmanager
def steady_experts(model: nn.Module) -> Iterator[None]:
    """Inside, experts work one by one, and none multiplies fewer than 16 tokens: rows of zeros with
    weight 0 fill up.

    A product of fewer rows, or of one column, has other last bits on a CPU. So what a token gets
    does not depend on how many others an expert has, nor a candidate's score on those beside it.
    """
    replaced: list[tuple[nn.Module, Callable[..., Any]]] = []
    for module in model.modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module):
            replaced.append((experts, _steady(experts)))
        if isinstance(module, nn.Linear) and module.out_features == 1:
            replaced.append((module, _steady_column(module)))
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    try:
        if before is not None:
            config._experts_implementation = "eager"
        with forwards(replaced):
            yield
    finally:
        if before is not None:
            config._experts_implementation = before
