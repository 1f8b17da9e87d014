"""`auto`: its table, its limit on baselines, and that a run keeps what it was opened with."""

from __future__ import annotations

import html
import io
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import searchlab as sl
from searchlab.algorithms import Seeds
from searchlab.auto import choose, chosen_for, kept_baselines, parse_baselines, settled
from searchlab.callbacks import Callback, Progress
from searchlab.cli import main
from searchlab.config import SearchConfig
from searchlab.errors import ConfigError, StudyError
from searchlab.progress import ProgressLine
from searchlab.result import Result
from searchlab.search import run
from searchlab.space import Space
from searchlab.study import Database, MemoryRun
from searchlab.variables import ActiveIf, Affine, Choice, Integer, Ordered, Real, Simplex

CHOICES = Space(x=Choice(range(4), shape=(6,)))
REALS = Space(x=Real(-1, 1, shape=(5,)))
MIXED = Space(x=Choice(range(4), shape=(6,)), y=Real(0, 1), n=Integer(0, 9))
FOUR = Real(0, 1, shape=(4,))


def total(x: list[int]) -> float:
    return float(sum(x))


def rising(columns: Mapping[str, Any]) -> Any:
    return columns["x"][:, 0] <= columns["x"][:, 1]


# -- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "more", "name"),
    [
        (CHOICES, {"evaluations": 40}, "guided"),
        (CHOICES, {"evaluations": 400}, "evolution"),
        (CHOICES, {"evaluations": None}, "evolution"),
        (MIXED, {}, "evolution"),
        (REALS, {"evaluations": 40}, "cma"),
        (REALS, {"evaluations": None}, "cma"),
        (Space(w=Simplex(4)), {"evaluations": 200}, "cma"),
        (Space(w=Affine(4, 1.0, low=-1, high=2), z=Real(1, 9, log=True)), {}, "cma"),
        (Space(z=Real(0, 1)), {}, "evolution"),  # one coordinate leaves nothing to adapt
        (Space(w=Simplex(2)), {}, "evolution"),
        (Space(z=Real(0, 1, step=0.1, shape=(4,))), {}, "evolution"),
        (Space(t=Ordered(4, 0, 1, 0.01)), {}, "evolution"),
        (
            Space(a=Choice((0, 1)), x=replace(FOUR, when=(ActiveIf("a", (1,)),))),
            {},
            "evolution",
        ),
        (Space(x=FOUR, constraints=[sl.Predicate(rising, "rising")]), {}, "evolution"),
        (CHOICES, {"objectives": 2}, "nsga2"),
        (REALS, {"objectives": 3}, "nsga2"),
        (MIXED, {"objectives": 4}, "nsga3"),
    ],
)
def test_the_algorithm_follows_the_space_and_the_objectives(
    space: Space, more: dict[str, Any], name: str
) -> None:
    chosen = choose(space, **{"evaluations": 400, **more})
    options = {"options": {"climb": 12}} if name == "guided" else {}
    assert (chosen.spec.name, dict(chosen.spec.options)) == (name, options)
    assert chosen.reason


@pytest.mark.parametrize(("evaluations", "halves"), [(60, True), (301, False), (None, False)])
def test_few_evaluations_are_spread_over_the_fidelities(
    evaluations: int | None, halves: bool
) -> None:
    chosen = choose(CHOICES, evaluations=evaluations, fidelities=(0.1, 1.0))
    if halves:
        assert chosen.spec.name == "successive_halving"
        assert chosen.spec.options == {"fidelities": [0.1, 1.0]}
        assert "2 fidelities" in chosen.reason
    else:
        assert chosen.spec.name == "evolution"


