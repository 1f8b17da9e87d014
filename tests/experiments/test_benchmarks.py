"""Every benchmark runs in its short form, keeps its aims there, and has a committed result."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from searchlab.experiments.benchmarks import _common as common

FOLDER = Path(common.__file__).resolve().parent
# Their aims are speeds, which a machine that is shared with others may miss: run, not judged.
TIMED = {"command", "distributed", "engine", "executors", "merge", "study", "trajectories"}
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
RESULTS = sorted((FOLDER / "results").glob("*.json"))
KEYS = {"benchmark", "case", "aims", "seeds", "quick", "environment"}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def journal(tmp_path: Path, *, check: bool) -> common.Journal:
    arguments = ["--out", str(tmp_path / "out.json"), *(["--check"] if check else [])]
    return common.Journal("example", common.flags("", arguments))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_short_form_keeps_its_aims(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"searchlab.experiments.benchmarks.{name}")
    out = tmp_path / "out.json"
    judged = [] if name in TIMED else ["--check"]
    status = module.main(["--quick", *judged, "--out", str(out)])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert lines == json.loads(out.read_text("utf-8"))
    assert lines
    for line in lines:
        assert line.keys() >= KEYS
        assert line["benchmark"] == name
        assert line["quick"] is True
        assert {"python", "machine", "device", "searchlab", "numpy"} <= line["environment"].keys()
    assert any(line["aims"] for line in lines)
    assert len({line["case"] for line in lines}) == len(lines)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_result_is_of_the_full_form(path: Path) -> None:
    assert path.stem in NAMES
    lines: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    assert lines
    for line in lines:
        assert line.keys() >= KEYS
        assert line["benchmark"] == path.stem
        assert line["quick"] is False


@pytest.mark.parametrize("check", [False, True])
def test_a_missed_aim_is_named_and_fails_a_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], check: bool
) -> None:
    record = journal(tmp_path, check=check)
    record.case("good", {"x": 1}, aims=[common.Aim("ratio", 0.5, "at most", 0.5)])
    record.case("bad", {"x": 2}, seeds=(3,), aims=[common.Aim("speed", 0.5, "at least", 2.0)])
    assert record.close() == int(check)
    error = capsys.readouterr().err
    assert error == ("falls short: bad: speed: 0.5, aim at least 2\n" if check else "")
    lines = json.loads((tmp_path / "out.json").read_text())
    assert [line["aims"][0]["met"] for line in lines] == [True, False]
    assert lines[1]["seeds"] == [3]


def test_a_wish_is_recorded_but_fails_no_check(tmp_path: Path) -> None:
    record = journal(tmp_path, check=True)
    record.case("far", {}, aims=[common.Aim("ratio", 2.0, "at most", 1.0, binding=False)])
    assert record.close() == 0
    (line,) = json.loads((tmp_path / "out.json").read_text())
    assert line["aims"] == [
        {"figure": "ratio", "value": 2.0, "at most": 1.0, "met": False, "wish": True}
    ]


def test_parts_that_are_run_one_by_one_make_one_file(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out.json")]
    for more, cases in (([], {"a": 1, "b": 2}), (["--join"], {"a": 3, "c": 4})):
        record = common.Journal("example", common.flags("", [*out, *more]))
        for name, value in cases.items():
            record.case(name, {"x": value})
        assert record.close() == 0
    lines = json.loads((tmp_path / "out.json").read_text())
    assert {line["case"]: line["x"] for line in lines} == {"a": 3, "b": 2, "c": 4}


@pytest.mark.parametrize("kind", ["at most", "at least"])
def test_a_figure_that_is_not_a_number_keeps_no_aim(tmp_path: Path, kind: Any) -> None:
    record = journal(tmp_path, check=True)
    record.case("odd", {"y": [math.inf]}, aims=[common.Aim("z", math.nan, kind, 1.0)])
    assert record.close() == 1
    (line,) = json.loads((tmp_path / "out.json").read_text())
    assert line["y"] == [None]
    assert line["aims"][0]["value"] is None


def test_spread_gives_the_middle_and_the_ends() -> None:
    found = common.spread([3.0, 1.0, 2.00004])
    assert found == {
        "median": 2.0,
        "mean": 2.0,
        "lowest": 1.0,
        "highest": 3.0,
        "values": [3.0, 1.0, 2.0],
    }


def test_times_are_those_of_the_call() -> None:
    def busy() -> None:
        sum(range(400_000))

    time = common.timed(busy)
    assert 0 < time.cpu <= 60
    assert time.wall > 0


def test_flags_are_common_to_all() -> None:
    found = common.flags("", ["--quick", "--out", "x.json"])
    assert found == argparse.Namespace(quick=True, check=False, out=Path("x.json"), join=False)
