"""What executors say of what they are given."""

from __future__ import annotations

from searchlab.errors import ConfigError
from searchlab.evaluator import Evaluator, FunctionEvaluator

__all__ = ["check_count", "evaluator_name"]


def check_count(name: str, value: int, low: int, high: int) -> None:
    """Raises ConfigError unless `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} {value!r}; allowed: {low} to {high}")


def evaluator_name(evaluator: Evaluator) -> str:
    """What an error calls an evaluator: its class, or the function it calls and its module."""
    if isinstance(evaluator, FunctionEvaluator):
        function = evaluator.function
        name = getattr(function, "__qualname__", type(function).__name__)
        return f"function {name!r} of {getattr(function, '__module__', '?')}"
    return f"evaluator {type(evaluator).__name__}"
