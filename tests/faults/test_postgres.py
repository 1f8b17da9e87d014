"""One PostgreSQL database for several runs: the suite, shared values, claims, and no passwords."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fault_tools

from searchlab._study_lease import Owner
from searchlab.cli import main
from searchlab.study import Database, Run
from searchlab.testing.study import EVALUATOR, StudySuite, make_jobs, write

SERVER = os.environ.get("SEARCHLAB_TEST_POSTGRES", "")
needs_server = pytest.mark.skipif(not SERVER, reason="SEARCHLAB_TEST_POSTGRES names no database")


@pytest.fixture
def url() -> Iterator[str]:
    """A database of its own on the server."""
    import sqlalchemy as sa

    name = f"test_{os.getpid()}_{os.urandom(4).hex()}"
    server = sa.create_engine(SERVER, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield SERVER.rpartition("/")[0] + "/" + name
    finally:
        with server.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        server.dispose()


@needs_server
class TestRunOnServer(StudySuite):
    @pytest.fixture
    def store(self, url: str) -> Iterator[Run]:
        with Database(url) as database:
            run = database.open_run("a", config={}, space="s", seed=0, out="")
            yield run
            run.close("finished")


# -- claims -------------------------------------------------------------------------------------

DRIVE = """
import sys
import fault_tools
if __name__ == "__main__":
    url, name, seed, executor = sys.argv[1:]
    fault_tools.drive_shared(url, name, int(seed), executor, True)
"""


def start(folder: Path, url: str, name: str, seed: int, executor: str) -> subprocess.Popen[str]:
    script = folder / "drive.py"
    script.write_text(DRIVE)
    return subprocess.Popen(
        [sys.executable, str(script), url, name, str(seed), executor],
        env=fault_tools.environment(SEARCHLAB_TESTS_LOG=str(folder / "log")),
        stderr=subprocess.PIPE,
        text=True,
    )


def calls(folder: Path) -> list[tuple[int, float, float]]:
    lines = [line.split() for line in (folder / "log").read_text().splitlines()]
    return [(int(a), float(began), float(ended)) for a, began, ended in lines]


def check_shared(folder: Path, url: str, executors: list[str], seeds: list[int]) -> None:
    """Runs at once; every candidate is evaluated by one of them, and all traces are their own."""
    processes = [
        start(folder, url, f"run-{i}", seed, executor)
        for i, (executor, seed) in enumerate(zip(executors, seeds, strict=True))
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    done = [a for a, _, _ in calls(folder)]
    assert len(done) == len(set(done))
    with Database(url) as base:
        stores = [base.read(f"run-{i}") for i in range(len(processes))]
        records = [store.records() for store in stores]
        for one, seed in zip(records, seeds, strict=True):
            same = [other for other, of in zip(records, seeds, strict=True) if of == seed]
            for other in same:
                n = min(len(one), len(other))
                assert one.take(range(n)).trace() == other.take(range(n)).trace()
        paid = sum(int((~one.cached & (one.state <= 2)).sum()) for one in records)
        assert paid == len(done)
        assert sum(int(one.cached.sum()) for one in records) > 0
        assert stores[0]._read("SELECT count(*) FROM claims") == [(0,)]


@needs_server
def test_runs_of_a_server_never_evaluate_the_same_job_twice(tmp_path: Path, url: str) -> None:
    check_shared(tmp_path, url, ["local", "processes", "local"], [1, 1, 2])


def test_runs_of_a_file_do_so_where_they_are_asked_to(tmp_path: Path) -> None:
    check_shared(tmp_path, str(tmp_path / "study.db"), ["local", "local"], [1, 1])


def held_by(base: Database, name: str, keys: list[bytes]) -> tuple[Run, set[bytes]]:
    run = base.open_run(name, config={}, space="s", seed=0, out="")
    return run, run.claim(keys, evaluator=EVALUATOR, fidelity=0, replicate=0)


def check_claims(url: str) -> None:
    keys = [bytes([i]) * 16 for i in range(5)]
    with Database(url, claims=True) as base:
        one, taken = held_by(base, "one", keys[:3])
        assert taken == set()
        two, taken = held_by(base, "two", keys[1:])
        assert taken == set(keys[1:3])
        assert one.claim(keys, evaluator=EVALUATOR, fidelity=0, replicate=0) == set(keys[3:])
        # Another fidelity, replicate or evaluator is another job.
        assert two.claim(keys, evaluator=EVALUATOR, fidelity=1, replicate=0) == set()
        assert two.claim(keys, evaluator=EVALUATOR, fidelity=0, replicate=1) == set()
        assert two.claim(keys, evaluator="cd" * 16, fidelity=0, replicate=0) == set()
        write(one, make_jobs([1]))  # its key is the second one
        one.commit()
        assert two.claim(keys[:3], evaluator=EVALUATOR, fidelity=0, replicate=0) == {
            keys[0],
            keys[2],
        }
        one.close("finished")
        assert two.claim(keys[:3], evaluator=EVALUATOR, fidelity=0, replicate=0) == set()
        # A driver that was killed holds nothing any more.
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        owner = dataclasses.replace(Owner.here(), pid=dead.pid)
        with two._transaction(write=True) as connection:
            two._execute(connection, "UPDATE runs SET owner = :o WHERE name = 'two'", o=str(owner))
        three, taken = held_by(base, "three", keys)
        assert taken == set()
        three.close("finished")
        two._lost = True
        two.close("failed")


@needs_server
def test_claims_on_a_server(url: str) -> None:
    check_claims(url)


def test_claims_in_a_file(tmp_path: Path) -> None:
    check_claims(str(tmp_path / "study.db"))


def test_a_file_of_before_there_were_claims_gets_them(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with Database(path) as base:
        base.open_run("old", config={}, space="s", seed=0, out="").close("finished")
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE claims")
    with Database(path) as base:
        assert [info.name for info in base.runs()] == ["old"]
        base.read("old").records()
    check_claims(str(path))


# -- a whole run --------------------------------------------------------------------------------

COMMAND = """
variables:
  a: {integer: [0, 99]}
"""


@needs_server
def test_a_run_on_a_server_is_resumed_and_shown_and_tells_no_password(
    tmp_path: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import sqlalchemy as sa

    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(COMMAND)
    (tmp_path / "job.sh").write_text('printf \'{"objectives": {"y": %s}}\' "$2" > "$1"\n')
    place = ["--database", url]
    assert main(["run", "--space", "space.yaml", "--evaluator", "command", "--objective", "y:min",
                 "--command", "sh job.sh {out} {id} {plan}", "--name", "t", "--budget", "6",
                 "--workers", "2", *place]) == 0  # fmt: skip
    assert main(["show", "runs/t"]) == 2
    assert "--database URL" in capfd.readouterr().err
    assert main(["resume", "runs/t", "--budget", "9", *place]) == 0
    assert main(["verify", "t", *place]) == 0
    capfd.readouterr()
    assert main(["show", "runs/t", "--watch", *place]) == 0
    assert "t: finished; 9 records" in capfd.readouterr().out
    assert main(["report", "t", *place]) == 0
    assert main(["export", "t", "--csv", "t.csv", *place]) == 0
    secret = sa.engine.make_url(url).password
    assert secret
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        for table in sa.inspect(connection).get_table_names():
            for row in connection.exec_driver_sql(f'SELECT * FROM "{table}"'):
                assert secret not in repr(tuple(row)), table
    engine.dispose()
    assert secret not in "".join(capfd.readouterr())
