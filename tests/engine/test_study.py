"""The study: the suite, crashes, leases, several drivers and readers at once."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from study_tools import ROOT, WRITER, check_prefix, fill, mounts, open_run, python

from searchlab import _study_schema
from searchlab._study_lease import Owner
from searchlab.errors import RunInUseError, SearchlabWarning, StudyError
from searchlab.population import OK, Evaluations
from searchlab.study import Database, MemoryRun, Run, Store
from searchlab.testing.study import EVALUATOR, StudySuite, make_jobs, write


class TestMemoryRun(StudySuite):
    @pytest.fixture
    def store(self) -> MemoryRun:
        return MemoryRun()


class TestRun(StudySuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Run]:
        with Database(tmp_path / "study.db") as database:
            run = open_run(database)
            yield run
            run.close("finished")


class TestRunOnRollbackJournal(StudySuite):
    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
        mounts(tmp_path, monkeypatch, "nfs4")
        with Database(tmp_path / "study.db", durability="power") as database:
            with pytest.warns(SearchlabWarning, match="network file system"):
                run = open_run(database)
            yield run
            run.close("finished")


# -- both stores alike --------------------------------------------------------------------------


def test_memory_and_database_hold_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    database = Database(tmp_path / "study.db")
    stores: list[Store] = [MemoryRun("a"), open_run(database)]
    first = 0
    for batch in range(30):
        n = int(rng.integers(0, 12))
        states = rng.integers(0, 4, n).astype(np.int8)
        told = Evaluations(
            values=np.where((states == OK)[:, None], rng.normal(size=(n, 2)), np.nan),
            state=states,
            reason=["" if state == OK else f"reason {state} ß" for state in states],
            std_error=rng.random((n, 2)) if batch % 2 else None,
            signals=np.where(rng.random((n, 3)) < 0.3, np.nan, rng.normal(size=(n, 3))),
            cost_s=rng.random(n),
        )
        jobs = make_jobs(
            np.arange(first, first + n),
            stage=batch // 10,
            replicate=batch % 3,
            told_at_ask=max(0, first - 8),
            origin=("vary",) * n,
            parents=rng.integers(-1, 5, (n, 2)),
        )
        first += n
        for store in stores:
            write(store, jobs, told, cached=states == OK, predicted=(told.cost_s, told.cost_s))
            store.record_void([first], jobs.stage, jobs.told_at_ask)
            if batch % 4 == 0:
                store.commit()
        first += 1
    for store in stores:
        store.commit()
    one, two = (store.records() for store in stores)
    assert len(one) > 100
    assert one.trace() == two.trace()
    # A void row is stamped with the moment it was recorded at, which differs between the two.
    evaluated = one.state != 4
    for name in vars(one):
        left, right = (getattr(r.take(evaluated), name) for r in (one, two))
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)
        else:
            assert left == right, name
    keys = make_jobs(range(256)).keys
    found = [
        store.lookup(keys, evaluator=EVALUATOR, fidelity=0, replicate=1, other_runs=True)
        for store in stores
    ]
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 5
    for key, answer in found[0].items():
        assert answer.values.tobytes() == found[1][key].values.tobytes()


# -- crashes ------------------------------------------------------------------------------------


def test_a_killed_writer_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    done = 0
    for kill in range(3):
        writer = python(WRITER, path)
        assert writer.stdout is not None
        for _ in range(5 + 7 * kill):
            told = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.wait()
        told = int(rest[-1]) if rest else told
        batches = check_prefix(Database(path).read("a").records())
        # The kill may fall between the commit and the line that tells of it.
        assert told <= batches <= told + 1
        assert batches > done
        done = batches
    run = open_run(Database(path), lease_s=60)
    assert check_prefix(run.records()) == done
    run.close("finished")


def test_a_batch_that_was_not_committed_is_gone_as_a_whole(tmp_path: Path) -> None:
    code = WRITER.replace("    run.commit()", "    batch < 3 and run.commit()").replace(
        "    print",
        "    batch == 3 and __import__('os').kill(__import__('os').getpid(), 9)\n    print",
    )
    writer = python(code, tmp_path / "study.db")
    assert writer.wait() == -signal.SIGKILL
    assert check_prefix(Database(tmp_path / "study.db").read("a").records()) == 3
    run = open_run(Database(tmp_path / "study.db"))
    write(run, make_jobs(range(30, 40)))  # the lost ids may be recorded now
    run.commit()
    assert check_prefix(run.records()) == 4


def test_a_torn_journal_leaves_a_prefix(tmp_path: Path) -> None:
    source = tmp_path / "study.db"
    run = open_run(Database(source))
    fill(run, 20)
    journal = source.with_name("study.db-wal")
    size = journal.stat().st_size
    seen = []
    for cut in [0, 1, 31, 32, 33, 4000, *range(5000, size, size // 23), size - 1, size]:
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        shutil.copy(source, folder / "study.db")
        (folder / "study.db-wal").write_bytes(journal.read_bytes()[:cut])
        database = Database(folder / "study.db")
        # Before the first frames of a run there are no tables yet: resuming makes them.
        peek = shutil.copytree(folder, tmp_path / f"peek-{cut}")
        with sqlite3.connect(peek / "study.db") as connection:
            tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            there = tables and connection.execute("SELECT count(*) FROM runs").fetchone()[0]
        if there:
            seen.append(check_prefix(database.read("a").records()))
        else:
            fresh = open_run(database)
            assert len(fresh.records()) == 0
            fresh.close("finished")
            seen.append(0)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == 20
    assert len(set(seen)) > 10


def test_a_reader_undoes_the_half_written_batch_of_a_dead_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os, sys
from pathlib import Path
import searchlab.study as study
from searchlab.study import Database
from searchlab.testing.study import make_jobs, write
study.is_network = lambda path: True
study._warned.add(Path(sys.argv[1]))
run = Database(sys.argv[1]).open_run("a", config={}, space="s", seed=0, out="")
write(run, make_jobs(range(10)))
run.commit()
run._read("PRAGMA cache_size=1")  # pages reach the file before the commit
with run._transaction(write=True) as connection:
    run._execute(connection, "UPDATE records SET values_blob = zeroblob(20000)")
    os.kill(os.getpid(), 9)
"""
    path = tmp_path / "study.db"
    assert python(code, path).wait() == -signal.SIGKILL
    assert path.with_name("study.db-journal").stat().st_size > 0
    mounts(tmp_path, monkeypatch, "nfs")
    assert check_prefix(Database(path).read("a").records()) == 1


