"""The evaluator of experts in worker processes, which load the model by themselves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from searchlab.evaluators.language.experts import ExpertsEvaluator
from searchlab.evaluators.language.free_active import FreeActiveEvaluator

__all__ = ["TravellingEvaluator", "TravellingTradeOff", "rebuilt"]


class TravellingEvaluator(ExpertsEvaluator):
    """An evaluator that is sent as the options it was made from, not as the model it holds."""

    recipe: tuple[dict[str, Any], str]

    @staticmethod
    def of(evaluator: ExpertsEvaluator, options: Any, stage: str) -> TravellingEvaluator:
        """The same evaluator with this ability.

        Args:
            evaluator: as it was made; its state is shared.
            options: `ExpertsOptions`.
            stage: "prune" or "merge".
        """
        made = TravellingEvaluator.__new__(TravellingEvaluator)
        made.__dict__.update(vars(evaluator))
        made.recipe = (asdict(options), stage)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt, self.recipe


class TravellingTradeOff(FreeActiveEvaluator):
    """The same for candidates with any number of active experts."""

    recipe: tuple[dict[str, Any], str]

    @staticmethod
    def carrying(evaluator: FreeActiveEvaluator, options: Any) -> TravellingTradeOff:
        """The same evaluator with this ability; its state is shared."""
        made = TravellingTradeOff.__new__(TravellingTradeOff)
        made.__dict__.update(vars(evaluator))
        made.recipe = (asdict(options), "front")
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt, self.recipe


def rebuilt(options: dict[str, Any], stage: str) -> ExpertsEvaluator:
    """What `TravellingEvaluator` is on the other side: the model is loaded there."""
    from searchlab.experiments.experts import ExpertsOptions
    from searchlab.experiments.experts_setup import prepare

    loaded = prepare(ExpertsOptions(**options)).load(rankings=False)
    if stage == "front":
        from searchlab.experiments.experts_front import evaluator_of, space_of

        return evaluator_of(loaded, space_of(loaded.prepared))
    if stage == "merge":
        return loaded.merged(loaded.prepared.merging())
    return loaded.evaluator
