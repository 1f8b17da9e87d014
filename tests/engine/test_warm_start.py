"""Warm starts: another run's best are proposed first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchlab._adopt import adopted
from searchlab.budget import LinearBudget
from searchlab.config import Budget
from searchlab.errors import ConfigError, StudyError
from searchlab.evaluator import Objective
from searchlab.search import search
from searchlab.space import Space
from searchlab.study import Database
from searchlab.testing.space import random_population
from searchlab.variables import ActiveIf, Choice, Integer, Ordered, Real, Subset
from searchlab.warm_start import best_of_run

SPACE = Space(x=Choice(tuple(range(8)), shape=(10,)))


def value(x: list[int]) -> float:
    return float(sum(x))


def _first(folder: Path, **more: Any) -> Any:
    return search(SPACE, value, budget=80, seed=3, name="first", out=folder / "first", **more)


def _second(folder: Path) -> dict[str, Any]:
    """Settings of a run that begins with the best of the first."""
    return {"warm_start": folder / "first", "out": folder / "second", "name": "second"}


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
    settings = {"baselines": {"zero": {"x": [7] * 10}}, **_second(tmp_path)}
    part = search(SPACE, value, budget=8, **settings)
    assert part.records.origin[0] == "baseline:zero"
    whole = search(SPACE, value, budget=20, **settings)
    assert whole.records.trace()[0][: len(part.records)] == part.records.trace()[0]


def test_what_cannot_be_a_start_is_refused(tmp_path: Path) -> None:
    _first(tmp_path)
    objective = Objective("value")
    for other in (
        Space(y=Choice(tuple(range(8)), shape=(10,))),
        Space(x=Integer(0, 7, shape=(10,))),
        Space(x=Choice(tuple(range(8)), shape=(10,)), y=Real(0, 1)),
    ):
        with pytest.raises(ConfigError, match=r"another space, x:choice; allowed: .*[xy]:"):
            best_of_run(tmp_path / "first", other, objective)
    with pytest.raises(ConfigError, match="another space: none of its candidates"):
        best_of_run(tmp_path / "first", Space(x=Choice(("a", "b"), shape=(10,))), objective)
    with pytest.raises(ConfigError, match="no run"):
        best_of_run(tmp_path / "nothing", SPACE, objective)
    with pytest.raises(ConfigError, match="1 or more"):
        best_of_run(tmp_path / "first", SPACE, objective, k=0)
    search(SPACE, value, budget=Budget(0), name="empty", out=tmp_path / "empty")
    with pytest.raises(ConfigError, match="no successful evaluation"):
        best_of_run(tmp_path / "empty", SPACE, objective)


def test_a_run_goes_on_from_the_seeds_that_it_was_opened_with(tmp_path: Path) -> None:
    """The earlier run may have found better ones by then."""
    _first(tmp_path)
    settings = _second(tmp_path)
    part = search(SPACE, value, budget=12, **settings)
    more = search(SPACE, value, budget=300, seed=3, name="first", out=tmp_path / "first")
    best = np.sort(more.records.values[:, 0])[:10].tolist()
    assert best < part.records.values[:10, 0].tolist()
    whole = search(SPACE, value, budget=20, **settings)
    assert whole.records.trace()[0][: len(part.records)] == part.records.trace()[0]
    assert whole.counts["evaluations"] == 20
    third = search(SPACE, value, budget=12, **{**settings, "name": "third", "out": tmp_path / "c"})
    assert third.records.values[:10, 0].tolist() == best


def test_another_earlier_run_is_another_configuration(tmp_path: Path) -> None:
    _first(tmp_path)
    search(SPACE, value, budget=30, seed=4, name="other", out=tmp_path / "other")
    settings: dict[str, Any] = {"out": tmp_path / "second", "name": "second", "budget": 12}
    search(SPACE, value, warm_start=tmp_path / "first", **settings)
    with pytest.raises(StudyError, match="seeds"):
        search(SPACE, value, warm_start=tmp_path / "other", **settings)
    with pytest.raises(StudyError, match="seeds"):
        search(SPACE, value, **settings)


def test_a_run_goes_on_without_the_earlier_one(tmp_path: Path) -> None:
    _first(tmp_path)
    settings = _second(tmp_path)
    part = search(SPACE, value, budget=12, **settings)
    shutil.rmtree(tmp_path / "first")
    whole = search(SPACE, value, budget=20, **settings)
    assert whole.records.trace()[0][: len(part.records)] == part.records.trace()[0]
    with pytest.raises(ConfigError, match="no run"):
        search(SPACE, value, budget=12, warm_start=tmp_path / "first", name="third")


def test_damaged_seeds_are_named(tmp_path: Path) -> None:
    _first(tmp_path)
    settings = _second(tmp_path)
    search(SPACE, value, budget=12, **settings)
    with Database(tmp_path / "second" / "searchlab.db") as base:
        name, config, space, seed = _opened(base)
        store = base.open_run(name, config=config, space=space, seed=seed, out="")
        note = store.get_meta("warm_seeds")
        store.set_meta("warm_seeds", {**note, "genotypes": ["zz"] * len(note["origin"])})
        store.close("finished")
    with pytest.raises(StudyError, match="damaged"):
        search(SPACE, value, budget=20, **settings)


def _opened(base: Database) -> tuple[str, Any, str, int]:
    run = base.read("second")
    found = (run.name, run.config, run.space, run.seed)
    run.close("")
    return found


# -- another space --------------------------------------------------------------------------------


def test_the_best_of_another_space_come_as_near_as_they_can(tmp_path: Path) -> None:
    old = _first(tmp_path)
    wider = Space(x=Choice(tuple(range(12)), shape=(10,)))
    seeds = best_of_run(tmp_path / "first", wider, Objective("value"))
    best = sorted(old.records.values[:, 0])[:10]
    assert [value(plan["x"]) for plan in wider.decode(seeds.population)] == best
    assert all(text.startswith("seed:first #") for text in seeds.origin)
    assert all(text.endswith(" adapted") for text in seeds.origin)
    new = search(wider, value, budget=12, seed=5, warm_start=tmp_path / "first")
    assert new.records.values[:10, 0].tolist() == best

    fewer = Space(x=Choice((7, 0, 1, 2, 3, 4, 5), shape=(10,)))  # no 6, and other codes
    kept = fewer.decode(best_of_run(tmp_path / "first", fewer, Objective("value"), k=80).population)
    whole = SPACE.decode(SPACE.unpack(old.records.genotypes))
    wanted = sorted(value(plan["x"]) for plan in whole if 6 not in plan["x"])
    assert 0 < len(kept) < 80
    assert sorted(value(plan["x"]) for plan in kept) == wanted

    total = LinearBudget({"x": np.arange(8.0)}, upper=8.0, name="total")
    tight = Space({"x": SPACE.variables["x"]}, constraints=[total])
    met = best_of_run(tmp_path / "first", tight, Objective("value")).population
    assert tight.is_feasible(met).all()
    assert len(set(tight.keys(met))) == len(met) > 0


def test_elements_come_from_the_same_relative_place() -> None:
    short = Space(x=Choice((2, 4, 8), shape=(4,)), y=Real(0, 1, shape=(2, 3)))
    long = Space(x=Choice((2, 4, 8), shape=(8,)), y=Real(0, 0.5, shape=(4, 3)))
    old = random_population(short, 50)
    new, rows = adopted(long, short, old)
    assert rows.tolist() == list(range(50))
    assert np.array_equal(new["x"], np.repeat(old["x"], 2, axis=1))
    assert np.array_equal(new["y"], np.minimum(np.repeat(old["y"], 2, axis=1), 0.5))
    back, _ = adopted(short, long, new)
    assert np.array_equal(back["x"], old["x"])


def test_sets_and_ordered_values_stay_what_they_are() -> None:
    small = Space(s=Subset(8, 4), t=Ordered(4, 0.0, 1.0, 0.1))
    large = Space(s=Subset(12, 3), t=Ordered(7, 0.2, 2.0, 0.05))
    for earlier, later in ((small, large), (large, small)):
        found, rows = adopted(later, earlier, random_population(earlier, 50))
        assert len(rows) == 50
        assert later.is_feasible(found).all()


def test_unknown_labels_of_inactive_elements_do_no_harm() -> None:
    def space(*labels: str) -> Space:
        return Space(
            a=Choice(("on", "off")), b=Choice(labels, shape=(2,), when=ActiveIf("a", ("on",)))
        )

    old, new = space("x", "y"), space("z", "y")
    candidates = old.population(
        [
            {"a": "off", "b": ["x", "x"]},
            {"a": "on", "b": ["x", "y"]},
            {"a": "on", "b": ["y", "y"]},
        ]
    )
    found, rows = adopted(new, old, candidates)
    assert rows.tolist() == [0, 2]
    assert new.decode(found)[1] == {"a": "on", "b": ["y", "y"]}
