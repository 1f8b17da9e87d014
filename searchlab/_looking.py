"""Whether a run is only looked at: then what it names is data, and none of it is executed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["looking", "only_looking"]

_LOOKING: ContextVar[bool] = ContextVar("searchlab_looking", default=False)


def only_looking() -> bool:
    """Whether code that a run's options name must not be imported now."""
    return _LOOKING.get()


@contextmanager
def looking(yes: bool = True) -> Iterator[None]:
    """A stretch in which a run of anybody is looked at."""
    before = _LOOKING.set(yes)
    try:
        yield
    finally:
        _LOOKING.reset(before)
