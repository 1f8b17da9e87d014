"""Mixing: weighted sums of the checkpoints of a bank, for a whole population from one read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.cuda_ext.weighted_sum import weighted_sum
from searchlab.errors import DataError, SpaceError
from searchlab.spaces.checkpoint_mix.bank import CheckpointBank
from searchlab.spaces.checkpoint_mix.layout import Segment

__all__ = ["convex", "merge", "move", "states"]

Array = NDArray[np.float64]

# Products of matrices with fewer rows take another kernel, which rounds in another way. Padding to
# this many rows makes a candidate's weights independent of how many are mixed along with it.
LEAST_ROWS = 4

# Rows further apart than this are beyond the integers of the matrix library, whose place a slow
# loop then takes: they are filled from a small product.
FARTHEST = 2**31 - 1


def merge(
    bank: CheckpointBank,
    coefficients: NDArray[Any],
    *,
    segments: Sequence[Sequence[Segment]] | None = None,
    alone: bool = False,
) -> list[Tensor]:
    """Weights of P candidates from one pass over the bank.

    Products and sums are in float32 (float64 where checkpoints are), whatever the stored dtype; the
    coefficients are rounded to that once. A one-hot row is the checkpoint, bit for bit. Rows
    do not depend on each other.

    Args:
        bank: K checkpoints.
        coefficients: (P, K), or (P, G, K) with segments of G groups; P and G at least 1.
        segments: per block, which group mixes what (see `Layout.segments`); None = one group.
        alone: for P up to 3: skip the padding to 4 rows, which is faster by up to that factor; the
            last bit may then differ from what the search scored.

    Returns:
        Per block of the layout, (P, size) float32 or float64.

    Raises:
        SpaceError: another shape, or coefficients that are not finite.
        DataError: a coefficient other than zero on a checkpoint that is not finite.
    """
    table = _checked(bank, coefficients, segments)
    single = _one_hot(table)
    for k, text in bank.broken.items():
        if ((table[:, :, k] != 0).any(axis=1) & (single < 0)).any():
            raise DataError(f"{text}; allowed: checkpoints whose values are finite")
    if segments is None:
        segments = [[Segment(0, block.size, 0)] for block in bank.layout.blocks]
    outputs = [_merge_block(bank, b, table, segments[b], alone) for b in range(len(segments))]
    for p in np.flatnonzero(single >= 0).tolist():
        for b, out in enumerate(outputs):
            out[p] = bank.row(int(single[p]), b).to(out.dtype)
    return outputs


def _checked(
    bank: CheckpointBank, coefficients: NDArray[Any], segments: Sequence[Sequence[Segment]] | None
) -> Array:
    table = np.asarray(coefficients, dtype=np.float64)
    if table.ndim == 2:
        table = table[:, None]
    groups = 1 if segments is None else 1 + max(s.group for part in segments for s in part)
    if table.ndim != 3 or not len(table) or table.shape[1] < groups or table.shape[2] != len(bank):
        raise SpaceError(
            f"coefficients of shape {np.shape(coefficients)}; allowed: (P, {len(bank)}) or "
            f"(P, {groups}, {len(bank)}) with P of 1 or more"
        )
    if not np.isfinite(table).all():
        raise SpaceError("coefficients that are not finite; allowed: numbers")
    return table


def _one_hot(table: Array) -> NDArray[np.int64]:
    """The checkpoint that a candidate is, (P,); -1 = a mix."""
    place = table[:, 0].argmax(axis=1)
    pure = np.zeros_like(table)
    pure[np.arange(len(table)), :, place] = 1.0
    return np.where((table == pure).all(axis=(1, 2)), place, -1)


def _merge_block(
    bank: CheckpointBank, block: int, table: Array, segments: Sequence[Segment], alone: bool
) -> Tensor:
    if bank.device is not None:
        return _merge_on_device(bank, block, table, segments)
    p, _, k = table.shape
    size, width = bank.layout.blocks[block].size, bank.width_of(block)
    wide = torch.float64 if bank.layout.blocks[block].dtype is torch.float64 else torch.float32
    rows = p if alone and p < LEAST_ROWS else max(p, LEAST_ROWS)
    padded = np.zeros((rows, table.shape[1], k))
    padded[:p] = table
    if bank.delta is not None:
        padded[:, :, -1] = 0.0  # the newest is the base, and differs from it by nothing
    weights = torch.from_numpy(np.ascontiguousarray(padded.transpose(1, 0, 2))).to(wide)
    out = bank.pool.take((p, size), wide)
    part = torch.empty((rows, width), dtype=wide)  # where rows are padded
    room = torch.empty((k, width), dtype=wide)
    same = bank.dtype_of(block) is wide
    direct = rows == p and size <= FARTHEST
    at = 0
    for number, tile in bank.walk(block):
        first = number * width
        values = tile if same else room.copy_(tile)
        last = min(first + width, size)
        while segments[at].end <= first:
            at += 1
        for segment in segments[at:]:
            if segment.start >= last:
                break
            low, high = max(first, segment.start), min(last, segment.end)
            columns = values[:, low - first : high - first]
            to = out[:, low:high] if direct else part[:, : high - low]
            torch.mm(weights[segment.group], columns, out=to)
            if not direct:
                out[:, low:high] = to[:p]
    base = bank.base(block)
    if base is not None:
        for segment in segments:
            total = torch.from_numpy(table[:, segment.group].sum(axis=1)).to(wide)
            stretch = slice(segment.start, segment.end)
            out[:, stretch] += total[:, None] * base[stretch]
    return out


def _merge_on_device(
    bank: CheckpointBank, block: int, table: Array, segments: Sequence[Segment]
) -> Tensor:
    """All candidates from one read of the rows by the fused kernel, (P, size) on the device."""
    rows, base = bank.rows_on_device(block), bank.base(block)
    weights = torch.from_numpy(np.ascontiguousarray(table.transpose(1, 0, 2)))
    if bank.delta is not None:
        weights = weights.clone()
        weights[:, :, -1] = 0.0  # the newest is the base
        if not (weights != 0).any():
            assert base is not None
            return base.repeat(len(table), 1)
    out = torch.empty((len(table), rows.shape[1]), dtype=torch.float32, device=rows.device)
    for segment in segments:
        part = slice(segment.start, segment.end)
        weighted_sum(
            [row[part] for row in rows],
            weights[segment.group],
            [row[part] for row in out],
            base=None if base is None else base[part],
        )
    return out


def states(
    bank: CheckpointBank,
    coefficients: NDArray[Any],
    *,
    segments: Sequence[Sequence[Segment]] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[dict[str, Tensor]]:
    """State dicts of P candidates, one after another, in passes that keep the bank's memory plan.

    Every name of the checkpoints is there. Mixed tensors are rounded once, to the dtype that the
    checkpoints store or to `dtype`; tied ones are one tensor; equal ones come from the newest
    checkpoint, integer ones from the newest with a coefficient other than zero.

    Args:
        bank, coefficients, segments: see `merge`.
        dtype: of the mixed tensors; None = as stored.
    """
    table = _checked(bank, coefficients, segments)
    step = bank.plan.candidates
    for first in range(0, len(table), step):
        part = table[first : first + step]
        merged = merge(bank, part, segments=segments)
        for row in range(len(part)):
            yield _state(bank, part[row], [out[row] for out in merged], dtype)


def _state(
    bank: CheckpointBank, coefficients: Array, rows: Sequence[Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    layout = bank.layout
    found: dict[str, Tensor] = {}
    for block, row in zip(layout.blocks, rows, strict=True):
        for place in block.places:
            value = row[place.start : place.start + place.count].view(place.shape)
            found[place.name] = value.to(dtype or block.dtype)
    used = np.flatnonzero((coefficients != 0).any(axis=0))
    newest = int(used[-1]) if len(used) else len(bank) - 1
    for name in layout.constant:
        found[name] = bank.sources[-1].tensor(name)
        if dtype is not None and found[name].is_floating_point():
            found[name] = found[name].to(dtype)
    for name in layout.counted:
        found[name] = bank.sources[newest].tensor(name)
    for name, other in layout.tied.items():
        found[name] = found[other]
    return {name: found[name] for name in layout.order}


def convex(a: Tensor, b: Tensor, share: float) -> Tensor:
    """share a + (1 - share) b: the weights of a convex crossover from those of its parents.

    Mixing is linear, so this equals a merge of the mixed coefficients but for rounding: two reads
    instead of K.

    Args:
        a, b: (size,) merged weights, float32 or float64.
        share: any number.
    """
    return torch.lerp(b, a, share)


def move(
    bank: CheckpointBank,
    weights: Sequence[Tensor],
    change: NDArray[Any],
    *,
    total: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Merged weights after a change of few coefficients: w + sum over k of change_k checkpoint_k.

    With `total` (the sum of all checkpoints, a merge of ones) a part of the change that is the same
    for all costs one more row instead of K: what repairing the sum to one does. Rounding adds up:
    merge anew every 32 moves or so.

    Args:
        bank: K checkpoints.
        weights: per block (size,), as merged.
        change: (K,).
        total: per block (size,).

    Returns:
        Per block, (size,).
    """
    change = np.asarray(change, dtype=np.float64)
    if change.shape != (len(bank),):
        raise SpaceError(f"change of shape {change.shape}; allowed: ({len(bank)},)")
    level = 0.0
    if total is not None:
        values, counts = np.unique(change, return_counts=True)
        level = float(values[counts.argmax()])
    rest = change - level
    out = []
    for b, held in enumerate(weights):
        moved = held.clone()
        if level and total is not None:
            moved.add_(total[b], alpha=level)
        for k in np.flatnonzero(rest).tolist():
            if k in bank.broken:
                raise DataError(f"{bank.broken[k]}; allowed: checkpoints whose values are finite")
            moved.add_(bank.row(k, b).to(moved.dtype), alpha=float(rest[k]))
        out.append(moved)
    return out
