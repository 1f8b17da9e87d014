"""The loop: failures, values that depend on their chunk, stages, and verify."""

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
    Neighbourly,
    Shuffled,
    make_config,
    mixed_space,
    mixed_value,
    reopened,
    run_in,
    trace,
)

from searchlab.algorithms import Random
from searchlab.config import AdoptBest, AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.errors import ConfigError, EvaluationError, SearchlabWarning, StudyError
from searchlab.evaluator import FunctionEvaluator
from searchlab.loop import HOPELESS
from searchlab.population import FAILED, OK
from searchlab.search import run, verify
from searchlab.study import MemoryRun

# -- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: float("nan"), "not finite"),
        (lambda: None, "None"),
        (lambda: (1.0, 2.0), "objectives"),
    ],
)
def test_failures_are_recorded_and_the_search_goes_on(make: Any, reason: str) -> None:
    def sometimes(kind: list[int], x: float, n: int) -> Any:
        return make() if n % 2 else mixed_value(kind, x, n)

    records = run_in(make_config(sometimes, budget=40, quantum=4)).records()
    failed = records.state == FAILED
    assert 0 < failed.sum() < 40
    assert all(reason in records.reason[i] for i in np.flatnonzero(failed))
    assert np.isfinite(records.values[records.state == OK]).all()


@pytest.mark.parametrize("values", [[1.0], [[1.0, 2.0]] * 4, None, [float("inf")] * 4])
def test_odd_batches_fail_as_a_whole(values: Any) -> None:
    made = FunctionEvaluator(
        lambda plans, fidelity, seed: values, mixed_space(), batch=True, reproducibility="batch"
    )
    records = run_in(make_config(made, budget=8, quantum=4)).records()
    assert records.state.tolist() == [FAILED] * 8
    assert all(records.reason)


def test_a_hopeless_stage_is_stopped_with_its_reason() -> None:
    def never(kind: list[int], x: float, n: int) -> float:
        raise RuntimeError("no GPU here")

    store = MemoryRun()
    with pytest.raises(EvaluationError, match="no GPU here"):
        run(make_config(never, budget=500), store=store)
    assert len(store.records()) == HOPELESS
    assert store.get_meta("status") == "failed"
    # The failures stand in the record; a mended function goes on behind them.
    again = reopened(store)
    run(make_config(budget=30), store=again)
    assert len(again.records()) == 30


def test_a_false_claim_of_exactness_is_said() -> None:
    made = Neighbourly(mixed_value, mixed_space())
    with pytest.warns(SearchlabWarning, match="exact"):
        run(make_config(made, budget=4, quantum=4))


# -- values that depend on the chunk ------------------------------------------------------------


def neighbourly() -> Neighbourly:
    return Neighbourly(mixed_value, mixed_space(), reproducibility="batch")


def test_chunks_are_padded_and_the_same_in_any_order() -> None:
    made = neighbourly()
    config = make_config(made, budget=40, quantum=8, chunk=3, lag=16)
    wanted = trace(run_in(config))
    assert set(made.shapes[3:]) == {3}
    for seed in range(3):
        assert trace(run_in(config, executor=Shuffled(seed))) == wanted


@pytest.mark.parametrize("seed", range(4))
def test_holes_in_chunks_are_filled_with_the_same_values(seed: int) -> None:
    config = make_config(neighbourly(), budget=40, quantum=8, chunk=4, lag=16)
    whole = run_in(config)
    draw = random.Random(seed)
    part = reopened(whole, lambda i: draw.random() < 0.5)
    run(config, store=part, executor=Shuffled(seed))
    assert trace(part) == trace(whole)


@pytest.mark.parametrize("repeats", ["redraw", "allow"])
def test_a_budget_that_ends_within_a_chunk_changes_no_value(repeats: str) -> None:
    def config(budget: int) -> SearchConfig:
        return make_config(
            neighbourly(), budget=budget, quantum=8, chunk=4, lag=16, repeats=repeats, n_random=2
        )

    whole, part = run_in(config(40)), run_in(config(14))
    assert len(part.records()) == 14
    again = reopened(part)
    run(config(40), store=again, executor=Shuffled(5))
    assert trace(again) == trace(whole)


# -- stages -------------------------------------------------------------------------------------


def two_stages(
    function: Any, first: int = 12, second: int = 20, seed: int = 1, **more: Any
) -> SearchConfig:
    space = mixed_space()
    made = FunctionEvaluator(function, space, **more)
    return SearchConfig(
        (
            Stage("sieve", space, made, AlgorithmSpec("random", {}), Budget(first)),
            Stage(
                "search",
                space,
                made,
                AlgorithmSpec("evolution", {"quantum": 8, "n_random": 2}),
                Budget(second),
                adopt=AdoptBest(5),
            ),
        ),
        seed=seed,
        lag=16,
    )


def test_a_stage_adopts_the_best_of_the_one_before() -> None:
    function = Counted(mixed_value)
    result = run(two_stages(function))
    records = result.records
    assert records is not None
    first, second = records.stage == 0, records.stage == 1
    assert int(first.sum()) == 12
    order = np.argsort(records.values[first, 0], kind="stable")[:5]
    best = [records.keys[i] for i in order]
    assert [records.keys[i] for i in np.flatnonzero(second)[:5]] == best
    # What was adopted is known: the second stage pays for new candidates only.
    assert records.cached[second][:5].all()
    assert int((~records.cached).sum()) == 32
    assert records.ids.tolist() == list(range(37))
    # A candidate of both stages is one contender.
    keys = [contender.key for contender in result.everyone]
    assert len(keys) == len(set(keys)) == 32


