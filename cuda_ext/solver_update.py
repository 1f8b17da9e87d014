"""The linear combinations of a multistep sampler's step, each with its own numbers per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from searchlab.cuda_ext import library
from searchlab.cuda_ext._registration import STORAGE, numbers, pointers, register

__all__ = ["MAX_INPUTS", "MAX_RESULTS", "solver_update", "solver_update_reference"]

MAX_INPUTS = 32
MAX_RESULTS = 4


def solver_update(
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
) -> list[Tensor]:
    """``out[o][b] = sum over j of coefficients[b, o, j] * inputs[j][b]``, all o from one read.

    The state, the model's output (conditional and unconditional) and earlier outputs are inputs.
    Conversion between prediction types and guidance are linear in them, so they are part of the
    coefficients, and the next state and the converted output are two results of one pass.

    On a GPU: products and sums in float32, one rounding at the end, inputs of coefficient 0 not
    looked at. On the CPU each product and each sum is rounded apart, in the order of the inputs.

    Limit: memory. (J w + O w') N bytes for 2 O J N operations; N = B times elements of a sample.

    Args:
        inputs: J <= 32 contiguous tensors (B, ...) of one shape on one device; float32, float16 or
            bfloat16 each (float64 on the CPU).
        coefficients: (B, O, J) or (O, J) for all samples alike; O <= 4; used as float32 on a GPU.
        dtypes: of the results; default: all as the first input.

    Returns:
        O tensors (B, ...).

    Raises:
        ValueError: shapes, types or numbers that do not fit.
    """
    _check(inputs, coefficients)
    first = inputs[0]
    table = coefficients.detach()
    if table.ndim == 2:
        table = table.expand(len(first), *table.shape)
    kinds = [first.dtype] * table.shape[1] if dtypes is None else list(dtypes)
    if len(kinds) != table.shape[1]:
        raise ValueError(f"{len(kinds)} dtypes for {table.shape[1]} results")
    results = [torch.empty_like(first, dtype=kind) for kind in kinds]
    kept = torch.float64 if first.dtype == torch.float64 else torch.float32
    table = table.to(device=first.device, dtype=kept).contiguous()
    torch.ops.searchlab.solver_update(list(inputs), table, results)
    return results


def solver_update_reference(inputs: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """The same by one einsum in float64: (O, B, ...)."""
    stacked = torch.stack([x.double() for x in inputs])
    table = coefficients.double().to(stacked.device)
    if table.ndim == 2:
        table = table.expand(stacked.shape[1], *table.shape)
    return torch.einsum("boj,jb...->ob...", table, stacked)


def _check(inputs: Sequence[Tensor], coefficients: Tensor) -> None:
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise ValueError(f"{len(inputs)} inputs; allowed: 1 to {MAX_INPUTS}")
    first = inputs[0]
    for j, x in enumerate(inputs):
        if x.shape != first.shape or x.device != first.device or not x.is_contiguous():
            raise ValueError(
                f"input {j} is {tuple(x.shape)} on {x.device}; needed: {tuple(first.shape)} on "
                f"{first.device}, contiguous"
            )
        if x.dtype not in STORAGE and not (x.dtype == torch.float64 and x.device.type == "cpu"):
            raise ValueError(f"input {j} of {x.dtype}; allowed: float32, float16, bfloat16")
    shape = tuple(coefficients.shape)
    fits = coefficients.ndim in (2, 3) and shape[-1] == len(inputs)
    if not fits or not 1 <= shape[-2] <= MAX_RESULTS or first.ndim == 0:
        raise ValueError(
            f"coefficients of shape {shape}; needed: ([B,] O, {len(inputs)}), O from 1 to "
            f"{MAX_RESULTS}"
        )
    if coefficients.ndim == 3 and shape[0] != len(first):
        raise ValueError(f"coefficients for {shape[0]} samples; there are {len(first)}")


def _plain(inputs: list[Tensor], coefficients: Tensor, outputs: list[Tensor]) -> None:
    kept = coefficients.dtype
    sample = (-1, *([1] * (inputs[0].ndim - 1)))
    for o, output in enumerate(outputs):
        total: Tensor | None = None
        for j, x in enumerate(inputs):
            weight = coefficients[:, o, j]
            if not bool(weight.any()):
                continue
            product = weight.view(sample) * x.to(kept)
            if not bool(weight.all()):  # a zero must not meet a NaN
                product = torch.where(weight.view(sample) != 0, product, 0.0)
            # Product and sum are rounded apart: a fused multiply-add is used for whole vectors but
            # not for the tail, and the bits of a sample would depend on its place in the batch.
            total = product if total is None else total.add_(product)
        output.copy_(torch.zeros_like(output) if total is None else total)


def _cuda(inputs: list[Tensor], coefficients: Tensor, outputs: list[Tensor]) -> None:
    kernels = library.load() if library.serves(*inputs, *outputs) else None
    if kernels is None:
        _plain(inputs, coefficients, outputs)
        return
    batch = len(inputs[0])
    with torch.cuda.device(inputs[0].device):
        kernels.call(
            "sl_solver_update",
            pointers(inputs),
            numbers(inputs),
            len(inputs),
            coefficients.data_ptr(),
            pointers(outputs),
            numbers(outputs),
            len(outputs),
            batch,
            inputs[0].numel() // batch if batch else 0,
            library.stream_of(inputs[0]),
        )


def _fake(inputs: list[Tensor], coefficients: Tensor, outputs: list[Tensor]) -> None:
    return None


register(
    "solver_update(Tensor[] inputs, Tensor coefficients, Tensor(a!)[] outputs) -> ()",
    cpu=_plain,
    cuda=_cuda,
    fake=_fake,
)
