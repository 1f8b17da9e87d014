"""A user's own sampler of Optuna as the algorithm of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from searchlab.algorithms.base import Algorithm, Seeds
from searchlab.algorithms.optuna import Parameters, Sampled
from searchlab.config import AlgorithmSpec
from searchlab.errors import ConfigError
from searchlab.space import Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

    from searchlab.evaluator import Fidelity

__all__ = ["SamplerAlgorithm", "distributions"]


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """What Optuna knows of a space: name -> distribution of every element.

    Elements of shaped variables are named "key[i,j]". Order, sums, steps of reals, conditions and
    constraints have no distribution; `Space.repair` sees to them.

    Raises:
        ConfigError: a variable that has neither labels nor a range.
    """
    return Parameters(space).distributions


class SamplerAlgorithm(AlgorithmSpec):
    """A sampler of Optuna that proposes into our spaces: `search(..., algorithm=this)`.

    The loop, the executor, the study, repeats and resuming are ours. The sampler is made anew for
    every proposal, over a study that holds what was told, so it has to decide by the values of
    finished trials alone; see `searchlab.algorithms.optuna.Sampled`. Resuming needs the same
    factory again.

    Args:
        sampler_factory: makes a sampler from a seed: `lambda seed: TPESampler(seed=seed)`.

    Raises:
        ConfigError: not a factory of samplers, or of one that keeps state (when a search begins).
    """

    def __init__(self, sampler_factory: Callable[[int], BaseSampler]) -> None:
        if not callable(sampler_factory):
            raise ConfigError(
                f"sampler factory {sampler_factory!r}; allowed: a function from a seed to a "
                "sampler, such as lambda seed: TPESampler(seed=seed)"
            )
        super().__init__("optuna")
        object.__setattr__(self, "sampler_factory", sampler_factory)

    def kind(self) -> None:
        """No registered class."""
        return None

    def build(
        self,
        space: Space,
        *,
        seed: int,
        first_id: int,
        seeds: Seeds | None,
        fidelities: Sequence[Fidelity] = (),
        signals: object = None,
    ) -> Algorithm:
        """The algorithm at the beginning of a stage; it measures at the stage's fidelity alone."""
        factory: Any = vars(self)["sampler_factory"]
        return Sampled(space, sampler=factory, seed=seed, first_id=first_id, seeds=seeds)
