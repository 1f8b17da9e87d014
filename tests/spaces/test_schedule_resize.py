"""Schedules of one search as starting points of another one with more or fewer model calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchlab.errors import ConfigError, StudyError
from searchlab.experiments.solver_schedule import SolverScheduleOptions, build
from searchlab.population import Population
from searchlab.recipes import load_recipe
from searchlab.result import Result
from searchlab.runs import find_run, open_config, run_recipe
from searchlab.search import verify
from searchlab.space import space_from_json
from searchlab.spaces.solver_schedule.noise_schedule import Edm, Flow, VpDiscrete, VpLinear
from searchlab.spaces.solver_schedule.space import ScheduleRange, SolverScheduleSpace
from searchlab.study import Database
from searchlab.testing.space import random_population
from searchlab.warm_start import best_of_run

RANGES = {
    "edm": (Edm(), ScheduleRange((4, 6), (0.002, 0.1), first=("model", "zero", "mean"))),
    "vp": (VpLinear(), ScheduleRange((4, 6), (1e-3, 1e-3), endings=("stop",))),
    "vp_discrete": (VpDiscrete(), ScheduleRange((4, 6), (0.0, 60.0))),
    "flow": (Flow(), ScheduleRange((4, 6), (0.01, 0.3), endings=("clean",))),
}


def space(kind: str, low: int, high: int) -> SolverScheduleSpace:
    noise, within = RANGES[kind]
    return SolverScheduleSpace(noise, replace(within, nfe=(low, high)))


def calls(of: SolverScheduleSpace, population: Population) -> np.ndarray:
    return np.rint(of.cost(population)["nfe"]).astype(int)


def bare(of: SolverScheduleSpace):
    """The space as a run keeps it: its variables."""
    return space_from_json({"variables": of.to_json()["variables"]})


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(("low", "high"), [(2, 2), (3, 3), (5, 5), (4, 6), (7, 8), (9, 9)])
def test_schedules_meet_the_new_numbers_of_calls(kind: str, low: int, high: int) -> None:
    old, new = space(kind, 4, 6), space(kind, low, high)
    candidates = random_population(old, 40)
    found = new.adopted(bare(old), candidates, 3)
    assert new.is_feasible(found.population).all()
    assert new.canonicalise(found.population).equals(found.population)
    have, want = calls(old, candidates), calls(new, found.population)
    assert set(want.tolist()) == set(range(low, high + 1))
    for target in range(low, high + 1):
        nearest = min((4, 5, 6), key=lambda n: abs(n - target))
        best = np.flatnonzero(have == nearest).tolist()
        sources = found.rows[want == target].tolist()
        assert set(sources) <= set(best)
        assert len(set(sources)) >= 3
        if target == nearest:  # nothing needs to change
            best = best[:3]
            mine = found.population.take(np.flatnonzero(want == target))
            whole = [plan.to_json() for plan in old.plans(candidates.take(best))]
            assert [plan.to_json() for plan in new.plans(mine)] == whole


@pytest.mark.parametrize("kind", ["edm", "vp", "flow"])
def test_a_longer_schedule_has_all_points_of_the_shorter(kind: str) -> None:
    old, new = space(kind, 4, 4), space(kind, 6, 6)
    candidates = random_population(old, 6)
    found = new.adopted(bare(old), candidates, 6)
    plans = old.plans(candidates)
    for row, plan in zip(found.rows.tolist(), new.plans(found.population), strict=True):
        before = np.log(np.array(plans[row].times[1:-1]))
        after = np.log(np.array(plan.times[1:-1]))
        inner = np.abs(before[:, None] - after[None]).min(axis=1)
        assert (inner < 1e-6).sum() >= len(before) - 1  # gaps too small for a point make room
        assert plan.times[-1] == pytest.approx(plans[row].times[-1])


def test_a_shorter_schedule_has_points_of_the_longer_only() -> None:
    old, new = space("edm", 6, 6), space("edm", 4, 4)
    candidates = random_population(old, 6)
    found = new.adopted(bare(old), candidates, 6)
    plans = old.plans(candidates)
    for row, plan in zip(found.rows.tolist(), new.plans(found.population), strict=True):
        ends = len(plans[row].times), len(plan.times)
        assert ends[1] < ends[0]
        for time in plan.times[:-1]:
            assert min(abs(time - other) for other in plans[row].times) < 1e-9
        assert plan.times[-1] == pytest.approx(plans[row].times[-1])


def test_what_the_new_space_has_no_word_for_is_left_out() -> None:
    noise, within = RANGES["edm"]
    old = space("edm", 5, 5)
    narrow = SolverScheduleSpace(noise, replace(within, nfe=(5, 5), endings=("stop",), orders=2))
    candidates = random_population(old, 200)
    found = narrow.adopted(bare(old), candidates, 200)
    plans = old.plans(candidates)
    fits = [max(step.order for step in plan.steps) <= 2 and plan.times[-1] > 0.0 for plan in plans]
    assert found.rows.tolist() == np.flatnonzero(fits).tolist()
    assert 0 < len(found.rows) < 200
    other = SolverScheduleSpace(noise, replace(within, nfe=(5, 5), first=("zero",)))
    model = SolverScheduleSpace(noise, replace(within, nfe=(5, 5), first=("model",)))
    assert not len(other.adopted(bare(model), random_population(model, 20), 20).rows)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 model calls."""
    out = tmp_path_factory.mktemp("runs") / "six"
    recipe = load_recipe("solver_schedule")
    options = SolverScheduleOptions(
        preset="guided", problem="mixture", nfe="6", budget=24, samples=128, held_out=64
    )
    run_recipe(recipe, options, name="six", out=out, database=str(out / "runs.db"))
    return out


