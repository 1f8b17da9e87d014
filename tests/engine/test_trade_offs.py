"""Whole searches with several objectives: results, finals, reports, comparisons, refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import searchlab as sl
from searchlab.algorithms import Random
from searchlab.compare import compare
from searchlab.config import (
    AdoptBest,
    AlgorithmSpec,
    Answers,
    Budget,
    Final,
    SearchConfig,
    Stage,
    best_rows,
)
from searchlab.errors import ConfigError
from searchlab.evaluator import FunctionEvaluator, Objective, evaluator
from searchlab.fronts import hypervolume, non_dominated, reference_point
from searchlab.outcome import figures, read_outcome
from searchlab.outcomes import Constraint
from searchlab.progress import ProgressLine
from searchlab.runs import find_run
from searchlab.search import run, stored_result, verify
from searchlab.space import Space
from searchlab.study import MemoryRun
from searchlab.variables import Choice, Real

TWO = {"loss": "min", "bytes": "min"}
LINE = Space(a=Choice(tuple(range(1000))))


def dominates(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return bool((a <= b).all() and (a < b).any())


def brute_volume(points: NDArray[Any], reference: NDArray[Any]) -> float:
    """By inclusion and exclusion of boxes."""
    total = 0.0
    boxes = [point for point in points if (point < reference).all()]
    for size in range(1, len(boxes) + 1):
        for some in itertools.combinations(boxes, size):
            corner = np.max(some, axis=0)
            total += (-1) ** (size + 1) * float(np.prod(reference - corner))
    return total


# -- searches -----------------------------------------------------------------------------------


def space() -> Space:
    return Space(bits=Choice((2, 4, 8), shape=(8,)), scale=Real(0.5, 2.0))


def measure(bits: list[int], scale: float) -> dict[str, float]:
    loss = sum(4.0**-b * (i + 1) for i, b in enumerate(bits)) + (scale - 1) ** 2
    return {"bytes": float(sum(bits)), "loss": loss, "more": 1.0}


BASELINES = {
    "all 4": {"bits": [4] * 8, "scale": 1.0},
    "all 8": {"bits": [8] * 8, "scale": 1.5},
    "poor": {"bits": [8] * 8, "scale": 2.0},
}


@evaluator(objectives={"loss": "min", "speed": "max"}, reproducibility="exact", version=1)
def noisy(plans: list[dict[str, Any]], fidelity: str, seed: int) -> list[tuple[float, float]]:
    noise = np.random.default_rng(seed).normal(0, 0.001, 2)
    out = []
    for plan in plans:
        figures = measure(**plan)
        out.append((figures["loss"] + noise[0], 100 - figures["bytes"] + noise[1]))
    return out


def test_a_plain_function_with_named_objectives() -> None:
    lines: list[dict[str, float]] = []
    result = sl.search(
        space(),
        measure,
        objectives=TWO,
        baselines=BASELINES,
        budget=150,
        seed=1,
        callbacks=[lambda progress: lines.append(progress.scalars())],
    )
    trades = result.trade_offs
    assert trades is not None
    assert "nsga2" in result.meta["algorithm"]["search"]
    assert result.front == trades.points
    assert [list(point) for point in result.front] == result.to_json()["front"]
    for a, b in itertools.permutations(np.array(result.front), 2):
        assert not dominates(a, b)
    # It is the front of everything that was evaluated, and finds more than the baselines.
    assert result.records is not None
    values = result.records.values[:, :2]
    assert {tuple(values[i]) for i in non_dominated(values)} == set(result.front)
    assert trades.hypervolume == pytest.approx(
        hypervolume(values, np.array(trades.reference)), rel=1e-12
    )
    assert trades.hypervolume > trades.volume(trades.baselines) > 0
    early = reference_point(result.records.ids, values)
    assert trades.reference == tuple(early.tolist())
    assert lines[-1]["hypervolume"] == pytest.approx(trades.hypervolume)
    assert lines[-1]["front"] == len(trades.members)
    assert "best" not in lines[-1]
    volumes = [line["hypervolume"] for line in lines[20:]]
    assert volumes == sorted(volumes)
    assert "baselines' front" in result.verdict()
    assert "hypervolume" in str(result)
    frame = result.to_pandas()
    assert {"loss", "bytes", "front"} <= set(frame.columns)
    assert len(frame) == len(trades.shown())
    plan = result.best.plan
    assert tuple(measure(**plan)[name] for name in TWO) in result.front


def test_a_tuple_stands_for_the_objectives_in_order() -> None:
    result = sl.search(
        space(),
        lambda bits, scale: (scale, sum(bits)),
        objectives={"scale": "max", "bits": "min"},
        budget=40,
    )
    assert max(point[0] for point in result.front) > 1.5
    assert min(point[1] for point in result.front) < 40


def test_equal_seeds_give_equal_fronts_and_a_run_goes_on_in_the_middle(tmp_path: Path) -> None:
    options: dict[str, Any] = {"objectives": TWO, "baselines": BASELINES, "seed": 5}
    whole = sl.search(space(), measure, budget=90, **options)
    for budget in (13, 58, 90):  # ends within and between choices of parents
        parts = sl.search(space(), measure, budget=budget, out=tmp_path / "run", **options)
    assert parts.front == whole.front
    assert parts.records is not None
    assert whole.records is not None
    assert parts.records.keys == whole.records.keys
    assert parts.trade_offs is not None
    assert whole.trade_offs is not None
    assert parts.trade_offs.reference == whole.trade_offs.reference
    other = sl.search(space(), measure, budget=90, **{**options, "seed": 6})
    assert other.front != whole.front
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    trades = stored["trade_offs"]
    assert trades["size"] == len(whole.front)
    assert [tuple(m["values"].values()) for m in trades["members"]] == whole.front
    assert trades["members"][0]["plan"]["bits"]
    page = (tmp_path / "run" / "report.html").read_text()
    for word in ("Members of the front", "hypervolume", "data:image/svg+xml", "all 4"):
        assert word in page


def config_of(**more: Any) -> SearchConfig:
    made = noisy.build(space())
    stage = Stage(
        "search",
        space(),
        made,
        AlgorithmSpec("nsga2"),
        Budget(60),
        seeds=sl.Seeds(
            space().population(list(BASELINES.values())),
            tuple(f"baseline:{name}" for name in BASELINES),
        ),
    )
    return SearchConfig((stage,), seed=2, final=Final(k=4, report=3), **more)


def test_the_final_scores_members_that_stand_for_the_front() -> None:
    config, store = config_of(), MemoryRun()
    result = run(config, store=store)
    trades = result.trade_offs
    assert trades is not None
    assert 1 <= len(trades.finalists) <= 4
    assert {c.key for c in trades.finalists} <= {c.key for c in trades.members}
    assert {c.name for c in trades.rivals} == set(BASELINES)
    reported = [c for c in trades.finalists if c.report_values]
    assert reported
    assert all(np.shape(c.report_values) == (3, 2) for c in reported)
    poor = next(c for c in trades.rivals if c.name == "poor")
    assert poor.selection_values
    assert not poor.report_values  # another baseline dominates it on the selection split
    found = trades.report()
    assert found is not None
    point = np.array(trades.reference) * [1, -1]
    for replicate, volume in enumerate(found["found"]):
        losses = np.array([c.report_values[replicate] for c in reported]) * [1, -1]
        assert volume == pytest.approx(brute_volume(losses, point))
    assert found["gain"].mean == pytest.approx(
        np.mean(np.array(found["found"]) - found["baselines"])
    )
    assert "report split" in result.verdict()
    assert "distinguishable" in result.verdict()
    assert result.groups[0].winner in reported
    again = stored_result(config, store)
    assert again.rows() == result.rows()
    assert again.verdict() == result.verdict()
    assert verify(config, store) == []


def test_a_given_reference_point_is_kept() -> None:
    store = MemoryRun()
    run(config_of(reference={"loss": 5.0, "speed": 20.0}), store=store)
    again = stored_result(config_of(), store)
    assert again.trade_offs is not None
    assert again.trade_offs.reference == (5.0, 20.0)
    with pytest.raises(ConfigError, match="each of loss, speed"):
        config_of(reference={"loss": 5.0})


def test_constraints_bound_the_front() -> None:
    made = noisy.build(space())

    class Bounded(FunctionEvaluator):
        constraints = (Constraint("scale", 0.9),)

        def evaluate(self, jobs: Any) -> Any:
            out = super().evaluate(jobs)
            out.constraints = np.asarray(jobs.population["scale"])[:, None]
            return out

    bounded = Bounded(made.function, space(), objectives=made.objectives, batch=True, version=1)
    stage = Stage("search", space(), bounded, AlgorithmSpec("nsga2"), Budget(150))
    result = run(SearchConfig((stage,), seed=1))
    assert result.trade_offs is not None
    plans = space().decode(sl.Population.concat([c.population for c in result.trade_offs.members]))
    assert all(plan["scale"] <= 0.9 for plan in plans)
    assert len(plans) > 3
    assert result.best.contender.violation == 0
    impossible = Bounded(made.function, space(), objectives=made.objectives, batch=True, version=2)
    impossible.constraints = (Constraint("scale", -1.0),)
    none = run(SearchConfig((Stage("s", space(), impossible, AlgorithmSpec("nsga2"), Budget(30)),)))
    assert none.front == []
    assert "no candidate meets the constraints" in none.verdict()


def test_three_objectives_over_directions(tmp_path: Path) -> None:
    def three(bits: list[int], scale: float) -> tuple[float, float, float]:
        figures = measure(bits, scale)
        return figures["loss"], figures["bytes"], scale

    result = sl.search(
        space(),
        three,
        objectives={"loss": "min", "bytes": "min", "scale": "max"},
        algorithm=AlgorithmSpec("nsga3", {"population": 21, "every": 10}),
        budget=120,
        out=tmp_path / "three",
    )
    assert result.trade_offs is not None
    assert len(result.front) > 10
    assert "Members of the front" in (tmp_path / "three" / "report.html").read_text()


def test_two_runs_are_compared_by_their_hypervolumes(tmp_path: Path) -> None:
    for name, algorithm, budget in (("first", "random", 20), ("second", "nsga2", 200)):
        sl.search(
            space(),
            noisy,
            algorithm=algorithm,
            budget=budget,
            baselines=BASELINES,
            final=Final(k=8, report=3),
            out=tmp_path / name,
            name=name,
        )
    outcomes = [read_outcome(find_run(str(tmp_path / name))) for name in ("first", "second")]
    found = compare(outcomes[0], outcomes[1])
    by_name = {part.what: part for part in found.pairings}
    assert by_name["hypervolume"].gain.mean > 0
    assert by_name["hypervolume"].n == 3
    assert by_name["hypervolume in the search"].gain.mean > 0
    assert by_name["common candidates, speed"].gain.mean == 0
    assert "hypervolume" in found.sentence()
    numbers = figures(outcomes[1])
    assert numbers["hypervolume"] > numbers["hypervolume_baselines"]
    assert numbers["front"] == len(outcomes[1].result["front"])


def test_one_objective_of_several_steers() -> None:
    options: dict[str, Any] = {"objectives": {"bytes": "min", "loss": "min"}, "seed": 1}
    result = sl.search(space(), measure, steer="loss", budget=120, target=0.02, **options)
    assert result.trade_offs is None
    assert result.objective.name == "loss"
    assert result.meta["stop_reason"] == "target"
    assert result.best.value <= 0.02
    assert result.best.value == measure(**result.best.plan)["loss"]
    alone = sl.search(
        space(), lambda bits, scale: measure(bits, scale)["loss"], budget=120, target=0.02, seed=1
    )
    assert alone.records is not None
    assert result.records is not None
    assert alone.records.keys == result.records.keys  # the other objective changes nothing


def test_the_next_stage_adopts_from_the_front() -> None:
    losses = np.array([[0.0, 9.0], [9.0, 0.0], [4.0, 4.0], [9.0, 9.0], [5.0, 5.0]])
    population = LINE.population([{"a": i} for i in range(5)])
    answers = Answers(LINE, population, ("vary",) * 5, losses, np.zeros(5), main=None)
    assert set(best_rows(answers, 3, None, ("",)).tolist()) == {0, 1, 2}
    assert best_rows(answers, 4, None, ("",)).tolist()[-1] == 4
    (stage,) = config_of().stages
    stages = (stage, Stage("next", space(), stage.evaluator, AlgorithmSpec("nsga2"), Budget(10)))
    later = sl.search.run(  # type: ignore[attr-defined]
        SearchConfig((stages[0], _adopting(stages[1])), seed=3)
    )
    assert later.trade_offs is not None
    assert later.counts["hits"] >= 5


def _adopting(stage: Stage) -> Stage:
    from dataclasses import replace

    return replace(stage, adopt=AdoptBest(6))


def test_a_warm_start_takes_the_front(tmp_path: Path) -> None:
    options: dict[str, Any] = {"objectives": TWO}
    first = sl.search(space(), measure, budget=60, out=tmp_path / "first", name="first", **options)
    again = sl.search(space(), measure, budget=10, seed=9, warm_start=tmp_path / "first", **options)
    assert again.records is not None
    proposed = {tuple(values) for values in again.records.values[:, :2].tolist()}
    front = set(first.front)
    assert len(proposed & front) == min(10, len(front))
    with pytest.raises(ConfigError, match="it has no other; known: loss, bytes"):
        sl.search(
            space(),
            measure,
            warm_start=tmp_path / "first",
            objectives={"loss": "min", "other": "min"},
        )


def test_the_progress_line_shows_front_and_hypervolume() -> None:
    import io

    stream = io.StringIO()
    line = ProgressLine(stream)
    texts: list[str] = []
    sl.search(
        space(),
        measure,
        objectives=TWO,
        budget=30,
        callbacks=[lambda progress: texts.append(line.text(progress, 1.0))],
    )
    assert "on the front, hypervolume" in texts[-1]
    assert "best" not in texts[-1]


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objectives": TWO, "algorithm": "evolution"}, "nsga2"),
        ({"objectives": TWO, "algorithm": "race"}, "nsga2"),
        ({"objectives": {"loss": "min"}, "algorithm": "nsga2"}, "evolution serves one.*cma"),
        ({"objectives": {"loss": "min"}, "algorithm": "nsga3"}, "evolution"),
        ({"objectives": TWO, "algorithm": "nsga2", "steer": "loss"}, "evolution"),
        ({"objectives": TWO, "steer": "speed"}, "speed.*loss"),
        ({"objectives": TWO, "target": 0.1}, "steers"),
        (
            {
                "objectives": TWO,
                "steer": "bytes",
                "algorithm": AlgorithmSpec("evolution", {"race": True}),
            },
            "race.*first objective",
        ),
        ({"objectives": TWO, "direction": "max"}, "either"),
        ({"objectives": {}}, "one or more"),
        ({"objectives": {"loss": "down"}}, "min, max"),
        ({"objectives": TWO, "reference": {"loss": 1.0}}, "each of loss, bytes"),
        ({"objectives": TWO, "reference": {"loss": 1.0, "bytes": np.nan}}, "finite"),
    ],
)
def test_wrong_searches_are_refused_before_anything_is_paid(
    options: dict[str, Any], said: str
) -> None:
    def never(**values: Any) -> float:
        raise AssertionError

    with pytest.raises(ConfigError, match=said):
        sl.search(space(), never, **options)


def test_evaluators_have_their_own_objectives() -> None:
    with pytest.raises(ConfigError, match="an evaluator has its own"):
        sl.search(space(), noisy, objectives=TWO)


def test_a_dict_without_an_objective_fails_with_its_name() -> None:
    made = FunctionEvaluator(
        lambda **values: {"a": 1.0}, LINE, objectives=(Objective("a"), Objective("b"))
    )
    jobs = Random(LINE).ask(0, 1)
    out = made.evaluate(jobs)
    assert out.reason is not None
    assert "no b" in out.reason[0]
