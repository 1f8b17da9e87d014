"""Safetensors files read in place: the header says where each tensor lies, the rest is mapped."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchlab.errors import DataError

__all__ = ["DTYPES", "TensorEntry", "TensorFile"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What is read; weights of fewer than 16 bits cannot be mixed."""

_MAX_HEADER = 100 * 2**20  # bytes, as the format's own reader allows
_HASH_BYTES = 2**22


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: a key of `DTYPES`.
        shape: as stored.
        start, end: byte range in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class TensorFile:
    """A safetensors file whose tensors are views of the mapped file.

    Attributes:
        path: of the file.
        entries: tensor name -> entry, in the order of the header.
        metadata: the file's own texts.

    Raises:
        DataError: missing, truncated, or not of the format; names the file and what is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                head = file.read(8)
                length = int.from_bytes(head, "little")
                if len(head) < 8 or length > min(_MAX_HEADER, size - 8):
                    raise DataError(
                        f"checkpoint {str(self.path)!r} is not a safetensors file, or is cut off: "
                        f"{size} bytes, header of {length}"
                    )
                header = self._parsed(file.read(length))
                self.metadata: dict[str, str] = dict(header.pop("__metadata__", None) or {})
                self.entries = self._checked(header, 8 + length, size)
                # A private map: nothing that is written to a view reaches the file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise DataError(
                f"checkpoint {str(self.path)!r} cannot be read: {error.strerror or error}"
            ) from None

    def _parsed(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise DataError(f"checkpoint {str(self.path)!r} has no safetensors header")
        return header

    def _checked(self, header: dict[str, Any], base: int, size: int) -> dict[str, TensorEntry]:
        out: dict[str, TensorEntry] = {}
        for name, value in header.items():
            try:
                dtype, shape = str(value["dtype"]), tuple(map(int, value["shape"]))
                start, end = map(int, value["data_offsets"])
            except (KeyError, TypeError, ValueError):
                raise DataError(
                    f"checkpoint {str(self.path)!r}: tensor {name!r} has no valid header entry"
                ) from None
            if dtype not in DTYPES:
                raise DataError(
                    f"checkpoint {str(self.path)!r}: tensor {name!r} is {dtype}; "
                    f"allowed: {', '.join(DTYPES)}"
                )
            width = DTYPES[dtype].itemsize
            if min((start, *shape), default=start) < 0 or end - start != math.prod(shape) * width:
                raise DataError(
                    f"checkpoint {str(self.path)!r}: tensor {name!r} of shape {list(shape)} and "
                    f"{dtype} stands in {end - start} bytes"
                )
            if base + end > size:
                raise DataError(
                    f"checkpoint {str(self.path)!r} is cut off: tensor {name!r} ends at byte "
                    f"{base + end}, the file has {size}"
                )
            out[name] = TensorEntry(dtype, shape, base + start, base + end)
        if not out:
            raise DataError(f"checkpoint {str(self.path)!r} holds no tensors")
        return out

    def tensor(self, name: str) -> Tensor:
        """A tensor as a view of the file."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if not entry.count:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.start % dtype.itemsize:  # legal, and rare: such a tensor has to be copied
            raw = bytearray(self._map[entry.start : entry.end])
            return torch.frombuffer(raw, dtype=dtype).reshape(entry.shape)
        flat = torch.frombuffer(self._map, dtype=dtype, count=entry.count, offset=entry.start)
        return flat.reshape(entry.shape)

    def release(self) -> None:
        """Lets go of the mapped pages; they are read again where they are needed."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def sha256(self) -> str:
        """Of the whole file."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while part := file.read(_HASH_BYTES):
                digest.update(part)
        return digest.hexdigest()