def test_a_recipe_begins_with_schedules_of_other_numbers_of_calls(six: Path) -> None:
    options = SolverScheduleOptions(
        preset="guided",
        problem="mixture",
        nfe="5..8",
        budget=16,
        samples=128,
        held_out=64,
        warm_start=str(six),
    )
    stage = build(options).stages[-1]
    assert stage.seeds is not None
    of = stage.space
    assert isinstance(of, SolverScheduleSpace)
    assert np.unique(calls(of, stage.seeds.population), return_counts=True)[1].tolist() == [10] * 4
    assert all(text.startswith("seed:six #") for text in stage.seeds.origin)
    # Few samples of the new problem choose among the ways, and choose better than the space.
    blind = best_of_run(six, of, stage.evaluator.objectives[0], per="nfe")
    few = [signal.name for signal in stage.evaluator.signals].index("few")
    said = stage.evaluator.static_signals
    seen, unseen = said(stage.seeds.population)[:, few], said(blind.population)[:, few]
    assert (seen <= unseen + 1e-12).all()
    assert (seen < unseen).sum() >= 10


def test_a_run_that_began_so_goes_on_after_the_earlier_one_did(tmp_path: Path) -> None:
    recipe, database = load_recipe("solver_schedule"), str(tmp_path / "runs.db")
    common: dict[str, Any] = {"preset": "guided", "problem": "mixture", "samples": 128}

    def going_on(name: str, budget: int) -> Result:
        again = open_config(find_run(str(tmp_path / name)), changes={"budget": budget})
        options, out = again.options, tmp_path / name
        return run_recipe(
            recipe, options, name=name, out=out, database=database, config=again.config
        )

    def begun(name: str, **more: Any) -> Result:
        options = SolverScheduleOptions(**common, held_out=64, **more)
        return run_recipe(recipe, options, name=name, out=tmp_path / name, database=database)

    begun("five", nfe="5", budget=8)
    first = begun("six", nfe="6", budget=10, warm_start=str(tmp_path / "five"))
    going_on("five", 60)
    second = going_on("six", 20)
    origins = []
    for result in (first, second):
        assert result.records is not None
        origins.append({text for text in result.records.origin if text.startswith("seed:five")})
    assert len(origins[0]) == 10
    assert origins[0] == origins[1]
    assert second.counts["evaluations"] == 20
    with Database(database) as base:  # as if it had never been
        run = base.open_run(**_opened(base, "five"))
        run.set_meta("layout", {})
        run.close("failed")
    with pytest.raises(StudyError, match="damaged"):
        begun("seven", nfe="7", budget=10, warm_start=str(tmp_path / "five"))
    assert going_on("six", 25).counts["evaluations"] == 25
    config = open_config(find_run(str(tmp_path / "six"))).config
    with Database(database) as base:
        assert not verify(config, base.read("six"))


def _opened(base: Database, name: str) -> dict[str, Any]:
    run = base.read(name)
    run.close("")
    return {
        "name": name,
        "config": run.config,
        "space": run.space,
        "seed": run.seed,
        "out": "",
    }


def test_a_run_of_something_else_is_refused(tmp_path: Path) -> None:
    import searchlab as sl

    sl.search(
        sl.Space(x=sl.Choice((1, 2, 3))), lambda x: float(x), budget=3, name="x", out=tmp_path / "x"
    )
    with pytest.raises(ConfigError, match=r"another space, x:choice; allowed: points:integer"):
        build(
            SolverScheduleOptions(
                problem="mixture", nfe="5", samples=128, warm_start=str(tmp_path / "x")
            )
        )
