"""Texts and tasks of the tests of language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from searchlab.evaluators.language.batches import Query
from searchlab.evaluators.language.tasks import Item, Task

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;+-=?!()"


class Letters:
    """A token per letter; 0 pads, 1 begins and 2 ends a text."""

    pad_token_id: int | None = 0
    eos_token_id: int | None = 2
    chat_template: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [3 + ALPHABET.index(letter) for letter in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        known = {0: "", 1: "", 2: ""} if skip_special_tokens else {0: "<0>", 1: "<1>", 2: "<2>"}
        return "".join(known[i] if i < 3 else ALPHABET[(i - 3) % len(ALPHABET)] for i in ids)


class Chatty(Letters):
    chat_template = "yes"

    def apply_chat_template(
        self, messages: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        return "".join(f"({m['role']}) {m['content']}." for m in messages) + "(assistant) "


def made_items(n: int, *, seed: int = 0, header: str = "") -> list[Item]:
    rng = np.random.default_rng(seed)

    def word(low: int, high: int) -> str:
        return "".join(rng.choice(list("abcdefghij"), rng.integers(low, high)))

    items = []
    for number in range(n):
        options = sorted({word(1, 4) for _ in range(5)})[:3]
        items.append(Item(f"{header}{number} {word(3, 9)}:", tuple(options), number % len(options)))
    return items


def made_task(n: int = 24, **more: Any) -> Task:
    items = tuple(made_items(n, **more))
    half, quarter = n // 2, n // 4
    numbers = range(n)
    return Task(
        "made",
        items,
        {
            "search": tuple(numbers[:half]),
            "selection": tuple(numbers[half : half + quarter]),
            "report": tuple(numbers[half + quarter :]),
        },
    )


def queries(n: int, *, seed: int = 1, shared: int = 0) -> list[Query]:
    rng = np.random.default_rng(seed)
    start = tuple(rng.integers(3, 50, shared).tolist())
    out = []
    for item in range(n):
        context = start + tuple(rng.integers(3, 50, rng.integers(2, 12)).tolist())
        out += [
            Query(item, context, tuple(rng.integers(3, 50, rng.integers(1, 4)).tolist()))
            for _ in range(3)
        ]
    return out
