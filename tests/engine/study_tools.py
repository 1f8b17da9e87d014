"""What the tests of the study share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import searchlab
from searchlab import _study_schema
from searchlab.study import Database, Records, Run, Store
from searchlab.testing.study import make_jobs, write

ROOT = Path(searchlab.__file__).resolve().parent.parent
BATCH = 10


def open_run(database: Database, name: str = "a", **changed: Any) -> Run:
    settings: dict[str, Any] = {"config": {}, "space": "s", "seed": 0, "out": "", **changed}
    return database.open_run(name, **settings)


def fill(store: Store, batches: int, *, start: int = 0, size: int = BATCH) -> None:
    """Commits batches of jobs whose values are their ids."""
    for batch in range(start, start + batches):
        write(store, make_jobs(range(batch * size, (batch + 1) * size)))
        store.commit()


def check_prefix(records: Records, *, size: int = BATCH) -> int:
    """Whole batches from id 0 on, each with its own value; returns how many."""
    n = len(records)
    assert n % size == 0
    assert records.ids.tolist() == list(range(n))
    assert records.values.ravel().tolist() == [float(i) for i in range(n)]
    return n // size


def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A table of mounts that says this folder is of this kind."""
    table = tmp_path / "mounts"
    point = str(tmp_path).replace(" ", "\\040")
    table.write_text(f"dev / ext4 rw 0 0\nserver:/x {point} {kind} rw 0 0\n")
    monkeypatch.setattr(_study_schema, "_MOUNTS", table)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=environment,
    )


WRITER = """
import sys
from searchlab.study import Database
from searchlab.testing.study import make_jobs, write
run = Database(sys.argv[1]).open_run("a", config={}, space="s", seed=0, out="")
start = len(run.records()) // 10
for batch in range(start, start + 100000):
    write(run, make_jobs(range(10 * batch, 10 * batch + 5)))
    write(run, make_jobs(range(10 * batch + 5, 10 * batch + 10)))
    run.commit()
    print(batch + 1, flush=True)
"""
