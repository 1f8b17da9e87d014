"""How tokens are given to the experts that are left.

The arithmetic is that of the model with the other experts cut out, step by step: logits of the kept
experts are put side by side, then scored and chosen as the family does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from searchlab.cuda_ext import route_topk
from searchlab.spaces.experts.families import Score

__all__ = ["MODES", "FLOOR", "RouterMode", "Rule", "choose", "fits", "fused"]

RouterMode = Literal["slice", "prob", "logit"]
MODES: tuple[RouterMode, ...] = ("slice", "prob", "logit")
FLOOR = 1e-20  # of the sum that mapped shares are divided by: they may all have been cut to 0


@dataclass(frozen=True)
class Rule:
    """A family's way to score and choose, with the numbers of one model.

    Attributes:
        score, renormalise, cast: as in `Family`.
        scale: factor of the weights; None = none.
        n_group, topk_group, group_best: routing by groups; 1 group = none.
    """

    score: Score
    renormalise: bool
    cast: bool
    scale: float | None = None
    n_group: int = 1
    topk_group: int = 1
    group_best: int = 1


def choose(
    logits: Tensor,
    rule: Rule,
    k: int,
    *,
    mode: RouterMode = "slice",
    index: Tensor | None = None,
    absent: Tensor | None = None,
    tokens: Tensor | None = None,
    table: Tensor | None = None,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights and experts of each token.

    Args:
        logits: (T, E).
        rule: of the family.
        k: experts per token.
        mode: "slice" scores the kept experts only, as if there were no others; "prob" scores all
            experts and then keeps (or maps) the scores; "logit" maps logits.
        index: (K, E') int64, the kept experts of each mask, increasing.
        absent: (K, E') bool, places of `index` without an expert.
        tokens: (T,) int64, which mask a token takes; None = the first.
        table: (E', E) map of scores ("prob") or logits ("logit"); places are then those of its
            rows. Not together with `index`.
        correction: (E,) added to sigmoid scores where they are compared.

    Returns:
        weights (T, k), experts (T, k) int64, and how often the floor of a sum was needed (a
        tensor, so that nothing waits for it), None where it cannot be.
    """
    picked = None if index is None else (index if tokens is None else index[tokens])
    away = None if absent is None else (absent if tokens is None else absent[tokens])
    dtype = logits.dtype
    if mode == "logit" and table is not None:
        logits = logits.float() @ table.T
    elif mode == "slice" and picked is not None:
        logits = _at(logits, picked)
        if away is not None:
            logits = logits.masked_fill(away, -torch.inf)
    mapped = mode == "prob"
    if rule.score == "chosen_softmax" and not mapped:
        value, place = torch.topk(logits.to(dtype), k, dim=-1)
        weights = torch.softmax(value, dim=-1, dtype=value.dtype)
        return weights, _experts(place, picked), None
    if rule.score == "sigmoid":
        scores = logits.sigmoid()
        if away is not None and not mapped:
            scores = scores.masked_fill(away, 0.0)
    else:
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
    if correction is not None and picked is not None:
        correction = _at(correction.expand(len(picked), -1), picked)
    if mapped and picked is not None:
        scores = _at(scores, picked)
        if away is not None:
            scores = scores.masked_fill(away, 0.0)
    elif mapped and table is not None:
        scores = (scores @ table.T).clamp(min=0.0)
    if correction is not None and table is not None:
        correction = correction @ table.T
    weights, place = _best(scores, rule, k, away, correction)
    floored = None
    if rule.renormalise or (mapped and rule.score == "chosen_softmax"):
        total = weights.sum(dim=-1, keepdim=True)
        if mapped:
            floored = (total < FLOOR).sum()
            total = total.clamp(min=FLOOR)
        elif rule.score == "sigmoid":
            total = total + FLOOR
        weights = weights / total
    if rule.scale is not None:
        weights = weights * rule.scale
    if rule.cast:
        weights = weights.to(dtype)
    return weights, _experts(place, picked), floored


def fits(logits: Tensor, k: int) -> bool:
    """Whether `fused` takes such logits."""
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return logits.shape[1] <= 512 and k <= 32 and logits.dtype in kinds


def fused(
    logits: Tensor, rule: Rule, k: int, mask: Tensor | None, tokens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`choose` with "slice" for routers that score by softmax and have no groups, in one kernel.

    Experts are those of `choose` but for equal scores; weights may differ in their last bits.

    Args:
        logits: (T, E) of all experts.
        rule: of the family.
        k: experts per token.
        mask: (K, E) bool, the experts that are there.
        tokens: (T,) int64, which mask a token takes; None = the first.
    """
    weights, experts = route_topk(logits, k, masks=mask, rows=tokens, renormalise=rule.renormalise)
    if rule.scale is not None:
        weights = weights * rule.scale
    return weights.to(logits.dtype) if rule.cast else weights, experts


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Columns of (T, E) by (1, E') or (T, E') numbers."""
    if len(index) == 1 and len(values) != 1:
        return values.index_select(1, index[0])
    return values.gather(1, index)


def _experts(place: Tensor, picked: Tensor | None) -> Tensor:
    if picked is None:
        return place
    if len(picked) == 1:
        return picked[0][place]
    return picked.gather(1, place)


def _best(
    scores: Tensor, rule: Rule, k: int, away: Tensor | None, correction: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and places of the k experts that are chosen."""
    compared = scores if correction is None else scores + correction
    if away is not None:
        # Below every group that was not chosen, whose scores may count as 0.
        compared = compared.masked_fill(away, -torch.inf if rule.score == "sigmoid" else -1.0)
    if rule.n_group > 1:
        outside = _outside_best_groups(compared, rule)
        low = -torch.inf if rule.score == "sigmoid" else 0.0
        if away is not None:
            outside = outside & ~away
        compared = compared.masked_fill(outside, low)
    if rule.score != "sigmoid" and rule.n_group == 1:
        return torch.topk(compared, k, dim=-1)
    place = torch.topk(compared, k, dim=-1, sorted=False)[1]
    return scores.gather(1, place), place


def _outside_best_groups(compared: Tensor, rule: Rule) -> Tensor:
    """(T, E') bool, True where an expert's group was not chosen."""
    inside = compared.reshape(len(compared), rule.n_group, -1)
    best = inside.topk(rule.group_best, dim=-1)[0].sum(dim=-1)
    chosen = torch.topk(best, rule.topk_group, dim=-1, sorted=False)[1]
    outside = torch.ones_like(best, dtype=torch.bool).scatter(1, chosen, False)
    return outside.unsqueeze(-1).expand_as(inside).flatten(1)
