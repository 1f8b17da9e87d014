"""Requests of lm-evaluation-harness, answered by a resident model, and its documents as items."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from searchlab.errors import ConfigError, DataError
from searchlab.evaluators.language.experts import experts_evaluator
from searchlab.evaluators.language.generation import ExactMatch, greedy
from searchlab.evaluators.language.harness import (
    HarnessTask,
    ModelRequests,
    harness_items,
    harness_model,
)
from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.tasks import Item, read_task
from searchlab.experiments.experts import ExpertsOptions, build
from searchlab.experiments.zoo.characters import load_characters, task_path
from searchlab.spaces.experts import ResidentExperts, pruning_space

MISSING = importlib.util.find_spec("lm_eval") is None


@dataclass
class Request:
    """What of the harness's `Instance` is looked at."""

    args: tuple[Any, ...]
    doc_id: int = 0
    idx: int = 0
    request_type: str = "loglikelihood"
    doc: dict[str, Any] = field(default_factory=dict)


@dataclass
class Source:
    """What of the harness's `Task` is looked at."""

    instances: list[Request]

    def doc_to_target(self, doc: dict[str, Any]) -> Any:
        return doc["target"]


@pytest.fixture(scope="module")
def zoo() -> Iterator[tuple[Any, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_characters()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def asked(zoo: tuple[Any, Any]) -> ModelRequests:
    model, tokenizer = zoo
    limit = model.config.max_position_embeddings
    return ModelRequests(model, Prompts(tokenizer, limit=limit), batch_tokens=512)


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    """Of each token but the first, by one plain call."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    chosen = torch.tensor(ids[1:])[:, None]
    return torch.log_softmax(logits.double(), dim=-1).gather(1, chosen)[:, 0]


def test_likelihoods_are_those_of_our_own_scorer(zoo: tuple[Any, Any], asked: Any) -> None:
    model, tokenizer = zoo
    resident = ResidentExperts(model)
    space = pruning_space(resident.layout, keep=3)
    task = read_task(task_path("code")).only(24)
    evaluator = experts_evaluator(resident, space, task, "options", tokenizer=tokenizer)
    masks = np.zeros((1, 3, 8), dtype=bool)
    masks[:, :, [1, 4, 6]] = True
    items = task.of("report")
    requests = [Request((str(item.prompt), option)) for item in items for option in item.options]
    for within, figures in (
        (asked.within, evaluator.base("report")),
        (
            lambda: resident.masked(masks[0]),
            evaluator.summaries(space.of_masks(masks), "report")[0],
        ),
    ):
        own = ModelRequests(model, asked.prompts, batch_tokens=512, within=within)
        found = iter(own.loglikelihood(requests))
        right = [
            int(np.argmax([next(found)[0] for _ in item.options])) == item.answer for item in items
        ]
        assert np.mean(right) == figures.value
    item = items[0]
    (value, _), *_ = asked.loglikelihood(requests)
    before = tokenizer.encode(str(item.prompt))
    whole = tokenizer.encode(str(item.prompt) + item.options[0])
    want = float(log_probs(model, whole)[len(before) - 1 :].sum())
    assert value == pytest.approx(want, rel=1e-4)


def test_what_is_greedy_is_said_and_edges_are_met(zoo: tuple[Any, Any], asked: Any) -> None:
    model, tokenizer = zoo
    prompt = str(read_task(task_path("arithmetic")).items[0].prompt)
    contexts = [tuple(tokenizer.encode(prompt))]
    (answer,) = greedy(model, contexts, new_tokens=3, prompts=asked.prompts)
    text = tokenizer.decode(list(answer))
    wrong = "zzz"
    (best, yes), (worse, no), nothing, spaced, joined, alone = asked.loglikelihood(
        [
            Request((prompt, text)),
            Request((prompt, wrong)),
            Request((prompt, "")),
            Request((prompt + " ", "x")),
            Request((prompt, " x")),
            Request(("", "x")),
        ]
    )
    assert (yes, no) == (True, False)
    assert worse < best <= 0.0
    assert nothing == (0.0, True)
    assert spaced == joined  # spaces at the end of a context belong to the continuation
    assert math.isfinite(alone[0])
    limit = model.config.max_position_embeddings
    long = prompt * (2 * limit // len(prompt) + 1)
    ((value, _),) = asked.loglikelihood([Request((long, "ab"))])
    ids = tokenizer.encode(long + "ab")[-(limit + 1) :]
    assert value == pytest.approx(float(log_probs(model, ids)[-2:].sum()), abs=1e-4)


def test_whole_texts_are_read_in_windows(zoo: tuple[Any, Any], asked: Any) -> None:
    model, tokenizer = zoo
    limit = model.config.max_position_embeddings
    text = "".join(str(item.prompt) for item in read_task(task_path("prose")).items)[
        : 2 * limit + 40
    ]
    short, value, none = asked.loglikelihood_rolling(
        [Request((text[:30],)), Request((text,)), Request(("",))]
    )
    tokens = [asked._first, *tokenizer.encode(text, add_special_tokens=False)]
    assert none == 0.0
    assert short == pytest.approx(float(log_probs(model, tokens[:31]).sum()), abs=1e-3)
    want, n = 0.0, len(tokens)
    for start in range(1, n, limit):
        end = min(start + limit, n)
        window = log_probs(model, tokens[max(0, end - 1 - limit) : end])
        want += float(window[-(end - start) :].sum())
    assert n > 2 * limit
    assert value == pytest.approx(want, abs=5e-3)


def test_answers_are_those_of_our_own_generation(zoo: tuple[Any, Any], asked: Any) -> None:
    model, _ = zoo
    items = read_task(task_path("reversal")).of("report")[:12]
    questions = ExactMatch(items, asked.prompts, new_tokens=24, until=(";",))
    contexts = [questions.contexts[number] for number in range(12)]
    answers = greedy(model, contexts, new_tokens=24, prompts=asked.prompts, until=(";",))
    requests = [
        Request((str(item.prompt), {"until": [";"], "max_gen_toks": 24, "do_sample": False}))
        for item in items
    ]
    found = asked.generate_until(requests)
    assert [text.strip() for text in found] == [questions.text(answer) for answer in answers]
    assert np.mean(questions.score(range(12), [answers]).scores) == np.mean(
        [
            text.strip() in [one.strip() for one in item.accepted]
            for text, item in zip(found, items, strict=True)
        ]
    )
    short = asked.generate_until([Request((str(items[0].prompt), {"max_gen_toks": 2}))])
    assert found[0].startswith(short[0][:2])
    with pytest.raises(DataError, match="greedy"):
        asked.generate_until([Request(("a", {"temperature": 0.7}))])
    with pytest.raises(DataError, match="generated tokens"):
        asked.generate_until([Request(("a", {"max_gen_toks": 10**6}))])


def test_documents_become_items() -> None:
    doc = {"target": 1}
    choice = [
        Request(("Q:", f" {o}"), doc_id=d, idx=i, doc=doc)
        for d in (3, 4)
        for i, o in enumerate("ab")
    ]
    assert harness_items(Source(choice)) == [
        (3, Item("Q:", (" a", " b"), 1)),
        (4, Item("Q:", (" a", " b"), 1)),
    ]
    alone = [*choice[:2], Request(("", " a"), doc_id=3, idx=2, doc=doc)]
    assert harness_items(Source(alone))[0][1].options == (" a", " b")
    named = [Request(r.args, idx=r.idx, doc={"target": "b"}) for r in choice[:2]]
    assert harness_items(Source(named))[0][1].answer == 1
    said = Request(("Q:", {"until": ["\n"]}), request_type="generate_until", doc={"target": " 7 "})
    assert harness_items(Source([said])) == [(0, Item("Q:", accepted=("7",)))]
    text = Request(("all of it",), request_type="loglikelihood_rolling")
    assert harness_items(Source([text])) == [(0, Item("all of it"))]
    word = Request(("The sky is", " blue"), doc={"target": " blue"})
    assert harness_items(Source([word])) == [(0, Item("The sky is", accepted=(" blue",)))]
    with pytest.raises(DataError, match="document 0: its options stand behind different prompts"):
        harness_items(
            Source([Request(("one", " x"), doc=doc), Request(("two", " x"), idx=1, doc=doc)])
        )
    with pytest.raises(DataError, match="one right option"):
        harness_items(
            Source([Request(r.args, idx=r.idx, doc={"target": [0, 1]}) for r in choice[:2]])
        )


@pytest.mark.skipif(not MISSING, reason="lm-evaluation-harness is installed")
def test_a_missing_harness_is_named(zoo: tuple[Any, Any]) -> None:
    said = r"pip install 'searchlab\[lm-eval\]'"
    with pytest.raises(ConfigError, match=said):
        HarnessTask.read("lm-eval:arc_easy")
    with pytest.raises(ConfigError, match=said):
        build(ExpertsOptions(task="lm-eval:arc_easy"))
    with pytest.raises(ConfigError, match=said):
        harness_model(zoo[0], Prompts(zoo[1]))
    with pytest.raises(ConfigError, match="chat 'on' with a task of lm-eval"):
        ExpertsOptions(task="lm-eval:arc_easy", chat="on")


@pytest.mark.skipif(MISSING, reason="lm-evaluation-harness is not installed")
def test_the_harness_takes_the_model(zoo: tuple[Any, Any], asked: Any) -> None:
    model = harness_model(zoo[0], asked.prompts)
    assert isinstance(model, importlib.import_module("lm_eval.api.model").LM)
    assert model.loglikelihood([Request(("a", "b"))]) == asked.loglikelihood([Request(("a", "b"))])
