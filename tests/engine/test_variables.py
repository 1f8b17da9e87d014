"""Variables: bounds, gaps, mutation, decoding and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchlab.errors import SpaceError
from searchlab.uniforms import uniforms
from searchlab.variables import ActiveIf, Choice, Integer, Ordered, Real, Variable

FLOATS = st.floats(-1e6, 1e6)
SHAPES = st.sampled_from([(), (1,), (3,), (2, 2)])


@st.composite
def variables(draw: st.DrawFn) -> Variable:
    kind = draw(st.sampled_from(["choice", "integer", "real", "ordered"]))
    shape = draw(SHAPES)
    if kind == "choice":
        return Choice(range(draw(st.sampled_from([1, 2, 5, 256, 257]))), shape=shape)  # type: ignore[arg-type]
    if kind == "integer":
        low = draw(st.integers(-1000, 1000))
        return Integer(low, low + draw(st.integers(0, 50)), shape=shape)
    low, high = sorted((draw(FLOATS), draw(FLOATS)))
    if kind == "real":
        return Real(low, high, shape=shape)
    n = draw(st.integers(1, 6))
    gap = draw(st.floats(0, 0.999)) * (high - low) / max(1, n - 1)
    return Ordered(n, low, high, gap)


@settings(max_examples=200, deadline=None)
@given(variable=variables(), seed=st.integers(0, 2**32))
def test_samples_and_mutants_are_valid(variable: Variable, seed: int) -> None:
    n = 12
    active = np.ones((n, *variable.shape), dtype=bool)
    values = variable.sample(uniforms(seed, 0, 0, n, variable.width))
    assert values.dtype == variable.dtype
    assert variable.valid(values, active).all()
    mutants = variable.mutate(values, active, uniforms(seed, 1, 0, n, variable.width))
    assert mutants.dtype == variable.dtype
    assert variable.valid(mutants, active).all()


@settings(max_examples=100, deadline=None)
@given(variable=variables(), seed=st.integers(0, 2**32))
def test_values_survive_decoding(variable: Variable, seed: int) -> None:
    for value in variable.sample(uniforms(seed, 0, 0, 4, variable.width)):
        value = np.asarray(value)
        np.testing.assert_array_equal(variable.encode_labels(variable.decode(value)), value)


@given(labels=st.integers(2, 300), seed=st.integers(0, 999))
def test_a_mutated_choice_never_keeps_its_value(labels: int, seed: int) -> None:
    variable = Choice(range(labels), shape=(20,))  # type: ignore[arg-type]
    values = variable.sample(uniforms(seed, 0, 0, 3, 20))
    mask = uniforms(seed, 1, 0, 3, 20) < 0.5
    moved = variable.mutate(values, mask, uniforms(seed, 2, 0, 3, 20))
    np.testing.assert_array_equal(moved != values, mask)


@given(span=st.integers(1, 40), seed=st.integers(0, 999))
def test_a_mutated_integer_never_keeps_its_value(span: int, seed: int) -> None:
    variable = Integer(-3, span - 3, shape=(20,))
    values = variable.sample(uniforms(seed, 0, 0, 3, 20))
    moved = variable.mutate(values, np.ones((3, 20), bool), uniforms(seed, 2, 0, 3, 20))
    assert (moved != values).all()


@pytest.mark.parametrize("variable", [Choice(range(5)), Integer(0, 6)], ids=["choice", "integer"])
def test_mutation_reaches_every_other_value(variable: Variable) -> None:
    start = np.full(4000, 2, dtype=variable.dtype)
    moved = variable.mutate(start, np.ones(4000, bool), uniforms(0, 0, 0, 4000, 1))
    last = 4 if isinstance(variable, Choice) else 6
    assert set(moved.tolist()) == set(range(last + 1)) - {2}


def test_samples_of_a_choice_are_uniform() -> None:
    values = Choice(range(4)).sample(uniforms(0, 0, 0, 8000, 1))
    # 2,000 each, standard deviation 39.
    assert np.abs(np.bincount(values) - 2000).max() < 6 * 39


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 6),
    count=st.integers(0, 6),
    tightness=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_an_active_prefix_keeps_its_gaps(n: int, count: int, tightness: float, seed: int) -> None:
    count = min(n, count)
    variable = Ordered(n, 0.001, 1.0, 0.999 * tightness / max(1, n - 1) * (1 - 1e-12))
    active = np.broadcast_to(np.arange(n) < count, (8, n))
    sampled = variable.sample(uniforms(seed, 0, 0, 8, n), active)
    moved = variable.mutate(sampled, np.array(active), uniforms(seed, 1, 0, 8, n), active)
    wild = uniforms(seed, 2, 0, 8, n) * 4 - 2
    for values in (sampled, moved, variable.repair(wild, active)):
        head = values[:, :count]
        assert ((head >= variable.low) & (head <= variable.high)).all()
        assert (np.diff(head, axis=1) >= variable.gap - 1e-9).all()
        assert (values[:, count:] == variable.high).all()
        assert variable.valid(values, active).all()


def test_ordered_samples_spread_over_the_whole_range() -> None:
    values = Ordered(3, 0, 1, 0.1).sample(uniforms(0, 0, 0, 20_000, 3))
    # Uniform order statistics on the slack [0, 0.8]: means 0.2, 0.4, 0.6, plus 0, 0.1, 0.2.
    np.testing.assert_allclose(values.mean(axis=0), [0.2, 0.5, 0.8], atol=0.01)


def test_ordered_repair_leaves_valid_rows_alone() -> None:
    variable = Ordered(4, 0, 1, 0.05)
    values = variable.sample(uniforms(5, 0, 0, 50, 4))
    np.testing.assert_allclose(variable.repair(values), values, rtol=0, atol=1e-15)


def test_repair_clips() -> None:
    np.testing.assert_array_equal(Integer(0, 3).repair(np.array([-2, 1, 9])), [0, 1, 3])
    np.testing.assert_array_equal(Real(0, 1).repair(np.array([-2, 0.5, 9])), [0, 0.5, 1])
    np.testing.assert_array_equal(Choice(("a", "b")).repair(np.array([0, 7])), [0, 1])


def test_encodings() -> None:
    on = np.ones((1, 2), dtype=bool)
    some = np.array([[True, False]])
    choice, real = Choice((5, 6, 7), shape=2), Real(2, 4, shape=2)  # type: ignore[arg-type]
    codes = np.array([[2, 0]], dtype=np.uint8)
    assert choice.encode(codes, on).tolist() == [[0, 0, 1, 1, 0, 0]]
    assert choice.encode(codes, some).tolist() == [[0, 0, 1, 0, 0, 0]]
    assert real.encode(np.array([[2.5, 4.0]]), some).tolist() == [[0.25, 0.0]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Choice(()), "without labels"),
        (lambda: Choice((1, 2, 1)), "repeat"),
        (lambda: Choice((1, True)), "repeat"),
        (lambda: Choice((1, 1.0)), "repeat"),
        (lambda: Choice("abc"), "a list of JSON values"),
        (lambda: Choice(3), "a list of JSON values"),
        (lambda: Choice((object(),)), "allowed: JSON values"),
        (lambda: Choice((float("nan"),)), "allowed: JSON values"),
        (lambda: Choice((1, 2), shape=(2, 0)), r"shape \(2, 0\)"),
        (lambda: Choice((1, 2), shape=(1.5,)), r"shape \(1.5,\)"),
        (lambda: Choice((1, 2), shape="3"), "shape '3'"),
        (lambda: Choice((1, 2), when="x"), "condition 'x'"),
        (lambda: Integer(2, 1), "integer range"),
        (lambda: Integer(0.5, 1), "whole numbers"),
        (lambda: Integer(0, float("inf")), "integer range"),
        (lambda: Integer(float("nan"), 2), "integer range"),
        (lambda: Real(1, 0), "real range"),
        (lambda: Real(0, float("inf")), "real range"),
        (lambda: Real(-1e308, 1e308), "real range"),
        (lambda: Real(0, 1, sigma=0), "sigma 0"),
        (lambda: Real(0, 1, sigma=2), "sigma 2"),
        (lambda: Real(0, 1, default=float("nan")), "default nan"),
        (lambda: Ordered(0, 0, 1), "ordered of 0 values"),
        (lambda: Ordered(2.5, 0, 1), "ordered of 2.5 values"),
        (lambda: Ordered(2, 0, float("nan")), "ordered range"),
        (lambda: Ordered(2, 0, 1, -0.1), "with gap -0.1"),
        (lambda: Ordered(2, 0, 1, sigma=0), "sigma 0"),
        (lambda: Ordered(4, 0, 1, 0.4), "do not fit"),
        (lambda: Ordered(2, 1, 0), "do not fit"),
    ],
)
def test_a_variable_that_cannot_be_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_lists_and_single_conditions_are_accepted() -> None:
    condition = ActiveIf("y", (1,))
    variable = Choice([1, 2], shape=[2, 3], when=[condition])  # type: ignore[arg-type]
    assert variable.labels == (1, 2)
    assert variable.shape == (2, 3)
    assert variable.when == (condition,)
    assert Real(0, 1, when=condition).when == (condition,)  # type: ignore[arg-type]
