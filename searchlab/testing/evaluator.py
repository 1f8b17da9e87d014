"""The conformance suite of evaluators: inherit it, supply the fixtures `evaluator` and `space`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab.evaluator import (
    REPORT_REPLICATE,
    SELECTION_REPLICATE,
    Evaluator,
    identity_digest,
)
from searchlab.executors.base import Chunk, evaluate_chunk
from searchlab.population import OK, STATES, Evaluations, Jobs, Population
from searchlab.space import Space
from searchlab.uniforms import uniforms

__all__ = ["EvaluatorSuite", "jobs_of"]


def jobs_of(space: Space, population: Population, *, fidelity: int = 0, replicate: int = 0) -> Jobs:
    """Jobs of candidates, ids from 0."""
    return Jobs(
        np.arange(len(population)),
        population,
        space.keys(population),
        fidelity=fidelity,
        replicate=replicate,
    )


class EvaluatorSuite:
    """What every evaluator promises; each test states one promise.

    A subclass overrides `evaluator` and `space`, and `population` where random candidates of the
    space are not what should be scored.

    Attributes:
        rows: candidates that a test looks at.
    """

    rows = 8

    @pytest.fixture
    def evaluator(self) -> Evaluator:
        """A new evaluator that was not set up."""
        raise NotImplementedError("override the fixture `evaluator`")

    @pytest.fixture
    def space(self) -> Space:
        """The space whose candidates it scores."""
        raise NotImplementedError("override the fixture `space`")

    @pytest.fixture
    def population(self, space: Space) -> Population:
        """Candidates to score."""
        return space.sample(uniforms(5, 0, 0, self.rows, space.sample_width))

    def values(
        self, evaluator: Evaluator, jobs: Jobs, *, fresh: bool = True
    ) -> NDArray[np.float64]:
        """Values after forgetting what was remembered, so that nothing is compared with itself."""
        if fresh:
            getattr(evaluator, "forget", lambda: None)()
        return evaluator.evaluate(jobs).values

    def test_declares_objectives_and_fidelities(self, evaluator: Evaluator) -> None:
        assert isinstance(evaluator, Evaluator)
        assert evaluator.objectives
        assert len({o.name for o in evaluator.objectives}) == len(evaluator.objectives)
        costs = [fidelity.cost for fidelity in evaluator.fidelities]
        assert costs
        assert costs == sorted(costs)
        assert min(costs) > 0
        assert evaluator.reproducibility in ("exact", "batch", "noisy")

    def test_shapes(self, evaluator: Evaluator, space: Space, population: Population) -> None:
        evaluator.setup()
        for fidelity in range(len(evaluator.fidelities)):
            jobs = jobs_of(space, population, fidelity=fidelity)
            got = evaluator.evaluate(jobs)
            assert isinstance(got, Evaluations)
            assert got.values.shape == (len(jobs), len(evaluator.objectives))
            assert got.values.dtype == np.float64
            assert got.state is not None
            assert set(got.state.tolist()) <= set(range(len(STATES)))
            assert np.isfinite(got.values[got.state == OK]).all()
            assert got.signals is not None
            assert got.signals.shape == (len(jobs), len(evaluator.signals))

    def test_the_same_call_twice(
        self, evaluator: Evaluator, space: Space, population: Population
    ) -> None:
        if evaluator.reproducibility == "noisy":
            pytest.skip("nothing is claimed")
        evaluator.setup()
        jobs = jobs_of(space, population)
        first = self.values(evaluator, jobs)
        np.testing.assert_array_equal(self.values(evaluator, jobs), first)
        np.testing.assert_array_equal(self.values(evaluator, jobs, fresh=False), first)

    def test_exact_values_do_not_depend_on_the_chunk(
        self, evaluator: Evaluator, space: Space, population: Population
    ) -> None:
        if evaluator.reproducibility != "exact":
            pytest.skip("claims it for whole chunks only")
        evaluator.setup()
        jobs = jobs_of(space, population)
        whole = self.values(evaluator, jobs)
        alone = [self.values(evaluator, jobs.take([row]))[0] for row in range(len(jobs))]
        np.testing.assert_array_equal(np.array(alone), whole)
        order = [*range(1, len(jobs), 2), *range(0, len(jobs), 2)][::-1]
        np.testing.assert_array_equal(self.values(evaluator, jobs.take(order)), whole[order])
        half = jobs.take(range(len(jobs) // 2))
        np.testing.assert_array_equal(self.values(evaluator, half), whole[: len(half)])
        np.testing.assert_array_equal(self.values(evaluator, jobs, fresh=False), whole)

    def test_splits_are_scored(
        self, evaluator: Evaluator, space: Space, population: Population
    ) -> None:
        evaluator.setup()
        last = len(evaluator.fidelities) - 1
        some = population.take(np.arange(2))
        for replicate in (SELECTION_REPLICATE, REPORT_REPLICATE, REPORT_REPLICATE + 1):
            jobs = jobs_of(space, some, fidelity=last, replicate=replicate)
            got = evaluator.evaluate(jobs)
            assert got.values.shape == (2, len(evaluator.objectives))

    def test_padding_rows_change_no_number_of_rows(
        self, evaluator: Evaluator, space: Space, population: Population
    ) -> None:
        evaluator.setup()
        jobs = jobs_of(space, population.take(np.arange(3)))
        done = evaluate_chunk(evaluator, Chunk(jobs, rows=16))
        assert len(done.evaluations) == 3
        assert done.evaluations.cost_s is not None
        assert (done.evaluations.cost_s >= 0).all()

    def test_identity_is_json_and_stable(
        self, evaluator: Evaluator, space: Space, population: Population
    ) -> None:
        before = dict(evaluator.identity())
        assert json.loads(json.dumps(before)) == before
        digest = identity_digest(evaluator)
        evaluator.setup()
        evaluator.evaluate(jobs_of(space, population.take(np.arange(1))))
        assert identity_digest(evaluator) == digest
