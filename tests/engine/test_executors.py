"""Executors: the conformance suites, and what only worker processes can show."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import process_tools
from process_tools import (
    LOG,
    Clumsy,
    Culler,
    OnlyOnce,
    Picky,
    alive,
    mixed_space,
    script,
    start,
    until,
)

import searchlab
from searchlab.config import EXECUTORS, AlgorithmSpec, Budget, SearchConfig, Stage, resolve
from searchlab.errors import ConfigError, DataError, EvaluationError
from searchlab.evaluator import Evaluator, FunctionEvaluator
from searchlab.executors import (
    Executor,
    ExecutorOptions,
    LocalExecutor,
    ProcessExecutor,
    RayExecutor,
    Retries,
)
from searchlab.executors._channel import DriverEnd, WorkerEnd
from searchlab.loop import Callback, Progress
from searchlab.progress import ProgressLine
from searchlab.search import run, search
from searchlab.study import MemoryRun
from searchlab.testing.executor import (
    BROKEN,
    ExecutorSuite,
    IsolatingExecutorSuite,
    chunk,
    collect,
    evaluators,
)


class TestLocalExecutor(ExecutorSuite):
    @pytest.fixture
    def executor(self) -> Executor:
        return LocalExecutor()


@pytest.fixture(scope="module")
def shared() -> Iterator[Executor]:
    """One for many tests: starting processes is what takes time here."""
    executor = ProcessExecutor(workers=2)
    executor.start(evaluators())
    yield executor
    executor.close()


class TestProcessExecutor(IsolatingExecutorSuite):
    @pytest.fixture
    def executor(self) -> Executor:
        return ProcessExecutor(workers=2)

    @pytest.fixture
    def strict(self) -> Executor:
        return ProcessExecutor(workers=1, deadline=1.0, retries=1)

    @pytest.fixture
    def started(self, shared: Executor) -> Executor:  # type: ignore[override]
        return shared


def test_every_executor_has_a_suite() -> None:
    registered = {resolve(EXECUTORS, name, "executor") for name in EXECUTORS}
    assert registered == {LocalExecutor, ProcessExecutor, RayExecutor}


# -- the trace ----------------------------------------------------------------------------------


def config_of(evaluator: Evaluator, *, budget: int = 80, **more: Any) -> SearchConfig:
    algorithm = AlgorithmSpec("evolution", {"quantum": more.pop("quantum", 1)})
    stage = Stage("search", mixed_space(), evaluator, algorithm, Budget(budget))
    return SearchConfig((stage,), seed=3, **more)


def trace_of(config: SearchConfig, executor: Executor, *callbacks: Callback) -> Any:
    store = MemoryRun()
    run(config, store=store, executor=executor, callbacks=callbacks)
    return store.records().trace()


def test_any_number_of_workers_gives_the_trace_of_one_process() -> None:
    config = config_of(FunctionEvaluator(process_tools.slow, mixed_space()), lag=16, budget=150)
    wanted = trace_of(config, LocalExecutor())
    assert trace_of(config, ProcessExecutor(workers=3)) == wanted
    hunted = ProcessExecutor(workers=2)
    culler = Culler(hunted.pids, every=40)
    assert trace_of(config, hunted, culler) == wanted
    assert len(culler.killed) >= 3
    assert hunted.usage().repeats <= hunted.usage().deaths <= len(culler.killed)


def test_values_that_depend_on_neighbours_are_the_same_everywhere() -> None:
    evaluator = FunctionEvaluator(
        process_tools.neighbourly, mixed_space(), batch=True, reproducibility="batch"
    )
    config = config_of(evaluator, lag=16, quantum=8, chunk=4, budget=60)
    traces = [trace_of(config, ProcessExecutor(workers=n)) for n in (1, 2)]
    assert traces[0] == traces[1] == trace_of(config, LocalExecutor())


def test_nothing_is_paid_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv(LOG, str(log))
    result = search(mixed_space(), process_tools.slow, budget=60, workers=2, lag=8)
    calls = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for pid, _ in calls}) == 2
    first = float(calls[0][1])
    # The first candidate is measured apart: twice alone, and beside another one.
    counted = [float(value) for _, value in calls]
    assert counted.count(first) == 4
    assert len(counted) == 60 + 4
    assert result.records is not None
    assert len(set(result.records.keys)) == 60


def test_the_default_lag_keeps_all_workers_busy() -> None:
    seen: list[Progress] = []
    result = search(
        mixed_space(), process_tools.slow, budget=120, workers=2, callbacks=(seen.append,)
    )
    assert result.meta["pace"]["0"]["lag"] == 4
    usage = result.meta["usage"]
    assert usage["workers"] == 2
    assert 0 < usage["utilisation"] <= 1
    assert "2 workers" in ProgressLine().text(seen[-1], time.monotonic())
    assert max(len(progress.done) for progress in seen) <= 4


def test_at_most_one_chunk_per_worker_waits() -> None:
    executor = ProcessExecutor(workers=1)
    executor.start((FunctionEvaluator(process_tools.a_second, mixed_space()),))
    jobs = search(mixed_space(), process_tools.slow, budget=3)
    assert jobs.counts["evaluations"] == 3
    space = mixed_space()
    from searchlab.executors import Chunk
    from searchlab.testing.evaluator import jobs_of
    from searchlab.uniforms import uniforms

    drawn = space.sample(uniforms(0, 0, 0, 3, space.sample_width))
    for row in range(3):
        assert executor.has_room() == (row < 2)
        executor.submit(Chunk(jobs_of(space, drawn.take([row]))))
    collect(executor, 3)
    assert executor.has_room()
    executor.close()


# -- what can be sent, and set up ---------------------------------------------------------------


def test_a_function_that_cannot_be_sent_is_named_before_anything_is_made(tmp_path: Path) -> None:
    def inner(**values: Any) -> float:
        return 0.0

    for function, name in ((inner, "inner"), (lambda **values: 0.0, "<lambda>")):
        with pytest.raises(ConfigError) as caught:
            search(mixed_space(), function, workers=2, out=tmp_path / "run")
        for part in (name, "top level of a module", "searchlab.evaluator", "executor 'local'"):
            assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_decorated_function_can_be_sent() -> None:
    here = search(mixed_space(), process_tools.decorated, budget=20, lag=4)
    there = search(mixed_space(), process_tools.decorated, budget=20, lag=4, workers=2)
    assert here.records is not None
    assert there.records is not None
    assert here.records.trace() == there.records.trace()


def test_what_setup_raises_comes_through() -> None:
    for cls, error, text in (
        (Picky, DataError, "file 'weights' is missing"),
        (Clumsy, EvaluationError, "setup of an evaluator failed: KeyError: 'weights'"),
    ):
        executor = ProcessExecutor(workers=1)
        with pytest.raises(error, match=text):
            executor.start((cls(process_tools.slow, mixed_space()),))
        assert executor.pids() == []


def test_workers_that_cannot_start_again_end_the_run_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG, str(tmp_path))
    monkeypatch.setattr("searchlab.executors._supervisor.PAUSE", 0.001)
    monkeypatch.setattr("searchlab.executors._supervisor.STARTS", 2)
    config = config_of(OnlyOnce(process_tools.slow, mixed_space()), budget=5)
    with pytest.raises(EvaluationError, match=r"none can be started any more: .* exit code 7"):
        run(config, executor=ProcessExecutor(workers=2, retries=9))


def test_libraries_are_told_to_use_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for threads in (1, 3):
        executor = ProcessExecutor(workers=1, threads=threads)
        result = search(mixed_space(), process_tools.environment_of, budget=1, executor=executor)
        assert result.best.value == threads


def test_errors_are_repeated_if_that_is_wanted() -> None:
    executor = ProcessExecutor(workers=1, retries=Retries(error=2))
    executor.start(evaluators())
    executor.submit(chunk(0, 1, BROKEN))
    (done,) = collect(executor, 1)
    assert done.attempts == 3
    assert done.evaluations.reason == ["ValueError: two lines"]
    executor.close()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"workers": 0}, "workers 0"),
        ({"workers": True}, "workers True"),
        ({"deadline": 0.0}, "deadline 0.0"),
        ({"deadline": float("nan")}, "deadline nan"),
        ({"retries": -1}, "retries"),
        ({"threads": 0}, "threads 0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ProcessExecutor(**options)


def test_executors_by_name() -> None:
    assert isinstance(ExecutorOptions().build(), LocalExecutor)
    assert isinstance(ExecutorOptions(workers=1).build(), LocalExecutor)
    assert isinstance(ExecutorOptions(workers=2).build(), ProcessExecutor)
    assert ExecutorOptions("processes", 3).build().workers == 3
    with pytest.raises(ConfigError, match="known: local, processes, ray"):
        ExecutorOptions("cloud").build()
    for options in (ExecutorOptions("local", 2), ExecutorOptions("local", deadline=3.0)):
        with pytest.raises(ConfigError, match="executor 'local'"):
            options.build()
    with pytest.raises(ConfigError, match="belong to the executor"):
        search(mixed_space(), process_tools.slow, executor=LocalExecutor(), workers=2)


def test_an_executor_that_was_not_started_says_so() -> None:
    with pytest.raises(EvaluationError, match="not started"):
        ProcessExecutor().submit(chunk(0, 1))


# -- ends ---------------------------------------------------------------------------------------

HANG = """
import ctypes, os, subprocess, time
import searchlab
def hang(a):
    child = subprocess.Popen(["sleep", "1000"])
    with open("pids", "a") as file:
        file.write(f"{os.getpid()} {child.pid}\\n")
    if a % 2:
        ctypes.PyDLL(None).sleep(1000)
    time.sleep(1000)
