"""What the tests of kernels share: the compiled bodies, and a GPU where there is one."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch


@pytest.fixture(scope="session")
def bodies() -> ctypes.CDLL:
    """The element bodies of the kernels, compiled for the CPU."""
    from searchlab.cuda_ext.build import cpu_check

    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    return ctypes.CDLL(str(cpu_check()))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device("cuda")
