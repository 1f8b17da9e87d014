"""The router of a mixture of experts in one pass, with a mask or a map of its own per token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from searchlab.cuda_ext import library
from searchlab.cuda_ext._registration import STORAGE, register

__all__ = ["MAX_EXPERTS", "MAX_TOP", "route_topk", "route_topk_reference"]

MAX_EXPERTS = 512
MAX_TOP = 32
FLOOR = 1e-20  # of the sum that weights are divided by: negative shares are cut off, all may be 0


def route_topk(
    logits: Tensor,
    k: int,
    *,
    masks: Tensor | None = None,
    maps: Tensor | None = None,
    mapped: Literal["probabilities", "logits"] = "probabilities",
    rows: Tensor | None = None,
    renormalise: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax, mask or map, top-k and renormalisation of router logits.

    With masks, experts that are masked get no probability. With maps, probabilities of all experts
    are combined after the softmax (``map @ softmax(z)``, negative results cut to 0), or logits
    before it. Among equals the expert of lower index comes first. All in float32.

    Limit: memory. T E w bytes of logits in, T k 12 bytes out, in one launch for any number of
    masks; a map adds 2 E' E operations per token.

    Args:
        logits: (T, E) contiguous; float32, float16 or bfloat16; E <= 512.
        k: how many experts a token gets, 1 to 32.
        masks: (M, E) bool, True = the expert is there. An expert of a row at least.
        maps: (M, E', E) float32; not together with masks.
        mapped: what maps are applied to.
        rows: (T,) int64, which mask or map a token takes; None = the first for all.
        renormalise: divide the k weights by their sum.

    Returns:
        weights (T, k) float32 and indices (T, k) int64, greatest first.

    Raises:
        ValueError: shapes, types or numbers that do not fit.
    """
    _check(logits, k, masks, maps, mapped, rows)
    mask = None if masks is None else masks.to(torch.uint8).contiguous()
    table = None if maps is None else maps.to(torch.float32).contiguous()
    out = torch.ops.searchlab.route_topk(
        logits.contiguous(), k, mask, table, mapped == "logits", rows, renormalise
    )
    return out[0], out[1]


def route_topk_reference(
    logits: Tensor,
    k: int,
    *,
    masks: Tensor | None = None,
    maps: Tensor | None = None,
    mapped: Literal["probabilities", "logits"] = "probabilities",
    rows: Tensor | None = None,
    renormalise: bool = True,
) -> tuple[Tensor, Tensor]:
    """The same, token by token."""
    weights, indices = [], []
    for t, z in enumerate(logits.float()):
        row = 0 if rows is None else int(rows[t])
        if masks is not None:
            z = torch.where(masks[row].bool(), z, -torch.inf)
        if maps is not None and mapped == "logits":
            z = maps[row].float() @ z
        share = torch.softmax(z, 0)
        if maps is not None and mapped == "probabilities":
            share = (maps[row].float() @ share).clamp(min=0)
        value, index = torch.sort(share, descending=True, stable=True)
        value = value[:k]
        weights.append(value / value.sum().clamp(min=FLOOR) if renormalise else value)
        indices.append(index[:k])
    empty = logits.new_empty(0, k)
    if not weights:
        return empty.float(), empty.long()
    return torch.stack(weights), torch.stack(indices)


