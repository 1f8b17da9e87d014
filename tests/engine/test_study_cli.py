"""Studies at the command line: damaged files and what is saved of them, live runs, durability."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from plugin_tools import install
from study_tools import check_prefix, fill, open_run

import searchlab.study
from searchlab.cli import main
from searchlab.errors import StudyError
from searchlab.study import Database

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, and the recipe "tiny"."""
    monkeypatch.syspath_prepend(str(install(tmp_path / "site")))
    target = tmp_path / "work"
    target.mkdir()
    monkeypatch.chdir(target)
    yield target
    sys.modules.pop("tiny_plugin", None)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """A command that must end with 2 and one line that has these words."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("searchlab: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    for word in words:
        assert word in err


def tiny(budget: int, *more: str) -> list[str]:
    return ["run", "tiny", "--budget", str(budget), "--name", "t", "--quiet", *more]


def counted(capsys: pytest.CaptureFixture[str], *run: str) -> int:
    capsys.readouterr()
    assert main(["show", *run, "--json"]) == 0
    return int(json.loads(capsys.readouterr().out)["counts"]["evaluations"])


def tried(call: Callable[[], Any], words: str) -> Any:
    """What a call gives, or None after a StudyError of one line that has these words."""
    try:
        return call()
    except StudyError as error:
        if words not in str(error) or "\n" in str(error):
            raise
    return None


# -- damaged files ------------------------------------------------------------------------------


def test_a_cut_file_is_salvaged_and_its_run_goes_on_as_if_nothing_had_happened(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny(150)) == 0
    path = work / "runs" / "searchlab.db"
    with Database(path) as base:
        whole = base.read("t").records()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 2 * 4096])
    for command in ("show", "verify", "resume"):
        refused(capsys, [command, "t"], "is corrupt", "searchlab salvage")
    damaged = path.read_bytes()

    assert main(["salvage", "runs/searchlab.db", "saved"]) == 0
    line, advice = capsys.readouterr().out.splitlines()
    kept = int(line.split(" of ")[0].rpartition(" ")[2])
    assert line == f"t: {kept} of 150 records, saved/t.csv"
    assert advice.endswith("--database saved/searchlab.db")
    assert 15 < kept < 150
    assert path.read_bytes() == damaged
    refused(capsys, ["salvage", "runs/searchlab.db", "saved"], "'saved/searchlab.db' exists")

    with open("saved/t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == kept
    value = dict(zip(whole.ids.tolist(), whole.values[:, 0].tolist(), strict=True))
    assert all(float(row["value"]) == value[int(row["id"])] for row in rows)
    assert all(
        (float(row["x"]) - 0.4) ** 2 + "abc".index(row["y"]) == float(row["value"]) for row in rows
    )

    shutil.rmtree("runs")
    saved = ["--database", "saved/searchlab.db"]
    assert main(["list", *saved]) == 0
    assert "salvaged" in capsys.readouterr().out
    assert main(["resume", "t", *saved]) == 0
    assert main(["verify", "t", *saved]) == 0
    with Database("saved/searchlab.db") as base:
        assert base.read("t").records().trace() == whole.trace()


def test_a_file_cut_anywhere_is_a_named_error_and_gives_only_true_rows(tmp_path: Path) -> None:
    source = tmp_path / "study.db"
    run = open_run(Database(source), config={"a": [1]})
    fill(run, 30)
    run.close("finished")
    content = source.read_bytes()
    pages = len(content) // 4096
    cuts = {0, 1, 15, 16, 99, 100, 4095, len(content) - 1}
    cuts |= {4096 * page + 2048 * (page % 3 == 0) for page in range(1, pages)}
    kept = []
    for cut in sorted(cuts):
        path = tmp_path / "cut.db"
        path.write_bytes(content[:cut])
        records = tried(lambda path=path: Database(path).read("a").records(), str(path))
        if records is not None:
            assert check_prefix(records) == 30  # nothing that counts was behind the cut
        path.write_bytes(content[:cut])
        found = tried(lambda path=path: Database.salvage(path), "no record can be read")
        assert path.read_bytes() == content[:cut]
        rows = next(iter(found.values())) if found else None
        kept.append(0 if rows is None else len(rows))
        if rows is not None:
            assert rows.values[:, 0].tolist() == rows.ids.tolist()
        for extra in tmp_path.glob("cut.db?*"):
            extra.unlink()
    assert kept[0] == 0
    assert kept[-1] > 200
    assert len(set(kept)) > 5


def test_a_journal_cut_at_every_byte_of_its_tail_keeps_whole_batches(tmp_path: Path) -> None:
    source = tmp_path / "study.db"
    run = open_run(Database(source))
    fill(run, 3)
    journal = source.with_name("study.db-wal").read_bytes()
    main_file = source.read_bytes()
    # The last frame: byte by byte in its header and at its end, and every 256th byte between.
    frame = len(journal) - 24 - 4096
    cuts = [*range(frame - 2, frame + 26), *range(frame + 26, len(journal) - 3, 256)]
    cuts += [*range(len(journal) - 3, len(journal) + 1)]
    seen = []
    for cut in cuts:
        path = tmp_path / "cut.db"
        path.write_bytes(main_file)
        path.with_name("cut.db-wal").write_bytes(journal[:cut])
        with Database(path) as base:
            reader = base.read("a")
            seen.append(check_prefix(reader.records()))
            reader.close("")
        for extra in tmp_path.glob("cut.db*"):
            extra.unlink()
    assert seen == [2] * (len(cuts) - 1) + [3]


def test_salvage_of_runs_without_names_or_settings(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sqlite3

    path = work / "study.db"
    for name in ("a", "b/../c", "gone"):
        run = open_run(Database(path), name)
        fill(run, 2)
        run.close("finished")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE runs SET config = '{', seed = 'x' WHERE name = 'a'")
        connection.execute("DELETE FROM runs WHERE name = 'gone'")
        connection.execute("DELETE FROM evaluators")
    assert main(["salvage", "study.db", "saved"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["a", "b/../c", "run-3"]
    assert "20 of an unknown number records" in lines[2]
    assert "packed candidates" in lines[0]
    assert {p.name for p in (work / "saved").iterdir()} == {
        "a.csv", "b_.._c.csv", "run-3.csv", "searchlab.db",
    }  # fmt: skip
    with Database("saved/searchlab.db") as base:
        for name in ("a", "b/../c", "run-3"):
            assert check_prefix(base.read(name).records()) == 2
        # A new evaluator does not take the number of a lost one, whose values are not its own.
        again = open_run(base, "b/../c")
        again.register_evaluator("cd" * 16, {"version": 1}, {})
        found = again.lookup(
            [bytes(16)], evaluator="cd" * 16, fidelity=0, replicate=0, other_runs=True
        )
        assert found == {}
    Path("file").write_text("x" * 5000)
    refused(capsys, ["salvage", "file", "other"], "no record can be read")
    refused(capsys, ["salvage", "none.db", "other"], "there is no database none.db")
    refused(capsys, ["salvage", "study.db", "file"], "'file' is a file")
    assert not Path("other").exists()


# -- databases of others ------------------------------------------------------------------------


def test_runs_of_another_space_or_version_are_refused(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    import searchlab as sl

    assert main(tiny(3)) == 0
    refused(capsys, tiny(3, "--seed", "2"), "'t'", "seed", "stored 0, given 2")
    refused(capsys, tiny(3, "--algorithm", "evolution"), "'t'", "algorithm")
    with pytest.raises(StudyError, match="another config"):
        sl.search(sl.Space(z=sl.Real(0, 1)), lambda z: z, name="t", out="runs/t", budget=3,
                  database="runs/searchlab.db")  # fmt: skip
    for version, words in (("2", "newer searchlab"), ("0", "allowed: 1 to 1"), ("x", "no study")):
        with sqlite3.connect("runs/searchlab.db") as connection:
            connection.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (version,))
        for command in (["show", "t"], ["resume", "t"], ["check", "t"], ["compare", "t", "t"],
                        ["export", "t", "--csv", "x.csv"], ["dashboard", "t"]):  # fmt: skip
            refused(capsys, command, words)


# -- live runs ----------------------------------------------------------------------------------


def test_a_live_run_is_shown_but_not_driven_twice(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "searchlab", *tiny(100000, "--delay", "0.002")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{work.parent / 'site'}"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        counts = [0]
        while counts[-1] < 60:
            assert time.monotonic() < deadline
            assert process.poll() is None
            if Path("runs/t/run.json").is_file():
                try:
                    counts.append(counted(capsys, "t"))
                except AssertionError:
                    continue  # the run is made, but has not said what it is yet
            time.sleep(0.05)
        assert counts == sorted(counts)
        refused(capsys, ["resume", "t"], f"process {process.pid}")
        refused(capsys, tiny(100000), f"process {process.pid}")
        assert main(["check", "t", "--expect", "finished==0", "--expect", "failed==0"]) == 0
        assert main(["export", "t", "--csv", "live.csv"]) == 0
        assert len(Path("live.csv").read_text().splitlines()) > counts[-1]
        assert main(["list"]) == 0
        assert "running" in capsys.readouterr().out
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "searchlab resume t" in out
    assert err == ""
    assert counted(capsys, "t") >= counts[-1]
    assert main(["verify", "t"]) == 0


@pytest.mark.parametrize(
    ("given", "durability"), [([], "process"), (["--durability", "power"], "power")]
)
def test_durability_reaches_the_database(
    work: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], durability: str
) -> None:
    made = searchlab.study.sqlite_engine
    asked: list[tuple[bool, Any]] = []

    def spy(path: Path, **settings: Any) -> Any:
        asked.append((settings["write"], settings["durability"]))
        return made(path, **settings)

    monkeypatch.setattr(searchlab.study, "sqlite_engine", spy)
    assert main(tiny(3, *given)) == 0
    assert [value for write, value in asked if write] == [durability]
    asked.clear()
    assert main(["resume", "t", "--durability", "power"]) == 0
    assert [value for write, value in asked if write] == ["power"]


def test_an_unknown_durability_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, tiny(3, "--durability", "disk"), "'disk'", "power")
    assert not Path("runs").exists()
