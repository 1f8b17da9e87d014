"""Evaluators of kept experts and mixed checkpoints by tasks of language."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from searchlab.errors import ConfigError, DataError
from searchlab.evaluator import Evaluator
from searchlab.evaluators.language.batches import lay_out
from searchlab.evaluators.language.calibration import calibrate
from searchlab.evaluators.language.experts import (
    ExpertsEvaluator,
    applied_evaluator,
    experts_evaluator,
)
from searchlab.evaluators.language.forward import plain_logits
from searchlab.evaluators.language.layered import LayeredForward
from searchlab.evaluators.language.mix import LanguageScore
from searchlab.evaluators.language.problem import METRICS, LanguageSettings
from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.static_figures import StaticFigures, few_prompts
from searchlab.evaluators.language.streaming import streamed
from searchlab.evaluators.language.tasks import Item, Task
from searchlab.experiments.benchmarks._eep_speed import few_shot_items, measure
from searchlab.population import OK, PRUNED, Jobs, Population
from searchlab.space import Space
from searchlab.testing.evaluator import EvaluatorSuite, jobs_of
from searchlab.testing.tiny_moe import TINY_MOE, tiny_moe
from searchlab.uniforms import uniforms
from searchlab.variables import Integer
from tests.evaluators.language_tools import Letters, made_items, made_task, queries

pytest.importorskip("transformers")

from searchlab.spaces.experts import ResidentExperts, pruning_space


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
    evaluator.base("search")  # what it remembers must not hide blocks from the calibration
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
