"""A small trained mixture-of-experts model of characters, and the tasks that its experts divide.

A Mixtral of three layers with eight experts each, two per token, which reads one character at a
time. It knows four kinds of text: prose, sums, reversed words and Python code. The checkpoint
folder lies beside this file, with a folder of task files and a card (`characters.json`) that says
how it was trained and how well it does; `train_characters.py` writes all of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from searchlab.errors import DataError, unknown_name

__all__ = ["CHARACTERS", "TASKS", "character_card", "load_characters", "task_path"]

_HERE = Path(__file__).parent
CHARACTERS = _HERE / "characters_model"
"""The checkpoint folder, as `from_pretrained` takes it."""

TASKS = ("prose", "arithmetic", "reversal", "code")

_FORMAT = 1


def task_path(name: str) -> Path:
    """The file of one of `TASKS`.

    Raises:
        ConfigError: another name.
    """
    if name not in TASKS:
        raise unknown_name("task of the character model", name, TASKS)
    return _HERE / "characters_tasks" / f"{name}.jsonl"


def character_card() -> dict[str, Any]:
    """How the model was trained, its accuracies, and which experts each kind of text chooses.

    Raises:
        DataError: a card of another format.
    """
    card: dict[str, Any] = json.loads((_HERE / "characters.json").read_text("utf-8"))
    if card.get("format") != _FORMAT:
        raise DataError(f"characters.json has format {card.get('format')!r}; allowed: {_FORMAT}")
    return card


def load_characters() -> tuple[Any, Any]:
    """The model, in float32 on the CPU, and its tokenizer.

    Raises:
        DataError: the card is of another format, or the weights are not those of the card.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    card = character_card()
    found = hashlib.sha256((CHARACTERS / "model.safetensors").read_bytes()).hexdigest()
    if found != card["sha256"]:
        raise DataError(f"model.safetensors of {CHARACTERS} has hash {found}, not {card['sha256']}")
    model = AutoModelForCausalLM.from_pretrained(CHARACTERS, dtype="float32")
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(CHARACTERS)
