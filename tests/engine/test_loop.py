"""The loop: the lag rule, traces that no timing changes, resume from anything, budgets."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from loop_tools import (
    Counted,
    Shuffled,
    Watched,
    make_config,
    mixed_space,
    mixed_value,
    reopened,
    run_in,
    trace,
)

from searchlab.algorithms import Seeds
from searchlab.config import ALGORITHMS, Budget, SearchConfig
from searchlab.errors import ConfigError, StudyError
from searchlab.evaluator import FunctionEvaluator
from searchlab.population import FAILED
from searchlab.records import VOID
from searchlab.search import run, verify
from searchlab.space import Space
from searchlab.study import Database, MemoryRun
from searchlab.variables import Choice, Integer

# -- the lag rule -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, 0, 1])
@pytest.mark.parametrize(
    ("q", "lag"), [(1, 1), (1, 2), (1, 5), (4, 4), (4, 6), (4, 8), (3, 11), (8, 1)]
)
def test_group_g_is_proposed_by_the_jobs_below_its_bound(
    q: int, lag: int, order: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALGORITHMS, "watched", f"{Watched.__module__}:{Watched.__name__}")
    config = make_config(algorithm="watched", lag=lag, quantum=q, n_random=3, budget=45)
    executor = None if order is None else Shuffled(order, held=6)
    run_in(config, executor=executor)
    lag = max(lag, q)
    # The first asks are those of the measurement that precedes every run.
    asked = [entry for entry in Watched.log if entry[0] % q == 0 and entry[1] == q]
    assert [first for first, _, _ in asked] == list(range(0, -(-45 // q) * q, q))
    for first, n, told in asked:
        assert n == q
        assert told == tuple(range(max(0, first + q - lag)))


def test_told_at_ask_is_recorded() -> None:
    records = run_in(make_config(lag=6, quantum=4, budget=20)).records()
    assert records.told_at_ask.tolist() == [max(0, i // 4 * 4 + 4 - 6) for i in range(20)]


@pytest.mark.parametrize("lag", [4, 16])
def test_no_order_of_completion_changes_the_trace(lag: int) -> None:
    config = make_config(lag=lag, quantum=4, n_random=4, budget=60)
    wanted = trace(run_in(config))
    for seed in range(4):
        executor = Shuffled(seed, held=5)
        assert trace(run_in(config, executor=executor)) == wanted
        if lag == 16:
            assert executor.most_open > 2


def test_the_lag_is_a_part_of_the_trace() -> None:
    traces = [trace(run_in(make_config(lag=lag, budget=60))) for lag in (1, 8)]
    assert traces[0] != traces[1]


def test_lag_quantum_and_chunk_are_kept_by_a_resume() -> None:
    config = make_config(budget=20, lag=7)
    store = run_in(config)
    again = reopened(store)
    run(make_config(budget=40, lag=3), store=again)
    assert trace(again) == trace(run_in(make_config(budget=40, lag=7)))
    with pytest.raises(StudyError, match="quantum"):
        run(make_config(budget=40, quantum=2), store=reopened(store))


# -- resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1, 4])
def test_resume_from_any_prefix(q: int) -> None:
    config = make_config(lag=6, quantum=q, budget=36)
    whole = run_in(config)
    for length in (0, 1, 3, 4, 17, 35, 36):
        part = reopened(whole, lambda i, n=length: i < n)
        run(config, store=part)
        assert trace(part) == trace(whole)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("repeats", ["redraw", "allow"])
def test_resume_from_any_subset(seed: int, repeats: str) -> None:
    space = Space(a=Choice(range(4)), b=Choice(range(6)))
    function = Counted(lambda a, b: a + b / 7)
    config = make_config(
        function, space=space, lag=8, quantum=4, n_random=4, budget=20, repeats=repeats
    )
    whole = run_in(config)
    draw = random.Random(seed)
    kept = {i for i in whole.records().ids.tolist() if draw.random() < 0.6}
    part = reopened(whole, kept.__contains__)
    function.calls.clear()
    run(config, store=part, executor=Shuffled(seed))
    assert trace(part) == trace(whole)
    records = whole.records()
    missing = [i not in kept for i in records.ids.tolist()]
    assert len(function.calls) == int((np.array(missing) & ~records.cached).sum())


def test_resuming_a_finished_run_evaluates_nothing() -> None:
    function = Counted(mixed_value)
    config = make_config(function, budget=30, quantum=4)
    store = run_in(config)
    function.calls.clear()
    again = reopened(store)
    run(config, store=again)
    assert not function.calls
    assert trace(again) == trace(store)


@pytest.mark.parametrize("small", [1, 5, 8, 11, 30])
@pytest.mark.parametrize("repeats", ["redraw", "allow"])
def test_a_larger_budget_continues_the_trace(small: int, repeats: str) -> None:
    space = Space(a=Choice(range(5)), b=Choice(range(9)))

    def config(budget: int) -> SearchConfig:
        return make_config(
            lambda a, b: float((a - 2) ** 2 + b),
            space=space,
            budget=budget,
            quantum=8,
            lag=16,
            n_random=4,
            repeats=repeats,
        )

    whole = run_in(config(40))
    part = run_in(config(small))
    count = len(part.records())
    assert [column[:count] for column in trace(whole)] == [tuple(c) for c in trace(part)]
    again = reopened(part)
    run(config(40), store=again)
    assert trace(again) == trace(whole)
    assert verify(config(40), again) == []


def test_an_interrupted_run_goes_on() -> None:
    calls = []

    def stops(kind: list[int], x: float, n: int) -> float:
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return mixed_value(kind, x, n)

    config = make_config(stops, budget=30, quantum=4, lag=8)
    store = MemoryRun()
    result = run(config, store=store)
    assert result.meta["status"] == "interrupted"
    assert store.get_meta("status") == "interrupted"
    assert 0 < len(store.records()) < 30
    again = reopened(store)
    assert run(config, store=again).meta["status"] == "finished"
    assert trace(again) == trace(run_in(make_config(budget=30, quantum=4, lag=8)))


def test_an_interruption_before_the_first_job_is_one_too() -> None:
    def stops(kind: list[int], x: float, n: int) -> float:
        raise KeyboardInterrupt

    store = MemoryRun()
    result = run(make_config(stops), store=store)
    assert result.meta["status"] == store.get_meta("status") == "interrupted"
    assert result.counts["evaluations"] == 0


def test_a_callback_that_raises_loses_nothing() -> None:
    def stop(progress: Any) -> None:
        if progress.finished >= 12:
            raise RuntimeError("enough")

    config = make_config(budget=30, quantum=4)
    store = MemoryRun()
    with pytest.raises(RuntimeError, match="enough"):
        run(config, store=store, callbacks=(stop,))
    assert len(store.records()) == 12
    again = reopened(store)
    run(config, store=again)
    assert trace(again) == trace(run_in(config))


# -- budgets ------------------------------------------------------------------------------------


def test_baselines_are_apart_from_the_budget() -> None:
    space = mixed_space()
    rows = space.population(
        [{"kind": [k] * 4, "x": 0.5, "n": k} for k in range(5)],
    )
    origins = ("baseline:a", "baseline:b", "seed:c", "baseline:d", "seed:e")
    function = Counted(mixed_value)
    config = make_config(function, seeds=Seeds(rows, origins), budget=6, quantum=4)
    result = run(config)
    assert result.counts["baseline_evaluations"] == 3
    assert result.counts["evaluations"] == 6
    assert result.records is not None
    assert result.records.ids.tolist() == list(range(9))
    assert result.meta["stop_reason"] == "budget"


def test_a_budget_of_nothing_scores_the_baselines() -> None:
    space = mixed_space()
    seeds = Seeds(space.population([{"kind": [1] * 4, "x": 0.5, "n": 1}]), ("baseline:a",))
    result = run(make_config(seeds=seeds, budget=0))
    assert result.counts["evaluations"] == 0
    assert result.best.contender.name == "a"


def test_wrong_budgets_are_refused() -> None:
    for wrong in (-1, 1.5, "10", True):
        with pytest.raises(ConfigError, match="budget"):
            Budget(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seconds"):
        Budget(seconds=0)


def test_a_budget_of_time_stops_between_groups() -> None:
    result = run(make_config(budget=Budget(10_000, seconds=0.2)))
    assert result.meta["stop_reason"] == "time is up"
    assert 0 < result.counts["evaluations"] < 10_000


def database_run(path: Path, name: str, config: SearchConfig, **more: Any) -> Any:
    base = Database(path)
    try:
        store = base.open_run(
            name, config={}, space=config.stages[0].space.fingerprint, seed=1, out=""
        )
        return run(config, store=store, **more)
    finally:
        base.close()


def test_values_of_other_runs_are_not_paid_again(tmp_path: Path) -> None:
    function = Counted(mixed_value)
    made = FunctionEvaluator(function, mixed_space(), version=1)

    def config(budget: Any, seed: int = 1) -> SearchConfig:
        return make_config(made, budget=budget, quantum=4, seed=seed)

    first = database_run(tmp_path / "a.db", "one", config(20))
    paid = len(function.calls)
    free = database_run(tmp_path / "a.db", "two", config(10))
    assert free.counts["hits"] == 20
    assert free.counts["evaluations"] == 10
    counted = database_run(tmp_path / "a.db", "three", config(Budget(20, includes_hits=True)))
    assert counted.counts["hits"] == 20
    assert counted.counts["evaluations"] == 0
    again = [tuple(map(str, call.items())) for call in function.calls[paid:]]
    measured = 4 + 2  # each run measures its first candidate on its own
    assert len(again) == 10 + 2 * measured
    alone = run(config(30))
    for result in (first, free, counted):
        n = len(result.records)
        assert result.records.keys == alone.records.keys[:n]
        assert result.records.values.tolist() == alone.records.values.tolist()[:n]
    unshared = database_run(tmp_path / "a.db", "four", config(10), share=False)
    assert unshared.counts["hits"] == 0


def test_functions_without_a_version_share_nothing(tmp_path: Path) -> None:
    import searchlab

    space = mixed_space()
    results = [
        searchlab.search(
            space,
            lambda kind, x, n, sign=sign: sign * mixed_value(kind, x, n),
            budget=8,
            name=f"run{sign}",
            database=tmp_path / "a.db",
            out=tmp_path / f"run{sign}",
        )
        for sign in (1, -1)
    ]
    assert [result.counts["hits"] for result in results] == [0, 0]
    values = [result.records.values[:, 0].tolist() for result in results if result.records]
    assert values[0][:8] == [-value for value in values[1][:8]]


# -- exhaustion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["random", "evolution"])
def test_a_small_space_is_searched_whole_and_then_exhausted(algorithm: str) -> None:
    space = Space(a=Choice(range(5)), b=Integer(0, 5))
    function = Counted(lambda a, b: a * b)
    config = make_config(function, space=space, budget=500, algorithm=algorithm)
    store = run_in(config)
    assert store.get_meta("stop_reason") == "exhausted"
    records = store.records()
    assert len({key for key in records.keys if key}) == 30
    again = reopened(store)
    run(config, store=again)
    assert trace(again) == trace(store)
    half = reopened(store, lambda i: i < 25 or i % 3 == 0)
    run(config, store=half)
    assert trace(half) == trace(store)
    assert verify(config, store) == []


def test_voids_are_recorded_and_never_evaluated() -> None:
    space = Space(a=Choice(range(3)))
    records = run_in(make_config(lambda a: a, space=space, budget=9)).records()
    void = records.state == VOID
    assert void.any()
    assert [records.keys[i] for i in np.flatnonzero(void)] == [None] * int(void.sum())


def test_repeats_that_are_allowed_count_and_cost_nothing() -> None:
    space = Space(a=Choice(range(3)))
    function = Counted(lambda a: a)
    config = make_config(
        function, space=space, budget=30, algorithm="random", repeats="allow", lag=6
    )
    wanted = None
    for executor in (None, Shuffled(1), Shuffled(2)):
        function.calls.clear()
        store = run_in(config, executor=executor)
        records = store.records()
        assert len(records) == 30
        assert int((~records.cached).sum()) == 3
        assert len(function.calls) == 3 + 4  # and the measurement before
        wanted = wanted or trace(store)
        assert trace(store) == wanted


def test_a_repeat_of_a_failed_candidate_is_not_tried_again() -> None:
    def picky(a: int) -> float:
        if a == 1:
            raise ValueError("not one")
        return a

    space = Space(a=Choice(range(3)))
    function = Counted(picky)
    config = make_config(function, space=space, budget=30, algorithm="random", repeats="allow")
    wanted = None
    for executor in (None, Shuffled(3), Shuffled(4)):
        store = run_in(config, executor=executor)
        records = store.records()
        assert int((~records.cached).sum()) == 3
        failed = records.state == FAILED
        assert failed.sum() > 1
        assert {records.reason[i] for i in np.flatnonzero(failed)} == {"ValueError: not one"}
        wanted = wanted or [key for key in records.keys]
        assert records.keys == wanted
