"""How fast a model answers, and what its weights take."""

from __future__ import annotations

import math
import time
from typing import Any

from searchlab.experiments.experts_setup import Loaded

__all__ = ["answer_speed", "weights_of"]

_TIMED_S = 0.5  # seconds of one timing
_ROWS, _TOKENS = 16, 16  # answers at once, and their length


def weights_of(model: Any) -> int:
    """Bytes of a model's weights where they are now, each once."""
    seen = {tensor.data_ptr(): tensor for tensor in model.parameters()}
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


def answer_speed(loaded: Loaded, model: Any) -> float:
    """Greedy tokens per second of 16 answers at once to search prompts, best of several."""
    from searchlab.evaluators.language.generation import greedy

    prepared = loaded.prepared
    room = (prepared.prompts.limit or 2**31) - _TOKENS
    contexts = [
        prepared.prompts.context(item)[-max(1, room) :]
        for item in prepared.task.of("search")[:_ROWS]
    ]
    best, begun, passes = 0.0, time.perf_counter(), 0
    while passes < 2 or (time.perf_counter() - begun < _TIMED_S and passes < 10):
        started = time.perf_counter()
        answers = greedy(model, contexts, new_tokens=_TOKENS, prompts=prepared.prompts)
        best = max(best, sum(map(len, answers)) / (time.perf_counter() - started))
        passes += 1
    return best if best else math.nan
