"""Fronts: the conformance suite, survival, hypervolume, and whole searches with two objectives."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import searchlab as sl
from searchlab.algorithms import NSGA2, NSGA3, Algorithm, Random, Told
from searchlab.algorithms._band import Band
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
from searchlab.fronts import front_order, hypervolume, knee, non_dominated, reference_point, spread
from searchlab.outcome import figures, read_outcome
from searchlab.outcomes import Constraint
from searchlab.progress import ProgressLine
from searchlab.runs import find_run
from searchlab.search import run, stored_result, verify
from searchlab.space import Space
from searchlab.study import MemoryRun
from searchlab.testing.algorithm import AlgorithmSuite, Build
from searchlab.variables import Choice, Real

TWO = {"loss": "min", "bytes": "min"}


class TestNSGA2(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: NSGA2(
            space, seed=seed, first_id=first_id, seeds=seeds, n_random=6, population=8
        )


class TestNSGA2InGenerations(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: NSGA2(
            space,
            seed=seed,
            first_id=first_id,
            seeds=seeds,
            n_random=6,
            population=8,
            quantum=8,
            every=8,
        )


class TestNSGA3(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: NSGA3(
            space, seed=seed, first_id=first_id, seeds=seeds, n_random=6, population=8, every=5
        )


# -- survival -----------------------------------------------------------------------------------

LINE = Space(a=Choice(tuple(range(1000))))


def told(losses: list[list[float]], violation: list[float] | None = None, first: int = 0) -> Told:
    n = len(losses)
    ids = np.arange(first, first + n)
    population = LINE.population([{"a": int(i) % 1000} for i in ids])
    bad = np.zeros(n) if violation is None else np.array(violation)
    return Told(ids, population, np.array(losses, dtype=float), bad)


def dominates(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return bool((a <= b).all() and (a < b).any())


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("constrained", [False, True])
def test_the_band_is_what_few_others_beat_however_tells_are_divided(
    depth: int, constrained: bool
) -> None:
    rng = np.random.default_rng(depth)
    losses = rng.integers(0, 12, (300, 2)).astype(float)  # with many equal ones
    losses[rng.random(300) < 0.1] = np.inf
    bad = np.where(rng.random(300) < 0.4, rng.integers(0, 3, 300), 0.0) * constrained
    everything = told(losses.tolist(), bad.tolist())

    def beaten_by(i: int, j: int) -> bool:  # whether j beats i
        if bad[i] != bad[j]:
            return bool(bad[j] < bad[i])
        if bad[i] > 0 or (losses[i] == losses[j]).all():
            return j > i
        return dominates(losses[j], losses[i])

    fine = np.flatnonzero(np.isfinite(losses).all(axis=1)).tolist()
    count = {i: sum(beaten_by(i, j) for j in fine if j != i) for i in fine}
    wanted = {i: n for i, n in count.items() if n < depth}
    for cuts in ([], [1, 2, 3, 50, 51, 290], list(range(7, 300, 7))):
        band = Band(LINE, depth)
        for start, stop in itertools.pairwise([0, *cuts, 300]):
            rows = slice(start, stop)
            band.merge(
                Told(
                    everything.ids[rows],
                    everything.population.take(rows),
                    everything.losses[rows],
                    everything.violation[rows],
                )
            )
        assert dict(zip(band.ids.tolist(), band.beaten.tolist(), strict=True)) == wanted
        assert (LINE.decode(band.population)[0]["a"]) == int(band.ids[0])


def parents_of(algorithm: Algorithm, first_id: int, n: int = 200) -> set[int]:
    jobs = algorithm.ask(first_id, n)
    assert jobs.parents is not None
    return set(jobs.parents.ravel().tolist()) - {-1}


@pytest.mark.parametrize("kind", [NSGA2, NSGA3])
def test_parents_meet_the_constraints_where_any_candidate_does(kind: type[Algorithm]) -> None:
    losses = [[0.0, 0.0], [5.0, 6.0], [6.0, 5.0], [1.0, 1.0], [9.0, 9.0], [np.inf, np.inf]]
    algorithm = kind(LINE, n_random=0, every=1, population=2, depth=1)  # type: ignore[call-arg]
    algorithm.tell(told(losses, [1.0, 0.0, 0.0, 0.5, 0.0, 0.0]))
    assert parents_of(algorithm, 6) == {1, 2}


@pytest.mark.parametrize("kind", [NSGA2, NSGA3])
def test_where_none_does_the_least_broken_are_parents(kind: type[Algorithm]) -> None:
    losses = [[0.0, 0.0], [5.0, 6.0], [6.0, 5.0]]
    algorithm = kind(LINE, n_random=0, every=1, population=2)  # type: ignore[call-arg]
    algorithm.tell(told(losses, [2.0, 1.0, 3.0]))
    assert parents_of(algorithm, 3) == {0, 1}


def test_crowding_keeps_the_ends_and_the_lonely() -> None:
    points = [[0.0, 10.0], [0.1, 9.9], [0.2, 9.8], [5.0, 5.0], [9.9, 0.1], [10.0, 0.0]]
    algorithm = NSGA2(LINE, n_random=0, every=1, population=3)
    algorithm.tell(told(points))
    assert parents_of(algorithm, 6) == {0, 3, 5}


def test_directions_keep_one_near_each() -> None:
    points = [[0.0, 10.0], [0.2, 9.9], [0.4, 9.8], [5.0, 5.0], [9.8, 0.4], [10.0, 0.0]]
    algorithm = NSGA3(LINE, n_random=0, every=1, population=3, partitions=2)
    algorithm.tell(told(points))
    assert parents_of(algorithm, 6) == {0, 3, 5}


@pytest.mark.parametrize("kind", [NSGA2, NSGA3])
def test_a_state_between_two_survivals_is_rebuilt_by_one_tell(kind: type[Algorithm]) -> None:
    rng = np.random.default_rng(0)
    losses = np.where(rng.random((61, 1)) < 0.2, np.inf, rng.random((61, 3)))
    bad = np.where(rng.random(61) < 0.5, rng.random(61), 0.0)
    ids = np.sort(rng.choice(90, 61, replace=False))  # the others are void
    population = LINE.population([{"a": int(i)} for i in ids])
    whole = kind(LINE, seed=4, n_random=0, every=7, population=9)  # type: ignore[call-arg]
    whole.tell(Told(ids, population, losses, bad))
    parts = kind(LINE, seed=4, n_random=0, every=7, population=9)  # type: ignore[call-arg]
    for start, stop in itertools.pairwise([0, 1, 5, 6, 20, 41, 61]):
        rows = slice(start, stop)
        parts.tell(Told(ids[rows], population.take(rows), losses[rows], bad[rows]))
        parts._draw(np.arange(90, 93), parts._uniforms(np.arange(90, 93), 0), 1.0)
    assert whole.ask(200, 50).keys == parts.ask(200, 50).keys
    assert whole._waiting
    assert parts._n_waiting == whole._n_waiting == 61 % 7


# -- figures of fronts --------------------------------------------------------------------------


def brute_volume(points: NDArray[Any], reference: NDArray[Any]) -> float:
    """By inclusion and exclusion of boxes."""
    total = 0.0
    boxes = [point for point in points if (point < reference).all()]
    for size in range(1, len(boxes) + 1):
        for some in itertools.combinations(boxes, size):
            corner = np.max(some, axis=0)
            total += (-1) ** (size + 1) * float(np.prod(reference - corner))
    return total


@pytest.mark.parametrize("m", [2, 3, 4])
def test_the_hypervolume_is_that_of_the_boxes(m: int) -> None:
    rng = np.random.default_rng(m)
    points = rng.random((8, m)) * 1.2
    reference = np.full(m, 1.0)
    assert hypervolume(points, reference) == pytest.approx(brute_volume(points, reference))
    assert hypervolume(points[:0], reference) == 0.0
    assert hypervolume(reference[None], reference) == 0.0


def test_the_front_is_what_nothing_dominates() -> None:
    rng = np.random.default_rng(2)
    losses = rng.integers(0, 9, (120, 3)).astype(float)
    losses[::10] = np.inf
    bad = (rng.random(120) < 0.3).astype(float)
    got = non_dominated(losses, bad)
    fine = np.flatnonzero(np.isfinite(losses).all(axis=1) & (bad == 0))
    wanted = [i for i in fine if not any(dominates(losses[j], losses[i]) for j in fine)]
    assert {tuple(losses[i]) for i in got} == {tuple(losses[i]) for i in wanted}
    assert len({tuple(losses[i]) for i in got}) == len(got)
    order = front_order(losses, bad)
    assert set(order.tolist()) == set(np.flatnonzero(np.isfinite(losses).all(axis=1)).tolist())
    assert set(map(tuple, losses[order[: len(got)]])) <= {tuple(losses[i]) for i in wanted}
    assert (np.diff(bad[order]) >= 0).all()


def test_the_knee_and_the_spread_of_a_front() -> None:
    x = np.linspace(0, 1, 21)
    losses = np.column_stack([x, (1 - x) ** 4 * 1000])
    middle = knee(losses)
    assert 0.2 <= x[middle] <= 0.5
    rows = spread(losses, 4).tolist()
    assert {0, 20, middle} <= set(rows)
    assert len(rows) == 4
    assert spread(losses, 30).tolist() == list(range(21))
    assert spread(losses, 1).tolist() == [middle]


def test_the_reference_point_depends_on_the_first_ids_only() -> None:
    losses = np.array([[float(i), -float(i)] for i in range(40)])
    ids = np.arange(40)
    point = reference_point(ids, losses)
    assert point.tolist() == [15 + 1.5, 0 + 1.5]
    assert reference_point(ids[::-1], losses[::-1]).tolist() == point.tolist()
    assert (reference_point(ids[:1], np.zeros((1, 2))) > 0).all()


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


def test_the_search_beats_random_and_generations() -> None:
    def volume(algorithm: Algorithm) -> float:
        parts = []
        for start in range(0, 400, algorithm.quantum):
            jobs = algorithm.ask(start, algorithm.quantum)
            x = (jobs.population["c"] != 0).mean(axis=1)
            first = jobs.population["x"]
            losses = np.column_stack([first, (1 + 9 * x) * (1 - np.sqrt(first / (1 + 9 * x)))])
            algorithm.tell(Told(jobs.ids, jobs.population, losses, np.zeros(len(jobs))))
            parts.append(losses)
        return hypervolume(np.concatenate(parts), np.array([1.1, 10.0]))

    mixed = Space(x=Real(0, 1), c=Choice(tuple(range(5)), shape=(16,)))
    for seed in range(3):
        steady = volume(NSGA2(mixed, seed=seed))
        whole = volume(NSGA2(mixed, seed=seed, quantum=50, every=50, population=50, n_random=50))
        assert steady > whole > volume(Random(mixed, seed=seed))


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"population": 1}, "2 or more"),
        ({"every": 0}, "1 or more"),
        ({"depth": 0}, "1 or more"),
        ({"quantum": True}, "1 or more"),
        ({"partitions": 0}, "1 or more"),
        ({"partitions": 2, "directions": [[1, 0], [0, 1]]}, "without directions"),
        ({"directions": [[1, -1]]}, "0 or more"),
        ({"directions": [[0, 0]]}, "not zero"),
        ({"directions": "many"}, "rows of weights"),
        ({"directions": [[1, 0], [0, 1], [1, 1]], "population": 2}, "3 or more"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        NSGA3(LINE, **options)


def test_more_objectives_than_directions_are_refused() -> None:
    few = NSGA3(LINE, population=5)
    few.check_objectives(5)
    with pytest.raises(ConfigError, match="6 directions of 6 objectives; allowed: 6 or more"):
        few.check_objectives(6)
    with pytest.raises(ConfigError, match="with 2 weights for 3"):
        NSGA3(LINE, directions=[[1, 0], [0, 1]]).check_objectives(3)
    with pytest.raises(ConfigError, match="fewer partitions"):
        NSGA3(LINE, partitions=12, population=50).check_objectives(3)


def test_a_dict_without_an_objective_fails_with_its_name() -> None:
    made = FunctionEvaluator(
        lambda **values: {"a": 1.0}, LINE, objectives=(Objective("a"), Objective("b"))
    )
    jobs = Random(LINE).ask(0, 1)
    out = made.evaluate(jobs)
    assert out.reason is not None
    assert "no b" in out.reason[0]
