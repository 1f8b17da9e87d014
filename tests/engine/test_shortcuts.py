"""What is quicker gives the same: proposals ahead, arrays as bytes, a thread that stands in."""

from __future__ import annotations

import pickle
import time
from typing import Any

import numpy as np
import pytest

from searchlab._stage_asked import AskedAt
from searchlab.algorithms import Evolution
from searchlab.algorithms.evolution import ParentRule
from searchlab.executors import ProcessExecutor
from searchlab.population import FAILED, Evaluations, Jobs, Population
from searchlab.study import MemoryRun
from searchlab.testing.algorithm import SPACES, proposals, sampled_seeds, told_of
from searchlab.testing.executor import GOOD, chunk, evaluators

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "threshold": {"parents": ParentRule("threshold", margin=0.1)},
    "race": {"race": True},
    "allow": {"repeats": "allow"},
}


class OneByOne(Evolution):
    """Never draws ahead, as what a subclass draws from is not known."""


def _lagged(algorithm: Evolution, n: int, lag: int) -> list[Jobs]:
    waiting: list[tuple[int, Jobs]] = []
    out: list[Jobs] = []
    for i in range(n):
        while waiting and waiting[0][0] <= i - lag:
            jobs = waiting.pop(0)[1]
            algorithm.tell(told_of(algorithm.space, jobs, 7))
        jobs = algorithm.ask(i, 1)
        waiting.append((i, jobs))
        out.append(jobs)
    return out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("lag", [1, 9])
def test_drawing_ahead_changes_nothing(space: Any, options: dict[str, Any], lag: int) -> None:
    kinds = (Evolution, OneByOne)
    ahead, plain = (
        _lagged(kind(space(), seed=3, seeds=sampled_seeds(space(), 2), **options), 90, lag)
        for kind in kinds
    )
    assert proposals(ahead) == proposals(plain)
    for left, right in zip(ahead, plain, strict=True):
        assert left.population.equals(right.population)
        assert (left.origin, left.told_at_ask) == (right.origin, right.told_at_ask)
        assert np.array_equal(left.parents, right.parents)  # type: ignore[arg-type]
        if left.bound is not None and right.bound is not None:
            assert np.array_equal(left.bound, right.bound, equal_nan=True)


def test_ids_are_drawn_ahead_while_nothing_is_learnt() -> None:
    algorithm, sizes = Evolution(SPACES["plain"](), seed=1), []
    draw = algorithm._draw
    algorithm._draw = lambda ids, u, s: sizes.append(len(ids)) or draw(ids, u, s)  # type: ignore
    for i in range(62):
        algorithm.ask(i, 1)
    firsts = [size for size in sizes if size > 1]
    assert firsts == [2, 4, 8, 16, 32]


def test_jobs_and_evaluations_arrive_as_they_were_sent() -> None:
    population = Population({"a": np.arange(6).reshape(3, 2), "b": np.empty((3, 0), np.float32)})
    jobs = Jobs(
        np.arange(4, 7), population, (b"a", b"b", b"c"), 1, 2, 3, 4,
        bound=np.array([1.0, np.nan, -0.0]), origin=("x", "y", "z"), parents=np.ones((3, 2), int),
    )  # fmt: skip
    back = pickle.loads(pickle.dumps(jobs))
    assert back.population.equals(population)
    assert [column.dtype for column in back.population.columns.values()] == [np.int64, np.float32]
    assert not back.population["a"].flags.writeable
    assert back.bound.tobytes() == jobs.bound.tobytes()  # type: ignore[union-attr]
    assert back.predicted is None
    for name in ("keys", "fidelity", "replicate", "stage", "told_at_ask", "origin"):
        assert getattr(back, name) == getattr(jobs, name)
    given = Evaluations(
        np.array([1.0, np.nan, 3.0]), items=[None, np.ones(2), None], notes={"traceback": "t"}
    )
    got = pickle.loads(pickle.dumps(given))
    assert got.values.tobytes() == given.values.tobytes()
    assert got.state.tolist() == [0, FAILED, 0]
    assert (got.reason, got.notes, got.std_error) == (given.reason, given.notes, None)
    assert got.items[1].tolist() == [1.0, 1.0]
    got.cost_s += 1.0  # as writeable as it was


def test_what_groups_were_told_survives_in_blocks() -> None:
    store = MemoryRun()
    asked = AskedAt(store, 2, quantum=2)
    for number in range(200):
        asked.note(10 + 2 * number, number)
    asked.keep(300)
    asked.note(500, 7)
    asked.keep(450)
    store.commit()
    again = AskedAt(store, 2, quantum=2)
    again.load()
    assert [again.get(10 + 2 * number) for number in range(123, 200)] == list(range(123, 200))
    assert again.get(500) == 7
    assert again.get(502) is None


def test_what_was_kept_in_one_piece_is_read() -> None:
    store = MemoryRun()
    store.set_meta("asked:0", {"3": 1, "900": 5})
    asked = AskedAt(store, 0, quantum=1)
    asked.load()
    assert (asked.get(3), asked.get(900), asked.get(4)) == (1, 5, None)


def test_workers_are_fed_while_the_driver_is_away() -> None:
    executor = ProcessExecutor(workers=1)
    executor.start(evaluators()[: GOOD + 1])
    try:
        for first in range(4):
            executor.submit(chunk(first, 1))
        time.sleep(1.0)  # the driver learns, and asks for nothing
        done = executor.wait(0)
    finally:
        executor.close()
    assert sorted(int(item.chunk.jobs.ids[0]) for item in done) == [0, 1, 2, 3]