if __name__ == "__main__":
    space = searchlab.Space(a=searchlab.Integer(0, 99))
    result = searchlab.search(space, hang, budget=9, workers=3, out="run")
    print(result.meta["status"])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_driver(tmp_path: Path, how: signal.Signals) -> None:
    """Workers end with what they have started, even from within compiled code."""
    driver = start([script(tmp_path, HANG)], tmp_path)
    log = tmp_path / "pids"
    try:
        assert until(lambda: log.exists() and log.read_text().count("\n") == 3)
        pids = [int(pid) for pid in log.read_text().split()]
        assert all(map(alive, pids))
        os.killpg(driver.pid, how)  # as a terminal does it
        out, err = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert until(lambda: not any(map(alive, pids)), 10)
    if how == signal.SIGINT:
        assert driver.returncode == 0, err
        assert "interrupted" in out
        assert "Traceback" not in err


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    text = HANG.replace('if __name__ == "__main__":', "if True:").replace("return", "pass")
    driver = start([script(tmp_path, text.replace(', out="run"', ""))], tmp_path)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 1
    last = err.strip().splitlines()[-1]
    assert "ConfigError" in last
    assert "if __name__ == '__main__':" in last


def test_a_function_typed_in_is_told_so(tmp_path: Path) -> None:
    text = HANG.replace("def hang", "def typed").replace("hang,", "typed,")
    driver = start(["-c", text], tmp_path)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 1
    last = err.strip().splitlines()[-1]
    assert "function 'typed' of __main__ cannot be loaded" in last


# -- messages -----------------------------------------------------------------------------------


def test_messages_arrive_whole_in_pieces_of_any_size() -> None:
    ours, theirs = socket.socketpair()
    driver, worker = DriverEnd(ours), WorkerEnd(theirs)
    sizes = [0, 1, 7, 8, 9, 1 << 16, 3_000_001]
    rng = np.random.default_rng(0)
    sent = [rng.bytes(size) for size in sizes]
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.extend(worker.receive() for _ in sizes))
    reader.start()
    for message in sent:
        driver.send(message)
    while driver.unsent:
        driver.flush()
    reader.join()
    assert received == sent
    writer = threading.Thread(target=lambda: [worker.send(message) for message in sent])
    writer.start()
    back: list[bytes] = []
    while len(back) < len(sent):
        back += driver.read()
    writer.join()
    assert back == sent
    assert not driver.closed
    theirs.sendall(b"half")
    theirs.close()
    assert driver.read() == []
    assert driver.closed
    driver.close()


def test_a_driver_that_is_gone_is_an_end_of_file() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with pytest.raises(EOFError):
        WorkerEnd(theirs).receive()


def test_searchlab_is_this_one() -> None:
    assert Path(searchlab.__file__).parent.parent == process_tools.ROOT
