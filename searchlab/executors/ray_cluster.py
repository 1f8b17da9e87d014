"""Joining a Ray cluster: addresses, tokens, versions, and what its nodes have room for."""

from __future__ import annotations

import atexit
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from searchlab.errors import ConfigError, EvaluationError
from searchlab.executors._ray_hello import REACH, check_head

__all__ = ["Cluster", "Need", "is_loopback", "split_address"]

GONE = 8.0  # seconds after which a head that cannot be reached is lost; Ray itself aborts at 60
LEAVE = 5.0  # seconds that leaving a cluster may take
STORE = 200_000_000  # bytes of the object store of a cluster of our own, at least
_MODE, _TOKEN, _TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_NOT_CUSTOM = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True)
class Need:
    """What one worker takes from its node.

    Attributes:
        cpus, gpus: cores and devices; a fraction shares one.
        memory: bytes; 0 = no claim and no limit.
        resources: custom ones.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0
    resources: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("CPUs", self.cpus), ("GPUs", self.gpus), *self.resources.items()):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{value!r} {name} per worker; allowed: a number")
            if not 0 <= value < 1e6 or (value > 1 and value != int(value)):
                raise ConfigError(
                    f"{value} {name} per worker; allowed: 0 to 1, or a whole number above"
                )
        for name in self.resources:
            if name in _NOT_CUSTOM or not name.strip():
                known = ", ".join(_NOT_CUSTOM)
                raise ConfigError(
                    f"custom resource {name!r}; allowed: any name but {known}, which have options "
                    "of their own"
                )
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 0:
            raise ConfigError(f"memory {self.memory!r} per worker; allowed: bytes, 0 = no limit")

    def as_resources(self) -> dict[str, float]:
        """The amounts by Ray's names, without zeros."""
        named = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory, **self.resources}
        return {name: float(value) for name, value in named.items() if value}

    def fits(self, free: Mapping[str, float]) -> int:
        """How many workers a node with these resources holds."""
        wanted = self.as_resources()
        shares = [int(free.get(name, 0.0) / value + 1e-9) for name, value in wanted.items()]
        return min(shares, default=1_000)

    def __str__(self) -> str:
        return _amounts(self.as_resources()) or "nothing"


