"""What a guided run leaves, and runs that begin with it: direct, adapted, refused, resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import searchlab as sl
from searchlab.cli import main
from searchlab.config import AlgorithmSpec
from searchlab.errors import ConfigError, DataError
from searchlab.predictors.artifact import load_predictor, read_artifact

TABLE = "a,b,c,d,acc,other,cheap\n" + "".join(
    f"{a},{b},{c},{d},{a * b + 3 * c - d},{a * b + 3 * c - d * 2},{a + b + c}\n"
    for a in range(5)
    for b in range(5)
    for c in range(5)
    for d in range(5)
)
VARIABLES = [part for name in "abcd" for part in ("--variables", f"{name}:choice")]
RUN = ["run", "table", "--file", "t.csv", *VARIABLES, "--signal", "cheap:max", "--quiet"]
FIRST = [*RUN, "--objective", "acc:max", "--algorithm", "guided", "--budget", "30"]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table and a finished guided run `one`."""
    folder = tmp_path_factory.mktemp("left")
    (folder / "t.csv").write_text(TABLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*FIRST, "--name", "one", "--seed", "1"]) == 0
    return folder


@pytest.fixture
def folder(left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(left, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def out_of(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    done = capsys.readouterr()
    return done.out + done.err


def test_a_finished_run_leaves_its_predictor(folder: Path) -> None:
    artifact = read_artifact(folder / "runs/one/predictor")
    task = artifact.task
    assert task is not None
    assert (task.objective, task.direction, task.run, task.seed) == ("acc", "max", "one", 1)
    assert task.labels["n"] >= 29  # the last answer has nobody to tell it to
    assert task.labels["best"] >= task.labels["median"] >= task.labels["worst"]
    assert task.held_out.low > 0
    assert task.guard["guard"] in ("trusted", "not trusted")
    assert [signal.name for signal in task.signals] == ["cheap"]
    assert len(task.signals[0].quantiles) == 65
    assert not artifact.with_data
    assert artifact.left_out == ["additive", "gp"]


def test_it_is_shown_and_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = out_of(capsys, ["predictor", "show", "runs/one/predictor"])
    assert "without its data, hence without additive, gp" in text
    assert "acc (max)" in text
    shown = out_of(capsys, ["predictor", "show", "runs/one/predictor", "--json"])
    assert json.loads(shown)["task"]["objective"] == "acc"
    text = out_of(capsys, ["predictor", "evaluate", "runs/one/predictor", "--run", "one"])
    assert "same space, same task: direct" in text
    assert "on 30 labels" in text  # all that were measured
    found = out_of(
        capsys, ["predictor", "evaluate", "runs/one/predictor", "--run", "one", "--json"]
    )
    assert json.loads(found)["tau"] > 0.5


@pytest.mark.parametrize("refit", ["never", "warm", "scratch"])
def test_the_same_task_begins_with_it(
    folder: Path, capsys: pytest.CaptureFixture[str], refit: str
) -> None:
    arguments = [*FIRST[:-1], "14", "--predictor", "runs/one/predictor", "--refit", refit]
    text = out_of(capsys, [*arguments, "--name", "two", "--seed", "2"])
    assert f"same space, same task: direct, refit {refit}; tau" in text
    assert (folder / "runs/two/predictor/predictor.json").is_file()


def test_a_resumed_run_is_the_uninterrupted_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from searchlab.study import Database

    begun = ["--predictor", "runs/one/predictor", "--seed", "3"]
    out_of(capsys, [*FIRST[:-1], "16", *begun, "--name", "part", "--database", "part.db"])
    out_of(capsys, [*FIRST[:-1], "28", *begun, "--name", "whole", "--database", "other.db"])
    shutil.rmtree(folder / "runs/one")  # the run has a copy of its own
    out_of(capsys, ["resume", "part", "--budget", "28"])
    assert "verified" in out_of(capsys, ["verify", "part"])
    with Database("part.db") as one, Database("other.db") as other:
        part, whole = one.read("part").records(), other.read("whole").records()
    assert part.trace() == whole.trace()


def test_another_objective_is_adapted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = out_of(
        capsys,
        [*RUN, "--objective", "other:max", "--budget", "24", "--name", "two", "--seed", "2",
         "--predictor", "runs/one/predictor", "--warm-start", "one"],
    )  # fmt: skip
    assert "same space, other task (" in text
    assert "objective acc -> other" in text
    assert "adapted, refit warm; tau" in text
    assert "verified" in out_of(capsys, ["verify", "two"])
    artifact = read_artifact(folder / "runs/two/predictor")
    assert artifact.predictor == "warm"
    assert artifact.state["earlier"]["predictor"] == "stack"
    code = (
        "from searchlab.predictors.artifact import load_predictor\n"
        "import sys, numpy as np\n"
        "from searchlab.predictor import Table\n"
        "p = load_predictor('runs/two/predictor')\n"
        "print(p.name, p.n_labels)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split()[0] == "warm"


def worth(bits: Any, **more: Any) -> float:
    values = np.array(bits, float)
    return float((2.0 ** (-values) * np.linspace(1, 0.2, len(values))).mean())


def sized(layers: int) -> sl.Space:
    return sl.Space(bits=sl.Choice((2, 4, 8, 16), shape=(layers,)))


def test_other_sizes_are_adapted_in_python(tmp_path: Path) -> None:
    first = sl.search(sized(8), worth, budget=40, algorithm="guided", out=tmp_path / "a", seed=1)
    assert any("left in" in note for note in first.meta["notes"])
    left = tmp_path / "a" / "predictor"
    again = sl.search(
        sized(12), worth, budget=24, seed=2, predictor=left, refit="warm", out=tmp_path / "b"
    )
    (line,) = [note for note in again.meta["notes"] if "other sizes" in note]
    assert "adapted" in line
    assert "tau" in line
    alone = sl.search(sized(12), worth, budget=24, seed=2, algorithm="guided")
    assert again.best.value <= alone.best.value * 1.5
    loaded = load_predictor(tmp_path / "b" / "predictor", sized(12))
    assert loaded.name == "warm"


def test_with_data_a_process_is_kept(tmp_path: Path) -> None:
    spec = AlgorithmSpec("guided", {"predictor": "gp"})
    for with_data, name in ((True, "gp"), (False, "stack")):
        out = tmp_path / name
        result = sl.search(sized(4), worth, budget=16, algorithm=spec, out=out, with_data=with_data)
        assert read_artifact(out / "predictor").predictor == name
        said = " ".join(result.meta["notes"])
        assert ("in place of gp, which is its data" in said) is not with_data


def test_bad_folders_are_named_before_any_evaluation(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder / "runs/one/predictor"

    def refused(change: Any) -> str:
        target = folder / "bad"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        change(target)
        text = out_of(capsys, [*FIRST, "--name", "bad", "--predictor", "bad"], 2)
        assert not (folder / "runs/bad").exists()
        return text

    def newer(target: Path) -> None:
        path = target / "predictor.json"
        path.write_text(path.read_text().replace('"format": 1', '"format": 9'))

    def damaged(target: Path) -> None:
        path = target / "weights.safetensors"
        blob = path.read_bytes()
        path.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))

    def task(target: Path) -> None:
        path = target / "predictor.json"
        settings = json.loads(path.read_text())
        del settings["task"]["held_out"]
        path.write_text(json.dumps(settings))

    assert "predictor.json is missing" in refused(lambda t: (t / "predictor.json").unlink())
    assert "weights.safetensors is missing" in refused(
        lambda t: (t / "weights.safetensors").unlink()
    )
    assert "format 9; allowed: 1 to 1" in refused(newer)
    assert "another hash" in refused(damaged)
    assert "lacks 'held_out'" in refused(task)
    text = out_of(capsys, [*FIRST, "--name", "bad", "--predictor", "nowhere"], 2)
    assert "no predictor in 'nowhere'" in text
    other = sl.Space(x=sl.Real(0, 1), n=sl.Integer(0, 5))
    with pytest.raises(DataError, match=r"is of space TableSpace\(.*; allowed: Space\(x:real"):
        sl.search(other, lambda x, n: x + n, budget=5, predictor=source)


def test_bad_options_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["run", "ask", "--space", "none.yaml", "--objective", "x:min", "--predictor", "p"]
    assert "allowed: recipes that evaluate" in out_of(capsys, ask, 2)
    assert "without a predictor" in out_of(capsys, [*FIRST, "--refit", "never"], 2)
    with pytest.raises(ConfigError, match="refit 'maybe'; allowed: never, warm, scratch"):
        sl.search(
            sized(3),
            worth,
            budget=5,
            predictor="runs/one/predictor",
            refit="maybe",  # type: ignore[arg-type]
        )
