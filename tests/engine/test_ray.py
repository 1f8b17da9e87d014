"""The executor of Ray clusters, on one cluster of this machine that all tests share."""

from __future__ import annotations

import argparse
import http.server
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import process_tools
from process_tools import Culler, mixed_space

import searchlab
from searchlab._executor_flags import _resources, add_flags, executor_options
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.errors import ConfigError, DataError, EvaluationError
from searchlab.evaluator import Evaluator, FunctionEvaluator, Objective
from searchlab.executors import Executor, LocalExecutor, RayExecutor
from searchlab.executors.ray_cluster import Cluster, Need, check_token, is_loopback, split_address
from searchlab.loop import Callback
from searchlab.population import Jobs
from searchlab.search import run, search
from searchlab.study import MemoryRun
from searchlab.testing import ray_nodes
from searchlab.testing.executor import (
    FATAL_FILE,
    GOOD,
    IsolatingExecutorSuite,
    chunk,
    collect,
    double,
    evaluators,
)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="session")
def started_head() -> Iterator[tuple[str, ray_nodes.Node]]:
    """A cluster that all tests share."""
    with ray_nodes.head("--num-gpus", "2", cpus=12) as both:
        yield both


@pytest.fixture(scope="session")
def cluster(started_head: tuple[str, ray_nodes.Node]) -> str:
    """Its address."""
    return started_head[0]


@pytest.fixture(scope="module")
def shared(cluster: str) -> Iterator[RayExecutor]:
    """One for many tests."""
    executor = RayExecutor(workers=2, address=cluster)
    executor.start(evaluators())
    yield executor
    executor.close()


class TestRayExecutor(IsolatingExecutorSuite):
    reasons: ClassVar[dict[str, str]] = {
        "exit": "the worker is gone",
        "crash": "the worker is gone",
        "hold": "timeout",
    }

    @pytest.fixture
    def executor(self, cluster: str, tmp_path: Path) -> Executor:
        return RayExecutor(workers=2, address=cluster, runtime_env=_orders(tmp_path))

    @pytest.fixture
    def strict(self, cluster: str, tmp_path: Path) -> Executor:
        environment = _orders(tmp_path)
        return RayExecutor(
            workers=1, address=cluster, deadline=1.0, retries=1, runtime_env=environment
        )

    @pytest.fixture
    def started(self, shared: Executor) -> Executor:  # type: ignore[override]
        return shared


def _orders(folder: Path) -> dict[str, dict[str, str]]:
    return {"env_vars": {FATAL_FILE: str(folder / "orders")}}


# -- the trace ----------------------------------------------------------------------------------


def config_of(evaluator: Evaluator, *, budget: int, **more: Any) -> SearchConfig:
    algorithm = AlgorithmSpec("evolution", {"quantum": more.pop("quantum", 1)})
    stage = Stage("search", mixed_space(), evaluator, algorithm, Budget(budget))
    return SearchConfig((stage,), seed=3, **more)


def trace_of(config: SearchConfig, executor: Executor, *callbacks: Callback) -> Any:
    store = MemoryRun()
    run(config, store=store, executor=executor, callbacks=callbacks)
    return store.records().trace()


def test_killed_workers_leave_the_trace_of_one_process(cluster: str) -> None:
    config = config_of(FunctionEvaluator(process_tools.slow, mixed_space()), lag=16, budget=120)
    executor = RayExecutor(workers=2, address=cluster)
    culler = Culler(executor.pids, every=40)
    assert trace_of(config, executor, culler) == trace_of(config, LocalExecutor())
    assert len(culler.killed) >= 2


def test_chunks_are_never_split(cluster: str) -> None:
    evaluator = FunctionEvaluator(
        process_tools.neighbourly, mixed_space(), batch=True, reproducibility="batch"
    )
    config = config_of(evaluator, lag=32, quantum=16, chunk=4, budget=64)
    executor = RayExecutor(workers=2, address=cluster)
    assert trace_of(config, executor) == trace_of(config, LocalExecutor())


def test_answers_that_come_twice_or_late_are_dropped(shared: RayExecutor) -> None:
    pool = shared._running()
    heard: list[Any] = []
    take = pool.take

    def twice(member: Any, answers: Any) -> None:
        heard.append((member, answers))
        take(member, answers)
        take(member, answers)

    before = pool.dropped
    pool.take = twice  # type: ignore[method-assign]
    try:
        for i in range(8):
            shared.submit(chunk(i, 1))
        assert len(collect(shared, 8)) == 8
    finally:
        pool.take = take  # type: ignore[method-assign]
    assert pool.dropped == before + 8
    for member, answers in heard:  # much later, when others are at work
        shared.submit(chunk(0, 1))
        pool.take(member, answers)
    assert len(collect(shared, len(heard))) == len(heard)
    assert pool.dropped == before + 16
    assert pool.open == 0


