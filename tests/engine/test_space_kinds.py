"""Subsets, fixed sums, grids, ties and predicates: the conformance suite and small exact cases."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from searchlab.algorithms.variation import UniformVariation
from searchlab.budget import LinearBudget
from searchlab.constraints import Predicate, Tie
from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.space import Space, space_from_json
from searchlab.testing.space import SpaceSuite, random_population
from searchlab.uniforms import derived, uniforms
from searchlab.variables import (
    ActiveBelow,
    ActiveIf,
    Affine,
    Choice,
    Integer,
    Ordered,
    Real,
    Simplex,
    Subset,
)


def vectors() -> Space:
    return Space(
        heads=Subset(12, 5, shape=(2,)),
        few=Subset(6, 1),
        weights=Affine(4, low=-1, high=2, shape=(3,)),
        capped=Affine(6, 3.0, low=0, high=1),
        shares=Simplex(5),
        times=Ordered(3, 0, 1, 0.1, shape=(2, 2)),
    )


def grids() -> Space:
    return Space(
        tokens=Integer(512, 16384, log=True, shape=2),
        even=Integer(2, 101, step=3, shape=2),
        powers=Integer(4, 400, step=4, log=True),
        rate=Real(1e-5, 1e-1, log=True, shape=3),
        tenths=Real(0, 1, step=0.1, shape=4),
        coarse=Real(0.5, 64, step=0.5, log=True),
    )


def switched() -> Space:
    return Space(
        mode=Choice(("none", "some")),
        count=Integer(1, 3),
        picked=Subset(7, 3, when=ActiveIf("mode", ("some",))),
        mixed=Affine(3, low=-0.5, high=1.5, shape=3, when=ActiveBelow("count")),
        rate=Real(1e-3, 1, log=True, when=ActiveIf("mode", ("some",))),
    )


def subset_budget() -> Space:
    return Space(
        experts=Subset(8, 4, shape=(3,)),
        bits=Choice((2, 4, 8), shape=(3,)),
        constraints=[
            LinearBudget(
                {"experts": np.arange(24).reshape(3, 8), "bits": [0, 10, 20]},
                upper=120,
                lower=100,
                name="bytes",
            )
        ],
    )


def tied() -> Space:
    return Space(
        x=Choice((1, 2, 3), shape=(3, 2)),
        y=Choice((1, 2, 3)),
        n=Integer(0, 5, shape=2),
        constraints=[
            Tie([("x", 0, 0), ("x", 2, 1)]),  # type: ignore[arg-type]
            Tie((("x", (2, 1)), "y")),
            Tie([("n", 0), ("n", 1)]),  # type: ignore[arg-type]
            LinearBudget({"x": [1, 2, 3], "y": [5, 10, 15], "n": [1, 2]}, upper=30, lower=25),
        ],
    )


def odd_sum(columns: Any) -> Any:
    return columns["x"].sum(axis=1) % 5 == 1


def predicated() -> Space:
    return Space(
        x=Choice(range(6), shape=(8,)),
        r=Real(0, 1),
        constraints=[
            Predicate(odd_sum, "odd"),
            LinearBudget({"x": np.arange(6)}, upper=20, name="sum"),
        ],
    )


KINDS = (vectors, grids, switched, subset_budget, tied, predicated)


class _Kind(SpaceSuite):
    rows = 32


class TestVectors(_Kind):
    @pytest.fixture
    def space(self) -> Space:
        return vectors()


class TestGrids(_Kind):
    @pytest.fixture
    def space(self) -> Space:
        return grids()


class TestSwitched(_Kind):
    @pytest.fixture
    def space(self) -> Space:
        return switched()


class TestSubsetBudget(_Kind):
    @pytest.fixture
    def space(self) -> Space:
        return subset_budget()


class TestTied(_Kind):
    @pytest.fixture
    def space(self) -> Space:
        return tied()


class TestPredicated(_Kind):
    @pytest.fixture
    def space(self) -> Space:
        return predicated()


@pytest.mark.parametrize("build", KINDS)
def test_files_keep_the_fingerprint(build: Any) -> None:
    space = build()
    again = space_from_json(json.loads(json.dumps(space.to_json())), predicates=space.predicates)
    assert again.fingerprint == space.fingerprint
    text = Space.from_yaml(space.to_yaml(), predicates=space.predicates)
    assert text.fingerprint == space.fingerprint
    assert random_population(text, 5).equals(random_population(space, 5))


@pytest.mark.parametrize("build", KINDS)
def test_children_are_feasible_and_mostly_new(build: Any) -> None:
    space, vary = build(), UniformVariation()
    a, b = random_population(space, 40), random_population(space, 40, first_id=40)
    children = vary.vary(space, a, b, uniforms(5, 0, 0, 40, vary.width(space)))
    assert space.is_feasible(children).all()
    assert space.canonicalise(children).equals(children)
    assert len(set(space.keys(children)) - set(space.keys(a))) >= 20


def test_a_subset_is_a_uniform_draw() -> None:
    masks = Subset(4, 2).sample(uniforms(0, 0, 0, 6000, 4))
    seen = np.unique(masks, axis=0, return_counts=True)[1]
    assert len(seen) == 6
    assert np.abs(seen - 1000).max() < 6 * 29  # standard deviation 29


def test_mutating_one_member_exchanges_it() -> None:
    variable = Subset(9, 4)
    masks = variable.sample(uniforms(0, 0, 0, 200, 9))
    flags = np.zeros(masks.shape, dtype=bool)
    flags[np.arange(200), np.arange(200) % 9] = True
    moved = variable.mutate(masks, flags, uniforms(1, 0, 0, 200, 9))
    assert (moved.sum(axis=1) == 4).all()
    assert ((moved != masks).sum(axis=1) == 2).all()
    assert (moved != masks)[flags].all()


def test_a_child_of_two_subsets_keeps_what_both_have_and_adds_nothing() -> None:
    variable = Subset(10, 5)
    a, b = (variable.sample(uniforms(s, 0, 0, 300, 10)) > 0 for s in (0, 1))
    child = variable.cross(a, b, uniforms(2, 0, 0, 300, 10) < 0.5) > 0
    assert (child.sum(axis=1) == 5).all()
    assert not (a & b & ~child).any()
    assert not (child & ~(a | b)).any()


def test_a_subset_decodes_to_member_numbers() -> None:
    space = Space(s=Subset(5, 2), t=Subset(3, 1, shape=2))
    rows = space.population([{"s": [4, 1], "t": [[0], [2]]}])
    assert space.decode(rows) == [{"s": [1, 4], "t": [[0], [2]]}]
    assert rows["s"].tolist() == [[0, 1, 0, 0, 1]]


def test_a_fixed_sum_is_repaired_by_the_nearest_point() -> None:
    rng = np.random.default_rng(0)
    variable = Affine(4, 1.0, low=-0.5, high=1.0)
    given = rng.normal(size=(50, 4))
    repaired = variable.repair(given)
    np.testing.assert_allclose(repaired.sum(axis=1), 1.0, atol=1e-12)
    # No random valid point is nearer to what was given.
    others = variable.sample(uniforms(0, 0, 0, 2000, 4))
    best = np.linalg.norm(others[None] - given[:, None], axis=2).min(axis=1)
    assert (np.linalg.norm(repaired - given, axis=1) <= best + 1e-12).all()


def test_shares_are_uniform_over_the_simplex() -> None:
    values = Simplex(4).sample(uniforms(0, 0, 0, 40_000, 4))
    np.testing.assert_allclose(values.mean(axis=0), 0.25, atol=0.005)
    # A share of a uniform point is below t with probability 1 - (1 - t)^3.
    for t in (0.1, 0.3, 0.6):
        np.testing.assert_allclose((values < t).mean(axis=0), 1 - (1 - t) ** 3, atol=0.01)


def test_capped_sums_are_nearly_uniform() -> None:
    # Uniform over {x in [0,1]^3, sum 1.5}: a hexagon, on which each x has a known density.
    values = Affine(3, 1.5, low=0, high=1).sample(uniforms(0, 0, 0, 40_000, 3))
    np.testing.assert_allclose(values.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose((values < 0.25).mean(axis=0), 0.2083, atol=0.06)


def test_log_draws_give_each_decade_its_share() -> None:
    values = Real(1e-4, 1, log=True).sample(uniforms(0, 0, 0, 8000, 1))
    decades = np.histogram(values, [1e-4, 1e-3, 1e-2, 1e-1, 1.0001])[0]
    assert np.abs(decades - 2000).max() < 6 * 39
    whole = Integer(1, 1024, log=True).sample(uniforms(0, 0, 0, 8000, 1))
    assert {1, 2, 3} <= set(whole.tolist())
    assert 0.4 < (whole <= 32).mean() < 0.6


@pytest.mark.parametrize("log", [False, True])
def test_grids_hold_whole_steps_only(log: bool) -> None:
    variable = Real(0.1, 1.05, step=0.1, log=log)
    assert variable.high == 1.0
    values = variable.sample(uniforms(0, 0, 0, 500, 1))
    assert set(values.tolist()) == {round(0.1 * i, 1) for i in range(1, 11)}
    every = np.ones(500, dtype=bool)
    moved = variable.mutate(values, every, uniforms(1, 0, 0, 500, 1))
    assert (moved != values).all()
    assert variable.valid(moved, every).all()
    assert variable.encode_labels(0.1 + 0.2) == 0.3
    numbers = Integer(1, 11, step=4, log=log)
    assert set(numbers.sample(uniforms(0, 0, 0, 500, 1)).tolist()) == {1, 5, 9}


def test_ties_follow_their_leader_through_a_repair() -> None:
    space = tied()
    rows = random_population(space, 50)
    assert (rows["x"][:, 0, 0] == rows["x"][:, 2, 1]).all()
    assert (rows["y"] == rows["x"][:, 0, 0]).all()
    assert (rows["n"][:, 0] == rows["n"][:, 1]).all()
    broken = rows.replace(y=((rows["y"] + 1) % 3).astype(np.uint8))
    assert not space.is_feasible(broken).any()
    assert space.is_feasible(space.repair(broken, uniforms(0, 0, 0, 50, space.repair_width))).all()


def test_tokens_have_one_place_per_element() -> None:
    space = switched()
    rows = random_population(space, 20)
    tokens = space.tokens(rows)
    assert tokens.codes.shape == tokens.values.shape == tokens.active.shape == (20, space.size)
    assert (tokens.codes.dtype, tokens.values.dtype) == (np.int32, np.float32)
    assert (tokens.codes[~tokens.active] == 0).all()
    assert (tokens.values[~tokens.active] == 0).all()
    assert tokens.codes[:, 0].tolist() == rows["mode"].tolist()
    lines = {
        c.tobytes() + v.tobytes() + a.tobytes()
        for c, v, a in zip(tokens.codes, tokens.values, tokens.active, strict=True)
    }
    assert len(lines) == len(set(space.keys(rows)))


def test_derived_uniforms_are_uniform_and_belong_to_their_row() -> None:
    seeds = uniforms(0, 0, 0, 300, 2)
    more = derived(seeds, 3, 40)
    assert ((more >= 0) & (more < 1)).all()
    assert np.abs(np.histogram(more, 10, (0, 1))[0] - 1200).max() < 6 * 33
    assert np.array_equal(derived(seeds[7:8], 3, 40)[0], more[7])
    assert not np.array_equal(derived(seeds, 4, 40), more)


def test_a_predicate_that_nothing_fulfils_is_named() -> None:
    never = Predicate(lambda c: np.zeros(len(c["r"]), dtype=bool), "never", tries=20)
    space = Space(r=Real(0, 1), constraints=[never])
    with pytest.raises(SpaceError, match="predicate 'never': nothing feasible found in 20 tries"):
        random_population(space, 3)


def _raises(columns: Any) -> Any:
    raise KeyError("no such column")


REFUSED: list[tuple[Any, str]] = [
    (lambda: Subset(3, 4), "subset of 4 out of 3"),
    (lambda: Subset(0, 0), "subset of 0 out of 0"),
    (lambda: Subset(3, 1.5), "subset of 1.5"),  # type: ignore[arg-type]
    (lambda: Subset(2**13, 2, shape=2**12), "at most 16777216"),
    (lambda: Affine(3, 7.0, low=0, high=2), r"cannot sum to 7.0; allowed: \[0, 6\]"),
    (lambda: Affine(3, low=1, high=0), "affine range"),
    (lambda: Simplex(0), "simplex of 0 elements"),
    (lambda: Integer(0, 5, log=True), "low 0 of an? integer with log"),
    (lambda: Integer(1, 5, log="yes"), "log 'yes'"),  # type: ignore[arg-type]
    (lambda: Integer(0, 5, step=0), "step 0 of an integer"),
    (lambda: Real(0, 5, log=True), "low 0 of a real with log"),
    (lambda: Real(0, 5, step=0), "step 0 of a real"),
    (lambda: Real(0, 1e9, step=1e-9), "at most"),
    (lambda: Tie([("x", 0)]), "two or more"),  # type: ignore[arg-type]
    (lambda: Tie([("x", 0), 3]), "place 3"),  # type: ignore[arg-type]
    (lambda: Space(x=Choice((1, 2)), constraints=[Tie(("x", "y"))]), "tie names 'y'"),
    (
        lambda: Space(x=Choice((1, 2), shape=2), constraints=[Tie((("x", 0), ("x", 2)))]),
        r"element \(2,\)",
    ),
    (
        lambda: Space(x=Choice((1, 2)), y=Choice((1, 3)), constraints=[Tie(("x", "y"))]),
        "equal labels",
    ),
    (lambda: Space(x=Real(0, 1), y=Real(0, 1), constraints=[Tie(("x", "y"))]), "a real"),
    (
        lambda: Space(n=Integer(1, 3), s=Subset(3, 1, when=ActiveBelow("n"))),
        "would cut a subset",
    ),
    (lambda: Space(x=Choice((1, 2)), constraints=["x"]), "constraint 'x'"),  # type: ignore[list-item]
    (lambda: Predicate(3, "p"), "predicate 'p' is 3"),  # type: ignore[arg-type]
    (
        lambda: random_population(Space(x=Real(0, 1), constraints=[Predicate(_raises, "p")]), 2),
        "predicate 'p' raised KeyError",
    ),
    (
        lambda: random_population(
            Space(x=Real(0, 1), constraints=[Predicate(lambda c: True, "p")]), 2
        ),
        r"answered bool of shape \(\)",
    ),
    (
        lambda: space_from_json(
            {"variables": {"x": {"real": [0, 1]}}, "constraints": [{"predicate": "p"}]}
        ),
        "predicate 'p' is a function",
    ),
    (lambda: Space(s=Subset(4, 2)).population([{"s": [0]}]), "1 members of a subset; allowed: 2"),
    (lambda: Space(s=Subset(4, 2)).population([{"s": [0, 4]}]), "members"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_what_cannot_be_is_refused(build: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_wrong_subset_is_not_feasible() -> None:
    space = Space(s=Subset(4, 2))
    rows = Population({"s": np.array([[1, 1, 1, 0], [1, 1, 0, 0], [2, 0, 0, 0]], dtype=np.uint8)})
    assert space.is_feasible(rows).tolist() == [False, True, False]
    repaired = space.repair(rows, np.empty((3, 0)))
    assert space.is_feasible(repaired).all()
    assert repaired["s"][1].tolist() == [1, 1, 0, 0]