def test_only_a_stage_that_begins_at_the_truth_has_fidelities_to_go_by() -> None:
    evaluator = sl.FunctionEvaluator(
        total, CHOICES, fidelities=(sl.Fidelity("some", 0.1), sl.Fidelity("all", 1.0))
    )
    spec, budget = sl.AlgorithmSpec("auto"), sl.Budget(40)
    stage = sl.Stage("search", CHOICES, evaluator, spec, budget)
    assert chosen_for(stage).spec.name == "successive_halving"
    assert chosen_for(replace(stage, fidelity=0)).spec.name == "guided"
    assert chosen_for(replace(stage, adopt=sl.AdoptBest(3))).spec.name == "guided"


def test_evolution_races_where_the_evaluator_stops_early() -> None:
    chosen = choose(CHOICES, evaluations=400, prunes=True)
    assert (chosen.spec.name, chosen.spec.options) == ("evolution", {"race": True})
    assert "stop early" in chosen.reason
    assert choose(REALS, evaluations=400, prunes=True).spec.options == {}


@pytest.mark.parametrize(
    ("evaluations", "name"),
    [(40, "guided"), (61, "guided"), (300, "guided"), (301, "evolution"), (None, "evolution")],
)
def test_a_predictor_is_used_where_one_is_registered(evaluations: int | None, name: str) -> None:
    without = choose(CHOICES, evaluations=evaluations, registered=lambda name: name != "guided")
    assert without.spec.name == "evolution"
    assert ("without a predictor" in without.reason) == (name == "guided")
    spec = choose(CHOICES, evaluations=evaluations).spec
    assert spec.name == name
    # Or a larger budget would not go on where a smaller one ends.
    assert spec.options == ({"options": {"climb": 12}} if name == "guided" else {})
    assert choose(REALS, evaluations=evaluations).spec.name == "cma"
    told = choose(CHOICES, evaluations=evaluations, signals=True).spec
    assert told.options == ({"options": {"climb": 50}} if name == "guided" else {})
    if name == "guided":  # nor may the options of a mixed space follow the budget
        mixed = choose(MIXED, evaluations=evaluations).spec
        assert mixed == choose(MIXED, evaluations=20).spec
        assert mixed.build(MIXED, seed=0, first_id=0, seeds=None).first_fit == 10


# -- runs ---------------------------------------------------------------------------------------


def test_on_few_choices_it_is_guided_and_says_so() -> None:
    result = sl.search(CHOICES, total, budget=40, seed=3)
    guided = sl.AlgorithmSpec("guided", {"options": {"climb": 12}})
    named = sl.search(CHOICES, total, budget=40, seed=3, algorithm=guided)
    assert result.records is not None
    assert named.records is not None
    assert result.records.trace() == named.records.trace()
    assert named.meta["algorithm"] == {"search": "guided"}
    (text,) = result.meta["algorithm"].values()
    assert (
        text
        == "guided with options={'climb': 12}, chosen by auto: 40 evaluations of 6 choice elements"
    )
    assert result.to_json()["algorithm"] == {"search": text}


def test_a_larger_budget_does_not_change_the_choice(tmp_path: Path) -> None:
    def searched(budget: int, folder: str, *callbacks: Callback) -> Result:
        out = tmp_path / folder
        return sl.search(CHOICES, total, budget=budget, name=folder, out=out, callbacks=callbacks)

    def leave(progress: Progress) -> None:  # a predictor of 400 labels takes long
        if progress.finished >= 70:
            raise KeyboardInterrupt

    first = searched(40, "grown")
    grown = searched(400, "grown", leave)
    fresh = searched(400, "fresh")
    assert grown.meta["status"] == "interrupted"
    assert first.meta["algorithm"] == grown.meta["algorithm"]
    assert grown.meta["algorithm"]["search"].startswith(
        "guided with options={'climb': 12}, chosen by auto: 40 "
    )
    assert fresh.meta["algorithm"]["search"].startswith("evolution, chosen by auto: 400 evalu")
    assert first.records is not None
    assert grown.records is not None
    assert fresh.records is not None
    assert "guided:vary" in grown.records.origin[40:]
    assert set(fresh.records.origin) == {"random", "vary"}
    assert grown.records.trace()[0][:40] == first.records.trace()[0]


