"""What the tests of faults share: evaluators that workers can import, small disks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from searchlab.space import Space
from searchlab.variables import Integer

ROOT = Path(__file__).resolve().parents[2]
MB = 10**6
_kept: list[np.ndarray] = []  # type: ignore[type-arg]


def number_space() -> Space:
    return Space(a=Integer(0, 9999))


def hungry(a: int) -> float:
    """Every fifth candidate needs 300 MB for itself."""
    if a % 5 == 0:
        block = np.ones(300 * MB // 8)
        time.sleep(2.0)
        return float(block[0])
    return float(a)


def leaky(a: int) -> float:
    """Keeps 30 MB of every call."""
    _kept.append(np.ones(30 * MB // 8))
    time.sleep(0.1)
    return float(a)


def chatty(a: int) -> float:
    """Prints, and raises for every fifth candidate."""
    print(f"candidate {a}")
    if a % 5 == 0:
        raise ValueError(f"no value for {a}")
    return float(a)


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def python(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    """Python on some arguments, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **more,  # type: ignore[call-overload]
    )


@contextmanager
def small_disk(point: Path, size: str) -> Iterator[bool]:
    """A file system of a few bytes; False where none can be mounted."""
    point.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)]
    mounted = subprocess.run(["mount", *options], capture_output=True, check=False)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(point)], check=True)


def enlarge(point: Path, size: str) -> None:
    """Gives a small disk more room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(point)], check=True)
