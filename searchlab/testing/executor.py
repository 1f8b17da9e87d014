"""The conformance suites of executors: inherit one, supply its fixtures."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from searchlab.evaluator import Evaluator, FunctionEvaluator
from searchlab.executors.base import Chunk, Done, Executor, evaluate_chunk, usage_of
from searchlab.population import FAILED, OK, Evaluations, Jobs
from searchlab.space import Space
from searchlab.testing.evaluator import jobs_of
from searchlab.uniforms import uniforms
from searchlab.variables import Choice, Integer

__all__ = ["ExecutorSuite", "IsolatingExecutorSuite", "collect"]


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


def leaves(plans: list[dict[str, int]], fidelity: str, seed: int) -> list[float]:
    """A population function that wants to end its process."""
    sys.exit("enough")


def odd(a: int, b: int) -> float:
    """A function that fails for some candidates."""
    return 1.0 / (a % 2)


def neighbours(plans: list[dict[str, int]], fidelity: str, seed: int) -> list[float]:
    """A population function whose values depend on all rows and their order."""
    values, out = 0.0, []
    for plan in plans:
        values = 0.7 * values + plan["a"] + 0.1 * len(plans)
        out.append(values)
    return out


class Counting(FunctionEvaluator):
    """Counts its calls until it is told to forget."""

    calls = 0

    def forget(self) -> None:
        """Begins to count anew."""
        self.calls = 0

    def evaluate(self, jobs: Jobs) -> Evaluations:
        """The number of this call, for every job; fails where columns can be written to."""
        self.calls += 1
        if any(column.flags.writeable for column in jobs.population.columns.values()):
            raise ValueError("writeable columns")
        return Evaluations(np.full(len(jobs), float(self.calls)))


class Large(FunctionEvaluator):
    """Runs out of memory with more than `FITS` rows at once; says with how many it was called."""

    micro_batch = 32

    def evaluate(self, jobs: Jobs) -> Evaluations:
        """100 times the number of jobs, and the micro-batch."""
        if min(self.micro_batch, len(jobs)) > FITS:
            raise MemoryError(f"{self.micro_batch} rows")
        return Evaluations(np.full(len(jobs), 100.0 * len(jobs) + self.micro_batch))


FITS = 5
GOOD, BROKEN, SHORT, LEAVES, ODD, NEIGHBOURS, COUNTING, FATAL, LARGE = range(9)


def evaluators() -> tuple[Evaluator, ...]:
    """Good ones and some of those that an executor has to live with."""
    space = _space()
    return (
        FunctionEvaluator(double, space),
        FunctionEvaluator(broken, space, batch=True),
        FunctionEvaluator(short, space, batch=True),
        FunctionEvaluator(leaves, space, batch=True),
        FunctionEvaluator(odd, space),
        FunctionEvaluator(neighbours, space, batch=True, reproducibility="batch"),
        Counting(double, space),
        FunctionEvaluator(fatal, space, batch=True),
        Large(double, space, reproducibility="batch"),
    )


def fatal(plans: list[dict[str, int]], fidelity: str, seed: int) -> list[float]:
    """Ends, kills or hangs its process, by the file whose path is in the environment."""
    how, _, count = Path(os.environ[FATAL_FILE]).read_text("utf-8").partition(" ")
    if count:  # only so many times
        left = int(count) - 1
        Path(os.environ[FATAL_FILE]).write_text(f"{how} {left}" if left else "live", "utf-8")
    if how == "exit":
        os._exit(3)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "crash":
        with suppress(ValueError):  # allowed in the main thread alone
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(0)
    elif how == "hang":
        time.sleep(1000)
    elif how == "hold":  # in compiled code that lets no other Python run
        ctypes.PyDLL(None).sleep(1000)
    return [1.0] * len(plans)


FATAL_FILE = "SEARCHLAB_TESTING_FATAL"


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

    def test_out_of_memory_takes_fewer_rows_at_once_in_the_same_chunk(
        self, started: Executor
    ) -> None:
        for first, n in ((0, 8), (8, 7)):
            started.submit(chunk(first, n, evaluator=LARGE))
            (done,) = collect(started, 1)
            assert done.evaluations.values[:, 0].tolist() == [100.0 * n + 4] * n
            assert done.evaluations.notes["micro_batch"] == 4

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

    def test_values_are_those_of_a_plain_call(self, started: Executor) -> None:
        """Bit for bit, with neighbours and padding, whatever worker had the chunk."""
        plain = evaluators()
        chunks = [chunk(5 * i, 5, which, rows) for i in range(3) for which, rows in CASES]
        for given in chunks:
            started.submit(given)
        done = {id(part.chunk): part.evaluations for part in collect(started, len(chunks))}
        for given in chunks:
            wanted = evaluate_chunk(plain[given.evaluator], given).evaluations
            np.testing.assert_array_equal(done[id(given)].values, wanted.values)
            np.testing.assert_array_equal(done[id(given)].state, wanted.state)
            assert done[id(given)].reason == wanted.reason

    def test_an_exception_leaves_its_traceback(self, started: Executor) -> None:
        for which in (BROKEN, ODD, GOOD):
            started.submit(chunk(0, 8, which))
        texts = {part.chunk.evaluator: part.traceback for part in collect(started, 3)}
        assert "in broken" in texts[BROKEN]
        assert "in odd" in texts[ODD]
        assert texts[GOOD] == ""

    def test_an_exit_is_a_failure(self, started: Executor) -> None:
        started.submit(chunk(0, 2, LEAVES))
        (done,) = collect(started, 1)
        assert done.evaluations.reason == ["SystemExit: enough"] * 2

    def test_what_an_evaluator_keeps_can_be_forgotten(self, started: Executor) -> None:
        """And candidates are as read-only for it as in the driver."""
        for _ in range(4):
            asked = chunk(0, 1, COUNTING)
            started.submit(Chunk(asked.jobs, asked.evaluator, forget=True))
            (done,) = collect(started, 1)
            assert done.evaluations.reason == [""]
            assert done.evaluations.values.tolist() == [[1.0]]

    def test_time_at_work_is_measured(self, started: Executor) -> None:
        before = usage_of(started)
        for i in range(6):
            started.submit(chunk(i, 1))
        spent = sum(part.finished - part.started for part in collect(started, 6))
        usage = usage_of(started)
        assert usage is not None
        assert before is not None
        assert usage.workers == started.workers
        assert usage.busy_s - before.busy_s == pytest.approx(spent, abs=1e-6)
        assert 0 < usage.utilisation <= 1
        assert (usage.deaths, usage.timeouts, usage.repeats) == (0, 0, 0)

    def test_close_twice(self, executor: Executor) -> None:
        executor.start(evaluators())
        executor.submit(chunk(0, 1))
        executor.close()
        executor.close()


CASES = ((GOOD, 0), (ODD, 0), (NEIGHBOURS, 0), (NEIGHBOURS, 16), (BROKEN, 0), (SHORT, 8))


class IsolatingExecutorSuite(ExecutorSuite):
    """What executors promise whose workers are other processes, of this or another machine.

    Args:
        strict: a new executor with a deadline of at most a second, and one retry after a death and
            after a timeout.
        reasons: what the reason of a chunk holds whose worker exits, crashes or is stuck.
    """

    reasons: ClassVar[Mapping[str, str]] = {
        "exit": "exit code 3",
        "crash": "SIGSEGV",
        "hold": "timeout",
    }

    @pytest.fixture
    def strict(self) -> Executor:
        """A new executor with a deadline and one retry per cause."""
        raise NotImplementedError("override the fixture `strict`")

    @pytest.fixture
    def orders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The file that tells the evaluator `fatal` what to do."""
        path = tmp_path / "orders"
        monkeypatch.setenv(FATAL_FILE, str(path))
        return path

    @pytest.mark.parametrize("how", ["exit", "crash", "hold"])
    def test_a_death_is_a_result_when_retries_are_used_up(
        self, strict: Executor, orders: Path, how: str
    ) -> None:
        reason = self.reasons[how]
        orders.write_text(how, "utf-8")
        strict.start(evaluators())
        try:
            strict.submit(chunk(0, 2, FATAL))
            strict.submit(chunk(2, 2, GOOD))
            done = {part.chunk.evaluator: part for part in collect(strict, 2)}
            assert done[GOOD].evaluations.reason == ["", ""]
            lost = done[FATAL]
            assert lost.attempts == 2
            assert lost.evaluations.state is not None
            assert lost.evaluations.state.tolist() == [FAILED] * 2
            assert lost.evaluations.reason is not None
            assert reason in lost.evaluations.reason[0]
            assert "2 attempts" in lost.evaluations.reason[0]
            orders.write_text("live", "utf-8")
            strict.submit(chunk(4, 1, FATAL))
            (last,) = collect(strict, 1)
            assert last.evaluations.reason == [""]
        finally:
            strict.close()

    @pytest.mark.parametrize("how", ["kill 1", "hang 1"])
    def test_what_was_lost_is_done_again(self, strict: Executor, orders: Path, how: str) -> None:
        orders.write_text(how, "utf-8")
        strict.start(evaluators())
        try:
            strict.submit(chunk(0, 2, FATAL))
            (done,) = collect(strict, 1)
            assert done.attempts == 2
            assert done.evaluations.values.tolist() == [[1.0], [1.0]]
            usage = usage_of(strict)
            assert usage is not None
            assert (usage.deaths + usage.timeouts, usage.repeats) == (1, 1)
        finally:
            strict.close()

    def test_close_ends_what_hangs(self, executor: Executor, orders: Path) -> None:
        orders.write_text("hold", "utf-8")
        executor.start(evaluators())
        executor.submit(chunk(0, 1, FATAL))
        assert executor.wait(0.2) == []
        began = time.monotonic()
        executor.close()
        assert time.monotonic() - began < 5
