"""Compiles the kernels once per machine: ``python -m searchlab.cuda_ext.build``.

Nothing of it needs a GPU. The library is a plain C interface and knows no version of torch or
Python, so one build serves them all; it is found again by a hash of its sources, the compiler and
the flags.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "ARCHITECTURES",
    "CSRC",
    "BuildError",
    "build",
    "cache_folder",
    "compiler",
    "cpu_check",
    "library_path",
    "log_of",
    "nvcc_command",
]

CSRC = Path(__file__).parent / "csrc"
SOURCES = ("weighted_sum.cu", "solver_update.cu", "route_topk.cu")
ARCHITECTURES = ("80", "90")  # A100 and its like; H100, H200
_FLAGS = (
    *("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Werror", "all-warnings"),
    *("-Xptxas", "-v"),  # registers and spills, for the log
)


class BuildError(RuntimeError):
    """The library could not be compiled; holds what the compiler said."""


def compiler() -> str | None:
    """The path of nvcc by ``CUDACXX``, the search path or ``CUDA_HOME``; None = there is none."""
    named = os.environ.get("CUDACXX")
    if named and shutil.which(named):
        return shutil.which(named)
    found = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return found or (shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None)


def cache_folder() -> Path:
    """Where built libraries are kept: ``SEARCHLAB_CACHE``, else the user's cache folder."""
    named = os.environ.get("SEARCHLAB_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "searchlab"


def _targets() -> list[str]:
    # One text for all: no kernel has a variant of its own for a later architecture, and making the
    # text takes as long as assembling it. Later devices compile it when they load it.
    text = f"compute_{ARCHITECTURES[0]}"
    code = ",".join([*(f"sm_{a}" for a in ARCHITECTURES), text])
    return [f"-gencode=arch={text},code=[{code}]"]


def nvcc_command(nvcc: str, sources: Sequence[Path], out: Path, *extra: str) -> list[str]:
    """What is typed to compile `sources` into the shared library `out`."""
    return [
        nvcc,
        *_FLAGS,
        *("-Xcompiler", "-fPIC", "-shared", "-cudart", "static", "--threads", "0"),
        *_targets(),
        *extra,
        *(str(source) for source in sources),
        *("-o", str(out)),
    ]


def _key(tool: str) -> str:
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    digest = hashlib.sha256(version.stdout.encode())
    digest.update(repr((_FLAGS, _targets())).encode())
    for path in sorted(CSRC.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library_path() -> Path | None:
    """What to load: ``SEARCHLAB_CUDA_LIB``, else where a build is kept; None = no compiler."""
    named = os.environ.get("SEARCHLAB_CUDA_LIB")
    if named:
        return Path(named)
    nvcc = compiler()
    return None if nvcc is None else cache_folder() / f"libsearchlab_cuda-{_key(nvcc)}.so"


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Lets one process compile while the others wait for its result."""
    try:
        import fcntl
    except ImportError:  # no such lock on this system: two builds write files of their own
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def log_of(library: Path) -> Path:
    """Where the compiler's words on a library are kept."""
    return library.with_suffix(".log")


def _compile(command: list[str], out: Path) -> None:
    """Runs the compiler into a file of its own and gives that its name when it is whole."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / out.name
        done = subprocess.run(
            [str(made) if part == str(out) else part for part in command],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BuildError(f"{command[0]} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        log_of(out).write_text(done.stdout + done.stderr, "utf-8")
        made.replace(out)


def build(*, force: bool = False) -> Path:
    """Compiles the library unless it is there.

    Returns:
        Where it is.

    Raises:
        BuildError: there is no nvcc, or it found an error.
    """
    path = library_path()
    if path is None:
        raise BuildError("no nvcc on the search path; install a CUDA toolkit or set CUDACXX")
    if path.is_file() and not force:
        return path
    if os.environ.get("SEARCHLAB_CUDA_LIB"):
        raise BuildError(f"SEARCHLAB_CUDA_LIB names {path}, which is not there")
    nvcc = compiler()
    assert nvcc is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(path.with_suffix(".lock")):
        if force or not path.is_file():
            _compile(nvcc_command(nvcc, [CSRC / name for name in SOURCES], path), path)
    return path


def cpu_check() -> Path:
    """The element bodies of the kernels compiled for the CPU, for tests.

    Raises:
        BuildError: there is no g++, or it found an error.
    """
    tool = shutil.which(os.environ.get("CXX", "g++"))
    if tool is None:
        raise BuildError("no g++ on the search path")
    path = cache_folder() / f"libsearchlab_check-{_key(tool)}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(path.with_suffix(".lock")):
        if not path.is_file():
            flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
            # Sums stay as they are written: one rounding per product and sum only where it says so.
            flags.append("-ffp-contract=off")
            _compile([tool, *flags, str(CSRC / "cpu_check.cpp"), "-o", str(path)], path)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds and prints the path of the library."""
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels into the cache.")
    parser.add_argument("--force", action="store_true", help="compile even where a build is kept")
    options = parser.parse_args(arguments)
    try:
        print(build(force=options.force))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
