"""Guided search over several fidelities: cheap before dear, the same trace however it is told."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from loop_tools import Shuffled, reopened, run_in, trace

from searchlab.algorithms import Seeds
from searchlab.algorithms._ladder import Ladder
from searchlab.algorithms.base import Algorithm
from searchlab.algorithms.guided import Guided
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.errors import ConfigError
from searchlab.evaluator import Fidelity, Objective, Signal
from searchlab.population import Evaluations, Jobs
from searchlab.search import run, verify
from searchlab.space import Space
from searchlab.study import MemoryRun
from searchlab.testing.algorithm import AlgorithmSuite, Build
from searchlab.variables import Choice

SPACE = Space(x=Choice(range(6), shape=(10,)))
WEIGHTS = np.random.default_rng(8).normal(size=(10, 6))
PAIRS = np.random.default_rng(9).normal(size=(9, 6, 6))
COSTS = (0.05, 1.0)


class TestGuidedFidelities(AlgorithmSuite):
    """Three levels, and a predictor that chooses as soon as it can."""

    @pytest.fixture
    def build(self) -> Build:
        def made(space: Space, seed: int, first_id: int, seeds: Seeds | None) -> Algorithm:
            return Guided(
                space,
                seed=seed,
                first_id=first_id,
                seeds=seeds,
                pool=20,
                predictor="ridge",  # whichever it is, the order of things is the same
                first_fit=4,
                guard="always",
                fidelities=(0.05, 0.2, 1.0),
            )

        return made


@dataclass
class Rough:
    """A loss with pairs, whose cheap measurement is a rescaled and noisy one, or its negative."""

    sign: float = 1.0
    costs: tuple[float, ...] = COSTS
    signals: tuple[Signal, ...] = ()
    reproducibility: Any = "exact"

    def __post_init__(self) -> None:
        self.objectives = (Objective("loss"),)
        self.fidelities = tuple(Fidelity(f"f{i}", cost) for i, cost in enumerate(self.costs))

    def setup(self) -> None:
        """Nothing to load."""

    def evaluate(self, jobs: Jobs) -> Evaluations:
        x = jobs.population["x"].astype(np.int64)
        loss = WEIGHTS[np.arange(10), x].sum(axis=1)
        loss += PAIRS[np.arange(9), x[:, :-1], x[:, 1:]].sum(axis=1)
        if jobs.fidelity % len(self.costs) < len(self.costs) - 1:
            noise = [np.random.default_rng(np.frombuffer(k, np.uint32)).normal() for k in jobs.keys]
            loss = self.sign * (5.0 + 0.3 * loss + 0.2 * np.array(noise))
        return Evaluations(loss)

    def identity(self) -> Mapping[str, Any]:
        return {"sign": self.sign, "version": 1}


def config(evaluator: Any = None, budget: int = 40, seed: int = 1, **more: Any) -> SearchConfig:
    algorithm = AlgorithmSpec(
        "guided", {"pool": 60, "predictor": "ridge", **more.pop("options", {})}
    )
    stage = Stage("search", SPACE, evaluator or Rough(), algorithm, Budget(budget))
    return SearchConfig((stage,), seed=seed, **more)


def test_the_cycle_follows_the_costs() -> None:
    cycles = {costs: Ladder.of(costs, own=0) for costs in (COSTS, (0.1, 1.0), (0.01, 0.1, 0.9, 2))}
    assert [ladder.cycle if ladder else None for ladder in cycles.values()] == [
        (0,) * 8 + (1,),
        (0,) * 5 + (1,),
        (0, 0, 1) * 4 + (2,),
    ]
    last = cycles[0.01, 0.1, 0.9, 2]
    assert last is not None
    assert last.at == (0, 1, 3)  # 0.9 of 2 is too dear to be a first look
    assert Ladder.of((0.5, 1.0), own=0) is None
    assert Ladder.of((), own=0) is Ladder.of((1.0,), own=0) is None
    with pytest.raises(ConfigError, match="cheapest first"):
        Ladder.of((1.0, 0.1), own=0)


def test_every_candidate_is_measured_cheaply_before_it_is_measured_in_full() -> None:
    records = run_in(config()).records()
    full = np.flatnonzero(records.fidelity == 1)
    cheap = {records.keys[row]: row for row in np.flatnonzero(records.fidelity == 0).tolist()}
    assert len(full) >= 20
    assert all(cheap[records.keys[row]] < row for row in full.tolist())
    assert {records.origin[row] for row in full.tolist()} == {"promoted"}
    spent = np.array(COSTS)[records.fidelity].sum()
    assert 39 < spent <= 40 + 1e-9


def test_a_cheap_fidelity_saves_and_one_that_misleads_is_given_up() -> None:
    best: dict[str, list[float]] = {"without": [], "with": [], "negated": []}
    for seed in range(2):
        for name, evaluator in (
            ("without", Rough(costs=(1.0,))),
            ("with", Rough()),
            ("negated", Rough(sign=-1.0)),
        ):
            result = run(config(evaluator, 24, seed=seed))
            best[name].append(result.best.value)
    assert np.mean(best["with"]) < np.mean(best["without"]) - 0.5
    assert np.mean(best["negated"]) < np.mean(best["without"]) + 3.0


def test_equal_traces_whatever_comes_first_and_whatever_the_budget_was() -> None:
    whole = run_in(config(budget=20, lag=6))
    jumbled = MemoryRun()
    run(config(budget=20, lag=6), store=jumbled, executor=Shuffled(5))
    assert trace(jumbled) == trace(whole)
    part = run_in(config(budget=9, lag=6))
    part = reopened(part)
    run(config(budget=20, lag=6), store=part)
    assert trace(part) == trace(whole)
    holes = reopened(whole, lambda i: i % 3 != 1)
    run(config(budget=20, lag=6), store=holes)
    assert trace(holes) == trace(whole)
    assert verify(config(budget=20, lag=6), whole) == []


def test_the_report_says_what_the_cheap_fidelity_is_worth() -> None:
    result = run(config(budget=25))
    (note,) = result.meta["proposals"].values()
    state = note["state"]
    assert state["fidelities"]["costs"] == list(COSTS)
    assert state["fidelities"]["measured"][0] > 5 * state["fidelities"]["measured"][1]
    assert state["fidelities"]["correlation"]["low"] > 0
    assert state["cheapest"]["labels"] == state["fidelities"]["measured"][0]


def test_without_trust_fidelities_are_left_alone() -> None:
    never = run_in(config(budget=25, options={"guard": "never"})).records()
    stage = Stage("search", SPACE, Rough(), AlgorithmSpec("evolution"), Budget(25))
    alone = run_in(SearchConfig((stage,), seed=1)).records()
    assert never.trace() == alone.trace()
