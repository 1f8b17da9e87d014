"""Candidates of one space as a predictor of another space reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._adopt import places
from searchlab.predictor import Table
from searchlab.space import Space, Tokens
from searchlab.variables import Choice, Variable

__all__ = ["mapped_table", "matched"]

Floats = NDArray[np.float64]


def mapped_table(table: Table, old: Space) -> Table:
    """The table's candidates in the codes of a space of the same kind; signals are kept.

    A variable's elements are read at the same relative place, axis by axis. A label that the other
    space has too keeps its code, an unknown one is the mean of all. Numbers keep their place
    between the lowest and the highest.
    """
    parts, codes, values, active = [], [], [], []
    starts = _starts(table.space)
    for name, variable in old.variables.items():
        mine = table.space.variables[name]
        at, token = starts[name]
        at_places = places(variable, mine)
        block = table.x[:, at : at + mine.code_width].reshape(len(table), mine.size, -1)
        parts.append(_recoded(block[:, at_places], variable, mine).reshape(len(table), -1))
        rows = token + at_places
        codes.append(_labels(table.tokens.codes[:, rows], variable, mine))
        values.append(table.tokens.values[:, rows])
        active.append(table.tokens.active[:, rows])
    return Table(
        old,
        np.concatenate(parts, axis=1),
        Tokens(
            np.concatenate(codes, axis=1),
            np.concatenate(values, axis=1),
            np.concatenate(active, axis=1),
        ),
        table.signals,
        table.signal_names,
        table.directions,
    )


def _starts(space: Space) -> dict[str, tuple[int, int]]:
    """Where each variable's codes and tokens begin."""
    out, at, token = {}, 0, 0
    for name, variable in space.variables.items():
        out[name] = (at, token)
        at, token = at + variable.code_width, token + variable.size
    return out


def _recoded(block: NDArray[Any], old: Variable, new: Variable) -> NDArray[np.float32]:
    """Codes (n, old.size, e) of elements that are coded as those of `new`."""
    width = old.code_width // old.size
    turn = _turn(old, new)
    if turn is not None and turn.shape == (block.shape[2], width):
        return np.asarray(block @ turn, dtype=np.float32)
    if block.shape[2] == width:
        return block.astype(np.float32)
    return np.full((*block.shape[:2], width), 1 / width, dtype=np.float32)


def _turn(old: Variable, new: Variable) -> Floats | None:
    """What each label's code becomes, (labels of new, labels of old); None = it stays."""
    if not (isinstance(old, Choice) and isinstance(new, Choice)) or old.labels == new.labels:
        return None
    known = {label: place for place, label in enumerate(old.labels)}
    turn = np.full((len(new.labels), len(old.labels)), 1 / len(old.labels))
    for row, label in enumerate(new.labels):
        if label in known:
            turn[row] = np.eye(len(old.labels))[known[label]]
    return turn


def _labels(codes: NDArray[np.int32], old: Variable, new: Variable) -> NDArray[np.int32]:
    if isinstance(old, Choice) and isinstance(new, Choice) and old.labels != new.labels:
        known = {label: place for place, label in enumerate(old.labels)}
        turn = np.array([known.get(label, 0) for label in new.labels], dtype=np.int32)
        return np.asarray(turn[codes], dtype=np.int32)
    return codes


def matched(
    table: Table, wanted: Mapping[str, str], background: Table | None, quantiles: Mapping[str, Any]
) -> Table:
    """The table with the signals that a predictor was fitted with; NaN = it is not there.

    Args:
        table: candidates with signals of another task.
        wanted: names and directions, in order.
        background: random candidates of that task; a value becomes the one that was as far up among
            random candidates of the old task. None = values mean the same in both.
        quantiles: of the old task's values, by name.
    """
    columns = []
    for name in wanted:
        if name not in table.signal_names:
            columns.append(np.full(len(table), np.nan))
            continue
        column = table.signals[:, table.signal_names.index(name)]
        there = background is not None and name in background.signal_names
        if background is not None and there and len(quantiles.get(name, ())):
            seen = background.signals[:, background.signal_names.index(name)]
            column = _moved(column, seen, np.asarray(quantiles[name], dtype=np.float64))
        columns.append(column)
    return Table(
        table.space,
        table.x,
        table.tokens,
        np.stack(columns, axis=1) if columns else np.empty((len(table), 0)),
        tuple(wanted),
        tuple(wanted.values()),  # type: ignore[arg-type]
    )


def _moved(column: Floats, seen: Floats, quantiles: Floats) -> Floats:
    seen = np.sort(seen[np.isfinite(seen)])
    if not len(seen):
        return column
    there = np.where(np.isfinite(column), column, seen[0])
    place = (np.searchsorted(seen, there, "left") + np.searchsorted(seen, there, "right")) / 2
    out = np.interp(place / len(seen), np.linspace(0, 1, len(quantiles)), quantiles)
    # Beyond what was seen on either side values go on as far beyond, in units of the spread.
    span, unit = seen[-1] - seen[0], quantiles[-1] - quantiles[0]
    scale = unit / span if span > 0 else 0.0
    out += scale * (np.minimum(there - seen[0], 0) + np.maximum(there - seen[-1], 0))
    return np.where(np.isnan(column), np.nan, np.where(np.isinf(column), column, out))
