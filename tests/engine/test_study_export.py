"""Records as data frames, Parquet files and Optuna journals, and the dashboard on them."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import searchlab as sl
from searchlab.cli import main
from searchlab.config import AlgorithmSpec, Budget, Final, SearchConfig, Stage
from searchlab.errors import StudyError
from searchlab.evaluator import Fidelity, Objective, Signal
from searchlab.population import FAILED, OK, PRUNED, Evaluations, Jobs
from searchlab.search import run
from searchlab.study import Database, MemoryRun

ROOT = Path(__file__).resolve().parents[2]


def space() -> sl.Space:
    return sl.Space(
        mode=sl.Choice(["a", "b"]),
        fmt=sl.Choice([["int", 4], "bf16"], shape=(2,)),
        depth=sl.Integer(1, 9, when=sl.ActiveIf("mode", ("a",))),
        rate=sl.Real(0.0, 1.0),
        times=sl.Ordered(3, 0.0, 1.0),
    )


def loss(mode: str, fmt: list[Any], depth: int, rate: float, times: list[float]) -> float:
    if rate > 0.9:
        raise ValueError("too fast")
    return rate + (mode == "b") + 0.1 * fmt.count("bf16") + 0.01 * depth + times[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the Python-made run "mine", its final included."""
    target = tmp_path_factory.mktemp("export")
    sl.search(
        space(),
        loss,
        budget=30,
        baselines={"low": dict(mode="a", fmt=["bf16"] * 2, depth=1, rate=0.5, times=[0, 0.5, 1])},
        final=Final(k=2, report=2),
        name="mine",
        out=target / "mine",
    )
    return target


def test_a_stored_run_as_a_data_frame(folder: Path) -> None:
    with Database(folder / "mine" / "searchlab.db") as base:
        store = base.read("mine")
        frame, records = store.to_pandas(), store.records()
    assert frame["id"].tolist() == records.ids.tolist()
    plain = frame[frame.state == "ok"]
    told = [loss(row.mode, row.fmt, row.depth, row.rate, row.times) for row in plain.itertuples()]
    assert told == plain["value"].tolist()
    assert plain["value"].dtype == np.float64
    assert set(frame[frame.state == "failed"].reason) == {"ValueError: too fast"}
    assert frame.groupby("origin").value.min().loc["baseline:low"] == 0.71


def test_a_data_frame_without_a_layout_has_numbered_values() -> None:
    jobs = Jobs(np.arange(1), sl.Population({"x": np.zeros(1)}), (b"k" * 16,), fidelity=0)
    store = MemoryRun()
    told = Evaluations(np.array([[1.0, 2.0]]))
    store.record(jobs, told, packed=[b""], evaluator="ab", started=0.0, finished=1.0)
    store.commit()
    frame = store.to_pandas()
    assert frame[["value_0", "value_1"]].values.tolist() == [[1.0, 2.0]]
    assert store.to_pandas(objectives=(Objective("a"), Objective("b"))).b.tolist() == [2.0]
    with pytest.raises(StudyError, match="1 objectives; allowed: 2"):
        store.to_pandas(objectives=(Objective("a"),))


def test_a_result_as_a_data_frame(folder: Path) -> None:
    result = sl.search(space(), loss, budget=30, name="mine", out=folder / "mine", **again())
    frame = result.to_pandas()
    assert frame.kind.tolist() == ["searched", "baseline"]
    assert frame.report.notna().all()


def again() -> dict[str, Any]:
    low = dict(mode="a", fmt=["bf16"] * 2, depth=1, rate=0.5, times=[0, 0.5, 1])
    return {"baselines": {"low": low}, "final": Final(k=2, report=2)}


def test_parquet_or_the_name_of_what_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = folder / "records.parquet"
    code = main(["export", str(folder / "mine"), "--parquet", str(target)])
    if importlib.util.find_spec("pyarrow") is None:
        assert code == 2
        assert "'pyarrow'" in capsys.readouterr().err
        assert not target.exists()
        return
    import pandas as pd

    assert code == 0
    frame = pd.read_parquet(target)
    with Database(folder / "mine" / "searchlab.db") as base:
        expected = base.read("mine").to_pandas()
    assert frame["value"].equals(expected["value"])
    assert [json.loads(cell) for cell in frame["fmt"]] == expected["fmt"].tolist()
    assert frame["mode"].tolist() == expected["mode"].tolist()


def test_a_missing_parquet_package_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    target = folder / "none.parquet"
    assert main(["export", str(folder / "mine"), "--parquet", str(target)]) == 2
    err = capsys.readouterr().err
    assert "'pyarrow', which is not installed" in err
    assert err.count("\n") == 1
    assert not target.exists()
    assert main(["dashboard", str(folder / "mine")]) == 2
    assert "'optuna-dashboard', which is not installed" in capsys.readouterr().err


# -- Optuna -------------------------------------------------------------------------------------


def load(path: Path, name: str) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(path))))


