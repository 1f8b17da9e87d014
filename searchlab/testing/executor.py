"""The conformance suite of executors: inherit it, supply the fixture `executor`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from searchlab.evaluator import Evaluator, FunctionEvaluator
from searchlab.executors.base import Chunk, Done, Executor
from searchlab.population import FAILED, OK
from searchlab.space import Space
from searchlab.testing.evaluator import jobs_of
from searchlab.uniforms import uniforms
from searchlab.variables import Choice, Integer

__all__ = ["ExecutorSuite", "collect"]


def _space() -> Space:
    return Space(a=Integer(0, 99), b=Choice((1, 2, 3)))


def double(a: int, b: int) -> float:
    """A function that a worker process can import."""
    return 2.0 * a + b


def broken(plans: list[dict[str, int]], fidelity: str, seed: int) -> list[float]:
    """A population function that always fails."""
    raise ValueError("two\nlines")


def short(plans: list[dict[str, int]], fidelity: str, seed: int) -> list[float]:
    """A population function that forgets a candidate."""
    return [0.0] * (len(plans) - 1)


def evaluators() -> tuple[Evaluator, ...]:
    """A good one, one that raises, and one that answers with too few rows."""
    space = _space()
    return (
        FunctionEvaluator(double, space),
        FunctionEvaluator(broken, space, batch=True),
        FunctionEvaluator(short, space, batch=True),
    )


def chunk(first: int, n: int, evaluator: int = 0, rows: int = 0) -> Chunk:
    """Candidates first .. first + n - 1 of a fixed list."""
    space = _space()
    population = space.sample(uniforms(0, 0, first, n, space.sample_width))
    jobs = jobs_of(space, population)
    return Chunk(
        type(jobs)(np.arange(first, first + n), jobs.population, jobs.keys, fidelity=0),
        evaluator,
        rows,
    )


def collect(executor: Executor, n: int, *, waits: int = 1000) -> list[Done]:
    """Waits until n chunks are done."""
    out: list[Done] = []
    for _ in range(waits):
        out += executor.wait(0.5)
        if len(out) >= n:
            return out
    raise AssertionError(f"{len(out)} of {n} chunks after {waits} waits")


class ExecutorSuite:
    """What every executor promises. A subclass overrides the fixture `executor`."""

    @pytest.fixture
    def executor(self) -> Executor:
        """A new executor that was not started."""
        raise NotImplementedError("override the fixture `executor`")

    @pytest.fixture
    def started(self, executor: Executor) -> Iterator[Executor]:
        """The executor, started with the evaluators of this module."""
        executor.start(evaluators())
        yield executor
        executor.close()

    def test_has_workers_and_room(self, started: Executor) -> None:
        assert started.workers >= 1
        assert started.has_room()

    def test_nothing_submitted_nothing_finished(self, started: Executor) -> None:
        assert started.wait(0.01) == []

    def test_every_chunk_comes_back_once_with_its_values(self, started: Executor) -> None:
        chunks = [chunk(4 * i, 4) for i in range(6)]
        for given in chunks:
            started.submit(given)
        done = collect(started, len(chunks))
        assert len(done) == len(chunks)
        first = sorted(int(part.chunk.jobs.ids[0]) for part in done)
        assert first == [0, 4, 8, 12, 16, 20]
        for part in done:
            columns = part.chunk.jobs.population.columns
            wanted = 2.0 * columns["a"] + (columns["b"] + 1)
            np.testing.assert_array_equal(part.evaluations.values[:, 0], wanted)
            assert part.finished >= part.started > 0
            assert part.attempts >= 1
            assert part.worker
        assert started.wait(0.01) == []

    def test_each_chunk_goes_to_its_evaluator(self, started: Executor) -> None:
        started.submit(chunk(0, 2, evaluator=0))
        started.submit(chunk(2, 2, evaluator=1))
        by_evaluator = {part.chunk.evaluator: part for part in collect(started, 2)}
        good, bad = by_evaluator[0].evaluations.state, by_evaluator[1].evaluations.state
        assert good is not None
        assert bad is not None
        assert good.tolist() == [OK, OK]
        assert bad.tolist() == [FAILED, FAILED]

    def test_an_exception_is_a_result_with_a_reason_of_one_line(self, started: Executor) -> None:
        started.submit(chunk(0, 3, evaluator=1))
        (done,) = collect(started, 1)
        assert done.evaluations.reason == ["ValueError: two lines"] * 3
        started.submit(chunk(3, 1))
        assert len(collect(started, 1)) == 1

    def test_a_wrong_number_of_rows_is_a_failure(self, started: Executor) -> None:
        started.submit(chunk(0, 3, evaluator=2))
        (done,) = collect(started, 1)
        assert done.evaluations.state is not None
        assert done.evaluations.state.tolist() == [FAILED] * 3
        assert done.evaluations.values.shape == (3, 1)

    def test_padding_does_not_come_back(self, started: Executor) -> None:
        started.submit(chunk(0, 3, rows=16))
        (done,) = collect(started, 1)
        assert len(done.evaluations) == 3

    def test_close_twice(self, executor: Executor) -> None:
        executor.start(evaluators())
        executor.submit(chunk(0, 1))
        executor.close()
        executor.close()
