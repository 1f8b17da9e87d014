"""Kill -9 at any moment: a run of the command line goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from searchlab.records import Records
from searchlab.study import Database

ROOT = Path(__file__).resolve().parents[2]
SEARCH = [
    *("solver_schedule", "--problem", "mixture", "--nfe", "5..6", "--budget", "120"),
    *("--samples", "128", "--held-out", "128", "--report-banks", "2", "--quiet"),
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "searchlab", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def finish(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def records_of(folder: Path, name: str) -> Records:
    with Database(folder / "a.db") as base:
        return base.read(name).records()


def count(folder: Path, name: str) -> int:
    """Records so far; 0 while there is no run yet."""
    if not (folder / "a.db").is_file():
        return 0
    try:
        with Database(folder / "a.db") as base:
            return next((info.records for info in base.runs() if info.name == name), 0)
    except Exception:  # the file is being made
        return 0


@pytest.mark.slow
def test_three_kills_change_nothing(tmp_path: Path) -> None:
    arguments = ["run", *SEARCH, "--database", "a.db", "--out", "whole"]
    finish(tmp_path, *arguments)
    whole = records_of(tmp_path, "whole")
    searched = int((whole.stage < 1000).sum())

    # Values of the undisturbed run must not help: the killed one has a database of its own.
    folder = tmp_path / "other"
    folder.mkdir()
    arguments = ["run", *SEARCH, "--database", "a.db", "--out", "killed"]
    draw = random.Random(5)
    seen: dict[int, float] = {}
    for kill in range(3):
        target = draw.randint(kill * searched // 3 + 1, (kill + 1) * searched // 3)
        process = subprocess.Popen(
            command(*arguments),
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            limit = time.monotonic() + 100
            while count(folder, "killed") < target and process.poll() is None:
                assert time.monotonic() < limit
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
        records = records_of(folder, "killed")
        assert target <= len(records) < len(whole)
        now = dict(zip(records.ids.tolist(), records.finished.tolist(), strict=True))
        # A record, once there, is never made again: its time stays.
        assert {i: now[i] for i in seen} == seen
        seen = now
        arguments = ["resume", "killed", "--database", "a.db"]
    finish(folder, *arguments)

    killed = records_of(folder, "killed")
    assert killed.trace() == whole.trace()
    now = dict(zip(killed.ids.tolist(), killed.finished.tolist(), strict=True))
    assert {i: now[i] for i in seen} == seen
    np.testing.assert_array_equal(killed.cached, whole.cached)
    np.testing.assert_array_equal(killed.attempts, whole.attempts)
    assert "verified" in finish(folder, "verify", "killed", "--database", "a.db")
    one, two = (
        json.loads((place / "result.json").read_text())
        for place in (tmp_path / "whole", folder / "killed")
    )
    for key in ("rows", "front", "plans", "counts", "verdict"):
        assert one[key] == two[key]
