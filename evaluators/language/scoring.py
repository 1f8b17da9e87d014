"""Scores of items from a model's logits: multiple choice, perplexity, divergence from a base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import ConfigError, DataError
from searchlab.evaluator import Objective
from searchlab.evaluators.language.batches import Batch, Query
from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.tasks import Item

__all__ = [
    "Divergence",
    "ItemScores",
    "MultipleChoice",
    "Perplexity",
    "Questions",
    "token_log_probs",
]

Rule = Literal["sum", "mean", "first_token"]
_SLICE = 2**26  # logits that are normalised at a time


@dataclass(frozen=True)
class ItemScores:
    """What candidates got in the items of one batch.

    Attributes:
        scores: float64 (K, n); their mean over all items is the value.
        nll: float64 (K, n), negative log-likelihood of the right answer per token; NaN = unknown.
        failures: float64 (K, n), 1 where the answer has no valid form; NaN where no form is asked.
    """

    scores: NDArray[np.float64]
    nll: NDArray[np.float64]
    failures: NDArray[np.float64]


class Questions(Protocol):
    """Items of a split as queries, and how logits become scores.

    `best` is the best score that an item can have.
    """

    @property
    def objective(self) -> Objective: ...
    @property
    def queries(self) -> list[Query]: ...
    @property
    def best(self) -> float: ...
    def score(self, batch: Batch, logits: Tensor) -> ItemScores:
        """Scores of the batch's items from logits (K, B, w, V), candidates first."""


