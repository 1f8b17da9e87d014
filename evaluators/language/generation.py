"""Greedy answers of a model, and whether they are exactly right."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from searchlab.errors import DataError
from searchlab.evaluator import Objective
from searchlab.evaluators.language.batches import left_padded
from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.scoring import ItemScores
from searchlab.evaluators.language.tasks import Item

__all__ = ["ExactMatch", "greedy"]

Tokens = tuple[int, ...]


def greedy(
    model: Any,
    contexts: Sequence[Tokens],
    *,
    new_tokens: int,
    prompts: Prompts,
    until: Sequence[str] = (),
    within: Callable[[Tensor], AbstractContextManager[Any]] | None = None,
) -> list[Tokens]:
    """The most probable next token, again and again, for each context.

    A row ends with a stop token, which is part of its answer, with one of the texts `until`, or
    after `new_tokens`. Rows that ended leave the batch as soon as they are half of it. Keys and
    values are kept where the model takes `past_key_values`.

    Args:
        model: called with input_ids, attention_mask and position_ids.
        contexts: tokens of each row; one call holds all of them.
        new_tokens: most tokens of an answer, 1 or more.
        prompts: padding, stop tokens and texts of tokens.
        until: texts that end an answer; only searched behind leading white space.
        within: from numbers of contexts (rows of a call) to the context the call is made in.
    """
    device = next(model.parameters()).device if hasattr(model, "parameters") else "cpu"
    assert prompts.pad is not None
    ids, mask, positions = (t.to(device) for t in left_padded(contexts, prompts.pad))
    caches = "past_key_values" in inspect.signature(getattr(model, "forward", model)).parameters
    answers: list[list[int]] = [[] for _ in contexts]
    rows = torch.arange(len(contexts), device=device)
    alive = [True] * len(contexts)
    past: Any = None
    fed, at = ids, positions
    for _ in range(new_tokens):
        with torch.no_grad(), within(rows) if within else nullcontext():
            if caches:
                out = model(
                    input_ids=fed,
                    attention_mask=mask,
                    position_ids=at,
                    past_key_values=past,
                    use_cache=True,
                )
                past = out.past_key_values
            else:
                out = model(input_ids=fed, attention_mask=mask, position_ids=at)
        chosen = getattr(out, "logits", out)[:, -1].argmax(dim=-1)
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            if alive[row]:
                answers[row].append(token)
                alive[row] = token not in prompts.stops and not _ends(prompts, answers[row], until)
        if not any(alive):
            break
        keep = torch.tensor([alive[row] for row in rows.tolist()], device=device)
        last = at[:, -1:] + 1
        fresh = chosen[:, None]
        if 2 * int(keep.sum()) <= len(rows):
            index = keep.nonzero()[:, 0]
            rows, mask, last, fresh = rows[index], mask[index], last[index], fresh[index]
            ids, positions = ids[index], positions[index]
            if past is not None:
                past.batch_select_indices(index)
        mask = torch.cat([mask, torch.ones_like(fresh)], dim=1)
        ids, positions = torch.cat([ids, fresh], dim=1), torch.cat([positions, last], dim=1)
        fed, at = (fresh, last) if caches else (ids, positions)
    return [tuple(answer) for answer in answers]


def _ends(prompts: Prompts, answer: Sequence[int], until: Sequence[str]) -> bool:
    if not until:
        return False
    text = prompts.text(answer).lstrip()
    return any(stop in text for stop in until)


@dataclass
class ExactMatch:
    """Whether a greedy answer is one of the accepted texts.

    The answer is what stands before the first of `until`, without white space around it.

    Args:
        items: with accepted texts.
        prompts: texts to tokens.
        new_tokens: most tokens of an answer.
        until: texts that end an answer.
        substring: an accepted text anywhere in the answer is enough; only for comparisons with
            published figures, since "12" then counts for "2".

    Raises:
        DataError: an item without an answer, or too long a one.
    """

    items: Sequence[Item]
    prompts: Prompts
    new_tokens: int = 32
    until: Sequence[str] = ("\n",)
    substring: bool = False
    contexts: list[Tokens] = field(init=False)
    best: float = 1.0
    objective: Objective = field(default_factory=lambda: Objective("exact_match", "max"))

    def __post_init__(self) -> None:
        self.contexts = []
        for number, item in enumerate(self.items):
            if not item.accepted:
                raise DataError(f"{item.called(number)} has no answer; exact match needs one")
            context = self.prompts.context(item)
            self.prompts.check(
                len(context) + self.new_tokens,
                f"{item.called(number)} with {self.new_tokens} generated tokens",
            )
            self.contexts.append(context)

    def text(self, answer: Sequence[int]) -> str:
        """The text of generated tokens that is compared."""
        text = self.prompts.text(answer).lstrip()
        for stop in self.until:
            text = text.split(stop)[0]
        return text.strip()

    def score(self, numbers: Sequence[int], answers: Sequence[Sequence[Tokens]]) -> ItemScores:
        """Scores of items by number, from answers [candidate][item]; no likelihoods."""
        scores = np.zeros((len(answers), len(numbers)))
        failures = np.zeros(scores.shape)
        for row, own in enumerate(answers):
            for place, (number, answer) in enumerate(zip(numbers, own, strict=True)):
                item, text = self.items[number], self.text(answer)
                accepted = [one.strip() for one in item.accepted]
                scores[row, place] = (
                    any(one in text for one in accepted) if self.substring else text in accepted
                )
                if item.options:
                    failures[row, place] = text not in [option.strip() for option in item.options]
                else:
                    failures[row, place] = not text or not self._ended(answer)
        return ItemScores(scores, np.full(scores.shape, np.nan), failures)

    def _ended(self, answer: Tokens) -> bool:
        stopped = bool(answer) and answer[-1] in self.prompts.stops
        return stopped or _ends(self.prompts, answer, self.until)
