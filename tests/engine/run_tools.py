"""What the tests of killed command lines share: runs in processes, and what they have recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from searchlab.cli import main
from searchlab.errors import SearchlabError
from searchlab.records import Records
from searchlab.study import Database

ROOT = Path(__file__).resolve().parents[2]
DATABASE = ("--database", "a.db")


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a folder, as the leader of its own group: it is killed with its workers."""
    return subprocess.Popen(
        [sys.executable, "-m", "searchlab", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The command in this process; it has to succeed.

    As in a process of its own, modules of the folder are found, and are others in the next folder.
    """
    threads, loaded = torch.get_num_threads(), set(sys.modules)
    try:
        with monkeypatch.context() as here:
            here.chdir(folder)
            here.syspath_prepend(folder)
            assert main([*arguments]) == 0
    finally:
        torch.set_num_threads(threads)
        for name in set(sys.modules) - loaded:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).is_relative_to(folder):
                del sys.modules[name]


def records_of(folder: Path, name: str) -> Records:
    """What a run has recorded in a folder's database."""
    with Database(folder / "a.db") as base:
        return base.read(name).records()


def count(folder: Path, name: str) -> int:
    """Records so far; 0 while there is no run yet."""
    if not (folder / "a.db").is_file():
        return 0
    try:
        with Database(folder / "a.db") as base:
            return next((info.records for info in base.runs() if info.name == name), 0)
    except SearchlabError:  # the file is being made
        return 0


def times_of(records: Records) -> dict[int, float]:
    """When each record was made. A record, once there, is never made again: its time stays."""
    return dict(zip(records.ids.tolist(), records.finished.tolist(), strict=True))
