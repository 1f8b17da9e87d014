"""An evaluator whose values come from elsewhere: candidates are asked for, results are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from searchlab.errors import ConfigError, EvaluationError
from searchlab.evaluator import Fidelity, Objective, Signal
from searchlab.outcomes import Constraint
from searchlab.population import Evaluations, Jobs

__all__ = ["ToldEvaluator"]


@dataclass
class ToldEvaluator:
    """Says what `searchlab tell` will bring; evaluates nothing by itself.

    Args:
        objectives: what results report; several are traded off unless one of them steers.
        constraints: bounds on what results report.
        fidelities: handed out by name; the last is the truth.
        seed: from which the seed of every replicate is made.
        version: raised by hand when the values' origin changes.

    Raises:
        ConfigError: no objective, or a name that is given twice.
    """

    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()
    fidelities: tuple[Fidelity, ...] = (Fidelity("full"),)
    signals: tuple[Signal, ...] = ()
    reproducibility: Literal["noisy"] = "noisy"
    seed: int = 0
    version: int = 1
    probe: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for kind, names in (
            ("objective", [o.name for o in self.objectives]),
            ("constraint", [c.name for c in self.constraints]),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"{kind} {name!r} is given twice; allowed: once")
        if not self.objectives or not self.fidelities:
            raise ConfigError("results without objectives or fidelities; allowed: one or more")

    def setup(self) -> None:
        """Nothing to load."""

    def identity(self) -> Mapping[str, Any]:
        return {
            "version": self.version,
            "seed": self.seed,
            "constraints": [c.name for c in self.constraints],
        }

    def evaluate(self, jobs: Jobs) -> Evaluations:
        """Raises EvaluationError: values of such a run are told."""
        raise EvaluationError(
            "this run's values come from elsewhere; allowed: searchlab ask, searchlab tell"
        )
