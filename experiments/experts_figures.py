"""The picture of a pruned model: which experts stay in each layer, and how the router used them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from searchlab.figures import COLOURS, INK, WIDTH, style, to_svg

__all__ = ["figure_kept"]


def figure_kept(
    kept: NDArray[np.bool_],
    used: NDArray[np.float64],
    layers: Sequence[int],
    *,
    other: tuple[str, NDArray[np.bool_]] | None = None,
) -> bytes:
    """Kept experts per layer, and beside them the share of tokens that chose each in the base.

    Args:
        kept: (L, E), the winner's.
        used: (L, E), how often the base's router chose an expert.
        layers: L layer numbers.
        other: name and experts of another choice, whose cells get a frame.
    """
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    count, experts = kept.shape
    figure = Figure(
        figsize=(WIDTH, min(9.0, 1.1 + 0.22 * max(count, 3))), layout="constrained", dpi=150
    )
    left, right = figure.subplots(1, 2, sharey=True)
    shades = ListedColormap(["#00000000", COLOURS[0]])
    extent = (-0.5, experts - 0.5, count - 0.5, -0.5)
    how = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    left.imshow(kept.astype(float), vmin=0, vmax=1, cmap=shades, **how)
    share = used / np.maximum(used.sum(axis=1, keepdims=True), 1e-12)
    from_clear = LinearSegmentedColormap.from_list("used", ["#d9822b00", COLOURS[1]])
    drawn = right.imshow(share, vmin=0, vmax=float(share.max() or 1.0), cmap=from_clear, **how)
    if other is not None:
        name, there = other
        for row, expert in np.argwhere(there):
            left.add_patch(
                Rectangle((expert - 0.45, row - 0.42), 0.9, 0.84, fill=False, ec=INK, lw=0.8)
            )
        left.set_title(f"kept (framed: {name})", fontsize=9, color=INK)
    else:
        left.set_title("kept", fontsize=9, color=INK)
    right.set_title("share of routed tokens in the full model", fontsize=9, color=INK)
    step = max(1, count // 16)
    for axes in (left, right):
        style(axes, x="expert", y="")
        axes.grid(visible=False)
        axes.set_yticks(range(0, count, step), [str(layers[i]) for i in range(0, count, step)])
    left.set_ylabel("layer", color=INK, fontsize=9)
    bar = figure.colorbar(drawn, ax=right, shrink=0.9)
    bar.ax.tick_params(colors=INK, labelsize=8, length=3)
    bar.outline.set_edgecolor(INK)
    return to_svg(figure)
