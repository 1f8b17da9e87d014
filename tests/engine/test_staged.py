"""Stages of predictor search: the suite, what a stage asks for, and that it helps."""

from __future__ import annotations

import numpy as np
import pytest

import searchlab as sl
from searchlab.algorithms import Seeds
from searchlab.algorithms.base import Algorithm
from searchlab.algorithms.staged import Staged
from searchlab.config import AlgorithmSpec
from searchlab.errors import ConfigError
from searchlab.space import Space
from searchlab.testing.algorithm import AlgorithmSuite, Build, drive
from searchlab.variables import Choice

CHOICES = Space(x=Choice(range(6), shape=(12,)))
WEIGHTS = np.random.default_rng(5).normal(size=(12, 6))
QUICK = {"predictor": "ridge", "first": 12, "batch": 8, "generations": 5, "children": 20}


class TestStaged(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        def made(space: Space, seed: int, first_id: int, seeds: Seeds | None) -> Algorithm:
            return Staged(space, seed=seed, first_id=first_id, seeds=seeds, **QUICK)

        return made


def additive(x: list[int]) -> float:
    return float(WEIGHTS[np.arange(12), x].sum())


def test_stages_come_after_the_first_sample_and_find_more() -> None:
    best = float(WEIGHTS.min(axis=1).sum())
    left: dict[str, list[float]] = {"evolution": [], "staged": []}
    for seed in range(3):
        for name, options in (("evolution", {}), ("staged", QUICK)):
            result = sl.search(
                CHOICES,
                additive,
                budget=80,
                seed=seed,
                algorithm=AlgorithmSpec(name, options),
            )
            left[name].append(result.best.value - best)
    assert np.mean(left["staged"]) < 0.5 * np.mean(left["evolution"])
    state = result.meta["proposals"]["search"]["state"]
    assert state["predictor"] == "ridge"
    assert state["stages"] == 8  # 16 evaluations, the first group that has 12 labels, and 64 more
    assert state["labels"] == 72


def test_a_stage_serves_all_niches_alike() -> None:
    space = Space(n=sl.Integer(1, 3), x=Choice(range(4), shape=(5,)))
    space.cost = lambda population: {"n": population["n"].astype(float)}  # type: ignore[method-assign]
    staged = Staged(space, options={"niche": "n", "niches": (1, 3)}, **QUICK)
    drive(staged, 24)
    jobs = staged.ask(24, 8)
    assert set(jobs.origin) == {"staged"}
    assert sorted(jobs.population["n"].tolist()) == [1] * 4 + [3] * 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"first": 2}, "first 2"),
        ({"generations": 0}, "generations 0"),
        ({"predictor": "magic"}, "magic"),
        ({"predictor_options": {"speed": 1}}, "options of ridge"),
        ({"options": {"speed": 1}}, "options of evolution"),
        ({"options": {"repeats": "allow"}}, "allow"),
    ],
)
def test_options_that_cannot_be_are_named(options, text) -> None:
    with pytest.raises(ConfigError, match=text):
        Staged(CHOICES, **{**QUICK, **options})
