"""The library: it compiles without a GPU, keeps to its budget of registers, and loads anywhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from searchlab.cuda_ext import build as builder
from searchlab.cuda_ext import library

NVCC = builder.compiler()
BUDGET = Path(builder.__file__).with_name("budget.json")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc here")


def kernels_of(log: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes per kernel and architecture, from what ptxas says."""
    out: dict[str, dict[str, int]] = {}
    name = ""
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name = f"{family(found[1])} {found[2]}"
            out.setdefault(name, {"registers": 0, "spilled_bytes": 0})
        elif found := re.search(r"(\d+) bytes spill stores", line):
            out[name]["spilled_bytes"] = max(out[name]["spilled_bytes"], int(found[1]))
        elif found := re.search(r"Used (\d+) registers", line):
            out[name]["registers"] = max(out[name]["registers"], int(found[1]))
    return out


def family(mangled: str) -> str:
    return next(
        k for k in ("scalar_route", "matrix_route", "solver_route", "route") if k in mangled
    )


@needs_nvcc
@pytest.mark.timeout(600)
def test_every_kernel_compiles_within_its_budget() -> None:
    """Warnings are errors; the most that any variant of a kernel takes is committed.

    A build of these very sources, with this compiler and these flags, is taken from the cache.
    """
    path = builder.build()
    log = builder.log_of(path).read_text("utf-8")
    measured = kernels_of(log)
    budget = json.loads(BUDGET.read_text())["kernels"]
    assert set(measured) == set(budget)
    over = {
        name: figures
        for name, figures in measured.items()
        if any(figures[what] > budget[name][what] for what in figures)
    }
    assert not over, f"above the budget: {over}"
    kernels = library.open_library(path)
    assert kernels.library.sl_version() == library.VERSION
    assert kernels.library.sl_device_count() >= 0
    assert kernels.library.sl_weighted_sum(None, 0, None, None, 0, None, 0, 0, 0, 0, None) == -1


def test_what_is_no_library_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(library.KernelError, match="missing"):
        library.open_library(tmp_path / "missing.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(library.KernelError, match=r"text\.so"):
        library.open_library(tmp_path / "text.so")


def test_a_foreign_library_lacks_our_functions(tmp_path: Path) -> None:
    check = builder.cpu_check()
    with pytest.raises(library.KernelError, match="sl_version"):
        library.open_library(check)


def test_a_build_that_fails_says_what_the_compiler_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "nvcc"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 || { echo broken >&2; exit 3; }\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(fake))
    monkeypatch.setenv("SEARCHLAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(builder.BuildError, match="broken"):
        builder.build()
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_named_library_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHLAB_CUDA_LIB", str(tmp_path / "mine.so"))
    with pytest.raises(builder.BuildError, match=r"mine\.so"):
        builder.build()
    assert "mine.so" in library.report_line()
    monkeypatch.setenv("SEARCHLAB_CUDA", "0")
    assert "switched off" in library.report_line()


def test_without_a_compiler_torch_is_used(tmp_path: Path) -> None:
    """In a process of its own: one warning, and the CPU path works as before."""
    script = (
        "import warnings, torch\n"
        "from searchlab.cuda_ext import weighted_sum, library\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    assert library.load() is None and library.load() is None\n"
        "assert len(seen) == 1 and 'nvcc' in str(seen[0].message), seen\n"
        "print(float(weighted_sum(torch.ones(2, 3), torch.ones(1, 2)).sum()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "6.0"
