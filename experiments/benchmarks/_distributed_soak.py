"""Run after run on one Ray cluster whose workers are killed: what is left behind."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from searchlab.executors import RayExecutor
from searchlab.experiments.benchmarks._common import Aim, Journal
from searchlab.testing.faults import Hunter, Unreliable, config_of, recorded, undisturbed
from searchlab.testing.ray_nodes import Node, head

__all__ = ["run_soak"]

EVALUATIONS = 60
WORKER = "ray::SearchlabWorker"
CONNECTIONS = 4  # of Ray alone
SETTLING_S = 30.0  # for actors that end when their run does


def _holdings(node: Node) -> dict[str, float]:
    """What the driver and the cluster have of what may leak, once actors had time to end."""
    gc.collect()
    patience = time.monotonic() + SETTLING_S
    while node.pids(WORKER) and time.monotonic() < patience:
        time.sleep(0.5)
    pages = Path("/proc/self/statm").read_text().split()
    return {
        "actors": len(node.pids(WORKER)),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "shared_memory": len(os.listdir("/dev/shm")),
        "memory_mb": round((int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6, 1),
    }


def _left_by_ray(address: str) -> float:
    """Handles that Ray leaves in a process per connection with an actor, nothing of ours in it."""
    import ray

    class Plain:
        def name(self) -> str:
            return "an actor"

    remote: Any = ray.remote(num_cpus=1)(Plain)
    counts = []
    for _ in range(CONNECTIONS + 1):
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        actor = remote.remote()
        ray.get(actor.name.remote())
        ray.kill(actor)
        ray.shutdown()
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")))
    return (counts[-1] - counts[0]) / CONNECTIONS


def run_soak(journal: Journal, seconds: float) -> None:
    """One driver, one cluster, answers late and twice, workers killed every few seconds."""
    wanted = undisturbed(EVALUATIONS).trace()
    runs = differ = 0
    with tempfile.TemporaryDirectory() as name, head(cpus=0) as (address, _):
        node = Node("--num-cpus", "2", address=address).wait()
        hunter = Hunter(lambda: node.pids(WORKER), 3, pause=(1.5, 3.0))

        def once(number: int) -> bool:
            hunter.armed = False
            executor = RayExecutor(workers=2, deadline=20.0, retries=30, address=address)
            path = Path(name) / f"{number}.db"
            disorder = Unreliable(executor, number)
            records = recorded(path, config_of(EVALUATIONS), disorder, callbacks=[hunter])
            path.unlink()
            return records.trace() == wanted

        try:
            with hunter:
                once(0)  # what is loaded only once is no leak
                left_by_ray = _left_by_ray(address)
                before = _holdings(node)
                began = time.monotonic()
                while time.monotonic() - began < seconds:
                    runs += 1
                    differ += not once(runs)
                lasted = time.monotonic() - began
                after = _holdings(node)
        finally:
            node.kill()
    journal.case(
        "soak",
        {
            "seconds": round(lasted, 1),
            "runs": runs,
            "workers_killed": hunter.strikes,
            "handles_ray_leaves_per_connection": left_by_ray,
            "before": before,
            "after": after,
        },
        seeds=(3,),
        aims=[
            Aim("traces that differ", differ, "at most", 0),
            *[
                Aim(f"more {what} than before", after[key] - before[key], "at most", 0)
                for what, key in (
                    ("actors", "actors"),
                    ("threads", "threads"),
                    ("shared memory", "shared_memory"),
                )
            ],
            # A connection per run, and an actor that was begun again per worker that was killed.
            Aim(
                "more handles than Ray alone leaves",
                after["handles"] - before["handles"] - left_by_ray * (runs + hunter.strikes),
                "at most",
                0,
            ),
            Aim(
                "growth of the driver in MB",
                after["memory_mb"] - before["memory_mb"],
                "at most",
                30,
            ),
            Aim("workers killed", hunter.strikes, "at least", seconds // 20),
        ],
    )
