"""Plain weights of checkpoints that are stored in FP8 or MXFP4, written from files to files.

Weights of experts can only be summed as plain numbers. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchlab.errors import ConfigError, DataError
from searchlab.spaces.experts.export import Written, copy_beside, write_shards
from searchlab.spaces.experts.files import ExpertFiles, StoredTensor

__all__ = ["dequantise", "dequantised"]

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@contextmanager
def dequantised(files: ExpertFiles, dtype: str, beside: Path) -> Iterator[Path]:
    """A folder with plain weights of a model, for a while.

    Args:
        files: of the quantised model.
        dtype: "bf16".
        beside: the folder is made in the same place as this one, which has the room.

    Raises:
        ConfigError: as `dequantise`.
    """
    if dtype not in ("bf16", "bfloat16"):
        raise ConfigError(f"dequantize {dtype!r}; allowed: bf16")
    beside.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside.resolve().parent, prefix=".plain-") as folder:
        dequantise(files, Path(folder))
        yield Path(folder)


def dequantise(files: ExpertFiles, target: Path) -> list[Path]:
    """Writes a checkpoint with bfloat16 in place of quantised numbers.

    FP8: a number times the scale of its block (`weight_scale_inv`). MXFP4: two numbers a byte, the
    lower half first, times a power of two for every 32.

    Raises:
        ConfigError: another way of quantisation, or none.
        DataError: scales that do not fit.
    """
    settings = files.config.get("quantization_config") or {}
    method = files.shape.quantised
    if method not in ("fp8", "mxfp4"):
        raise ConfigError(
            f"--dequantize of {method or 'plain weights'!r}; allowed: fp8, mxfp4 (for others "
            "use the tool that made them)"
        )
    block = settings.get("weight_block_size")
    tensors = _of_fp8(files, block) if method == "fp8" else _of_mxfp4(files)
    paths = write_shards(tensors, target, limit=2 * files.largest_shard)
    plain = {key: value for key, value in files.config.items() if key != "quantization_config"}
    for key in ("dtype", "torch_dtype"):
        if key in plain:
            plain[key] = "bfloat16"
    (target / "config.json").write_text(json.dumps(plain, indent=2) + "\n", "utf-8")
    return [*paths, *copy_beside(files.directory, target)]


def _of_fp8(files: ExpertFiles, block: Any) -> list[Written]:
    out = []
    for name, tensor in files.tensors.items():
        if name.endswith((".weight_scale_inv", ".input_scale", ".activation_scale")):
            continue
        if tensor.dtype != "F8_E4M3":
            out.append(_same(tensor))
            continue
        scale = files.tensors.get(name + "_scale_inv")
        if scale is None or len(tensor.shape) != 2:
            raise DataError(f"tensor {name!r} has no {name + '_scale_inv'!r}, or is no matrix")
        out.append(_made(name, tensor.shape, _scaled(tensor, scale, block)))
    return out


def _scaled(tensor: StoredTensor, scale: StoredTensor, block: Any) -> Callable[[], Tensor]:
    rows, columns = tensor.shape
    if scale.shape and math.prod(scale.shape) > 1:
        if not (isinstance(block, list) and len(block) == 2 and all(b > 0 for b in block)):
            raise DataError(f"weight_block_size {block!r} in config.json; allowed: two sizes")
        wanted = (-(-rows // block[0]), -(-columns // block[1]))
        if scale.shape != wanted:
            raise DataError(f"tensor {scale.name!r} of shape {scale.shape}; allowed: {wanted}")

    def make() -> Tensor:
        weight, factor = _read(tensor).float(), _read(scale).float()
        if factor.numel() > 1:
            factor = factor.repeat_interleave(block[0], 0)[:rows]
            factor = factor.repeat_interleave(block[1], 1)[:, :columns]
        return (weight * factor).bfloat16()

    return make


def _of_mxfp4(files: ExpertFiles) -> list[Written]:
    out = []
    for name, tensor in files.tensors.items():
        if name.endswith("_scales"):
            continue
        if not name.endswith("_blocks"):
            out.append(_same(tensor))
            continue
        base = name.removesuffix("_blocks")
        scale = files.tensors.get(base + "_scales")
        if scale is None or scale.shape != tensor.shape[:3] or tensor.shape[3:] != (16,):
            raise DataError(f"tensor {name!r} of shape {tensor.shape} has no scales that fit")
        experts, rows, groups, _ = tensor.shape
        out.append(_made(base, (experts, groups * 32, rows), _unpacked(tensor, scale)))
    return out


def _unpacked(tensor: StoredTensor, scale: StoredTensor) -> Callable[[], Tensor]:
    def make() -> Tensor:
        table = torch.tensor([*_FP4, *(-value for value in _FP4)])
        blocks, powers = _read(tensor), _read(scale).int() - 127
        out = torch.empty(tensor.shape[0], tensor.shape[2] * 32, tensor.shape[1]).bfloat16()
        for expert, (block, power) in enumerate(
            zip(blocks.unbind(0), powers.unbind(0), strict=True)
        ):
            pairs = torch.stack([block & 15, block >> 4], dim=-1).int()
            numbers = torch.ldexp(table[pairs].flatten(2), power[..., None])
            out[expert] = numbers.flatten(1).T
        return out

    return make


def _same(tensor: StoredTensor) -> Written:
    def parts() -> Iterator[bytes]:
        yield _bytes(tensor)

    return Written(tensor.name, tensor.dtype, tensor.shape, tensor.size, parts)


def _made(name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Written:
    def parts() -> Iterator[memoryview]:
        value: Any = make().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield memoryview(value)

    return Written(name, "BF16", shape, 2 * math.prod(shape), parts)


def _bytes(tensor: StoredTensor) -> bytes:
    with open(tensor.file, "rb") as stream:
        stream.seek(tensor.start)
        return stream.read(tensor.size)


def _read(tensor: StoredTensor) -> Tensor:
    if tensor.dtype not in _DTYPES:
        raise DataError(f"tensor {tensor.name!r} is {tensor.dtype}; known: {', '.join(_DTYPES)}")
    raw = bytearray(_bytes(tensor))
    return torch.frombuffer(raw, dtype=_DTYPES[tensor.dtype]).reshape(tensor.shape)
