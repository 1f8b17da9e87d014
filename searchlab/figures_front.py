"""Figures of several objectives as SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from searchlab.figures import COLOURS, INK, canvas, legend_beside, plain, style, to_svg
from searchlab.trade_offs import values_of

if TYPE_CHECKING:
    from searchlab.evaluator import Objective
    from searchlab.trade_offs import TradeOffs

__all__ = ["figure_hypervolume", "figure_trade_offs"]


def figure_trade_offs(trades: TradeOffs) -> bytes:
    """The front of two objectives, with baselines and what the report split says."""
    figure, axes = canvas()
    points = np.array(trades.points)
    axes.plot(
        points[:, 0],
        points[:, 1],
        "o-",
        color=COLOURS[0],
        linewidth=1.2,
        markersize=4,
        label="front, search values",
    )
    entries = 1
    for i, kind in enumerate(sorted({c.kind for c in trades.baselines})):
        own = np.array([c.values for c in trades.baselines if c.kind == kind])
        colour = COLOURS[1 + i % (len(COLOURS) - 1)]
        axes.plot(own[:, 0], own[:, 1], "D", color=colour, markersize=5, label=kind)
        entries += 1
    reported = [c for c in (*trades.finalists, *trades.rivals) if c.report_values]
    for i, contender in enumerate(reported):
        values = values_of(contender, "report", 2)
        axes.plot(
            [contender.values[0], values[0]],
            [contender.values[1], values[1]],
            color=INK,
            linewidth=0.7,
            alpha=0.6,
        )
        label = "report values" if i == 0 else None
        axes.plot(values[:1], values[1:], "x", color=INK, markersize=6, label=label)
    entries += bool(reported)
    style(axes, x=_title(trades.objectives[0]), y=_title(trades.objectives[1]))
    legend_beside(axes, entries)
    return to_svg(figure)


def figure_hypervolume(trades: TradeOffs) -> bytes:
    """Hypervolume of the first n candidates against n."""
    figure, axes = canvas()
    x, y = zip(*trades.curve, strict=True)
    axes.step(x, y, where="post", color=COLOURS[0], linewidth=1.7, label="everything so far")
    if trades.baselines:
        axes.axhline(
            trades.volume(trades.baselines),
            color=COLOURS[1],
            linestyle=(0, (5, 3)),
            linewidth=1.0,
            label="baselines",
        )
    style(axes, x="evaluations (jobs)", y="hypervolume")
    legend_beside(axes, 1 + bool(trades.baselines))
    return to_svg(figure)


def _title(objective: Objective) -> str:
    unit = f" [{objective.unit}]" if objective.unit else ""
    return plain(objective.name + unit)
