"""What a mix of checkpoints is worth: its weights are made in memory and handed to a score."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchlab.errors import ConfigError, DataError, EvaluationError, SearchlabError
from searchlab.evaluator import Fidelity, Objective, Reproducibility, Signal
from searchlab.external import seed_of
from searchlab.population import FAILED, OK, Evaluations, Jobs
from searchlab.spaces.checkpoint_mix.bank import CheckpointBank
from searchlab.spaces.checkpoint_mix.layout import Segment
from searchlab.spaces.checkpoint_mix.merge import states

__all__ = ["FunctionScore", "MergedModelEvaluator", "MixSource", "Score", "State"]

VERSION = 2

State = Mapping[str, Tensor]


class MixSource(Protocol):
    """A space whose candidates are mixes."""

    def coefficients(self, population: Any) -> NDArray[np.float64]: ...


class Score(Protocol):
    """Scores the weights of one candidate.

    `score` gets every tensor of the checkpoints by name, in the stored dtype, an index into
    `fidelities` and the replicate (see `split_of`); it returns one value per objective and, if it
    has them, per-item scores. What it raises becomes the candidate's failure.
    """

    @property
    def objectives(self) -> tuple[Objective, ...]: ...
    @property
    def fidelities(self) -> tuple[Fidelity, ...]: ...
    @property
    def reproducibility(self) -> Reproducibility: ...
    def score(
        self, state: dict[str, Tensor], fidelity: int, replicate: int
    ) -> tuple[Sequence[float], NDArray[np.floating[Any]] | None]: ...
    def identity(self) -> Mapping[str, Any]: ...


@dataclass
class MergedModelEvaluator:
    """Mixes checkpoints of a bank and scores the result; nothing is written to disk.

    The weights that are scored are the ones that an export stores, bit for bit.

    Args:
        space: gives coefficients (n, G, K).
        bank: K checkpoints.
        score: what mixed weights are worth.
        groups: mixed tensor -> group number; None = one group.
    """

    space: MixSource
    bank: CheckpointBank
    score: Score
    groups: Mapping[str, int] | None = None
    _segments: list[list[Segment]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._segments = self.bank.layout.segments(self.groups)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return self.score.objectives

    @property
    def fidelities(self) -> tuple[Fidelity, ...]:
        return self.score.fidelities

    @property
    def signals(self) -> tuple[Signal, ...]:
        return (Signal("sum_of_magnitudes"),)

    @property
    def reproducibility(self) -> Reproducibility:
        return self.score.reproducibility

    def setup(self) -> None:
        """Nothing beyond the bank that was handed in."""

    def identity(self) -> Mapping[str, Any]:
        return {
            "version": VERSION,
            "checkpoints": self.bank.hashes,
            "delta": self.bank.delta,
            "tile": self.bank.tile,
            "groups": None if self.groups is None else dict(self.groups),
            "score": dict(self.score.identity()),
        }

    def states(self, coefficients: NDArray[np.float64]) -> Any:
        """The weights of candidates with coefficients (P, G, K), one after another."""
        return states(self.bank, coefficients, segments=self._segments)

    def evaluate(self, jobs: Jobs) -> Evaluations:
        """Values of the jobs; a candidate that cannot be scored fails with its reason."""
        table = self.space.coefficients(jobs.population)
        n, m = len(jobs), len(self.objectives)
        values, cost = np.full((n, m), np.nan), np.zeros(n)
        state, reason = np.full(n, OK, dtype=np.int8), [""] * n
        items: list[NDArray[np.floating[Any]] | None] = [None] * n
        usable = []
        for row in range(n):
            used = [k for k in self.bank.broken if table[row, :, k].any()]
            if used:
                state[row], reason[row] = FAILED, self.bank.broken[used[0]]
            else:
                usable.append(row)
        started = time.perf_counter()
        merged = self.states(table[usable]) if usable else iter(())
        for row, weights in zip(usable, merged, strict=True):
            try:
                answer, items[row] = self.score.score(weights, jobs.fidelity, jobs.replicate)
                values[row] = answer
            except EvaluationError as error:
                state[row], reason[row] = FAILED, str(error)
            except SearchlabError:
                raise
            except Exception as error:  # whatever a user's function raises is its candidate's
                text = " ".join(str(error).split())[:300]
                state[row], reason[row] = FAILED, f"{type(error).__name__}: {text}"
            cost[row], started = time.perf_counter() - started, time.perf_counter()
        return Evaluations(
            values=values,
            state=state,
            reason=reason,
            signals=np.abs(table).sum(axis=2).mean(axis=1)[:, None],
            cost_s=cost,
            items=items,
        )


@dataclass
class FunctionScore:
    """Any function of a state dict, or of a model that holds it.

    The function is called as f(state) or, where it needs a second argument, f(state, seed): the
    seed (0 to 2**31 - 1) is another one for every replicate of the search, selection and report
    splits, and the same for all candidates. With `model` it gets the module instead, with the
    weights loaded strictly (tensors that are tied to others may be missing, as trainers save them).

    Args:
        function: returns one number, or one per objective.
        name: what it is called, for the identity.
        model: a module, or a function that makes one.
        objectives: what it returns.
        seed: of the splits.
        version: raised by hand when the function's values change.
    """

    function: Callable[..., Any]
    name: str
    model: nn.Module | Callable[[], nn.Module] | None = None
    objectives: tuple[Objective, ...] = (Objective("value"),)
    fidelities: tuple[Fidelity, ...] = (Fidelity("full"),)
    reproducibility: Literal["exact", "batch", "noisy"] = "exact"
    seed: int = 0
    version: int = 1

    def __post_init__(self) -> None:
        try:
            parameters = inspect.signature(self.function).parameters.values()
            positional = [
                p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            ]
            second = positional[1] if len(positional) > 1 else None
            self._seeded = second is not None and (
                second.name == "seed" or second.default is second.empty
            )
        except (TypeError, ValueError):
            self._seeded = False
        self._module: nn.Module | None = None

    def identity(self) -> Mapping[str, Any]:
        return {"function": self.name, "seed": self.seed, "version": self.version}

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Whether the model takes these weights: to be asked before a search.

        Raises:
            DataError: it does not.
            ConfigError: `model` cannot be made, or makes something else.
        """
        if self.model is not None:
            self._loaded(state)

    def score(
        self, state: dict[str, Tensor], fidelity: int, replicate: int
    ) -> tuple[Sequence[float], None]:
        subject: Any = dict(state) if self.model is None else self._loaded(state)
        if self._seeded:
            answer = self.function(subject, seed_of(self.seed, replicate))
        else:
            answer = self.function(subject)
        return self._numbers(answer), None

    def _numbers(self, answer: Any) -> Sequence[float]:
        if isinstance(answer, Mapping):
            missing = [o.name for o in self.objectives if o.name not in answer]
            if missing:
                raise EvaluationError(f"{self.name} returned no {', '.join(missing)}")
            answer = [answer[o.name] for o in self.objectives]
        if isinstance(answer, Tensor):
            answer = answer.detach().cpu().numpy()
        try:
            numbers = np.asarray([] if answer is None else answer, dtype=np.float64).reshape(-1)
        except (TypeError, ValueError):
            numbers = np.empty(0)
        if len(numbers) != len(self.objectives):
            raise EvaluationError(
                f"{self.name} returned {answer!r}; allowed: {len(self.objectives)} number"
                f"{'s' * (len(self.objectives) > 1)}"
            )
        out: list[float] = numbers.tolist()
        return out

    def _made(self) -> Any:
        try:
            return self.model()  # type: ignore[misc]
        except Exception as error:  # whatever a user's function raises
            text = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"the model of {self.name} cannot be made: {type(error).__name__}: {text}"
            ) from None

    def _loaded(self, state: Mapping[str, Tensor]) -> nn.Module:
        if self._module is None:
            made = self.model if isinstance(self.model, nn.Module) else self._made()
            if not isinstance(made, nn.Module):
                raise ConfigError(f"model of {self.name} is {type(made).__name__}; allowed: Module")
            self._module = made.eval()
        with torch.no_grad():
            try:
                found = self._module.load_state_dict(dict(state), strict=False)
            except RuntimeError as error:
                text = " ".join(str(error).split())[:300]
                raise DataError(f"the checkpoints are not of the model: {text}") from None
        missing = found.missing_keys
        if missing:  # trainers leave out tensors that are tied to others
            held = self._module.state_dict()
            there = {held[name].data_ptr() for name in state if name in held}
            missing = [name for name in missing if held[name].data_ptr() not in there]
        for word, names in (("lack", missing), ("have", found.unexpected_keys)):
            if names:
                rest = f" and {len(names) - 1} more" * (len(names) > 1)
                raise DataError(
                    f"the checkpoints are not of the model: they {word} {names[0]!r}{rest}"
                )
        return self._module
