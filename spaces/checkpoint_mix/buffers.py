"""Large buffers that are used again: filling fresh memory costs more than the sums that fill it."""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["Pool", "buffer"]

_LEAST = 2**20  # bytes from which it pays


def buffer(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, for something that is written whole."""
    count = math.prod(shape)
    if count * dtype.itemsize < _LEAST:
        return torch.empty(tuple(shape), dtype=dtype)
    held = _mapped(count * dtype.itemsize)
    return torch.frombuffer(held, dtype=dtype, count=count).view(tuple(shape))


def _mapped(size: int) -> mmap.mmap:
    """Private memory, on huge pages where the system has them."""
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        held.madvise(mmap.MADV_HUGEPAGE)
    return held


class Pool:
    """Buffers that are handed out again as soon as no tensor lies in them any more.

    A tensor keeps the memory that it was made from; so nobody's values are ever overwritten, also
    where a user has kept a view.
    """

    def __init__(self) -> None:
        self._held: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised CPU tensor."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size < _LEAST:
            return torch.empty(tuple(shape), dtype=dtype)
        with self._lock:
            held = self._unused(size)
            return torch.frombuffer(held, dtype=dtype, count=count).view(tuple(shape))

    def _unused(self, size: int) -> mmap.mmap:
        free = [at for at in range(len(self._held)) if sys.getrefcount(self._held[at]) == _ALONE]
        fitting = [at for at in free if len(self._held[at]) >= size]
        if fitting:
            return self._held[min(fitting, key=lambda at: len(self._held[at]))]
        # What is too small goes: a search asks for the same sizes again and again.
        self._held = [self._held[at] for at in range(len(self._held)) if at not in free]
        self._held.append(_mapped(size))
        return self._held[-1]


_ALONE = 2
"""References to an object that only a list holds, counted by `sys.getrefcount`."""
