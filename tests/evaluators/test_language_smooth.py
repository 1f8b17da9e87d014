"""Accuracies with likelihoods: what is chosen by, and what is reported."""

from __future__ import annotations

import numpy as np
import pytest

from searchlab.errors import ConfigError
from searchlab.evaluator import REPORT_REPLICATE, SELECTION_REPLICATE, Evaluator
from searchlab.evaluators.language.experts import ExpertsEvaluator, experts_evaluator
from searchlab.evaluators.language.problem import LanguageSettings
from searchlab.population import OK, PRUNED, Jobs, Population
from searchlab.space import Space
from searchlab.testing.evaluator import EvaluatorSuite
from searchlab.testing.tiny_moe import tiny_moe
from searchlab.uniforms import uniforms
from tests.evaluators.language_tools import Letters, made_task

pytest.importorskip("transformers")

from searchlab.spaces.experts import ResidentExperts, pruning_space

SMOOTH = 0.5


def made(smooth: float, items: int = 24) -> tuple[ExpertsEvaluator, Space]:
    resident = ResidentExperts(tiny_moe("mixtral"))
    space = pruning_space(resident.layout, keep=4, groups="block")
    settings = LanguageSettings("options", batch_tokens=64, smooth=smooth)
    task = made_task(items)
    return experts_evaluator(resident, space, task, settings, tokenizer=Letters()), space


def jobs(space: Space, population: Population, replicate: int = 0, **more: object) -> Jobs:
    n = len(population)
    return Jobs(np.arange(n), population, space.keys(population), replicate=replicate, **more)  # type: ignore[arg-type]


class TestSmoothed(EvaluatorSuite):
    @pytest.fixture
    def evaluator(self) -> Evaluator:
        return made(SMOOTH)[0]

    @pytest.fixture
    def space(self) -> Space:
        return made(SMOOTH)[1]


def test_a_nat_more_than_the_base_costs_its_share_but_never_in_the_report() -> None:
    smooth, space = made(SMOOTH)
    plain, _ = made(0.0)
    few = space.sample(uniforms(1, 0, 0, 6, space.sample_width))
    nll = plain.signals.index(next(s for s in plain.signals if s.name == "nll"))
    whole = pruning_space(ResidentExperts(tiny_moe("mixtral")).layout, keep=8, groups="block")
    base = whole.of_masks(np.ones((1, 2, 8), dtype=bool))
    full, _ = made(0.0)
    full._candidates = lambda population: np.ones((len(population), 2, 8), dtype=bool)
    for replicate in (0, SELECTION_REPLICATE):
        exact = plain.evaluate(jobs(space, few, replicate))
        of_base = full.evaluate(jobs(whole, base, replicate))
        assert exact.signals is not None
        assert of_base.signals is not None
        lost = exact.signals[:, nll] - of_base.signals[0, nll]
        got = smooth.evaluate(jobs(space, few, replicate))
        np.testing.assert_allclose(got.values[:, 0], exact.values[:, 0] - SMOOTH * lost, rtol=1e-6)
        shown = smooth.plain().evaluate(jobs(space, few, replicate))
        np.testing.assert_array_equal(shown.values, exact.values)
    report = jobs(space, few, REPORT_REPLICATE)
    np.testing.assert_array_equal(smooth.evaluate(report).values, plain.evaluate(report).values)
    assert smooth.identity() != plain.identity()
    assert "smooth" not in plain.identity()["settings"]  # runs of before go on


def test_racing_stays_exact() -> None:
    evaluator, space = made(SMOOTH, items=64)
    population = space.sample(uniforms(3, 0, 0, 12, space.sample_width))
    whole = evaluator.evaluate(jobs(space, population))
    paid = evaluator.measured
    losses = -whole.values[:, 0]
    bound = float(np.sort(losses)[2])
    raced = evaluator.evaluate(jobs(space, population, bound=np.full(12, bound)))
    beyond = losses > bound
    np.testing.assert_array_equal(raced.state, np.where(beyond, PRUNED, OK))
    np.testing.assert_array_equal(raced.values[~beyond], whole.values[~beyond])
    assert evaluator.measured - paid <= paid


@pytest.mark.parametrize(
    ("metric", "smooth", "message"),
    [("perplexity", 0.5, "with metric 'perplexity'"), ("options", -1.0, "smooth -1.0; allowed")],
)
def test_what_cannot_be_smoothed_is_refused(metric: str, smooth: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanguageSettings(metric, smooth=smooth)  # type: ignore[arg-type]
