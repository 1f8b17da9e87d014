"""Runs whose processes are killed, stopped, starved of memory or of disk end as if nothing was."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fault_tools
from fault_tools import MB, enlarge, number_space, python, small_disk

from searchlab.callbacks import Progress
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.evaluator import FunctionEvaluator
from searchlab.executors import LocalExecutor, ProcessExecutor, Retries
from searchlab.records import Records
from searchlab.search import run
from searchlab.study import Database, MemoryRun
from searchlab.testing.faults import (
    Hunter,
    Unreliable,
    config_of,
    descendants,
    disturbed,
    is_alive,
    plan_of,
    recorded,
    stored,
    undisturbed,
)

EVALUATIONS = 40


@pytest.fixture(scope="module")
def wanted() -> Any:
    return undisturbed(EVALUATIONS).trace()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_random_kill_changes_nothing(seed: int, tmp_path: Path, wanted: Any) -> None:
    plan = plan_of(seed, EVALUATIONS)
    print(f"seed {seed}: {plan}")
    outcome = disturbed(tmp_path / "run", plan, EVALUATIONS, plan_seed=seed)
    assert outcome.done == plan
    assert outcome.starts == 1 + sum(fault.kind == "driver" for fault in plan)
    assert outcome.records.trace() == wanted
    assert (outcome.lost, outcome.again, outcome.left) == (0, 0, 0)


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_replaced(tmp_path: Path, wanted: Any) -> None:
    plan = plan_of(11, EVALUATIONS, kinds=("hang",))
    outcome = disturbed(tmp_path / "run", plan, EVALUATIONS, plan_seed=11)
    assert outcome.done == plan
    assert outcome.records.trace() == wanted
    assert (outcome.lost, outcome.again, outcome.left) == (0, 0, 0)


def test_plans_follow_from_their_seed() -> None:
    plans = [plan_of(seed, 100, faults=2) for seed in range(200)]
    assert plans == [plan_of(seed, 100, faults=2) for seed in range(200)]
    assert {fault.kind for plan in plans for fault in plan} == {"driver", "worker"}
    assert all(1 <= fault.at < 50 for plan in plans for fault in plan)


@pytest.mark.parametrize("seed", range(3))
def test_late_and_duplicate_answers_are_dropped(seed: int, wanted: Any) -> None:
    executor = Unreliable(LocalExecutor(), seed, twice=0.8)
    store = MemoryRun()
    run(config_of(EVALUATIONS), store=store, executor=executor)
    assert store.records().trace() == wanted
    assert executor.repeated > 0


# -- twenty seconds of everything at once ----------------------------------------------------


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def shared_memory() -> set[str]:
    """What Python and torch leave there; other programs have their own."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return {name for name in names if name.startswith(("psm_", "torch_", "sem.mp-", "searchlab"))}


@pytest.mark.slow
def test_twenty_seconds_of_faults_leave_nothing_behind(tmp_path: Path, wanted: Any) -> None:
    hunter = Hunter(lambda: descendants(os.getpid()), 5, pause=(0.8, 1.8), stops=0.2)

    def once(number: int) -> None:
        hunter.armed = False
        executor = ProcessExecutor(workers=2, deadline=1.5, retries=30)
        records = recorded(
            tmp_path / f"{number}.db",
            config_of(EVALUATIONS),
            Unreliable(executor, number),
            callbacks=[hunter],
        )
        assert records.trace() == wanted

    once(0)
    before = handles(), shared_memory(), threading.active_count(), descendants(os.getpid())
    began, number = time.monotonic(), 0
    with hunter:
        # A busy machine gets to the strikes later.
        while (spent := time.monotonic() - began) < 20 or (hunter.strikes < 5 and spent < 90):
            number += 1
            once(number)
    after = handles(), shared_memory(), threading.active_count(), descendants(os.getpid())
    assert hunter.strikes >= 5
    assert number >= 2
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert after[2] <= before[2]
    assert set(after[3]) <= set(before[3])


# -- memory -------------------------------------------------------------------------------------


def memory_config(function: Any, budget: int) -> SearchConfig:
    evaluator = FunctionEvaluator(function, number_space())
    stage = Stage("search", number_space(), evaluator, AlgorithmSpec("random"), Budget(budget))
    return SearchConfig((stage,), seed=0, lag=4, chunk=1)


def records_of(config: SearchConfig, executor: Any, *callbacks: Any) -> Records:
    store = MemoryRun()
    run(config, store=store, executor=executor, callbacks=callbacks)
    return store.records()


def test_a_candidate_that_needs_too_much_memory_fails_and_the_others_do_not() -> None:
    executor = ProcessExecutor(workers=2, memory=200 * MB, retries=Retries(memory=1))
    records = records_of(memory_config(fault_tools.hungry, 10), executor)
    values = number_space().unpack(records.genotypes)["a"]
    too_much = values % 5 == 0
    assert too_much.any()
    assert (records.state[too_much] == 1).all()
    assert (records.state[~too_much] == 0).all()
    reasons = {records.reason[i] for i in np.flatnonzero(too_much).tolist()}
    assert all(text.startswith("memory: the worker used ") for text in reasons)
    assert all(text.endswith(" of 200 MB, 2 attempts") for text in reasons)
    assert executor.usage().overruns == 2 * executor.usage().repeats >= 2 * too_much.sum()
    assert executor.usage().deaths == 0


