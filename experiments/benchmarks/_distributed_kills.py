"""Runs on a Ray cluster of real nodes, each disturbed once: worker, driver or node killed."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from searchlab.experiments.benchmarks._common import Aim, Journal
from searchlab.testing.faults import Fault, disturbed, undisturbed
from searchlab.testing.ray_nodes import Node, head

__all__ = ["run_kills"]

KINDS = ("worker", "node", "driver")
EVALUATIONS = 60


class _Nodes:
    """A head without room for workers, and two nodes with room for all of them each."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.nodes = [self._node().wait(), self._node().wait()]

    def _node(self) -> Node:
        return Node("--num-cpus", "2", address=self.address)

    def workers(self, driver: int) -> list[int]:
        """The workers of searchlab, on whatever node."""
        return [pid for node in self.nodes for pid in node.pids("ray::SearchlabWorker")]

    def raylets(self, driver: int) -> list[int]:
        """What makes nodes nodes, of those that have a worker: all of a node ends with it."""
        busy = [node for node in self.nodes if node.pids("ray::SearchlabWorker")]
        return [pid for node in busy for pid in node.pids("raylet/raylet")]

    def mend(self) -> int:
        """Puts new nodes in the place of dead ones; how many there were."""
        dead = [node for node in self.nodes if not node.pids("raylet/raylet")]
        for node in dead:
            node.kill()
            self.nodes[self.nodes.index(node)] = self._node().wait()
        return len(dead)

    def close(self) -> None:
        """Ends the nodes."""
        for node in self.nodes:
            node.kill()


def run_kills(journal: Journal, runs: int) -> None:
    """So many runs, held against the one that nobody disturbed."""
    wanted = undisturbed(EVALUATIONS).trace()
    killed: Counter[str] = Counter()
    differ = lost = again = left = nodes_lost = 0
    with tempfile.TemporaryDirectory() as name, head(cpus=0) as (address, _):
        nodes = _Nodes(address)
        try:
            for seed in range(runs):
                draw = random.Random(seed)
                kind = KINDS[seed % len(KINDS)]
                victims: Callable[[int], list[int]] = (
                    nodes.raylets if kind == "node" else nodes.workers
                )
                fault = Fault(
                    "driver" if kind == "driver" else "worker",
                    draw.randrange(1, EVALUATIONS - 10),
                    draw.random() * 0.02,
                )
                outcome = disturbed(
                    Path(name) / str(seed),
                    [fault],
                    EVALUATIONS,
                    plan_seed=seed,
                    executor=("--executor", "ray", "--workers", "2", "--ray-address", address),
                    workers=victims,
                )
                killed[kind] += len(outcome.done)
                differ += outcome.records.trace() != wanted
                lost += outcome.lost
                again += outcome.again
                left += outcome.left
                nodes_lost += nodes.mend()
        finally:
            nodes.close()
    figures = {"runs": runs, "evaluations": EVALUATIONS, "kills": dict(killed)}
    journal.case(
        "runs with a kill each",
        {**figures, "nodes_lost": nodes_lost},
        seeds=range(runs),
        aims=[
            Aim("traces that differ", differ, "at most", 0),
            Aim("records lost", lost, "at most", 0),
            Aim("recorded and evaluated again", again, "at most", 0),
            Aim("processes left by drivers", left, "at most", 0),
            Aim("kills", sum(killed.values()), "at least", runs),
        ],
    )