def test_an_optuna_study_holds_every_record(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = folder / "out" / "journal.log"
    assert main(["export", str(folder / "mine"), "--optuna", str(target)]) == 0
    with Database(folder / "mine" / "searchlab.db") as base:
        records = base.read("mine").records()
    searched = records.take((records.replicate == 0) & (records.state <= 3))
    study = load(target, "mine")
    assert [trial.user_attrs["id"] for trial in study.trials] == searched.ids.tolist()
    assert study.metric_names == ["value"]
    for trial, state, value in zip(
        study.trials, searched.state, searched.values[:, 0], strict=True
    ):
        if state == OK:
            assert trial.state.name == "COMPLETE"
            assert trial.value == value
            fmt = [json.loads(trial.params[f"fmt[{i}]"]) for i in range(2)]
            times = [trial.params[f"times[{i}]"] for i in range(3)]
            # An element that is not active is no parameter; its neutral value counts.
            assert ("depth" in trial.params) == (trial.params["mode"] == "a")
            depth = trial.params.get("depth", 1)
            told = loss(trial.params["mode"], fmt, depth, trial.params["rate"], times)
            assert told == value
        else:
            assert trial.state.name == "FAIL"
            assert trial.user_attrs["reason"] == "ValueError: too fast"
    assert study.best_value == np.nanmin(searched.values)
    report = load(target, "mine/report")
    assert len(report.trials) == 4  # the winner and the baseline, twice each
    assert len(load(target, "mine/selection").trials) == 3
    assert [path.name for path in target.parent.iterdir()] == ["journal.log"]


class Bounded:
    """Two objectives, a fidelity, a signal and a constraint with a bound."""

    objectives = (Objective("speed", "max"), Objective("error"))
    fidelities = (Fidelity("rough", 0.1), Fidelity("full"))
    signals = (Signal("norm"),)
    reproducibility = "exact"

    def setup(self) -> None:
        """Nothing to load."""

    def evaluate(self, jobs: Jobs) -> Evaluations:
        x = jobs.population["x"].astype(float)
        state = np.where(x == 3, PRUNED, np.where(x == 4, FAILED, OK)).astype(np.int8)
        return Evaluations(
            np.stack([x, -x], axis=1),
            state=state,
            reason=["" if s == OK else "stopped" for s in state],
            constraints=(x - 5)[:, None],
            std_error=np.full((len(x), 2), 0.5),
            signals=2 * x[:, None],
        )

    def identity(self) -> dict[str, Any]:
        return {"version": 1}


def test_states_directions_constraints_and_stages_are_mapped(tmp_path: Path) -> None:
    own = sl.Space(x=sl.Integer(0, 9))
    evaluator = Bounded()
    stages = tuple(
        Stage(name, own, evaluator, AlgorithmSpec("random"), Budget(10), fidelity=fidelity)
        for name, fidelity in (("screen", 0), ("search", -1))
    )
    with Database(tmp_path / "study.db") as base:
        store = base.open_run("b", config={}, space=own.fingerprint, seed=0, out="")
        run(SearchConfig(stages, name="b"), store=store)
        from searchlab._run_layout import LAYOUT, read_layout
        from searchlab.optuna_export import write_optuna

        stored = base.read("b")
        layout = read_layout(stored.get_meta(LAYOUT), "b")
        assert layout is not None
        names = write_optuna(tmp_path / "journal", "b", stored.records(), layout)
    assert names == ["b", "b/screen (rough)"]
    study = load(tmp_path / "journal", "b")
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["speed", "error"]
    assert len(study.trials) == 10  # each of the ten points once
    for trial in study.trials:
        x = trial.params["x"]
        assert trial.system_attrs["constraints"] == [x - 5.0]
        assert trial.state.name == {3: "PRUNED", 4: "FAIL"}.get(x, "COMPLETE")
        if trial.state.name == "COMPLETE":
            assert trial.values == [x, -x]
        assert trial.user_attrs["std_error of speed"] == 0.5
        assert trial.user_attrs["norm"] == 2 * x
    rough = load(tmp_path / "journal", "b/screen (rough)").trials
    assert {trial.params["x"] for trial in rough} == set(range(10))


@pytest.mark.skipif(
    importlib.util.find_spec("optuna_dashboard") is None, reason="optuna-dashboard is an extra"
)
def test_the_dashboard_serves_the_studies(folder: Path) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        busy = subprocess.run(
            [sys.executable, "-m", "searchlab", "dashboard", "mine", "--port", str(port)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert busy.returncode == 2
    assert busy.stderr.count("\n") == 1
    assert f"port {port}" in busy.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "searchlab", "dashboard", "mine", "--port", str(port)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "mine, mine/selection, mine/report" in process.stdout.readline()
        assert f":{port}/" in process.stdout.readline()
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/api/studies") as answer:
                    data = json.loads(answer.read())
                break
            except OSError:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.1)
    finally:
        process.terminate()
        process.wait()
    names = {summary["study_name"] for summary in data["study_summaries"]}
    assert names == {"mine", "mine/selection", "mine/report"}
