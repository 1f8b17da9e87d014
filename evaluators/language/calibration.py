"""One pass over a task's prompts: how much each expert is used, and what its absence changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import ConfigError, unknown_name
from searchlab.evaluators.language.batches import Batch
from searchlab.evaluators.language.layered import LayeredForward
from searchlab.spaces.experts.model import rule_of
from searchlab.spaces.experts.routing import choose

__all__ = ["SCORES", "Calibration", "baselines", "calibrate", "keep_best", "naee"]

Masks = NDArray[np.bool_]

SCORES = ("frequency", "soft", "ean", "reap")
MOST_SUBSETS = 20_000  # of one block that NAEE looks at
_CHUNK_NUMBERS = 2**24  # of outputs that are compared at a time


@dataclass
class _Sample:
    """Some tokens of one block: logits (T, E), every expert's output (E, T, d)."""

    logits: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    correction: Tensor | None = None


@dataclass
class Calibration:
    """What one pass of the unchanged model over a task's tokens has shown.

    Attributes:
        layout: of the experts.
        rule: of routing.
        tokens: how many were read.
        counts: (L, E) how often an expert was chosen.
        soft: (L, E) sums of router probabilities over all tokens.
        norms: (L, E) sums of output norms over the tokens that chose the expert.
        gated: (L, E) the same times the gate, which is one part of those chosen that sum to 1.
        top_k: experts per token.
    """

    layout: Any
    rule: Any
    top_k: int
    tokens: int
    counts: NDArray[np.float64]
    soft: NDArray[np.float64]
    norms: NDArray[np.float64]
    gated: NDArray[np.float64]
    _samples: list[_Sample] = field(repr=False)

    def scores(self, name: str) -> NDArray[np.float64]:
        """(L, E), larger = to be kept.

        "frequency": how often chosen; "soft": router probability; "ean": norms of outputs; "reap":
        mean over the tokens that chose an expert of gate times norm of output.
        Source: "reap" is arXiv 2510.13999, eq. 9, with gates that sum to 1 over those chosen.

        Raises:
            ConfigError: another name.
        """
        if name not in SCORES:
            raise unknown_name("score of experts", name, SCORES)
        if name == "reap":
            return self.gated / np.maximum(self.counts, 1.0)
        return {"frequency": self.counts, "soft": self.soft, "ean": self.norms}[name]

    def errors(self, block: int, masks: Masks) -> NDArray[np.float64]:
        """How far a block's output is off when only some experts are kept, on sampled tokens.

        Args:
            block: number of the block among those with experts.
            masks: (K, E).

        Returns:
            float64 (K,): ||Z - Z'|| / ||Z|| over the sample, where Z is what routed experts give.
        """
        sample = self._samples[block]
        logits, outputs = torch.cat(sample.logits), torch.cat(sample.outputs, dim=1)
        count = len(logits)
        every = torch.ones((1, masks.shape[1]), dtype=torch.bool)
        full = self._mixed(logits, outputs, every, sample.correction)[0]
        size = float(full.double().norm())
        out = np.zeros(len(masks))
        step = max(1, _CHUNK_NUMBERS // (count * outputs.shape[2] * self.top_k))
        kept = masks.sum(axis=1)
        for number in np.unique(kept):
            same = np.flatnonzero(kept == number)
            for start in range(0, len(same), step):
                own = same[start : start + step]
                mixed = self._mixed(
                    logits, outputs, torch.from_numpy(masks[own]), sample.correction
                )
                off = (mixed - full).flatten(1).double().norm(dim=1)
                out[own] = off.cpu().numpy() / max(size, 1e-30)
        return out

    def _mixed(
        self, logits: Tensor, outputs: Tensor, masks: Tensor, correction: Tensor | None
    ) -> Tensor:
        """Outputs (K, T, d) of the sampled tokens with masks (K, E) that keep equally many."""
        k, count = len(masks), len(logits)
        index = masks.nonzero()[:, 1].view(k, -1).to(logits.device)
        tokens = torch.arange(k, device=logits.device).repeat_interleave(count)
        weights, experts, _ = choose(
            logits.repeat(k, 1),
            self.rule,
            self.top_k,
            index=index,
            tokens=tokens,
            correction=correction,
        )
        which = torch.arange(count, device=logits.device).repeat(k)
        out = torch.zeros((k * count, outputs.shape[2]), device=logits.device)
        for place in range(experts.shape[1]):
            out += weights[:, place, None].float() * outputs[experts[:, place], which]
        return out.view(k, count, -1)

    def block_errors(self, masks: Masks) -> NDArray[np.float64]:
        """(n, L) of `errors` for masks (n, L, E); equal masks of a block are compared once."""
        out = np.zeros(masks.shape[:2])
        for block in range(masks.shape[1]):
            rows, back = np.unique(masks[:, block], axis=0, return_inverse=True)
            out[:, block] = self.errors(block, rows)[back.reshape(-1)]
        return out

    def kept_share(self, name: str, masks: Masks) -> NDArray[np.float64]:
        """(n,): which share of a score stays, mean over blocks."""
        share = _shares(self.scores(name))
        out: NDArray[np.float64] = (masks * share).sum(axis=2).mean(axis=1)
        return out


def _shares(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of each block as parts of 1."""
    total = scores.sum(axis=1, keepdims=True)
    return np.asarray(scores / np.where(total > 0, total, 1.0), dtype=np.float64)


def calibrate(
    forward: LayeredForward, batches: Sequence[Batch], *, sample: int = 256
) -> Calibration:
    """Reads batches once through the unchanged model, whether it is resident or streamed.

    Args:
        forward: the model.
        batches: tokens to read; what is asked of them does not matter.
        sample: about how many tokens of each block are kept with the outputs of all experts.

    Raises:
        ConfigError: no batches, or no sampled token.
    """
    if not batches or sample < 1:
        raise ConfigError(f"{len(batches)} batches, {sample} sampled tokens; allowed: 1 or more")
    layout = forward.resident.layout
    shape = (len(layout.blocks), layout.experts)
    total = sum(int(batch.real.sum()) for batch in batches)
    rule = rule_of(forward.model.config, forward.resident.family)  # type: ignore[attr-defined]
    samples = [_Sample() for _ in layout.blocks]
    sums = {name: np.zeros(shape) for name in ("counts", "soft", "norms", "gated")}

    def observe(block: int, router: Any, experts: Any, x: Tensor, batch: Batch) -> None:
        flat = x.reshape(-1, x.shape[-1])[batch.real.reshape(-1).to(x.device)]
        logits, weights, index = router(flat)
        weights = weights.float()
        gates = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-20)
        soft = logits.float().sigmoid() if rule.score == "sigmoid" else logits.float().softmax(-1)
        sums["soft"][block] += soft.sum(dim=0, dtype=torch.float64).cpu().numpy()
        every = max(1, math.ceil(total / sample))
        some = flat[::every]
        outputs = []
        for expert in range(layout.experts):
            token, place = torch.where(index == expert)
            sums["counts"][block, expert] += len(token)
            if len(token):
                norm = _alone(experts, flat[token], expert).float().norm(dim=1).double()
                sums["norms"][block, expert] += float(norm.sum())
                sums["gated"][block, expert] += float((norm * gates[token, place]).sum())
            outputs.append(_alone(experts, some, expert).float())
        own = samples[block]
        own.logits.append(logits[::every].clone())
        own.outputs.append(torch.stack(outputs))
        correction = getattr(router, "e_score_correction_bias", None)
        own.correction = None if correction is None else correction.detach().clone()

    full = np.ones((1, *shape), dtype=bool)
    forward.forget()  # every block has to be computed to be seen
    forward.observe = observe
    try:
        for _ in forward.sweep(batches, full):
            pass
    finally:
        forward.observe = None
    return Calibration(
        layout=layout,
        rule=rule,
        top_k=forward.active or layout.top_k,
        tokens=total,
        **sums,
        _samples=samples,
    )


def _alone(experts: Any, x: Tensor, expert: int) -> Tensor:
    """One expert's output for tokens (T, d)."""
    index = torch.full((len(x), 1), expert, dtype=torch.int64, device=x.device)
    out: Tensor = experts(x, index, torch.ones((len(x), 1), dtype=x.dtype, device=x.device))
    return out


def keep_best(space: Any, scores: NDArray[np.float64]) -> Masks:
    """The mask (L, E) of a space of kept experts with the best scores (L, E), ties to the first.

    Blocks that share a subset add their scores as shares of their block. Under a total, blocks get
    experts where the next best has the largest share, at least as many as they need.
    """
    share = _shares(scores - min(0.0, float(scores.min())))
    experts = share.shape[1]
    parts, each = space.parts, experts // space.parts
    groups = np.stack(
        [share[space.of_block == g].sum(axis=0) for g in range(space.of_block[-1] + 1)]
    )
    table = groups.reshape(len(groups), parts, each)
    order = np.argsort(-table, axis=2, kind="stable")
    ranked = np.take_along_axis(table, order, axis=2).sum(axis=1)  # (groups, each), falling
    if space.keep is not None:
        counts = np.full(len(groups), space.keep // parts)
    else:
        counts = np.full(len(groups), space.least // parts)
        while counts.sum() * parts < space.total:
            following = np.where(
                counts < each, ranked[np.arange(len(groups)), np.minimum(counts, each - 1)], -np.inf
            )
            counts[int(following.argmax())] += 1
    chosen = np.zeros(table.shape, dtype=bool)
    np.put_along_axis(chosen, order, np.arange(each) < counts[:, None, None], axis=2)
    out: Masks = chosen.reshape(len(groups), experts)[space.of_block]
    return out


def naee(space: Any, calibration: Calibration) -> Masks | None:
    """The mask (L, E) with the least block-output error, by looking at every subset.

    Blocks that share a subset add their errors. None where a block may keep different numbers, or
    there are too many subsets.

    Source: arXiv 2402.14800, eq. 2; on sampled tokens, and for every family.
    """
    if space.keep is None:
        return None
    parts, each = space.parts, calibration.layout.experts // space.parts
    keep = space.keep // parts
    if math.comb(each, keep) ** parts > MOST_SUBSETS:
        return None
    single = []
    for subset in itertools.combinations(range(each), keep):
        row = np.zeros(each, dtype=bool)
        row[list(subset)] = True
        single.append(row)
    every = np.array([np.concatenate(rows) for rows in itertools.product(single, repeat=parts)])
    out = np.zeros((len(space.of_block), calibration.layout.experts), dtype=bool)
    for group in range(int(space.of_block[-1]) + 1):
        own = np.flatnonzero(space.of_block == group)
        errors = sum(calibration.errors(int(block), every) for block in own)
        out[own] = every[int(np.argmin(errors))]
    return out


def baselines(space: Any, calibration: Calibration) -> dict[str, Masks]:
    """Name -> mask (L, E) of every baseline that needs no search: `space.of_masks` takes them.

    "frequency", "soft", "ean", "reap", and "naee" where its subsets can be looked at.
    """
    out = {name: keep_best(space, calibration.scores(name)) for name in SCORES}
    found = naee(space, calibration)
    if found is not None:
        out["naee"] = found
    return out
