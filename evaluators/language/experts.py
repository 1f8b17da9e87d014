"""What a model with other experts is worth in a task of language."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import ConfigError, unknown_name
from searchlab.evaluator import Fidelity, Objective, Reproducibility, Signal
from searchlab.evaluators.language.batches import Batch, Query, lay_out
from searchlab.evaluators.language.forward import (
    Applied,
    CandidateForward,
    balance_of,
    takes_trees,
)
from searchlab.evaluators.language.generation import ExactMatch, greedy
from searchlab.evaluators.language.intervals import Summary, summarise
from searchlab.evaluators.language.layered import LayeredForward
from searchlab.evaluators.language.problem import (
    Block,
    LanguageProblem,
    LanguageSettings,
    Part,
    Scores,
)
from searchlab.evaluators.language.prompts import Prompts, Tokenizer
from searchlab.evaluators.language.scoring import Divergence, ItemScores
from searchlab.evaluators.language.spread import SpreadForward, devices_of
from searchlab.evaluators.language.static_figures import StaticFigures
from searchlab.evaluators.language.streaming import WeightStream
from searchlab.evaluators.language.tasks import Task
from searchlab.evaluators.noise import Split
from searchlab.evaluators.sampling import split_of
from searchlab.item_evaluator import PRUNED_REASON
from searchlab.population import OK, PRUNED, Evaluations, Jobs, Population

__all__ = ["ExpertsEvaluator", "applied_evaluator", "experts_evaluator", "model_hash", "stops_of"]

VERSION = 1

_MEASURED = (Signal("nll", "min", "nat"), Signal("format_failures", "min"))
_SLACK = 1e-9  # of a mean score: what rounding may do to a sum of items
_ENDS = 2**16  # bytes of each tensor's start and end that the hash reads

Tokens = tuple[int, ...]


class ExpertsEvaluator:
    """Scores candidates of a space of experts on the items of a task.

    Candidates that are masks go through the model together, see `LayeredForward`; others one by
    one. Items are looked at in blocks, in one order for all candidates. A job with a bound stops
    once the best scores in all items that are left could not bring it back: it is then pruned, and
    its value is the bound, exactly as in `ItemEvaluator`. With a `LayeredForward` that streams
    weights all items of all candidates of a chunk pass each layer together; nothing stops early.

    The search, selection and report splits are the task's; replicates of a split are equal. With
    `LanguageSettings.smooth` values of search and selection items are accuracies with likelihoods.

    Signals: "nll", the negative log-likelihood of the right answer per token; "format_failures",
    the share of answers without a valid form. NaN where unknown or pruned. `add_signals` gives
    figures of candidates that were never evaluated, see `static_signals`.

    Args:
        problem: task and metric.
        forward: the model.
        candidates: from a population to what `forward` takes, a row each.
        base: what stands for the unchanged model there, one row.
        identity: JSON that determines the model and how candidates change it.
        at_once: most candidates of one pass.
        within: for generation, from candidates and rows' numbers of candidates to the context of
            a call.
        exact: whether values do not depend on the other candidates of a chunk.
        also: name -> figures (n,) of candidates that are minimised beside the metric.
    """

    prunes: ClassVar[bool] = True
    remembers: ClassVar[bool] = True  # static signals: asking again costs nothing

    def __init__(
        self,
        problem: LanguageProblem,
        forward: CandidateForward,
        *,
        candidates: Callable[[Population], Any],
        base: Any,
        identity: Mapping[str, Any],
        at_once: int = 32,
        within: Callable[[Any, Tensor], AbstractContextManager[Any]] | None = None,
        exact: bool = False,
        also: Mapping[str, Callable[[Population], NDArray[np.float64]]] | None = None,
    ) -> None:
        if at_once < 1:
            raise ConfigError(f"{at_once} candidates at once; allowed: 1 or more")
        self.problem = problem
        self.forward = forward
        self._candidates = candidates
        self._base = base
        self._identity = dict(identity)
        self._most = self._at_once = at_once
        self._tokens = getattr(forward, "tokens", 0)
        self._within = within
        self._exact = exact
        self._also = dict(also or {})
        self.measured = 0  # candidates times items, the base's own not counted
        self._static: StaticFigures | None = None
        self._smooth = problem.settings.smooth
        self._base_nll: dict[tuple[Split, int], NDArray[np.float64]] = {}

    @property
    def micro_batch(self) -> int:
        """Most candidates of one pass; with fewer, calls hold fewer tokens too."""
        return self._at_once

    @micro_batch.setter
    def micro_batch(self, count: int) -> None:
        self._at_once = max(1, count)
        if isinstance(self.forward, LayeredForward):
            self.forward.tokens = max(1, self._tokens * self._at_once // self._most)
            self.forward.forget()

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return (self.problem.objective, *(_figure(name) for name in self._also))

    @property
    def fidelities(self) -> tuple[Fidelity, ...]:
        return self.problem.fidelities

    @property
    def signals(self) -> tuple[Signal, ...]:
        return _MEASURED + (() if self._static is None else self._static.signals)

    def add_signals(self, static: StaticFigures) -> None:
        """Adds cheap figures of candidates; before the search begins."""
        self._static = static

    def static_signals(self, population: Population) -> NDArray[np.float64]:
        """Figures of candidates without an evaluation: float64 (n, signals), NaN = not static."""
        out = np.full((len(population), len(self.signals)), np.nan)
        if self._static is not None:
            out[:, len(_MEASURED) :] = self._static(self._candidates(population))
        return out

    @property
    def reproducibility(self) -> Reproducibility:
        return "exact" if self._exact else "batch"

    def setup(self) -> None:
        """Makes the search split's batches, so that what is wrong with a task is said at once."""
        self.problem.part("search")

    def forget(self) -> None:
        """Drops states that the forward remembers."""
        getattr(self.forward, "forget", lambda: None)()

    def identity(self) -> Mapping[str, Any]:
        return {"version": VERSION, **self._identity, **self.problem.identity()}

    def evaluate(self, jobs: Jobs) -> Evaluations:
        """See `Evaluator.evaluate`; `items` holds the scores of candidates that were finished."""
        started, n = time.perf_counter(), len(jobs)
        split, _ = split_of(jobs.replicate)
        part = self.problem.part(split, jobs.fidelity)
        sign = 1.0 if self.problem.objective.direction == "min" else -1.0
        bound = np.full(n, np.nan) if jobs.bound is None else np.asarray(jobs.bound)
        given = self._candidates(jobs.population)
        found = Scores.empty(n, part.n)
        racing = np.ones(n, dtype=bool)
        limits = np.array([sign * part.mean(sign * b) if np.isfinite(b) else np.nan for b in bound])
        streams = bool(getattr(self.forward, "streams", False))
        smooth = 0.0 if split == "report" else self._smooth
        base = self._nll_of_base(split, part) if smooth else np.zeros(part.n)
        best = part.best + smooth * base
        for blocks in [part.blocks] if streams else [(block,) for block in part.blocks]:
            rows = np.flatnonzero(racing)
            for start in range(0, len(rows), self._at_once if not streams else max(1, n)):
                own = rows[start : start + self._at_once] if not streams else rows
                for items, who, scores in self._scores(part, blocks, given[own]):
                    at = np.ix_(own[who], np.array(items))
                    found.scores[at] = scores.scores
                    if smooth:
                        found.scores[at] -= smooth * (scores.nll - base[list(items)])
                    found.nll[at] = scores.nll
                    found.failures[at] = scores.failures
                    self.measured += scores.scores.size
            racing[rows] = ~_hopeless(found.scores[rows], sign, best, limits[rows])
            if not racing.any():
                break
        values = np.array([part.value(float(row.mean())) for row in found.scores])
        state = np.full(n, OK, dtype=np.int8)
        beyond = ~racing | (sign * values > bound)
        state[beyond] = PRUNED
        values[beyond] = sign * bound[beyond]
        signals = np.full((n, len(self.signals)), np.nan)
        signals[:, 0], signals[:, 1] = found.nll.mean(axis=1), found.failures.mean(axis=1)
        signals[beyond] = np.nan
        columns = [values, *(figure(jobs.population) for figure in self._also.values())]
        return Evaluations(
            values=np.stack(columns, axis=1),
            state=state,
            reason=[PRUNED_REASON if flag else "" for flag in beyond],
            signals=signals,
            cost_s=np.full(n, (time.perf_counter() - started) / max(1, n)),
            items=[None if flag else row for flag, row in zip(beyond, found.scores, strict=True)],
        )

    def summaries(self, population: Population, split: Split) -> list[Summary]:
        """Figures of candidates on all items of a split, with intervals and constant answers."""
        return self._summaries(self._candidates(population), split)

    def base(self, split: Split) -> Summary:
        """Figures of the unchanged model."""
        with self._unchanged():
            return self._summaries(self._base, split)[0]

    def _unchanged(self) -> AbstractContextManager[None]:
        """Inside, the base is routed as the model itself is, whatever candidates do."""
        forward = self.forward
        return forward.routed() if isinstance(forward, LayeredForward) else nullcontext()

    def _summaries(self, given: Any, split: Split) -> list[Summary]:
        part = self.problem.part(split)
        found = Scores.empty(len(given), part.n)
        for start in range(0, len(given), self._at_once):
            own = np.arange(start, min(start + self._at_once, len(given)))
            for items, who, scores in self._scores(part, part.blocks, given[own]):
                at = np.ix_(own[who], np.array(items))
                found.scores[at], found.failures[at] = scores.scores, scores.failures
        task = self.problem.task
        return [
            summarise(task, split, part.value(float(row.mean())), row, failures=float(bad.mean()))
            for row, bad in zip(found.scores, found.failures, strict=True)
        ]

    def plain(self) -> ExpertsEvaluator:
        """The same without smoothing on any split, for tables; not for records of a run."""
        made = ExpertsEvaluator.__new__(ExpertsEvaluator)
        made.__dict__.update(vars(self), _smooth=0.0)
        return made

    def _nll_of_base(self, split: Split, part: Part) -> NDArray[np.float64]:
        """(items,): the base's nats per token of the right answers; asked once."""
        key = (split, part.n)
        if key not in self._base_nll:
            out = np.zeros(part.n)
            for items, _, scores in self._scores(part, part.blocks, self._base):
                out[list(items)] = scores.nll[0]
            self._base_nll[key] = out
        return self._base_nll[key]

    def batches(self, split: Split = "search") -> list[Batch]:
        """The rows that a split's items are read as, for `calibrate`."""
        part = self.problem.part(split)
        if not isinstance(part.questions, ExactMatch):
            return [block.batch for block in part.blocks if block.batch is not None]
        contexts = part.questions.contexts
        queries = [Query(number, context, (0,)) for number, context in enumerate(contexts)]
        pad, settings = self.problem.prompts.pad, self.problem.settings
        assert pad is not None
        made = lay_out(queries, pad=pad, tokens=settings.batch_tokens, packed=False)
        return [batch.to(self.problem.device) for batch in made]

    def _scores(
        self, part: Part, blocks: Sequence[Block], given: Any
    ) -> Iterator[tuple[tuple[int, ...], NDArray[np.int64], ItemScores]]:
        """(items, candidates, their scores) until everything asked for was given once."""
        questions = part.questions
        if isinstance(questions, ExactMatch):
            for block in blocks:
                answers = self._generated(questions, block, given)
                yield block.items, np.arange(len(given)), questions.score(block.items, answers)
            return
        if isinstance(questions, Divergence):
            unknown = [b.batch for b in blocks if b.batch and not questions.knows(b.batch)]
            with self._unchanged():
                for batch, _, logits in self._logits(unknown, self._base):
                    questions.remember(batch, logits)
        batches = [block.batch for block in blocks if block.batch is not None]
        for batch, who, logits in self._logits(batches, given):
            yield batch.items, who, questions.score(batch, logits)

    def _logits(
        self, batches: Sequence[Batch], given: Any
    ) -> Iterator[tuple[Batch, NDArray[np.int64], Tensor]]:
        if not batches:
            return
        if isinstance(self.forward, LayeredForward) and self.forward.sweeps:
            for number, who, logits in self.forward.sweep(batches, given):
                yield batches[number], who, logits
            return
        for batch in batches:
            for who, logits in self.forward.logits(batch, given):
                yield batch, who, logits

    def _generated(self, questions: ExactMatch, block: Block, given: Any) -> list[list[Tokens]]:
        """Greedy answers [candidate][item] of one block."""
        model: Any = getattr(self.forward, "model", None)
        within = self._within
        if model is None or within is None or getattr(self.forward, "streams", False):
            raise ConfigError("exact_match needs the whole model in memory; allowed: other metrics")
        k, size = len(given), len(block.contexts)
        answers = greedy(
            model,
            list(block.contexts) * k,
            new_tokens=questions.new_tokens,
            prompts=questions.prompts,
            until=questions.until,
            within=lambda rows: within(given, rows // size),
        )
        return [answers[row * size : (row + 1) * size] for row in range(k)]


def _figure(name: str) -> Objective:
    return Objective(name, "min", unit={"bytes": "B", "flops": "FLOP/token"}.get(name, ""))


def _hopeless(
    scores: NDArray[np.float64],
    sign: float,
    best: NDArray[np.float64],
    limit: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Which rows are beyond their limit, whatever the items say that are left.

    `best` is the best score that each item can have.
    """
    left = np.isnan(scores)
    if not left.any():
        return np.zeros(len(scores), dtype=bool)
    mean = np.where(left, sign * best, sign * scores).mean(axis=1)
    hopeless: NDArray[np.bool_] = mean - _SLACK * (1.0 + np.abs(mean)) > limit
    return hopeless


def experts_evaluator(
    resident: Any,
    space: Any,
    task: Task,
    metric: str | LanguageSettings = "options",
    *,
    tokenizer: Tokenizer | None = None,
    prompts: Prompts | None = None,
    masks: Callable[[Population], NDArray[np.bool_]] | None = None,
    forward: LayeredForward | None = None,
    identity: Mapping[str, Any] | None = None,
    at_once: int = 32,
    also: Sequence[str] = (),
) -> ExpertsEvaluator:
    """An evaluator of kept experts.

    Args:
        resident: a `ResidentExperts`.
        space: of kept experts, which also says how many are active and how they are routed.
        task: items.
        metric: its name, or all settings.
        tokenizer: of the model; not needed with prompts.
        prompts: texts to tokens; None = by the tokenizer and the model's context and stop tokens.
        masks: population -> bool (n, L, E); None = `searchlab.spaces.experts.space.kept`.
        forward: how logits are made; None = the resident model, layer by layer.
        identity: of the model; None = its hash.
        at_once: most candidates of one pass of a resident model.
        also: figures of `space.cost` that are minimised beside the metric, such as "bytes".

    Raises:
        ConfigError: neither a tokenizer nor prompts, an unknown metric.
    """
    settings = metric if isinstance(metric, LanguageSettings) else LanguageSettings(metric)  # type: ignore[arg-type]
    model: Any = resident.model
    routing: dict[str, Any] = {
        "active": getattr(space, "top_k", None),
        "flat": bool(getattr(space, "flat", False)),
        "router_mode": str(getattr(space, "router_mode", "slice")),
    }
    if forward is None:
        spread = len(set(devices_of(model))) > 1
        forward = (SpreadForward if spread else LayeredForward)(resident, **routing)
    else:
        forward.active, forward.flat = routing["active"], bool(routing["flat"])
        forward.router_mode = str(routing["router_mode"])
        forward.forget()
    prompts = _prompts(model, prompts, tokenizer)
    if masks is None:
        from searchlab.spaces.experts.space import kept

        def masks(population: Population) -> NDArray[np.bool_]:
            return kept(space, population)

    layout = resident.layout
    full = np.ones((1, len(layout.blocks), layout.experts), dtype=bool)
    device = forward.device

    def within(given: NDArray[np.bool_], rows: Tensor) -> AbstractContextManager[Any]:
        # One mask alone takes another path of the routers; two are always routed alike.
        masks = np.repeat(given, 2, axis=0) if len(given) == 1 else given
        context: AbstractContextManager[Any] = resident.masked(
            masks,
            rows,
            top_k=forward.active,
            flat=forward.flat,
            router_mode=forward.router_mode,
        )
        return context

    problem = LanguageProblem(
        task,
        prompts,
        settings,
        trees=lambda longest: takes_trees(model, longest),
        balance=balance_of(model, device),
        answer=_answerer(forward, prompts, settings, full),
        device=device,
    )
    return ExpertsEvaluator(
        problem,
        forward,
        candidates=masks,
        base=full,
        identity={
            "model": dict(identity) if identity is not None else _hashed(forward),
            "dtype": str(model.dtype).removeprefix("torch."),
            **routing,
        },
        at_once=at_once,
        within=within,
        also={name: functools.partial(_cost, space, name) for name in also},
        # Greedy decoding regroups rows as they end, which last bits depend on.
        exact=device.type == "cpu"
        and model.dtype in (torch.float32, torch.float64)
        and settings.metric != "exact_match",
    )


def _cost(space: Any, name: str, population: Population) -> NDArray[np.float64]:
    figures = space.cost(population)
    if name not in figures:
        raise unknown_name("cost of the space", name, figures)
    return np.asarray(figures[name], dtype=np.float64)


def applied_evaluator(
    model: Any,
    task: Task,
    metric: str | LanguageSettings,
    apply: Callable[[Any], AbstractContextManager[Any]],
    *,
    candidates: Callable[[Population], Sequence[Any]],
    identity: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    prompts: Prompts | None = None,
) -> ExpertsEvaluator:
    """An evaluator of candidates that a model becomes one after another, such as merged experts.

    Args:
        model: a causal language model.
        task, metric, tokenizer, prompts: see `experts_evaluator`.
        apply: from one of `candidates(population)` to the context inside which the model is it.
        candidates: a row for each of a population.
        identity: of the model and of what `apply` does.
    """
    settings = metric if isinstance(metric, LanguageSettings) else LanguageSettings(metric)  # type: ignore[arg-type]
    prompts = _prompts(model, prompts, tokenizer)

    def listed(population: Population) -> NDArray[Any]:
        rows = candidates(population)
        out = np.empty(len(rows), dtype=object)
        for number, row in enumerate(rows):
            out[number] = row
        return out

    def within(given: NDArray[Any], rows: Tensor) -> AbstractContextManager[Any]:
        return nullcontext() if given[0] is None else apply(given[0])

    problem = LanguageProblem(
        task,
        prompts,
        settings,
        trees=lambda longest: takes_trees(model, longest),
        balance=balance_of(model),
        answer=lambda contexts: greedy(
            model, contexts, new_tokens=settings.new_tokens, prompts=prompts
        ),
        device=next(model.parameters()).device,
    )
    return ExpertsEvaluator(
        problem,
        Applied(model, apply),
        candidates=listed,
        base=np.array([None]),
        identity={"model": dict(identity), "dtype": str(model.dtype).removeprefix("torch.")},
        at_once=1,
        within=within,
        # One candidate at a time and the same batches for all.
        exact=str(next(model.parameters()).device) == "cpu",
    )


def _prompts(model: Any, prompts: Prompts | None, tokenizer: Tokenizer | None) -> Prompts:
    if prompts is not None:
        return prompts
    if tokenizer is None:
        raise ConfigError("neither a tokenizer nor prompts; allowed: one of them")
    limit = getattr(model.config, "max_position_embeddings", None)
    return Prompts(tokenizer, limit=limit, stops=stops_of(model))


def stops_of(model: Any) -> tuple[int, ...]:
    """Stop tokens that a model's own configuration names."""
    config = getattr(model, "generation_config", None) or model.config
    found = getattr(config, "eos_token_id", None)
    return () if found is None else tuple(found) if isinstance(found, list) else (int(found),)


def _answerer(
    forward: LayeredForward, prompts: Prompts, settings: LanguageSettings, full: NDArray[np.bool_]
) -> Callable[[Sequence[Tokens]], list[Tokens]]:
    """Greedy answers of the base: token by token, or pass by pass where weights are streamed."""

    def resident(contexts: Sequence[Tokens]) -> list[Tokens]:
        out: dict[int, Tokens] = {}
        order = sorted(range(len(contexts)), key=lambda number: len(contexts[number]))
        step = max(1, settings.batch_tokens // (len(contexts[order[-1]]) + settings.new_tokens))
        for start in range(0, len(order), step):
            own = order[start : start + step]
            answers = greedy(
                forward.model,
                [contexts[number] for number in own],
                new_tokens=settings.new_tokens,
                prompts=prompts,
            )
            out.update(zip(own, answers, strict=True))
        return [out[number] for number in range(len(contexts))]

    def streamed(contexts: Sequence[Tokens]) -> list[Tokens]:
        answers: list[Tokens] = [()] * len(contexts)
        alive = list(range(len(contexts)))
        for _ in range(settings.new_tokens):
            assert prompts.pad is not None
            queries = [Query(number, contexts[number] + answers[number], (0,)) for number in alive]
            batches = [
                batch.to(forward.device)
                for batch in lay_out(
                    queries, pad=prompts.pad, tokens=settings.batch_tokens, packed=False
                )
            ]
            for place, _, logits in forward.sweep(batches, full):
                batch = batches[place]
                tops = logits[0, batch.row, batch.slot].argmax(dim=-1).tolist()
                for query, token in zip(batch.queries, tops, strict=True):
                    answers[query.item] += (token,)
            alive = [n for n in alive if answers[n][-1] not in prompts.stops]
            if not alive:
                break
        return answers

    return streamed if forward.streams else resident


def _hashed(forward: LayeredForward) -> dict[str, str]:
    if isinstance(forward.store, WeightStream):
        return {"files": forward.store.digest()}
    return {"hash": model_hash(forward.model)}


def model_hash(model: Any) -> str:
    """Hash of names, shapes and both ends of all tensors, in hex."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat[:_ENDS].cpu().numpy().tobytes())
        digest.update(flat[-_ENDS:].cpu().numpy().tobytes())
    return digest.hexdigest()
