"""Weighted sums of many tensors at once: what mixing checkpoints or experts comes down to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from searchlab.cuda_ext import library
from searchlab.cuda_ext._registration import STORAGE, numbers, pointers, register

__all__ = ["merge_experts", "weighted_sum", "weighted_sum_reference"]

CHUNK = 16_384  # columns: a chunk of 50 sources in float32 stays in the second-level cache
TENSOR_CORES_FROM = 9  # results: for fewer, plain multiply-adds already wait for memory


def weighted_sum(
    sources: Sequence[Tensor] | Tensor,
    coefficients: Tensor,
    outputs: Sequence[Tensor] | Tensor | None = None,
    *,
    base: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | Sequence[Tensor]:
    """``outputs[p] = base + sum over k of coefficients[p, k] * sources[k]``, all p from one read.

    Sources are widened to float32, multiplied and added there, and rounded once at the end.
    A source is not looked at where its coefficient is exactly 0, so NaN in it does not spread.
    A row with a single coefficient, of value 1, copies the bits of that source (where types agree
    and there is no base).

    Limit: memory. It moves K D w bytes of sources once for every 8 results (32 by tensor cores,
    which take coefficients in three parts that hold 24 bits) plus P D w' of results, for 2 P K D
    operations.

    Args:
        sources: K contiguous tensors of D elements each, or one (K, D) whose rows are contiguous;
            float32, float16 or bfloat16, one type, one device.
        coefficients: (P, K), any floating type, any device; used as float32.
        outputs: P contiguous tensors of D elements or one (P, D), written in place; None = new.
        base: D elements, float32, added to every result.
        dtype: of new outputs: float32 (the default) or the sources' type.

    Returns:
        `outputs`, or a new (P, D).

    Raises:
        ValueError: shapes, types or devices that do not fit, P or K of zero.
    """
    rows = list(sources.unbind(0)) if isinstance(sources, Tensor) else list(sources)
    _check_sources(rows)
    count = rows[0].numel()
    if coefficients.ndim != 2 or coefficients.shape[1] != len(rows) or not len(coefficients):
        raise ValueError(
            f"coefficients of shape {tuple(coefficients.shape)}; needed: (P, {len(rows)}), P >= 1"
        )
    made: Tensor | Sequence[Tensor]
    if outputs is None:
        kind = torch.float32 if dtype is None else dtype
        made = torch.empty(len(coefficients), count, dtype=kind, device=rows[0].device)
    else:
        made = outputs
    results = list(made.unbind(0)) if isinstance(made, Tensor) else list(made)
    _check_outputs(results, rows, len(coefficients))
    if base is not None and (
        base.numel() != count or base.dtype != torch.float32 or base.device != rows[0].device
    ):
        raise ValueError(
            f"base of {base.numel()} elements, {base.dtype}, on {base.device}; needed: {count}, "
            f"torch.float32, on {rows[0].device}"
        )
    table = coefficients.detach().to(device=rows[0].device, dtype=torch.float32).contiguous()
    flat = None if base is None else base.reshape(-1).contiguous()
    torch.ops.searchlab.weighted_sum(
        [row.view(-1) for row in rows], table, flat, [result.view(-1) for result in results]
    )
    return made


def merge_experts(matrix: Tensor, experts: Tensor, output: Tensor | None = None) -> Tensor:
    """Merges experts into fewer: ``output[i] = sum over j of matrix[i, j] * experts[j]``.

    The sums of `weighted_sum`: every expert is read once, rows of `matrix` with a single 1 are
    bitwise copies, experts whose coefficients are all 0 are never read.

    Args:
        matrix: (E', E), any floating type.
        experts: (E, ...) contiguous, float32, float16 or bfloat16.
        output: (E', ...) contiguous, the experts' type, written in place; None = a new one.

    Returns:
        (E', ...) in the experts' type.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    if experts.ndim < 2 or not experts.is_contiguous():
        raise ValueError(f"experts of shape {tuple(experts.shape)}; needed: (E, ...), contiguous")
    shape = (len(matrix), *experts.shape[1:])
    made = experts.new_empty(shape) if output is None else output
    if made.shape != shape or made.dtype != experts.dtype:
        raise ValueError(
            f"output of shape {tuple(made.shape)}, {made.dtype}; needed: {shape}, {experts.dtype}"
        )
    weighted_sum(experts.flatten(1), matrix, list(made.flatten(1).unbind(0)))
    return made


def weighted_sum_reference(
    sources: Sequence[Tensor], coefficients: Tensor, base: Tensor | None = None
) -> Tensor:
    """The sums in float64, one product after the other: slow and obvious; (P, D) float64."""
    out = []
    for row in coefficients.to("cpu", torch.float64).tolist():
        total = torch.zeros(sources[0].numel(), dtype=torch.float64, device=sources[0].device)
        if base is not None:
            total += base.reshape(-1)
        for weight, source in zip(row, sources, strict=True):
            if weight:
                total += weight * source.reshape(-1).double()
        out.append(total)
    return torch.stack(out)


def _check_sources(rows: list[Tensor]) -> None:
    if not rows:
        raise ValueError("no sources; needed: at least 1")
    first = rows[0]
    if first.dtype not in STORAGE:
        raise ValueError(f"sources of {first.dtype}; allowed: float32, float16, bfloat16")
    for k, row in enumerate(rows):
        if row.dtype != first.dtype or row.device != first.device:
            raise ValueError(
                f"source {k} is {row.dtype} on {row.device}, source 0 {first.dtype} on "
                f"{first.device}; needed: one type, one device"
            )
        if row.numel() != first.numel() or not row.is_contiguous():
            raise ValueError(
                f"source {k} has {row.numel()} elements"
                f"{'' if row.is_contiguous() else ', not contiguous'}; needed: {first.numel()}, "
                "contiguous"
            )


def _check_outputs(results: list[Tensor], rows: list[Tensor], count: int) -> None:
    first = rows[0]
    if len(results) != count:
        raise ValueError(f"{len(results)} outputs for {count} rows of coefficients")
    for p, result in enumerate(results):
        if result.numel() != first.numel() or not result.is_contiguous():
            raise ValueError(
                f"output {p} has {result.numel()} elements or gaps; needed: "
                f"{first.numel()}, contiguous"
            )
        if result.device != first.device or result.dtype not in (torch.float32, first.dtype):
            raise ValueError(
                f"output {p} is {result.dtype} on {result.device}; allowed: float32 or "
                f"{first.dtype}, on {first.device}"
            )
        if result.dtype != results[0].dtype:
            raise ValueError(f"output {p} is {result.dtype}, output 0 {results[0].dtype}")


# -- CPU ----------------------------------------------------------------------------------------


def _cpu(
    sources: list[Tensor], coefficients: Tensor, base: Tensor | None, outputs: list[Tensor]
) -> None:
    table = coefficients.tolist()
    mixed = []
    for p, row in enumerate(table):
        used = [k for k, weight in enumerate(row) if weight]
        same = outputs[p].dtype == sources[0].dtype
        if len(used) == 1 and row[used[0]] == 1.0 and base is None and same:
            outputs[p].copy_(sources[used[0]])
        elif not used and base is None:
            outputs[p].zero_()
        else:
            mixed.append(p)
    # Rows that leave out the same sources go together: a zero must not meet a NaN.
    groups: dict[tuple[int, ...], list[int]] = {}
    for p in mixed:
        groups.setdefault(tuple(k for k, w in enumerate(table[p]) if w), []).append(p)
    if len(groups) > 1 and _finite(sources):
        every = tuple(sorted({k for chosen in groups for k in chosen}))
        groups = {every: mixed}
    for chosen, members in groups.items():
        _sums(
            [sources[k] for k in chosen],
            coefficients[members][:, list(chosen)],
            base,
            [outputs[p] for p in members],
        )


def _finite(sources: list[Tensor]) -> bool:
    """Whether no source holds infinities or NaN; the sum of a source shows it in one read."""
    return all(bool(torch.isfinite(source.sum(dtype=torch.float32))) for source in sources)


def _sums(sources: list[Tensor], table: Tensor, base: Tensor | None, outputs: list[Tensor]) -> None:
    if not sources:  # nothing but the base
        for output in outputs:
            output.copy_(base)  # type: ignore[arg-type]
        return
    matrix = _as_matrix(sources)
    count = sources[0].numel()
    whole = sources[0].dtype == torch.float32 and matrix is not None
    single = len(outputs) == 1 and outputs[0].dtype == torch.float32
    if whole and single and base is None:
        torch.mv(matrix.T, table[0], out=outputs[0])  # type: ignore[union-attr]
        return
    if sources[0].dtype == torch.float32 and single:
        _one_by_one(sources, table[0], base, outputs[0])
        return
    width = min(CHUNK, count)
    scratch = torch.empty(len(sources), width)
    result = torch.empty(len(outputs), width)
    for start in range(0, count, width):
        stop = min(start + width, count)
        size = stop - start
        if whole:
            block = matrix[:, start:stop]  # type: ignore[index]
        else:
            block = scratch[:, :size]
            if matrix is not None:
                block.copy_(matrix[:, start:stop])
            else:
                for k, source in enumerate(sources):
                    block[k] = source[start:stop]
        out = result[:, :size]
        if len(outputs) == 1:
            torch.mv(block.T, table[0], out=out[0])
        else:
            torch.mm(table, block, out=out)
        if base is not None:
            out += base[start:stop]
        for p, output in enumerate(outputs):
            output[start:stop] = out[p]


def _one_by_one(
    sources: list[Tensor], weights: Tensor, base: Tensor | None, output: Tensor
) -> None:
    """One result of scattered sources: gathering them would cost more than adding them."""
    for start in range(0, output.numel(), 4 * CHUNK):
        piece = slice(start, start + 4 * CHUNK)
        out = output[piece]
        if base is None:
            torch.mul(sources[0][piece], float(weights[0]), out=out)
        else:
            torch.add(base[piece], sources[0][piece], alpha=float(weights[0]), out=out)
        for source, weight in zip(sources[1:], weights[1:].tolist(), strict=True):
            out.add_(source[piece], alpha=weight)


def _as_matrix(sources: list[Tensor]) -> Tensor | None:
    """The sources as rows of one matrix where they lie at equal distances; None = they do not."""
    count = sources[0].numel()
    if len(sources) == 1:
        return sources[0].view(1, count)
    storage = sources[0].untyped_storage().data_ptr()
    if any(source.untyped_storage().data_ptr() != storage for source in sources):
        return None
    offsets = [source.storage_offset() for source in sources]
    step = offsets[1] - offsets[0]
    if step < count or any(b - a != step for a, b in itertools.pairwise(offsets)):
        return None
    return sources[0].as_strided((len(sources), count), (step, 1))


# -- CUDA ---------------------------------------------------------------------------------------


def _cuda(
    sources: list[Tensor], coefficients: Tensor, base: Tensor | None, outputs: list[Tensor]
) -> None:
    kernels = library.load() if library.serves(*sources, *outputs) else None
    if kernels is None:
        _torch_on_gpu(sources, coefficients, base, outputs)
        return
    if not sources[0].numel():
        return
    most = library.MAX_SOURCES
    if len(sources) > most:
        # The addresses of one launch are full: what was summed so far is the base of the next.
        part = [torch.empty_like(o, dtype=torch.float32) for o in outputs]
        for p, output in enumerate(outputs):
            row, sofar = coefficients[p : p + 1], base
            for first in range(0, len(sources), most):
                last = first + most >= len(sources)
                to = output if last else part[p]
                _cuda(
                    sources[first : first + most],
                    row[:, first : first + most].contiguous(),
                    sofar,
                    [to],
                )
                sofar = part[p]
        return
    with torch.cuda.device(sources[0].device):
        kernels.call(
            "sl_weighted_sum",
            pointers(sources),
            len(sources),
            coefficients.data_ptr(),
            pointers(outputs),
            len(outputs),
            None if base is None else base.data_ptr(),
            sources[0].numel(),
            numbers(sources)[0],
            numbers(outputs)[0],
            int(len(outputs) >= TENSOR_CORES_FROM),
            library.stream_of(sources[0]),
        )


def _torch_on_gpu(
    sources: list[Tensor], coefficients: Tensor, base: Tensor | None, outputs: list[Tensor]
) -> None:
    for p, row in enumerate(coefficients.tolist()):
        used = [k for k, weight in enumerate(row) if weight]
        if len(used) == 1 and row[used[0]] == 1.0 and base is None:
            outputs[p].copy_(sources[used[0]])
            continue
        total = torch.zeros_like(outputs[p], dtype=torch.float32)
        if base is not None:
            total += base
        for k in used:
            total.add_(sources[k].float(), alpha=row[k])
        outputs[p].copy_(total)


def _fake(
    sources: list[Tensor], coefficients: Tensor, base: Tensor | None, outputs: list[Tensor]
) -> None:
    return None


register(
    "weighted_sum(Tensor[] sources, Tensor coefficients, Tensor? base, Tensor(a!)[] outputs) -> ()",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
