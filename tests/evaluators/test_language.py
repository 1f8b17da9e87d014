"""Tasks of language, scores of items, and evaluators of kept experts on tiny random models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from searchlab.errors import ConfigError, DataError, EvaluationError, SearchlabWarning
from searchlab.evaluator import Evaluator
from searchlab.evaluators.language.batches import Batch, Query, lay_out
from searchlab.evaluators.language.calibration import calibrate
from searchlab.evaluators.language.experts import (
    ExpertsEvaluator,
    applied_evaluator,
    experts_evaluator,
)
from searchlab.evaluators.language.forward import plain_logits
from searchlab.evaluators.language.generation import ExactMatch, greedy
from searchlab.evaluators.language.intervals import paired_difference, wilson
from searchlab.evaluators.language.layered import LayeredForward
from searchlab.evaluators.language.mix import LanguageScore
from searchlab.evaluators.language.problem import METRICS, LanguageSettings
from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.scoring import MultipleChoice, Perplexity, token_log_probs
from searchlab.evaluators.language.static_figures import StaticFigures, few_prompts
from searchlab.evaluators.language.streaming import streamed
from searchlab.evaluators.language.tasks import Item, Task, read_task
from searchlab.experiments.benchmarks._eep_speed import few_shot_items, measure
from searchlab.population import OK, PRUNED, Jobs, Population
from searchlab.space import Space
from searchlab.testing.evaluator import EvaluatorSuite, jobs_of
from searchlab.testing.tiny_moe import TINY_MOE, tiny_moe
from searchlab.uniforms import uniforms
from searchlab.variables import Integer

pytest.importorskip("transformers")

from searchlab.spaces.experts import ResidentExperts, pruning_space

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;+-=?!()"


class Letters:
    """A token per letter; 0 pads, 1 begins and 2 ends a text."""

    pad_token_id: int | None = 0
    eos_token_id: int | None = 2
    chat_template: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [3 + ALPHABET.index(letter) for letter in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        known = {0: "", 1: "", 2: ""} if skip_special_tokens else {0: "<0>", 1: "<1>", 2: "<2>"}
        return "".join(known[i] if i < 3 else ALPHABET[(i - 3) % len(ALPHABET)] for i in ids)


class Chatty(Letters):
    chat_template = "yes"

    def apply_chat_template(
        self, messages: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        return "".join(f"({m['role']}) {m['content']}." for m in messages) + "(assistant) "


def made_items(n: int, *, seed: int = 0, header: str = "") -> list[Item]:
    rng = np.random.default_rng(seed)

    def word(low: int, high: int) -> str:
        return "".join(rng.choice(list("abcdefghij"), rng.integers(low, high)))

    items = []
    for number in range(n):
        options = sorted({word(1, 4) for _ in range(5)})[:3]
        items.append(Item(f"{header}{number} {word(3, 9)}:", tuple(options), number % len(options)))
    return items


def made_task(n: int = 24, **more: Any) -> Task:
    items = tuple(made_items(n, **more))
    half, quarter = n // 2, n // 4
    numbers = range(n)
    return Task(
        "made",
        items,
        {
            "search": tuple(numbers[:half]),
            "selection": tuple(numbers[half : half + quarter]),
            "report": tuple(numbers[half + quarter :]),
        },
    )


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


def queries(n: int, *, seed: int = 1, shared: int = 0) -> list[Query]:
    rng = np.random.default_rng(seed)
    start = tuple(rng.integers(3, 50, shared).tolist())
    out = []
    for item in range(n):
        context = start + tuple(rng.integers(3, 50, rng.integers(2, 12)).tolist())
        out += [
            Query(item, context, tuple(rng.integers(3, 50, rng.integers(1, 4)).tolist()))
            for _ in range(3)
        ]
    return out


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


def random_masks(resident: ResidentExperts, n: int, keep: int, seed: int = 0) -> Any:
    space = pruning_space(resident.layout, keep=keep, groups="block")
    from searchlab.spaces.experts import kept

    return kept(space, space.sample(uniforms(seed, 0, 0, n, space.sample_width)))


@pytest.mark.parametrize("name", TINY_MOE)
def test_candidates_share_layers_and_no_bits(name: str) -> None:
    model = tiny_moe(name)
    resident = ResidentExperts(model)
    masks = random_masks(resident, 5, 4)
    masks[3, :-1] = masks[2, :-1]
    masks[4] = masks[1]
    asked = queries(8)
    forward = LayeredForward(resident, tokens=600)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for packed in (False, True):
        for batch in lay_out(asked, pad=0, tokens=200, packed=packed):
            together = {}
            for who, logits in forward.logits(batch, masks):
                together.update(zip(who.tolist(), logits, strict=True))
            assert sorted(together) == list(range(5))
            for k in range(5):
                fresh = LayeredForward(resident, remember=0)
                ((_, alone),) = fresh.logits(batch, masks[k : k + 1])
                assert torch.equal(alone[0], together[k])
                with resident.masked(masks[k : k + 1]):
                    whole = plain_logits(model, batch)
                torch.testing.assert_close(whole, together[k], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_states_below_the_first_change_are_not_computed_again() -> None:
    resident = ResidentExperts(tiny_moe("mixtral", num_hidden_layers=4))
    masks = random_masks(resident, 2, 4)
    masks[1, :3] = masks[0, :3]
    (batch, *_) = lay_out(queries(4), pad=0, packed=False)
    forward = LayeredForward(resident)
    list(forward.logits(batch, masks[:1]))
    first = dict(forward.computed)
    ((_, again),) = forward.logits(batch, masks[1:])
    assert 3 * (forward.computed["attention"] - first["attention"]) < first["attention"]
    ((_, fresh),) = LayeredForward(resident, remember=0).logits(batch, masks[1:])
    assert torch.equal(again, fresh)


# The evaluator.


def made_evaluator(
    metric: str = "options", *, name: str = "mixtral", task: Task | None = None, **more: Any
) -> tuple[ExpertsEvaluator, Space]:
    resident = ResidentExperts(tiny_moe(name))
    space = pruning_space(resident.layout, keep=4, groups="block")
    settings = LanguageSettings(metric, batch_tokens=200, new_tokens=4, **more)  # type: ignore[arg-type]
    made = experts_evaluator(
        resident, space, made_task() if task is None else task, settings, tokenizer=Letters()
    )
    return made, space


class TestOptions(EvaluatorSuite):
    rows = 6

    @pytest.fixture
    def space(self) -> Space:
        return made_evaluator()[1]

    @pytest.fixture
    def evaluator(self) -> Evaluator:
        return made_evaluator("options", few=5)[0]


class TestDivergence(TestOptions):
    @pytest.fixture
    def evaluator(self) -> Evaluator:
        return made_evaluator("kl_self")[0]


class TestPerplexity(TestOptions):
    @pytest.fixture
    def evaluator(self) -> Evaluator:
        return made_evaluator("perplexity", name="olmoe")[0]


class TestGeneration(TestOptions):
    @pytest.fixture
    def evaluator(self) -> Evaluator:
        return made_evaluator("exact_match")[0]


def test_the_base_has_no_divergence_from_itself() -> None:
    evaluator, space = made_evaluator("kl_self")
    resident = ResidentExperts(tiny_moe("mixtral"))
    full = pruning_space(resident.layout, keep=8, groups="block")
    base, _ = made_evaluator("kl_self")
    base._candidates = lambda population: np.ones((len(population), 2, 8), dtype=bool)
    one = full.sample(uniforms(0, 0, 0, 1, full.sample_width))
    assert base.evaluate(jobs_of(full, one)).values[0, 0] == 0.0
    some = space.sample(uniforms(0, 0, 0, 4, space.sample_width))
    assert (evaluator.evaluate(jobs_of(space, some)).values > 0.01).all()


@pytest.mark.parametrize("metric", METRICS)
def test_racing_is_exact_and_pays_less(metric: str) -> None:
    evaluator, space = made_evaluator(metric, task=made_task(64))
    population = space.sample(uniforms(3, 0, 0, 12, space.sample_width))
    jobs = jobs_of(space, population)
    whole = evaluator.evaluate(jobs)
    paid = evaluator.measured
    sign = 1.0 if evaluator.objectives[0].direction == "min" else -1.0
    bound = float(np.sort(sign * whole.values[:, 0])[2])
    raced = evaluator.evaluate(
        Jobs(jobs.ids, population, jobs.keys, fidelity=0, bound=np.full(12, bound))
    )
    beyond = sign * whole.values[:, 0] > bound
    assert raced.state is not None
    np.testing.assert_array_equal(raced.state, np.where(beyond, PRUNED, OK))
    np.testing.assert_array_equal(raced.values[~beyond], whole.values[~beyond])
    np.testing.assert_array_equal(raced.values[beyond, 0], sign * bound)
    assert evaluator.measured - paid <= paid
    if metric == "kl_self":  # scores of any size: the worst are out early
        assert evaluator.measured - paid < paid


@pytest.mark.parametrize("metric", ["options", "first_token", "exact_match"])
def test_candidates_at_once_equal_one_by_one(metric: str) -> None:
    evaluator, space = made_evaluator(metric)
    population = space.sample(uniforms(9, 0, 0, 7, space.sample_width))
    jobs = jobs_of(space, population)
    together = evaluator.evaluate(jobs).items
    evaluator.micro_batch = 1  # as a worker does that runs out of memory
    alone = evaluator.evaluate(jobs).items
    assert together is not None
    assert alone is not None
    np.testing.assert_array_equal(np.stack(together), np.stack(alone))  # type: ignore[arg-type]


def test_summaries_name_majority_failures_and_intervals() -> None:
    evaluator, space = made_evaluator("first_token")
    population = space.sample(uniforms(9, 0, 0, 2, space.sample_width))
    for split in ("search", "selection", "report"):
        for summary in evaluator.summaries(population, split):  # type: ignore[arg-type]
            assert summary.low - 1e-9 <= summary.value <= summary.high + 1e-9
            assert 0 <= summary.format_failures <= 1
            assert summary.majority == evaluator.problem.task.majority(split)  # type: ignore[arg-type]
            assert "majority" in str(summary)


def test_what_cannot_be_scored_is_refused_at_setup() -> None:
    bare = Task("bare", (Item("abc"),), {"search": (0,), "selection": (0,), "report": (0,)})
    evaluator, _ = made_evaluator("options", task=bare)
    with pytest.raises(DataError, match="task 'bare', search: item 1 has no options"):
        evaluator.setup()
    with pytest.raises(ConfigError, match="unknown metric 'bleu'; known: exact_match"):
        LanguageSettings("bleu")  # type: ignore[arg-type]
    long = Task("long", (Item("a" * 200, ("x", "y"), 0),), bare.splits)
    with pytest.raises(DataError, match="item 1 has 202 tokens; the model's context has 128"):
        made_evaluator("options", task=long)[0].setup()


def test_streamed_evaluators_give_the_same_values(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    resident = ResidentExperts(model)
    space = pruning_space(resident.layout, keep=4, groups="block")
    population = space.sample(uniforms(3, 0, 0, 5, space.sample_width))
    jobs = jobs_of(space, population)
    for metric in ("options", "kl_self"):
        settings = LanguageSettings(metric, batch_tokens=200, new_tokens=3)  # type: ignore[arg-type]
        task = made_task(12)
        want = experts_evaluator(resident, space, task, settings, tokenizer=Letters())
        other, store = streamed(model)
        forward = LayeredForward(other, store=store)
        got = experts_evaluator(other, space, task, settings, tokenizer=Letters(), forward=forward)
        got.setup()
        before = store.bytes_read
        values = got.evaluate(jobs).values
        sweeps = 2 if metric == "kl_self" else 1  # the base's own distributions come first
        assert store.bytes_read - before == sweeps * store.total
        np.testing.assert_array_equal(values, want.evaluate(jobs).values)
        assert got.identity()["prompts"] == want.identity()["prompts"]
        store.close()
    with pytest.raises(ConfigError, match="exact_match needs the whole model"):
        experts_evaluator(
            other, space, task, "exact_match", tokenizer=Letters(), forward=forward
        ).evaluate(jobs)


def test_static_figures_are_shown_beside_measured_ones() -> None:
    evaluator, space = made_evaluator("kl_self")
    forward = evaluator.forward
    assert isinstance(forward, LayeredForward)
    batches = evaluator.batches()
    part = evaluator.problem.part("search")
    few = few_prompts(
        forward,
        evaluator.problem.prompts,
        part.questions.items[:3],
        part.questions.answers[:3],  # type: ignore[union-attr]
    )
    evaluator.add_signals(StaticFigures(calibrate(forward, batches), divergence=few))
    names = [signal.name for signal in evaluator.signals]
    assert names == [
        "nll",
        "format_failures",
        "block_error",
        "reap_kept",
        "frequency_kept",
        "kl_few",
    ]
    population = space.sample(uniforms(3, 0, 0, 30, space.sample_width))
    figures = evaluator.static_signals(population)
    assert np.isnan(figures[:, :2]).all()
    assert np.isfinite(figures[:, 2:]).all()
    assert (figures[:, 3:5] < 1).all()
    np.testing.assert_array_equal(evaluator.static_signals(population.take([4])), figures[4:5])
    done = evaluator.evaluate(jobs_of(space, population))
    assert done.signals is not None
    assert done.signals.shape == (30, 6)
    # On three of the prompts, which are some of those that the value is made of.
    order = np.argsort(np.argsort(figures[:, 5]))
    truth = np.argsort(np.argsort(done.values[:, 0]))
    assert np.corrcoef(order, truth)[0, 1] > 0.3


def test_mixed_checkpoints_are_scored_by_tasks() -> None:
    model = tiny_moe("olmoe")
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for metric in ("options", "kl_self", "exact_match", "perplexity"):
        settings = LanguageSettings(metric, new_tokens=3, batch_tokens=300)  # type: ignore[arg-type]
        score = LanguageScore(model, made_task(16), Prompts(Letters()), settings, name="olmoe")
        (value,), items = score.score(own, -1, 0)
        assert items is not None
        assert items.shape == (8,)
        if metric == "kl_self":
            assert value == 0.0
        other = {name: tensor * (1.5 if "experts" in name else 1.0) for name, tensor in own.items()}
        changed = score.score(other, -1, 0)[0]
        assert score.score(own, -1, 0)[0] == [value]
        if metric in ("kl_self", "perplexity"):
            assert changed != [value]
        assert json.loads(json.dumps(score.identity())) == score.identity()
        wrong = {**own, "strange": torch.zeros(1)}
        with pytest.raises(DataError, match="not of the model 'olmoe': 'strange'"):
            score.score(wrong, -1, 0)
        score.score(own, -1, 0)


def test_merged_candidates_are_applied_one_by_one() -> None:
    model = tiny_moe("mixtral")
    weight = model.lm_head.weight

    @contextmanager
    def scaled(factor: float) -> Iterator[None]:
        with torch.no_grad():
            weight.mul_(factor)
            yield
            weight.div_(factor)

    evaluator = applied_evaluator(
        model,
        made_task(16),
        "kl_self",
        scaled,
        candidates=lambda population: [2.0 ** int(v) for v in population["power"]],
        identity={"model": "tiny"},
        tokenizer=Letters(),
    )
    space = Space(power=Integer(0, 3))
    values = evaluator.evaluate(jobs_of(space, Population({"power": np.arange(4)}))).values[:, 0]
    assert values[0] == 0.0
    assert (np.diff(values) > 0).all()


def test_the_straightforward_way_predicts_the_same() -> None:
    resident = ResidentExperts(tiny_moe("mixtral"))
    header = "".join(f"{item.prompt}{item.options[0]}\n" for item in made_items(4, seed=5))
    items = few_shot_items([Item(i.prompt, ("a", "b", "c"), 0) for i in made_items(20)], header)
    speed = measure(
        resident, Prompts(Letters()), items, random_masks(resident, 4, 4), plain_candidates=2
    )
    assert speed.same == 1.0
    assert speed.ratio > 1.0
