"""The command line: every command on a small run, exit codes, and one line for every bad input."""

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

import pytest

from searchlab.cli import main
from searchlab.experiments.solver_schedule import RECIPE
from searchlab.recipes import options_from
from searchlab.study import Database

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--problem", "mixture", "--nfe", "4", "--samples", "64", "--held-out", "64"),
    *("--report-banks", "2", "--quiet", "--database", "study.db"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run called "small"; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["run", "solver_schedule", *SMALL, "--budget", "16", "--out", "small"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working folder."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    target = tmp_path / "empty"
    target.mkdir()
    monkeypatch.chdir(target)
    return target


def refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str, code: int = 2
) -> str:
    """Runs a command that must end with one line on stderr that has these words."""
    capsys.readouterr()
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert err.startswith("searchlab: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err + out
    for word in words:
        assert word in err
    return err


def out_of(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    return capsys.readouterr().out


# -- commands -----------------------------------------------------------------------------------


def test_a_run_leaves_its_artefacts(finished: Path) -> None:
    names = {path.name for path in (finished / "small").iterdir()}
    assert {"run.json", "result.json", "report.html", "export"} <= names
    result = json.loads((finished / "small" / "result.json").read_text())
    assert result["counts"]["evaluations"] == 16
    assert result["status"] == "finished"


def test_the_same_call_again_evaluates_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "small" / "result.json").read_text()
    arguments = ["run", "solver_schedule", *SMALL, "--budget", "16", "--out", "small"]
    verdict = out_of(capsys, arguments).splitlines()[-1]
    after = json.loads((folder / "small" / "result.json").read_text())
    assert after["rows"] == json.loads(before)["rows"]
    assert after["verdict"] == verdict


def test_resume_with_a_larger_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = out_of(capsys, ["resume", "small", "--budget", "24"])
    assert "evaluations 24" in text
    assert json.loads(out_of(capsys, ["show", "small", "--json"]))["counts"]["evaluations"] == 24
    assert "verified" in out_of(capsys, ["verify", "small"])


@pytest.mark.parametrize("run", [["small"], ["small", "--database", "study.db"], ["./small/"]])
def test_show_by_name_and_by_folder(
    folder: Path, run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((folder / "small" / "result.json").read_text())
    shown = json.loads(out_of(capsys, ["show", *run, "--json"]))
    for key in ("rows", "counts", "verdict", "plans"):
        assert shown[key] == result[key]
    text = out_of(capsys, ["show", *run])
    assert text.strip().splitlines()[-1] == result["verdict"]


def test_a_run_can_be_moved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(folder / "small", folder / "elsewhere")
    assert "verified" in out_of(capsys, ["verify", "elsewhere"])


def test_verify_reports_a_tampered_value(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect("study.db") as connection:
        raw = b"\x00" * 7 + b"\xc0"  # -2.0, better than anything
        connection.execute("UPDATE records SET values_blob = ? WHERE id = 70", (raw,))
    assert "differ" in out_of(capsys, ["verify", "small"], code=1)


def test_report_and_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "small" / "report.html").unlink()
    out_of(capsys, ["report", "small"])
    assert (folder / "small" / "report.html").stat().st_size > 1000
    out_of(capsys, ["report", "small", "--to", "other.html"])
    assert Path("other.html").is_file()
    files = out_of(capsys, ["export", "small", "plans"]).split()
    assert files
    assert all(Path(name).is_file() for name in files)
    out_of(capsys, ["export", "small", "--csv", "records.csv"])
    with open("records.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with Database("study.db") as base:
        assert len(rows) == len(base.read("small").records())


def test_list_and_doctor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = out_of(capsys, ["list", "--database", "study.db"])
    assert "small" in line
    assert "finished" in line
    assert "no database" in out_of(capsys, ["list"])
    text = out_of(capsys, ["doctor", "--database", "study.db"])
    assert "1 runs" in text
    assert "numpy" in text


def test_config_file_set_and_flags_in_that_order(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.yaml").write_text("problem: mixture\nnfe: 5\nbudget: 3\nreport-banks: 2\n")
    base = ["run", "s3", "--dry-run", "--config", "a.yaml"]
    assert "3 evaluations" in out_of(capsys, base)
    assert "4 evaluations" in out_of(capsys, [*base, "--set", "budget=4"])
    assert "5 evaluations" in out_of(capsys, [*base, "--set", "budget=4", "--budget", "5"])
    assert os.listdir() == ["a.yaml"]  # a dry run leaves nothing


def test_help_names_recipes_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "solver_schedule" in out_of(capsys, ["run", "--help"])
    assert out_of(capsys, ["run"], code=2)
    with pytest.raises(SystemExit) as stop:
        main(["run", "solver_schedule", "--help"])
    assert stop.value.code == 0
    assert "--nfe" in capsys.readouterr().out


def test_an_interrupted_run_ends_with_75_and_is_resumed(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from searchlab.executors import LocalExecutor

    wait, calls = LocalExecutor.wait, []

    def interrupted(self: LocalExecutor, timeout: float | None = None) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return wait(self, timeout)

    monkeypatch.setattr(LocalExecutor, "wait", interrupted)
    arguments = ["run", "solver_schedule", *SMALL, "--budget", "8", "--name", "broken"]
    assert "searchlab resume" in out_of(capsys, arguments, code=75)
    monkeypatch.undo()
    monkeypatch.chdir(empty)
    assert "interrupted" in out_of(capsys, ["list", "--database", "study.db"])
    assert "evaluations 8" in out_of(capsys, ["resume", "runs/broken"])


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "solver"], ["'solver'", "solver_schedule"]),
        (["walk"], ["'walk'", "resume"]),
        ([], ["COMMAND"]),
        (["run", "s3", "--nfee", "5"], ["--nfee"]),
        (["run", "s3", "--set", "nfee=5"], ["'nfee'", "nfe"]),
        (["run", "s3", "--set", "nfe"], ["'nfe'", "KEY=VALUE"]),
        (["run", "s3", "--nfe", "five"], ["'five'", "LOW..HIGH"]),
        (["run", "s3", "--nfe", "8..5"], ["'8..5'", "LOW <= HIGH"]),
        (["run", "s3", "--nfe", "0"], ["'0'", "LOW"]),
        (["run", "s3", "--nfe", "5..6..7"], ["'5..6..7'", "LOW..HIGH"]),
        (["run", "s3", "--budget", "many"], ["'many'", "90min"]),
        (["run", "s3", "--budget", "-3"], ["-3", "90min"]),
        (["run", "s3", "--budget", "1.5"], ["1.5", "90min"]),
        (["run", "s3", "--preset", "best"], ["'best'", "released"]),
        (["run", "s3", "--problem", "cats"], ["'cats'", "mixture"]),
        (["run", "s3", "--samples", "2"], ["2", "16 or more"]),
        (["run", "s3", "--config", "none.yaml"], ["'none.yaml'"]),
        (["run", "s3", "--config", "list.yaml"], ["'list.yaml'", "mapping"]),
        (["run", "s3", "--config", "broken.yaml"], ["'broken.yaml'", "YAML"]),
        (["run", "s3", "--config", "binary.yaml"], ["'binary.yaml'", "YAML"]),
        (["run", "s3", "--config", "unknown.yaml"], ["'colour'", "nfe"]),
        (["run", "s3", "--config", "wrong.yaml"], ["budget", "str"]),
        (["run", "s3", "--config", "."], ["'.'"]),
        (["run", "s3", "--problem", "mixture", "--out", "file"], ["'file'", "file"]),
        (["run", "s3", "--problem", "mixture", "--out", "file/x"], ["'file'", "file"]),
        (["run", "s3", "--name", "a/b"], ["'a/b'", "slashes"]),
        (["show", "nothing"], ["'nothing'"]),
        (["resume", "nothing"], ["'nothing'"]),
        (["verify", "nothing", "--database", "text.db"], ["text.db"]),
        (["show", "badrun"], ["run.json"]),
        (["list", "--database", "text.db"], ["text.db"]),
        (["resume", "x", "--budget", "many"], ["'x'"]),
        (["show"], ["RUN"]),
        (["show", "x", "--yes"], ["--yes"]),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(
    empty: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("list.yaml").write_text("- 1\n- 2\n")
    Path("broken.yaml").write_text("a: [1\nb: }")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    Path("unknown.yaml").write_text("colour: red\n")
    Path("wrong.yaml").write_text("budget: [1, 2]\n")
    Path("file").write_text("x")
    Path("text.db").write_text("not a database, but longer than a hundred bytes" * 9)
    Path("badrun").mkdir()
    Path("badrun/run.json").write_text("[]")
    before = sorted(path.name for path in Path().rglob("*"))
    refused(capsys, arguments, *words)
    assert sorted(path.name for path in Path().rglob("*")) == before


def test_an_unreadable_database_is_bad_input(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("study.db").write_text("not a database, but longer than a hundred bytes" * 9)
    refused(capsys, ["run", "s3", *SMALL, "--budget", "3", "--out", "new"], "study.db")
    assert os.listdir() == ["study.db"]


def test_a_newer_schema_is_bad_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from searchlab._study_schema import SCHEMA_VERSION

    with sqlite3.connect("study.db") as connection:
        changed = connection.execute(
            "UPDATE meta SET value = ? WHERE key = 'schema'", (str(SCHEMA_VERSION + 1),)
        )
        assert changed.rowcount == 1
    for arguments in (
        ["list", "--database", "study.db"],
        ["show", "small"],
        ["resume", "small"],
        ["run", "s3", *SMALL, "--budget", "3", "--out", "new"],
    ):
        refused(capsys, arguments, "version")
    assert not Path("new").exists()


def test_other_settings_under_the_same_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "s3", *SMALL, "--budget", "16", "--out", "small", "--seed", "1"]
    refused(capsys, arguments, "'small'", "seed")


@pytest.fixture
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that drives the run "small"."""
    code = (
        "import sys, time\n"
        "from searchlab.study import Database\n"
        "base = Database('study.db'); old = base.read('small')\n"
        "run = base.open_run('small', config=old.config, space=old.space, seed=old.seed,"
        " out='small')\n"
        "print('ready', flush=True); time.sleep(100)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_a_run_in_use_is_refused_and_can_be_read(
    folder: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, ["resume", "small"], "'small'", str(holder.pid))
    assert "rmse" in out_of(capsys, ["show", "small"])
    holder.kill()
    holder.wait()
    start = time.monotonic()
    out_of(capsys, ["resume", "small"])
    assert time.monotonic() - start < 30


def test_a_corrupt_model_is_bad_input(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from searchlab.experiments.zoo import digits

    zoo = empty / "zoo"
    zoo.mkdir()
    for name in ("digits.json", "digits_edm.safetensors", "digits_classifier.safetensors"):
        shutil.copy(Path(digits.__file__).parent / name, zoo)
    raw = bytearray((zoo / "digits_edm.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    (zoo / "digits_edm.safetensors").write_bytes(bytes(raw))
    # The module looks for its files beside itself.
    monkeypatch.setattr(digits, "__file__", str(zoo / "digits.py"))
    arguments = ["run", "s3", "--nfe", "5", "--budget", "2", "--out", "new"]
    refused(capsys, arguments, "digits_edm.safetensors")
    assert os.listdir() == ["zoo"]


def test_export_into_a_file_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("x")
    refused(capsys, ["export", "small", "taken"], "'taken'")
    refused(capsys, ["export", "small"], "--csv")
    refused(capsys, ["export", "small", "fine", "--to", "onnx"], "onnx")


def test_a_run_made_from_python_is_named_as_such(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import searchlab as sl

    sl.search(sl.Space(x=sl.Real(0, 1)), lambda x: x, budget=5, out="mine")
    refused(capsys, ["resume", "mine"], "Python")


def test_a_failure_of_the_run_itself_ends_with_1(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from searchlab.evaluators.sampling import SamplingEvaluator

    def broken(self: object, jobs: object) -> object:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(SamplingEvaluator, "evaluate", broken)
    refused(
        capsys,
        ["run", "s3", *SMALL, "--budget", "3", "--out", "new"],
        "the device is gone",
        code=1,
    )


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "searchlab", "run", "s3", *SMALL, "--budget", "200"],
            cwd=disk,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("searchlab: ")
    assert done.stderr.count("\n") == 1
    assert "full" in done.stderr


def test_every_option_of_the_recipe_can_be_given() -> None:
    from dataclasses import fields

    defaults = options_from(RECIPE, {})
    given = {f.name: getattr(defaults, f.name) for f in fields(defaults)}
    assert options_from(RECIPE, given) == defaults
