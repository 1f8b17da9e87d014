"""Outcome constraints: their text, their violation, and who hears of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from loop_tools import make_config, mixed_space, run_in

from searchlab.algorithms.base import Told
from searchlab.algorithms.evolution import Evolution
from searchlab.config import ALGORITHMS, AdoptBest, Budget
from searchlab.errors import ConfigError
from searchlab.evaluator import FunctionEvaluator, Objective
from searchlab.outcomes import Constraint, parse_constraint, violation
from searchlab.population import Evaluations, Jobs
from searchlab.search import run, stored_result
from searchlab.study import MemoryRun

CONSTRAINT = Constraint("load", 20.0, "<=", scale=2.0)


class Loaded(FunctionEvaluator):
    """Minimises a distance from the largest load; a load above 20 breaks the constraint."""

    constraints = (CONSTRAINT,)

    def evaluate(self, jobs: Jobs) -> Evaluations:
        rows = self.space.decode(jobs.population)
        load = np.array([float(sum(row["kind"]) + row["n"]) for row in rows])
        return Evaluations(25.0 - load, constraints=load[:, None])


def loaded(space: Any = None) -> Loaded:
    return Loaded(lambda: 0.0, space or mixed_space(), (Objective("value"),), version=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gsm8k>=0.80", Constraint("gsm8k", 0.8, ">=")),
        (" p99/ttft_ms <= 1e3 ", Constraint("p99/ttft_ms", 1000.0, "<=")),
        ("drift>=-2", Constraint("drift", -2.0, ">=")),
    ],
)
def test_a_constraint_as_text(text: str, expected: Constraint) -> None:
    assert parse_constraint(text) == expected


@pytest.mark.parametrize(
    "text", ["", "gsm8k", "gsm8k>0.8", "gsm8k>=", ">=1", "a>=b", "a>=nan", "a>=inf", "a>=1>=2"]
)
def test_texts_that_are_no_constraint(text: str) -> None:
    with pytest.raises(ConfigError, match="constraint"):
        parse_constraint(text)


def test_violations_add_up_in_units_of_their_scales() -> None:
    constraints = (Constraint("a", 4.0), Constraint("b", 0.0, ">="), Constraint("c", 1, scale=10))
    values = [[4.0, 0.0, 1.0], [6.0, -3.0, 0.0], [3.0, 5.0, 21.0], [np.nan, 1.0, 1.0]]
    assert violation(values, constraints).tolist() == [0.0, 0.5 + 3.0, 2.0, np.inf]
    assert violation(np.empty((2, 0)), constraints).tolist() == [np.inf, np.inf]
    assert violation(np.empty((2, 0)), ()).tolist() == [0.0, 0.0]


class Listening(Evolution):
    """Notes the violations that it is told."""

    name = "listening"
    heard: dict[int, float]

    def _learn(self, told: Told) -> None:
        Listening.heard |= dict(zip(told.ids.tolist(), told.violation.tolist(), strict=True))
        super()._learn(told)


def test_the_algorithm_hears_of_violations_also_after_a_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ALGORITHMS, "listening", f"{__name__}:Listening")
    monkeypatch.setattr("searchlab.config.resolve", lambda registry, name, kind: Listening)
    Listening.heard = {}
    store = run_in(make_config(loaded(), algorithm="listening", budget=60))
    records = store.records()
    expected = np.maximum(records.constraints[:, 0] - 20.0, 0.0) / 2.0
    assert (expected > 0).any()
    heard = dict(Listening.heard)
    assert heard
    assert all(heard[i] == expected[i] for i in heard)
    Listening.heard = {}
    again = MemoryRun()
    again._stored, again._meta_stored = store._stored, store._meta_stored
    again._digests = store._digests
    run_in(make_config(loaded(), algorithm="listening", budget=70), again)
    assert {i: v for i, v in Listening.heard.items() if i in heard} == heard


def test_the_best_meets_the_constraints() -> None:
    config = make_config(loaded(), budget=150)
    store = MemoryRun()
    result = run(config, store=store)
    assert result.best.value == 5.0  # a load of 20 and not more
    assert result.best.contender.violation == 0.0
    assert (store.records().values[:, 0] < 5.0).any()  # better ones break it
    assert stored_result(config, store).rows() == result.rows()
    (curve,) = result.curve.values()
    assert min(value for _, value in curve) == 5.0


def test_without_a_candidate_that_meets_them_the_nearest_is_shown() -> None:
    evaluator = loaded()
    evaluator.constraints = (Constraint("load", -1.0, scale=1.0),)
    result = run(make_config(evaluator, budget=200))
    assert result.best.value == 25.0  # no load at all
    assert "no candidate meets the constraints" in result.verdict()
    assert "violation" in result.table()
    assert not result.front


def test_the_next_stage_adopts_what_meets_the_constraints() -> None:
    from dataclasses import replace

    config = make_config(loaded(), budget=60)
    (stage,) = config.stages
    later = replace(stage, name="later", adopt=AdoptBest(5), budget=Budget(5))
    store = run_in(replace(config, stages=(stage, later)))
    records = store.records()
    adopted = records.take(np.flatnonzero((records.stage == 1) & records.cached))
    assert len(adopted) == 5
    assert (adopted.constraints[:, 0] <= 20.0).all()
