"""Evaluators whose value is a mean over items: candidates that cannot win stop early, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError, EvaluationError
from searchlab.evaluator import Fidelity, Objective, Reproducibility, Signal
from searchlab.population import OK, PRUNED, Evaluations, Jobs
from searchlab.space import Space

__all__ = ["PRUNED_REASON", "ItemEvaluator"]

PRUNED_REASON = "proven worse than its bound"

_SLACK = 1e-9  # of the range: what rounding may do to a sum of items


@dataclass
class ItemEvaluator:
    """A function that scores candidates item by item; the value is the mean over all items.

    A job with a bound is pruned if and only if its loss is beyond the bound, whatever the block:
    as soon as even the best scores on all items that are left could not bring it back, or at the
    end. Its value is then the bound itself, which is what was proven. So a record says the same
    whether the evaluator stopped early, measured everything, or another run's value answered.

    Args:
        function: `f(plans, items, fidelity, seed)` -> scores (len(plans), len(items)); plans is a
            list of decoded dicts, items an int array of item numbers. A score depends on its plan
            and item only.
        space: how candidates are decoded.
        items: how many items there are.
        item_range: (lowest, highest) score that is possible; None = unknown, nothing stops early.
        block: items per call.
        objective: name and direction of the value.
        version: raised by hand when scores change; without one values stay within the run.
        seed: of the evaluator; the replicate is added to it.
        private: the run's name, which stands in for a missing version.
    """

    function: Callable[..., Any]
    space: Space
    items: int
    item_range: tuple[float, float] | None = None
    block: int = 32
    objective: Objective = field(default_factory=lambda: Objective("value"))
    fidelities: tuple[Fidelity, ...] = (Fidelity("full"),)
    reproducibility: Reproducibility = "exact"
    version: int | None = None
    seed: int = 0
    private: str = ""
    prunes: ClassVar[bool] = True
    signals: ClassVar[tuple[Signal, ...]] = ()

    def __post_init__(self) -> None:
        if self.items < 1 or self.block < 1:
            raise ConfigError(f"{self.items} items in blocks of {self.block}; allowed: 1 or more")
        if self.item_range is not None:
            low, high = self.item_range
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ConfigError(f"item_range {self.item_range}; allowed: finite, low <= high")

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return (self.objective,)

    def setup(self) -> None:
        """Nothing to load."""

    def identity(self) -> Mapping[str, Any]:
        name = f"{self.function.__module__}.{self.function.__qualname__}"
        out: dict[str, Any] = {
            "function": name,
            "items": self.items,
            "seed": self.seed,
            "version": self.version,
        }
        if self.version is None:
            out["private"] = self.private
        return out

    def evaluate(self, jobs: Jobs) -> Evaluations:
        """See `Evaluator.evaluate`; `items` holds the scores of candidates that were finished.

        Raises:
            EvaluationError: scores of another shape, or outside `item_range`.
        """
        n, fidelity = len(jobs), self.fidelities[jobs.fidelity].name
        plans = self.space.decode(jobs.population)
        sign = 1.0 if self.objective.direction == "min" else -1.0
        bound = np.full(n, np.nan) if jobs.bound is None else jobs.bound
        scores = np.full((n, self.items), np.nan)
        racing = np.ones(n, dtype=bool)
        for start in range(0, self.items, self.block):
            rows = np.flatnonzero(racing)
            if not len(rows):
                break
            stop = min(start + self.block, self.items)
            answer = self.function(
                [plans[row] for row in rows],
                np.arange(start, stop),
                fidelity,
                self.seed + jobs.replicate,
            )
            scores[rows, start:stop] = self._checked(answer, len(rows), stop - start)
            racing[rows] = ~self._hopeless(scores[rows, :stop], sign, bound[rows])
        # Row by row, so that the mean is the same in every chunk.
        values = np.array([float(row.mean()) for row in scores])
        state = np.full(n, OK, dtype=np.int8)
        beyond = ~racing | (sign * values > bound)
        state[beyond] = PRUNED
        values[beyond] = sign * bound[beyond]
        return Evaluations(
            values=values,
            state=state,
            reason=[PRUNED_REASON if flag else "" for flag in beyond],
            items=[None if flag else row for flag, row in zip(beyond, scores, strict=True)],
        )

    def _hopeless(
        self, seen: NDArray[np.float64], sign: float, bound: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Which rows are beyond their bound whatever the items say that are left."""
        left = self.items - seen.shape[1]
        if self.item_range is None or not left:
            return np.zeros(len(seen), dtype=bool)
        low, high = self.item_range
        best = min(sign * low, sign * high)
        loss = (sign * seen.sum(axis=1) + left * best) / self.items
        hopeless: NDArray[np.bool_] = loss - _SLACK * max(abs(low), abs(high)) > bound
        return hopeless

    def _checked(self, answer: Any, n: int, k: int) -> NDArray[np.float64]:
        try:
            scores = np.asarray(answer, dtype=np.float64)
        except (TypeError, ValueError):
            raise EvaluationError(f"the function returned {answer!r}; allowed: numbers") from None
        if scores.shape != (n, k):
            raise EvaluationError(
                f"the function returned shape {scores.shape} for {n} candidates and {k} items; "
                f"allowed: ({n}, {k})"
            )
        if self.item_range is not None:
            low, high = self.item_range
            wrong = scores[(scores < low) | (scores > high)]
            if len(wrong):
                raise EvaluationError(
                    f"the function returned the score {wrong[0]}; allowed: {low} to {high}"
                )
        return scores
