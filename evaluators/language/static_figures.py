"""Cheap figures of masks of experts, for predictors: from one calibration pass, or few prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError
from searchlab.evaluator import Signal
from searchlab.evaluators.language.batches import lay_out
from searchlab.evaluators.language.calibration import Calibration
from searchlab.evaluators.language.layered import LayeredForward
from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.scoring import Divergence
from searchlab.evaluators.language.tasks import Item

__all__ = ["StaticFigures", "few_prompts"]

Masks = NDArray[np.bool_]


class StaticFigures:
    """Figures of masks (n, L, E), remembered by mask.

    "block_error": mean over blocks of the relative error of a block's output, each with inputs of
    the unchanged model; "reap_kept" and "frequency_kept": the share of these scores that stays;
    with `divergence`, "kl_few": what it returns.

    Args:
        calibration: of the model on the task.
        divergence: from masks to figures (n,), see `few_prompts`.
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        divergence: Callable[[Masks], NDArray[np.float64]] | None = None,
    ) -> None:
        self.calibration = calibration
        self.divergence = divergence
        self._known: dict[bytes, NDArray[np.float64]] = {}

    @property
    def signals(self) -> tuple[Signal, ...]:
        few = (Signal("kl_few", "min", "nat", when="static"),) if self.divergence else ()
        return (
            Signal("block_error", "min", when="static"),
            Signal("reap_kept", "max", when="static"),
            Signal("frequency_kept", "max", when="static"),
            *few,
        )

    def __call__(self, masks: Masks) -> NDArray[np.float64]:
        """Figures (n, signals)."""
        keys = [mask.tobytes() for mask in masks]
        rows = [row for row, key in enumerate(keys) if key not in self._known]
        rows = list({keys[row]: row for row in rows}.values())
        if rows:
            own = masks[rows]
            columns = [
                self.calibration.block_errors(own).mean(axis=1),
                self.calibration.kept_share("reap", own),
                self.calibration.kept_share("frequency", own),
            ]
            if self.divergence is not None:
                columns.append(self.divergence(own))
            self._known.update(
                zip([keys[row] for row in rows], np.stack(columns, axis=1), strict=True)
            )
        return np.array([self._known[key] for key in keys]).reshape(len(masks), len(self.signals))


def few_prompts(
    forward: LayeredForward,
    prompts: Prompts,
    items: Sequence[Item],
    answers: Sequence[tuple[int, ...]],
    *,
    at_once: int = 64,
) -> Callable[[Masks], NDArray[np.float64]]:
    """Divergence from the base on its answers to a few prompts, as a function of masks.

    Args:
        forward: the model.
        prompts: texts to tokens.
        items: few.
        answers: the base's greedy answers to them.
        at_once: most masks of one pass.

    Raises:
        ConfigError: no items.
    """
    if not items:
        raise ConfigError("no prompts; allowed: one or more")
    questions: Any = Divergence(items, prompts, answers)
    assert prompts.pad is not None
    made = lay_out(questions.queries, pad=prompts.pad, packed=False)
    batches = [batch.to(forward.device) for batch in made]
    layout = forward.resident.layout
    full = np.ones((1, len(layout.blocks), layout.experts), dtype=bool)

    def figures(masks: Masks) -> NDArray[np.float64]:
        unknown = [batch for batch in batches if not questions.knows(batch)]
        if unknown:
            for number, _, logits in forward.sweep(unknown, full):
                questions.remember(unknown[number], logits)
        out = np.zeros(len(masks))
        for start in range(0, len(masks), at_once):
            own = masks[start : start + at_once]
            for number, who, logits in forward.sweep(batches, own):
                scores = questions.score(batches[number], logits).scores
                out[start + who] += scores.sum(axis=1) / len(items)
        return out

    return figures
