"""What a supervisor looks at from outside: the memory of worker processes, and their logs."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

__all__ = ["LARGEST_LOG", "log_name", "open_log", "own_bytes", "shorten_log"]

LARGEST_LOG = 16 << 20  # bytes of one worker's log; then only its end is kept
_KEPT = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def own_bytes(pid: int) -> int:
    """Memory that a process and all below it have for themselves, in bytes.

    What is shared, such as files that are mapped into memory, is not counted. 0 for a process that
    is gone, and where the system has no `/proc`.
    """
    total, family = 0, [pid]
    while family:
        one = family.pop()
        try:
            with open(f"/proc/{one}/statm", "rb") as file:
                parts = file.read().split()
            total += (int(parts[1]) - int(parts[2])) * _PAGE
            for thread in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{thread}/children", "rb") as file:
                    family += map(int, file.read().split())
        except (OSError, IndexError, ValueError):
            continue
    return total


def log_name(worker: str) -> str:
    """The file name of a worker's log."""
    return f"{worker.replace(' ', '-')}.log"


def open_log(path: Path) -> IO[bytes]:
    """A log to go on with, with a line that says when; raises OSError where there can be none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not through a link that somebody has put there.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)
    file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} a new process\n".encode())
    return file


def shorten_log(path: Path) -> None:
    """Keeps the end of a log that has become too large; its writers append, so they go on."""
    with suppress(OSError):
        if path.stat().st_size <= LARGEST_LOG:
            return
        with open(path, "r+b") as file:
            file.seek(-_KEPT, os.SEEK_END)
            end = file.read()
            file.truncate(0)
            file.seek(0)
            file.write(b"--- shortened\n" + end)
