"""The study: resuming, look-ups, damaged and foreign files, full disks, CSV."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from study_tools import check_prefix, fill, mounts, open_run, python

from searchlab import _study_schema
from searchlab.errors import SearchlabWarning, StudyError
from searchlab.evaluator import Objective
from searchlab.experiments.benchmarks import study as benchmark
from searchlab.population import FAILED, OK, Evaluations, Jobs
from searchlab.space import Space
from searchlab.study import Database, MemoryRun, Run
from searchlab.testing.study import EVALUATOR, make_jobs, write
from searchlab.variables import Choice, Integer, Real

# -- runs ---------------------------------------------------------------------------------------


def test_resume_goes_on_where_the_run_ended(tmp_path: Path) -> None:
    config = {"stages": [{"budget": 100, "rate": (1, 0.5)}], "nan": float("nan")}
    run = open_run(Database(tmp_path / "study.db"), config=config, seed=2**70, out="here")
    fill(run, 2)
    run.set_meta("best", {"id": 3})
    run.close("interrupted")
    again = open_run(
        Database(tmp_path / "study.db"), config=config, seed=2**70, out="moved", create=False
    )
    assert (again.seed, again.out, again.space) == (2**70, "moved", "s")
    assert again.config["stages"] == [{"budget": 100, "rate": [1, 0.5]}]
    assert again.get_meta("status") == "running"
    with pytest.raises(StudyError, match=r"job 3 .* recorded already"):
        write(again, make_jobs([3]))
    fill(again, 1, start=2)
    again.close("finished")
    info = Database(tmp_path / "study.db").runs()[0]
    assert (info.name, info.status, info.records, info.best) == ("a", "finished", 30, {"id": 3})
    assert (info.live, info.driver, info.out, info.seed) == (False, "", "moved", 2**70)
    assert info.created <= info.updated <= time.time()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": {"a": 1, "b": [1, {"c": 3}]}}, r"another config.b\[1\].c: stored 2, given 3"),
        ({"config": {"a": True, "b": [1, {"c": 2}]}}, "another config.a: stored 1, given true"),
        ({"config": {"b": [1, {"c": 2}]}}, "another config.a: stored 1, given nothing"),
        (
            {"config": {"a": 1, "b": [1, {"c": 2}], "z": 5}},
            "another config.z: stored nothing, given 5",
        ),
        ({"config": {"a": 1, "b": [1]}}, r"another config.b: stored \[1, "),
        ({"space": "t"}, "another space: stored s, given t"),
        ({"seed": 1}, "another seed: stored 0, given 1"),
    ],
)
def test_resume_with_other_settings_names_the_first_difference(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    database = Database(tmp_path / "study.db")
    config = {"a": 1, "b": [1, {"c": 2}]}
    open_run(database, config=config).close("finished")
    with pytest.raises(StudyError, match=message):
        open_run(database, **{"config": config, **changed})
    open_run(database, config=config).close("finished")


def test_unknown_runs_and_files_are_named(tmp_path: Path) -> None:
    database = Database(tmp_path / "deep" / "study.db")
    for call in (
        database.runs,
        lambda: database.read("a"),
        lambda: open_run(database, create=False),
    ):
        with pytest.raises(StudyError, match="there is no database"):
            call()
    assert not (tmp_path / "deep").exists()
    open_run(database, "known").close("finished")
    with pytest.raises(StudyError, match=r"no run 'a' in .*; there: known"):
        database.read("a")
    with pytest.raises(StudyError, match=r"no run 'a' in .*; there: known"):
        open_run(database, create=False)


def test_a_run_for_reading_writes_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "study.db")
    run = open_run(database)
    run.register_evaluator(EVALUATOR, {"version": 1}, {"device": "cpu"})
    fill(run, 1)
    reader = database.read("a")
    for call in (
        lambda: write(reader, make_jobs([50])),
        lambda: reader.set_meta("x", 1),
        lambda: reader.record_void([60], 0, 0),
        reader.heartbeat,
        lambda: reader.register_evaluator("x", {}, {}),
    ):
        with pytest.raises(StudyError, match="for reading only"):
            call()
    assert reader.environments() == {EVALUATOR: {"device": "cpu"}}
    assert list(reader.evaluators().values()) == [EVALUATOR]
    reader.close("ignored")
    assert run.get_meta("status") == "running"
    fill(run, 1, start=1)
    run.close("finished")


def test_values_of_other_runs_answer_only_when_asked_and_of_one_space(tmp_path: Path) -> None:
    database = Database(tmp_path / "study.db")
    keys = make_jobs(range(20)).keys
    first = open_run(database)
    fill(first, 1)
    second, foreign = open_run(database, "b"), open_run(database, "c", space="other")

    def find(run: Run, other_runs: bool = True) -> dict[bytes, float]:
        found = run.lookup(
            keys, evaluator=EVALUATOR, fidelity=0, replicate=0, other_runs=other_runs
        )
        return {key: float(answer.values[0]) for key, answer in found.items()}

    expected = {keys[i]: float(i) for i in range(10)}
    assert find(second) == expected
    assert find(second, other_runs=False) == {}
    assert find(foreign) == {}
    write(second, make_jobs([5]), Evaluations(np.array([0.5])))
    second.commit()
    assert find(second) == {**expected, keys[5]: 0.5}  # the run's own value comes first
    assert find(first) == expected


@pytest.mark.parametrize("other_runs", [True, False])
def test_lookup_goes_by_the_index_of_keys(tmp_path: Path, other_runs: bool) -> None:
    run = open_run(Database(tmp_path / "study.db"))
    fill(run, 1)
    statements: list[str] = []
    driver: Any = run._connection.connection.driver_connection
    driver.set_trace_callback(statements.append)
    run.lookup(
        make_jobs([1, 2]).keys, evaluator=EVALUATOR, fidelity=0, replicate=0, other_runs=other_runs
    )
    driver.set_trace_callback(None)
    (statement,) = [text for text in statements if "FROM records" in text]
    plan = str(driver.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall())
    assert "USING INDEX records_key (key=?)" in plan
    assert "autoindex_records" not in plan


@pytest.mark.parametrize("value", ["sqlite://", ":memory:", "", "sqlite:///:memory:"])
def test_databases_in_memory_are_refused(value: str) -> None:
    with pytest.raises(StudyError, match="allowed: a file"):
        Database(value)


def test_urls(tmp_path: Path) -> None:
    open_run(Database(f"sqlite:///{tmp_path}/x y.db")).close("finished")
    assert [info.name for info in Database(tmp_path / "x y.db").runs()] == ["a"]
    with pytest.raises(StudyError, match="allowed: a file path"):
        open_run(Database("nonsense://user:secret@host/db"))
    with pytest.raises(StudyError, match="durability 'disk'; allowed: process, power"):
        Database(tmp_path / "x.db", durability="disk")  # type: ignore[arg-type]
    with pytest.raises(StudyError, match="config of run 'a' is not JSON"):
        open_run(Database(tmp_path / "x.db"), config={"a": {1}})


@pytest.mark.parametrize(("durability", "level"), [("process", 1), ("power", 2)])
def test_durability_sets_the_journal(tmp_path: Path, durability: Any, level: int) -> None:
    run = open_run(Database(tmp_path / "study.db", durability=durability))
    assert run._read("PRAGMA synchronous") == [(level,)]
    assert run._read("PRAGMA journal_mode") == [("wal",)]


# -- files that are not as they should be -------------------------------------------------------


@pytest.mark.parametrize("version", ["2", "999"])
def test_a_newer_schema_is_refused_with_both_versions(tmp_path: Path, version: str) -> None:
    path = tmp_path / "study.db"
    open_run(Database(path)).close("finished")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (version,))
    for call in (Database(path).runs, lambda: open_run(Database(path))):
        with pytest.raises(StudyError, match=f"schema version {version}; .* up to 1"):
            call()


def test_databases_of_others_are_refused_and_left_alone(tmp_path: Path) -> None:
    for name, table in (("one.db", "trials(x)"), ("two.db", "meta(a, b)")):
        path = tmp_path / name
        with sqlite3.connect(path) as connection:
            connection.execute(f"CREATE TABLE {table}")
        for call in (Database(path).runs, lambda path=path: open_run(Database(path))):
            with pytest.raises(StudyError, match="is a database, but no study"):
                call()
        with sqlite3.connect(path) as connection:
            tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        assert tables == (1,)


def test_a_file_of_text_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_text("this is a letter, not a database\n" * 400)
    before = path.read_bytes()
    for call in (Database(path).runs, lambda: open_run(Database(path))):
        with pytest.raises(StudyError, match="is not a study database") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(StudyError, match="no record can be read"):
        Database.salvage(path)
    with pytest.raises(StudyError, match="there is no database"):
        Database.salvage(tmp_path / "missing.db")
    assert path.read_bytes() == before


def written_file(path: Path) -> bytes:
    database = Database(path)
    for name in ("a", "b"):
        run = open_run(database, name)
        fill(run, 100)
        run.close("finished")
    return path.read_bytes()


def test_salvage_of_a_sound_file_gives_everything(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    written_file(path)
    found = Database.salvage(path)
    assert list(found) == ["a", "b"]
    assert [check_prefix(records) for records in found.values()] == [100, 100]
    open_file = open_run(Database(path), "c")
    fill(open_file, 5)  # still in the journal
    assert check_prefix(Database.salvage(path)["c"]) == 5


def test_salvage_goes_around_damaged_pages(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    content = bytearray(written_file(path))
    pages = len(content) // 4096
    damaged = range(pages // 3, pages // 3 + 6)
    for page in damaged:
        content[4096 * page : 4096 * (page + 1)] = os.urandom(4096)
    path.write_bytes(content)

    def read() -> None:
        for name in ("a", "b"):
            Database(path).read(name).records()

    with pytest.raises(StudyError, match="is corrupt"):
        read()
    kept = 0
    for records in Database.salvage(path).values():
        kept += len(records)
        assert records.values[:, 0].tolist() == [float(i) for i in records.ids]
        assert records.keys == [bytes([i % 256]) * 16 for i in records.ids]
    assert path.read_bytes() == bytes(content)
    assert 2000 - 6 * 60 <= kept < 2000  # some 40 rows fill a page


def test_salvage_of_a_cut_file_keeps_the_front(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    content = written_file(path)
    path.write_bytes(content[: 4096 * int(0.8 * len(content) / 4096) + 100])
    with pytest.raises(StudyError, match="is corrupt"):
        Database(path).read("b").records()
    found = Database.salvage(path)
    assert check_prefix(found["a"]) == 100
    assert 0 < len(found["b"]) < 1000


def test_salvage_replaces_a_lost_first_page(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    content = bytearray(written_file(path))
    content[:4096] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(StudyError, match="is not a study database"):
        Database(path).runs()
    found = Database.salvage(path)
    assert [check_prefix(records) for records in found.values()] == [100, 100]


# -- disks --------------------------------------------------------------------------------------


def disk_fills(run: Run, make_room: Any) -> None:
    with pytest.raises(StudyError, match=r"disk full at .* another commit"):
        fill(run, 1000, size=100)
    batches = len(run.records()) // 100
    assert batches > 0
    assert check_prefix(run.records(), size=100) == batches
    with pytest.raises(StudyError, match="disk full"):
        run.commit()
    make_room()
    run.commit()
    assert check_prefix(run.records(), size=100) == batches + 1
    fill(run, 1, start=batches + 1, size=100)
    run.close("finished")
    assert check_prefix(Database(run._where).read("a").records(), size=100) == batches + 2


def test_a_full_database_keeps_the_batch_for_another_try(tmp_path: Path) -> None:
    run = open_run(Database(tmp_path / "study.db"))
    (pages,) = run._read("PRAGMA page_count")[0]
    run._read(f"PRAGMA max_page_count={pages + 60}")
    disk_fills(run, lambda: run._read("PRAGMA max_page_count=100000"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "disk"
    point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(point)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_full_disk_keeps_the_batch_for_another_try(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, journal: str
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(400_000))
    if journal == "delete":
        monkeypatch.setattr(_study_schema, "_NETWORK", {"tmpfs"})
        with pytest.warns(SearchlabWarning, match="network file system"):
            run = open_run(Database(small_disk / "study.db"))
    else:
        run = open_run(Database(small_disk / "study.db"))
    disk_fills(run, ballast.unlink)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
def test_a_file_on_a_read_only_disk_can_be_read(small_disk: Path) -> None:
    path = small_disk / "study.db"
    run = open_run(Database(path))
    fill(run, 2)
    run.close("finished")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert check_prefix(Database(path).read("a").records()) == 2
    assert Database(path).runs()[0].status == "finished"
    with pytest.raises(StudyError, match=r"study\.db"):
        open_run(Database(path))


@pytest.mark.parametrize("kind", ["nfs", "cifs", "fuse.sshfs", "lustre"])
def test_network_file_systems_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    mounts(tmp_path, monkeypatch, kind)
    path = tmp_path / "runs" / "study.db"
    assert _study_schema.file_system(path) == kind
    with pytest.warns(SearchlabWarning, match=f"network file system .{kind}"):
        run = open_run(Database(path))
    other = open_run(Database(path), "b")  # a second warning would be an error here
    assert run._read("PRAGMA journal_mode") == [("delete",)]
    assert run._read("PRAGMA synchronous") == [(2,)]
    fill(run, 2)
    fill(other, 2)
    assert check_prefix(Database(path).read("a").records()) == 2
    assert not path.with_name("study.db-wal").exists()


def test_the_inner_mount_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mounts"
    table.write_text("a / ext4 rw\nb /data nfs4 rw\nc /data/local xfs rw\nd /dat cifs rw\n\n")
    monkeypatch.setattr(_study_schema, "_MOUNTS", table)
    paths = ["/data/x.db", "/data/local/x.db", "/database/x.db", "/dat/x.db"]
    kinds = [_study_schema.file_system(Path(path)) for path in paths]
    assert kinds == ["nfs4", "xfs", "ext4", "cifs"]
    monkeypatch.setattr(_study_schema, "_MOUNTS", tmp_path / "missing")
    assert _study_schema.file_system(Path("/data/x.db")) == ""


# -- the rest -----------------------------------------------------------------------------------


def test_rows_reach_a_driver_that_wants_names() -> None:
    import sqlalchemy as sa

    schema = _study_schema.tables()
    engine = sa.create_engine("sqlite://", paramstyle="named")
    with engine.begin() as connection:
        _study_schema.create_schema(connection, "here")
        rows = [(1, 0, "<f2", b"ab"), (1, 1, "<f4", b"abcd")]
        columns = ("run", "id", "dtype", "scores")
        _study_schema.insert_rows(connection, schema.items, columns, rows)
        assert [tuple(row) for row in connection.execute(sa.select(schema.items))] == rows


@pytest.mark.parametrize("in_memory", [True, False])
def test_csv_holds_one_decoded_line_per_record(tmp_path: Path, in_memory: bool) -> None:
    space = Space(
        fmt=Choice(("bf16", "int4"), shape=(3,)),
        depth=Integer(1, 9),
        rate=Real(0.0, 1.0),
        state=Choice(("on", "off")),
    )
    plans = [
        {"fmt": ["bf16", "int4", "bf16"], "depth": 4, "rate": 0.1, "state": "on"},
        {"fmt": ["int4", "int4", "int4"], "depth": 9, "rate": 1 / 3, "state": "off"},
    ]
    population = space.population(plans)
    jobs = Jobs(np.arange(2), population, space.keys(population), fidelity=0)
    told = Evaluations(
        np.array([[1 / 7, 2.0], [np.nan, np.nan]]),
        state=np.array([OK, FAILED], np.int8),
        reason=["", 'a "quoted", reason\nof two lines'],
    )
    store = MemoryRun() if in_memory else open_run(Database(tmp_path / "study.db"))
    store.record(
        jobs, told, packed=space.pack(population), evaluator=EVALUATOR, started=1.0, finished=2.0
    )
    store.record_void([2], 0, 1)
    store.commit()
    target = tmp_path / "out" / "table.csv"
    objectives = (Objective("error"), Objective("speed", "max"))
    store.export_csv(target, space, objectives)
    with open(target, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["state"] for line in lines] == ["ok", "failed", "void"]
    assert [float(lines[0][name]) for name in ("error", "speed")] == [1 / 7, 2.0]
    assert lines[1]["error"] == ""
    assert lines[1]["reason"] == 'a "quoted", reason\nof two lines'
    for line, plan in zip(lines, plans, strict=False):
        assert json.loads(line["fmt"]) == plan["fmt"]
        assert float(line["rate"]) == plan["rate"]
        assert int(line["depth"]) == plan["depth"]
        assert line["variable.state"] == plan["state"]
    assert [lines[2][name] for name in ("fmt", "depth", "key")] == ["", "", ""]
    with pytest.raises(StudyError, match="1 objectives; allowed: 2"):
        store.export_csv(target, space, objectives[:1])
    assert [entry.name for entry in target.parent.iterdir()] == ["table.csv"]
    with pytest.raises(StudyError, match="cannot be written"):
        store.export_csv(target / "below", space, objectives)
    store.close("finished")


def test_csv_of_stages_with_their_own_spaces(tmp_path: Path) -> None:
    spaces = [Space(a=Integer(0, 5)), Space(b=Integer(0, 5))]
    stages = [(0, "a"), (1, "b"), (1000, "b")]  # a final has no space of its own
    store = MemoryRun()
    for stage, name in stages:
        space = spaces[min(stage, 1)]
        population = space.population([{name: 3}])
        jobs = Jobs(np.array([stage]), population, space.keys(population), stage=stage)
        store.record(
            jobs,
            Evaluations(np.zeros(1)),
            packed=space.pack(population),
            evaluator=EVALUATOR,
            started=0.0,
            finished=0.0,
        )
    store.commit()
    store.export_csv(tmp_path / "table.csv", spaces, (Objective("value"),))
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["a"], line["b"]) for line in lines] == [("3", ""), ("", "3"), ("", "3")]
    with pytest.raises(StudyError, match="no spaces; allowed: one per stage"):
        store.export_csv(tmp_path / "table.csv", [], (Objective("value"),))


def test_the_benchmark_runs_in_its_quick_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["--quick", "--folder", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == [case.name for case in benchmark.cases(True)]
    assert all(line["per_s"]["lowest"] > 0 for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_study_loads_no_database_package() -> None:
    code = "import sys, searchlab.study; print(*(set(sys.argv[1:]) & set(sys.modules)))"
    process = python(code, "sqlalchemy", "sqlite3", "torch", "scipy", "pandas")
    assert process.communicate()[0] == "\n"
    assert process.returncode == 0
