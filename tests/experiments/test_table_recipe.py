"""The recipes `table` and `nasbench201`, by the command line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from searchlab.cli import main
from searchlab.errors import ConfigError
from searchlab.experiments.table import NASBench201Options, TableOptions

TABLE = "kind,depth,quick,acc\n" + "".join(
    f"{kind},{depth},{depth},{10 * (kind == 'b') + depth - (depth == 9) * 5}\n"
    for kind in "abcd"
    for depth in range(10)
)
OPTIONS = ["--variables", "kind", "--variables", "depth", "--objective", "acc:max"]
RUN = ["run", "table", "--file", "t.csv", *OPTIONS, "--quiet"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(TABLE)
    return tmp_path


def out_of(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    done = capsys.readouterr()
    return done.out + done.err


@pytest.mark.parametrize("algorithm", ["evolution", "local_search", "regularised_evolution"])
def test_a_table_is_searched(
    folder: Path, capsys: pytest.CaptureFixture[str], algorithm: str
) -> None:
    text = out_of(
        capsys,
        [*RUN, "--budget", "40", "--algorithm", algorithm, "--name", "one"],
    )
    assert "evaluations 40" in text
    result = json.loads((folder / "runs/one/result.json").read_text())
    assert '"kind": "b"' in json.dumps(result)
    page = (folder / "runs/one/report.html").read_text()
    assert "Against the table" in page
    assert "1 of 40" in page
    assert "verified" in out_of(capsys, ["verify", "one"])


def test_fidelities_of_a_table_are_climbed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = ["--fidelity", "quick:quick:0.1", "--fidelity", "full:acc:1"]
    text = out_of(
        capsys,
        [*RUN, *levels, "--budget", "8", "--algorithm", "successive_halving"],
    )
    assert "at lower fidelities" in text
    assert "worth full evaluations" in text
    assert "verified" in out_of(capsys, ["verify", "table"])
    goes_on = out_of(capsys, ["resume", "table", "--budget", "12"])
    assert "worth full evaluations 1" in goes_on  # 11 or more of 12


def test_several_objectives_are_traded_off_or_one_steers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = [*RUN, "--objective", "quick:min", "--budget", "30"]
    out_of(capsys, [*two, "--name", "front"])
    assert "Against the table" not in (folder / "runs/front/report.html").read_text()
    out_of(capsys, [*two, "--name", "one", "--steer", "quick"])
    assert "Against the table" in (folder / "runs/one/report.html").read_text()
    assert "1 of 40" in (folder / "runs/one/report.html").read_text()


def test_a_table_that_changed_is_another_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*RUN, "--budget", "5"]
    out_of(capsys, arguments)
    (folder / "t.csv").write_text(TABLE.replace("a,0,0,0", "a,0,0,1"))
    capsys.readouterr()
    assert main(arguments) != 0
    assert "evaluator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "no table"),
        ({"file": "t.csv"}, "no variables"),
        ({"file": "t.csv", "variables": ("kind,depth",)}, "once for each"),
        ({"file": "t.csv", "variables": ("kind=choice",)}, "COLUMN:KIND"),
        ({"file": "t.csv", "variables": ("a",)}, "no objective"),
        ({"algorithm": "magic"}, "unknown algorithm of a table 'magic'; known: .*evolution"),
        ({"algorithm": "race"}, "unknown algorithm of a table 'race'"),
        ({"budget": -1}, "budget -1"),
        ({"steer": "y"}, "unknown objective 'y'; known: x"),
        ({"fidelity": ("quick:0.1",)}, "fidelity 'quick:0.1'; allowed: NAME:COLUMN"),
        ({"fidelity": ("quick:a:b",)}, "fidelity 'quick:a:b'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], text: str) -> None:
    whole = {"file": "t.csv", "variables": ("a",), "objective": ("x:min",)}
    given = options if text.startswith("no ") else {**whole, **options}
    with pytest.raises(ConfigError, match=text):
        TableOptions(**given)  # type: ignore[arg-type]


def test_nasbench201_needs_its_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEARCHLAB_DATA", raising=False)
    assert "SEARCHLAB_DATA" in out_of(capsys, ["run", "nasbench201"], code=2)
    with pytest.raises(ConfigError, match=r"known: .*local_search"):
        NASBench201Options(algorithm="listed")


def test_the_command_of_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/algorithms/tables.md").read_text()
    block = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    exec(block, {"__name__": "page"})  # writes the table
    (command,) = re.findall(
        r"^searchlab (run table .*?)\nsearchlab", page, re.MULTILINE | re.DOTALL
    )
    text = out_of(capsys, [*shlex.split(command.replace("\\\n", " ")), "--quiet"])
    assert "evaluations 60" in text
