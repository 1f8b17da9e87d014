"""What a job counts where an algorithm chooses the fidelity and the replicate of its groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError
from searchlab.evaluator import SELECTION_REPLICATE
from searchlab.population import Jobs

if TYPE_CHECKING:
    from searchlab.algorithms.base import Algorithm
    from searchlab.config import Stage

__all__ = ["LevelRule", "Levels"]


@dataclass(frozen=True)
class Levels:
    """One row per job.

    Attributes:
        price: float64 (n,), share of an evaluation at the stage's fidelity.
        counts: bool (n,); measured like all others at the stage's fidelity, so that its value may
            be the best so far.
    """

    price: NDArray[np.float64]
    counts: NDArray[np.bool_]


class LevelRule:
    """Fidelity, replicate and price of the jobs of one stage.

    Most algorithms leave the fidelity and the replicate to the stage. Those with `levels` set them
    in the jobs that they return, one of each per ask group.

    Args:
        stage: its fidelity is what one evaluation of the budget is.
        replicate: the noise block of jobs whose algorithm does not choose.
        algorithm: whose jobs these are.
    """

    def __init__(self, stage: Stage, replicate: int, algorithm: Algorithm) -> None:
        costs = [fidelity.cost for fidelity in stage.evaluator.fidelities]
        self.fidelity = stage.fidelity_index
        self.replicate = replicate
        self.chosen = algorithm.levels
        self._name = algorithm.name
        self._price = np.array(costs) / costs[self.fidelity]

    def set(self, jobs: Jobs, *, stage: int, told_at_ask: int) -> Jobs:
        """Jobs as they are submitted and recorded.

        Raises:
            ConfigError: a fidelity that the evaluator does not have, or a replicate that belongs
                to the final.
        """
        fidelity, replicate = self.fidelity, self.replicate
        if self.chosen:
            n = len(self._price)
            if not -n <= jobs.fidelity < n:
                raise ConfigError(
                    f"{self._name} asks for fidelity {jobs.fidelity}; allowed: 0..{n - 1}"
                )
            if not 0 <= jobs.replicate < SELECTION_REPLICATE:
                raise ConfigError(
                    f"{self._name} asks for replicate {jobs.replicate}; allowed in a search: "
                    f"0..{SELECTION_REPLICATE - 1}"
                )
            fidelity, replicate = jobs.fidelity % n, jobs.replicate
        return replace(
            jobs, fidelity=fidelity, replicate=replicate, stage=stage, told_at_ask=told_at_ask
        )

    def of(self, jobs: Jobs) -> Levels | None:
        """What the jobs of one group count; None where each counts as one."""
        if not self.chosen:
            return None
        n = len(jobs)
        return self.each(np.full(n, jobs.fidelity), np.full(n, jobs.replicate))

    def each(
        self, fidelity: NDArray[np.integer[Any]], replicate: NDArray[np.integer[Any]]
    ) -> Levels | None:
        """What jobs with these fidelities and replicates (n,) count."""
        if not self.chosen:
            return None
        counts = (fidelity == self.fidelity) & (replicate == self.replicate)
        return Levels(self._price[fidelity], counts)
