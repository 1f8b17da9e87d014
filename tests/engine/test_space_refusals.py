"""Every way in which a space, its file or its values can be wrong has a one-line error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from searchlab.budget import LinearBudget
from searchlab.errors import SpaceError
from searchlab.space import Space, space_from_json
from searchlab.testing.space import random_population
from searchlab.variables import ActiveBelow, ActiveIf, Choice, Integer, Ordered, Real

B = LinearBudget
REFUSED_SPACES: list[tuple[str, Any, str]] = [
    ("empty", lambda: Space(), "without variables"),
    ("no variable", lambda: Space({"x": 3}), "'x' is 3"),
    ("unknown", lambda: Space(x=Real(0, 1, when=ActiveIf("y", (1,)))), "not declared before"),
    (
        "later",
        lambda: Space(x=Real(0, 1, when=ActiveIf("y", (1,))), y=Choice((1,))),
        "not declared before",
    ),
    (
        "below a choice",
        lambda: Space(y=Choice((1,)), x=Real(0, 1, shape=2, when=ActiveBelow("y"))),
        "scalar integer",
    ),
    (
        "below without shape",
        lambda: Space(y=Integer(0, 2), x=Real(0, 1, when=ActiveBelow("y"))),
        "scalar integer",
    ),
    (
        "if on an integer",
        lambda: Space(y=Integer(0, 2), x=Real(0, 1, when=ActiveIf("y", (1,)))),
        "no choice",
    ),
    (
        "unknown label",
        lambda: Space(y=Choice((1, 2)), x=Real(0, 1, when=ActiveIf("y", (3,)))),
        r"unknown labels \[3\]",
    ),
    (
        "larger condition",
        lambda: Space(y=Choice((1, 2), shape=3), x=Real(0, 1, when=ActiveIf("y", (1,)))),
        "depends on shape",
    ),
    (
        "shapes that do not meet",
        lambda: Space(y=Choice((1, 2), shape=3), x=Real(0, 1, shape=2, when=ActiveIf("y", (1,)))),
        "depends on shape",
    ),
    (
        "ordered with holes",
        lambda: Space(y=Choice((1, 2), shape=3), x=Ordered(3, 0, 1, when=ActiveIf("y", (1,)))),
        "active values come first",
    ),
    (
        "equal names",
        lambda: Space(x=Choice((1, 2)), constraints=[B({"x": [0, 1]}, 1), B({"x": [0, 1]}, 1)]),
        "equal names",
    ),
    (
        "budget on nothing",
        lambda: Space(x=Choice((1, 2)), constraints=[B({"y": [0, 1]}, 1)]),
        "names 'y'",
    ),
    (
        "wrong table",
        lambda: Space(x=Choice((1, 2)), constraints=[B({"x": [0, 1, 2]}, 1)]),
        r"shape \(3,\); allowed: \(2,\)",
    ),
    (
        "wrong integer table",
        lambda: Space(x=Integer(0, 3), constraints=[B({"x": [0, 1]}, 1)]),
        r"shape \(2,\); allowed: \(\)",
    ),
    (
        "budget on a real",
        lambda: Space(x=Real(0, 1), constraints=[B({"x": 1}, 1)]),
        "is a real",
    ),
    (
        "too small",
        lambda: Space(
            x=Choice((2, 4), shape=3), constraints=[B({"x": [2, 4]}, upper=5, name="bits")]
        ),
        r"'bits' allows \[-inf, 5.0\] but every candidate lies in \[6, 12\]",
    ),
    (
        "too large",
        lambda: Space(x=Integer(1, 3, shape=2), constraints=[B({"x": 2}, np.inf, lower=13)]),
        r"lies in \[4, 12\]",
    ),
    (
        "negative and out of reach",
        lambda: Space(x=Choice((0, 1)), constraints=[B({"x": [-2, -1]}, np.inf, lower=0)]),
        r"lies in \[-2, -1\]",
    ),
    ("empty table", lambda: B({}, 1), "empty table"),
    ("costs", lambda: B({"x": [0, np.nan]}, 1), "not all finite"),
    ("text", lambda: B({"x": ["a"]}, 1), "allowed: numbers"),
    ("ragged", lambda: B({"x": [[1], [1, 2]]}, 1), "allowed: numbers"),
    ("bounds", lambda: B({"x": [0, 1]}, 1, lower=2), "lower 2 > upper 1"),
    ("nan bound", lambda: B({"x": [0, 1]}, float("nan")), "upper nan"),
    ("offset", lambda: B({"x": [0, 1]}, 1, offset=np.inf), "offset inf"),
]


@pytest.mark.parametrize(
    ("build", "message"), [case[1:] for case in REFUSED_SPACES], ids=[c[0] for c in REFUSED_SPACES]
)
def test_a_space_that_cannot_be_is_refused(build: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_budgets_that_exclude_each_other_are_named() -> None:
    space = Space(
        x=Choice((0, 1), shape=(4,)),
        constraints=[
            LinearBudget({"x": [0, 1]}, upper=1, name="few"),
            LinearBudget({"x": [1, 0]}, upper=1, name="many"),
        ],
    )
    with pytest.raises(SpaceError, match=r"no candidate keeps the constraints 'few', 'many'"):
        random_population(space, 3)


REFUSED_FILES: list[tuple[Any, str]] = [
    ([], "needs a mapping 'variables'"),
    ({"variables": []}, "needs a mapping 'variables'"),
    ({"variables": {"x": {"real": [0, 1]}}, "more": 1}, r"keys \['more'\]"),
    ({"variables": {"x": 3}}, "variable 'x' is 3"),
    ({"variables": {"x": {}}}, "exactly one of"),
    ({"variables": {"x": {"real": [0, 1], "integer": [0, 1]}}}, "exactly one of"),
    ({"variables": {"x": {"real": [0, 1], 7: 1}}}, r"keys \['7'\]"),
    ({"variables": {"x": {"choice": [0, 1], "step": 0.1}}}, r"keys \['step'\]"),
    ({"variables": {"x": {"real": [0]}}}, "variable 'x' cannot be read"),
    ({"variables": {"x": {"real": ["a", 1]}}}, "variable 'x' cannot be read"),
    ({"variables": {"x": {"real": [1, 0]}}}, "variable 'x': real range"),
    ({"variables": {"x": {"integer": [0.5, 2]}}}, "whole numbers"),
    ({"variables": {"x": {"choice": "abc"}}}, "a list of JSON values"),
    ({"variables": {"x": {"choice": 3}}}, "a list of JSON values"),
    ({"variables": {"x": {"ordered": [3, 0, 1]}}}, "ordered .* a mapping of"),
    ({"variables": {"x": {"ordered": {"n": 3, "low": 0, "top": 1}}}}, "ordered .* a mapping of"),
    ({"variables": {"x": {"ordered": {"n": 3, "low": 0}}}}, "variable 'x' cannot be read"),
    ({"variables": {"x": {"real": [0, 1], "when": ["y"]}}}, "condition 'y'"),
    ({"variables": {"x": {"real": [0, 1], "when": [{"variable": "y"}]}}}, "condition"),
    (
        {"variables": {"x": {"real": [0, 1], "when": [{"variable": "y", "labels": "ab"}]}}},
        "condition",
    ),
    ({"variables": {"x": {"choice": [0, 1]}}, "constraints": ["x"]}, "constraint 'x'"),
    ({"variables": {"x": {"choice": [0, 1]}}, "constraints": [{"upper": 1}]}, "cannot be read"),
    (
        {"variables": {"x": {"choice": [0, 1]}}, "constraints": [{"table": [1], "upper": 1}]},
        "allowed: a mapping",
    ),
    (
        {
            "variables": {"x": {"choice": [0, 1]}},
            "constraints": [{"table": {"x": [0, 1]}, "upper": -1}],
        },
        "every candidate",
    ),
]


@pytest.mark.parametrize(("data", "message"), REFUSED_FILES)
def test_a_space_file_that_cannot_be_read_is_refused(data: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        space_from_json(data)
    assert "\n" not in str(caught.value)


def test_a_space_file_reads_what_yaml_gives() -> None:
    space = space_from_json(
        {
            "name": "serving",
            "variables": {
                "dtype": {"choice": ["auto", "fp8"]},
                "layers": {"choice": [2, 4, 8], "shape": 4},
                "scale": {"real": ["1e-3", 1], "when": {"variable": "dtype", "labels": ["fp8"]}},
            },
            "constraints": [{"table": {"layers": [2, 4, 8]}, "upper": 20, "name": "bits"}],
        }
    )
    assert space.name == "serving"
    assert space.variables["layers"].shape == (4,)
    assert space.variables["scale"].when == (ActiveIf("dtype", ("fp8",)),)
    assert space.is_feasible(random_population(space, 50)).all()


REFUSED_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"a": 1}, "allowed"),
    ({"a": 9, "n": 1, "x": [0.5, 0.5]}, "variable 'a': label 9"),
    ({"a": 1, "n": 1.5, "x": [0.5, 0.5]}, "variable 'n': value 1.5 .* whole numbers"),
    ({"a": 1, "n": "1", "x": [0.5, 0.5]}, "variable 'n': value '1'"),
    ({"a": 1, "n": 1, "x": [0.5]}, r"variable 'x': value of shape \(1,\)"),
    ({"a": 1, "n": 1, "x": [0.5, [1]]}, "variable 'x': cannot read"),
    ({"a": 1, "n": 1, "x": [0.5, float("nan")]}, "variable 'x': value .* finite numbers"),
    ({"a": 1, "n": 1, "x": [0.5, float("inf")]}, "variable 'x': value .* finite numbers"),
    ({"a": 1, "n": 1, "x": [0.5, None]}, "variable 'x'"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED_VALUES)
def test_values_that_are_not_of_the_space_are_refused(values: dict[str, Any], message: str) -> None:
    space = Space(a=Choice((1, 2)), n=Integer(0, 3), x=Real(0, 1, shape=(2,)))
    with pytest.raises(SpaceError, match=message):
        space.population([values])


def test_stored_rows_of_another_space_are_refused() -> None:
    space, other = Space(x=Real(0, 1)), Space(x=Real(0, 1, shape=(2,)))
    with pytest.raises(SpaceError, match="not of this space"):
        space.unpack(other.pack(random_population(other, 2)))
