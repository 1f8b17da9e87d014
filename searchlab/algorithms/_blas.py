"""Fits of small matrices without the threads of the linear algebra library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from threadpoolctl import ThreadpoolController

__all__ = ["one_thread", "rescan"]


@lru_cache(maxsize=1)
def _libraries() -> Any:
    return ThreadpoolController().select(user_api="blas")


def rescan() -> None:
    """Looks again for the libraries, as some are loaded with what needs them; takes some ms."""
    _libraries.cache_clear()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of numpy's and scipy's linear algebra, so that what is computed within depends on
    no setting of the machine. Matrices of some hundred rows are slower with more: their threads
    wait for each other, on cores that the evaluations use.
    """
    with _libraries().limit(limits=1):
        yield
