"""The options of `run` and `resume` that say where candidates are evaluated."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from searchlab.errors import ConfigError
from searchlab.interruption import GRACE_S

if TYPE_CHECKING:
    from searchlab.config import SearchConfig
    from searchlab.executors.options import ExecutorOptions

__all__ = ["add_flags", "check_pace", "executor_options", "with_pace"]

_PACE = ("lag", "chunk")
_CLUSTER = {  # flag -> option of executor ray
    "ray_address": "address",
    "gpus_per_worker": "gpus",
    "cpus_per_worker": "cpus",
    "resources": "resources",
    "at_once": "at_once",
    "no_room": "missing",
}


def add_flags(parser: argparse.ArgumentParser, *, taken: Collection[str] = ()) -> None:
    """Adds the options, apart from those that a recipe has itself."""
    group = parser.add_argument_group("workers")
    group.add_argument("--executor", metavar="NAME", help="local, processes or ray; by the workers")
    group.add_argument("--workers", type=int, metavar="N", help="worker processes (1)")
    group.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="for one call of the evaluator; no limit"
    )
    group.add_argument(
        "--retries",
        type=int,
        metavar="N",
        help="of a call whose worker died or was too slow (3 and 1)",
    )
    group.add_argument(
        "--memory-per-worker",
        dest="memory_per_worker",
        type=_bytes,
        metavar="SIZE",
        help="such as 2GiB; a worker that uses more is replaced; on a cluster it is also reserved; "
        "no limit",
    )
    group.add_argument(
        "--stop-grace",
        type=float,
        default=GRACE_S,
        metavar="SECONDS",
        help="that evaluations have to finish after Ctrl-C, SIGTERM or SIGUSR1 "
        f"({GRACE_S:g}); a second signal stops at once",
    )
    _add_cluster_flags(parser.add_argument_group("workers of executor ray"), taken)
    opened = "fixed when the run is opened"
    if "lag" not in taken:
        text = f"evaluations open at once, or free; {opened} (2 per worker)"
        group.add_argument("--lag", type=_lag, metavar="N", help=text)
    if "chunk" not in taken:
        text = f"candidates per call of the evaluator; {opened}"
        group.add_argument("--chunk", type=int, metavar="N", help=text)


def _add_cluster_flags(group: argparse._ArgumentGroup, taken: Collection[str]) -> None:
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="of a cluster, or auto (one of our own on this machine)",
    )
    group.add_argument(
        "--gpus-per-worker", type=float, metavar="N", help="of one node; a fraction shares one (0)"
    )
    group.add_argument(
        "--cpus-per-worker", type=float, metavar="N", help="reserved on the node (1)"
    )
    group.add_argument(
        "--resources", type=_resources, metavar="NAME=N,...", help="custom ones per worker"
    )
    group.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="calls per worker, where the evaluator allows threads (1)",
    )
    if "missing" in taken:  # a recipe's own
        return
    group.add_argument(
        "--missing",
        dest="no_room",
        choices=("stop", "wait"),
        help="what to do while no node has room for a worker (stop)",
    )


def _resources(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in text.split(",")]
    found = {}
    with suppress(ValueError):
        found = {name.strip(): float(value) for name, _, value in pairs}
    if len(found) != len(pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r}; allowed: names with amounts, each once, such as H200=1,disk=0.5"
        )
    return found


def _lag(text: str) -> int | str:
    return text if text == "free" else int(text)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+)\s*([kKMGT]?)(i?)B?", text.strip())
    size = 0
    if found is not None:
        with suppress(ValueError):
            power = "_kMGT".index(found[2].replace("K", "k") or "_")
            size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a size such as 500MB or 2GiB")
    return size


def executor_options(given: argparse.Namespace) -> ExecutorOptions:
    """Which executor the options ask for; a wrong combination is an error at once."""
    from searchlab.executors import ExecutorOptions, RayExecutor

    more = {option: getattr(given, flag, None) for flag, option in _CLUSTER.items()}
    options = ExecutorOptions(
        given.executor, given.workers, given.deadline, given.retries, given.memory_per_worker, more
    )
    executor = options.build()
    if isinstance(executor, RayExecutor):
        executor.prepare()
    executor.close()
    return options


def with_pace(config: SearchConfig, given: argparse.Namespace) -> SearchConfig:
    """The configuration with the lag and the chunk that the options ask for."""
    lag, chunk = (getattr(given, name, None) for name in _PACE)
    if lag is not None:  # text where the recipe has this option itself
        number: Any = _lag(lag) if isinstance(lag, str) else lag
        config = replace(config, lag=number)
    if chunk is not None:
        stages = tuple(replace(stage, chunk=None) for stage in config.stages)
        config = replace(config, chunk=int(chunk), stages=stages)
    return config


def check_pace(given: argparse.Namespace, pace: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Raises ConfigError where a run was opened with another lag or chunk than is asked for."""
    for name in _PACE:
        wanted = getattr(given, name)
        stages = (pace or {}).values()
        free = name == "lag" and any(stage.get("free") for stage in stages)
        stored = ["free"] if free else sorted({stage[name] for stage in stages})
        if wanted is not None and stored and stored != [wanted]:
            raise ConfigError(
                f"--{name} {wanted}; the run was opened with {', '.join(map(str, stored))}, and "
                "nothing else is allowed"
            )
