"""Ctrl-C, SIGTERM and SIGUSR1: what is at work finishes or is lost, and the run can be resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from searchlab.errors import ConfigError
from searchlab.interruption import INTERRUPTIONS, Interruption
from searchlab.records import Records
from searchlab.study import Database

ROOT = Path(__file__).resolve().parents[2]
SPACE = "variables:\n  a: {integer: [0, 99]}\n  b: {integer: [0, 99]}\n"
JOB = """echo "$3" >> begun
sleep $1
printf '{"objectives": {"y": %s}}' "$3" > "$2"
echo "$3" >> ended
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "searchlab", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def begin(folder: Path, seconds: str, *more: str) -> subprocess.Popen[str]:
    """A run of a command that sleeps, once it has recorded something."""
    (folder / "space.yaml").write_text(SPACE)
    (folder / "job.sh").write_text(JOB)
    process = start(
        folder,
        *("run", "--space", "space.yaml", "--evaluator", "command", "--objective", "y:min"),
        *(
            "--command",
            f"sh job.sh {seconds} {{out}} {{id}} {{plan}}",
            "--name",
            "t",
            "--budget",
            "1000",
        ),
        *("--baselines", "none", *more),
    )
    limit = time.monotonic() + 60
    while lines(folder, "begun") < 6:
        assert time.monotonic() < limit
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def signal_job(driver: int, number: signal.Signals) -> int:
    """Sends a signal to all our processes below a driver, as schedulers do it; how many."""
    family, found = [driver], 0
    while family:
        pid = family.pop()
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                family += map(int, (task / "children").read_text().split())
            if pid == driver or b"searchlab" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, number)
                found += 1
        except OSError:  # it has ended meanwhile
            continue
    return found


def lines(folder: Path, name: str) -> int:
    path = folder / name
    return len(path.read_text().splitlines()) if path.exists() else 0


def stored(folder: Path) -> tuple[Records, Any, str]:
    with Database(folder / "runs" / "searchlab.db") as base:
        run = base.read("t")
        return run.records(), run.get_meta(INTERRUPTIONS), str(run.get_meta("status"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_what_is_at_work_finishes_and_nothing_new_begins(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = begin(tmp_path, "0.3", "--workers", "2")
    assert signal_job(process.pid, number) >= 5  # the driver, workers, and what starts commands
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert time.monotonic() - began < 15
    assert "interrupted; go on with: searchlab resume t" in out
    assert f"{number.name}: what is being evaluated has 20 s to finish" in err
    assert "Traceback" not in err
    records, noted, status = stored(tmp_path)
    assert status == "interrupted"
    assert [entry["signal"] for entry in noted] == [number.name]
    assert noted[0]["lost"] == []
    # All that had begun has ended and is recorded.
    assert lines(tmp_path, "begun") == lines(tmp_path, "ended") == len(records)
    assert (records.state == 0).all()
    logs = tmp_path / "runs" / "t" / "logs"
    assert sorted(path.name for path in logs.iterdir()) == ["worker-0.log", "worker-1.log"]
    if number != signal.SIGTERM:
        return
    again = start(tmp_path, "resume", "t", "--budget", str(len(records) + 2))
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert lines(tmp_path, "begun") == len(records) + 2  # nothing twice


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_takes_longer_than_the_grace_is_lost_and_comes_again(
    tmp_path: Path, workers: str
) -> None:
    process = begin(tmp_path, "0.1", "--workers", workers)
    (tmp_path / "job.sh").write_text(JOB.replace("sleep $1", "sleep 600"))
    hanging = int(workers)
    limit = time.monotonic() + 30
    before = -1
    while before != lines(tmp_path, "begun") or before < lines(tmp_path, "ended") + hanging:
        assert time.monotonic() < limit
        before = lines(tmp_path, "begun")
        time.sleep(0.5)
    process.terminate()
    time.sleep(1.0)
    assert process.poll() is None
    process.terminate()  # the second one does not wait for the grace
    began = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 75, err
    assert "searchlab resume t" in out
    records, noted, status = stored(tmp_path)
    assert status == "interrupted"
    assert len(noted[0]["lost"]) == hanging
    assert set(noted[0]["lost"]).isdisjoint(records.ids.tolist())
    assert (records.state == 0).all()
    (tmp_path / "job.sh").write_text(JOB)
    budget = str(max(noted[0]["lost"]) + 2)
    again = start(tmp_path, "resume", "t", "--budget", budget)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    records, *_ = stored(tmp_path)
    assert set(noted[0]["lost"]) <= set(records.ids.tolist())
    assert (records.state == 0).all()
    if workers == "1":
        return
    check = start(tmp_path, "verify", "t")
    assert "verified" in check.communicate(timeout=60)[0]


def test_the_grace_ends_by_itself(tmp_path: Path) -> None:
    process = begin(tmp_path, "0.2", "--stop-grace", "1")
    (tmp_path / "job.sh").write_text(JOB.replace("sleep $1", "sleep 600"))
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert 0.9 < time.monotonic() - began < 10
    assert process.returncode == 75, err
    assert len(stored(tmp_path)[1][0]["lost"]) == 1


SCRIPT = """
import time
import searchlab as sl

def score(a):
    with open("begun", "a") as file:
        file.write(f"{a}\\n")
    time.sleep(0.2)
    with open("ended", "a") as file:
        file.write(f"{a}\\n")
    return a

if __name__ == "__main__":
    space = sl.Space(a=sl.Integer(0, 9999))
    result = sl.search(space, score, budget=500, workers=2, out="run", stop_grace=10)
    print(result.meta["status"], result.counts["evaluations"])
"""


def test_a_script_hears_of_it_too(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "job.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 60
    while lines(tmp_path, "begun") < 8:
        assert time.monotonic() < limit
        time.sleep(0.02)
    assert signal_job(process.pid, signal.SIGTERM) >= 2
    out, _ = process.communicate(timeout=30)
    status, count = out.split()
    assert status == "interrupted"
    assert (
        lines(tmp_path, "begun") == lines(tmp_path, "ended") == int(count) + 4
    )  # first measurements


def test_a_grace_is_a_number_of_seconds() -> None:
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="grace"):
            Interruption(bad)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with Interruption().listening():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
