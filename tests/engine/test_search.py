"""The short form for Python: functions, baselines, directions, the final, folders, public names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import searchlab as sl
from searchlab.errors import ConfigError, SpaceError, StudyError
from searchlab.evaluator import REPORT_REPLICATE, SELECTION_REPLICATE
from searchlab.population import Evaluations, Jobs

ROOT = Path(__file__).resolve().parents[2]


def space() -> sl.Space:
    return sl.Space(fmt=sl.Choice(("bf16", "fp8", "int4"), shape=(6,)), scale=sl.Real(0.5, 2))


def loss(fmt: list[str], scale: float) -> float:
    cost = {"bf16": 3.0, "fp8": 1.0, "int4": 2.0}
    return sum(cost[name] for name in fmt) + (scale - 1) ** 2


def test_ten_lines() -> None:
    result = sl.search(space(), loss, budget=200, seed=0)
    assert result.best.plan["fmt"] == ["fp8"] * 6
    assert result.best.value < 6.1
    assert "best" in str(result)
    assert result.counts["evaluations"] == 200


def test_equal_seeds_give_equal_traces() -> None:
    traces = []
    for seed in (1, 1, 2):
        records = sl.search(space(), loss, budget=40, seed=seed).records
        assert records is not None
        traces.append(records.trace())
    assert traces[0] == traces[1] != traces[2]


def test_a_direction_of_max() -> None:
    result = sl.search(space(), loss, budget=150, direction="max")
    assert result.best.plan["fmt"] == ["bf16"] * 6
    assert result.best.value > 18
    with pytest.raises(ConfigError, match="direction"):
        sl.search(space(), loss, direction="up")  # type: ignore[arg-type]


def test_a_decorated_function_gets_many_candidates_at_once() -> None:
    sizes: list[int] = []

    @sl.evaluator(objectives={"nll": "min"}, fidelities={"low": 1, "full": 4})
    def nll(plans: list[dict[str, Any]], fidelity: str, seed: int) -> list[float]:
        sizes.append(len(plans))
        assert fidelity == "full" or len(sizes) <= 3  # the measurement uses the cheapest one
        return [loss(**plan) for plan in plans]

    spec = sl.AlgorithmSpec("evolution", {"quantum": 8})
    result = sl.search(space(), nll, budget=40, algorithm=spec)
    assert result.objective.name == "nll"
    assert sizes[3:] == [8] * 5
    assert nll([{"fmt": ["fp8"], "scale": 1.0}], "full", 0) == [1.0]


def test_a_column_function() -> None:
    @sl.evaluator(columns=True)
    def distance(columns: dict[str, Any], fidelity: str, seed: int) -> Any:
        return columns["fmt"].sum(axis=1) + columns["scale"]

    result = sl.search(space(), distance, budget=60)
    assert result.best.plan["fmt"].count("bf16") >= 4


class Noisy:
    """An evaluator whose values have noise per replicate; notes what it was asked."""

    objectives = (sl.Objective("error"),)
    fidelities = (sl.Fidelity("full"),)
    signals = ()
    reproducibility = "exact"

    def __init__(self, space: sl.Space, noise: float = 0.1) -> None:
        self.space, self.noise = space, noise
        self.replicates: list[int] = []

    def setup(self) -> None:
        self.ready = True

    def evaluate(self, jobs: Jobs) -> Evaluations:
        self.replicates += [jobs.replicate] * len(jobs)
        out = []
        for plan, key in zip(self.space.decode(jobs.population), jobs.keys, strict=True):
            number = int.from_bytes(key[:4], "big")
            draw = np.random.default_rng([jobs.replicate, number]).normal()
            out.append(loss(**plan) + self.noise * draw)
        return Evaluations(np.array(out))

    def identity(self) -> dict[str, Any]:
        return {"version": 1, "noise": self.noise}


BASELINES = {
    "all bf16": {"fmt": ["bf16"] * 6, "scale": 1.0},
    "all int4": {"fmt": ["int4"] * 6, "scale": 1.0},
}


def test_the_final_rescores_on_splits_the_search_never_saw() -> None:
    made = Noisy(space())
    final = sl.Final(k=3, selection=2, report=4)
    result = sl.search(space(), made, budget=60, baselines=BASELINES, final=final)
    assert made.ready
    first = made.replicates.index(SELECTION_REPLICATE)
    assert set(made.replicates[:first]) == {0}
    rest = made.replicates[first:]
    wanted = [SELECTION_REPLICATE + r for r in range(2)] + [REPORT_REPLICATE + r for r in range(4)]
    assert list(dict.fromkeys(rest)) == wanted
    # Three finalists and two baselines on selection; the winner and the best baseline on report.
    assert rest.count(SELECTION_REPLICATE) == 5
    assert rest.count(REPORT_REPLICATE) == 2
    assert result.counts["final"] == 2 * 5 + 4 * 2
    (group,) = result.groups
    assert group.winner is not None
    best = min(group.finalists, key=lambda c: c.selection)
    assert group.winner.key == best.key
    assert len(group.winner.report) == 4
    rows = result.rows()
    assert [row["kind"] for row in rows] == ["searched", "baseline"]
    assert rows[1]["name"] == "all int4"
    assert rows[0]["report_half"] > 0
    assert "better, distinguishable at 95 %" in result.verdict()
    assert rows[0]["report"] == pytest.approx(np.mean(group.winner.report))


class Misled(Noisy):
    """Its search replicates praise what all others find bad."""

    def evaluate(self, jobs: Jobs) -> Evaluations:
        wide = [plan["fmt"].count("int4") for plan in self.space.decode(jobs.population)]
        at_search = jobs.replicate < SELECTION_REPLICATE
        return Evaluations(np.array([1.0 + (n if at_search else 6 - n) for n in wide]))


@pytest.mark.parametrize("known", [False, True])
def test_a_baseline_may_win_and_nothing_is_chosen_by_its_report(known: bool) -> None:
    final = sl.Final(k=3, report=2, known=known)
    result = sl.search(space(), Misled(space()), budget=60, baselines=BASELINES, final=final)
    (group,) = result.groups
    assert group.winner is not None
    assert group.winner.kind == ("baseline" if known else "searched")
    assert result.best.contender.name == "all int4"
    assert result.rows()[0]["report"] == np.mean(group.winner.report)
    assert ("of all int4: nothing else" in result.verdict()) is known
    other = next(c for c in group.finalists if c.selection > 1)
    other.report = (-5.0, -5.0)  # by report values alone this would be best
    group.baselines.append(other)
    assert result.best.contender.name == "all int4"


def test_a_difference_within_the_noise_is_not_distinguishable() -> None:
    made = Noisy(sl.Space(fmt=sl.Choice(("fp8",), shape=(6,)), scale=sl.Real(0.99, 1.01)), 5.0)
    baselines = {"one": {"fmt": ["fp8"] * 6, "scale": 1.0}}
    result = sl.search(made.space, made, budget=20, baselines=baselines, final=sl.Final(report=4))
    assert "not distinguishable at 95 %" in result.verdict()


def test_one_report_replicate_has_no_interval() -> None:
    made = Noisy(sl.Space(fmt=sl.Choice(("fp8",), shape=(6,)), scale=sl.Real(0.99, 1.01)), 5.0)
    baselines = {"one": {"fmt": ["fp8"] * 6, "scale": 1.0}}
    result = sl.search(made.space, made, budget=20, baselines=baselines, final=sl.Final(report=1))
    assert "one replicate, so no interval" in result.verdict()
    assert "nan" not in result.verdict()


def test_growing_the_budget_redoes_the_final(tmp_path: Path) -> None:
    def go(budget: int, out: Path) -> tuple[Noisy, Any]:
        made = Noisy(space(), 0.01)
        final = sl.Final(k=2, report=2)
        return made, sl.search(
            space(), made, budget=budget, baselines=BASELINES, final=final, out=out
        )

    go(20, tmp_path / "a")
    again, grown = go(80, tmp_path / "a")
    _, whole = go(80, tmp_path / "b")
    assert grown.records.ids[grown.records.stage == 0].tolist() == list(range(82))
    assert grown.rows() == whole.rows()
    assert grown.verdict() == whole.verdict()
    same, repeated = go(80, tmp_path / "a")
    assert same.replicates == []
    assert repeated.rows() == whole.rows()
    assert again.replicates.count(0) == 60


def test_baselines_are_checked() -> None:
    bits = sl.LinearBudget({"fmt": [16.0, 8.0, 4.0]}, upper=48, name="bits")
    tight = sl.Space(fmt=sl.Choice(("bf16", "fp8", "int4"), shape=(6,)), constraints=[bits])
    with pytest.raises(ConfigError, match="'all bf16'"):
        sl.search(tight, len, baselines={"all bf16": {"fmt": ["bf16"] * 6}})
    with pytest.raises(SpaceError, match="fp16"):
        sl.search(tight, len, baselines={"x": {"fmt": ["fp16"] * 6}})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": -1}, "budget"),
        ({"budget": "6 bananas"}, "budget"),
        ({"algorithm": "magic"}, "evolution"),
        ({"algorithm": sl.AlgorithmSpec("evolution", {"speed": 3})}, "speed"),
        ({"seed": -1}, "seed"),
        ({"objective": 3}, "objective"),
        ({"out": "file"}, "'file'"),
    ],
)
def test_wrong_arguments_are_named(
    options: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")

    def never(fmt: list[str], scale: float) -> float:
        raise AssertionError("evaluated")

    with pytest.raises(ConfigError, match=text):
        sl.search(space(), **{"objective": never, **options})
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_final_settings_are_checked() -> None:
    for wrong in ({"k": 0}, {"report": 65}, {"selection": 0}, {"alpha": 1.0}):
        with pytest.raises(ConfigError, match="final"):
            sl.Final(**wrong)  # type: ignore[arg-type]


def test_a_folder_holds_the_artefacts_and_goes_on(tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(fmt: list[str], scale: float) -> float:
        calls.append(1)
        return loss(fmt, scale)

    def go(budget: int) -> Any:
        return sl.search(space(), counted, budget=budget, out=tmp_path / "run", name="mine")

    first = go(20)
    assert first.out == tmp_path / "run"
    assert {"run.json", "result.json", "report.html", "searchlab.db", "export"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    plan = json.loads((tmp_path / "run" / "export" / "plan.json").read_text())
    assert plan == first.best.plan
    calls.clear()
    go(30)
    assert len(calls) == 10
    with pytest.raises(StudyError, match="another"):
        sl.search(space(), max, budget=20, out=tmp_path / "run", name="mine")
    with pytest.raises(StudyError, match="seeds"):
        sl.search(
            space(), counted, budget=20, out=tmp_path / "run", name="mine", baselines=BASELINES
        )


def test_a_result_without_a_success_says_so() -> None:
    def never(fmt: list[str], scale: float) -> float:
        raise ValueError("no")

    result = sl.search(space(), never, budget=5, final=sl.Final())
    assert "no candidate was evaluated successfully" in result.verdict()
    with pytest.raises(StudyError, match="no successful evaluation"):
        _ = result.best


# -- public names -------------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    for name in sl.__all__:
        assert getattr(sl, name) is not None
    assert set(sl.__all__) <= set(dir(sl))
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = sl.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("first", ["", "import searchlab.search, searchlab.evaluator; "])
def test_functions_that_share_a_modules_name_work_in_any_order(first: str) -> None:
    code = first + (
        "import searchlab as sl\n"
        "f = sl.evaluator()(lambda plans, fidelity, seed: [p['x'] for p in plans])\n"
        "print(sl.search(sl.Space(x=sl.Integer(0, 9)), f, budget=10).best.value)\n"
        "from searchlab import search, evaluator\n"
        "from searchlab.search import run\n"
        "import searchlab.evaluator as module; module.Objective\n"
        "print(search(sl.Space(x=sl.Integer(0, 9)), f, budget=10).best.value)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.split() == ["0.0", "0.0"], done.stderr


def test_steps_of_integers_stay_near_at_the_ends() -> None:
    variable = sl.Integer(0, 99)
    u = np.random.default_rng(0).random((4000, 1))
    for value in (0, 1, 50, 98, 99):
        values = np.full(4000, value)
        moved = variable.mutate(values, np.ones(4000, bool), u)
        assert moved.min() >= 0
        assert moved.max() <= 99
        assert (moved != value).all()
        assert np.median(np.abs(moved - value)) < 25
        assert len(set(moved.tolist())) > 70
    both = sl.Integer(3, 4).mutate(np.array([3, 4] * 10), np.ones(20, bool), u[:20])
    assert both.tolist() == [4, 3] * 10
