"""What several modules of tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from searchlab.testing import ray_nodes


@pytest.fixture(scope="session")
def started_head() -> Iterator[tuple[str, ray_nodes.Node]]:
    """A cluster that all tests share."""
    with ray_nodes.head("--num-gpus", "2", cpus=12) as both:
        yield both


@pytest.fixture(scope="session")
def cluster(started_head: tuple[str, ray_nodes.Node]) -> str:
    """Its address."""
    return started_head[0]
