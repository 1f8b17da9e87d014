"""`refined`: the suite with and without old scores, and who wins when."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from searchlab.predictor import Table
from searchlab.predictors.gp import GaussianProcess
from searchlab.predictors.transfer import PREDICTED, Refined
from searchlab.testing.predictor import PredictorSuite, labelled, plain_space, tau


class TestRefinedWithoutOldScores(PredictorSuite):
    @pytest.fixture
    def build(self):
        return lambda: Refined(new="ridge")


class TestRefined(PredictorSuite):
    """The first signal is taken for the old scores."""

    @pytest.fixture
    def build(self):
        return lambda: Refined(prior="s0", new="ridge")


def with_old(table: Table, scores: np.ndarray) -> Table:
    return replace(
        table,
        signals=np.concatenate([table.signals, scores[:, None]], axis=1),
        signal_names=(*table.signal_names, PREDICTED),
        directions=(*table.directions, "min"),
    )


def reached(n: int, *, error: float, signals: int = 0) -> tuple[float, float, float]:
    """Tau of the old scores, of a fit from scratch, and of both joined, after n labels."""
    table, losses = labelled(plain_space(), n, signals=signals)
    fresh, truth = labelled(plain_space(), 300, first=900, signals=signals)
    generator = np.random.default_rng(0)
    sd = truth.std()

    def old(values: np.ndarray) -> np.ndarray:
        if np.isinf(error):
            return generator.normal(size=len(values))
        return np.exp((values + error * sd * generator.normal(size=len(values))) / sd)

    wide, fresh_wide = with_old(table, old(losses)), with_old(fresh, old(truth))
    scratch = GaussianProcess()
    scratch.fit(table, losses, seed=0)
    warm = Refined(new="gp")
    warm.fit(wide, losses, seed=0, pool=fresh_wide)
    return (
        tau(fresh_wide.signals[:, -1], truth),
        tau(scratch.rank(fresh), truth),
        tau(warm.rank(fresh_wide), truth),
    )


@pytest.mark.parametrize("n", [6, 12, 25])
def test_few_labels_do_not_overrule_good_old_scores(n: int) -> None:
    old, scratch, both = reached(n, error=0.3)
    assert old > scratch + 0.1
    assert both > old - 0.01


@pytest.mark.parametrize("n", [25, 60])
def test_old_scores_that_say_nothing_are_left_aside(n: int) -> None:
    old, scratch, both = reached(n, error=np.inf, signals=1)
    assert abs(old) < 0.1
    assert both > scratch - 0.05


def test_many_labels_correct_old_scores() -> None:
    old, _, both = reached(150, error=1.0)
    assert both > old + 0.1


def test_an_old_score_that_is_missing_leaves_the_fit_from_scratch() -> None:
    table, losses = labelled(plain_space(), 30, signals=2)
    warm = Refined(prior="s0", new="ridge")
    warm.fit(table, losses, seed=0)
    columns = table.signals.copy()
    columns[3, 0] = np.nan
    said = warm.rank(replace(table, signals=columns))
    assert said[3] == pytest.approx(warm.fresh.predict(warm._bare(table))[0][3])
    rest = np.arange(30) != 3
    assert np.allclose(said[rest], warm.rank(table)[rest], rtol=0.05, atol=0.05)


class Silent(GaussianProcess):
    """It does not tell what it says of labels held out."""

    def held_out(self) -> None:
        return None


def test_what_cannot_be_judged_is_believed_as_before() -> None:
    table, losses = labelled(plain_space(), 40, signals=2)
    warm = Refined(prior="s0", make=Silent)
    warm.fit(table, losses, seed=0)
    assert warm.belief == pytest.approx(0.9)
    assert warm.share == 0.0
    assert warm.held_out() is not None
