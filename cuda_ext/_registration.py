"""Registers operations with torch, so that they dispatch, trace and compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["STORAGE", "numbers", "pointers", "register"]

STORAGE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_LIBRARY = torch.library.Library("searchlab", "DEF")  # type: ignore[no-untyped-call]


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Defines `searchlab::NAME` with its implementations.

    Args:
        schema: name, arguments and results in torch's words.
        cpu, cuda: what runs on each.
        fake: shapes and types of the results alone.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"searchlab::{name}", fake, lib=_LIBRARY)


def pointers(tensors: list[torch.Tensor]) -> Any:
    """Addresses of tensors as a C array on the host."""
    import ctypes

    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def numbers(tensors: list[torch.Tensor]) -> Any:
    """Storage types of tensors as a C array on the host."""
    import ctypes

    return (ctypes.c_int * len(tensors))(*(STORAGE[tensor.dtype] for tensor in tensors))
