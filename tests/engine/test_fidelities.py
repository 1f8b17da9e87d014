"""Algorithms that choose fidelities and replicates: the loop, the budget, halving, racing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from loop_tools import Shuffled, reopened, run_in, trace

from searchlab._comparable import comparable
from searchlab._stage_levels import LevelRule
from searchlab.algorithms import Seeds, Told
from searchlab.algorithms.halving import SuccessiveHalving
from searchlab.algorithms.paired_race import PairedRace
from searchlab.config import AdoptBest, AlgorithmSpec, Budget, Final, SearchConfig, Stage
from searchlab.errors import ConfigError
from searchlab.evaluator import SELECTION_REPLICATE, Fidelity, Objective, Signal
from searchlab.population import FAILED, OK, Evaluations, Jobs
from searchlab.search import run, verify
from searchlab.space import Space
from searchlab.study import Database, MemoryRun
from searchlab.testing.algorithm import AlgorithmSuite, Build
from searchlab.uniforms import uniforms
from searchlab.variables import Choice, Integer

SPACE = Space(x=Choice((0, 1, 2, 3), shape=(5,)))
COSTS = (0.1, 0.25, 1.0)


class TestSuccessiveHalving(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: SuccessiveHalving(
            space, seed=seed, first_id=first_id, seeds=seeds, fidelities=COSTS, quantum=9
        )


class TestPairedRace(AlgorithmSuite):
    only_seeds = True

    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: PairedRace(
            space, seed=seed, first_id=first_id, seeds=seeds, keep=3
        )


@dataclass
class Noisy:
    """Sum of the codes, with noise that every replicate shares, and bias at lower fidelities."""

    noise: float = 0.0
    direction: Any = "min"
    fails: Callable[[int, int, NDArray[Any]], bool] = lambda fidelity, replicate, x: False
    objectives: tuple[Objective, ...] = ()
    fidelities: tuple[Fidelity, ...] = tuple(Fidelity(f"f{c}", c) for c in COSTS)
    signals: tuple[Signal, ...] = ()
    reproducibility: Any = "exact"
    probe: bool = False

    def __post_init__(self) -> None:
        self.objectives = (Objective("loss", self.direction),)

    def setup(self) -> None:
        """Nothing to load."""

    def evaluate(self, jobs: Jobs) -> Evaluations:
        x = jobs.population["x"].astype(float)
        u = uniforms(7, 3, jobs.replicate, 1, 25)[0] - 0.5
        own = u[5:].reshape(5, 4)[np.arange(5), jobs.population["x"]].sum(axis=1)
        values = x.sum(axis=1) + 10 * u[0] + self.noise * own
        values -= (2 - jobs.fidelity) * 3.0 * (x[:, 0] == 3)  # cheap measurements flatter these
        out = Evaluations(values if self.direction == "min" else -values)
        assert out.state is not None
        assert out.reason is not None
        for row in range(len(jobs)):
            if self.fails(jobs.fidelity, jobs.replicate, jobs.population["x"][row]):
                out.state[row], out.reason[row] = FAILED, "on purpose"
        return out

    def identity(self) -> dict[str, Any]:
        return {"noise": self.noise, "direction": self.direction, "version": 1}


def config(
    algorithm: AlgorithmSpec,
    evaluator: Any = None,
    *,
    budget: int | None = 30,
    seeds: Seeds | None = None,
    **more: Any,
) -> SearchConfig:
    stage = Stage("search", SPACE, evaluator or Noisy(), algorithm, Budget(budget), seeds=seeds)
    return SearchConfig((stage,), **more)


HALVING = AlgorithmSpec("successive_halving", {"quantum": 9})


def seeds_of(*rows: list[int], kind: str = "seed") -> Seeds:
    names = tuple(f"{kind}:{i}" for i in range(len(rows)))
    return Seeds(SPACE.population([{"x": row} for row in rows]), names)


# -- halving in the loop ------------------------------------------------------------------------


def test_a_bracket_goes_up_the_fidelities() -> None:
    store = run_in(config(HALVING))
    records = store.records()
    groups = records.ids // 9
    for group, fidelity, jobs in ((0, 0, 9), (1, 1, 3), (2, 2, 1), (3, 0, 9)):
        rows = (groups == group) & (records.state == OK)
        assert rows.sum() == jobs
        assert (records.fidelity[rows] == fidelity).all()
    first = records.take(np.flatnonzero(groups == 0))
    second = records.take(np.flatnonzero((groups == 1) & (records.state == OK)))
    best = [first.keys[i] for i in np.argsort(first.values[:, 0], kind="stable")[:3]]
    assert second.keys == best
    assert set(second.origin) == {"promoted"}
    assert verify(config(HALVING), store) == []


def test_the_budget_counts_relative_costs() -> None:
    seen: list[Any] = []
    store = MemoryRun()
    result = run(config(HALVING, budget=10), store=store, callbacks=[seen.append])
    records = store.records()
    paid = records.take(np.flatnonzero(records.state == OK))
    cost = sum(COSTS[f] for f in paid.fidelity.tolist())
    assert 10 - max(COSTS) < cost <= 10 + 1e-9
    assert seen[-1].paid == pytest.approx(cost)
    assert result.counts["evaluations"] == len(paid)
    assert result.counts["at_lower_fidelities"] == (paid.fidelity < 2).sum()
    assert result.counts["worth_full_evaluations"] == pytest.approx(cost, abs=1e-3)
    assert result.meta["stop_reason"] == "budget"


def test_known_points_are_measured_in_full_and_free_of_the_budget() -> None:
    known = seeds_of([1, 1, 1, 1, 1], [2, 2, 2, 2, 2], kind="baseline")
    store = MemoryRun()
    result = run(config(HALVING, budget=4, seeds=known), store=store)
    records = store.records()
    assert records.fidelity[:2].tolist() == [2, 2]
    assert result.counts["baseline_evaluations"] == 2
    assert result.counts["worth_full_evaluations"] <= 4


def test_only_full_measurements_may_be_the_best() -> None:
    seen: list[Any] = []
    store = MemoryRun()
    result = run(config(HALVING, seed=3), store=store, callbacks=[seen.append])
    records = store.records()
    ok = records.state == OK
    full = records.values[(records.fidelity == 2) & ok, 0]
    assert result.best is not None
    assert result.best.contender.search == full.min()
    assert seen[-1].best == {0: full.min()}
    assert records.values[ok, 0].min() < full.min()  # a flattered one seemed better


def test_equal_traces_whatever_comes_first_and_whatever_the_budget_was() -> None:
    whole = run_in(config(HALVING, budget=25))
    jumbled = MemoryRun()
    run(config(HALVING, budget=25, chunk=2, lag=9), store=jumbled, executor=Shuffled(5))
    assert [c[: len(trace(whole)[0])] for c in trace(jumbled)] == [tuple(c) for c in trace(whole)]
    part = run_in(config(HALVING, budget=3))
    for budget in (11, 25):
        part = reopened(part)
        run(config(HALVING, budget=budget), store=part)
    assert trace(part) == trace(whole)
    holes = reopened(whole, lambda i: i % 3 != 1)
    run(config(HALVING, budget=25), store=holes)
    assert trace(holes) == trace(whole)


def test_a_second_run_pays_nothing_for_what_the_first_found(tmp_path: Path) -> None:
    traces, results = [], []
    with Database(tmp_path / "a.db") as base:
        for name in ("one", "two"):
            made = config(HALVING, budget=12)
            store = base.open_run(
                name, config=made.describe(), space=SPACE.fingerprint, seed=0, out=""
            )
            results.append(run(made, store=store))
            traces.append(base.read(name).records())
    both = traces[0].ids.tolist()
    assert traces[1].ids[: len(both)].tolist() == both
    assert traces[1].cached[: len(both)][traces[0].state == OK].all()
    assert results[1].counts["hits"] >= results[0].counts["evaluations"]


def test_a_rung_whose_candidates_all_fail_ends_its_bracket() -> None:
    evaluator = Noisy(fails=lambda fidelity, replicate, x: fidelity == 0 and x[0] != 2)
    store = run_in(config(HALVING, evaluator, budget=15))
    records = store.records()
    lower = {key for key, f in zip(records.keys, records.fidelity, strict=True) if f == 0}
    assert all(
        key in lower and row[0] == 2
        for key, f, s, row in zip(
            records.keys,
            records.fidelity,
            records.state,
            SPACE.unpack([g or bytes(5) for g in records.genotypes])["x"],
            strict=True,
        )
        if f > 0 and s == OK
    )


def test_halving_finds_more_for_the_same_cost_than_full_measurements() -> None:
    space = Space(x=Choice(range(6), shape=(8,)))

    class Table(Noisy):
        def evaluate(self, jobs: Jobs) -> Evaluations:
            return Evaluations((jobs.population["x"] != 4).sum(axis=1).astype(float))

    def best(algorithm: AlgorithmSpec, seed: int) -> float:
        stage = Stage("s", space, Table(), algorithm, Budget(25))
        found = run(SearchConfig((stage,), seed=seed)).best
        assert found is not None
        return found.contender.search

    pairs = [(best(HALVING, s), best(AlgorithmSpec("random"), s)) for s in range(6)]
    assert np.mean([halving - random for halving, random in pairs]) <= -1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fidelities": (1.0,)}, "1 fidelities; allowed: two or more .evolution"),
        ({"fidelities": (1.0, 0.5)}, "cheapest first"),
        ({"fidelities": (0.0, 1.0)}, "above 0"),
        ({"fidelities": COSTS, "eta": 1.0}, "eta 1.0"),
        ({"fidelities": COSTS, "quantum": 1}, "quantum 1"),
        ({"fidelities": COSTS, "learn": 2.0}, "learn 2.0"),
    ],
)
def test_wrong_settings_of_halving(options: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SuccessiveHalving(SPACE, **options)


class Astray(SuccessiveHalving):
    """Asks for what no search may have."""

    wrong: ClassVar[dict[str, int]] = {}

    def ask(self, first_id: int, n: int) -> Jobs:
        return replace(super().ask(first_id, n), **self.wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"fidelity": 3}, {"replicate": SELECTION_REPLICATE}])
def test_levels_that_a_search_may_not_have(wrong: dict[str, int]) -> None:
    rule = LevelRule(config(HALVING).stages[0], 0, Astray(SPACE, fidelities=COSTS))
    Astray.wrong = wrong
    jobs = Astray(SPACE, fidelities=COSTS).ask(0, 4)
    with pytest.raises(ConfigError, match=r"successive_halving asks for \w+ \d+; allowed"):
        rule.set(jobs, stage=0, told_at_ask=0)


# -- paired racing ------------------------------------------------------------------------------

FIVE = seeds_of([0, 1, 0, 0, 0], [3, 3, 3, 3, 3], [0, 0, 0, 0, 0], [3, 0, 3, 0, 3], [0, 0, 1, 0, 0])
RACE = AlgorithmSpec("paired_race", {"blocks": 20})


def test_a_race_uses_common_blocks_and_leaves_the_worse_behind() -> None:
    store = MemoryRun()
    result = run(config(RACE, Noisy(noise=1.0), budget=None, seeds=FIVE), store=store)
    records = store.records()
    ok = records.state == OK
    assert (records.replicate[ok] == records.ids[ok] // 5).all()
    assert (records.fidelity[ok] == 2).all()
    jobs = [int((records.replicate[ok] == r).sum()) for r in range(20)]
    assert jobs[:3] == [5, 5, 5]
    assert jobs[3] < 5
    assert jobs == sorted(jobs, reverse=True)
    assert result.best is not None
    assert result.best.plan["x"] == [0, 0, 0, 0, 0]
    assert result.meta["stop_reason"] == "exhausted"
    assert verify(config(RACE, Noisy(noise=1.0), budget=None, seeds=FIVE), store) == []


def test_the_value_of_a_leader_is_its_mean_over_the_common_blocks() -> None:
    store = MemoryRun()
    result = run(config(RACE, Noisy(noise=2.0), budget=23, seeds=FIVE), store=store)
    records = store.records()
    assert result.best is not None
    mine = np.array([key == result.best.contender.key for key in records.keys]) & (
        records.state == OK
    )
    blocks = records.replicate[mine]
    assert len(blocks) >= 4
    every = [
        set(records.replicate[[k == key for k in records.keys]].tolist())
        for key in set(records.keys)
        if key
    ]
    most = max(map(len, every))
    common = set.intersection(*[blocks for blocks in every if len(blocks) >= most - 1])
    wanted = records.values[mine, 0][[b in common for b in blocks.tolist()]].mean()
    assert result.best.contender.search == pytest.approx(wanted)


def test_a_candidate_that_was_dropped_never_wins_by_a_lucky_mean() -> None:
    part, behind = comparable(
        _records(
            [
                (0, 0, 5.0),
                (1, 0, 5.5),
                (0, 1, 1.0),
                (1, 1, 1.2),
                (0, 2, 9.0),
                (2, 0, 4.0),
                (0, 3, 9.0),
                (1, 2, 9.3),
                (1, 3, 9.4),
            ]
        ),
        2,
    )
    assert part.keys == [b"0", b"1", b"2"]
    assert behind.tolist() == [False, False, True]
    assert part.values[:, 0].tolist() == pytest.approx([6.0, 6.35, 4.0])


def _records(rows: list[tuple[int, int, float]]) -> Any:
    """Records of (candidate, replicate, value) at the highest fidelity."""
    from searchlab.records import build_rows, records_from_rows

    made = []
    for i, (candidate, replicate, value) in enumerate(rows):
        jobs = Jobs(
            np.array([i]),
            SPACE.population([{"x": [0] * 5}]),
            (b"%d" % candidate,),
            fidelity=2,
            replicate=replicate,
            origin=("seed",),
            parents=np.full((1, 2), -1),
        )
        made += build_rows(
            jobs,
            Evaluations(np.array([value])),
            packed=[bytes(5)],
            evaluator=1,
            started=0.0,
            finished=0.0,
        )
    return records_from_rows(made, None)


def test_a_failed_block_drops_a_candidate() -> None:
    evaluator = Noisy(noise=1.0, fails=lambda f, replicate, x: replicate == 4 and x.sum() == 0)
    seeds = seeds_of([0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0])
    result = run(config(RACE, evaluator, budget=None, seeds=seeds))
    assert result.best is not None
    assert sum(result.best.plan["x"]) == 1


def test_what_a_race_leaves_is_adopted_and_scored_in_a_final() -> None:
    evaluator = Noisy(noise=1.0)
    race = config(RACE, evaluator, budget=None, seeds=FIVE).stages[0]
    more = Stage(
        "more", SPACE, evaluator, AlgorithmSpec("evolution"), Budget(6), adopt=AdoptBest(1)
    )
    store = MemoryRun()
    result = run(SearchConfig((race, more), final=Final(k=2, report=2)), store=store)
    records = store.records()
    second = records.take(np.flatnonzero(records.stage == 1))
    assert SPACE.unpack(second.genotypes[:1])["x"].tolist() == [[0, 0, 0, 0, 0]]
    assert result.best is not None
    assert len(result.best.contender.report) == 2


@pytest.mark.parametrize(("test", "width"), [("t", None), ("bernstein", 1.0), ("hoeffding", 1.0)])
def test_the_level_is_that_of_the_whole_race(test: Any, width: float | None) -> None:
    """Equal candidates: the first one is dropped in at most a share alpha of the races."""
    space = Space(a=Integer(0, 5))
    seeds = Seeds(space.population([{"a": a} for a in range(6)]), ("seed",) * 6)
    rng = np.random.default_rng(4)
    lost = 0
    for _ in range(200):
        race = PairedRace(
            space, seeds=seeds, alpha=0.2, test=test, width=width, blocks=12, first_blocks=4
        )
        for block in range(12):
            jobs = race.ask(6 * block, 6)
            if len(jobs):
                losses = np.clip(rng.normal(0.5, 0.15, (len(jobs), 1)), 0, 1)
                race.tell(Told(jobs.ids, jobs.population, losses, np.zeros(len(jobs))))
        lost += not race.survivors(12)[0]
    assert lost <= 0.2 * 200 + 2 * math.sqrt(200 * 0.2 * 0.8)


@pytest.mark.parametrize(("test", "width"), [("t", None), ("bernstein", 1.0), ("hoeffding", 1.0)])
def test_each_test_separates_what_differs(test: Any, width: float | None) -> None:
    space = Space(a=Integer(0, 3))
    seeds = Seeds(space.population([{"a": a} for a in range(4)]), ("seed",) * 4)
    race = PairedRace(space, seeds=seeds, test=test, width=width, blocks=400)
    rng = np.random.default_rng(0)
    for block in range(400):
        jobs = race.ask(4 * block, 4)
        if not len(jobs):
            break
        losses = 0.05 * rng.random((1, 1)) + 0.3 * jobs.population["a"][:, None]
        race.tell(Told(jobs.ids, jobs.population, losses, np.zeros(len(jobs))))
    assert race.survivors(block).tolist() == [True, False, False, False]
    assert block <= {"t": 4, "bernstein": 400, "hoeffding": 400}[test]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"test": "f"}, "test 'f'; allowed: t, bernstein, hoeffding"),
        ({"test": "bernstein"}, "width None"),
        ({"width": 1.0}, "width 1.0"),
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"first_blocks": 1}, "first_blocks 1"),
        ({"blocks": 2}, "blocks 2"),
        ({"keep": 0}, "keep 0"),
        ({"quantum": 3}, "quantum 3 for 5"),
    ],
)
def test_wrong_settings_of_a_race(options: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PairedRace(SPACE, seeds=FIVE, **options)
