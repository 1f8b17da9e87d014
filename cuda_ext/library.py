"""Loads the compiled kernels, and says why where they cannot be used."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["KernelError", "Kernels", "load", "report_line", "serves", "stream_of"]

VERSION = 1  # of the C interface
MAX_SOURCES = 448  # of one call of the library

_POINTER = ctypes.c_void_p
_SIGNATURES = {
    "sl_version": [],
    "sl_device_count": [],
    "sl_weighted_sum": [
        *(_POINTER, ctypes.c_int, _POINTER, _POINTER, ctypes.c_int, _POINTER, ctypes.c_int64),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, _POINTER),
    ],
    "sl_solver_update": [
        *(_POINTER, _POINTER, ctypes.c_int, _POINTER, _POINTER, _POINTER, ctypes.c_int),
        *(ctypes.c_int64, ctypes.c_int64, _POINTER),
    ],
    "sl_route_topk": [
        *(_POINTER, ctypes.c_int, ctypes.c_int64, ctypes.c_int, _POINTER, _POINTER, ctypes.c_int),
        *(ctypes.c_int, _POINTER, ctypes.c_int, ctypes.c_int, _POINTER, _POINTER, _POINTER),
    ],
}


class KernelError(RuntimeError):
    """A kernel could not be loaded or launched."""


@dataclass(frozen=True)
class Kernels:
    """The loaded library."""

    path: Path
    library: ctypes.CDLL

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function of the library.

        Raises:
            KernelError: it returned an error of CUDA, or no kernel serves the arguments.
        """
        code = getattr(self.library, name)(*arguments)
        if code:
            why = "no kernel serves these arguments" if code < 0 else f"CUDA error {code}"
            raise KernelError(f"{name}: {why}")


def open_library(path: Path) -> Kernels:
    """Loads a library and checks that it is one of ours.

    Raises:
        KernelError: the file is missing, is no library, lacks a function, or is of another version.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"{path}: {error}") from None
    for name, types in _SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise KernelError(f"{path} has no {name}; build it again") from None
        function.argtypes, function.restype = types, ctypes.c_int
    if library.sl_version() != VERSION:
        raise KernelError(f"{path} has interface {library.sl_version()}, {VERSION} is needed")
    return Kernels(path, library)


@functools.cache
def load() -> Kernels | None:
    """The kernels, built at first use; None (and one warning) where that fails.

    ``SEARCHLAB_CUDA=0`` switches them off.
    """
    # Not at the top: `python -m searchlab.cuda_ext.build` would find itself imported already.
    from searchlab.cuda_ext.build import BuildError, build

    if os.environ.get("SEARCHLAB_CUDA") == "0":
        return None
    try:
        return open_library(build())
    except (BuildError, KernelError, OSError) as error:
        warnings.warn(f"torch is used in place of fused kernels: {error}", stacklevel=2)
        return None


def serves(*tensors: torch.Tensor) -> bool:
    """Whether all tensors lie on one GPU that the kernels were compiled for."""
    import torch

    device = tensors[0].device
    if device.type != "cuda" or any(tensor.device != device for tensor in tensors):
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return load() is not None


def stream_of(tensor: torch.Tensor) -> int:
    """The stream that torch uses for the device of a tensor."""
    import torch

    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def report_line() -> str:
    """What `doctor` says of the kernels; builds nothing."""
    from searchlab.cuda_ext.build import compiler, library_path

    if os.environ.get("SEARCHLAB_CUDA") == "0":
        return "fused kernels: switched off by SEARCHLAB_CUDA=0"
    nvcc, path = compiler(), library_path()
    if path is None:
        return "fused kernels: none, no nvcc on the search path; torch is used in their place"
    if not path.is_file():
        if os.environ.get("SEARCHLAB_CUDA_LIB"):
            return f"fused kernels: none, SEARCHLAB_CUDA_LIB names {path}, which is not there"
        return (
            f"fused kernels: not built yet, {nvcc} compiles them at first use on a GPU "
            "(ahead of it: python -m searchlab.cuda_ext.build)"
        )
    try:
        kernels = open_library(path)
    except KernelError as error:
        return f"fused kernels: {error}"
    devices = kernels.library.sl_device_count()
    used = f"{devices} device(s)" if devices else "no device here, torch is used on the CPU"
    return f"fused kernels: {path}, {used}"
