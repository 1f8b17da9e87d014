"""Logits of whole models: any callable, or one model with candidates applied one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import EvaluationError
from searchlab.evaluators.language.batches import Batch

__all__ = [
    "Applied",
    "CandidateForward",
    "attention_of",
    "balance_of",
    "plain_logits",
    "takes_trees",
]


class CandidateForward(Protocol):
    """Logits of candidates; what a candidate is, is between it and who makes them."""

    def logits(self, batch: Batch, kept: Any) -> Iterator[tuple[NDArray[np.int64], Tensor]]: ...


def attention_of(model: Any, batch: Batch) -> Tensor:
    """A batch's mask as the model's attention takes it: for trees, numbers to add."""
    if not batch.tree:
        return batch.mask
    kind = next(model.parameters()).dtype
    blocked = torch.zeros(batch.mask.shape, dtype=kind, device=batch.mask.device)
    return blocked.masked_fill(~batch.mask, torch.finfo(kind).min)


def balance_of(model: Any, device: torch.device | None = None) -> int:
    """How many tokens a row has when attention costs as much as everything else in a layer.

    Attention compares all pairs of a row's tokens, the rest grows with their number. On a CPU a
    comparison takes about four times as long as its number of operations says.

    Args:
        model: of transformers; 1024 for any other.
        device: where it computes; None = where its weights are.
    """
    config: Any = getattr(model, "config", None)
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    width = getattr(config, "moe_intermediate_size", None) or getattr(
        config, "intermediate_size", 0
    )
    active = getattr(config, "num_experts_per_tok", None) or 1
    if not hidden:
        return 1024
    found = next(model.parameters()).device if device is None else device
    slower = 4 if found.type == "cpu" else 1
    return max(1, (2 * hidden + 3 * int(active) * int(width or 0) // 2) // slower)


def takes_trees(model: Any, longest: int) -> bool:
    """Whether a model of transformers can be given whom each token sees, for such sequences."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    return (window is None or longest <= window) and chunk is None


def plain_logits(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Logits (B, w, V) of the wanted columns.

    The model is called with input_ids, attention_mask and position_ids, and returns logits
    (B, S, V) or something that has them as `logits`. Where it takes `logits_to_keep`, only the
    last columns are asked for.

    Raises:
        EvaluationError: an answer of another shape.
    """
    mask = attention_of(model, batch) if batch.tree else batch.mask
    more: dict[str, Any] = {}
    names = inspect.signature(getattr(model, "forward", model)).parameters
    if "logits_to_keep" in names:
        more["logits_to_keep"] = batch.tail
    if "use_cache" in names:
        more["use_cache"] = False
    with torch.no_grad():
        out = model(input_ids=batch.ids, attention_mask=mask, position_ids=batch.positions, **more)
    logits = getattr(out, "logits", out)
    rows, size = batch.shape
    kept = more.get("logits_to_keep", size)
    if not isinstance(logits, Tensor) or logits.shape[:2] != (rows, kept):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise EvaluationError(f"the model returned {found}; allowed: logits ({rows}, {kept}, V)")
    return logits[torch.arange(rows, device=logits.device)[:, None], batch.wanted - (size - kept)]


class Applied:
    """One model that becomes each candidate for a while.

    Args:
        model: see `plain_logits`.
        apply: from a candidate to the context inside which the model is that candidate.
    """

    def __init__(
        self, model: Callable[..., Any], apply: Callable[[Any], AbstractContextManager[Any]]
    ) -> None:
        self.model = model
        self.apply = apply

    def logits(
        self, batch: Batch, kept: Sequence[Any] | NDArray[Any]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yields (candidates (1,), logits (1, B, w, V)); the candidate None is the model itself."""
        for number, candidate in enumerate(kept):
            with nullcontext() if candidate is None else self.apply(candidate):
                out = plain_logits(self.model, batch)
            yield np.array([number]), out[None]
