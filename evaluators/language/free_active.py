"""Candidates that differ in how many experts a token gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError
from searchlab.evaluators.language.experts import ExpertsEvaluator
from searchlab.evaluators.language.intervals import Summary
from searchlab.evaluators.language.layered import LayeredForward
from searchlab.evaluators.noise import Split
from searchlab.population import Evaluations, Jobs, Population

__all__ = ["FreeActiveEvaluator"]


class FreeActiveEvaluator(ExpertsEvaluator):
    """Scores candidates of kept experts, each with its own number of active ones.

    Candidates with equally many go through the model together.
    """

    _active_of: Callable[[Population], NDArray[np.int64]]

    @classmethod
    def of(
        cls, evaluator: ExpertsEvaluator, active_of: Callable[[Population], NDArray[np.int64]]
    ) -> FreeActiveEvaluator:
        """The same evaluator with this ability.

        Args:
            evaluator: of masks; its state is shared.
            active_of: experts per token of candidates, int64 (n,).

        Raises:
            ConfigError: an evaluator whose candidates are no masks.
        """
        if not isinstance(evaluator.forward, LayeredForward):
            raise ConfigError("a free number of active experts needs candidates that are masks")
        made = cls.__new__(cls)
        made.__dict__.update(vars(evaluator))
        made._active_of = active_of
        return made

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "active": "free"}

    def evaluate(self, jobs: Jobs) -> Evaluations:
        """See `ExpertsEvaluator.evaluate`."""
        parts: list[Evaluations] = []
        order: list[int] = []
        for active, rows in self._alike(jobs.population):
            with self._routed(active):
                parts.append(super().evaluate(jobs.take(rows)))
            order += rows.tolist()
        if len(parts) == 1:
            return parts[0]
        return _joined(parts).take(np.argsort(order).tolist())

    def summaries(self, population: Population, split: Split) -> list[Summary]:
        """See `ExpertsEvaluator.summaries`."""
        out: dict[int, Summary] = {}
        for active, rows in self._alike(population):
            with self._routed(active):
                found = super().summaries(population.take(rows), split)
            out.update(zip(rows.tolist(), found, strict=True))
        return [out[row] for row in range(len(population))]

    def _alike(self, population: Population) -> list[tuple[int, NDArray[np.int64]]]:
        """(active experts, rows that have them), the most first."""
        active = self._active_of(population)
        return [(int(k), np.flatnonzero(active == k)) for k in np.unique(active)[::-1]]

    def _routed(self, active: int) -> Any:
        forward: Any = self.forward
        return forward.routed(active=active, flat=forward.flat, router_mode=forward.router_mode)


def _joined(parts: list[Evaluations]) -> Evaluations:
    def stacked(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    return Evaluations(
        values=stacked("values"),
        state=stacked("state"),
        reason=[text for part in parts for text in part.reason or ()],
        signals=stacked("signals"),
        cost_s=stacked("cost_s"),
        items=[row for part in parts for row in part.items or ()],
    )
