"""Whether the conditions of a space's variables make sense."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from searchlab.errors import SpaceError
from searchlab.variables import ActiveBelow, ActiveIf, Choice, Integer, Ordered, Variable

__all__ = ["check_conditions"]


def check_conditions(variables: Mapping[str, Variable]) -> None:
    """Raises SpaceError where a condition names what it cannot depend on."""
    seen: dict[str, Variable] = {}
    for key, variable in variables.items():
        for condition in variable.when:
            other = seen.get(condition.variable)
            if other is None:
                raise SpaceError(
                    f"{key!r} depends on {condition.variable!r}, not declared before it"
                )
            if isinstance(condition, ActiveBelow) and not (
                isinstance(other, Integer) and other.shape == () and variable.shape
            ):
                raise SpaceError(f"{key!r}: 'below' needs a scalar integer and a shape")
            parts = isinstance(condition, ActiveBelow) and len(variable.shape) == 1
            if parts and variable.grouped and not isinstance(variable, Ordered):
                raise SpaceError(
                    f"{key!r}: 'below' would cut a {variable.kind}; allowed: with a shape, so "
                    "that whole groups are switched"
                )
            if isinstance(condition, ActiveIf):
                if not isinstance(other, Choice):
                    raise SpaceError(f"{key!r} depends on {condition.variable!r}, no choice")
                missing = [x for x in condition.labels if x not in other.labels]
                if missing:
                    raise SpaceError(f"{key!r} depends on unknown labels {missing}")
                if not _fits_into(other.shape, variable.shape):
                    raise SpaceError(
                        f"{key!r} of shape {variable.shape} depends on shape {other.shape}"
                    )
                if variable.grouped and other.shape and other.shape[-1] > 1:
                    raise SpaceError(
                        f"{key!r} is {variable.kind} and depends on shape {other.shape}; "
                        "allowed: one element per group, so that the active values come first"
                    )
        seen[key] = variable


def _fits_into(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether arrays of a shape broadcast to another shape without enlarging it."""
    try:
        return np.broadcast_shapes(shape, other) == other
    except ValueError:
        return False
