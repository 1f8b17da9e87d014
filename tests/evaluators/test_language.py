"""Tasks of language and scores of items on tiny random models."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from searchlab.errors import ConfigError, DataError, EvaluationError, SearchlabWarning
from searchlab.evaluators.language.batches import Batch, Query, lay_out
from searchlab.evaluators.language.forward import plain_logits
from searchlab.evaluators.language.generation import ExactMatch, greedy
from searchlab.evaluators.language.intervals import paired_difference, wilson
from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.scoring import MultipleChoice, Perplexity, token_log_probs
from searchlab.evaluators.language.tasks import Item, read_task
from searchlab.testing.tiny_moe import tiny_moe
from tests.evaluators.language_tools import Chatty, Letters, queries

pytest.importorskip("transformers")


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


# Tasks.


def test_a_task_is_read_with_its_splits(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "options": ["a", "b"], "answer": "b" if i % 2 else 0, "id": i}
        for i in range(16)
    ]
    task = read_task(lines(tmp_path / "t.jsonl", *rows))
    assert [len(task.of(s)) for s in ("search", "selection", "report")] == [8, 4, 4]
    assert [item.answer for item in task.items[:3]] == [0, 1, 0]
    assert task.items[1].accepted == ("b",)
    assert task.majority("search") == 0.5
    for number, split in enumerate(("search", "selection", "report")):
        lines(tmp_path / f"{split}.jsonl", {"prompt": f"{number}", "answer": ["x", "y"]})
    parts = read_task(tmp_path)
    assert [parts.of(s)[0].prompt for s in ("search", "selection", "report")] == ["0", "1", "2"]
    assert parts.items[0].accepted == ("x", "y")
    assert parts.digest() != task.digest()


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"options": ["a", "b"]}, "no field 'prompt'"),
        ({"prompt": "p", "options": []}, "empty options"),
        ({"prompt": "p", "options": ["a", ""]}, "an empty option"),
        ({"prompt": "p", "options": ["a", "a"]}, "twice"),
        ({"prompt": "p", "options": ["a", "b"], "answer": 2}, "answer 2 of 2 options"),
        ({"prompt": "p", "options": ["a", "b"], "answer": "c"}, "none of the options"),
        ({"prompt": ""}, "an empty prompt"),
        ({"prompt": 3}, "allowed: a text"),
        ({"prompt": "p", "split": "test"}, "split 'test'"),
        ({"prompt": "p", "answer": []}, "allowed: a text or a list"),
        ([1], "list instead of an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, text: str) -> None:
    path = lines(tmp_path / "t.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(DataError, match=rf"t\.jsonl, line 2: .*{text}"):
        read_task(path)


def test_files_that_are_no_tasks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_task(tmp_path / "none.jsonl")
    (tmp_path / "search.jsonl").write_text('{"prompt": "p"}')
    with pytest.raises(DataError, match=r"has no selection\.jsonl, report\.jsonl"):
        read_task(tmp_path)
    (tmp_path / "bad.jsonl").write_text("\n{")
    with pytest.raises(DataError, match=r"line 2: no JSON"):
        read_task(tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no items"):
        read_task(tmp_path / "empty.jsonl")
    some = lines(tmp_path / "some.jsonl", {"prompt": "p", "split": "search"}, {"prompt": "q"})
    with pytest.raises(DataError, match="item 2 has no split"):
        read_task(some)


def test_overlaps_and_few_prompts_are_warned_of(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "split": s} for i, s in enumerate(("search", "selection", "report"))
    ]
    path = lines(tmp_path / "t.jsonl", *rows, {"prompt": "p0", "split": "report"})
    with pytest.warns(SearchlabWarning, match="search and report share 1 prompt,"):
        read_task(path)
    with pytest.warns(SearchlabWarning, match="too few to split"):
        task = read_task(lines(tmp_path / "u.jsonl", {"prompt": "p"}))
    assert task.splits["report"] == (0,)


# Texts to tokens.


def test_prompts_and_continuations() -> None:
    prompts = Prompts(Letters())
    item = Item("ab:", ("x", "y"), 0)
    assert prompts.context(item)[0] == 1
    assert prompts.text(prompts.context(item)) == "ab:"
    assert prompts.text(prompts.continuation(item, "xy")) == "xy"
    spaced = Prompts(Letters(), delimiter=" ")
    assert spaced.text(spaced.continuation(item, "xy")) == " xy"
    assert spaced.text(spaced.continuation(item, " xy")) == " xy"
    assert {prompts.text([t]) for t in prompts.starts(item, "x")} == {"x", " "}
    assert prompts.identity([item]) != spaced.identity([item])


def test_chats_are_wrapped_once() -> None:
    prompts = Prompts(Chatty())
    text = prompts.text(prompts.context(Item("hi")))
    assert text == "(user) hi.(assistant) "
    assert prompts.context(Item("hi"))[0] != 1
    messages = Item((("system", "be"), ("user", "hi")))
    assert prompts.text(prompts.context(messages)) == "(system) be.(user) hi.(assistant) "
    assert Prompts(Chatty(), chat=False).context(Item("hi"))[0] == 1
    with pytest.raises(ConfigError, match="no chat template"):
        Prompts(Letters(), chat=True)
    with pytest.raises(ConfigError, match="messages"):
        Prompts(Letters()).context(messages)


def test_no_padding_token_and_too_long_a_prompt_are_refused() -> None:
    bare = Letters()
    bare.pad_token_id = None
    with pytest.raises(ConfigError, match="no padding token"):
        Prompts(bare)
    assert Prompts(bare, pad=2).pad == 2
    with pytest.raises(DataError, match="item 2 has 12 tokens; the model's context has 8"):
        MultipleChoice(
            [Item("ab", ("x", "y"), 0), Item("abcdefghij", ("x", "y"), 1)],
            Prompts(Letters(), limit=8),
        )


# Batches.


def answered(model: Any, batches: Sequence[Batch]) -> dict[Query, float]:
    found: dict[Query, float] = {}
    for batch in batches:
        sums = torch.zeros(len(batch.queries))
        logp = token_log_probs(batch, plain_logits(model, batch)[None])[0]
        sums.index_add_(0, batch.query, logp)
        found.update(zip(batch.queries, sums.tolist(), strict=True))
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_and_packing_change_no_likelihood(attention: str) -> None:
    model = tiny_moe("mixtral")
    model.config._attn_implementation = attention
    asked = queries(12, shared=9)
    plain = answered(model, lay_out(asked, pad=0, tokens=300, packed=False))
    trees = lay_out(asked, pad=0, tokens=300, packed=True)
    assert any(batch.tree for batch in trees)
    packed = answered(model, trees)
    assert plain.keys() == packed.keys() == set(asked)
    for query in asked:
        ids = torch.tensor([query.context + query.target])
        with torch.no_grad():
            logits = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
        rows = range(len(query.context) - 1, ids.shape[1] - 1)
        alone = sum(float(logits[row, ids[0, row + 1]]) for row in rows)
        assert plain[query] == pytest.approx(alone, abs=1e-4)
        assert packed[query] == pytest.approx(alone, abs=1e-4)


def test_packing_reads_what_is_shared_once() -> None:
    asked = queries(12, shared=40)
    tokens = [sum(b.ids.numel() for b in lay_out(asked, pad=0, packed=p)) for p in (False, True)]
    assert tokens[1] < tokens[0] / 2
    small = lay_out(asked, pad=0, packed=True, balance=1)
    assert max(batch.shape[1] for batch in small) <= 96  # where an item is cheapest
    for batch in small:
        assert sorted({query.item for query in batch.queries}) == sorted(batch.items)
    with pytest.raises(ConfigError, match="0 queries"):
        lay_out([], pad=0)


# Scores.


def test_multiple_choice_by_hand() -> None:
    items = [Item("a:", ("x", "yz"), 0), Item("b:", ("x", "yz"), 1)]
    prompts = Prompts(Letters())
    code = {
        letter: prompts.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "xyz q"
    }
    found = {}
    for rule in ("sum", "mean", "first_token"):
        questions = MultipleChoice(items, prompts, rule)  # type: ignore[arg-type]
        (batch,) = lay_out(questions.queries, pad=0, packed=False)
        logits = torch.zeros(2, *batch.wanted.shape, 60)
        # The first candidate: x 0.4, y 0.5 and then z for sure. The second likes q best.
        logits[:] = -30.0
        for row, slot, target in zip(batch.row, batch.slot, batch.target, strict=True):
            if target != code["z"]:
                logits[0, row, slot, [code["x"], code["y"]]] = torch.tensor([0.4, 0.5]).log()
                logits[1, row, slot, [code["q"], code["x"]]] = torch.tensor([0.6, 0.3]).log()
            else:
                logits[0, row, slot, code["z"]] = 0.0
                logits[1, row, slot, code["z"]] = 0.0
        found[rule] = questions.score(batch, logits)
    order = list(batch.items)
    sums = found["sum"].scores[:, np.argsort(order)]
    np.testing.assert_array_equal(sums, [[0, 1], [1, 0]])
    np.testing.assert_array_equal(
        found["first_token"].scores[:, np.argsort(order)], [[0, 1], [0, 0]]
    )
    np.testing.assert_array_equal(found["first_token"].failures, [[0, 0], [1, 1]])
    assert found["sum"].nll[0, order.index(0)] == pytest.approx(-math.log(0.4 / 0.9), abs=1e-4)
    with pytest.raises(DataError, match="item 1 has no options"):
        MultipleChoice([Item("a")], prompts)
    with pytest.raises(DataError, match="item 1 has no answer"):
        MultipleChoice([Item("a", ("x", "y"))], prompts)


def test_perplexity_is_over_all_tokens() -> None:
    questions = Perplexity([Item("abc"), Item("abcdefg", accepted=("xy",))], Prompts(Letters()))
    assert [len(query.target) for query in questions.queries] == [3, 2]
    (batch,) = lay_out(questions.queries, pad=0)
    uniform = torch.zeros(1, *batch.wanted.shape, 60)
    scores = questions.score(batch, uniform).scores
    assert Perplexity.value(float(scores.mean())) == pytest.approx(60)
    assert Perplexity.mean(60.0) == pytest.approx(math.log(60))


def test_models_that_answer_something_else_are_named() -> None:
    def wrong(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return torch.zeros(3)

    with pytest.raises(EvaluationError, match=r"the model returned \(3,\)"):
        plain_logits(wrong, lay_out(queries(2), pad=0, packed=False)[0])


def test_greedy_answers_equal_generate() -> None:
    model = tiny_moe("mixtral")
    prompts = Prompts(Letters())
    contexts = [query.context for query in queries(9)][::3]
    ours = greedy(model, contexts, new_tokens=8, prompts=prompts)
    for context, answer in zip(contexts, ours, strict=True):
        out = model.generate(torch.tensor([context]), max_new_tokens=8, do_sample=False)
        assert out[0, len(context) :].tolist() == list(answer)

    def bare(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        with torch.no_grad():
            out = model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
            )
        return out.logits  # type: ignore[no-any-return]

    assert greedy(bare, contexts, new_tokens=8, prompts=prompts) == ours
    stops = {answer[2] for answer in ours}
    short = greedy(model, contexts, new_tokens=8, prompts=Prompts(Letters(), stops=stops))
    for answer, whole in zip(short, ours, strict=True):
        end = next((i for i, t in enumerate(whole) if t in stops | {2}), 7)
        assert answer == whole[: end + 1]


def test_exact_match_by_hand() -> None:
    prompts = Prompts(Letters())
    items = [Item("a", accepted=("12",)), Item("b", ("x", "y"), 1)]
    questions = ExactMatch(items, prompts, new_tokens=4)

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(prompts.tokenizer.encode(text, add_special_tokens=False))

    right = [tokens(" 12\n3"), (*tokens("y"), 2)]
    wrong = [tokens("1123"), tokens("z")]
    got = questions.score((0, 1), [right, wrong])
    np.testing.assert_array_equal(got.scores, [[1, 1], [0, 0]])
    np.testing.assert_array_equal(got.failures, [[0, 0], [1, 1]])
    loose = ExactMatch(items, prompts, substring=True)
    assert loose.score((0,), [[tokens("1123")]]).scores[0, 0] == 1
    with pytest.raises(DataError, match="item 1 has no answer"):
        ExactMatch([Item("a")], prompts)


def test_intervals() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10)[0] == 0
    mean, low, high = paired_difference([1, 1, 0, 1], [0, 1, 0, 0])
    assert mean == 0.5
    assert low < 0.5 < high
    with pytest.raises(ConfigError, match="11 right of 10"):
        wilson(11, 10)


# Layer by layer.
