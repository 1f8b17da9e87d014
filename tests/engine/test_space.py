"""Spaces: the conformance suite on several of them, exact small cases, and every refusal."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchlab.budget import LinearBudget
from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.space import Space, space_from_json
from searchlab.testing.space import SpaceSuite, random_population
from searchlab.uniforms import uniforms
from searchlab.variables import ActiveBelow, ActiveIf, Choice, Integer, Ordered, Real


def plain() -> Space:
    return Space(
        kind=Choice(("a", "b", "c")),
        mask=Choice((0, 1), shape=(3, 2)),
        count=Integer(-2, 5),
        counts=Integer(0, 300, shape=(2,)),
        scale=Real(0.1, 0.7),
        weights=Real(-1, 1, shape=(2, 2)),
        times=Ordered(5, 0, 1, 0.1),
    )


def conditional() -> Space:
    return Space(
        solver=Choice(("single", "multi")),
        order=Choice((1, 2, 3), when=ActiveIf("solver", ("multi",))),
        third=Real(1, 2, when=ActiveIf("order", (3,)), default=1.5),
        steps=Integer(1, 6),
        family=Choice(("x", "y", "z"), shape=(6,), when=ActiveBelow("steps")),
        detail=Integer(3, 9, shape=(6,), when=ActiveIf("family", ("y", "z"))),
        times=Ordered(7, 0.001, 1, 0.02, when=ActiveBelow("steps", 1)),
        wide=Real(0, 1, shape=(2, 6), when=ActiveIf("family", ("z",))),
    )


def budgeted() -> Space:
    bits = {"bits": [2.0, 4.0, 8.0]}
    return Space(
        bits=Choice((2, 4, 8), shape=(12,)),
        group=Choice((32, 128), shape=(4,)),
        constraints=[
            LinearBudget(bits, upper=48, lower=40, name="bits"),
            LinearBudget(
                {"bits": [9.0, 3.0, 1.0], "group": [2.0, 0.5]}, upper=60, name="error", offset=1
            ),
        ],
    )


def exactly_k() -> Space:
    keep = LinearBudget({"keep": [0.0, 1.0]}, upper=4, lower=4, name="keep")
    return Space(keep=Choice((0, 1), shape=(10,)), constraints=[keep])


def conditional_budget() -> Space:
    """Only fewer steps make the cheapest long candidates affordable."""
    return Space(
        steps=Integer(1, 12),
        order=Choice((1, 2, 3), shape=(12,), when=ActiveBelow("steps")),
        times=Ordered(12, 0, 1, 0.01, when=ActiveBelow("steps")),
        constraints=[LinearBudget({"order": [1.0, 2.0, 3.0]}, upper=7, name="calls")],
    )


def integer_budget() -> Space:
    return Space(
        memory=Integer(0, 40, shape=(5,)),
        threads=Integer(1, 8),
        constraints=[
            LinearBudget({"memory": 2, "threads": [3.0][0]}, upper=100, lower=90, name="megabytes")
        ],
    )


def listed_labels() -> Space:
    return Space(window=Choice(((1, 2), (3, 4), None, "full"), shape=(3,)), flag=Choice([True]))


def many_labels() -> Space:
    return Space(index=Choice(range(300), shape=(4,)))


class TestPlain(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return plain()


class TestConditional(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return conditional()


class TestBudgeted(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return budgeted()


class TestExactlyK(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return exactly_k()


class TestConditionalBudget(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return conditional_budget()


class TestIntegerBudget(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return integer_budget()


class TestManyLabels(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return many_labels()


ALL = (plain, conditional, budgeted, exactly_k, conditional_budget, integer_budget, many_labels)


@pytest.mark.parametrize("build", [*ALL, listed_labels])
def test_json_round_trip_keeps_the_fingerprint(build: Any) -> None:
    space = build()
    again = space_from_json(json.loads(json.dumps(space.to_json())))
    assert again.fingerprint == space.fingerprint
    assert again.to_json() == json.loads(json.dumps(space.to_json()))
    rows = random_population(space, 20)
    assert random_population(again, 20).equals(rows)
    assert again.keys(rows) == space.keys(rows)


def test_whole_numbers_and_floats_are_one_space() -> None:
    first = Space(x=Real(0, 1), n=Integer(0, 3), t=Ordered(2, 0, 1))
    second = Space(x=Real(0.0, 1.0), n=Integer(0.0, 3.0), t=Ordered(2, 0.0, 1.0, 0.0))  # type: ignore[arg-type]
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    "other",
    [
        Space(a=Choice((1, 2)), b=Real(0, 1)),
        Space(a=Choice((1, 2, 4)), b=Real(0, 1)),
        Space(a=Choice((1, 2, 3)), b=Real(0, 2)),
        Space(a=Choice((1, 2, 3), shape=1), b=Real(0, 1)),
        Space(a=Choice((1, 2, 3)), b=Real(0, 1, when=ActiveIf("a", (2,)))),
        Space(a=Choice((1, 2, 3)), c=Real(0, 1)),
        Space(
            a=Choice((1, 2, 3)),
            b=Real(0, 1),
            constraints=[LinearBudget({"a": [1, 2, 3]}, upper=2)],
        ),
    ],
)
def test_different_spaces_have_different_fingerprints(other: Space) -> None:
    assert other.fingerprint != Space(a=Choice((1, 2, 3)), b=Real(0, 1)).fingerprint


def test_list_labels_round_trip() -> None:
    space = listed_labels()
    rows = random_population(space, 30)
    assert space.population(space.decode(rows)).equals(rows)


def enumerate_all(space: Space) -> Population:
    """All candidates of a space of choices and integers, canonical and feasible or not."""
    ranges: list[Any] = []
    for variable in space.variables.values():
        if isinstance(variable, Choice):
            ranges += [range(len(variable.labels))] * variable.size
        else:
            assert isinstance(variable, Integer)
            ranges += [range(variable.low, variable.high + 1)] * variable.size
    table = np.array(list(itertools.product(*ranges)))
    columns, start = {}, 0
    for key, variable in space.variables.items():
        part = table[:, start : start + variable.size]
        columns[key] = part.reshape(-1, *variable.shape).astype(variable.dtype)
        start += variable.size
    return Population(columns)


def flat_rows(population: Population) -> np.ndarray[Any, Any]:
    n = len(population)
    return np.concatenate([c.reshape(n, -1) for c in population.columns.values()], axis=1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_repair_changes_the_smallest_number_of_elements(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5), "size")
    labels = data.draw(st.integers(1, 3), "labels")
    costs = np.array(
        data.draw(
            st.lists(
                st.lists(st.integers(-4, 9), min_size=labels, max_size=labels),
                min_size=size,
                max_size=size,
            ),
            "costs",
        )
    )
    low, high = int(costs.min(axis=1).sum()), int(costs.max(axis=1).sum())
    upper = data.draw(st.integers(low, high), "upper")
    budget = LinearBudget({"x": costs}, upper=upper)
    space = Space(x=Choice(range(labels), shape=(size,)), constraints=[budget])
    everything = enumerate_all(space)
    feasible = flat_rows(everything.take(space.is_feasible(everything)))
    u = uniforms(data.draw(st.integers(0, 99), "seed"), 0, 0, len(everything), space.repair_width)
    repaired = space.repair(everything, u)
    assert space.is_feasible(repaired).all()
    before = flat_rows(everything)
    changed = (flat_rows(repaired) != before).sum(axis=1)
    fewest = (before[:, None] != feasible[None]).sum(axis=2).min(axis=1)
    np.testing.assert_array_equal(changed, fewest)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_two_sided_and_joint_budgets_are_met_or_refused(data: st.DataObject) -> None:
    """Repair finds a feasible candidate exactly where enumeration finds one."""
    size, labels = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 3))
    tables = [
        np.array(
            data.draw(
                st.lists(
                    st.lists(st.integers(0, 7), min_size=labels, max_size=labels),
                    min_size=size,
                    max_size=size,
                )
            )
        )
        for _ in range(2)
    ]
    budgets = []
    for i, table in enumerate(tables):
        low, high = int(table.min(axis=1).sum()), int(table.max(axis=1).sum())
        lower = data.draw(st.integers(low, high))
        upper = data.draw(st.integers(lower, high))
        budgets.append(LinearBudget({"x": table}, upper=upper, lower=lower, name=f"b{i}"))
    space = Space(x=Choice(range(labels), shape=(size,)), constraints=budgets)
    everything = enumerate_all(space)
    some = everything.take(slice(None, None, max(1, len(everything) // 12)))
    u = uniforms(0, 0, 0, len(some), space.repair_width)
    if space.is_feasible(everything).any():
        assert space.is_feasible(space.repair(some, u)).all()
    else:
        with pytest.raises(SpaceError, match="no candidate keeps"):
            space.repair(some, u)


def test_every_feasible_candidate_of_a_small_space_can_be_sampled() -> None:
    space = Space(
        x=Choice((0, 1, 2), shape=(4,)),
        constraints=[LinearBudget({"x": [0, 1, 2]}, upper=5, lower=4)],
    )
    everything = enumerate_all(space)
    feasible = set(space.keys(everything.take(space.is_feasible(everything))))
    assert set(space.keys(random_population(space, 2000))) == feasible


def test_repair_of_one_row_draws_among_all_that_suffice() -> None:
    space = Space(x=Choice((0, 1), shape=(6,)), constraints=[LinearBudget({"x": [0, 1]}, upper=5)])
    full = space.population([{"x": [1] * 6}] * 600)
    repaired = space.repair(full, uniforms(0, 0, 0, 600, space.repair_width))
    counts = (repaired["x"] == 0).sum(axis=0)
    assert counts.sum() == 600
    assert counts.min() > 60  # 100 each expected, standard deviation 9


def test_fewer_steps_are_taken_where_only_they_help() -> None:
    space = conditional_budget()
    row = space.population(
        [{"steps": 12, "order": [1] * 12, "times": np.linspace(0.1, 0.9, 12).tolist()}]
    )
    repaired = space.repair(row, uniforms(0, 0, 0, 1, space.repair_width))
    assert 1 <= int(repaired["steps"][0]) <= 7
    assert space.is_feasible(repaired).all()


def test_an_inactive_integer_switches_its_dependents_off() -> None:
    space = Space(
        on=Choice((False, True)),
        steps=Integer(2, 4, when=ActiveIf("on", (True,))),
        x=Real(0, 1, shape=(4,), when=ActiveBelow("steps")),
    )
    rows = space.population(
        [{"on": False, "steps": 4, "x": [0.5] * 4}, {"on": True, "steps": 3, "x": [0.5] * 4}]
    )
    np.testing.assert_array_equal(rows["x"], [[0, 0, 0, 0], [0.5, 0.5, 0.5, 0]])


def test_conditions_switch_element_by_element() -> None:
    space = conditional()
    (row,) = space.decode(
        space.population(
            [
                {
                    "solver": "single",
                    "order": 3,
                    "third": 1.75,
                    "steps": 3,
                    "family": ["x", "y", "z", "z", "z", "z"],
                    "detail": [9] * 6,
                    "times": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
                    "wide": [[0.5] * 6] * 2,
                }
            ]
        )
    )
    assert row == {
        "solver": "single",
        "order": 1,
        "third": 1.5,
        "steps": 3,
        "family": ["x", "y", "z", "x", "x", "x"],
        "detail": [3, 9, 9, 3, 3, 3],
        "times": [0.1, 0.2, 0.3, 0.4, 1.0, 1.0, 1.0],
        "wide": [[0.0, 0.0, 0.5, 0.0, 0.0, 0.0]] * 2,
    }


def test_neighbours_are_all_feasible_single_moves() -> None:
    space = Space(
        x=Choice((0, 1, 2), shape=(3,)),
        n=Integer(0, 4),
        constraints=[LinearBudget({"x": [0, 1, 2]}, upper=4)],
    )
    start = space.population([{"x": [1, 1, 2], "n": 0}])
    found = {json.dumps(v, sort_keys=True) for v in space.decode(space.neighbours(start))}
    expected = [{"x": x, "n": 0} for x in ([0, 1, 2], [1, 0, 2], [1, 1, 0], [1, 1, 1])] + [
        {"x": [1, 1, 2], "n": 1}
    ]
    assert found == {json.dumps(v, sort_keys=True) for v in expected}


def test_a_longer_schedule_is_a_neighbour_of_a_full_one() -> None:
    space = Space(steps=Integer(1, 4), times=Ordered(4, 0, 1, 0.1, when=ActiveBelow("steps")))
    start = space.population([{"steps": 2, "times": [0.2, 1.0, 1.0, 1.0]}])
    around = space.neighbours(start)
    assert {1, 3} <= set(around["steps"].tolist())


def test_neighbours_take_one_candidate() -> None:
    space = plain()
    with pytest.raises(SpaceError, match="neighbours of 2 candidates"):
        space.neighbours(random_population(space, 2))


def test_costs_are_the_sums_of_the_tables() -> None:
    space = budgeted()
    values = [{"bits": [2, 4, 8] * 4, "group": [32, 32, 128, 32]}]
    cost = space.cost(space.population(values))
    assert cost["bits"].tolist() == [4 * (2 + 4 + 8)]
    assert cost["error"].tolist() == [1 + 4 * (9 + 3 + 1) + 3 * 2 + 0.5]


def test_minus_zero_has_the_key_of_zero() -> None:
    space = Space(x=Real(-1, 1))
    rows = space.population([{"x": 0.0}, {"x": -0.0}])
    first, second = space.keys(rows)
    assert first == second


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(SpaceError, match="differ in length"):
        Population({"a": np.zeros(2), "b": np.zeros(3)})


def test_columns_cannot_be_written() -> None:
    rows = random_population(plain(), 2)
    with pytest.raises(ValueError, match="read-only"):
        rows["kind"][0] = 1


def test_is_feasible_sees_what_is_wrong() -> None:
    space = Space(
        a=Choice((1, 2, 3), shape=(2,)),
        n=Integer(0, 3),
        t=Ordered(2, 0, 1, 0.2),
        constraints=[LinearBudget({"n": 1}, upper=2)],
    )
    good = {"a": np.array([[0, 2]]), "n": np.array([2]), "t": np.array([[0.1, 0.3]])}
    assert space.is_feasible(Population(good)).tolist() == [True]
    for key, bad in (
        ("a", np.array([[0, 3]])),
        ("n", np.array([4])),
        ("n", np.array([3])),
        ("n", np.array([-1])),
        ("t", np.array([[0.1, 0.2]])),
        ("t", np.array([[0.9, 1.1]])),
        ("t", np.array([[0.4, 0.1]])),
    ):
        assert space.is_feasible(Population({**good, key: bad})).tolist() == [False]


SPACES = (conditional(), budgeted(), conditional_budget())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), first=st.integers(0, 2**30), n=st.integers(1, 8))
def test_samples_of_any_seed_are_feasible(seed: int, first: int, n: int) -> None:
    for space in SPACES:
        rows = random_population(space, n, seed=seed, first_id=first)
        assert space.is_feasible(rows).all()
        last = random_population(space, 1, seed=seed, first_id=first + n - 1)
        assert last.equals(rows.take([n - 1]))
