"""Warm starts: another run's best are proposed first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from searchlab.config import Budget
from searchlab.errors import ConfigError
from searchlab.evaluator import Objective
from searchlab.search import search
from searchlab.space import Space
from searchlab.variables import Choice
from searchlab.warm_start import best_of_run

SPACE = Space(x=Choice(tuple(range(8)), shape=(10,)))


def value(x: list[int]) -> float:
    return float(sum(x))


def _first(folder: Path, **more: Any) -> Any:
    return search(SPACE, value, budget=80, seed=3, name="first", out=folder / "first", **more)


@pytest.mark.parametrize("direction", ["min", "max"])
def test_the_best_of_a_run_come_first(tmp_path: Path, direction: Any) -> None:
    old = _first(tmp_path, direction=direction)
    new = search(
        SPACE,
        lambda x: 2 * value(x),
        budget=12,
        seed=9,
        direction=direction,
        warm_start=tmp_path / "first",
    )
    wanted = sorted(old.records.values[:, 0], reverse=direction == "max")[:10]
    assert new.records.values[:10, 0].tolist() == [2 * v for v in wanted]
    assert new.records.origin[0].startswith("seed:first #")
    assert not new.records.origin[10].startswith("seed:")
    assert new.counts["evaluations"] == 12  # they are paid


def test_values_of_the_same_evaluator_are_shared(tmp_path: Path) -> None:
    from searchlab.evaluator import evaluator

    @evaluator(version=1)
    def total(plans: list[dict[str, Any]], fidelity: str, seed: int) -> list[float]:
        return [value(plan["x"]) for plan in plans]

    base = tmp_path / "both.db"
    search(SPACE, total, budget=40, seed=3, name="first", database=base, out=tmp_path / "a")
    new = search(
        SPACE, total, budget=5, name="second", database=base, out=tmp_path / "b", warm_start="first"
    )
    assert new.counts["hits"] == 10
    assert new.counts["evaluations"] == 5


def test_a_baseline_stays_in_front_and_a_resume_asks_for_the_same(tmp_path: Path) -> None:
    _first(tmp_path)
    settings: dict[str, Any] = {
        "baselines": {"zero": {"x": [7] * 10}},
        "warm_start": tmp_path / "first",
        "out": tmp_path / "second",
        "name": "second",
    }
    part = search(SPACE, value, budget=8, **settings)
    assert part.records.origin[0] == "baseline:zero"
    whole = search(SPACE, value, budget=20, **settings)
    assert whole.records.trace()[0][: len(part.records)] == part.records.trace()[0]


def test_what_cannot_be_a_start_is_refused(tmp_path: Path) -> None:
    _first(tmp_path)
    other = Space(x=Choice(tuple(range(7)), shape=(10,)))
    objective = Objective("value")
    with pytest.raises(ConfigError, match="another space"):
        best_of_run(tmp_path / "first", other, objective)
    with pytest.raises(ConfigError, match="no run"):
        best_of_run(tmp_path / "nothing", SPACE, objective)
    with pytest.raises(ConfigError, match="1 or more"):
        best_of_run(tmp_path / "first", SPACE, objective, k=0)
    search(SPACE, value, budget=Budget(0), name="empty", out=tmp_path / "empty")
    with pytest.raises(ConfigError, match="no successful evaluation"):
        best_of_run(tmp_path / "empty", SPACE, objective)
