"""Real nodes of a Ray cluster on this machine: started, killed, and cleared away."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Node", "command_of", "descendants", "environment", "free_port", "head"]

ROOT = Path(__file__).resolve().parents[2]
STARTS = 3  # of a node that Ray gave up waiting for
RAY = Path(sys.executable).with_name("ray")


def environment() -> dict[str, str]:
    """A token of this process's own, for its nodes and for its drivers."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """Outside of the range that Ray gives to its workers."""
    for port in range(20_000 + os.getpid() % 4_000, 32_000):
        with suppress(OSError), socket.socket() as taken:
            taken.bind(("", port))
            return port
    raise OSError("no free port")


class Node:
    """One node: `ray start --block` with everything below it.

    Args:
        more: further options of `ray start`.
        address: of the head to join; "" = this is the head, at `port`.
        variables: further environment variables.
    """

    def __init__(
        self,
        *more: str,
        address: str = "",
        port: int = 0,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        place = ["--address", address] if address else ["--head", "--port", str(port)]
        place += [] if address else ["--include-dashboard", "false"]
        store = ["--object-store-memory", "80000000"]
        self._words = ["start", "--block", "--disable-usage-stats", *place, *store, *more]
        self._environment = {**environment(), **(variables or {})}
        self._begin()

    def _begin(self) -> None:
        self.log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(RAY), *self._words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> Node:
        """Until it is up; Ray itself gives a node thirty seconds, too few on a busy machine."""
        starts = 1
        while "Ray runtime started" not in (text := Path(self.log.name).read_text("utf-8")):
            if self.process.poll() is not None:
                if starts == STARTS or "timed out during startup" not in text:
                    raise OSError(f"ray start ended with {self.process.returncode}: {text[-2000:]}")
                starts += 1
                self.kill()
                self._begin()
            time.sleep(0.05)
        return self

    def pids(self, name: str = "") -> list[int]:
        """Its processes whose command holds a name, apart from `ray start` itself."""
        return [pid for pid in descendants(self.process.pid) if name in command_of(pid)]

    def kill(self) -> None:
        """SIGKILL to all of it at once."""
        for pid in [*self.pids(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def descendants(pid: int) -> list[int]:
    """All processes below one, parents first."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text("utf-8").rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    out, line = [], [pid]
    while line:
        below = parents.get(line.pop(), [])
        out += below
        line += below
    return out


def command_of(pid: int) -> str:
    """The command line of a process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text("utf-8").replace("\0", " ")
    return ""


@contextmanager
def head(
    *more: str, cpus: int = 4, variables: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Node]]:
    """A cluster of one node: its address, and the node.

    Deaths of nodes are noticed after two seconds, not after the fifteen that Ray takes by itself.
    """
    environment()  # before this process loads Ray
    import ray

    port = free_port()
    watch = {
        "RAY_health_check_initial_delay_ms": "500",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "4",
    }
    node = Node("--num-cpus", str(cpus), *more, port=port, variables={**watch, **(variables or {})})
    try:
        node.wait()
        yield f"{ray.util.get_node_ip_address()}:{port}", node
    finally:
        node.kill()
