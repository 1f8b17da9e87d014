"""The executor of Ray clusters, on one cluster of this machine that all tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from searchlab.executors import Executor
from searchlab.executors.ray import RayExecutor
from searchlab.testing.executor import FATAL_FILE, IsolatingExecutorSuite, evaluators

pytestmark = pytest.mark.ray


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a cluster that all tests share."""
    from ray_tools import head

    with head(cpus=8) as (address, _):
        yield address


@pytest.fixture(scope="module")
def shared(cluster: str) -> Iterator[Executor]:
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
