"""Fronts: the conformance suite, survival, and the figures of fronts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab.algorithms import NSGA2, NSGA3, Algorithm, Random, Told
from searchlab.algorithms._band import Band
from searchlab.errors import ConfigError
from searchlab.fronts import front_order, hypervolume, knee, non_dominated, reference_point, spread
from searchlab.space import Space
from searchlab.testing.algorithm import AlgorithmSuite, Build
from searchlab.variables import Choice, Real


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


def test_the_search_beats_random_steadily_and_in_generations() -> None:
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
        assert min(steady, whole) > 1.2 * volume(Random(mixed, seed=seed))


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
