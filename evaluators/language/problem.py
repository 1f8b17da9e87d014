"""A task with a metric: its items as queries in batches, the same for every candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError, DataError, unknown_name
from searchlab.evaluator import Fidelity, Objective
from searchlab.evaluators.language.batches import Batch, lay_out
from searchlab.evaluators.language.generation import ExactMatch
from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.scoring import Divergence, MultipleChoice, Perplexity, Questions
from searchlab.evaluators.language.tasks import Item, Task
from searchlab.evaluators.noise import Split

__all__ = ["CHOICES", "METRICS", "Block", "LanguageProblem", "LanguageSettings", "Part"]

METRICS = ("options", "options_mean", "first_token", "kl_self", "perplexity", "exact_match")

CHOICES = ("options", "options_mean", "first_token")
"""Metrics that count items whose right option is chosen."""

Metric = Literal["options", "options_mean", "first_token", "kl_self", "perplexity", "exact_match"]
Answerer = Callable[[Sequence[tuple[int, ...]]], list[tuple[int, ...]]]


@dataclass(frozen=True)
class LanguageSettings:
    """How items are scored.

    Attributes:
        metric: "options" (the option of the highest log-probability), "options_mean" (per token),
            "first_token" (the most probable next token begins the right option), "kl_self"
            (divergence from the base on its own greedy answers), "perplexity", "exact_match"
            (greedy answers).
        few: items of the low fidelity; None = there is none.
        batch_tokens: about how many tokens a batch has; racing looks after each batch.
        new_tokens: most tokens of a generated answer.
        until: texts that end an answer of "exact_match".
        substring: see `ExactMatch`.
        packed: sequences that begin alike share a row; None = where the model allows it.
        smooth: for metrics of options, what a nat costs on search and selection items: scores lose
            this much per nat that the right answer's tokens are less likely (mean over them) than
            for the base. Report items are never smoothed. An accuracy over few items is coarse,
            so that the best of many candidates is best by luck; likelihoods tell them apart.
    """

    metric: Metric = "options"
    few: int | None = None
    batch_tokens: int = 2048
    new_tokens: int = 32
    until: tuple[str, ...] = ("\n",)
    substring: bool = False
    packed: bool | None = None
    smooth: float = 0.0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise unknown_name("metric", self.metric, METRICS)
        for name in ("few", "batch_tokens", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}; allowed: 1 or more")
        if not 0 <= self.smooth < math.inf:
            raise ConfigError(f"smooth {self.smooth}; allowed: 0 or more")
        if self.smooth and self.metric not in CHOICES:
            raise ConfigError(
                f"smooth {self.smooth} with metric {self.metric!r}; allowed: 0, or one of "
                f"{', '.join(CHOICES)}"
            )
        object.__setattr__(self, "until", tuple(self.until))


@dataclass(frozen=True)
class Block:
    """Items that are scored together: a batch of rows, or contexts to continue.

    Attributes:
        items: their numbers.
        batch: rows; None for generation.
        contexts: tokens of prompts; empty where there is a batch.
    """

    items: tuple[int, ...]
    batch: Batch | None = None
    contexts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Part:
    """The items of a split at a fidelity.

    Attributes:
        numbers: of the items, in their split.
        questions: how they are scored.
        blocks: all of them, in the order in which they are looked at.
    """

    numbers: tuple[int, ...]
    questions: Questions | ExactMatch
    blocks: tuple[Block, ...]

    @property
    def n(self) -> int:
        return len(self.numbers)

    @property
    def best(self) -> float:
        return self.questions.best

    def value(self, mean: float) -> float:
        """The metric from the mean score of the items."""
        return Perplexity.value(mean) if isinstance(self.questions, Perplexity) else mean

    def mean(self, value: float) -> float:
        """The mean score that stands for a value of the metric."""
        return Perplexity.mean(value) if isinstance(self.questions, Perplexity) else value


@dataclass
class LanguageProblem:
    """A task, how its texts become tokens, and a metric.

    Args:
        task: items and splits.
        prompts: texts to tokens.
        settings: the metric.
        trees: whether the model takes packed rows of such length, see `takes_trees`.
        balance: see `balance_of`.
        answer: the base's greedy answers to contexts, for "kl_self".
        device: where batches go.
    """

    task: Task
    prompts: Prompts
    settings: LanguageSettings = field(default_factory=LanguageSettings)
    trees: Callable[[int], bool] = lambda longest: False
    balance: int = 1024
    answer: Answerer | None = None
    device: Any = "cpu"

    def __post_init__(self) -> None:
        if self.settings.metric == "kl_self" and self.answer is None:
            raise ConfigError("kl_self needs the base's answers; allowed: give `answer`")
        self._parts: dict[tuple[Split, int], Part] = {}

    @property
    def objective(self) -> Objective:
        names: dict[str, Objective] = {
            "kl_self": Objective("kl", "min", unit="nat"),
            "perplexity": Objective("perplexity", "min"),
            "exact_match": Objective("exact_match", "max"),
        }
        return names.get(self.settings.metric, Objective("accuracy", "max"))

    @property
    def fidelities(self) -> tuple[Fidelity, ...]:
        few, full = self.settings.few, len(self.task.splits["search"])
        if few is None or few >= full:
            return (Fidelity("full"),)
        return (Fidelity("few", few / full), Fidelity("full"))

    def part(self, split: Split, fidelity: int = -1) -> Part:
        """Items of a split; made once. Fidelities below the last use few of them.

        Raises:
            DataError: an item that the metric cannot score; names the split.
        """
        fidelities = self.fidelities
        name = fidelities[fidelity].name
        key = (split, 0 if name == "few" else -1)
        if key not in self._parts:
            items = self.task.of(split)
            numbers = tuple(range(len(items)))
            if name == "few":  # spread over the file, whatever its order
                assert self.settings.few is not None
                spread = np.linspace(0, len(items) - 1, self.settings.few).round()
                numbers = tuple(dict.fromkeys(spread.astype(int).tolist()))
            try:
                self._parts[key] = self._made(numbers, [items[i] for i in numbers])
            except DataError as error:
                raise DataError(f"task {self.task.name!r}, {split}: {error}") from None
        return self._parts[key]

    def _made(self, numbers: tuple[int, ...], items: list[Item]) -> Part:
        settings = self.settings
        questions: Questions | ExactMatch
        if settings.metric == "exact_match":
            questions = ExactMatch(
                items,
                self.prompts,
                new_tokens=settings.new_tokens,
                until=settings.until,
                substring=settings.substring,
            )
            return Part(numbers, questions, self._to_continue(questions.contexts))
        if settings.metric == "kl_self":
            assert self.answer is not None
            contexts = [self.prompts.context(item) for item in items]
            for number, (item, context) in enumerate(zip(items, contexts, strict=True)):
                self.prompts.check(len(context) + settings.new_tokens, item.called(number))
            questions = Divergence(items, self.prompts, self.answer(contexts))
        elif settings.metric == "perplexity":
            questions = Perplexity(items, self.prompts)
        elif settings.metric == "first_token":
            questions = MultipleChoice(items, self.prompts, "first_token")
        else:
            mean = settings.metric == "options_mean"
            questions = MultipleChoice(items, self.prompts, "mean" if mean else "sum")
        longest = max(len(query.fed) for query in questions.queries)
        packed = self.trees(longest) if settings.packed is None else settings.packed
        assert self.prompts.pad is not None
        batches = lay_out(
            questions.queries,
            pad=self.prompts.pad,
            tokens=settings.batch_tokens,
            packed=packed,
            balance=self.balance,
        )
        moved = [batch.to(self.device) for batch in batches]
        return Part(numbers, questions, tuple(Block(b.items, b) for b in moved))

    def _to_continue(self, contexts: Sequence[tuple[int, ...]]) -> tuple[Block, ...]:
        """Contexts of similar length in blocks, by the tokens they may grow to."""
        order = sorted(range(len(contexts)), key=lambda number: len(contexts[number]))
        blocks, own = [], list[int]()
        for number in order:
            size = len(contexts[number]) + self.settings.new_tokens
            if own and (len(own) + 1) * size > self.settings.batch_tokens:
                blocks.append(own)
                own = []
            own.append(number)
        blocks.append(own)
        return tuple(Block(tuple(b), None, tuple(contexts[n] for n in b)) for b in blocks)

    def identity(self) -> Mapping[str, Any]:
        """What determines scores beside the model."""
        return {
            "task": self.task.digest(),
            "prompts": dict(self.prompts.identity(self.task.items)),
            "settings": {
                k: list(v) if isinstance(v, tuple) else v
                for k, v in asdict(self.settings).items()
                if k != "smooth" or v
            },
        }


@dataclass
class Scores:
    """Scores of n candidates, item by item, as far as they are known.

    Attributes:
        scores, nll, failures: float64 (n, items); NaN = not measured.
    """

    scores: NDArray[np.float64]
    nll: NDArray[np.float64]
    failures: NDArray[np.float64]

    @staticmethod
    def empty(n: int, items: int) -> Scores:
        return Scores(*(np.full((n, items), math.nan) for _ in range(3)))
