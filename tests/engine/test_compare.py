"""Comparing two runs and checking one: pairs, intervals, sentences, expectations, exit codes."""

from __future__ import annotations

import json
import math
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import searchlab as sl
from searchlab.algorithms import Seeds
from searchlab.cli import main
from searchlab.compare import compare
from searchlab.config import AlgorithmSpec, Budget, Final, SearchConfig, Stage
from searchlab.errors import ConfigError, StudyError
from searchlab.evaluator import Objective
from searchlab.expectations import expect
from searchlab.final import Interval
from searchlab.outcome import figures, read_outcome
from searchlab.population import Evaluations, Jobs
from searchlab.runs import find_run
from searchlab.search import run
from searchlab.study import Database

STUDY = ["--database", "study.db"]
SPACE = sl.Space(x=sl.Real(0.0, 1.0), y=sl.Real(0.0, 1.0))


class Noisy:
    """A distance with noise that is the same for all candidates of a replicate, nearly."""

    fidelities = (sl.Fidelity("full"),)
    signals = ()
    reproducibility = "exact"

    def __init__(self, *, version: int = 1, direction: Any = "min", items: int = 0) -> None:
        self.version, self.items = version, items
        self.objectives = (Objective("rmse", direction),)

    def setup(self) -> None:
        """Nothing to load."""

    def evaluate(self, jobs: Jobs) -> Evaluations:
        x, y = jobs.population["x"], jobs.population["y"]
        value = (x - 0.3) ** 2 + (y - 0.6) ** 2
        shift = np.random.default_rng(jobs.replicate).normal(0, 1)
        wobble = np.random.default_rng([jobs.replicate, 1]).normal(0, 0.003)
        out = value + shift + wobble * x
        parts = None
        if self.items:
            noise = np.random.default_rng(5).normal(0, 0.1, self.items)
            parts = [v + noise - noise.mean() for v in out]
        return Evaluations(out, items=parts)

    def identity(self) -> dict[str, Any]:
        return {"class": "Noisy", "version": self.version}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that share one database: short, long, same, other, single, wide, up, bare."""
    target = tmp_path_factory.mktemp("compare")

    base = Database(target / "study.db")

    def search(name: str, evaluator: Any, budget: int, report: int | None = 6, **more: Any) -> None:
        space = more.get("space", SPACE)
        seeds = Seeds(space.population([{"x": 0.0, "y": 0.0}]), ("baseline:corner",))
        spec = AlgorithmSpec("evolution")
        stage = Stage("search", space, evaluator, spec, Budget(budget), seeds=seeds)
        final = None if report is None else Final(k=2, report=report)
        config = SearchConfig((stage,), name=name, seed=more.get("seed", 0), final=final)
        store = base.open_run(
            name,
            config=config.describe(),
            space=space.fingerprint,
            seed=config.seed,
            out=str(target / name),
        )
        run(config, store=store)

    search("short", Noisy(), 4)
    search("long", Noisy(), 90, seed=1)
    search("other", Noisy(version=2), 6)
    search("single", Noisy(items=50), 4, report=1, seed=5)
    search("single2", Noisy(items=50), 30, report=1, seed=6)
    search("up", Noisy(direction="max", version=3), 5)
    search("bare", Noisy(), 5, report=None)
    wide = sl.Space(x=sl.Real(0.0, 1.0), y=sl.Real(0.0, 2.0))
    search("wide", Noisy(version=4), 5, report=None, space=wide)
    return target


@pytest.fixture
def at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def outcome(folder: Path, name: str) -> Any:
    return read_outcome(find_run(name, str(folder / "study.db"), writes=False))


def test_winners_are_paired_on_the_replicates_of_the_report(folder: Path) -> None:
    first, second = outcome(folder, "short"), outcome(folder, "long")
    (pairing, *_) = compare(first, second).pairings
    a, b = (
        np.array(next(r["report_values"] for r in o.rows if r["kind"] == "searched"))
        for o in (first, second)
    )
    assert (pairing.what, pairing.n, pairing.unit) == ("winner", 6, "report replicates")
    assert pairing.gain == Interval.of(a - b, 0.05)
    # The noise of a replicate is a hundred times the difference, and cancels in the pairs.
    assert a.std() > 10 * abs(pairing.gain.mean)
    assert pairing.gain.mean > pairing.gain.half > 0
    assert pairing.verdict(0.05) == "better, distinguishable at 95 %"
    back = compare(second, first).pairings[0]
    assert back.gain.mean == -pairing.gain.mean
    assert back.verdict(0.05) == "worse, distinguishable at 95 %"
    same = compare(first, first)
    assert same.pairings[0].verdict(0.05) == "equal in every pair"


def test_a_single_replicate_is_paired_on_its_items(folder: Path) -> None:
    first, second = outcome(folder, "single"), outcome(folder, "single2")
    (pairing, *_) = compare(first, second).pairings
    assert (pairing.n, pairing.unit) == (50, "items")
    values = [next(r for r in o.rows if r["kind"] == "searched")["report"] for o in (first, second)]
    assert pairing.gain.mean == pytest.approx(values[0] - values[1], abs=2e-3)


def test_candidates_of_other_evaluators_are_paired(folder: Path) -> None:
    comparison = compare(outcome(folder, "short"), outcome(folder, "other"))
    (pairing,) = comparison.pairings
    # Both began with the baseline and the same random starts; the function is the same.
    assert (pairing.what, pairing.unit) == ("common candidates", "candidates")
    assert pairing.n == 5
    assert (pairing.gain.mean, pairing.gain.half) == (0.0, 0.0)
    assert "version: 1 and 2" in comparison.notes[0]
    assert "on common candidates" in comparison.sentence()


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ("short", "up", "objectives are rmse (min) and rmse (max)"),
        ("bare", "wide", "the spaces differ"),
    ],
)
def test_nothing_comparable_is_named(folder: Path, a: str, b: str, words: str) -> None:
    with pytest.raises(StudyError) as caught:
        compare(outcome(folder, a), outcome(folder, b))
    assert str(caught.value).startswith(f"nothing to compare between runs {a!r} and {b!r}: ")
    assert words in str(caught.value)


def test_compare_at_the_command_line(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "short", "long", *STUDY]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].split() == ["what", "pairs", "short", "long", "gain", "+-"]
    assert lines[1].startswith("winner  6 report replicates")
    assert lines[-1].startswith("rmse: long ")
    assert "better, distinguishable at 95 %" in lines[-1]
    assert main(["compare", "short", "long", "--json", "--alpha", "0.2", *STUDY]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["pairings"][0]["n"] == 6
    assert data["alpha"] == 0.2
    for arguments in (
        ["compare", "short", "nothing"],
        ["compare", "short", "up"],
        ["compare", "short", "long", "--alpha", "1"],
    ):
        assert main([*arguments, *STUDY]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# -- check --------------------------------------------------------------------------------------


def test_figures_are_those_of_the_result(folder: Path) -> None:
    long = outcome(folder, "long")
    found = figures(long)
    winner = next(row for row in long.rows if row["kind"] == "searched")
    base = next(row for row in long.rows if row["kind"] == "baseline")
    assert found["best"] == found["report"] == winner["report"]
    assert found["best[0]"] == found["best"]
    assert found["baseline"] == base["report"]
    assert found["evaluations"] == 90
    assert found["failed"] == 0
    assert found["finished"] == 1
    assert found["gain_low"] < found["gain"] < found["gain_high"]
    bare = figures(outcome(folder, "bare"))
    assert math.isnan(bare["report"])
    assert bare["best"] == min(row["search"] for row in outcome(folder, "bare").rows)


def test_check_ends_with_1_and_names_what_falls_short(
    at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ["--expect", "gain_low > 0", "--expect", "failed==0", "--expect", "evaluations>=90"]
    assert main(["check", "long", *good, *STUDY]) == 0
    out, err = capsys.readouterr()
    assert out.count("ok ") == 3
    assert err == ""
    bad = ["--expect", "failed>0", "--expect", "ratio*0 - 1 > -(2)/4", "--expect", "finished==1"]
    assert main(["check", "long", *bad, *STUDY]) == 1
    out, err = capsys.readouterr()
    assert out.count("falls short") == 2
    assert err.startswith("searchlab: 2 of 3 fall short: failed>0: 0 against 0; ")
    assert main(["check", "bare", "--expect", "report<100", *STUDY]) == 1
    assert "the run has no report" in capsys.readouterr().err
    assert main(["check", "long", *STUDY]) == 0
    assert "gain_low" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bst<0.05", "unknown figure 'bst'; known: baseline, baseline[0]"),
        ("best", "there is no comparison"),
        ("best<", "a number or a name is missing"),
        ("best<1<2", "'<' comes after its end"),
        ("best=1", "cannot be read"),
        ("(best<1", "a bracket is not closed"),
        ("__import__('os')<1", "cannot be read"),
        ("best.real<1", "cannot be read"),
        ("(" * 200 + "1<2", "deeper than 50"),
        ("1+" * 600 + "1<2", "allowed: 1000"),
        ("", "a number or a name is missing"),
    ],
)
def test_expectations_that_cannot_be_read(
    at: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    assert main(["check", "short", "--expect", text, *STUDY]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


KNOWN = {"best": 0.25, "gain": -3.0}
Sum = tuple[str, float]  # a text and what it comes to, NaN after a division by zero


def joined(left: Sum, sign: str, right: Sum) -> Sum:
    if sign == "/":
        value = left[1] / right[1] if right[1] else math.nan
    else:
        value = {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](left[1], right[1])
    return f"({left[0]} {sign} {right[0]})", value


NUMBERS = st.floats(0, 100).map(lambda x: round(x, 2)).map(lambda x: (repr(x), x))
SUMS = st.recursive(
    NUMBERS | st.sampled_from(sorted(KNOWN.items())),
    lambda part: st.one_of(
        st.tuples(part, st.sampled_from("+-*/"), part).map(lambda three: joined(*three)),
        part.map(lambda one: (f"-({one[0]})", -one[1])),
    ),
    max_leaves=8,
)
SIGNS = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(SUMS, st.sampled_from(sorted(SIGNS)), SUMS)
def test_expectations_mean_what_they_say(left: Sum, sign: str, right: Sum) -> None:
    found = expect(f"{left[0]}{sign} {right[0]}", KNOWN)
    if math.isnan(left[1]) or math.isnan(right[1]):
        assert not found.holds
    else:
        assert found.holds is getattr(operator, SIGNS[sign])(left[1], right[1])


def test_products_come_before_sums_from_left_to_right() -> None:
    assert expect("2 + 3 * 4 - 8 / 4 / 2 == 13", {}).holds
    assert expect("-best * 4 + 1 == 0", KNOWN).holds
    assert expect("1e3 + .5 - 2. == 998.5", {}).holds


@settings(max_examples=1000, deadline=None, database=None, derandomize=True)
@given(st.text(st.sampled_from("best[]0123.eE+-*/()<>=! _\n\0é"), max_size=20))
def test_any_text_is_an_expectation_or_a_named_error(text: str) -> None:
    try:
        verdict = expect(text, {"best": 1.0, "best[2]": math.nan})
    except ConfigError:
        return
    assert isinstance(verdict.holds, bool)
