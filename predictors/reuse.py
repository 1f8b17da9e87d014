"""What an earlier predictor knows, as a signal for the next one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from searchlab.errors import ConfigError
from searchlab.predictor import Predictor, Table

__all__ = ["PREDICTED", "with_prediction"]

PREDICTED = "predicted"


def with_prediction(table: Table, predictor: Predictor, *, name: str = PREDICTED) -> Table:
    """The table with one more signal: the scores that a fitted predictor gives its candidates.

    A predictor of another task (data, budget or metric) over the same space is refined in this way:
    the new one learns from few labels how far to believe the old one. A signal that says nothing
    does little harm, so an old predictor that does not fit is found out.

    Args:
        table: candidates, with the signals that `predictor` was fitted with.
        predictor: fitted on the same space.
        name: of the new signal.

    Raises:
        ConfigError: a signal of this name is there; or the table does not suit the predictor.
    """
    if name in table.signal_names:
        raise ConfigError(f"signal {name!r} is in the table; allowed: a new name")
    scores = predictor.rank(table)
    return replace(
        table,
        signals=np.concatenate([table.signals, scores[:, None]], axis=1),
        signal_names=(*table.signal_names, name),
        directions=(*table.directions, "min"),
    )
