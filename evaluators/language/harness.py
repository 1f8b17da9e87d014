"""Tasks of lm-evaluation-harness: their documents as items, their own scoring of a resident model.

The harness is an extra (`pip install 'searchlab[lm-eval]'`) and is only imported inside functions.
Written against the interface of its versions 0.4: `lm_eval.api.model.LM`, `TaskManager`,
`get_task_dict`, `Task.build_all_requests`, `Instance.args`, and for scores of some documents alone
`evaluate(samples=...)` of 0.4.9.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from searchlab.errors import ConfigError, DataError
from searchlab.evaluators.language.batches import Query, lay_out
from searchlab.evaluators.language.forward import plain_logits, takes_trees
from searchlab.evaluators.language.generation import greedy
from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.scoring import per_query, token_log_probs
from searchlab.evaluators.language.tasks import Item, Task, split_items

__all__ = ["PREFIX", "HarnessTask", "ModelRequests", "harness_items", "harness_model", "own_scores"]

PREFIX = "lm-eval:"
_SEED = 1234  # of the examples in prompts, the harness's own default
_GENERATED = 256  # tokens of an answer, where a task does not say; the harness's own default

Tokens = tuple[int, ...]


def _harness(module: str) -> Any:
    """A module of the harness.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "tasks of lm-evaluation-harness need it: pip install 'searchlab[lm-eval]'"
        )
    return importlib.import_module(module)


# -- documents ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HarnessTask(Task):
    """A task whose items are documents of the harness.

    Attributes:
        source: the harness's task.
        documents: number of the document of each item.
    """

    source: Any = None
    documents: tuple[int, ...] = ()

    @staticmethod
    def read(text: str) -> HarnessTask:
        """A task of the harness by name, or a YAML file in its form, which it reads itself.

        Args:
            text: such as "arc_easy" or "my/task.yaml", with or without "lm-eval:" before it.

        Raises:
            ConfigError: the harness is not installed.
            DataError: no such task, a group of several, or documents that are no items here.
        """
        name = text.removeprefix(PREFIX)
        tasks = _harness("lm_eval.tasks")
        asked: Any = name
        if name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                raise DataError(f"no task file {name!r}")
            asked = _harness("lm_eval.utils").load_yaml_config(name)
        try:
            found = tasks.get_task_dict([asked], tasks.TaskManager())
        except Exception as error:  # whatever the harness raises for names, files and data sets
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"lm-eval task {name!r} cannot be opened: {reason}") from None
        if len(found) != 1 or isinstance(next(iter(found.values())), Mapping):
            raise DataError(f"lm-eval task {name!r} is a group; allowed: one task")
        ((known, source),) = found.items()
        if hasattr(source, "set_fewshot_seed"):
            source.set_fewshot_seed(_SEED)
        source.build_all_requests(rank=0, world_size=1)
        pairs = harness_items(source)
        items = tuple(item for _, item in pairs)
        documents = tuple(number for number, _ in pairs)
        return HarnessTask(str(known), items, split_items(items), source, documents)


def harness_items(source: Any) -> list[tuple[int, Item]]:
    """(number of the document, item) for every document of a task with its requests built.

    Multiple choice becomes options, other likelihoods and generation accepted texts, and texts
    whose perplexity is asked for prompts.

    Raises:
        DataError: options behind different prompts, or a target that is none of them.
    """
    by_document: dict[int, list[Any]] = {}
    for request in source.instances:
        by_document.setdefault(int(request.doc_id), []).append(request)
    out = []
    for number, requests in sorted(by_document.items()):
        try:
            out.append((number, _item(source, requests)))
        except DataError as error:
            raise DataError(f"document {number}: {error}") from None
    if not out:
        raise DataError("the task has no documents")
    return out


