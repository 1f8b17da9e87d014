"""Runs of checkpoint mixing by the command line: killed, resumed, and with several workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from searchlab.records import Records
from searchlab.study import Database

ROOT = Path(__file__).resolve().parents[2]
USER = """
import time

def distance(state, seed):
    time.sleep(0.02)
    return float((state["w"].double() - 3.5).abs().mean()) + 1e-9 * (seed % 97)
"""
SEARCH = (
    *("lcsc", "--checkpoints", "out", "--evaluator", "user_score:distance"),
    *("--budget", "72", "--lag", "8", "--quiet", "--database", "a.db"),
)


def write_run(folder: Path, k: int = 6) -> None:
    (folder / "out").mkdir(parents=True)
    (folder / "user_score.py").write_text(USER)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, k + 1):
        w = step / k * torch.ones(80) + 0.01 * torch.randn(80, generator=generator)
        save_file({"w": w}, folder / "out" / f"step_{step}.safetensors")


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "searchlab", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # killed with its workers
    )


def finish(folder: Path, *arguments: str) -> str:
    process = started(folder, *arguments)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    return text


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
def test_four_workers_a_kill_and_one_worker_give_the_trace_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        write_run(folder)
    finish(one, "run", *SEARCH, "--name", "whole")
    whole = records_of(one, "whole")

    workers = ("--executor", "processes", "--workers", "4")
    process = started(other, "run", *SEARCH, *workers, "--name", "killed")
    try:
        limit = time.monotonic() + 150
        while count(other, "killed") < 40 and process.poll() is None:
            assert time.monotonic() < limit
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    before = records_of(other, "killed")
    assert 40 <= len(before) < len(whole)
    finish(other, "resume", "killed", "--database", "a.db")

    killed = records_of(other, "killed")
    assert killed.trace() == whole.trace()
    # Nothing that was recorded is evaluated again: its time stays.
    now = dict(zip(killed.ids.tolist(), killed.finished.tolist(), strict=True))
    assert {i: now[i] for i in before.ids.tolist()} == dict(
        zip(before.ids.tolist(), before.finished.tolist(), strict=True)
    )
    merged = "runs/{}/export/merged.safetensors"
    assert (one / merged.format("whole")).read_bytes() == (
        other / merged.format("killed")
    ).read_bytes()