class Cluster:
    """A connection of this process to a cluster.

    Args:
        address: HOST:PORT of the head, "auto" for a cluster that this machine belongs to, None for
            a new one on this machine that ends with this process.
        workers, need: what a new one has to hold.
        store: bytes of the object store of a new one.

    Raises:
        ConfigError: an address that is not one, a cluster without a token beyond this machine, or
            other versions than here.
    """

    def __init__(self, address: str | None, *, workers: int, need: Need, store: int = 0) -> None:
        self.address, self._workers, self._need = address, workers, need
        self._store = max(store, STORE)
        self._own = False
        self._head: tuple[str, int] | None = None
        self.lost = False  # for good: every call of Ray's would hang
        self._missed: float | None = None  # since when the head does not answer

    def prepare(self) -> None:
        """Checks the address and settles how to authenticate, which Ray reads when it is loaded."""
        given = _given(self.address)
        if given is not None:
            check_token(given[0])
            check_head(given)
        else:
            _use_token()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

    def join(self) -> None:
        """Connects; a connection that exists already is used and left alone."""
        with _signals_kept():
            import ray

            if not ray.is_initialized():
                self._connect(ray)
                self._own = True
        self._head = split_address(ray.get_runtime_context().gcs_address)
        given = _given(self.address)
        if given is not None and not self._own and not _same(given, self._head):
            shown = ":".join(map(str, self._head))
            raise ConfigError(
                f"address {self.address!r}; this process is connected to the cluster at {shown} "
                "already, and no other is allowed until ray.shutdown()"
            )
        check_token(self._head[0])
        if not is_loopback(self._head[0]) and os.environ.get(_MODE, "").lower() != "token":
            raise ConfigError(
                f"this process joined the Ray cluster at {self._head[0]} without a token; allowed: "
                f"{_MODE}=token before Ray is loaded"
            )

    def _connect(self, ray: Any) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            quiet |= self._room()
        try:
            ray.init(address=self.address or "local", **quiet)
        except ConnectionError as error:
            if "AuthToken" in str(error.__cause__):
                raise ConfigError(
                    f"the cluster at {self.address!r} does not take the token of this process; "
                    f"allowed: that of its nodes in {_TOKEN}, {_TOKEN_FILE} or ~/.ray/auth_token"
                ) from error
            raise ConfigError(
                f"no Ray cluster can be joined at {self.address!r} ({_line(error)}); allowed: "
                "HOST:PORT as `ray start --head` prints it, auto, or none for this machine"
            ) from error
        except RuntimeError as error:
            if "mismatch" in str(error).lower():
                raise ConfigError(
                    f"the cluster at {self.address!r} runs other versions: {_line(error)}; "
                    "allowed: the Ray and the Python of this process"
                ) from error
            raise ConfigError(f"the cluster at {self.address!r}: {_line(error)}") from error
        except ValueError as error:
            raise ConfigError(f"the cluster at {self.address!r}: {_line(error)}") from error

    def _room(self) -> dict[str, Any]:
        """What a new cluster on this machine is given, so that all workers fit."""
        need, workers = self._need, max(1, self._workers)
        cores = max(os.cpu_count() or 1, int(workers * need.cpus + 0.999))
        return {
            "num_cpus": cores,
            "resources": {name: value * workers for name, value in need.resources.items()} or None,
            "include_dashboard": False,
            "object_store_memory": self._store,
        }

    def leave(self) -> None:
        """Disconnects from what `join` connected to; never waits long for a cluster that hangs."""
        if not self._own:
            return
        self._own = False
        import ray

        if self.lost:
            _let_go(ray)
        leaving = threading.Thread(target=ray.shutdown, daemon=True)
        leaving.start()
        leaving.join(LEAVE)

    def check_alive(self) -> bool:
        """Whether the head answers.

        Raises:
            EvaluationError: it has not for some seconds.
        """
        if self._head is None:
            return True
        try:
            socket.create_connection(self._head, REACH).close()
        except OSError as error:
            now = time.monotonic()
            self._missed = now if self._missed is None else self._missed
            if now - self._missed < GONE:
                return False
            where = ":".join(map(str, self._head))
            self.lost = True
            raise EvaluationError(
                f"the head of the Ray cluster at {where} is gone ({_line(error)}); what was "
                "recorded is kept, and `searchlab resume` goes on, also on another cluster"
            ) from error
        self._missed = None
        return True

    # -- nodes ----------------------------------------------------------------------------------

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes that are alive, by their ids."""
        import ray

        return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}

    def capacity(self) -> int:
        """How many workers all nodes hold together, whoever else uses them."""
        return sum(self._need.fits(node["Resources"]) for node in self.nodes().values())

    def lacking(self) -> str:
        """Why a worker does not fit: what it needs and what each node has."""
        shown = [
            f"{node['NodeManagerHostname']} has {_amounts(_countable(node['Resources'])) or '-'}"
            for node in self.nodes().values()
        ]
        return f"a worker needs {self._need} on one node; {'; '.join(shown) or 'there is no node'}"

    def free(self) -> str:
        """What is free now, over all nodes."""
        import ray

        return _amounts(_countable(ray.available_resources())) or "nothing"


# -- addresses and tokens ---------------------------------------------------------------------


def split_address(address: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        ConfigError: anything but HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"address {address!r} of a Ray cluster; allowed: HOST:PORT or auto")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether a host can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token(host: str) -> None:
    """Makes sure that what is sent beyond this machine carries a token.

    Raises:
        ConfigError: authentication is switched off, or there is no token.
    """
    mode = os.environ.get(_MODE, "token").lower()
    if is_loopback(host):
        _use_token()
        return
    if mode != "token":
        raise ConfigError(
            f"{_MODE}={mode} with the Ray cluster at {host}; allowed beyond 127.0.0.1: token"
        )
    if not _has_token():
        raise ConfigError(
            f"no token for the Ray cluster at {host}; allowed: that of its nodes in {_TOKEN}, in "
            f"the file {_TOKEN_FILE} or in ~/.ray/auth_token"
        )
    _use_token()


def _has_token() -> bool:
    if os.environ.get(_TOKEN):
        return True
    path = os.environ.get(_TOKEN_FILE)
    return (Path(path) if path else Path.home() / ".ray" / "auth_token").is_file()


def _use_token() -> None:
    """Ray sends a token only where its mode says so, which it reads when it is loaded."""
    if _MODE in os.environ or not _has_token():
        return
    os.environ[_MODE] = "token"
    if "ray" in sys.modules:
        with suppress(Exception):  # a version that reads it anew
            from ray._raylet import Config  # type: ignore[attr-defined]

            Config.initialize("")


def _given(address: str | None) -> tuple[str, int] | None:
    return None if address in (None, "auto") else split_address(str(address))


def _let_go(ray: Any) -> None:
    """Drops what Ray would do when this process ends: it would wait for the head, then abort."""
    atexit.unregister(ray.shutdown)
    worker = sys.modules["ray._private.worker"]
    atexit.unregister(getattr(worker, "shutdown", ray.shutdown))
    if sys.excepthook is getattr(worker, "custom_excepthook", None):
        sys.excepthook = sys.__excepthook__


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes signals for itself, which belong to the run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _same(one: tuple[str, int], other: tuple[str, int]) -> bool:
    """Whether two addresses mean one place; Ray writes this machine's own for a loopback one."""
    if one[1] != other[1]:
        return False
    try:
        if is_loopback(one[0]):
            import ray

            return other[0] == str(ray.util.get_node_ip_address()) or is_loopback(other[0])
        return one == other or socket.gethostbyname(one[0]) == socket.gethostbyname(other[0])
    except OSError:
        return False


def _countable(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in resources.items() if ":" not in name}


def _amounts(resources: Mapping[str, float]) -> str:
    parts = []
    for name, value in sorted(resources.items()):
        if name.startswith("object_store"):
            continue
        memory = name == "memory"
        parts.append(f"memory {value / 1e9:.3g} GB" if memory else f"{name} {value:g}")
    return ", ".join(parts)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