def _item(source: Any, requests: list[Any]) -> Item:
    first = requests[0]
    kind = str(first.request_type)
    if kind == "loglikelihood_rolling":
        return Item(str(first.args[0]))
    target = source.doc_to_target(first.doc)
    if kind == "generate_until":
        texts = target if isinstance(target, list | tuple) else [target]
        return Item(str(first.args[0]), accepted=tuple(str(text).strip() for text in texts))
    # Requests without a context measure how likely options are in themselves.
    pairs = [
        r.args for r in sorted(requests, key=lambda r: r.idx) if r.args[0] or not first.args[0]
    ]
    prompts = {context for context, _ in pairs}
    if len(prompts) > 1:
        raise DataError(
            "its options stand behind different prompts; allowed: one prompt for all of them "
            "(--final 'command: lm_eval ...' scores such a task on the exported checkpoint)"
        )
    options = tuple(continuation for _, continuation in pairs)
    if len(options) == 1:
        return Item(prompts.pop(), accepted=options)
    if isinstance(target, str):
        names = [option.strip() for option in options]
        if target.strip() not in names:
            raise DataError(f"target {target!r} is none of the options {names}")
        target = names.index(target.strip())
    if isinstance(target, list | tuple) and len(target) == 1:
        target = target[0]
    if not isinstance(target, int | np.integer) or isinstance(target, bool):
        raise DataError(f"target {target!r}; allowed: one right option")
    return Item(prompts.pop(), options, int(target))


# -- requests -------------------------------------------------------------------------------------


@dataclass
class ModelRequests:
    """Answers what the harness asks of a model: the three methods of its interface `LM`.

    Requests are anything with `args`. Texts become tokens as in the harness: spaces at the end of a
    context belong to what follows, and what is too long loses its beginning.

    Args:
        model: of transformers.
        prompts: tokenizer, limit of the context, stop tokens.
        batch_tokens: about how many tokens a call holds.
        within: the context of every call, such as the masks of a candidate.
    """

    model: Any
    prompts: Prompts
    batch_tokens: int = 2048
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    device: Any = field(init=False)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device

    @property
    def _limit(self) -> int:
        return self.prompts.limit or 2**31

    @property
    def _first(self) -> int:
        """What stands before a text without a context."""
        tokenizer: Any = self.prompts.tokenizer
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(tokenizer, name, None)
            if token is not None:
                return int(token)
        assert self.prompts.pad is not None
        return self.prompts.pad

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        ids = list(self.prompts.tokenizer.encode(text, add_special_tokens=special))
        while special and ids and ids[-1] in self.prompts.stops:
            ids.pop()
        return ids

    def _pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        if not context:
            return (self._first,), tuple(self._encode(continuation, special=False))
        bare = context.rstrip()
        if bare:
            continuation, context = context[len(bare) :] + continuation, bare
        before = self._encode(context)
        whole = self._encode(context + continuation)
        return tuple(before), tuple(whole[len(before) :])

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one.

        Args:
            requests: with args (context, continuation).
            disable_tqdm: there is no progress bar.
        """
        queries, out = [], [(0.0, True)] * len(requests)
        for number, request in enumerate(requests):
            context, target = self._pair(*request.args)
            if target:
                target = target[-self._limit :]
                room = max(1, self._limit + 1 - len(target))
                queries.append(Query(number, context[-room:], target))
        for query, value, best in self._asked(queries):
            out[query.item] = value, best
        self._remember("loglikelihood", requests, out)
        return out

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts; each token once, behind as much as the context holds.

        Args:
            requests: with args (text,).
            disable_tqdm: there is no progress bar.
        """
        queries = []
        for number, request in enumerate(requests):
            tokens = (self._first, *self._encode(request.args[0], special=False))
            size = min(self._limit, len(tokens))
            for start in range(1, len(tokens), size):
                end = min(start + size, len(tokens))
                queries.append(
                    Query(number, tokens[max(0, end - 1 - size) : start], tokens[start:end])
                )
        parts: list[list[float]] = [[] for _ in requests]
        for query, value, _ in self._asked(queries):
            parts[query.item].append(value)
        out = [math.fsum(part) for part in parts]
        self._remember("loglikelihood_rolling", requests, out)
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to the first of the texts that end them.

        Args:
            requests: with args (context, {"until": texts, "max_gen_toks": tokens}).
            disable_tqdm: there is no progress bar.

        Raises:
            DataError: a request that wants samples.
        """
        kinds: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(_wanted(request.args[1]), []).append(number)
        out = [""] * len(requests)
        for (until, new_tokens), numbers in kinds.items():
            room = self._limit - new_tokens
            if room < 1:
                raise DataError(f"{new_tokens} generated tokens; the context has {self._limit}")
            contexts = {
                n: tuple(self._encode(requests[n].args[0]) or [self._first])[-room:]
                for n in numbers
            }
            order = sorted(numbers, key=lambda n: len(contexts[n]), reverse=True)
            at = 0
            while at < len(order):
                step = max(1, self.batch_tokens // (len(contexts[order[at]]) + new_tokens))
                own = order[at : at + step]
                at += step
                with self.within():
                    answers = greedy(
                        self.model,
                        [contexts[n] for n in own],
                        new_tokens=new_tokens,
                        prompts=self.prompts,
                        until=until,
                    )
                for n, answer in zip(own, answers, strict=True):
                    out[n] = self._text(answer, until)
        self._remember("generate_until", requests, out)
        return out

    def _text(self, answer: Tokens, until: Sequence[str]) -> str:
        while answer and answer[-1] in self.prompts.stops:
            answer = answer[:-1]
        text = self.prompts.text(answer)
        return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]

    def _asked(self, queries: Sequence[Query]) -> list[tuple[Query, float, bool]]:
        if not queries:
            return []
        longest = max(len(query.fed) for query in queries)
        assert self.prompts.pad is not None
        batches = lay_out(
            queries,
            pad=self.prompts.pad,
            tokens=self.batch_tokens,
            packed=takes_trees(self.model, longest),
        )
        out: list[tuple[Query, float, bool]] = []
        for batch in (batch.to(self.device) for batch in batches):
            with self.within():
                logits = plain_logits(self.model, batch)[None]
            values = per_query(batch, token_log_probs(batch, logits))[0]
            tops = logits[0, batch.row, batch.slot].argmax(dim=-1) == batch.target
            starts = np.cumsum([0, *(len(query.target) for query in batch.queries[:-1])])
            best = np.logical_and.reduceat(tops.cpu().numpy(), starts)
            out += zip(batch.queries, values.tolist(), best.tolist(), strict=True)
        return out

    def _remember(self, kind: str, requests: Sequence[Any], answers: Sequence[Any]) -> None:
        """The harness's cache hears of answers, where it has one."""
        hook: Any = getattr(self, "cache_hook", None)
        if hook is None:
            return
        for request, answer in zip(requests, answers, strict=True):
            hook.add_partial(kind, request.args, answer)


