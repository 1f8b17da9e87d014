"""Nodes of a Ray cluster that join and die under a run, and a cluster that is lost."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import process_tools
from process_tools import mixed_space, start

from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.errors import ConfigError, SearchlabWarning, StudyError
from searchlab.evaluator import FunctionEvaluator
from searchlab.executors import Executor, LocalExecutor, RayExecutor
from searchlab.loop import Callback, Progress
from searchlab.search import run
from searchlab.study import Database, MemoryRun
from searchlab.testing import ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def trace_of(executor: Executor, *callbacks: Callback) -> Any:
    evaluator = FunctionEvaluator(process_tools.slow, mixed_space())
    algorithm = AlgorithmSpec("evolution", {"quantum": 1})
    stage = Stage("search", mixed_space(), evaluator, algorithm, Budget(200))
    store = MemoryRun()
    run(SearchConfig((stage,), seed=3, lag=16), store=store, executor=executor, callbacks=callbacks)
    return store.records().trace()


DRIVER = """
import sys
import process_tools
import searchlab
from searchlab.executors import RayExecutor
executor = RayExecutor(workers=2, address=sys.argv[1]) if len(sys.argv) > 1 else None
result = searchlab.search(
    process_tools.mixed_space(), process_tools.slow, budget=700, lag=8, seed=5,
    algorithm="evolution", executor=executor, out="run" if executor else None,
)
print(result.meta["status"], hash(result.records.trace()))
"""


def test_nodes_come_and_go_and_the_head_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = trace_of(LocalExecutor())
    with ray_nodes.head(cpus=0) as (address, head):
        with monkeypatch.context() as other:
            other.setattr("ray.__version__", "2.0.0")
            with pytest.raises(ConfigError, match=r"runs other versions: .*2\.0\.0"):
                RayExecutor(address=address).start((FunctionEvaluator(abs, mixed_space()),))
        first = ray_nodes.Node("--num-cpus", "1", address=address)
        nodes = [first]
        executor = RayExecutor(address=address, missing="wait")
        sizes: list[int] = []

        def change(progress: Progress) -> None:
            sizes.append(executor.workers)
            if len(nodes) == 1 and progress.finished >= 50:
                nodes.append(ray_nodes.Node("--num-cpus", "2", address=address).wait())
            elif len(nodes) == 2 and max(sizes) == 3 and first.process.poll() is None:
                first.kill()
            if len(sizes) > 160:  # so that the cluster has time to notice
                time.sleep(0.05)

        try:
            with pytest.warns(SearchlabWarning, match="waiting: a worker needs CPU 1"):
                assert trace_of(executor, change) == wanted
            assert sizes[0] == 1
            assert max(sizes) == 3
            assert first.process.poll() is not None
            driver = start([_script(tmp_path), address], tmp_path)
            assert process_tools.until(lambda: _recorded(tmp_path) >= 20, 60)
        finally:
            head.kill()
            for node in nodes:
                node.kill()
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 1, err
    last = err.strip().splitlines()[-1]
    assert f"the head of the Ray cluster at {address} is gone" in last
    assert "`searchlab resume` goes on" in last
    kept = _recorded(tmp_path)
    assert 20 <= kept < 700
    with ray_nodes.head(cpus=2) as (address, _):
        driver = start([_script(tmp_path), address], tmp_path, PYTHONHASHSEED="0")
        out, err = driver.communicate(timeout=120)
    assert out.startswith("finished"), err
    undisturbed = start([_script(tmp_path)], tmp_path, PYTHONHASHSEED="0")
    assert out == undisturbed.communicate(timeout=120)[0]


def _script(folder: Path) -> Path:
    return process_tools.script(folder, DRIVER)


def _recorded(folder: Path) -> int:
    if not (folder / "run" / "searchlab.db").exists():
        return 0
    try:
        with Database(folder / "run" / "searchlab.db") as base:
            return len(base.read("search").records())
    except StudyError:  # it is being made at this moment
        return 0
