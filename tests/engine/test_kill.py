"""Kill -9 at any moment: a run of the command line goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from run_tools import DATABASE, count, finish, records_of, started, times_of

SEARCH = [
    *("solver_schedule", "--problem", "mixture", "--nfe", "5..6", "--budget", "120"),
    *("--samples", "64", "--held-out", "32", "--report-banks", "2", "--quiet"),
]


@pytest.mark.slow
def test_three_kills_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Only what is killed needs a process of its own.
    finish(tmp_path, monkeypatch, "run", *SEARCH, *DATABASE, "--out", "whole")
    whole = records_of(tmp_path, "whole")
    searched = int((whole.stage < 1000).sum())

    # Values of the undisturbed run must not help: the killed one has a database of its own.
    folder = tmp_path / "other"
    folder.mkdir()
    arguments = ["run", *SEARCH, *DATABASE, "--out", "killed"]
    draw = random.Random(5)
    seen: dict[int, float] = {}
    for kill in range(3):
        target = draw.randint(kill * searched // 3 + 1, (kill + 1) * searched // 3)
        process = started(folder, *arguments)
        try:
            limit = time.monotonic() + 100
            while count(folder, "killed") < target and process.poll() is None:
                assert time.monotonic() < limit
                time.sleep(0.05)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
        records = records_of(folder, "killed")
        assert target <= len(records) < len(whole)
        assert seen.items() <= times_of(records).items()
        seen = times_of(records)
        arguments = ["resume", "killed", *DATABASE]
    finish(folder, monkeypatch, *arguments)

    killed = records_of(folder, "killed")
    assert killed.trace() == whole.trace()
    assert seen.items() <= times_of(killed).items()
    np.testing.assert_array_equal(killed.cached, whole.cached)
    np.testing.assert_array_equal(killed.attempts, whole.attempts)
    capsys.readouterr()
    finish(folder, monkeypatch, "verify", "killed", *DATABASE)
    assert "verified" in capsys.readouterr().out
    one, two = (
        json.loads((place / "result.json").read_text())
        for place in (tmp_path / "whole", folder / "killed")
    )
    for key in ("rows", "front", "plans", "counts", "verdict"):
        assert one[key] == two[key]