def test_a_run_verifies_with_what_it_chose(tmp_path: Path) -> None:
    def build(budget: int) -> SearchConfig:
        evaluator = sl.FunctionEvaluator(total, CHOICES)
        stage = sl.Stage("search", CHOICES, evaluator, sl.AlgorithmSpec("auto"), sl.Budget(budget))
        return SearchConfig((stage,), seed=2)

    with Database(tmp_path / "study.db") as base:
        config = build(30)
        given: dict[str, Any] = {"space": CHOICES.fingerprint, "seed": 2, "out": ""}
        run(config, store=base.open_run("r", config=config.describe(), **given))
        assert sl.verify(build(30), base.read("r")) == []
        assert sl.verify(build(900), base.read("r")) == []


def test_another_version_of_the_chosen_algorithm_is_refused() -> None:
    evaluator = sl.FunctionEvaluator(total, CHOICES)
    stage = sl.Stage("search", CHOICES, evaluator, sl.AlgorithmSpec("auto"), sl.Budget(30))
    config, store = SearchConfig((stage,)), MemoryRun("r")
    assert settled(config, store).stages[0].algorithm.name == "guided"
    notes = store.get_meta("auto")
    notes["0"]["settings"]["first_fit"] += 1
    store.set_meta("auto", notes)
    with pytest.raises(StudyError, match="other settings of guided"):
        settled(config, store)


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match=r"options of auto: quantum; allowed: none"):
        sl.search(CHOICES, total, algorithm=sl.AlgorithmSpec("auto", {"quantum": 4}))
    with pytest.raises(ConfigError, match="settled when a run is opened"):
        sl.AlgorithmSpec("auto").build(CHOICES, seed=0, first_id=0, seeds=None)


# -- what is printed ----------------------------------------------------------------------------


def test_the_choice_is_the_first_line_of_the_progress() -> None:
    heard: list[Progress] = []
    out = io.StringIO()
    sl.search(CHOICES, total, budget=20, callbacks=[heard.append, ProgressLine(out)])
    assert {progress.chosen for progress in heard} == {heard[0].chosen}
    assert out.getvalue().splitlines()[0] == f"search: {heard[0].chosen}"
    assert heard[0].chosen.startswith("guided with options={'climb': 12}, chosen by auto: ")
    quiet = io.StringIO()
    sl.search(CHOICES, total, budget=20, algorithm="random", callbacks=[ProgressLine(quiet)])
    assert "random" not in quiet.getvalue()


SCRIPT = """
import json, sys
plan = json.load(open(sys.argv[1]))
json.dump({"objectives": {"loss": sum(plan["values"]["x"])}}, open(sys.argv[2], "w"))
"""


