"""What was computed last, for those who ask for several things of the same candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["Latest"]

Value = TypeVar("Value")


class Latest(Generic[Value]):
    """Remembers the value of the last object that was asked about, by its identity.

    A mean, a draw and a prediction of one table follow one another, and share most of their work.
    Neither the object nor the value may be changed by who gets it.
    """

    def __init__(self) -> None:
        self._of: Any = None
        self._value: Any = None

    def of(self, key: object, make: Callable[[], Value]) -> Value:
        """The value of `key`, made by `make` unless it is the last one's."""
        if self._of is not key:
            self._of, self._value = None, make()
            self._of = key
        value: Value = self._value
        return value
