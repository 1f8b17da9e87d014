"""Figures of a run as SVG: legible on light and dark pages, drawn without any global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from searchlab.final import Contender, Interval
from searchlab.result import Best, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "INK",
    "WIDTH",
    "canvas",
    "figure_curve",
    "figure_front",
    "legend_beside",
    "plain",
    "style",
    "to_svg",
]

WIDTH = 7.6
"""Width of a figure in inches."""

INK = "#0b1e2d"
"""Colour of text and axes; `to_svg` replaces it by the colour of the page's text."""

COLOURS = (
    "#3b7dd8",
    "#d9822b",
    "#3f9e5a",
    "#c2485c",
    "#8a63c9",
    "#2a9d9d",
    "#a97c50",
    "#7f8790",
)
"""Colours of series, of middle lightness so that they show on white and on black."""

_STYLE = (
    "<style>:root{color:#1c2630}@media (prefers-color-scheme: dark){:root{color:#dde3e9}}</style>"
)
_LOG_FROM = 5.0  # ratio of largest to smallest value from which an axis is logarithmic


def style(axes: Axes, *, x: str, y: str) -> None:
    """Labels and quietens a pair of axes."""
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.tick_params(which="both", colors=INK, labelsize=8, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_linewidth(0.8)
    axes.grid(visible=True, which="major", color=INK, alpha=0.14, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0.0)


def to_svg(figure: Figure) -> bytes:
    """The figure as one SVG without outside references; equal figures give equal bytes."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "searchlab", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    head = text.index(">") + 1
    return (text[:head] + _STYLE + text[head:]).encode()


def figure_curve(result: Result) -> bytes | None:
    """Best search value so far against evaluations, one line per group; None without values.

    Dashed lines are the search values of the groups' best baselines.
    """
    lines = {g: line for g, line in sorted(result.curve.items()) if line}
    if not lines:
        return None
    bases = {g.group: g.best_baseline() for g in result.groups}
    figure, axes = canvas()
    for i, (group, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        label = f"{result.group_by} {group}" if result.group_by else "best so far"
        x, y = zip(*line, strict=True)
        axes.step(x, y, where="post", color=colour, linewidth=1.7, label=label)
        axes.plot(x[-1:], y[-1:], "o", color=colour, markersize=3.5)
        base = bases.get(group)
        if base is not None and np.isfinite(base.search):
            axes.axhline(base.search, color=colour, linestyle=(0, (5, 3)), linewidth=1.0, alpha=0.8)
    values = [v for line in lines.values() for _, v in line]
    values += [b.search for b in bases.values() if b is not None]
    _scale(axes, values)
    where = "evaluations in the group" if result.group_by else "evaluations"
    style(axes, x=f"{where} (jobs)", y=f"best {_objective(result)} in the search")
    legend_beside(axes, len(lines))
    return to_svg(figure)


def figure_front(result: Result) -> bytes | None:
    """Value against group for winners and baselines; None with fewer than two groups.

    Filled points of the winner are on the front: no lower group is as good. Bars are intervals of
    the report split.
    """
    winners = [(g.group, g.winner) for g in result.groups if g.winner is not None]
    if len(winners) < 2 or result.trade_offs is not None:
        return None
    front = {int(point[0]) for point in result.front}
    figure, axes = canvas()
    shown = [c for _, c in winners]
    _line(axes, result, winners, COLOURS[0], "searched", front)
    kinds = sorted({c.kind for g in result.groups for c in g.baselines})
    for i, kind in enumerate(kinds):
        points = [(g.group, b) for g in result.groups if (b := g.best_baseline(kind)) is not None]
        shown += [c for _, c in points]
        _line(axes, result, points, COLOURS[(i + 1) % len(COLOURS)], f"best {kind}", None)
    _scale(axes, [Best(result.space, c).value for c in shown])
    split = "report" if all(c.report for c in shown) else "best known"
    style(axes, x=result.group_by or "group", y=f"{_objective(result)}, {split} value")
    groups = sorted({group for group, _ in winners})
    if len(groups) <= 12:
        axes.set_xticks(groups)
    legend_beside(axes, 1 + len(kinds))
    return to_svg(figure)


def canvas() -> tuple[Figure, Axes]:
    """An empty figure of the report's width, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    return figure, figure.subplots()


def _line(
    axes: Axes,
    result: Result,
    points: Sequence[tuple[int, Contender]],
    colour: str,
    label: str,
    front: set[int] | None,
) -> None:
    x = np.array([group for group, _ in points], dtype=float)
    y = np.array([Best(result.space, c).value for _, c in points])
    half = [Interval.of(c.report, result.alpha).half if c.report else np.nan for _, c in points]
    dashes = "-" if front is not None else (0, (5, 3))
    axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.6, label=label)
    bars = np.nan_to_num(np.array(half), nan=0.0)
    axes.errorbar(x, y, bars, fmt="none", ecolor=colour, elinewidth=1.1, capsize=2.5)
    on = np.array([front is None or group in front for group, _ in points])
    axes.plot(x[on], y[on], "o", color=colour, markersize=5)
    axes.plot(x[~on], y[~on], "o", color=colour, markersize=5, fillstyle="none")


def _scale(axes: Axes, values: Sequence[float]) -> None:
    finite = np.array([v for v in values if np.isfinite(v)])
    if len(finite) and finite.min() > 0 and finite.max() > _LOG_FROM * finite.min():
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _objective(result: Result) -> str:
    unit = f" [{result.objective.unit}]" if result.objective.unit else ""
    return plain(result.objective.name + unit)


def plain(text: str) -> str:
    """Text that is drawn as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def legend_beside(axes: Axes, entries: int) -> None:
    """Beside the axes, where it covers no line."""
    if entries < 1:
        return
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False, borderaxespad=0
    )
    for text in legend.get_texts():
        text.set_color(INK)
        text.set_text(plain(text.get_text()))
