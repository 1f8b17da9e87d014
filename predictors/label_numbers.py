"""Labels of choices that are numbers, as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.space import Space
from searchlab.variables import Choice

__all__ = ["number_columns", "numbers_of"]

Floats = NDArray[np.float64]

RATIO = 4.0  # of the largest numeric label to the smallest, from which on their logs count


def numbers_of(variable: Any) -> Floats | None:
    """Standardised numbers of a single choice among three and more of them, else None.

    Labels of an array of choices are names even where they are written as numbers.
    """
    if not isinstance(variable, Choice) or variable.size > 1:
        return None
    labels = list(variable.labels)
    plain = [label for label in labels if isinstance(label, int | float)]
    if len(labels) < 3 or len(plain) < len(labels) or any(isinstance(v, bool) for v in labels):
        return None
    values = np.array(plain, dtype=np.float64)
    if values.min() > 0 and values.max() >= RATIO * values.min():
        values = np.log(values)
    out: Floats = (values - values.mean()) / (values.std() or 1.0)
    return out


def number_columns(space: Space) -> Floats:
    """What the numbers of all such choices are of the codes: float64 (code_width, choices)."""
    columns = []
    start = 0
    for variable in space.variables.values():
        values = numbers_of(variable)
        if values is not None:
            column = np.zeros(space.code_width)
            column[start : start + len(values)] = values
            columns.append(column)
        start += variable.code_width
    return np.stack(columns, axis=1) if columns else np.empty((space.code_width, 0))
