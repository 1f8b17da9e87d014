"""What ends a run besides evaluations, and budgets written as text."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab.budget_text import parse_budget
from searchlab.config import Budget
from searchlab.errors import ConfigError
from searchlab.evaluator import FunctionEvaluator
from searchlab.population import Evaluations
from searchlab.search import search
from searchlab.space import Space
from searchlab.variables import Choice, Real
from tests.engine.loop_tools import make_config, mixed_value, reopened, run_in


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (400, Budget(400)),
        ("400", Budget(400)),
        ("0", Budget(0)),
        ("90min", Budget(None, 5400.0)),
        ("1.5 h", Budget(None, 5400.0)),
        ("30s", Budget(None, 30.0)),
        ("6gpuh", Budget(device_hours=6.0)),
        ("400, 2h,6 GPUh", Budget(400, 7200.0, device_hours=6.0)),
        (Budget(3), Budget(3)),
    ],
)
def test_texts_of_budgets(text: Any, wanted: Budget) -> None:
    assert parse_budget(text) == wanted


def test_dollars_need_a_price() -> None:
    assert parse_budget("50usd", gpu_price=2.5) == Budget(price=50.0, gpu_price=2.5)
    with pytest.raises(ConfigError, match="price of a device hour"):
        parse_budget("50usd")


@pytest.mark.parametrize(
    "text",
    ["", "x", "4.5", "-3", "10 weeks", "1h,2h", "1e3", "0h", True, None, 2.5, "9" * 400, "١"],
)
def test_other_texts_are_refused_with_what_is_allowed(text: Any) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        parse_budget(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"price": 1.0},
        {"device_hours": 0.0},
        {"price": 1.0, "gpu_price": np.inf},
        {"target": np.nan},
    ],
)
def test_wrong_limits_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        Budget(**wrong)  # type: ignore[arg-type]


class Priced(FunctionEvaluator):
    """Every evaluation takes half an hour of four devices, or says so."""

    devices = 4

    def evaluate(self, jobs: Any) -> Evaluations:
        out = super().evaluate(jobs)
        out.cost_s = np.full(len(jobs), 1800.0)
        return out


def _priced() -> Any:
    space = Space(x=Real(0, 1))
    return Priced(lambda x: x, space)


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(device_hours=9.0), "device hours are spent"),
        (Budget(price=18.0, gpu_price=2.0), "money is spent"),
    ],
)
def test_device_hours_and_money_end_a_run(budget: Budget, reason: str) -> None:
    evaluator = _priced()
    store = run_in(make_config(evaluator, space=evaluator.space, budget=budget))
    assert len(store.records()) == 5  # 2 device hours each: the fifth goes over 9
    assert store.get_meta("stop_reason") == reason
    again = run_in(
        make_config(evaluator, space=evaluator.space, budget=budget), store=reopened(store)
    )
    assert len(again.records()) == 5


def test_a_target_ends_a_run_in_the_sign_of_the_user() -> None:
    space = Space(x=Choice(range(8), shape=(6,)))
    result = search(space, lambda x: sum(x), direction="max", budget="5000", target=36, seed=1)
    assert result.meta["stop_reason"] == "target"
    assert result.best.value >= 36
    assert result.counts["evaluations"] < 2000


def test_wall_time_ends_a_run() -> None:
    def slow(x: float) -> float:
        time.sleep(0.01)
        return x

    begun = time.monotonic()
    result = search(Space(x=Real(0, 1)), slow, budget="0.2s")
    assert result.meta["stop_reason"] == "time is up"
    assert 1 <= result.counts["evaluations"] <= 25
    assert time.monotonic() - begun < 5


def test_the_first_limit_that_is_met_counts() -> None:
    result = search(Space(x=Real(0, 1)), lambda x: x, budget="7,2h", target=-1.0)
    assert result.counts["evaluations"] == 7
    assert result.meta["stop_reason"] == "budget"


def test_limits_leave_the_trace_a_prefix() -> None:
    whole = run_in(make_config(mixed_value, budget=60)).records()
    part = run_in(make_config(mixed_value, budget=Budget(60, target=float(_tenth(whole)))))
    n = len(part.records())
    assert 0 < n < 60
    assert part.records().trace() == whole.take(slice(0, n)).trace()


def _tenth(records: Any) -> NDArray[np.float64]:
    """A value that the run reaches on its way."""
    best: NDArray[np.float64] = np.minimum.accumulate(records.values[:, 0])
    return best[len(best) // 2]
