"""Tasks of a language model: prompts with options or answers, read from JSON lines."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

from searchlab.errors import ConfigError, DataError, SearchlabWarning
from searchlab.evaluators.noise import Split

__all__ = ["SPLITS", "Item", "Message", "Task", "read_task", "split_items"]

SPLITS: tuple[Split, ...] = get_args(Split)
Message = tuple[str, str]  # role, content

_FEWEST_TO_SPLIT = 8
_QUARTERS: tuple[Split, ...] = ("search", "search", "selection", "report")


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        prompt: the text, or messages of a chat as (role, content).
        options: continuations to choose from, exactly as they follow the prompt; may be empty.
        answer: number of the right option; None where there are no options or no answer is known.
        accepted: texts that are right as a generated answer; the right option's where there are
            options.
        line: where it stands in its file; 0 = in none. Items are equal without it.
    """

    prompt: str | tuple[Message, ...]
    options: tuple[str, ...] = ()
    answer: int | None = None
    accepted: tuple[str, ...] = ()
    line: int = field(default=0, compare=False, repr=False)

    def called(self, number: int) -> str:
        """How messages name it: by its number in a list, from 0, and its line."""
        return f"item {number + 1}" + (f" (line {self.line})" if self.line else "")

    def __post_init__(self) -> None:
        if not self.prompt:
            raise DataError("an empty prompt; allowed: a text or a list of messages")
        if any(not option for option in self.options):
            raise DataError("an empty option; allowed: texts of one character or more")
        if len(self.options) == 1:
            raise DataError(f"one option {self.options[0]!r}; allowed: none, or two and more")
        if len(set(self.options)) < len(self.options):
            twice = next(text for text, n in Counter(self.options).items() if n > 1)
            raise DataError(f"the option {twice!r} twice; allowed: each once")
        if self.answer is not None and not 0 <= self.answer < len(self.options):
            raise DataError(
                f"answer {self.answer} of {len(self.options)} options; allowed: "
                f"0 to {len(self.options) - 1}"
            )
        if self.answer is not None and not self.accepted:
            object.__setattr__(self, "accepted", (self.options[self.answer].strip(),))


@dataclass(frozen=True)
class Task:
    """Items, and which of them each split uses.

    Attributes:
        name: for tables.
        items: all items.
        splits: numbers of the items of "search", "selection" and "report".
    """

    name: str
    items: tuple[Item, ...]
    splits: Mapping[Split, tuple[int, ...]]

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not self.splits.get(split):
                raise DataError(f"task {self.name!r} has no items for {split}; allowed: 1 or more")

    def of(self, split: Split) -> list[Item]:
        """The items of a split, in order."""
        return [self.items[number] for number in self.splits[split]]

    def only(self, count: int) -> Task:
        """The same task with at most `count` items in each split."""
        if count < 1:
            raise ConfigError(f"{count} items; allowed: 1 or more")
        return replace(self, splits={s: self.splits[s][:count] for s in SPLITS})

    def majority(self, split: Split) -> float:
        """How often the best constant answer is right, 0 to 1; NaN where no answer is known."""
        items = self.of(split)
        numbers = Counter(item.answer for item in items if item.answer is not None)
        texts = Counter(item.accepted for item in items if item.accepted)
        best = max([*numbers.values(), *texts.values()], default=None)
        return float("nan") if best is None else best / len(items)

    def digest(self) -> str:
        """Hex digest of the items and the splits."""
        text = json.dumps(
            [
                [(i.prompt, i.options, i.answer, i.accepted) for i in self.items],
                {split: self.splits[split] for split in SPLITS},
            ],
            sort_keys=True,
        )
        return blake2b(text.encode(), digest_size=16).hexdigest()


def split_items(items: Sequence[Item]) -> dict[Split, tuple[int, ...]]:
    """Half of the items for the search, a quarter each for selection and report.

    Items with one prompt stay together. With fewer than 8 prompts all splits share all items,
    which a warning says.
    """
    group: dict[Any, int] = {}
    numbers = [group.setdefault(item.prompt, len(group)) for item in items]
    if len(group) < _FEWEST_TO_SPLIT:
        warnings.warn(
            f"{len(group)} prompts are too few to split: search, selection and report share them",
            SearchlabWarning,
            stacklevel=3,
        )
        return {split: tuple(range(len(items))) for split in SPLITS}
    return {
        split: tuple(i for i, g in enumerate(numbers) if _QUARTERS[g % 4] == split)
        for split in SPLITS
    }