def test_the_command_line_says_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text(SCRIPT)
    (tmp_path / "space.yaml").write_text("variables: {x: {choice: [0, 1, 2], shape: [4]}}\n")
    known = {f"point {i}": {"x": [i % 3, 0, 1, i // 3]} for i in range(6)}
    (tmp_path / "known.json").write_text(json.dumps(known))
    command = f"{sys.executable} {tmp_path / 'score.py'} {{plan}} {{out}}"
    given = ["run", "command", "--space", "space.yaml", "--command", command]
    given += ["--objective", "loss:min", "--baseline", "known.json", "--budget", "6"]
    text = "guided with options={'climb': 8}, chosen by auto: 6 evaluations of 4 choice elements"

    assert main([*given, "--name", "a", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "stage 'search': 2 given candidates, 6 evaluations" in printed
    assert f"stage 'search': {text}" in printed

    assert main([*given, "--name", "a", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "baseline evaluations 2," in printed
    assert f"\nsearch: {text}" in printed
    assert html.escape(text) in (tmp_path / "runs/a/report.html").read_text("utf-8")

    assert main(["resume", "a", "--budget", "12"]) == 0
    printed = capsys.readouterr().out
    assert "baseline evaluations 2," in printed
    assert f"\nsearch: {text}" in printed
    assert main(["verify", "a"]) == 0
    capsys.readouterr()

    assert main([*given, "--name", "b", "--quiet", "--baselines", "point 4,point 1"]) == 0
    assert "baseline evaluations 2," in capsys.readouterr().out
    assert main([*given, "--name", "c", "--algorithm", "magic"]) == 2
    assert "unknown algorithm 'magic'; known: auto, " in capsys.readouterr().err
    assert main([*given, "--name", "d", "--baselines", "point 9"]) == 2
    assert "unknown baseline 'point 9'; known: point 0, " in capsys.readouterr().err


# -- baselines ----------------------------------------------------------------------------------


def seeds(n: int) -> Seeds:
    """n baselines, and a warm start between the first two."""
    population = CHOICES.population([{"x": [0, 0, 0, 0, i // 4, i % 4]} for i in range(n + 1)])
    names = [f"baseline:{i}" for i in range(n)]
    return Seeds(population, (names[0], "seed:warm", *names[1:]))


def test_a_rule_picks_baselines_and_leaves_other_seeds() -> None:
    every = seeds(5)
    assert kept_baselines(every, "all", 1) is every
    assert kept_baselines(every, "auto", None) is every
    first = ("baseline:0", "seed:warm", "baseline:1")
    assert kept_baselines(every, "auto", 2).origin == first
    assert kept_baselines(every, "none", None).origin == ("seed:warm",)
    named = kept_baselines(every, ("3", "1"), None)
    assert named.origin == ("seed:warm", "baseline:1", "baseline:3")
    kept = CHOICES.keys(every.population)
    assert CHOICES.keys(named.population) == tuple(kept[i] for i in (1, 2, 4))


def test_rules_are_read_from_texts() -> None:
    assert [parse_baselines(word) for word in ("auto", "all", "none")] == ["auto", "all", "none"]
    assert parse_baselines("EMA, last") == ("EMA", "last")
    with pytest.raises(ConfigError, match="allowed: auto, all, none or names"):
        parse_baselines(" , ")


@pytest.mark.parametrize(("budget", "kept"), [(9, 3), (2, 1), (0, 1), (None, 8)])
def test_auto_scores_baselines_for_a_third_of_the_budget(budget: int | None, kept: int) -> None:
    evaluator = sl.FunctionEvaluator(total, CHOICES)
    stage = sl.Stage(
        "search",
        CHOICES,
        evaluator,
        sl.AlgorithmSpec("random"),
        sl.Budget(budget),
        seeds=seeds(8),
        baselines="auto",
    )
    config, store = SearchConfig((stage,)), MemoryRun("r")
    for asked in (config, replace(config, stages=(replace(stage, budget=sl.Budget(60)),))):
        settled_seeds = settled(asked, store).stages[0].seeds
        assert settled_seeds is not None
        assert sum(text.startswith("baseline") for text in settled_seeds.origin) == kept
    again = settled(settled(config, store), store)
    assert again.stages[0].seeds is not None
    assert len(again.stages[0].seeds.origin) == kept + 1


def test_the_rule_belongs_to_the_configuration() -> None:
    evaluator = sl.FunctionEvaluator(total, CHOICES)
    stage = sl.Stage("search", CHOICES, evaluator, sl.AlgorithmSpec("random"), seeds=seeds(3))
    described = SearchConfig((stage,)).describe()["stages"][0]
    assert "baselines" not in described
    capped = SearchConfig((replace(stage, baselines="auto"),)).describe()["stages"][0]
    assert capped == {**described, "baselines": "auto"}
    with pytest.raises(ConfigError, match="unknown baseline '7'; known: 0, 1, 2"):
        replace(stage, baselines=("1", "7"))
    with pytest.raises(ConfigError, match="unknown baseline '1'; known: none"):
        replace(stage, seeds=None, baselines=("1",))
    with pytest.raises(ConfigError, match="baselines 'some'; allowed: auto, all, none"):
        replace(stage, baselines="some")  # type: ignore[arg-type]
