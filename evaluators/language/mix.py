"""Tasks of language as the score of mixed checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import DataError
from searchlab.evaluator import Fidelity, Objective, Reproducibility
from searchlab.evaluators.language.forward import balance_of, plain_logits, takes_trees
from searchlab.evaluators.language.generation import ExactMatch, greedy
from searchlab.evaluators.language.problem import LanguageProblem, LanguageSettings
from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.scoring import Divergence
from searchlab.evaluators.language.tasks import SPLITS, Task
from searchlab.evaluators.sampling import split_of

__all__ = ["LanguageScore"]


class LanguageScore:
    """A score for `MergedModelEvaluator`: mixed weights are loaded into a model and asked a task.

    Args:
        model: a language model, or a function that makes one; called with input_ids,
            attention_mask and position_ids, it returns logits. "kl_self" compares with the weights
            that it has at first.
        task: items and splits.
        prompts: texts to tokens.
        settings: the metric.
        name: of the model, for the identity.
        version: raised by hand when the model's code changes values.
    """

    def __init__(
        self,
        model: Any | Callable[[], Any],
        task: Task,
        prompts: Prompts,
        settings: LanguageSettings | None = None,
        *,
        name: str,
        version: int = 1,
    ) -> None:
        given: Any = model
        self._made: Any = given if hasattr(given, "load_state_dict") else given()
        self._made.eval()
        self.name = name
        self.version = version
        self.problem = LanguageProblem(
            task,
            prompts,
            settings or LanguageSettings(),
            trees=lambda longest: takes_trees(self._made, longest),
            balance=balance_of(self._made),
            answer=self._answer,
            device=next(self._made.parameters()).device,
        )
        if self.problem.settings.metric == "kl_self":  # while the model has its own weights
            for split in SPLITS:
                part = self.problem.part(split)
                assert isinstance(part.questions, Divergence)
                for block in part.blocks:
                    assert block.batch is not None
                    part.questions.remember(
                        block.batch, plain_logits(self._made, block.batch)[None]
                    )

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return (self.problem.objective,)

    @property
    def fidelities(self) -> tuple[Fidelity, ...]:
        # Few items are no part of the base's answers that were asked for at first.
        if self.problem.settings.metric == "kl_self":
            return self.problem.fidelities[-1:]
        return self.problem.fidelities

    @property
    def reproducibility(self) -> Reproducibility:
        # One model at a time and the same batches for all.
        return "exact" if str(self.problem.device) == "cpu" else "batch"

    def _answer(self, contexts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        settings = self.problem.settings
        return greedy(
            self._made,
            contexts,
            new_tokens=settings.new_tokens,
            prompts=self.problem.prompts,
            until=settings.until if settings.metric == "exact_match" else (),
        )

    def score(
        self, state: dict[str, Tensor], fidelity: int, replicate: int
    ) -> tuple[Sequence[float], NDArray[np.floating[Any]] | None]:
        """The metric of weights, and the scores of the items.

        Raises:
            DataError: weights that the model does not have.
        """
        found = self._made.load_state_dict(dict(state), strict=False)
        tied = set(getattr(self._made, "_tied_weights_keys", None) or ())
        missing = [key for key in found.missing_keys if key not in tied]
        if missing or found.unexpected_keys:
            wrong = (missing or found.unexpected_keys)[0]
            raise DataError(f"the checkpoints are not of the model {self.name!r}: {wrong!r}")
        split, _ = split_of(replicate)
        if self.problem.settings.metric == "kl_self":
            fidelity = -1
        part = self.problem.part(split, fidelity)
        scores = np.zeros(part.n)
        for block in part.blocks:
            if isinstance(part.questions, ExactMatch):
                answers = self._answer(block.contexts)
                one = part.questions.score(block.items, [answers])
            else:
                assert block.batch is not None
                logits = plain_logits(self._made, block.batch)[None]
                one = part.questions.score(block.batch, logits)
            scores[list(block.items)] = one.scores[0]
        return [part.value(float(scores.mean()))], scores

    def identity(self) -> Mapping[str, Any]:
        return {"model": self.name, "version": self.version, **self.problem.identity()}