# -- what goes wrong ------------------------------------------------------------------------------


class Threaded(FunctionEvaluator):
    """May be called by several threads at once."""

    thread_safe = True


def deadly(a: int, b: int) -> float:
    """Candidate 3 of the list ends its process, slowly enough to have company."""
    import time

    time.sleep(0.3)
    if (a, b) == DEADLY:
        os._exit(3)
    return float(a)


_ROW = chunk(3, 1).jobs.population
DEADLY = int(_ROW["a"][0]), (1, 2, 3)[int(_ROW["b"][0])]


def test_company_of_a_deadly_candidate_is_not_blamed(cluster: str, tmp_path: Path) -> None:
    good = evaluators()[GOOD]
    assert isinstance(good, FunctionEvaluator)
    executor = RayExecutor(workers=1, address=cluster, at_once=4, retries=1)
    executor.log_to(tmp_path / "logs")
    assert executor.workers == 4
    executor.start((Threaded(deadly, good.space),))
    try:
        for i in range(4):
            executor.submit(chunk(i, 1))
        done = {int(part.chunk.jobs.ids[0]): part for part in collect(executor, 4)}
        reasons = {i: (part.evaluations.reason or [""])[0] for i, part in done.items()}
        assert [i for i, reason in reasons.items() if reason] == [3]
        assert "the worker is gone" in reasons[3]
        log = (tmp_path / "logs" / "worker-0.log").read_text("utf-8")
        assert log.count("gone (death") == 3  # in company, and twice alone
        assert log.count("ready on") >= 3
        states = [row["state"] for row in executor.activity()["workers"]]
        assert states in (["idle"], ["starts"], ["waits for a node"])
    finally:
        executor.close()


def greedy(a: int, b: int) -> float:
    """Takes a lot of memory."""
    import time

    held = np.ones(60_000_000)
    time.sleep(20)
    return float(held[a])


def test_a_worker_that_takes_too_much_memory_is_replaced(cluster: str) -> None:
    good = evaluators()[GOOD]
    assert isinstance(good, FunctionEvaluator)
    executor = RayExecutor(workers=1, address=cluster, memory=400_000_000, retries=0)
    executor.start((FunctionEvaluator(greedy, good.space), good))
    try:
        executor.submit(chunk(0, 1))
        executor.submit(chunk(1, 1, evaluator=1))
        done = {part.chunk.evaluator: part for part in collect(executor, 2)}
        reason = (done[0].evaluations.reason or [""])[0]
        assert "MB of memory, 400 MB allowed" in reason
        assert done[1].evaluations.reason == [""]
    finally:
        executor.close()


class Lacking(FunctionEvaluator):
    """Needs a file."""

    paths = ("/nowhere/weights.safetensors",)


class Locked(FunctionEvaluator):
    """Holds something that cannot be sent."""

    lock = None

    def __init__(self) -> None:
        super().__init__(double, chunk_space())
        self.lock = threading.Lock()


class Timed(FunctionEvaluator):
    """Measures, so that it shares no device."""

    exclusive = True


def chunk_space() -> Any:
    good = evaluators()[GOOD]
    assert isinstance(good, FunctionEvaluator)
    return good.space


def test_what_cannot_be_set_up_names_its_node(cluster: str) -> None:
    host = socket.gethostname()
    function = process_tools.slow
    for evaluator, error, text in (
        (Lacking(function, mixed_space()), DataError, "path '/nowhere/weights.safetensors'"),
        (process_tools.Picky(function, mixed_space()), DataError, "file 'weights' is missing"),
        (process_tools.Clumsy(function, mixed_space()), EvaluationError, "KeyError: 'weights'"),
    ):
        executor = RayExecutor(workers=1, address=cluster)
        with pytest.raises(error, match=text) as caught:
            executor.start((evaluator,))
        assert f"node {host} (" in str(caught.value)
        assert executor.pids() == []


