"""What is remembered of the last table changes nothing that is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from searchlab.evaluator import Signal
from searchlab.predictor import DRAW_WIDTH, Predictor, Table, table_of
from searchlab.predictors._latest import Latest
from searchlab.predictors.additive import Additive
from searchlab.predictors.gp import GaussianProcess
from searchlab.predictors.local import Local
from searchlab.predictors.stack import Stack
from searchlab.space import Space
from searchlab.variables import Choice, Real

SPACE = Space(x=Choice(range(4), shape=(5,)), y=Real(0, 1, shape=(3,)))
SIGNALS = (Signal("cheap", when="static"),)


def table(n: int, seed: int) -> Table:
    u = np.random.default_rng(seed).random((n, SPACE.sample_width))
    population = SPACE.sample(u)
    cheap = population["y"].sum(axis=1, keepdims=True)
    return table_of(SPACE, population, signals=cheap, of=SIGNALS)


def fitted(kind: Any, seed: int) -> Predictor:
    known = table(30, seed)
    predictor: Predictor = kind()
    predictor.fit(known, known.x[:, 0] + known.signals[:, 0], seed=seed)
    return predictor


def test_the_last_value_is_kept_by_identity() -> None:
    made: list[str] = []
    latest: Latest[str] = Latest()

    def make(name: str) -> Any:
        def made_now() -> str:
            made.append(name)
            return name

        return made_now

    one, other = [1], [1]
    for key, name in ((one, "a"), (one, "b"), (other, "c"), (one, "d")):
        latest.of(key, make(name))
    assert made == ["a", "c", "d"]


def test_a_value_that_could_not_be_made_is_not_kept() -> None:
    latest: Latest[int] = Latest()
    key = object()
    latest.of(key, lambda: 1)
    other = object()
    with pytest.raises(ZeroDivisionError):
        latest.of(other, lambda: 1 // 0)
    assert latest.of(other, lambda: 2) == 2
    assert latest.of(key, lambda: 3) == 3


@pytest.mark.parametrize("kind", [Stack, GaussianProcess, Additive, Local])
def test_what_is_said_does_not_depend_on_what_was_asked_before(kind: Any) -> None:
    one, other = table(40, 5), table(40, 6)
    u = np.random.default_rng(7).random((4, DRAW_WIDTH))
    asked = fitted(kind, 1)
    for first in (one, other, one):
        asked.draw(first, u)
        asked.predict(first)
        asked.rank(first)
    for of in (one, other):
        fresh = fitted(kind, 1)
        np.testing.assert_array_equal(asked.draw(of, u), fresh.draw(of, u))
        for said, wanted in zip(asked.predict(of), fitted(kind, 1).predict(of), strict=True):
            np.testing.assert_array_equal(said, wanted)


@pytest.mark.parametrize("kind", [Stack, GaussianProcess, Additive, Local])
def test_a_new_fit_forgets_what_was_said(kind: Any) -> None:
    known, asked = table(30, 2), table(40, 5)
    again = fitted(kind, 1)
    again.predict(asked)
    again.fit(known, known.x[:, 0] + known.signals[:, 0], seed=2)
    for said, wanted in zip(again.predict(asked), fitted(kind, 2).predict(asked), strict=True):
        np.testing.assert_array_equal(said, wanted)
