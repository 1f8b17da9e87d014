"""Ask and tell: leases, the lag, results in any order, and input that is not what it should be."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from loop_tools import mixed_space, mixed_value

from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.errors import ConfigError, DataError
from searchlab.evaluator import Objective
from searchlab.evaluators.told import ToldEvaluator
from searchlab.external import load_json, read_result
from searchlab.leases import Asked, ask, prepare, tell
from searchlab.outcomes import Constraint
from searchlab.population import FAILED, OK
from searchlab.search import stored_result, verify
from searchlab.study import MemoryRun


def config_of(budget: int | None = 20, **more: Any) -> SearchConfig:
    evaluator = ToldEvaluator((Objective("value"),), **more)
    spec = AlgorithmSpec("evolution", {"n_random": 4})
    stage = Stage("search", mixed_space(), evaluator, spec, Budget(budget), chunk=1)
    return SearchConfig((stage,), seed=3)


def opened(config: SearchConfig) -> MemoryRun:
    store = MemoryRun()
    prepare(config, store)
    return store


def ids_of(asked: Asked) -> list[int]:
    return [plan["candidate_id"] for plan in asked.plans]


def answer(plan: dict[str, Any], **more: Any) -> bytes:
    value = mixed_value(**plan["values"])
    line = {"candidate_id": plan["candidate_id"], "objectives": {"value": value}, **more}
    return json.dumps(line).encode()


def drive(config: SearchConfig, lag: int, seed: int, n: int = 3) -> MemoryRun:
    """Asks and tells in a random order until the run is at its end."""
    store, order, waiting = opened(config), random.Random(seed), []
    for _ in range(500):
        asked = ask(config, store, n, lag=lag)
        waiting += asked.plans
        if asked.finished:
            return store
        order.shuffle(waiting)
        take = order.randint(0, len(waiting))
        tell(config, store, [answer(plan) for plan in waiting[:take]])
        waiting = waiting[take:]
    raise AssertionError("the run did not end")


def test_any_order_gives_the_same_run_and_it_verifies() -> None:
    config = config_of(12)
    traces = []
    for seed in (1, 2):
        store = drive(config, 4, seed)
        traces.append(store.records().trace())
        assert verify(config, store) == []
    assert traces[0] == traces[1]
    result = stored_result(config, store)
    assert result.counts["evaluations"] == 12
    assert result.best.value == store.records().values[:, 0].min()


def test_the_first_ask_fixes_the_lag() -> None:
    config = config_of()
    store = opened(config)
    first = ask(config, store, 4)
    assert ids_of(first) == [0, 1, 2, 3]
    assert (first.lag, first.open, first.reason) == (4, 4, "")
    more = ask(config, store, 4)
    assert more.plans == []
    assert "lag of 4" in more.reason
    told = tell(config, store, [answer(first.plans[2])])
    assert (told.recorded, told.open) == (1, 3)
    assert ask(config, store, 4).plans == []  # the oldest are still open
    tell(config, store, [answer(first.plans[0])])
    assert ids_of(ask(config, store, 4)) == [4]
    with pytest.raises(ConfigError, match="fixed at its first ask"):
        ask(config, store, 4, lag=8)


def test_leases_that_end_are_handed_out_again() -> None:
    config = config_of()
    store = opened(config)
    first = ask(config, store, 3, lag=6, lease_s=10, now=100.0)
    second = ask(config, store, 2, lease_s=10, now=105.0)
    assert ids_of(first) + ids_of(second) == [0, 1, 2, 3, 4]
    third = ask(config, store, 6, lease_s=10, now=111.0)
    assert ids_of(third) == [0, 1, 2, 5]  # the lease of 3 and 4 holds until 115
    assert third.again == 3
    assert third.plans[:3] == first.plans
    assert "lag of 6" in third.reason
    # The late result of the first holder counts, the one of the second is a duplicate.
    assert tell(config, store, [answer(first.plans[1])]).recorded == 1
    assert tell(config, store, [answer(third.plans[1])]).duplicates == 1
    assert ids_of(ask(config, store, 9, again=True, now=112.0)) == [0, 2, 3, 4, 5]


def test_unknown_candidates_are_refused_and_the_rest_is_kept() -> None:
    config = config_of()
    store = opened(config)
    assert "handed out yet" in tell(config, store, [b'{"candidate_id": 0}']).refused[0]
    plans = ask(config, store, 2).plans
    lines = [
        b'{"candidate_id": 17, "objectives": {"value": 1}}',
        b'{"candidate_id": -1}',
        b'{"candidate_id": true}',
        b'{"objectives": {"value": 1}}',
        b"[]",
        answer(plans[0])[:-3],
        b"\xff",
        b"",
        answer(plans[1]),
        answer(plans[1]),
    ]
    told = tell(config, store, lines)
    assert (told.recorded, told.duplicates, told.open) == (1, 1, 1)
    assert len(told.refused) == 7
    for number, text in zip((1, 2, 3, 4, 5, 6, 7), told.refused, strict=True):
        assert text.startswith(f"line {number}")
    assert store.records().ids.tolist() == [1]


def test_a_result_without_its_value_is_a_failure_with_a_reason() -> None:
    config = config_of(constraints=(Constraint("quality", 0.5, ">="),))
    store = opened(config)
    plans = ask(config, store, 4).plans
    lines = [
        answer(plans[0], constraints={"quality": 0.25}),
        answer(plans[1]),
        json.dumps({"candidate_id": 2, "state": "failed", "reason": "node lost"}).encode(),
        b'{"candidate_id": 3, "objectives": {"value": NaN, "quality": 1}}',
    ]
    told = tell(config, store, lines)
    assert (told.recorded, told.failed) == (4, 3)
    records = store.records()
    assert records.state.tolist() == [OK, FAILED, FAILED, FAILED]
    assert records.constraints[0].tolist() == [0.25]
    for text, words in zip(records.reason[1:], ("'quality'", "node lost", "finite"), strict=True):
        assert words in text
    (contender,) = stored_result(config, store).everyone
    assert contender.violation == 0.5


def test_twenty_failures_in_a_row_are_said() -> None:
    config = config_of(40)
    store = opened(config)
    plans = ask(config, store, 20).plans
    lines = [json.dumps({"candidate_id": p["candidate_id"], "state": "failed"}) for p in plans]
    told = tell(config, store, [line.encode() for line in lines])
    assert told.recorded == 20
    assert "all failed" in told.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"n": 0}, "0 candidates"), ({"n": 1, "lag": 0}, "lag 0"), ({"n": 1, "lease_s": 0}, "lease")],
)
def test_questions_that_are_refused(arguments: dict[str, Any], words: str) -> None:
    config = config_of()
    with pytest.raises(ConfigError, match=words):
        ask(config, opened(config), **arguments)


# -- fuzzing ------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["value", "objectives", "ok", "failed"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["value", "quality", "gpu_seconds"]) | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
KEYS = ("objectives", "constraints", "standard_errors", "items", "cost", "state", "reason", "x")
LINES = (
    st.binary(max_size=40)
    | JSON.map(lambda data: json.dumps(data).encode())
    | st.fixed_dictionaries(
        {"candidate_id": st.integers(-1, 5) | JSON}, optional=dict.fromkeys(KEYS, JSON)
    ).map(lambda data: json.dumps(data).encode())
)


@pytest.fixture(scope="module")
def fuzzed() -> tuple[SearchConfig, MemoryRun]:
    """A run with every candidate open that its lag allows."""
    config = config_of(None, constraints=(Constraint("quality", 0.5, ">="),))
    store = opened(config)
    ask(config, store, 4)
    return config, store


OBJECTIVES, CONSTRAINTS = (Objective("value"),), (Constraint("quality", 0.5, ">="),)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(line=LINES)
def test_a_line_is_read_or_refused(line: bytes) -> None:
    try:
        outcome = read_result(load_json(line, "line 1"), OBJECTIVES, CONSTRAINTS)
    except DataError as error:
        text = str(error)
    else:
        text = outcome.reason
        assert bool(text) != bool(np.isfinite(outcome.values).all())
    assert "\n" not in text
    assert len(text) < 600


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(lines=st.lists(LINES, min_size=4, max_size=12))
def test_whatever_is_told_is_recorded_or_refused(
    fuzzed: tuple[SearchConfig, MemoryRun], lines: list[bytes]
) -> None:
    config, store = fuzzed
    before = len(store.records())
    told = tell(config, store, lines)
    records = store.records()
    assert len(records) - before == told.recorded
    assert told.recorded + told.duplicates + len(told.refused) == sum(
        bool(line.strip()) for line in lines
    )
    assert all("\n" not in text and len(text) < 400 for text in told.refused)
    bad = records.state == FAILED
    assert all(np.array(records.reason, dtype=object)[bad])
    assert np.isfinite(records.values[~bad]).all()
    ask(config, store, 4)