def read_task(path: str | Path, *, name: str | None = None) -> Task:
    """Reads a task from JSON lines.

    Each line is an object with `prompt` (a text, or messages with `role` and `content`) and,
    where the metric needs them, `options` (texts) and `answer`: the number of the right option, its
    text, or for generation a text or a list of accepted texts. `split` is "search", "selection" or
    "report", in all lines or in none; without it items are split by `split_items`. Other fields are
    ignored. A folder holds `search.jsonl`, `selection.jsonl` and `report.jsonl` instead.

    Raises:
        DataError: no such file, or a line that is no item, named by file and line.
    """
    path = Path(path)
    if path.is_dir():
        parts = [(split, path / f"{split}.jsonl") for split in SPLITS]
        missing = [file.name for _, file in parts if not file.is_file()]
        if missing:
            raise DataError(
                f"{path} has no {', '.join(missing)}; a folder of a task holds "
                + ", ".join(f"{split}.jsonl" for split in SPLITS)
            )
        pairs = [(item, split) for split, file in parts for item, _ in _lines(file)]
        return _task(name or path.name, pairs)
    found = _lines(path)
    named = [number for number, (_, split) in enumerate(found) if split is not None]
    if named and len(named) < len(found):
        bare = next(number for number, (_, split) in enumerate(found) if split is None)
        raise DataError(f"{path}: item {bare + 1} has no split, others have; allowed: all or none")
    if named:
        return _task(name or path.stem, [(item, split) for item, split in found if split])
    items = tuple(item for item, _ in found)
    return Task(name or path.stem, items, split_items(items))


def _task(name: str, pairs: Sequence[tuple[Item, Split]]) -> Task:
    """A task of items whose splits were given; overlaps are said once."""
    splits = {s: tuple(i for i, (_, of) in enumerate(pairs) if of == s) for s in SPLITS}
    task = Task(name, tuple(item for item, _ in pairs), splits)
    prompts = {split: {item.prompt for item in task.of(split)} for split in SPLITS}
    for one, other in (("search", "selection"), ("search", "report"), ("selection", "report")):
        shared = prompts[one] & prompts[other]  # type: ignore[index]
        if shared:
            warnings.warn(
                f"task {name!r}: {one} and {other} share {len(shared)} prompt"
                f"{'s' * (len(shared) > 1)}, so the figures of {other} are too good",
                SearchlabWarning,
                stacklevel=4,
            )
    return task


def _lines(path: Path) -> list[tuple[Item, Split | None]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the task {path}: {error}") from None
    out = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item, split = _item(line)
            out.append((replace(item, line=number), split))
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not out:
        raise DataError(f"{path} has no items; allowed: one JSON object per line")
    return out


def _item(line: str) -> tuple[Item, Split | None]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"no JSON: {error.msg}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{type(fields).__name__} instead of an object with prompt")
    if "prompt" not in fields:
        raise DataError(f"no field 'prompt'; found: {', '.join(sorted(fields)) or 'none'}")
    options = fields.get("options", [])
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise DataError(f"options {str(options)[:60]!r}; allowed: a list of texts")
    if "options" in fields and not options:
        raise DataError("empty options; allowed: two texts or more, or no such field")
    split = fields.get("split")
    if split is not None and split not in SPLITS:
        raise DataError(f"split {split!r}; allowed: {', '.join(SPLITS)}")
    answer, accepted = _answer(fields.get("answer"), options)
    return Item(_prompt(fields["prompt"]), tuple(options), answer, accepted), split


def _prompt(given: Any) -> str | tuple[Message, ...]:
    if isinstance(given, str):
        return given
    if isinstance(given, list):
        messages = [m if isinstance(m, dict) else {} for m in given]
        if all(isinstance(m.get("role"), str) for m in messages) and all(
            isinstance(m.get("content"), str) for m in messages
        ):
            return tuple((m["role"], m["content"]) for m in messages)
    raise DataError(
        f"prompt {str(given)[:60]!r}; allowed: a text, or a list of objects with role and content"
    )


def _answer(given: Any, options: Sequence[str]) -> tuple[int | None, tuple[str, ...]]:
    """The right option and the accepted texts."""
    if given is None:
        return None, ()
    if options:
        if isinstance(given, int) and not isinstance(given, bool):
            return given, ()
        if isinstance(given, str):
            if given not in options:
                raise DataError(f"answer {given!r} is none of the options {list(options)}")
            return list(options).index(given), ()
        raise DataError(f"answer {given!r}; allowed: an option's number or text")
    texts = given if isinstance(given, list) else [given]
    if texts and all(isinstance(text, str) and text for text in texts):
        return None, tuple(texts)
    if isinstance(given, int | float) and not isinstance(given, bool):
        return None, (str(given),)
    raise DataError(f"answer {given!r}; allowed: a text or a list of texts")
