"""Listing, counting, even sampling and least repairs, against brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from searchlab.budget import LinearBudget
from searchlab.constraints import Predicate, Tie
from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.testing.space import random_population
from searchlab.uniforms import uniforms
from searchlab.variables import ActiveBelow, ActiveIf, Choice, Integer, Real, Subset

RNG = np.random.default_rng(3)
TABLE = RNG.random((7, 3)).round(3)
TWO = [
    LinearBudget({"x": TABLE}, upper=3.4, name="a"),
    LinearBudget({"x": RNG.random((7, 3))}, lower=3.5, name="b"),
]


def even(columns: Any) -> Any:
    return columns["x"].sum(axis=1) % 2 == 0


# Space and whether its size is known without listing.
SMALL: dict[str, tuple[Any, int | None]] = {
    "two-sided": (
        lambda: Space(
            x=Choice(range(3), shape=8),  # type: ignore[arg-type]
            constraints=[LinearBudget({"x": [0, 1, 2]}, upper=5, lower=4)],
        ),
        None,
    ),
    "real prices": (
        lambda: Space(
            x=Choice(range(3), shape=7),  # type: ignore[arg-type]
            constraints=[LinearBudget({"x": TABLE}, upper=2.0)],
        ),
        None,
    ),
    "two budgets": (
        lambda: Space(x=Choice(range(3), shape=7), constraints=TWO),  # type: ignore[arg-type]
        None,
    ),
    "subset": (
        lambda: Space(
            s=Subset(9, 4),
            n=Integer(0, 9, step=3),
            constraints=[LinearBudget({"s": np.arange(9), "n": 1}, upper=20, lower=12)],
        ),
        None,
    ),
    "subsets alone": (lambda: Space(s=Subset(5, 2, shape=2)), 100),
    "tied": (
        lambda: Space(
            x=Choice(range(4), shape=5),  # type: ignore[arg-type]
            constraints=[Tie((("x", 0), ("x", 3))), LinearBudget({"x": [0, 1, 2, 3]}, upper=6)],
        ),
        None,
    ),
    "conditions": (
        lambda: Space(
            on=Choice((False, True)),
            n=Integer(1, 4),
            x=Choice(range(3), shape=4, when=ActiveBelow("n")),  # type: ignore[arg-type]
            s=Subset(4, 2, when=ActiveIf("on", (True,))),
        ),
        (3 + 9 + 27 + 81) * (1 + 6),
    ),
    "predicate": (
        lambda: Space(x=Choice(range(3), shape=6), constraints=[Predicate(even, "even")]),  # type: ignore[arg-type]
        365,
    ),
    "grid": (lambda: Space(r=Real(0, 1, step=0.25, shape=3), c=Choice(("a", "b"))), 250),
}


def brute(space: Space) -> set[bytes]:
    """Keys of all feasible candidates, by trying every combination of values."""
    parts: list[list[Any]] = []
    for variable in space.variables.values():
        unit = variable.unit_values()
        groups = itertools.product(unit, repeat=variable.size // variable.unit)
        whole = [np.concatenate(g).reshape(variable.shape) for g in groups]
        # What is switched off has its neutral value, which need not be among the values.
        if variable.when:
            whole.append(np.full(variable.shape, variable.neutral, dtype=variable.dtype))
        parts.append(whole)
    rows = list(itertools.product(*parts))
    columns = {
        key: np.array([row[i] for row in rows], dtype=variable.dtype)
        for i, (key, variable) in enumerate(space.variables.items())
    }
    everything = space.canonicalise(Population(columns))
    return set(space.keys(everything.take(space.is_feasible(everything))))


@pytest.mark.parametrize("name", SMALL)
def test_lists_and_counts_are_those_of_brute_force(name: str) -> None:
    build, size = SMALL[name]
    space = build()
    expected = brute(space)
    listed = space.enumerate()
    keys = space.keys(listed)
    assert set(keys) == expected
    assert len(keys) == len(expected) == space.count()
    assert space.is_feasible(listed).all()
    assert size is None or size == len(keys)


@pytest.mark.parametrize("name", SMALL)
def test_every_candidate_is_sampled_and_none_much_more_often(name: str) -> None:
    space = SMALL[name][0]()
    keys = space.keys(space.enumerate())
    assert 10 < len(keys) <= 5000
    draws = space.sample(uniforms(0, 0, 0, 200 * len(keys), space.sample_width))
    found, counts = np.unique(np.array(space.keys(draws), dtype="S16"), return_counts=True)
    assert len(found) == len({key.rstrip(b"\0") for key in keys})
    assert counts.max() <= 50 * counts.min()
    # 200 each: far less uneven than what is allowed.
    assert counts.min() > 100
    assert counts.max() < 320


def test_large_spaces_are_counted_without_a_list() -> None:
    assert Space(x=Choice((0, 1), shape=100)).count() == 2**100
    half = LinearBudget({"x": [0, 1]}, upper=50, lower=50)
    assert Space(x=Choice((0, 1), shape=100), constraints=[half]).count() == math.comb(100, 50)
    prices = LinearBudget({"s": np.ones(40)}, upper=20)
    assert Space(s=Subset(40, 20), constraints=[prices]).count() == math.comb(40, 20)
    assert Space(x=Real(0, 1)).count() is None
    with pytest.raises(SpaceError, match="'x' is a real of any value"):
        Space(x=Real(0, 1)).enumerate()
    with pytest.raises(SpaceError, match="more than 1000 candidates"):
        Space(x=Choice((0, 1), shape=20)).enumerate(1000)


def test_one_budget_is_sampled_evenly_in_a_space_that_cannot_be_listed() -> None:
    costs = np.arange(4.0)
    space = Space(x=Choice((0, 1, 2, 3), shape=(40,)), constraints=[LinearBudget({"x": costs}, 30)])
    rows = random_population(space, 3000)
    sums = rows["x"].sum(axis=1)
    # The exact share of each sum, by the coefficients of (1 + t + t^2 + t^3)^40.
    ways = [1]
    for _ in range(40):
        ways = [sum(ways[max(0, s - 3) : s + 1]) for s in range(len(ways) + 3)]
    share = ways[30] / sum(ways[:31])
    deviation = math.sqrt(share * (1 - share) / 3000)
    assert abs((sums == 30).mean() - share) < 5 * deviation


EMPTY: list[tuple[Any, str]] = [
    (
        lambda: Space(
            x=Choice((0, 1), shape=3), constraints=[LinearBudget({"x": [0, 10]}, 7, lower=3)]
        ),
        "budget 'budget': no candidate keeps it",
    ),
    (
        lambda: Space(
            x=Choice((0, 1), shape=30),
            constraints=[
                LinearBudget({"x": [0, 1]}, 10, name="few"),
                LinearBudget({"x": [1, 0]}, 10, name="many"),
            ],
        ),
        "'few', 'many': no candidate keeps them all .proved by an integer program",
    ),
    (
        lambda: Space(
            on=Choice((0, 1)),
            x=Choice((0, 1), when=ActiveIf("on", (1,))),
            constraints=[
                LinearBudget({"x": [2, 3]}, lower=2, name="dear"),
                LinearBudget({"on": [0, 1]}, upper=0, name="off"),
            ],
        ),
        "no candidate keeps the constraints 'dear', 'off'",
    ),
    (
        lambda: Space(
            x=Choice((0, 1), shape=3),
            constraints=[Predicate(lambda c: np.zeros(len(c["x"]), dtype=bool), "never")],
        ),
        "no candidate keeps the constraints 'never'",
    ),
]


@pytest.mark.parametrize(("build", "message"), EMPTY)
def test_spaces_of_size_zero_are_named(build: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        random_population(build(), 4)
    assert "\n" not in str(caught.value)


def distances(rows: Population, feasible: Population) -> np.ndarray[Any, Any]:
    """The least number of changed elements to any feasible candidate, exchanges counted once."""
    total: Any = 0
    for key, weight in (("x", 1.0), ("s", 0.5)):
        a, b = rows[key], feasible[key]
        differ = (a[:, None] != b[None]).reshape(len(a), len(b), -1)
        total = total + weight * differ.sum(axis=2)
    return np.asarray(total.min(axis=1))


@pytest.mark.parametrize("two", [False, True], ids=["one budget", "two budgets"])
def test_a_repair_changes_at_most_one_element_too_many(two: bool) -> None:
    rng = np.random.default_rng(11)
    worst = 0.0
    for _ in range(10):
        table = {"x": rng.random((5, 3)), "s": rng.random(5)}
        constraints = [LinearBudget(table, upper=2.9, lower=2.7, name="a")]
        if two:
            other = {"x": rng.random((5, 3)), "s": rng.random(5)}
            constraints.append(LinearBudget(other, upper=3.2, name="b"))
        space = Space(x=Choice((0, 1, 2), shape=(5,)), s=Subset(5, 2), constraints=constraints)
        feasible = space.enumerate()
        assert len(feasible)
        rows = Space(space.variables).sample(uniforms(0, 0, 0, 100, 10))
        repaired = space.repair(rows, uniforms(1, 0, 0, 100, space.repair_width))
        assert space.is_feasible(repaired).all()
        changed = (rows["x"] != repaired["x"]).sum(axis=1)
        changed = changed + 0.5 * (rows["s"] != repaired["s"]).sum(axis=1)
        worst = max(worst, float((changed - distances(rows, feasible)).max()))
    assert worst <= 1