def test_another_version_of_searchlab_on_a_node_is_named(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = searchlab.__version__
    monkeypatch.setattr(searchlab, "__version__", "99.1")
    with pytest.raises(ConfigError, match=rf"cannot start: searchlab {there}, 99\.1 here"):
        RayExecutor(workers=1, address=cluster).start(evaluators())


def test_evaluators_that_do_not_suit_are_named(cluster: str) -> None:
    for options, evaluator, text in (
        ({}, Locked(), "evaluator Locked cannot|function 'double' of .* cannot"),
        ({"gpus": 0.5}, Timed(double, chunk_space()), "0.5 GPUs per worker .* whole number"),
        ({"at_once": 2}, Timed(double, chunk_space()), "2 chunks at once .* shares no device"),
        ({"at_once": 2}, FunctionEvaluator(double, chunk_space()), "thread_safe"),
    ):
        with pytest.raises(ConfigError, match=text):
            RayExecutor(address=cluster, **options).start((evaluator,))  # type: ignore[arg-type]


class Weights(FunctionEvaluator):
    """Tells whether its array lies in memory that the workers of a node share."""

    def __init__(self) -> None:
        super().__init__(double, chunk_space())
        self.weights = np.arange(500_000, dtype=np.float64)

    def evaluate(self, jobs: Jobs) -> Any:
        out = super().evaluate(jobs)
        out.values[:] = float(self.weights.flags.writeable) + self.weights[-1]
        return out


def test_arrays_of_an_evaluator_are_shared_by_the_workers_of_a_node(cluster: str) -> None:
    executor = RayExecutor(workers=1, address=cluster)
    executor.start((Weights(),))
    executor.submit(chunk(0, 1))
    (done,) = collect(executor, 1)
    executor.close()
    assert done.evaluations.values.tolist() == [[499_999.0]]  # not writeable


def devices(a: int, b: int) -> float:
    """Which devices this worker sees."""
    return float(os.environ["CUDA_VISIBLE_DEVICES"].replace(",", "."))


def test_devices_are_shared_or_taken_whole(cluster: str) -> None:
    seen = {}
    for gpus, workers in ((0.5, None), (2, None)):
        executor = RayExecutor(workers=workers, address=cluster, gpus=gpus)
        executor.start((FunctionEvaluator(devices, chunk_space()),))
        seen[gpus] = executor.workers, executor.devices()
        executor.submit(chunk(0, 1))
        (done,) = collect(executor, 1)
        executor.close()
        seen[gpus] += (float(done.evaluations.values[0, 0]),)
    assert seen[0.5][:2] == (4, {"gpu": 4})
    assert seen[0.5][2] in (0.0, 1.0)
    assert seen[2] == (1, {"gpu": 1}, 0.1)


# -- clusters that do not suit --------------------------------------------------------------------


def test_resources_that_no_node_has_are_named(cluster: str) -> None:
    host = socket.gethostname()
    for options, text in (
        ({"gpus": 4}, "CPU 1, GPU 4 on one node"),
        ({"resources": {"H200": 1}}, "CPU 1, H200 1 on one node"),
        ({"memory": 10**16}, "CPU 1, memory 1e+07 GB on one node"),
    ):
        with pytest.raises(ConfigError) as caught:
            RayExecutor(address=cluster, **options).start(evaluators())  # type: ignore[arg-type]
        assert f"a worker needs {text}" in str(caught.value)
        assert f"{host} has CPU 12, GPU 2" in str(caught.value)


def test_addresses_that_are_no_cluster(tmp_path: Path) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    silent = socket.create_server(("127.0.0.1", 0))
    other = socket.create_server(("127.0.0.1", 0))  # speaks HTTP/2 and knows no such method
    threading.Thread(target=_refuse_calls, args=(other,), daemon=True).start()
    try:
        for address, text in (
            (f"127.0.0.1:{server.server_port}", "is no Ray cluster"),
            (f"127.0.0.1:{silent.getsockname()[1]}", "is no Ray cluster"),
            (f"127.0.0.1:{other.getsockname()[1]}", "is no Ray cluster"),
            (f"127.0.0.1:{ray_nodes.free_port()}", "nothing answers"),
            ("localhost", "HOST:PORT"),
            ("http://localhost:6379", "HOST:PORT"),
        ):
            with pytest.raises(ConfigError, match=text):
                search(
                    mixed_space(),
                    process_tools.slow,
                    executor=RayExecutor(address=address),
                    out=tmp_path / "run",
                )
        assert not (tmp_path / "run").exists()
    finally:
        server.shutdown()
        silent.close()
        other.close()


def _refuse_calls(server: socket.socket) -> None:
    """Answers as servers of gRPC do: settings, then a status in a header."""
    settings = bytes(3) + b"\x04" + bytes(5)
    headers = b"\x88@\x0ccontent-type\x10application/grpc@\x0bgrpc-status\x0212"
    answer = len(headers).to_bytes(3, "big") + b"\x01\x05" + (1).to_bytes(4, "big") + headers
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(settings + answer)


def test_a_cluster_of_this_machine_is_joined_by_its_loopback_address(
    cluster: str, shared: RayExecutor
) -> None:
    port = cluster.rpartition(":")[2]
    executor = RayExecutor(workers=1, address=f"127.0.0.1:{port}")
    executor.start(evaluators()[:1])
    try:
        executor.submit(chunk(0, 1))
        assert len(collect(executor, 1)) == 1
    finally:
        executor.close()
    with pytest.raises(ConfigError, match=f"connected to the cluster at {cluster} already"):
        Cluster("127.0.0.1:1", workers=1, need=Need()).join()


def test_beyond_this_machine_a_token_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    check_token("127.0.0.1")
    check_token("localhost")
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE=disabled with the Ray cluster at 10\."):
        check_token("10.0.0.1")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(ConfigError, match="no token for the Ray cluster at node7"):
        check_token("node7")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    check_token("node7")
    assert is_loopback("::1")
    assert not is_loopback("192.168.0.1")
    assert split_address("[::1]:6379") == ("::1", 6379)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"workers": 0}, "workers 0"),
        ({"at_once": 0}, "at_once 0"),
        ({"deadline": 0.0}, "deadline 0.0"),
        ({"retries": -1}, "retries"),
        ({"gpus": 1.5}, "1.5 GPUs"),
        ({"cpus": -1}, "-1 CPUs"),
        ({"resources": {"H200": 2.5}}, "2.5 H200"),
        ({"memory": -5}, "memory -5"),
        ({"resources": {"CPU": 2}}, "custom resource 'CPU'"),
        ({"resources": {"": 1}}, "custom resource ''"),
        ({"missing": "go"}, "missing 'go'"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        RayExecutor(**options)


def test_how_many_workers_a_node_holds() -> None:
    node = {"CPU": 8.0, "GPU": 3.0, "memory": 64e9}
    assert Need().fits(node) == 8
    assert Need(cpus=1, gpus=0.5).fits(node) == 6
    assert Need(gpus=4).fits(node) == 0
    assert Need(memory=30_000_000_000).fits(node) == 2
    assert Need(resources={"disk": 1}).fits(node) == 0


def test_options_of_the_command_line(cluster: str) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    words = ["--workers", "3", "--executor", "ray", "--ray-address", cluster]
    words += [
        "--gpus-per-worker",
        "0.5",
        "--memory-per-worker",
        "24G",
        "--resources",
        "disk=1,H200=0.5",
    ]
    built = executor_options(parser.parse_args([*words, "--at-once", "2"])).build()
    assert isinstance(built, RayExecutor)
    assert built.workers == 6
    assert built._setting.need == Need(1.0, 0.5, 24 * 10**9, {"disk": 1.0, "H200": 0.5})
    for text in ("disk", "disk=much", "disk=1,disk=2", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="names with amounts, each once"):
            _resources(text)
    with pytest.raises(ConfigError, match=r"option gpus 0\.5 with executor 'processes'"):
        executor_options(parser.parse_args(["--workers", "2", "--gpus-per-worker", "0.5"]))


def test_one_type_of_device_for_what_is_measured_on_it(shared: RayExecutor) -> None:
    pool = shared._running()
    latency = FunctionEvaluator(
        double, chunk_space(), objectives=(Objective("ms", "min", "device_bound", "ms"),)
    )
    pool.members[1].device = "H200"
    kept, shared._evaluators = shared._evaluators, (latency,)
    try:
        with pytest.raises(ConfigError, match="1 on H200, 1 on cpu; objective 'ms'"):
            shared._note_devices(pool)
        shared._evaluators, shared._devices = kept, type(shared._devices)()
        with pytest.warns(Warning, match="1 on H200, 1 on cpu; values may differ"):
            shared._note_devices(pool)
    finally:
        shared._evaluators, pool.members[1].device = kept, "cpu"


def test_no_worker_outlives_its_executor(
    shared: RayExecutor, started_head: tuple[str, ray_nodes.Node]
) -> None:
    _, node = started_head
    executor = RayExecutor(workers=2, address=started_head[0])
    executor.start(evaluators())
    mine, others = executor.pids(), shared.pids()
    executor.submit(chunk(0, 1))
    executor.close()
    found = node.pids("ray::SearchlabWorker")
    assert process_tools.until(lambda: set(node.pids("ray::SearchlabWorker")) == set(others), 20), (
        found,
        mine,
        others,
    )
