"""Checkpoints of mixture-of-experts models as files: what each tensor is, without loading any.

Tensors are bytes here. Whatever is stored per expert (weights, scales, zero points, packed blocks)
carries the expert in its name or in its first dimension, so that names decide and no number format
has to be known.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from searchlab.errors import DataError
from searchlab.spaces.experts.families import ExpertLayout, Family, family_of, layout_of

__all__ = ["ExpertFiles", "StoredTensor", "layout_of_files", "read_config"]

Kind = Literal["other", "expert", "stacked", "router", "extra"]
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
_BITS |= {"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}
_BITS |= {"F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: as stored.
        file: where.
        dtype: as the file says, such as "BF16".
        shape: as stored.
        start, end: byte range in the file.
        kind: "expert" (one expert's), "stacked" (all experts', one after the other), "router",
            "extra" (of layers after the last) or "other".
        layer: its layer number; -1 for "other".
        expert: its number, for "expert".
        part: what it is within its mixture, such as "gate_proj.weight".
        prefix: its name up to the experts, for "expert".
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    kind: Kind = "other"
    layer: int = -1
    expert: int = -1
    part: str = ""
    prefix: str = ""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a model's folder.

    Raises:
        DataError: there is none, or it is no JSON object.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"model {str(directory)!r} has no readable config.json: {reason}") from None
    if not isinstance(config, dict):
        raise DataError(f"{str(path)!r} holds no object")
    return config


class ExpertFiles:
    """The safetensors files of one model's folder.

    Args:
        directory: with config.json and model.safetensors, or shards and their index.
        family: of the model; None = as config.json says.

    Attributes:
        config: config.json.
        tensors: name -> tensor, in the order of the files.

    Raises:
        ConfigError: a model that is dense or of a family without a table.
        DataError: files that are missing, cut off, or that do not fit the configuration.
    """

    def __init__(self, directory: str | Path, family: Family | None = None) -> None:
        self.directory = Path(directory)
        self.config = read_config(directory)
        self.family = family_of(self.config) if family is None else family
        self.shape: ExpertLayout = layout_of(self.config, self.family)
        self.files = _weight_files(self.directory)
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            for tensor in _header(file):
                if tensor.name in self.tensors:
                    raise DataError(f"{str(file)!r} holds {tensor.name!r}, as another file does")
                self.tensors[tensor.name] = self._classified(tensor)
        self._check()

    def _classified(self, tensor: StoredTensor) -> StoredTensor:
        match = self._pattern.match(tensor.name)
        if match is None:
            return tensor
        layer = int(match["layer"])
        if layer >= self.shape.layers:
            return replace(tensor, kind="extra", layer=layer)
        rest = match["rest"] or ""
        if match["block"] is None or layer not in self.shape.blocks:
            return tensor
        for head, kind in ((self.family.experts, "expert"), (self.family.router, "router")):
            if not rest.startswith(head + "."):
                continue
            part = rest[len(head) + 1 :]
            number = re.match(r"(\d+)\.(.+)", part) if kind == "expert" else None
            if number:
                prefix = tensor.name[: len(tensor.name) - len(part)]
                return replace(
                    tensor,
                    kind="expert",
                    layer=layer,
                    expert=int(number[1]),
                    part=number[2],
                    prefix=prefix,
                )
            if tensor.shape[:1] == (self.shape.experts,):
                found: Kind = "stacked" if kind == "expert" else "router"
                return replace(tensor, kind=found, layer=layer, part=part)
            if math.prod(tensor.shape) > 1:
                raise DataError(
                    f"tensor {tensor.name!r} of shape {list(tensor.shape)} has no first dimension "
                    f"of {self.shape.experts} experts; allowed: one, or an expert in the name"
                )
        return tensor

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        layers = re.escape(self.family.layers.rsplit(".", 1)[-1])
        blocks = "|".join(map(re.escape, self.family.file_blocks))
        return re.compile(
            rf"(?:.*\.)?{layers}\.(?P<layer>\d+)\.(?:(?P<block>{blocks})\.(?P<rest>.+)|.+)$"
        )

    def _check(self) -> None:
        missing = [
            layer
            for layer in self.shape.blocks
            if layer not in self._stacked_layers and self._numbers(layer) != self._all
        ]
        if missing:
            raise DataError(
                f"model {str(self.directory)!r}: layer {missing[0]} stores experts "
                f"{sorted(self._numbers(missing[0]))[:3]}... in its files; config.json says "
                f"{self.shape.experts}"
            )

    @cached_property
    def _all(self) -> set[int]:
        return set(range(self.shape.experts))

    @cached_property
    def _stacked_layers(self) -> set[int]:
        return {t.layer for t in self.tensors.values() if t.kind == "stacked"}

    @cached_property
    def _by_layer(self) -> dict[int, set[int]]:
        out: dict[int, set[int]] = {}
        for tensor in self.tensors.values():
            if tensor.kind == "expert":
                out.setdefault(tensor.layer, set()).add(tensor.expert)
        return out

    def _numbers(self, layer: int) -> set[int]:
        return self._by_layer.get(layer, set())

    @cached_property
    def layout(self) -> ExpertLayout:
        """With bytes as they are stored; layers after the last do not count."""
        own = [t for t in self.tensors.values() if t.kind != "extra"]
        experts = sum(t.size for t in own if t.kind in ("expert", "stacked", "router"))
        count = len(self.shape.blocks) * self.shape.experts
        return replace(
            self.shape, expert_bytes=experts // count, total_bytes=sum(t.size for t in own)
        )

    @property
    def largest_shard(self) -> int:
        """Bytes of the largest file."""
        return max(file.stat().st_size for file in self.files)


def layout_of_files(directory: str | Path, family: Family | None = None) -> ExpertLayout:
    """The layout of a model's folder, with the bytes that its files really have.

    Raises:
        As `ExpertFiles`.
    """
    return ExpertFiles(directory, family).layout


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = json.loads(index.read_text("utf-8"))["weight_map"].values()
            return [directory / name for name in sorted(set(map(str, names)))]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise DataError(f"{str(index)!r} is no index of shards") from None
    found = sorted(directory.glob("*.safetensors"))
    single = directory / "model.safetensors"
    if single in found:
        return [single]
    if not found:
        raise DataError(f"model {str(directory)!r} has no safetensors files")
    return found


def _header(file: Path) -> list[StoredTensor]:
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise DataError(f"{str(file)!r} is not a safetensors file, or is cut off")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise DataError(f"{str(file)!r} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{str(file)!r} has no safetensors header") from None
    out = []
    for name, entry in _entries(header, file).items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
            start, end = map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{str(file)!r}: tensor {name!r} has no valid header entry") from None
        bits = _BITS.get(dtype)
        fits = bits is None or (end - start) * 8 == math.prod(shape) * bits
        if not (0 <= start <= end <= size - 8 - length and fits and min(shape, default=0) >= 0):
            raise DataError(
                f"{str(file)!r}: tensor {name!r} ({dtype}, {list(shape)}) does not fit into bytes "
                f"{start} to {end}"
            )
        base = 8 + length
        out.append(StoredTensor(name, file, dtype, shape, base + start, base + end))
    return out


def _entries(header: Any, file: Path) -> Mapping[str, Any]:
    if not isinstance(header, dict):
        raise DataError(f"{str(file)!r} has no safetensors header")
    return {key: value for key, value in header.items() if key != "__metadata__"}
