"""Runs of checkpoint mixing by the command line: killed, resumed, and with several workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from run_tools import DATABASE, count, finish, records_of, started, times_of
from safetensors.torch import save_file

USER = """
import time

def distance(state, seed):
    time.sleep(0.02)
    return float((state["w"].double() - 3.5).abs().mean()) + 1e-9 * (seed % 97)
"""
SEARCH = (
    *("lcsc", "--checkpoints", "out", "--evaluator", "user_score:distance"),
    *("--budget", "72", "--lag", "8", "--quiet", *DATABASE),
)


def write_run(folder: Path, k: int = 6) -> None:
    (folder / "out").mkdir(parents=True)
    (folder / "user_score.py").write_text(USER)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, k + 1):
        w = step / k * torch.ones(80) + 0.01 * torch.randn(80, generator=generator)
        save_file({"w": w}, folder / "out" / f"step_{step}.safetensors")


@pytest.mark.slow
def test_four_workers_a_kill_and_one_worker_give_the_trace_of_an_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        write_run(folder)
    finish(one, monkeypatch, "run", *SEARCH, "--name", "whole")
    whole = records_of(one, "whole")

    workers = ("--executor", "processes", "--workers", "4")
    process = started(other, "run", *SEARCH, *workers, "--name", "killed")
    try:
        limit = time.monotonic() + 150
        while count(other, "killed") < 40 and process.poll() is None:
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    before = records_of(other, "killed")
    assert 40 <= len(before) < len(whole)
    finish(other, monkeypatch, "resume", "killed", *DATABASE)

    killed = records_of(other, "killed")
    assert killed.trace() == whole.trace()
    # Nothing that was recorded is evaluated again: its time stays.
    assert times_of(before).items() <= times_of(killed).items()
    merged = "runs/{}/export/merged.safetensors"
    assert (one / merged.format("whole")).read_bytes() == (
        other / merged.format("killed")
    ).read_bytes()