def _wanted(options: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """(texts that end an answer, most tokens) of a request's options."""
    if options.get("do_sample") or float(options.get("temperature") or 0.0) > 0.0:
        raise DataError(f"generation options {dict(options)}; allowed: greedy answers")
    until = options.get("until") or ()
    texts = (until,) if isinstance(until, str) else tuple(map(str, until))
    tokens = options.get("max_gen_toks", options.get("max_new_tokens", _GENERATED))
    return tuple(text for text in texts if text), int(tokens)


def harness_model(
    model: Any,
    prompts: Prompts,
    *,
    batch_tokens: int = 2048,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Any:
    """A model as the harness takes it: `ModelRequests` that is an `lm_eval.api.model.LM` too.

    Raises:
        ConfigError: the harness is not installed.
    """
    base = _harness("lm_eval.api.model").LM

    def begin(self: Any) -> None:
        base.__init__(self)
        ModelRequests.__init__(self, model, prompts, batch_tokens, within)

    return type("ResidentModel", (ModelRequests, base), {"__init__": begin})()


def own_scores(task: HarnessTask, documents: Sequence[int], model: Any) -> dict[str, float]:
    """The harness's own figures of a model on some documents: its filters, metrics, aggregation.

    Args:
        task: see `HarnessTask.read`.
        documents: their numbers.
        model: see `harness_model`.

    Raises:
        ConfigError: the harness is not installed.
    """
    evaluate = _harness("lm_eval.evaluator").evaluate
    found = evaluate(
        lm=model,
        task_dict={task.name: task.source},
        samples={task.name: list(documents)},
        bootstrap_iters=0,
        log_samples=False,
    )
    return {
        key.removesuffix(",none"): float(value)
        for key, value in found["results"][task.name].items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in key
    }
