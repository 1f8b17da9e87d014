"""Who drives a run: the owner of a lease, and whether its process still lives."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab.errors import StudyError

if TYPE_CHECKING:
    from searchlab._study_store import Store

__all__ = ["Owner", "holder_of", "keep_alive"]

BEAT_S = 5.0


@dataclass(frozen=True)
class Owner:
    """Who drives a run: a process of a host; `token` makes two drivers of one process differ."""

    host: str
    pid: int
    token: str

    @staticmethod
    def here() -> Owner:
        """This process, with a new token."""
        return Owner(socket.gethostname(), os.getpid(), f"{_namespace()}-{secrets.token_hex(8)}")

    @staticmethod
    def parse(text: str) -> Owner:
        """The inverse of `str`."""
        host, pid, token = text.rsplit(":", 2)
        return Owner(host, int(pid), token)

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}:{self.token}"

    def is_dead(self) -> bool:
        """Whether the process certainly no longer runs; False where this host cannot tell."""
        # Containers may share a host name but not their process numbers.
        if self.host != socket.gethostname() or self.token.split("-")[0] != _namespace():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        with suppress(OSError, IndexError):
            # A zombie still has its number; the state follows the name in parentheses.
            stat = Path(f"/proc/{self.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] in ("Z", "X")
        return False


def _namespace() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return "0"


@contextmanager
def keep_alive(store: Store, every_s: float = BEAT_S) -> Iterator[None]:
    """Keeps a driver's lease while it evaluates, which may take longer than a lease holds."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(every_s):
            try:
                store.heartbeat()
            except StudyError:  # lost, or the database is away: the next record says so
                return

    thread = threading.Thread(target=beat, name="searchlab-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def holder_of(row: Mapping[str, Any], now: float) -> Owner | None:
    """Who holds the lease; None when it is free, has run out, or its process is dead."""
    with suppress(ValueError, TypeError, AttributeError):
        if row["owner"] is None or row["lease_until"] <= now:
            return None
        owner = Owner.parse(row["owner"])
        return None if owner.is_dead() else owner
    return None
