"""Numeric labels as numbers, and forests that read them and learn losses."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab.predictor import Table, table_of
from searchlab.predictors.forest import Forest
from searchlab.predictors.label_numbers import number_columns, numbers_of
from searchlab.predictors.preprocess import Inputs, Labels
from searchlab.predictors.stack import Stack
from searchlab.space import Space
from searchlab.variables import Choice, Real

STEPS = (5, 10, 20, 50)
SPACE = Space(
    model=Choice(("a", "b", "c")),
    steps=Choice(STEPS),
    sparse=Choice((True, False, None)),
    layers=Choice((1, 2, 3), shape=(4,)),
    scale=Real(0, 1),
)
VARIABLES = SPACE.variables


def table(n: int, seed: int = 0) -> Table:
    u = np.random.default_rng(seed).random((n, SPACE.sample_width))
    return table_of(SPACE, SPACE.sample(u))


def losses(of: Table) -> NDArray[np.float64]:
    """A slope in the steps, and some candidates that are far worse."""
    steps = of.x @ number_columns(SPACE)[:, 0]
    bad = of.x[:, 0] * of.x[:, 3]  # model a in 5 steps
    return np.asarray(-steps + 100.0 * bad, dtype=np.float64)


def test_numbers_are_those_of_single_choices_among_three_and_more() -> None:
    logs = np.log(STEPS)
    numbers = numbers_of(VARIABLES["steps"])
    assert numbers is not None
    np.testing.assert_allclose(numbers, (logs - logs.mean()) / logs.std())
    near = numbers_of(Choice((10, 11, 12)))  # less than four times apart: no logs
    assert near is not None
    np.testing.assert_allclose(np.diff(near), np.diff(near)[0])
    for name in ("model", "sparse", "layers", "scale"):
        assert numbers_of(VARIABLES[name]) is None
    assert numbers_of(Choice((1, 2))) is None


def test_columns_give_the_number_of_each_candidate() -> None:
    some = table(20)
    columns = number_columns(SPACE)
    assert columns.shape == (SPACE.code_width, 1)
    numbers = numbers_of(VARIABLES["steps"])
    assert numbers is not None
    u = np.random.default_rng(0).random((20, SPACE.sample_width))
    steps = [values["steps"] for values in SPACE.decode(SPACE.sample(u))]
    wanted = [numbers[STEPS.index(value)] for value in steps]
    np.testing.assert_allclose((some.x @ columns)[:, 0], wanted, rtol=1e-6)
    assert number_columns(Space(x=Choice(("a", "b")))).shape == (2, 0)


@pytest.mark.parametrize("learnt", ["targets", "losses"])
def test_what_a_forest_says_is_a_target(learnt: str) -> None:
    known, new = table(40), table(200, seed=1)
    labels = Labels(losses(known), "ranks")
    inputs = Inputs(known)
    of = labels if learnt == "losses" else None
    forest = Forest(trees=30, share=1.0, numbers=number_columns(SPACE), labels=of)
    forest._learn(inputs(known), labels.targets, seed=0)
    mean, sd = forest._scores(inputs(new))
    low, high = labels.targets.min() - 1e-9, labels.targets.max() + 1e-9
    assert low <= mean.min() < mean.max() <= high
    assert (sd > 0).all()
    assert np.corrcoef(mean, Labels(losses(new), "ranks").targets)[0, 1] > 0.8
    config, arrays = forest._state()
    again = Forest()
    again._restore(config, arrays)
    for one, other in zip((mean, sd), again._scores(inputs(new)), strict=True):
        np.testing.assert_array_equal(one, other)
    u = np.random.default_rng(2).random((5, 3))
    np.testing.assert_array_equal(
        forest._draw(inputs(new), u[:, :1].repeat(2, axis=1)),
        again._draw(inputs(new), u[:, :1].repeat(2, axis=1)),
    )


def test_a_forest_in_a_stack_learns_losses_where_several_variables_vary() -> None:
    several = Stack()
    several.fit(table(30), losses(table(30)), seed=0)
    forest = several.members["rf"]
    assert isinstance(forest, Forest)
    assert forest.share == 1.0
    assert forest._knots is not None
    assert several.weights[list(several.members).index("rf")] > 0.1
    single = Space(x=Choice(range(4), shape=(6,)))
    u = np.random.default_rng(0).random((30, single.sample_width))
    some = table_of(single, single.sample(u))
    alone = Stack()
    alone.fit(some, some.x[:, 0].astype(np.float64), seed=0)
    other = alone.members["rf"]
    assert isinstance(other, Forest)
    assert other.share < 1.0
    assert other._knots is None
