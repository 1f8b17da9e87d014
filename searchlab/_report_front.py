"""The sections of a report about several objectives: members, front, what it covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from searchlab._report_section import Section
from searchlab.figures_front import figure_hypervolume, figure_trade_offs

if TYPE_CHECKING:
    from searchlab.trade_offs import TradeOffs

__all__ = ["front_sections"]

MOST_ROWS = 60


def front_sections(trades: TradeOffs) -> Sequence[Section]:
    """What a report says of a front, in order."""
    if not trades.shown():
        return (Section("Values", "No candidate was evaluated successfully."),)
    parts = [_figure(trades), _final(trades), _members(trades), _curve(trades)]
    return tuple(part for part in parts if part is not None)


def _names(trades: TradeOffs) -> str:
    return ", ".join(
        f"{o.name}{f' [{o.unit}]' if o.unit else ''} ({'less' if o.direction == 'min' else 'more'} "
        "is better)"
        for o in trades.objectives
    )


def _figure(trades: TradeOffs) -> Section | None:
    if len(trades.objectives) != 2 or not trades.members:
        return None
    caption = (
        "Line: candidates that nothing dominates, by the values of the search. Diamonds: baselines."
    )
    if any(c.report_values for c in trades.finalists):
        caption += (
            " Crosses: the same candidates on the report split, joined to their search value."
        )
    return Section("Front", figure=figure_trade_offs(trades), caption=caption)


def _final(trades: TradeOffs) -> Section | None:
    scored = [c for c in (*trades.finalists, *trades.rivals) if c.selection_values]
    if not scored:
        return None
    keys = {c.key for c in scored}
    rows = [_row(row) for row in _unique(trades, keys)]
    text = (
        f"Objectives: {_names(trades)}. The search chose by its own values and the members to be "
        "reported were taken by the selection split; both flatter them. The report split was "
        "measured once, on data that took no part in any choice."
    )
    return Section("Members that were scored again", text, table=rows)


def _members(trades: TradeOffs) -> Section:
    members = {c.key for c in trades.members[:MOST_ROWS]} | {c.key for c in trades.baselines}
    rows = [
        {
            "what": f"{row['kind']} {row['name']}",
            "id": row["id"],
            **row["values"].get("search", {}),
            "": "front" if row["front"] else "breaks constraints" if row["violation"] else "",
        }
        for row in _unique(trades, members)
    ]
    more = len(trades.members) - MOST_ROWS
    point = ", ".join(f"{n} {v:.4g}" for n, v in zip(trades.names, trades.reference, strict=True))
    text = (
        f"{len(trades.members)} candidates meet the constraints and are dominated by none; their "
        f"hypervolume is {trades.hypervolume:.4g}, measured from {point}. Values are those of the "
        f"search. Objectives: {_names(trades)}."
    )
    if more > 0:
        text += f" {more} further members are in result.json."
    return Section("Members of the front", text, table=rows)


def _unique(trades: TradeOffs, keys: set[bytes]) -> list[dict[str, Any]]:
    shown = trades.shown()
    return [row for c, row in zip(shown, trades.rows(), strict=True) if c.key in keys]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    values = row["values"]
    flat: dict[str, Any] = {"what": f"{row['kind']} {row['name']}"}
    for split in ("search", "selection", "report"):
        found = values.get(split, {})
        flat |= {f"{name}, {split}": found.get(name) for name in values["search"]}
    return flat


def _curve(trades: TradeOffs) -> Section | None:
    if len(trades.curve) < 2 or not np.isfinite([v for _, v in trades.curve]).all():
        return None
    return Section(
        "Search",
        figure=figure_hypervolume(trades),
        caption="Hypervolume of all that was evaluated so far, baselines included. Dashed: of the "
        "baselines alone."
        if trades.baselines
        else "Hypervolume of all that was evaluated so far.",
    )
