"""Tensors that are worth keeping, up to a number of bytes; the longest unused go first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor

__all__ = ["States"]


class States:
    """Key -> something made of tensors.

    Args:
        limit: most bytes of all tensors.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def __contains__(self, key: Any) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Any) -> Any:
        """What was put there, or None."""
        found = self._held.get(key)
        if found is None:
            return None
        self._held.move_to_end(key)
        return found[0]

    def put(self, key: Any, value: Any) -> None:
        """Keeps tensors in tuples, lists or dicts, unless they alone are above the limit."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value).values())
        if size > self.limit or key in self._held:
            return
        self._held[key] = (value, size)
        self._bytes += size
        while self._bytes > self.limit:
            _, (_, old) = self._held.popitem(last=False)
            self._bytes -= old

    def clear(self) -> None:
        self._held.clear()
        self._bytes = 0


def _tensors(value: Any) -> dict[int, Tensor]:
    """Different tensors inside a value, by their places in memory."""
    if isinstance(value, Tensor):
        return {value.data_ptr(): value}
    if isinstance(value, dict):
        value = list(value.values())
    out: dict[int, Tensor] = {}
    if isinstance(value, tuple | list):
        for part in value:
            out.update(_tensors(part))
    return out
