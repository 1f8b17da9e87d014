"""`show RUN --watch`: what another shell sees of a run, and which lag would keep workers busy."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_tools import environment

from searchlab._plain import plain
from searchlab.cli import main
from searchlab.errors import ConfigError
from searchlab.study import Database
from searchlab.testing.study import make_jobs, write
from searchlab.utilisation import lag_for, share_at

SCRIPT = """
import time
import searchlab as sl

def score(a):
    time.sleep(0.02 + a % 7 * 0.03)
    if a % 11 == 0:
        raise ValueError("no value")
    return 1000.0 + a

if __name__ == "__main__":
    space = sl.Space(a=sl.Integer(0, 9999))
    sl.search(space, score, budget=5000, gpu_price=3.5, workers=3, out="run", stop_grace=5,
              baselines={"high": {"a": 9998}})
"""


def test_a_run_is_watched_from_another_shell(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(SCRIPT)
    driver = subprocess.Popen([sys.executable, "job.py"], cwd=tmp_path, env=environment())
    watcher = None
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "run" / "logs").exists():
            assert time.monotonic() < limit
            time.sleep(0.05)
        command = [sys.executable, "-m", "searchlab", "show", "run", "--watch", "--interval", "0.5"]
        watcher = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
        )
        time.sleep(8)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(30) == 0
        out, _ = watcher.communicate(timeout=30)
    finally:
        driver.kill()
        if watcher is not None:
            watcher.kill()
    assert watcher.returncode == 0
    views = [view for view in out.split("\n\n") if view.strip()]
    assert len(views) > 3
    live = views[-2]
    assert "search: driven by " in live
    assert re.search(
        r"search: \d+ evaluated \(\d+ of 5000 paid\), \d+ open, .* [1-9]\d* failed", live
    )
    assert re.search(r"workers: 3; 0 died, 0 too slow, 0 too large, 0 repeats", live)
    assert re.search(r"queue: \d+ chunks wait for a worker", live)
    assert len(re.findall(r"worker \d: (job \d+ for \d+ s|idle)", live)) == 3
    assert re.search(r"busy: \d+ % of the workers' time", live)
    assert re.search(r"lag: lag 6 allows \d+ %(; 95 % needs lag \d+)?", live)
    assert re.search(r"spent: [\d.e-]+ device hours, [\d.e-]+ US dollars", live)
    assert re.search(
        r"better than the best known candidate \([\d.]+ %\): .* dollars per percent", live
    )
    assert views[-1].startswith("search: interrupted; ")
    counts = [int(re.search(r"(\d+) records", view)[1]) for view in views]  # type: ignore[index]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_the_share_of_a_lag_is_that_of_a_hand_calculation() -> None:
    # Two workers, times 3, 1, 1, 1: with lag 2 the third waits for the first.
    assert share_at([3, 1, 1, 1], 2, 2) == pytest.approx(6 / 2 / 4)
    assert share_at([3, 1, 1, 1], 2, None) == 1.0
    assert share_at([3, 1, 1, 1], 2, 4) == 1.0
    assert share_at([1.0] * 10, 2, 1) == pytest.approx(0.5)
    assert share_at([], 2, 1) == 1.0
    for workers, lag in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError):
            share_at([1.0], workers, lag)


def test_the_lag_that_is_named_is_the_smallest_one() -> None:
    draw = random.Random(0)
    for workers, sigma in ((4, 0.5), (16, 0.5), (8, 1.0)):
        seconds = [draw.lognormvariate(0, sigma) for _ in range(1500)]
        lag = lag_for(seconds, workers)
        assert lag is not None
        assert lag % workers == 0
        assert share_at(seconds, workers, lag) >= 0.94
        assert share_at(seconds, workers, lag - workers) < 0.96
    assert lag_for([1.0] * 100, 4) == 4
    assert lag_for([], 4) is None


def test_a_terminal_is_not_steered_by_what_is_stored() -> None:
    assert plain("a\x1b[2Jb\nc\x07") == "a\ufffd[2Jb\nc\ufffd"


def test_a_run_that_has_ended_is_shown_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "study.db")
    with Database(path) as base:
        store = base.open_run("r", config={}, space="s", seed=0, out=str(tmp_path / "runs" / "r"))
        write(store, make_jobs(range(3)))
        store.close("finished")
    monkeypatch.chdir(tmp_path)
    assert main(["show", "r", "--database", path, "--watch", "--interval", "0"]) == 2
    assert "--interval 0" in capsys.readouterr().err
    assert main(["show", "r", "--database", path, "--watch"]) == 0
    assert capsys.readouterr().out == "r: finished; 3 records\n\n"