def _check(
    logits: Tensor,
    k: int,
    masks: Tensor | None,
    maps: Tensor | None,
    mapped: str,
    rows: Tensor | None,
) -> None:
    if logits.ndim != 2 or logits.dtype not in STORAGE or not 1 <= logits.shape[1] <= MAX_EXPERTS:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)}, {logits.dtype}; needed: (T, E), E from 1 to "
            f"{MAX_EXPERTS}, float32, float16 or bfloat16"
        )
    experts = logits.shape[1]
    if masks is not None and maps is not None:
        raise ValueError("masks and maps together; allowed: one of them")
    if masks is not None and (masks.ndim != 2 or masks.shape[1] != experts or not len(masks)):
        raise ValueError(f"masks of shape {tuple(masks.shape)}; needed: (M, {experts}), M >= 1")
    if maps is not None and (
        maps.ndim != 3
        or maps.shape[2] != experts
        or not maps.shape[0]
        or maps.shape[1] > MAX_EXPERTS
    ):
        raise ValueError(
            f"maps of shape {tuple(maps.shape)}; needed: (M, E', {experts}), E' <= {MAX_EXPERTS}"
        )
    if mapped not in ("probabilities", "logits"):
        raise ValueError(f"mapped {mapped!r}; allowed: probabilities, logits")
    width = experts if maps is None else maps.shape[1]
    if not 1 <= k <= min(width, MAX_TOP):
        raise ValueError(f"k {k}; allowed: 1 to {min(width, MAX_TOP)}")
    if rows is not None and (rows.shape != logits.shape[:1] or rows.dtype != torch.int64):
        raise ValueError(
            f"rows of shape {tuple(rows.shape)}, {rows.dtype}; needed: ({len(logits)},), int64"
        )


def _plain(
    logits: Tensor,
    k: int,
    masks: Tensor | None,
    maps: Tensor | None,
    map_logits: bool,
    rows: Tensor | None,
    renormalise: bool,
) -> tuple[Tensor, Tensor]:
    z = logits.float()
    if masks is not None:
        mask = masks[0] if rows is None else masks[rows]
        z = torch.where(mask.bool(), z, -torch.inf)
    if maps is None:
        share = torch.softmax(z, -1)
    else:
        share = _mapped(z, maps, rows) if map_logits else torch.softmax(z, -1)
        share = torch.softmax(share, -1) if map_logits else _mapped(share, maps, rows).clamp(min=0)
    value, index = torch.sort(share, dim=-1, descending=True, stable=True)
    value, index = value[:, :k].contiguous(), index[:, :k].contiguous()
    if renormalise:
        value = value / value.sum(-1, keepdim=True).clamp(min=FLOOR)
    return value, index


def _mapped(values: Tensor, maps: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return values @ maps[0].T
    return torch.einsum("tij,tj->ti", maps[rows], values)


def _cuda(
    logits: Tensor,
    k: int,
    masks: Tensor | None,
    maps: Tensor | None,
    map_logits: bool,
    rows: Tensor | None,
    renormalise: bool,
) -> tuple[Tensor, Tensor]:
    there = [x for x in (logits, masks, maps, rows) if x is not None]
    kernels = library.load() if library.serves(*there) else None
    if kernels is None:
        return _plain(logits, k, masks, maps, map_logits, rows, renormalise)
    weights = torch.empty(len(logits), k, dtype=torch.float32, device=logits.device)
    indices = torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    with torch.cuda.device(logits.device):
        kernels.call(
            "sl_route_topk",
            logits.data_ptr(),
            STORAGE[logits.dtype],
            *logits.shape,
            None if masks is None else masks.data_ptr(),
            None if maps is None else maps.data_ptr(),
            0 if maps is None else maps.shape[1],
            int(map_logits),
            None if rows is None else rows.data_ptr(),
            k,
            int(renormalise),
            weights.data_ptr(),
            indices.data_ptr(),
            library.stream_of(logits),
        )
    return weights, indices


def _fake(
    logits: Tensor,
    k: int,
    masks: Tensor | None,
    maps: Tensor | None,
    map_logits: bool,
    rows: Tensor | None,
    renormalise: bool,
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.int64),
    )


register(
    "route_topk(Tensor logits, SymInt k, Tensor? masks, Tensor? maps, bool map_logits, "
    "Tensor? rows, bool renormalise) -> (Tensor, Tensor)",
    cpu=_plain,
    cuda=_cuda,
    fake=_fake,
)
