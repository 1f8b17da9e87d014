from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from searchlab.study import Database, MemoryRun, Run
from searchlab.testing.study import StudySuite


class TestMemoryRun(StudySuite):
    @pytest.fixture
    def store(self) -> MemoryRun:
        return MemoryRun()


class TestRun(StudySuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Run]:
        with Database(tmp_path / "study.db") as database:
            run = database.open_run("suite", config={}, space="s", seed=0, out="")
            yield run
            run.close("finished")
