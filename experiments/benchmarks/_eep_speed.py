"""Candidates per second of the evaluator of kept experts against the straightforward way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from searchlab.evaluators.language.batches import lay_out, left_padded
from searchlab.evaluators.language.forward import balance_of, takes_trees
from searchlab.evaluators.language.layered import LayeredForward
from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.scoring import MultipleChoice
from searchlab.evaluators.language.tasks import Item
from searchlab.spaces.experts.cut import cut_model
from searchlab.spaces.experts.model import ResidentExperts

__all__ = ["Speed", "few_shot_items", "measure"]


@dataclass(frozen=True)
class Speed:
    """How long the same candidates took on the same items.

    Attributes:
        ours, plain: seconds of process time per candidate.
        ours_wall, plain_wall: seconds of the clock per candidate.
        ratio: of process times.
        same: share of (candidate, item) pairs with the same predicted option, or none by both.
        candidates, plain_candidates, items: how many; the straightforward way is timed on the
            first candidates only.
        tokens: of all prompts.
    """

    ours: float
    plain: float
    ours_wall: float
    plain_wall: float
    ratio: float
    same: float
    candidates: int
    plain_candidates: int
    items: int
    tokens: int


def few_shot_items(items: list[Item], header: str) -> list[Item]:
    """Items behind one header, as worked examples are given."""
    return [Item(f"{header}{item.prompt}", item.options, item.answer) for item in items]


def predicted_by_generation(
    model: Any, questions: MultipleChoice, prompts: Prompts, *, new_tokens: int, batch: int
) -> NDArray[np.int64]:
    """Options (n,) that greedy answers begin with, -1 = none: the usual way to score."""
    contexts = [prompts.context(item) for item in questions.items]
    out = np.full(len(contexts), -1, dtype=np.int64)
    assert prompts.pad is not None
    for start in range(0, len(contexts), batch):
        own = contexts[start : start + batch]
        ids, mask, _ = left_padded(own, prompts.pad)
        with torch.no_grad():
            answers = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=prompts.pad,
            )
        for row, answer in enumerate(answers[:, ids.shape[1] :].tolist()):
            out[start + row] = questions.option_of(start + row, answer[0])
    return out


def measure(
    resident: ResidentExperts,
    prompts: Prompts,
    items: list[Item],
    masks: NDArray[np.bool_],
    *,
    plain_candidates: int = 3,
    new_tokens: int = 20,
    batch: int = 32,
    batch_tokens: int = 4096,
) -> Speed:
    """Times both ways on one thread and compares what they predict on every item.

    The straightforward way rebuilds the pruned model, generates `new_tokens` in batches of `batch`
    and looks how the answer begins. Ours asks for the first token of all candidates at once.

    Args:
        resident: the whole model.
        prompts: texts to tokens.
        items: with options that begin with different tokens.
        masks: (K, L, E).
        plain_candidates: how many candidates the straightforward way is timed on.
        new_tokens, batch: of the straightforward way.
        batch_tokens: of ours.
    """
    started, clock = time.process_time(), time.perf_counter()
    questions = MultipleChoice(items, prompts, "first_token")
    longest = max(len(query.fed) for query in questions.queries)
    assert prompts.pad is not None
    batches = lay_out(
        questions.queries,
        pad=prompts.pad,
        tokens=batch_tokens,
        packed=takes_trees(resident.model, longest),
        balance=balance_of(resident.model),
    )
    forward = LayeredForward(resident, tokens=batch_tokens * 2, remember=0)
    ours = np.full((len(masks), len(items)), -2, dtype=np.int64)
    for one in batches:
        for who, logits in forward.logits(one, masks):
            ours[np.ix_(who, np.array(one.items))] = questions.options(one, logits)
    ours_cpu = (time.process_time() - started) / len(masks)
    ours_wall = (time.perf_counter() - clock) / len(masks)
    started, clock = time.process_time(), time.perf_counter()
    plain = []
    for mask in masks[:plain_candidates]:
        model = cut_model(resident, mask)
        plain.append(
            predicted_by_generation(model, questions, prompts, new_tokens=new_tokens, batch=batch)
        )
    count = len(plain)
    plain_cpu = (time.process_time() - started) / count
    plain_wall = (time.perf_counter() - clock) / count
    return Speed(
        ours=ours_cpu,
        plain=plain_cpu,
        ours_wall=ours_wall,
        plain_wall=plain_wall,
        ratio=plain_cpu / ours_cpu,
        same=float((np.stack(plain) == ours[:count]).mean()),
        candidates=len(masks),
        plain_candidates=count,
        items=len(items),
        tokens=sum(len(prompts.context(item)) for item in items),
    )