# -- the lease ----------------------------------------------------------------------------------


def test_a_second_driver_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    first = open_run(Database(path))
    with pytest.raises(RunInUseError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        open_run(Database(path))
    code = (
        "import sys; from searchlab.study import Database\n"
        "Database(sys.argv[1]).open_run('a', config={}, space='s', seed=0, out='')\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert f"RunInUseError: run 'a' is driven by process {os.getpid()} " in other.stderr
    open_run(Database(path), "b").close("finished")
    first.close("finished")
    open_run(Database(path)).close("finished")


@pytest.mark.parametrize("reap", [True, False], ids=["reaped", "zombie"])
def test_the_run_of_a_dead_process_is_taken_over_at_once(tmp_path: Path, reap: bool) -> None:
    writer = python(WRITER, tmp_path / "study.db")
    assert writer.stdout is not None
    writer.stdout.readline()
    with pytest.raises(RunInUseError, match=f"process {writer.pid} "):
        open_run(Database(tmp_path / "study.db"))
    writer.kill()
    if reap:
        writer.wait()
    else:
        os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)
    run = open_run(Database(tmp_path / "study.db"))
    assert check_prefix(run.records()) >= 1
    writer.wait()


def test_a_lease_that_ran_out_is_taken_over_and_the_old_driver_hears_of_it(tmp_path: Path) -> None:
    database = Database(tmp_path / "study.db")
    old = open_run(database, lease_s=0.05)
    fill(old, 1)
    write(old, make_jobs([10]))
    time.sleep(0.1)
    new = open_run(database)
    with pytest.raises(StudyError, match="taken over by another driver"):
        write(old, make_jobs([11]))
    with pytest.raises(StudyError, match="taken over by another driver"):
        old.commit()
    with pytest.raises(StudyError, match="taken over by another driver"):
        old.heartbeat()
    old.close("failed")
    assert check_prefix(new.records()) == 1
    assert new.get_meta("status") == "running"
    fill(new, 1, start=1)
    assert check_prefix(new.records()) == 2


def test_a_commit_is_fenced_even_before_the_lease_ends(tmp_path: Path) -> None:
    database = Database(tmp_path / "study.db")
    run = open_run(database)
    fill(run, 1)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("UPDATE runs SET owner = 'elsewhere:1:0-x'")
    write(run, make_jobs([10]))
    with pytest.raises(StudyError, match="taken over"):
        run.commit()
    with pytest.raises(StudyError, match="taken over"):
        write(run, make_jobs([11]))
    assert check_prefix(database.read("a").records()) == 1


def test_a_live_lease_of_another_host_holds(tmp_path: Path) -> None:
    database = Database(tmp_path / "study.db")
    open_run(database).close("finished")
    with sqlite3.connect(tmp_path / "study.db") as connection:
        values = ("node7:1:0-x", time.time() + 100)
        connection.execute("UPDATE runs SET owner = ?, lease_until = ?", values)
    with pytest.raises(RunInUseError, match="process 1 on node7"):
        open_run(database)
    assert database.runs()[0].live
    assert database.runs()[0].driver == "node7:1"


def test_heartbeats_keep_the_lease(tmp_path: Path) -> None:
    database = Database(tmp_path / "study.db")
    run = open_run(database, lease_s=0.6)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        run.heartbeat()
        time.sleep(0.05)
    with pytest.raises(RunInUseError):
        open_run(database)
    fill(run, 1)


def test_an_overdue_driver_goes_on_when_nobody_came(tmp_path: Path) -> None:
    run = open_run(Database(tmp_path / "study.db"), lease_s=0.02)
    time.sleep(0.05)
    fill(run, 1)
    assert check_prefix(run.records()) == 1


def test_owner_reads_back() -> None:
    owner = Owner.here()
    assert Owner.parse(str(owner)) == owner
    assert not owner.is_dead()
    assert Owner.parse("fe80::1:55:0-ab") == Owner("fe80::1", 55, "0-ab")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert Owner(owner.host, gone.pid, owner.token).is_dead()
    assert not Owner("another-host", gone.pid, owner.token).is_dead()
    assert not Owner(owner.host, gone.pid, "1-other-namespace").is_dead()


# -- several at once ----------------------------------------------------------------------------


def test_a_reader_sees_whole_batches_while_another_process_writes(tmp_path: Path) -> None:
    writer = python(WRITER, tmp_path / "study.db")
    assert writer.stdout is not None
    writer.stdout.readline()
    reader = Database(tmp_path / "study.db").read("a")
    seen = [check_prefix(reader.records()) for _ in range(15)]
    info = Database(tmp_path / "study.db").runs()[0]
    assert (info.live, info.status) == (True, "running")
    writer.kill()
    writer.wait()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


def test_an_open_transaction_hides_its_rows_and_blocks_no_reader(tmp_path: Path) -> None:
    database = Database(tmp_path / "study.db")
    run = open_run(database)
    fill(run, 2)
    with sqlite3.connect(tmp_path / "study.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM records")
        started = time.monotonic()
        assert check_prefix(database.read("a").records()) == 2
        assert time.monotonic() - started < 5
        other.execute("ROLLBACK")


def test_a_locked_file_is_named_and_the_batch_can_be_committed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_study_schema, "BUSY_TIMEOUT_S", 0.1)
    run = open_run(Database(tmp_path / "study.db"))
    write(run, make_jobs(range(10)))
    other = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StudyError, match="stayed locked by another process"):
        run.commit()
    assert len(run.records()) == 0
    other.execute("ROLLBACK")
    other.close()
    run.commit()
    assert check_prefix(run.records()) == 1


def test_two_runs_of_one_file_are_written_at_once(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def drive(name: str) -> None:
        try:
            run = open_run(Database(tmp_path / "study.db"), name)
            fill(run, 40)
            run.close("finished")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=drive, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    database = Database(tmp_path / "study.db")
    assert sorted(info.name for info in database.runs()) == ["a", "b", "c"]
    assert [info.records for info in database.runs()] == [400, 400, 400]
    assert [check_prefix(database.read(name).records()) for name in "abc"] == [40, 40, 40]


def test_a_heartbeat_of_another_thread_does_not_disturb(tmp_path: Path) -> None:
    run = open_run(Database(tmp_path / "study.db"), lease_s=0.3)
    stop = threading.Event()
    errors: list[BaseException] = []

    def beat() -> None:
        try:
            while not stop.wait(0.001):
                run.heartbeat()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=beat)
    thread.start()
    fill(run, 100)
    stop.set()
    thread.join()
    assert errors == []
    assert check_prefix(run.records()) == 100
