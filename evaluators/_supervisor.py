"""Runs commands and ends everything they start; a program of its own, standard library only.

For every line of JSON on its standard input (`argv` or `shell`, `folder`, `environment`, `stdout`,
`stderr`, `limit`, `timeout_s`, `grace_s`) it runs one command and writes two lines: `{"pid": ...}`
before the command begins, and how it ended. It is a process of its own so that it can adopt
whatever a command leaves behind, also processes that gave themselves another session, and so that
everything ends when its standard input closes, which it does when the driver dies, however it dies.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# Schedulers send these to all processes of a job; the driver decides what they mean.
DRIVERS_OWN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
READ_BYTES = 1 << 16
LAST_WAIT_S = 5.0  # for processes that even SIGKILL does not end at once


class Sink:
    """A file that keeps the first and the last half of a limit; what lies between is counted."""

    def __init__(self, path: str, limit: int) -> None:
        self.file = open(path, "wb")  # noqa: SIM115
        self.head = limit // 2
        self.limit = limit - self.head
        self.tail: collections.deque[bytes] = collections.deque()
        self.kept = 0
        self.dropped = 0

    def write(self, data: bytes) -> None:
        if self.head > 0:
            first, data = data[: self.head], data[self.head :]
            self.head -= len(first)
            self._put(first)
        if data:
            self.tail.append(data)
            self.kept += len(data)
            while self.kept - len(self.tail[0]) >= self.limit:
                gone = len(self.tail.popleft())
                self.kept -= gone
                self.dropped += gone

    def _put(self, data: bytes) -> None:
        try:
            self.file.write(data)
            self.file.flush()
        except OSError:  # a full disk must not stop the command
            self.dropped += len(data)

    def close(self) -> None:
        rest = b"".join(self.tail)
        over = max(0, len(rest) - self.limit)
        self.dropped += over
        if self.dropped:
            self._put(b"\n[%d bytes left out]\n" % self.dropped)
        self._put(rest[over:])
        with contextlib.suppress(OSError):
            self.file.close()


class Supervisor:
    """One command with its pipes, its clock and its descendants."""

    def __init__(self, spec: dict[str, Any], wake: int, adopts: bool) -> None:
        self.spec = spec
        self.wake = wake
        self.adopts = adopts
        self.pid = 0
        self.status: int | None = None  # wait status of the command
        self.cancelled = False
        self.poll = select.poll()
        self.sinks: dict[int, Sink] = {}

    # -- starting --------------------------------------------------------------------------

    def start(self) -> str:
        """Forks the command; returns why it could not be started, or an empty text."""
        spec = self.spec
        argv = ["/bin/sh", "-c", spec["shell"]] if "shell" in spec else spec["argv"]
        # These and its number come before the command, as it might end this process.
        sinks = [Sink(spec[name], spec["limit"]) for name in ("stdout", "stderr")]
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        fault_read, fault_write = os.pipe()
        gate_read, gate_write = os.pipe()
        for end in (out_read, err_read):
            os.set_blocking(end, False)
        self.pid = os.fork()
        if self.pid == 0:
            become(spec, argv, out_write, err_write, gate_read, fault_write)
        for end in (out_write, err_write, gate_read, fault_write):
            os.close(end)
        say({"pid": self.pid})
        os.write(gate_write, b"1")
        os.close(gate_write)
        for end, sink in zip((out_read, err_read), sinks, strict=True):
            self.sinks[end] = sink
            self.poll.register(end, select.POLLIN)
        self.poll.register(self.wake, select.POLLIN)
        self.poll.register(0, select.POLLIN)
        fault = os.read(fault_read, 64)  # ends when the command begins
        os.close(fault_read)
        return os.strerror(int(fault)) if fault else ""

    # -- waiting ---------------------------------------------------------------------------

    def pump(self, until: float, done: Callable[[], bool]) -> bool:
        """Moves output and reaps until `done()` or the time; returns whether it was done."""
        while True:
            self.reap()
            if done():
                return True
            left = until - time.monotonic()
            if left <= 0:
                return False
            for end, _ in self.poll.poll(min(left, 60.0) * 1000):
                self.serve(end)

    def serve(self, end: int) -> None:
        if end == 0:
            if not os.read(0, 1):  # the driver is gone
                self.cancelled = True
                self.poll.unregister(0)
        elif end == self.wake:
            while True:
                try:
                    if len(os.read(end, 4096)) < 4096:
                        return
                except BlockingIOError:
                    return
        else:
            self.read(end)

    def read(self, end: int) -> bool:
        """One read; returns whether there may be more."""
        try:
            data = os.read(end, READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            self.sinks[end].write(data)
            return True
        self.finish(end)
        return False

    def finish(self, end: int) -> None:
        self.poll.unregister(end)
        self.sinks.pop(end).close()
        os.close(end)

    def reap(self) -> None:
        """Collects every child that has ended; remembers how the command did."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid == self.pid:
                self.status = status

    # -- ending ----------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Runs the command to its end; returns the report."""
        started = time.monotonic()
        fault = self.start()
        if fault:
            self.pump(started + LAST_WAIT_S, lambda: self.status is not None)
            self.close()
            return {"fault": fault}
        deadline = started + self.spec["timeout_s"]
        ended = self.pump(deadline, lambda: self.status is not None or self.cancelled)
        seconds = time.monotonic() - started
        left = self.end()
        self.close()
        return {
            "status": self.status if ended and not self.cancelled else None,
            "timed_out": not ended,
            "cancelled": self.cancelled,
            "left": left,
            "seconds": seconds,
        }

    def end(self) -> int:
        """Asks all that is left to end, then ends it; returns how many processes there were."""
        found = set(self.family())
        if not found:
            return 0
        cancelled, self.cancelled = self.cancelled, False
        self.signal_all(signal.SIGTERM)
        # A stopped process hears of nothing before it goes on.
        self.signal_all(signal.SIGCONT)
        until = time.monotonic() + self.spec["grace_s"]
        if not self.pump(until, lambda: not self.family() or self.cancelled):
            found |= set(self.family())
            until = time.monotonic() + LAST_WAIT_S
            while time.monotonic() < until and self.family():
                self.signal_all(signal.SIGKILL)
                self.pump(time.monotonic() + 0.02, lambda: not self.family())
        elif self.cancelled:
            self.signal_all(signal.SIGKILL)
            self.pump(time.monotonic() + LAST_WAIT_S, lambda: not self.family())
        self.cancelled = cancelled or self.cancelled
        return len(found)

    def signal_all(self, number: int) -> None:
        """Signals the process group at once, and then who left it."""
        gone = (ProcessLookupError, PermissionError)
        family = self.family()
        outside = []
        for pid in family:
            with contextlib.suppress(*gone):
                if os.getpgid(pid) != self.pid:
                    outside.append(pid)
        if len(outside) < len(family):
            with contextlib.suppress(*gone):
                os.killpg(self.pid, number)
        for pid in outside:
            with contextlib.suppress(*gone):
                os.kill(pid, number)

    def family(self) -> list[int]:
        """Live descendants; without adoption only whether the process group still has members."""
        if not self.adopts:
            try:
                os.killpg(self.pid, 0)
            except (ProcessLookupError, PermissionError):
                return []
            return [self.pid]
        # Orphans come to this process: no child means no descendant. A process may change its
        # parent while the table is read, so that one look can miss it.
        while self.has_children():
            if found := descendants():
                return found
        return []

    def has_children(self) -> bool:
        self.reap()
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def close(self) -> None:
        for end in list(self.sinks):
            while self.read(end):
                pass
            if end in self.sinks:
                self.finish(end)


