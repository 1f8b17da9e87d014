"""Large buffers: on huge pages where the system has them, because filling small ones costs more
than the sums that fill them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["buffer"]

_LEAST = 2**22  # bytes from which huge pages pay


def buffer(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, for something that is written whole."""
    size = math.prod(shape) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < _LEAST:
        return torch.empty(tuple(shape), dtype=dtype)
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: the pages are small, nothing else differs
        held.madvise(advice)
    return torch.frombuffer(held, dtype=dtype).view(tuple(shape))
