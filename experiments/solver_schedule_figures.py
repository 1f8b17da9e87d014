"""Figures of solver schedules: where their steps lie and what they do, and their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import SpaceError
from searchlab.figures import COLOURS, INK, WIDTH, style, to_svg
from searchlab.spaces.solver_schedule.grids import GRIDS
from searchlab.spaces.solver_schedule.schedule import MAX_ORDER, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DECISIONS", "figure_samples", "figure_steps", "image_shape"]

DECISIONS = (
    "Every mark is a point that the solver visits, from noise (left) to data (right), in log-SNR = "
    "ln(alpha/sigma). The mark tells how the step that arrives there was made: colour is the Taylor"
    " order, a circle predicts the data, a square the noise, a ring around it is a corrector. The "
    "first mark is the start. Decisions that have no effect are drawn as their default. Below: "
    "known grids with as many points between the winner's ends."
)

_GREY = "#7f8790"
_ORDER = dict(zip(range(1, MAX_ORDER + 1), COLOURS, strict=False))
_MARK = {"data": "o", "noise": "s"}
_RING = {"pseudo": 1.0, "implicit": 2.2}
_PAD = 0.07  # of the finite range, beyond which an infinite log-SNR is drawn
_ROW = 0.21  # inches

_Array = NDArray[np.float64]


# -- timesteps ------------------------------------------------------------------------------------


def figure_steps(entries: Sequence[tuple[str, Schedule, Schedule | None]]) -> bytes:
    """Winners above their best baselines and the known grids, one panel per entry.

    Args:
        entries: (title, winner, best baseline or None).

    Returns:
        An SVG.
    """
    from matplotlib.figure import Figure

    panels = [(title, _panel_rows(winner, base)) for title, winner, base in entries]
    scale = _Scale([x for _, rows in panels for _, x, _ in rows])
    heights = [len(rows) + 1.6 for _, rows in panels]
    figure = Figure(figsize=(WIDTH, _ROW * sum(heights) + 1.1), layout="constrained")
    grid = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axes, (title, rows) in zip(grid, panels, strict=True):
        _draw_panel(axes, title, rows, scale)
    _name_ends(grid[0], scale)
    grid[-1].set_xlabel("log-SNR", color=INK, fontsize=9)
    _explain(figure)
    return to_svg(figure)


_Row = tuple[str, _Array, Schedule | None]


def _panel_rows(winner: Schedule, base: Schedule | None) -> list[_Row]:
    rows: list[_Row] = [("searched", _log_snr(winner), winner.canonical())]
    if base is not None:
        rows.append(("best baseline", _log_snr(base), base.canonical()))
    noise, times = winner.noise, winner.times
    clean = times[-1] == noise.clean
    n = len(times) - 1 - clean
    for name, grid in GRIDS.items():
        try:
            points = grid(noise, n, times[0], times[n])
        except SpaceError:  # this grid has no points between these ends
            continue
        full = np.append(points, noise.clean) if clean else np.asarray(points)
        rows.append((name, np.asarray(noise.log_snr(full)), None))
    return rows


def _log_snr(schedule: Schedule) -> _Array:
    return np.asarray(schedule.noise.log_snr(np.array(schedule.times)))


class _Scale:
    """Puts infinite log-SNR beside the finite range."""

    def __init__(self, parts: Sequence[_Array]) -> None:
        everything = np.concatenate(parts)
        finite = everything[np.isfinite(everything)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
        pad = max(float(high - low), 1.0) * _PAD
        self.low, self.high = float(low) - pad, float(high) + pad
        self.clean = bool(np.isposinf(everything).any())
        self.noise = bool(np.isneginf(everything).any())

    def __call__(self, x: _Array) -> _Array:
        return np.clip(x, self.low, self.high)

    def infinite(self) -> dict[float, str]:
        """Where infinite values are drawn, and what they mean."""
        out = {self.high: "sigma = 0"} if self.clean else {}
        return out | ({self.low: "alpha = 0"} if self.noise else {})


def _draw_panel(axes: Axes, title: str, rows: Sequence[_Row], scale: _Scale) -> None:
    style(axes, x="", y="")
    axes.grid(visible=False, axis="y")
    for i, (_, values, schedule) in enumerate(rows):
        x, y = scale(values), -float(i)
        if schedule is None:
            axes.plot(x, np.full(len(x), y), "|", color=_GREY, markersize=8, markeredgewidth=1.3)
            continue
        axes.plot(x, np.full(len(x), y), color=_GREY, linewidth=0.7, alpha=0.7, zorder=1)
        _draw_start(axes, float(x[0]), y, schedule)
        for at, step in zip(x[1:], schedule.steps, strict=True):
            mark, colour = _MARK[step.prediction], _ORDER[step.order]
            axes.plot([at], [y], mark, color=colour, markersize=5.5, zorder=3)
            if step.corrector != "none":
                axes.plot([at], [y], **_ring(mark, step.corrector, colour), zorder=2)
    for edge in scale.infinite():
        axes.axvline(edge, color=INK, alpha=0.35, linewidth=0.8, linestyle=":")
    axes.set_yticks([-float(i) for i in range(len(rows))], [name for name, _, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-len(rows) + 0.4, 0.7)
    if title:
        axes.set_title(title, fontsize=9, fontweight="bold", color=INK, loc="left", pad=9)


def _name_ends(axes: Axes, scale: _Scale) -> None:
    for x, text in scale.infinite().items():
        axes.text(x, 0.75, text, fontsize=7, color=INK, ha="center", va="bottom")


def _draw_start(axes: Axes, x: float, y: float, schedule: Schedule) -> None:
    model = schedule.first_evaluation == "model"
    axes.plot([x], [y], "D" if model else "X", color=_GREY, markersize=4.8, zorder=3)


def _ring(mark: str, corrector: str, colour: str) -> dict[str, Any]:
    return {
        "marker": mark,
        "linestyle": "none",
        "color": colour,
        "fillstyle": "none",
        "markersize": 10,
        "markeredgewidth": _RING[corrector],
    }


def _explain(figure: Any) -> None:
    from matplotlib.lines import Line2D

    entries: list[tuple[str, dict[str, Any]]] = [
        (f"order {order}", {"marker": "o", "color": colour, "markersize": 6})
        for order, colour in _ORDER.items()
    ]
    entries += [
        ("data", {"marker": "o", "color": _GREY, "markersize": 6}),
        ("noise", {"marker": "s", "color": _GREY, "markersize": 6}),
    ]
    entries += [(f"{name} corrector", _ring("o", name, _GREY)) for name in _RING]
    entries += [
        ("start, model called", {"marker": "D", "color": _GREY, "markersize": 5}),
        ("start, model not called", {"marker": "X", "color": _GREY, "markersize": 5.5}),
    ]
    handles = [Line2D([], [], label=name, **({"linestyle": "none"} | how)) for name, how in entries]
    legend = figure.legend(
        handles=handles, loc="outside upper center", ncols=5, fontsize=8, frameon=False
    )
    for text in legend.get_texts():
        text.set_color(INK)


# -- samples --------------------------------------------------------------------------------------


def image_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """How samples of a shape are drawn, (h, w) or (c, h, w); None where they are no images.

    Flat samples are taken as images for 64 values only: 8x8 digits.
    """
    if shape == (64,):
        return (8, 8)
    if len(shape) == 2 and min(shape) >= 8:
        return shape
    if len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 8:
        return shape
    return None


def figure_samples(reference: _Array, rows: Mapping[str, _Array], shape: tuple[int, ...]) -> bytes:
    """The same samples by several solvers, and their differences to the reference.

    Args:
        reference: (n, ...) values in [-1, 1].
        rows: name -> (n, ...) on the same start noise.
        shape: see `image_shape`.

    Returns:
        An SVG with the pictures inside.
    """
    from matplotlib.figure import Figure

    pictures = {"reference": _strip(reference, shape)}
    pictures |= {name: _strip(values, shape) for name, values in rows.items()}
    differences = {name: np.abs(pictures[name] - pictures["reference"]) for name in rows}
    top = max(float(np.nanmax(part)) for part in differences.values()) or 1.0
    height, width = pictures["reference"].shape[:2]
    count = len(pictures) + len(differences)
    inches = (WIDTH - 1.5) * height / width
    figure = Figure(figsize=(WIDTH, count * (inches + 0.06) + 0.1), layout="constrained", dpi=200)
    grid = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axes, (name, strip) in zip(grid, pictures.items(), strict=False):
        shown = np.clip(strip, -1.0, 1.0)
        _show(axes, name, (shown + 1) / 2 if shown.ndim == 3 else shown, (-1.0, 1.0), "gray")
    for axes, (name, strip) in zip(grid[len(pictures) :], differences.items(), strict=True):
        rmse = float(np.sqrt(((rows[name] - reference) ** 2).mean()))
        label = f"|{name} - ref.|\nRMSE {rmse:.3g}"
        grey = strip.mean(axis=2) if strip.ndim == 3 else strip
        _show(axes, label, grey, (0.0, top), "inferno")
    return to_svg(figure)


def _show(axes: Axes, label: str, shown: _Array, limits: tuple[float, float], colours: str) -> None:
    # Pixels by the nearest neighbour: a browser would blur an 8x8 image.
    axes.imshow(shown, vmin=limits[0], vmax=limits[1], cmap=colours, interpolation="nearest")
    axes.set_axis_off()
    at: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "center"}
    axes.text(-0.01, 0.5, label, fontsize=8, color=INK, **at)


def _strip(values: _Array, shape: tuple[int, ...]) -> _Array:
    """Images side by side with a gap of one pixel: (h, n (w + 1) - 1) or with colours last."""
    images = np.asarray(values, dtype=np.float64).reshape(len(values), *shape)
    if len(shape) == 3:
        images = images.transpose(0, 2, 3, 1)
        images = images[..., 0] if images.shape[-1] == 1 else images
    gap = np.full((images.shape[1], 1, *images.shape[3:]), np.nan)
    parts = [part for image in images for part in (image, gap)][:-1]
    return np.concatenate(parts, axis=1)
