"""The tensors of a checkpoint with merged experts, computed from files, one kind at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.cuda_ext import merge_experts
from searchlab.errors import ConfigError, DataError
from searchlab.spaces.experts.export import Written, cut_tensors
from searchlab.spaces.experts.files import ExpertFiles, StoredTensor
from searchlab.spaces.experts.model import one_hot
from searchlab.spaces.experts.plan import ExpertPlan

__all__ = ["merged_tensors"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def merged_tensors(files: ExpertFiles, plan: ExpertPlan) -> list[Written]:
    """Weighted sums of experts, as `ResidentExperts.merged` makes them.

    Of one layer, the experts' tensors of one kind are in memory at a time. The router gets the rows
    that the plan names ("slice"), or sums of rows ("logit").

    Raises:
        ConfigError: experts that are no plain floating numbers.
    """
    merge = dict(zip(plan.blocks, plan.matrices("merge"), strict=True))
    if plan.router_mode == "slice":
        route = {layer: one_hot(table) for layer, table in merge.items()}
    else:
        route = dict(zip(plan.blocks, plan.matrices("route"), strict=True))
    wanted: dict[tuple[int, str], list[StoredTensor]] = {}
    for tensor in files.tensors.values():
        if tensor.kind in ("expert", "stacked", "router") and tensor.dtype not in _DTYPES:
            raise ConfigError(
                f"tensor {tensor.name!r} is {tensor.dtype}: merging needs plain weights; allowed: "
                "pruning, or --dequantize bf16 first"
            )
        if tensor.kind == "expert":
            wanted.setdefault((tensor.layer, tensor.part), []).append(tensor)

    @lru_cache(maxsize=1)  # experts of one kind follow each other, or are read again
    def summed(layer: int, part: str) -> Tensor:
        sources = sorted(wanted[layer, part], key=lambda tensor: tensor.expert)
        stack = torch.stack([_read(tensor) for tensor in sources])
        return merge_experts(torch.from_numpy(merge[layer]), stack)

    def stacked(tensor: StoredTensor, table: NDArray[np.float64]) -> Callable[[], Tensor]:
        return lambda: _weighted(_read(tensor), table)

    def one(layer: int, part: str, row: int) -> Callable[[], Tensor]:
        return lambda: summed(layer, part)[row]

    others = [t for t in files.tensors.values() if t.kind == "other"]
    out = _others(files, plan, others)
    for (layer, part), sources in wanted.items():
        for row in range(len(merge[layer])):
            name = f"{sources[0].prefix}{row}.{part}"
            out.append(_computed(sources[0], name, sources[0].shape, one(layer, part, row)))
    for tensor in files.tensors.values():
        if tensor.kind in ("stacked", "router"):
            table = (merge if tensor.kind == "stacked" else route)[tensor.layer]
            shape = (len(table), *tensor.shape[1:])
            out.append(_computed(tensor, tensor.name, shape, stacked(tensor, table)))
    return out


def _others(files: ExpertFiles, plan: ExpertPlan, tensors: list[StoredTensor]) -> list[Written]:
    names = {tensor.name for tensor in tensors}
    slots = {layer: [(expert, True) for expert in range(plan.experts)] for layer in plan.blocks}
    return [written for written in cut_tensors(files, plan, slots) if written.name in names]


def _weighted(stack: Tensor, table: NDArray[np.float64]) -> Tensor:
    matrix = torch.from_numpy(table)
    flat = stack.reshape(len(stack), -1).contiguous()
    return merge_experts(matrix, flat).reshape(len(table), *stack.shape[1:])


def _computed(
    like: StoredTensor, name: str, shape: tuple[int, ...], make: Callable[[], Tensor]
) -> Written:
    def parts() -> Iterator[memoryview]:
        value: Any = make().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield memoryview(value)

    count = int(np.prod(shape, dtype=np.int64))
    return Written(name, like.dtype, shape, count * _DTYPES[like.dtype].itemsize, parts)


def _read(tensor: StoredTensor) -> Tensor:
    with open(tensor.file, "rb") as stream:
        stream.seek(tensor.start)
        raw = bytearray(stream.read(tensor.size))
    if len(raw) != tensor.size:
        raise DataError(f"{str(tensor.file)!r} was cut off while it was read")
    return torch.frombuffer(raw, dtype=_DTYPES[tensor.dtype]).reshape(tensor.shape)