def test_a_leak_costs_a_new_worker_now_and_then() -> None:
    executor = ProcessExecutor(workers=1, memory=200 * MB, retries=Retries(memory=3))
    records = records_of(memory_config(fault_tools.leaky, 16), executor)
    assert (records.state == 0).all()
    assert executor.usage().overruns >= 1


# -- the disk -----------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_and_more_room_goes_on_with_it(
    tmp_path: Path, wanted: Any
) -> None:
    point = tmp_path / "disk"
    arguments = ("-m", "searchlab.testing.faults", point / "run", "--executor", "local",
                 "--evaluations", EVALUATIONS)  # fmt: skip
    with small_disk(point, "140k") as mounted:
        (point / "run").mkdir()
        if mounted:
            done = python(*arguments)
            assert "disk full at" in done.stderr
        else:  # a limit on the size of files instead

            def limit() -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))

            done = python(*arguments, preexec_fn=limit)
        print("by", "tmpfs" if mounted else "RLIMIT_FSIZE", done.stderr)
        assert done.returncode == 1
        assert "StudyError" in done.stderr
        before = stored(point / "run")
        if mounted:
            enlarge(point, "8m")
        again = python(*arguments)
        assert again.returncode == 0, again.stderr
        records = stored(point / "run")
        assert records is not None
        assert records.trace() == wanted
        if before is not None and len(before):
            assert records.finished[: len(before)].tolist() == before.finished.tolist()


# -- the journal --------------------------------------------------------------------------------


def test_a_journal_cut_at_every_byte_of_its_tail_loses_whole_batches_only(
    tmp_path: Path, wanted: Any
) -> None:
    """The last batches byte by byte, the whole journal at and around every frame."""
    config = config_of(12)
    base = Database(tmp_path / "study.db")
    space = config.stages[0].space.fingerprint
    store = base.open_run("run", config=config.describe(), space=space, seed=0, out="")
    kept: list[int] = []

    def peek(progress: Progress) -> None:
        kept.append(len(store.records()))
        if len(kept) == 12:  # the journal as a killed driver leaves it, before the run is closed
            for end in ("", "-wal"):
                shutil.copy(tmp_path / f"study.db{end}", tmp_path / f"left.db{end}")

    run(config, store=store, callbacks=[peek])
    base.close()
    journal = (tmp_path / "left.db-wal").read_bytes()
    frame = 4096 + 24
    frames = (len(journal) - 32) // frame
    assert len(journal) == 32 + frames * frame
    around = {32 + n * frame + step for n in range(frames + 1) for step in (-1, 0, 1, 23, 24, 25)}
    tail = range(len(journal) - 2 * frame - 1, len(journal) + 1)
    cuts = sorted({0, 1, 31, *around, *tail} & set(range(len(journal) + 1)))
    work = tmp_path / "cut"
    work.mkdir()
    shutil.copy(tmp_path / "left.db", work / "study.db")
    (work / "study.db-wal").write_bytes(journal)
    seen: list[int] = []
    for cut in reversed(cuts):
        (work / "study.db-shm").unlink(missing_ok=True)
        os.truncate(work / "study.db-wal", cut)
        seen.append(_readable(work / "study.db"))
    seen.reverse()
    assert seen == sorted(seen)
    assert seen[-1] == 12
    assert set(seen) >= set(range(4, 13))
    for cut in (cuts[-1] - 1, cuts[-1] - frame, cuts[len(cuts) // 2], 40):  # and it goes on
        for end in ("-shm", "-wal", ""):
            (work / f"study.db{end}").unlink(missing_ok=True)
        shutil.copy(tmp_path / "left.db", work / "study.db")
        (work / "study.db-wal").write_bytes(journal[:cut])
        with closing(sqlite3.connect(work / "study.db", isolation_level=None)) as connection:
            if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'runs'").fetchone():
                connection.execute("UPDATE runs SET owner = NULL")  # its driver is dead
        with Database(work / "study.db") as again:
            other = again.open_run("run", config=config.describe(), space=space, seed=0, out="")
            run(config, store=other)
            assert again.read("run").records().trace() == undisturbed(12).trace()


def _readable(path: Path) -> int:
    """How many records there are: whole ones, from id 0 on."""
    # A reader leaves the journal as it is.
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        if not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            return 0
        ids = [i for (i,) in connection.execute("SELECT id FROM records ORDER BY id")]
        counted = connection.execute("SELECT coalesce(sum(records), 0) FROM runs").fetchone()[0]
    assert ids == list(range(counted))
    return len(ids)


# -- logs ---------------------------------------------------------------------------------------


def test_what_workers_print_is_kept(tmp_path: Path) -> None:
    executor = ProcessExecutor(workers=2)
    executor.log_to(tmp_path / "logs")
    records = records_of(memory_config(fault_tools.chatty, 30), executor)
    assert (records.state == 1).any()
    logs = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert logs == ["worker-0.log", "worker-1.log"]
    text = "".join((tmp_path / "logs" / name).read_text() for name in logs)
    assert text.count("a new process") == 2
    assert text.count("candidate ") >= 30
    assert "ValueError: no value for" in text
    assert "Traceback" in text


def test_processes_that_are_gone_are_no_longer_alive() -> None:
    assert is_alive(os.getpid())
    assert not is_alive(2**22 + 1)
