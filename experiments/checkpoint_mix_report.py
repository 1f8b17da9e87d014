"""What the report of a checkpoint mix adds: coefficients over training, hashes, samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from searchlab.config import SearchConfig
from searchlab.errors import SearchlabError
from searchlab.evaluator import REPORT_REPLICATE
from searchlab.evaluators.generated_samples import SampleScore
from searchlab.figures import COLOURS, INK, WIDTH, style, to_svg
from searchlab.report import Section
from searchlab.result import Result

if TYPE_CHECKING:
    from searchlab.final import Contender

__all__ = ["sections"]

SAMPLES = 16
"""Pictures per row: the first ones of the report split's noise, whatever they show."""

_Array = NDArray[np.float64]


def sections(config: SearchConfig, result: Result) -> list[Section]:
    """Coefficients of the winner beside the best average's, and samples where there are images."""
    groups = [group for group in result.groups if group.winner is not None]
    if not groups:
        return []
    group = groups[-1]
    winner = group.winner
    assert winner is not None
    space: Any = config.stages[-1].space
    evaluator: Any = config.stages[-1].evaluator
    bank = evaluator.bank
    average = next((c for c in group.baselines if c.name.startswith("ema_")), None)
    shown: dict[str, _Array] = {"searched": space.coefficients(winner.population)[0]}
    if average is not None:
        shown[average.name] = space.coefficients(average.population)[0]
    best = group.best_baseline()
    if best is not None and best is not average:
        shown[best.name] = space.coefficients(best.population)[0]
    table = shown["searched"]
    text = (
        f"{len(bank)} checkpoints, {bank.layout.size} mixed values each. Every row of coefficients "
        f"sums to one; the sum of their magnitudes is {np.abs(table).sum(axis=1).mean():.3g} "
        "(1 = a plain average). Searches with other seeds find other coefficients of much the same "
        "worth: the valley is flat.\n\nChecking that the checkpoints come from one training run is "
        f"up to you; that is the method's setting.\n\nMemory: {bank.plan}."
    )
    figure = figure_coefficients(bank.steps, shown, space.groups)
    out = [Section("Coefficients over training", text=text, figure=figure)]
    out.append(Section("Checkpoints", table=_checkpoints(bank, shown)))
    score = getattr(evaluator, "score", None)
    if isinstance(score, SampleScore) and score.shape == (64,):
        last = next((c for c in group.baselines if c.name == "last"), None)
        out += _pictures(evaluator, space, score, {"last": last, "average": best, "mix": winner})
    return out


def _checkpoints(bank: Any, shown: Mapping[str, _Array]) -> list[dict[str, Any]]:
    return [
        {
            "checkpoint": source.name,
            **{name: f"{table[:, k].mean():.4g}" for name, table in shown.items()},
            "sha256": " ".join(value[:12] for value in bank.hashes[k].values()),
        }
        for k, source in enumerate(bank.sources)
    ]


def figure_coefficients(
    steps: list[int] | None, shown: Mapping[str, _Array], groups: tuple[str, ...]
) -> bytes:
    """Coefficients over training, one line per mix, one panel per group (at most six).

    Args:
        steps: of the checkpoints; None = they are numbered.
        shown: name -> (G, K).
        groups: G names, or none.
    """
    from matplotlib.figure import Figure

    count = len(next(iter(shown.values()))[0])
    x = np.arange(count) if steps is None else np.array(steps)
    panels = min(6, max(1, len(groups)))
    figure = Figure(figsize=(WIDTH, 2.6 * panels + 0.4), layout="constrained")
    for at, axes in enumerate(figure.subplots(panels, 1, squeeze=False)[:, 0]):
        for colour, (name, table) in zip(COLOURS, shown.items(), strict=False):
            axes.plot(x, table[at], color=colour, label=name, marker="o", markersize=3.5, lw=1.4)
        axes.axhline(0.0, color=INK, linewidth=0.8)
        style(axes, x="training step" if steps else "checkpoint", y="coefficient")
        if groups:
            axes.set_title(groups[at], fontsize=9, color=INK)
        legend = axes.legend(fontsize=8, frameon=False)
        for entry in legend.get_texts():
            entry.set_color(INK)
    return to_svg(figure)


def _pictures(
    evaluator: Any, space: Any, score: SampleScore, chosen: Mapping[str, Contender | None]
) -> list[Section]:
    from matplotlib.figure import Figure

    there = {name: c for name, c in chosen.items() if c is not None}
    start = score.start(REPORT_REPLICATE, SAMPLES)
    strips: dict[str, _Array] = {}
    for name, contender in there.items():
        try:
            (state,) = evaluator.states(space.coefficients(contender.population))
        except SearchlabError:
            continue
        with torch.no_grad():
            made = score.generate(state, start).double().numpy()
        label = "searched" if name == "mix" else contender.name
        gap = np.full((8, 1), np.nan)
        parts = [part for image in made.reshape(-1, 8, 8) for part in (image, gap)]
        strips[label] = np.concatenate(parts[:-1], axis=1)
    if not strips:
        return []
    figure = Figure(figsize=(WIDTH, 0.62 * len(strips) + 0.1), layout="constrained", dpi=200)
    grid = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axes, (name, strip) in zip(grid, strips.items(), strict=True):
        shades = np.clip(strip, -1, 1)
        axes.imshow(shades, vmin=-1, vmax=1, cmap="gray", interpolation="nearest")
        axes.set_axis_off()
        at: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "center"}
        axes.text(-0.01, 0.5, name, fontsize=8, color=INK, **at)
    caption = f"The first {SAMPLES} start states of the report split, not chosen."
    return [Section("Samples", figure=to_svg(figure), caption=caption)]
