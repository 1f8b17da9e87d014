"""Runs commands under a supervisor process and says how they ended."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchlab.errors import EvaluationError

__all__ = ["Commands", "Ended"]

_SUPERVISOR = Path(__file__).with_name("_supervisor.py")
_GONE_S = 1.0
_MORE_S = 30.0  # what a supervisor may need beyond deadline and grace


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code; None where it did not exit by itself.
        signal: number of the signal that ended it, 0 without one.
        timed_out: it was ended at its deadline.
        fault: why it could not be started, or not be supervised to its end.
        left: processes that still ran when the command had ended (or was to end).
        seconds: how long it ran.
    """

    code: int | None = None
    signal: int = 0
    timed_out: bool = False
    fault: str = ""
    left: int = 0
    seconds: float = 0.0


class Commands:
    """Runs one command after another; for one thread.

    Each gets a session and a process group of its own. When it ends, or at its deadline, whatever
    is left of it is asked to end (SIGTERM) and after a grace made to (SIGKILL), also processes that
    moved to another session. The same happens when this process dies.
    """

    def __init__(self) -> None:
        self._supervisor: subprocess.Popen[bytes] | None = None

    def run(
        self,
        command: Sequence[str] | str,
        *,
        stdout: Path,
        stderr: Path,
        limit: int,
        timeout_s: float,
        grace_s: float,
        environment: Mapping[str, str],
    ) -> Ended:
        """Runs a command to its end, with everything it starts.

        Args:
            command: arguments, run without a shell; or a text for /bin/sh.
            stdout, stderr: files for its output.
            limit: bytes that are kept of each, the first and the last half.
            timeout_s: deadline in seconds.
            grace_s: time between SIGTERM and SIGKILL in seconds.
            environment: of the command.

        Raises:
            EvaluationError: the supervisor itself cannot be started.
        """
        spec: dict[str, Any] = {
            "folder": os.getcwd(),
            "environment": dict(environment),
            "stdout": str(stdout),
            "stderr": str(stderr),
            "limit": limit,
            "timeout_s": timeout_s,
            "grace_s": grace_s,
        }
        spec |= {"shell": command} if isinstance(command, str) else {"argv": list(command)}
        line = json.dumps(spec).encode() + b"\n"
        supervisor = self._started()
        reports: list[dict[str, Any]] = []
        try:
            _send(supervisor, line)
            _listen(supervisor, timeout_s + grace_s + _MORE_S, reports)
        finally:
            if not reports or "pid" in reports[-1]:
                # Interrupted, or the supervisor is gone or stuck.
                self._give_up(reports, grace_s)
        return _ended(reports)

    def close(self) -> None:
        """Ends the supervisor, and a command that still runs."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            _end(supervisor, _MORE_S)

    def __del__(self) -> None:
        try:  # at the end of the interpreter even `suppress` may be gone
            self.close()
        except Exception:
            return

    def _started(self) -> subprocess.Popen[bytes]:
        if self._supervisor is not None and self._supervisor.poll() is None:
            return self._supervisor
        self.close()
        try:
            # A session of its own: an interrupt at the terminal is this process's to handle.
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise EvaluationError(f"no process can be started: {error.strerror or error}") from None
        return self._supervisor

    def _give_up(self, reports: list[dict[str, Any]], grace_s: float) -> None:
        supervisor, self._supervisor = self._supervisor, None
        assert supervisor is not None
        _end(supervisor, grace_s + _MORE_S, reports)
        if reports and "pid" in reports[-1]:  # it never said how the command ended
            _kill_group(reports[-1]["pid"])


def _kill_group(leader: int) -> None:
    """Ends a process group for good; waits a moment for it to be gone."""
    until = time.monotonic() + _GONE_S
    with suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < until:
            os.killpg(leader, signal.SIGKILL)
            time.sleep(0.002)


def _send(supervisor: subprocess.Popen[bytes], line: bytes) -> None:
    assert supervisor.stdin is not None
    view = memoryview(line)
    with suppress(BrokenPipeError):
        while view:
            view = view[supervisor.stdin.write(view) or 0 :]


def _listen(
    supervisor: subprocess.Popen[bytes], patience: float, reports: list[dict[str, Any]]
) -> None:
    """Adds what the supervisor says of one command, until it ended or its time is up."""
    assert supervisor.stdout is not None
    until = time.monotonic() + patience
    rest, end = b"", supervisor.stdout.fileno()
    poll = select.poll()
    poll.register(end, select.POLLIN)
    while (left := until - time.monotonic()) > 0:
        if not poll.poll(min(left, 60.0) * 1000):
            continue
        part = os.read(end, 1 << 16)
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        reports += [json.loads(line) for line in lines]
        if reports and "pid" not in reports[-1]:
            return


def _end(
    supervisor: subprocess.Popen[bytes],
    patience: float,
    reports: list[dict[str, Any]] | None = None,
) -> None:
    """Closes the supervisor's input, which makes it end its command and itself."""
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    with suppress(OSError):
        supervisor.stdin.close()
    try:
        if reports is not None:
            with suppress(OSError, ValueError):
                _listen(supervisor, patience, reports)
        supervisor.wait(patience)
    except subprocess.TimeoutExpired:
        supervisor.kill()
        supervisor.wait()
    finally:
        supervisor.stdout.close()


def _ended(reports: list[dict[str, Any]]) -> Ended:
    last = reports[-1] if reports else {}
    if "fault" in last:
        return Ended(fault=f"cannot be started: {last['fault']}")
    if "status" not in last:
        return Ended(fault="its supervisor was killed")
    status = last["status"]
    code = None if status is None else os.waitstatus_to_exitcode(status)
    return Ended(
        code=code if code is not None and code >= 0 else None,
        signal=-code if code is not None and code < 0 else 0,
        timed_out=bool(last["timed_out"]),
        left=int(last["left"]),
        seconds=float(last["seconds"]),
    )