def descendants() -> list[int]:
    """Live processes below this one, as one look at the process table shows them."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] not in (b"Z", b"X"):
                children.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    queue = [os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def adopt_orphans() -> bool:
    """Makes this process the parent of orphaned descendants; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def become(
    spec: dict[str, Any], argv: list[str], out: int, err: int, gate: int, fault: int
) -> NoReturn:
    """Turns the forked child into the command; never returns."""
    try:
        parent = os.getppid()
        os.setsid()
        if sys.platform.startswith("linux"):
            # Only for the case that this supervisor itself is killed.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(127)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, *DRIVERS_OWN):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(spec["folder"])
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.read(gate, 1)
        os.execvpe(argv[0], argv, spec["environment"])
    except OSError as error:
        os.write(fault, str(error.errno or errno.EINVAL).encode())
    except BaseException:
        os.write(fault, str(errno.EINVAL).encode())
    os._exit(127)


def say(report: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody may listen any more
        os.write(1, json.dumps(report).encode() + b"\n")


def read_line() -> bytes:
    """The next line of the standard input; empty at its end."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            return b""
        line += part
    return line


def main() -> None:
    for number in (signal.SIGPIPE, *DRIVERS_OWN):
        signal.signal(number, signal.SIG_IGN)
    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    adopts = adopt_orphans()
    while line := read_line():
        supervisor = Supervisor(json.loads(line), wake_read, adopts)
        try:
            report = supervisor.run()
        except OSError as error:
            report = {"fault": error.strerror or str(error)}
            if supervisor.pid:
                supervisor.end()
        say(report)
        if supervisor.cancelled:
            return


if __name__ == "__main__":
    main()