def token_log_probs(batch: Batch, logits: Tensor) -> Tensor:
    """Log-probability of each target token: (K, B, w, V) -> float32 (K, T)."""
    parts = []
    step = max(1, _SLICE // max(1, len(batch.row) * logits.shape[-1]))
    for start in range(0, len(logits), step):
        own = logits[start : start + step, batch.row, batch.slot].float()
        # Row by row, so that a candidate's figures do not depend on those beside it.
        own = torch.log_softmax(own, dim=-1)
        parts.append(own.gather(2, batch.target.expand(len(own), -1)[:, :, None])[:, :, 0])
    return torch.cat(parts)


def per_query(batch: Batch, tokens: Tensor) -> NDArray[np.float64]:
    """Sums of (K, T) over the tokens of each query: float64 (K, Q)."""
    out: NDArray[np.float64] = np.add.reduceat(
        tokens.double().cpu().numpy(), _first_places(batch).cpu().numpy(), axis=1
    )
    return out


@dataclass
class MultipleChoice:
    """Which option the model prefers; the score of an item is 1 where it is the right one.

    Rules: "sum", the option of the highest log-probability; "mean", per token; "first_token", the
    most probable token of all after the prompt has to begin the right option, and no other one,
    with or without a space, which is what a greedy answer would do.

    Raises:
        DataError: an item without options or answer, or too long a one.
    """

    items: Sequence[Item]
    prompts: Prompts
    rule: Rule = "sum"
    queries: list[Query] = field(init=False)
    best: float = 1.0
    objective: Objective = field(default_factory=lambda: Objective("accuracy", "max"))
    _starts: list[list[frozenset[int]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.queries, self._starts = [], []
        for number, item in enumerate(self.items):
            if not item.options or item.answer is None:
                raise DataError(
                    f"{item.called(number)} has no {'answer' if item.options else 'options'}; "
                    "multiple choice needs both"
                )
            context = self.prompts.context(item)
            starts = [self.prompts.starts(item, option) for option in item.options]
            self._starts.append(starts)
            for option in item.options:
                target = self.prompts.continuation(item, option)
                if self.rule == "first_token":
                    target = target[:1]
                self.prompts.check(len(context) + len(target), item.called(number))
                self.queries.append(Query(number, context, target))

    def option_of(self, number: int, token: int) -> int:
        """Which option of an item an answer with this first token means; -1 = none, or several."""
        means = [k for k, starts in enumerate(self._starts[number]) if token in starts]
        return means[0] if len(means) == 1 else -1

    def options(self, batch: Batch, logits: Tensor) -> NDArray[np.int64]:
        """Options (K, n) that candidates choose in a batch's items; -1 = none."""
        owners = np.array([query.item for query in batch.queries])
        table = None if self.rule == "first_token" else self._table(batch, logits)
        tops = self._tops(batch, logits)
        out = np.full((len(logits), len(batch.items)), -1, dtype=np.int64)
        for place, number in enumerate(batch.items):
            own = np.flatnonzero(owners == number)
            if table is not None:
                out[:, place] = table[:, own].argmax(axis=1)
            else:
                out[:, place] = [self.option_of(number, token) for token in tops[:, own[0]]]
        return out

    @staticmethod
    def _tops(batch: Batch, logits: Tensor) -> NDArray[np.int64]:
        """The most probable token (K, Q) where each query's target begins."""
        first = _first_places(batch)
        # Over the whole rows, so that copies of logits are not needed.
        tops = logits.argmax(dim=-1)[:, batch.row[first], batch.slot[first]]
        out: NDArray[np.int64] = tops.cpu().numpy()
        return out

    def _table(self, batch: Batch, logits: Tensor) -> NDArray[np.float64]:
        """What options are compared by: (K, Q)."""
        sums = per_query(batch, token_log_probs(batch, logits))
        lengths = np.array([len(query.target) for query in batch.queries])
        return sums / lengths if self.rule == "mean" else sums

    def score(self, batch: Batch, logits: Tensor) -> ItemScores:
        """See `Questions.score`."""
        sums = per_query(batch, token_log_probs(batch, logits))
        lengths = np.array([len(query.target) for query in batch.queries])
        tops = self._tops(batch, logits)
        owners = np.array([query.item for query in batch.queries])
        shape = (len(logits), len(batch.items))
        scores, nll, failures = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for place, number in enumerate(batch.items):
            own = np.flatnonzero(owners == number)
            answer = self.items[number].answer
            assert answer is not None
            means = sums[:, own] / lengths[own]
            nll[:, place] = -means[:, answer]
            every = frozenset().union(*self._starts[number])
            top = tops[:, own[0]]
            failures[:, place] = [token not in every for token in top]
            if self.rule == "first_token":
                scores[:, place] = [self.option_of(number, token) == answer for token in top]
            else:
                table = means if self.rule == "mean" else sums[:, own]
                scores[:, place] = table.argmax(axis=1) == answer
        return ItemScores(scores, nll, failures)


@dataclass
class Perplexity:
    """Perplexity of the answers after their prompts, or of the prompts where there is no answer.

    An item's score is its negative log-likelihood times N / T, for N items with T tokens in all: so
    the mean is the one over all tokens. `value` makes a perplexity of it.

    Raises:
        DataError: an item of a single token and without an answer, or too long a one.
    """

    items: Sequence[Item]
    prompts: Prompts
    queries: list[Query] = field(init=False)
    best: float = 0.0
    objective: Objective = field(default_factory=lambda: Objective("perplexity", "min"))

    def __post_init__(self) -> None:
        self.queries = []
        for number, item in enumerate(self.items):
            context = self.prompts.context(item)
            if item.accepted:
                option = item.options[item.answer] if item.answer is not None else item.accepted[0]
                target = self.prompts.continuation(item, option)
            else:
                context, target = context[:1], context[1:]
            if not target:
                raise DataError(f"{item.called(number)} has one token and no answer; allowed: more")
            self.prompts.check(len(context) + len(target), item.called(number))
            self.queries.append(Query(number, context, target))
        self._weight = len(self.queries) / sum(len(query.target) for query in self.queries)

    def score(self, batch: Batch, logits: Tensor) -> ItemScores:
        """See `Questions.score`."""
        nll = -per_query(batch, token_log_probs(batch, logits))
        lengths = np.array([len(query.target) for query in batch.queries])
        return ItemScores(nll * self._weight, nll / lengths, np.full(nll.shape, np.nan))

    @staticmethod
    def value(mean: float) -> float:
        """Perplexity of a mean score."""
        return math.exp(min(mean, 700.0))

    @staticmethod
    def mean(value: float) -> float:
        """The mean score of a perplexity."""
        return math.log(value) if value > 0 else -math.inf


@dataclass
class Divergence:
    """KL divergence of the candidate from the base on the base's own greedy answers.

    An item's score is the mean of KL(base || candidate) over the tokens of the answer, in nats:
    zero for the base itself. Prompts are enough, no answers have to be known.

    Args:
        items: whose prompts are used.
        prompts: texts to tokens.
        answers: the base's greedy answer to each prompt, one token or more.
        most_bytes: memory that the base's distributions may take.

    Raises:
        ConfigError: they would take more.
    """

    items: Sequence[Item]
    prompts: Prompts
    answers: Sequence[tuple[int, ...]]
    most_bytes: int = 4 * 2**30
    queries: list[Query] = field(init=False)
    best: float = 0.0
    objective: Objective = field(default_factory=lambda: Objective("kl", "min", unit="nat"))
    _base: dict[bytes, Tensor] = field(init=False, default_factory=dict, repr=False)
    _bytes: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        self.queries = []
        for number, (item, answer) in enumerate(zip(self.items, self.answers, strict=True)):
            context = self.prompts.context(item)
            self.prompts.check(len(context) + len(answer), f"{item.called(number)} with its answer")
            self.queries.append(Query(number, context, tuple(answer)))

    def remember(self, batch: Batch, logits: Tensor) -> None:
        """Keeps the base's distributions from its logits (1, B, w, V)."""
        own = torch.log_softmax(logits[0, batch.row, batch.slot].float(), dim=-1)
        self._bytes += own.numel() * own.element_size()
        if self._bytes > self.most_bytes:
            raise ConfigError(
                f"the base's distributions over {own.shape[-1]} tokens take more than "
                f"{self.most_bytes} bytes; allowed: fewer items or shorter answers"
            )
        self._base[batch.key] = own

    def knows(self, batch: Batch) -> bool:
        """Whether the base was asked about a batch."""
        return batch.key in self._base

    def score(self, batch: Batch, logits: Tensor) -> ItemScores:
        """See `Questions.score`."""
        base = self._base[batch.key].to(logits.device)
        chosen = batch.target[:, None]
        divergences, nll = [], []
        for own in logits:
            log = torch.log_softmax(own[batch.row, batch.slot].float(), dim=-1)
            # Summed in float64: a divergence is a small difference of large terms.
            divergences.append((base.exp() * (base - log)).sum(dim=-1, dtype=torch.float64))
            nll.append(-log.gather(1, chosen)[:, 0])
        lengths = np.array([len(query.target) for query in batch.queries])
        scores = per_query(batch, torch.stack(divergences)) / lengths
        return ItemScores(
            np.maximum(scores, 0.0),
            per_query(batch, torch.stack(nll)) / lengths,
            np.full(scores.shape, np.nan),
        )


def _first_places(batch: Batch) -> Tensor:
    """Number of the first target token of each query, in their order."""
    lengths = torch.tensor([len(query.target) for query in batch.queries])
    return (lengths.cumsum(0) - lengths).to(batch.query.device)
