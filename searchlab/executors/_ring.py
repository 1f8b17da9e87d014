"""The tasks that wait, where the workers can reach them without the driver.

A worker that has finished takes the oldest task out of memory that it shares with the driver, and
tells so with its answer. So it never waits for a driver that learns, proposes or writes, and no
task is bound to a worker that is busy for long.

Who takes holds a lock on the file behind the memory, which the kernel gives back when a process
ends. A taker writes its name first and moves the front second: whatever moment it dies at, the
driver can tell which tasks died with it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from typing import IO

from searchlab.executors._tasks import Task

__all__ = ["NOTHING", "Claims", "Waiting"]

NOTHING = -1  # ticket of no task
_BYTES = 1 << 16  # of one message; a longer one goes through the driver
_INDEX = struct.Struct("=q")
_SLOT = struct.Struct("=qq")  # who took it (NOTHING = nobody), length of the message
_FRONT, _BACK, _START = 0, _INDEX.size, 2 * _INDEX.size
_DRIVER = -2
_TRIES, _PAUSE = 50, 2e-5  # a process that was stopped while it held the lock must stop nobody else


class _Ring:
    """The shared memory: tickets from `front` to below `back` wait, in slot ticket % slots."""

    def __init__(self, number: int) -> None:
        size = os.fstat(number).st_size
        self.slots = (size - _START) // (_SLOT.size + _BYTES)
        self.memory = mmap.mmap(number, size)
        self._number = number

    def index(self, where: int) -> int:
        value: int = _INDEX.unpack_from(self.memory, where)[0]
        return value

    def lock(self) -> bool:
        for _ in range(_TRIES):
            with suppress(BlockingIOError, PermissionError):
                fcntl.lockf(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(_PAUSE)
        return False

    def unlock(self) -> None:
        fcntl.lockf(self._number, fcntl.LOCK_UN)

    def take(self, who: int) -> tuple[int, bytes]:
        """Ticket and message of the oldest task, which belongs to `who` from now on; or nothing."""
        if self.index(_FRONT) == self.index(_BACK) or not self.lock():
            return NOTHING, b""
        try:
            ticket = self.index(_FRONT)
            if ticket == self.index(_BACK):
                return NOTHING, b""
            message = self.message(ticket)  # its slot may be used again as soon as it is taken
            _INDEX.pack_into(self.memory, self._at(ticket), who)
            _INDEX.pack_into(self.memory, _FRONT, ticket + 1)
            return ticket, message
        finally:
            self.unlock()

    def put(self, ticket: int, message: bytes) -> None:
        """Puts the youngest task in; its slot must be free."""
        at = self._at(ticket)
        _SLOT.pack_into(self.memory, at, NOTHING, len(message))
        self.memory[at + _SLOT.size : at + _SLOT.size + len(message)] = message
        _INDEX.pack_into(self.memory, _BACK, ticket + 1)

    def owner(self, ticket: int) -> int:
        """Who took a task; NOTHING while it waits."""
        if ticket >= self.index(_FRONT):
            return NOTHING
        return int(_SLOT.unpack_from(self.memory, self._at(ticket))[0])

    def message(self, ticket: int) -> bytes:
        at = self._at(ticket)
        length: int = _SLOT.unpack_from(self.memory, at)[1]
        return self.memory[at + _SLOT.size : at + _SLOT.size + length]

    def _at(self, ticket: int) -> int:
        return _START + ticket % self.slots * (_SLOT.size + _BYTES)


def _file(slots: int) -> IO[bytes]:
    """Memory without a name; its pages are there once they are written."""
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("searchlab-waiting"), "r+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it stays open
    file.truncate(_START + slots * (_SLOT.size + _BYTES))
    return file


class Claims:
    """A worker's end.

    Args:
        number: of the open file that `Waiting` has.
        who: number of the worker.
    """

    def __init__(self, number: int, who: int) -> None:
        self._ring = _Ring(number)
        self._who = who

    def take(self) -> tuple[int, bytes]:
        """The ticket and the message of the oldest task; (NOTHING, b"") if none waits."""
        return self._ring.take(self._who)


class Waiting:
    """The driver's end: all tasks that no worker has, oldest first.

    Any thread may call it.

    Args:
        slots: how many tasks workers can reach at once.
    """

    def __init__(self, slots: int) -> None:
        self._file = _file(slots)
        self._ring = _Ring(self._file.fileno())
        self._within: dict[int, Task] = {}  # by ticket: waits in the ring, or its taker is unheard
        self._later: deque[Task] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._within) + len(self._later)

    def fileno(self) -> int:
        """The file that workers inherit."""
        return self._file.fileno()

    def add(self, task: Task) -> None:
        """Appends the youngest task."""
        with self._lock:
            self._later.append(task)

    def add_again(self, task: Task) -> None:
        """Puts a task before all that workers cannot reach yet."""
        with self._lock:
            self._later.appendleft(task)

    def take(self) -> Task | None:
        """The oldest task, for a worker that waits."""
        with self._lock:
            if self._later and self._later[0].attempts:
                return self._later.popleft()  # it was older than all others before
            if self._within:
                ticket, _ = self._ring.take(_DRIVER)
                if ticket != NOTHING:
                    return self._within.pop(ticket)
            return self._later.popleft() if self._later else None

    def offer(self) -> None:
        """Moves tasks to where workers reach them, as far as there is room."""
        with self._lock:
            while self._later and len(self._later[0].message) <= _BYTES:
                ticket = self._ring.index(_BACK)
                if any(other <= ticket - self._ring.slots for other in self._within):
                    return  # the slot is in use
                task = self._later.popleft()
                self._within[ticket] = task
                self._ring.put(ticket, task.message)

    def taken(self, ticket: int) -> Task:
        """The task that a worker said it has taken."""
        with self._lock:
            return self._within.pop(ticket)

    def taken_unheard(self, who: int) -> list[Task]:
        """The tasks that a worker which has ended took and could not tell of."""
        with self._lock:
            tickets = [t for t in self._within if self._ring.owner(t) == who]
            return [self._within.pop(ticket) for ticket in sorted(tickets)]

    def withdraw(self) -> list[Task]:
        """Takes all tasks back that no worker has taken."""
        out = []
        with self._lock:
            while self._within and (ticket := self._ring.take(_DRIVER)[0]) != NOTHING:
                out.append(self._within.pop(ticket))
            out += self._later
            self._later.clear()
        return out

    def close(self) -> None:
        """Gives the memory back."""
        self._ring.memory.close()
        self._file.close()