def test_adopted_candidates_are_not_paid_again_when_runs_share_nothing() -> None:
    store = MemoryRun()
    run(two_stages(mixed_value), store=store, share=False)
    assert int(store.records().cached.sum()) == 5


@pytest.mark.parametrize("seed", range(3))
def test_stages_resume_from_any_subset(seed: int) -> None:
    config = two_stages(mixed_value, first=11)
    whole = run_in(config)
    draw = random.Random(seed)
    part = reopened(whole, lambda i: draw.random() < 0.6)
    run(config, store=part, executor=Shuffled(seed))
    assert trace(part) == trace(whole)
    assert verify(config, part) == []


def test_only_the_last_stage_grows() -> None:
    store = run_in(two_stages(mixed_value, second=10))
    with pytest.raises(StudyError, match="only the last stage"):
        run(two_stages(mixed_value, first=15), store=reopened(store))
    grown = reopened(store)
    run(two_stages(mixed_value, second=30), store=grown)
    assert trace(grown) == trace(run_in(two_stages(mixed_value, second=30)))


def test_the_first_stage_cannot_adopt() -> None:
    stage = two_stages(mixed_value).stages[1]
    with pytest.raises(ConfigError, match="no stage before"):
        run(SearchConfig((stage,)))


# -- verify -------------------------------------------------------------------------------------


def tampered(store: MemoryRun, i: int, column: str, value: Any) -> MemoryRun:
    from searchlab.records import ROW_COLUMNS

    at = ROW_COLUMNS.index(column)
    copy = reopened(store)
    copy._stored = [
        (*row[:at], value, *row[at + 1 :]) if row[0] == i else row for row in copy._stored
    ]
    return copy


@pytest.mark.parametrize(("q", "lag"), [(1, 1), (4, 8)])
def test_a_clean_run_verifies(q: int, lag: int) -> None:
    for config in (make_config(quantum=q, lag=lag, budget=30), two_stages(mixed_value, first=9)):
        store = run_in(config)
        assert verify(config, store) == []


def test_a_tampered_value_is_reported() -> None:
    config = make_config(budget=60, lag=1, n_random=4)
    store = run_in(config)
    value = np.array([-1e6]).astype("<f8").tobytes()
    assert verify(config, tampered(store, 30, "values_blob", value))


def test_a_tampered_candidate_is_reported() -> None:
    config = make_config(budget=30, lag=1)
    store = run_in(config)
    records = store.records()
    other = records.genotypes[3]
    found = verify(config, tampered(store, 29, "genotype", other))
    assert len(found) == 1
    assert "id 29" in found[0]
    found = verify(config, tampered(store, 29, "key", records.keys[3]))
    assert any("id 29" in line for line in found)


def test_another_seed_does_not_verify() -> None:
    store = run_in(make_config(budget=30))
    assert len(verify(make_config(budget=30, seed=2), store)) > 20


def test_an_interrupted_run_of_two_stages_verifies() -> None:
    def stop(progress: Any) -> None:
        if progress.finished >= 6:
            raise KeyboardInterrupt

    config = two_stages(mixed_value)
    store = MemoryRun()
    assert run(config, store=store, callbacks=(stop,)).meta["status"] == "interrupted"
    assert verify(config, store) == []


def test_a_run_without_records_cannot_be_verified() -> None:
    with pytest.raises(StudyError, match="no records"):
        verify(make_config(), MemoryRun())


def test_records_of_another_version_are_refused_on_resume() -> None:
    store = run_in(make_config(budget=20))
    broken = tampered(store, 19, "key", b"x" * 16)
    with pytest.raises(StudyError, match="another candidate"):
        run(make_config(budget=20, quantum=1), store=reopened(broken, lambda i: i != 18))


def test_progress_tells_the_users_sign() -> None:
    seen: list[Any] = []
    config = make_config(lambda kind, x, n: 5.0 + n, budget=20, direction="max", quantum=4)
    result = run(config, callbacks=(seen.append,))
    assert seen[-1].best == {0: result.best.value}
    assert seen[-1].finished == seen[-1].paid == 20
    assert [p.finished for p in seen] == sorted(p.finished for p in seen)


def test_max_lag_bounds_the_lag() -> None:
    class Strict(Random):
        name = "strict"
        max_lag = 3

    from searchlab.config import ALGORITHMS

    Strict.__module__ = __name__
    ALGORITHMS["strict"] = f"{__name__}:STRICT"
    globals()["STRICT"] = Strict
    sys.modules.setdefault(__name__, sys.modules[Strict.__module__])
    try:
        store = run_in(make_config(algorithm="strict", lag=50, budget=20), executor=Shuffled(0))
    finally:
        del ALGORITHMS["strict"]
    assert store.get_meta("pace")["0"]["lag"] == 3
    assert store.records().told_at_ask.tolist() == [max(0, i + 1 - 3) for i in range(20)]
