"""The executor of a Ray cluster: persistent workers on machines that come and go."""

from __future__ import annotations

import atexit
import math
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from searchlab import errors
from searchlab.errors import ConfigError, EvaluationError, SearchlabError, SearchlabWarning
from searchlab.evaluator import Evaluator
from searchlab.executors._given import check_count, evaluator_name
from searchlab.executors._tasks import Broken, Retries
from searchlab.executors.base import Chunk, Done, Usage
from searchlab.executors.ray_cluster import Cluster, Need
from searchlab.executors.ray_pool import Member, Pool, Setting

__all__ = ["RayExecutor"]

PATIENCE = (
    60.0  # seconds that a worker may wait for a node's resources where none is to be waited for
)
LATER = 10.0  # seconds for which others that are being placed are waited for
FIRST_STARTS = 3  # of a worker that died before it was ready
NODES = 2.0  # seconds between looks for new nodes


class RayExecutor:
    """Evaluates in actors of a Ray cluster, which hold the evaluators.

    An actor that dies is replaced, nodes that join get workers, chunks of nodes that are lost are
    begun again elsewhere. Candidates travel; the evaluators are put into the cluster once, so that
    arrays in them are read from the memory that the workers of a node share.

    Args:
        workers: actors; None = as many as the cluster holds, also when it grows.
        deadline: seconds for one attempt at a chunk; None = no limit.
        retries: further attempts per cause; a number stands for deaths and timeouts. A node that is
            lost is no fault of its chunks and not counted.
        threads: torch and BLAS threads per worker.
        address: HOST:PORT of a cluster, "auto" for the one this machine belongs to, None for one of
            our own on this machine.
        cpus, gpus: per worker, from one node; a fraction shares a core or a device.
        memory: bytes per worker, reserved and held: a worker that uses more is replaced, and its
            chunk was lost by a death. 0 = neither.
        resources: custom ones per worker.
        at_once: chunks that each worker evaluates at once, in threads, for evaluators that say
            `thread_safe`.
        runtime_env: of Ray, for the workers.
        missing: "stop" with an error when no worker can be placed, or "wait" for a node.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        deadline: float | None = None,
        retries: Retries | int | None = None,
        threads: int = 1,
        address: str | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
        memory: int = 0,
        resources: Mapping[str, float] | None = None,
        at_once: int = 1,
        runtime_env: Mapping[str, Any] | None = None,
        missing: Literal["stop", "wait"] = "stop",
    ) -> None:
        if retries is None:
            retries = Retries()
        elif isinstance(retries, int):
            retries = Retries(death=retries, timeout=retries)
        if workers is not None:
            check_count("workers", workers, 1, 100_000)
        check_count("threads", threads, 1, 1024)
        check_count("at_once", at_once, 1, 1024)
        for cause in ("death", "timeout", "error"):
            check_count(f"retries ({cause})", getattr(retries, cause), 0, 1000)
        if deadline is not None and not 0 < deadline < math.inf:
            raise ConfigError(f"deadline {deadline!r}; allowed: seconds above 0")
        if missing not in ("stop", "wait"):
            raise ConfigError(f"missing {missing!r}; allowed: stop, wait")
        self._setting = Setting(
            Need(cpus, gpus, memory, dict(resources or {})),
            at_once,
            threads,
            math.inf if deadline is None else deadline,
            retries,
            dict(runtime_env or {}),
        )
        self._address, self._wanted, self._missing = address, workers, missing
        self._counted = 1 if workers is None else workers
        self._cluster: Cluster | None = None
        self._pool: Pool | None = None
        self._evaluators: tuple[Evaluator, ...] = ()
        self._began: float | None = None
        self._closed_usage: Usage | None = None
        self._nodes_at = 0.0
        self._devices: Counter[str] = Counter()

    @property
    def workers(self) -> int:
        """How many chunks are evaluated at once."""
        return self._counted * self._setting.at_once

    # -- before and after ---------------------------------------------------------------------

    def log_to(self, folder: Path) -> None:
        """Keeps what becomes of each worker in a file of this folder, from the next `start` on."""
        self._setting = replace(self._setting, logs=folder)

    def prepare(self) -> Cluster:
        """Checks what can be checked of the address without joining the cluster.

        Raises:
            ConfigError: no cluster answers there, or there is no token for it.
        """
        need = self._setting.need
        cluster = Cluster(self._address, workers=self._wanted or 1, need=need)
        cluster.prepare()
        return cluster

    def check(self, evaluators: tuple[Evaluator, ...]) -> None:
        """Raises ConfigError for an evaluator that cannot be sent, or that does not suit."""
        self.prepare()
        setting = self._setting
        for evaluator in evaluators:
            name = evaluator_name(evaluator)
            if getattr(evaluator, "exclusive", False):
                if setting.need.gpus != int(setting.need.gpus):
                    raise ConfigError(
                        f"{setting.need.gpus} GPUs per worker with {name}, which measures and "
                        "shares no device; allowed: a whole number"
                    )
                if setting.at_once > 1:
                    raise ConfigError(
                        f"{setting.at_once} chunks at once with {name}, which measures and shares "
                        "no device; allowed: 1"
                    )
            if setting.at_once > 1 and not getattr(evaluator, "thread_safe", False):
                raise ConfigError(
                    f"{setting.at_once} chunks at once with {name}; allowed: 1, or an evaluator "
                    "whose attribute thread_safe is true"
                )
            try:
                from ray import cloudpickle

                cloudpickle.dumps(evaluator)
            except Exception as error:
                raise ConfigError(
                    f"{name} cannot be sent to the workers of a cluster "
                    f"({' '.join(str(error).split())}); allowed: an evaluator whose `setup` opens "
                    "what cannot be sent, or executor 'local'"
                ) from None

    def start(self, evaluators: tuple[Evaluator, ...]) -> None:
        """Joins the cluster and waits until workers have set the evaluators up.

        Raises:
            ConfigError: an evaluator that cannot be sent, a cluster that cannot be joined, or one
                without the resources of a worker.
            EvaluationError: a `setup` that raises something else than an error of searchlab.
        """
        self.close()
        wanted, setting = self._wanted, self._setting
        self.check(evaluators)
        cluster = self.prepare()
        self._evaluators, self._devices = evaluators, Counter()
        self._began, self._closed_usage = None, None
        self._cluster = cluster
        atexit.register(self.close)
        try:
            cluster.join()
            import ray

            fitting = max(1, self._fitting(cluster))
            pool = self._pool = Pool(cluster, evaluators, [ray.put(evaluators)], setting)
            pool.grow(fitting if wanted is None else wanted)
            self._counted = max(1, len(pool.members))
            self._wait_for_workers(pool, min(fitting, len(pool.members)))
            self._note_devices(pool)
        except BaseException:
            self.close()
            raise

    def _fitting(self, cluster: Cluster) -> int:
        """How many workers the nodes hold; without room for any an error, or said."""
        if not (fitting := cluster.capacity()):
            if self._missing == "stop":
                raise ConfigError(f"{cluster.lacking()}; allowed: less, or missing='wait'")
            # The workers are asked for nevertheless, so that an autoscaler knows what is wanted.
            warnings.warn(f"waiting: {cluster.lacking()}", SearchlabWarning, stacklevel=3)
        return fitting

    def _wait_for_workers(self, pool: Pool, expected: int) -> None:
        """Until all workers that fit are ready, or some are and others find no room."""
        until = time.monotonic() + PATIENCE
        later = math.inf
        while pool.count("ready") < expected:
            pool.step(0.25)
            for member in pool.members:
                broken = member.broken
                # What a worker says of itself would be the same again; a death may be an accident.
                accident = broken is not None and broken.step == "boot" and broken.error
                if broken is not None and (not accident or member.failed_starts >= FIRST_STARTS):
                    _refuse(member, broken, self._evaluators)
            now = time.monotonic()
            if pool.count("setting up"):
                until, later = now + PATIENCE, math.inf
            elif pool.count("ready"):
                later = min(later, now + LATER)
                if now >= later:
                    return
            elif now >= until:
                text = (
                    f"no worker found room within {PATIENCE:g} s; it needs {self._setting.need}, "
                    f"free are {pool.cluster.free()}"
                )
                if self._missing == "stop":
                    raise ConfigError(f"{text}; allowed: less, or missing='wait'")
                if pool.cluster.capacity():  # otherwise it was said
                    warnings.warn(f"waiting: {text}", SearchlabWarning, stacklevel=3)
                until = math.inf

    def close(self) -> None:
        """Ends the workers at once; open chunks are dropped."""
        pool, cluster = self._pool, self._cluster
        if cluster is None:
            return
        self._closed_usage = self.usage()
        self._pool = self._cluster = None
        if pool is not None:
            pool.close()
        cluster.leave()
        atexit.unregister(self.close)

    # -- chunks -------------------------------------------------------------------------------

    def has_room(self) -> bool:
        """Whether the workers could begin with another chunk soon."""
        pool = self._running()
        return pool.open < pool.room

    def submit(self, chunk: Chunk) -> None:
        """Queues a chunk; it is sent by the next `wait`, with others."""
        if self._began is None:
            self._began = time.monotonic()
        self._running().submit(chunk)

    def wait(self, timeout: float | None = None) -> list[Done]:
        """All chunks finished by now; waits for one if any is open, at most `timeout` seconds."""
        pool = self._running()
        until = math.inf if timeout is None else time.monotonic() + timeout
        while pool.open or pool.done:
            pool.step(max(0.0, min(3600.0, until - time.monotonic())))
            self._look_for_nodes(pool)
            if pool.done or time.monotonic() >= until:
                break
        out, pool.done = pool.done, []
        return out

    def withdraw(self) -> list[Chunk]:
        """Takes back what was submitted and no worker has, or that is to be begun again."""
        return [] if self._pool is None else self._pool.withdraw()

    def _look_for_nodes(self, pool: Pool) -> None:
        now = time.monotonic()
        if now < self._nodes_at:
            return
        self._nodes_at = now + NODES
        if self._wanted is None and pool.cluster.check_alive():
            pool.grow(pool.cluster.capacity())
            self._counted = max(1, len(pool.members))
        self._note_devices(pool)

    def _note_devices(self, pool: Pool) -> None:
        """Says when values come from several types of devices."""
        devices = Counter(member.device for member in pool.members if member.device)
        if devices.keys() <= self._devices.keys():
            return
        self._devices = devices
        if len(devices) < 2:
            return
        shown = ", ".join(f"{count} on {name}" for name, count in sorted(devices.items()))
        bound = [
            objective.name
            for evaluator in self._evaluators
            for objective in evaluator.objectives
            if objective.scope == "device_bound"
        ]
        if bound:
            raise ConfigError(
                f"workers: {shown}; objective {bound[0]!r} belongs to one type of device; allowed: "
                "a resource that only nodes of one type have"
            )
        warnings.warn(
            f"workers: {shown}; values may differ in their last digits", SearchlabWarning, 2
        )

    # -- figures ------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """How busy the workers were so far."""
        pool = self._pool
        if pool is None:
            return self._closed_usage or Usage(self.workers, 0.0, 0.0)
        now = time.monotonic() if pool.open else pool.last
        wall = 0.0 if self._began is None else max(0.0, now - self._began)
        return Usage(self.workers, pool.busy_s, wall, pool.deaths, pool.timeouts, pool.repeats)

    def activity(self) -> dict[str, Any]:
        """What the workers do now, for `show --watch`."""
        return {} if self._pool is None else self._pool.activity()

    def pids(self) -> list[int]:
        """Process numbers of the workers, each on its own node."""
        members = [] if self._pool is None else self._pool.members
        return [int(m.where["pid"]) for m in members if m.state == "ready"]

    def devices(self) -> dict[str, int]:
        """How many workers there are by type of device."""
        return dict(self._devices)

    def _running(self) -> Pool:
        if self._pool is None:
            raise EvaluationError("the executor is not started; allowed: start it first")
        return self._pool


def _refuse(member: Member, broken: Broken, evaluators: tuple[Evaluator, ...]) -> None:
    """Raises what a worker that could not start means."""
    what = f"{broken.error}: {broken.text}" if broken.error else broken.text
    where = member.where.get("host", "a node")
    where = f"{where} ({member.where['ip']})" if "ip" in member.where else where
    if broken.step == "load":
        names = ", ".join(evaluator_name(evaluator) for evaluator in evaluators)
        raise ConfigError(
            f"{names} cannot be loaded on node {where} ({what}); allowed: modules that are "
            "installed on every node, or sent by a runtime environment"
        )
    if broken.step == "paths":
        raise errors.DataError(f"node {where}: {broken.text}")
    if broken.step == "boot":
        raise ConfigError(
            f"a worker on node {where} cannot start: {what}; allowed: searchlab of one version on "
            "all nodes"
        )
    known: object = getattr(errors, broken.error, None)
    if isinstance(known, type) and issubclass(known, SearchlabError):
        raise known(f"node {where}: {broken.text}")
    raise EvaluationError(f"setup of an evaluator failed on node {where}: {what}")
