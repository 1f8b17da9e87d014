"""Tables as evaluators: what is read, what is refused, and NAS-Bench-201 where its data is."""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchlab.errors import ConfigError, DataError, SearchlabError
from searchlab.evaluator import Evaluator, Signal, identity_digest
from searchlab.evaluators.nasbench201 import nasbench201
from searchlab.evaluators.table import TableEvaluator
from searchlab.population import FAILED, OK
from searchlab.space import Space
from searchlab.testing.evaluator import EvaluatorSuite, jobs_of
from searchlab.uniforms import uniforms
from searchlab.variables import Choice, Integer

HEADER = "code,depth,mode,quick,loss,bytes,flops,group\n"


def text_of(rows: list[tuple[Any, ...]]) -> str:
    return HEADER + "".join(",".join(map(str, row)) + "\n" for row in rows)


def full_rows() -> list[tuple[Any, ...]]:
    """Every candidate: two digits of three signs, a depth of 1 to 4, a mode."""
    out = []
    for a, b, depth, mode in itertools.product("012", "012", range(1, 5), ("eager", "lazy")):
        loss = int(a) + 2 * int(b) + abs(depth - 3) + (mode == "lazy") / 4
        out.append((a + b, depth, mode, loss + 0.5, loss, 10 * depth, 7 * depth, len(out) // 2))
    return out


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    path.write_text(text_of(full_rows()))
    return path


VARIABLES: Any = {"code": "digits", "depth": "auto", "mode": "auto"}


def evaluator_of(path: Path, **more: Any) -> TableEvaluator:
    return TableEvaluator(path, VARIABLES, **{"objectives": {"loss": "min"}, **more})


LEVELS: Any = {"quick": (("quick", "bytes"), 0.1), "full": (("loss", "bytes"), 1.0)}


class TestTable(EvaluatorSuite):
    @pytest.fixture
    def evaluator(self, table: Path) -> Evaluator:
        return evaluator_of(
            table,
            objectives={"loss": "min", "size": "min"},
            fidelities=LEVELS,
            signals={"flops": "min"},
        )

    @pytest.fixture
    def space(self, evaluator: Any) -> Space:
        space: Space = evaluator.space
        return space


class TestRestrictedTable(EvaluatorSuite):
    @pytest.fixture
    def evaluator(self, tmp_path: Path) -> Evaluator:
        path = tmp_path / "part.csv"
        path.write_text(text_of(full_rows()[::3]))
        return evaluator_of(path)

    @pytest.fixture
    def space(self, evaluator: Any) -> Space:
        space: Space = evaluator.space
        return space


def every(evaluator: TableEvaluator, **more: Any) -> Any:
    space = evaluator.space
    return evaluator.evaluate(jobs_of(space, space.enumerate(), **more))


def test_the_space_is_that_of_the_columns(table: Path) -> None:
    variables = evaluator_of(table).space.variables
    assert isinstance(code := variables["code"], Choice)
    assert (code.labels, code.shape) == (("0", "1", "2"), (2,))
    assert isinstance(depth := variables["depth"], Integer)
    assert (depth.low, depth.high) == (1, 4)
    assert isinstance(mode := variables["mode"], Choice)
    assert mode.labels == ("eager", "lazy")
    assert evaluator_of(table).space.count() == 72


def test_every_row_has_its_values(table: Path) -> None:
    evaluator = evaluator_of(
        table,
        objectives={"loss": "min", "size": "max"},
        fidelities=LEVELS,
        signals={"flops": "min"},
    )
    rows = {(r[0], r[1], r[2]): r for r in full_rows()}
    for level, shift in ((0, 0.5), (1, 0.0)):
        found = every(evaluator, fidelity=level)
        for row, plan in enumerate(evaluator.space.decode(evaluator.space.enumerate())):
            wanted = rows["".join(plan["code"]), plan["depth"], plan["mode"]]
            assert found.values[row].tolist() == [wanted[4] + shift, wanted[5]]
            assert found.signals[row].tolist() == [wanted[6]]
    assert evaluator.signals == (Signal("flops", "min", when="static"),)


def test_whole_numbers_with_gaps_are_choices_and_integers_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("steps,loss\n10,1\n20,2\n50,3\n")
    auto = TableEvaluator(path, ["steps"], objectives={"loss": "min"}).space.variables["steps"]
    assert isinstance(auto, Choice)
    assert auto.labels == (10, 20, 50)
    evaluator = TableEvaluator(path, {"steps": "integer"}, objectives={"loss": "min"})
    whole = evaluator.space.variables["steps"]
    assert isinstance(whole, Integer)
    assert (whole.low, whole.high, whole.step) == (10, 50, 10)
    assert len(evaluator.space.enumerate()) == 3


@pytest.mark.parametrize("suffix", ["csv.gz", "parquet"])
def test_other_forms_of_a_file_give_the_same_space(table: Path, suffix: str) -> None:
    import pandas as pd

    path = table.with_name(f"t.{suffix}")
    if suffix == "parquet":
        pd.read_csv(table, dtype={"code": str}).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(table.read_bytes()))
    one, other = evaluator_of(table), evaluator_of(path)
    assert one.space.fingerprint == other.space.fingerprint
    assert (every(one).values == every(other).values).all()
    assert identity_digest(one) != identity_digest(other)


def test_rows_that_are_missing_are_not_in_the_space_or_fail(tmp_path: Path) -> None:
    path = tmp_path / "part.csv"
    path.write_text(text_of(full_rows()[1:]))
    restricted = evaluator_of(path)
    assert len(restricted.space.enumerate()) == 71
    sampled = restricted.space.sample(uniforms(1, 0, 0, 200, restricted.space.sample_width))
    assert (restricted.evaluate(jobs_of(restricted.space, sampled)).state == OK).all()
    failing = evaluator_of(path, missing="fail")
    found = every(failing)
    assert (found.state == FAILED).sum() == 1
    assert set(found.reason) == {"", "not in the table"}


def test_empty_cells_fail_where_they_are_needed(tmp_path: Path) -> None:
    rows = [list(row) for row in full_rows()]
    rows[5][3], rows[6][4], rows[7][6] = "", "", "-inf"
    path = tmp_path / "holes.csv"
    path.write_text(text_of([tuple(row) for row in rows]))
    evaluator = evaluator_of(
        path,
        fidelities={"quick": ("quick", 0.1), "full": ("loss", 1.0)},
        signals={"flops": "min"},
    )
    for level, reason in ((0, "no value of 'quick' in row 5"), (1, "no value of 'loss' in row 6")):
        found = every(evaluator, fidelity=level)
        assert (found.state == FAILED).sum() == 1
        assert set(found.reason) == {"", reason}
        assert np.isnan(found.signals).sum() == 1


def test_rows_of_one_candidate(tmp_path: Path) -> None:
    path = tmp_path / "twice.csv"
    path.write_text("a,loss,se\n1,2,0.5\n2,5,0.25\n1,4,0.5\n")
    made: Any = {"variables": ["a"], "objectives": {"loss": "min"}}
    with pytest.raises(DataError, match=r"rows 0 and 2 of table .* are one candidate; allowed"):
        TableEvaluator(path, **made)
    found = every(TableEvaluator(path, **made, duplicates="mean"))
    assert found.values[:, 0].tolist() == [3.0, 5.0]
    assert found.std_error[0, 0] == pytest.approx(np.sqrt(2) / np.sqrt(2))
    assert np.isnan(found.std_error[1, 0])
    path.write_text("a,loss,se\n1,2,0.5\n2,5,0.25\n")
    found = every(TableEvaluator(path, **made, std_error={"loss": "se"}))
    assert found.std_error[:, 0].tolist() == [0.5, 0.25]


def test_rows_of_one_class_are_one_candidate(table: Path) -> None:
    evaluator = evaluator_of(table, classes="group")
    space = evaluator.space
    sampled = space.sample(uniforms(2, 0, 0, 500, space.sample_width))
    assert len(set(space.keys(sampled))) == 36
    assert space.canonicalise(sampled).equals(sampled)
    found = evaluator.evaluate(jobs_of(space, sampled)).values[:, 0]
    assert (found % 1 == 0).all()  # the first of each class is the eager one
    assert space.fingerprint != evaluator_of(table).space.fingerprint


def test_the_identity_is_that_of_the_file_and_the_columns(table: Path) -> None:
    one = evaluator_of(table)
    moved = table.with_name("moved.csv")
    moved.write_bytes(table.read_bytes())
    assert identity_digest(evaluator_of(moved)) == identity_digest(one)
    assert identity_digest(evaluator_of(table, objectives={"bytes": "min"})) != identity_digest(one)
    moved.write_text(text_of(full_rows()[::-1]))
    assert identity_digest(evaluator_of(moved)) != identity_digest(one)
    again = pickle.loads(pickle.dumps(evaluator_of(table)))
    assert (every(again).values == every(one).values).all()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"objectives": {}}, "without variables or objectives"),
        ({"objectives": {"loss": "up"}}, "direction 'up'"),
        ({"objectives": {"nothing": "min"}}, "has no column 'nothing'; it has: code, depth"),
        ({"objectives": {"mode": "min"}}, "column 'mode' holds more than numbers"),
        ({"missing": "ignore"}, "missing 'ignore'"),
        ({"duplicates": "first"}, "duplicates 'first'"),
        ({"signals": {"flops": "up"}}, "direction 'up' of signal 'flops'"),
        ({"std_error": {"time": "loss"}}, "std_error of 'time'; allowed: loss"),
        ({"fidelities": {"a": (("loss", "bytes"), 1.0)}}, "columns loss, bytes for 1 objectives"),
        ({"fidelities": {"a": ("loss", 0.0)}}, "cost 0.0 of fidelity 'a'"),
        ({"fidelities": {"a": ("loss", 1.0), "b": ("quick", 0.1)}}, "cheapest first"),
        ({"fidelities": {}}, "cheapest first"),
    ],
)
def test_bad_settings_are_named(table: Path, more: Any, text: str) -> None:
    with pytest.raises(SearchlabError, match=text):
        evaluator_of(table, **more)


@pytest.mark.parametrize(
    ("content", "variables", "text"),
    [
        ("", ["a"], "cannot be read"),
        ("a,loss\n", ["a"], "has no rows"),
        ("a,loss\n,1\n2,2\n", ["a"], "column 'a' is empty in row 0"),
        ("a,loss\n12,1\n7,2\n", {"a": "digits"}, "holds '7' in row 1; allowed: 2 signs"),
        ("a,loss\n1.5,1\n2,2\n", {"a": "integer"}, "allowed for integers: whole numbers"),
        ("a,loss\n1,1\n2,2\n", {"a": "real"}, "kind 'real' of column 'a'; allowed: auto, choice"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, content: str, variables: Any, text: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(SearchlabError, match=text):
        TableEvaluator(path, variables, objectives={"loss": "min"})


def test_files_that_are_none_or_too_sparse(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        TableEvaluator(tmp_path / "no.csv", ["a"], objectives={"loss": "min"})
    path = tmp_path / "t.txt"
    path.write_text("a,loss\n1,2\n")
    with pytest.raises(ConfigError, match=r"allowed: \.csv, \.csv\.gz, \.parquet"):
        TableEvaluator(path, ["a"], objectives={"loss": "min"})
    path = tmp_path / "t.csv"
    path.write_text("a,b,loss\n" + "".join(f"{i * 7},{i * 3},{i}\n" for i in range(300)))
    with pytest.raises(ConfigError, match="300 rows for 90000 candidates"):
        TableEvaluator(path, ["a", "b"], objectives={"loss": "min"})


# -- NAS-Bench-201 ------------------------------------------------------------------------------

DATA = Path(os.environ.get("SEARCHLAB_DATA", "/nowhere")) / "nasbench201"
needs_data = pytest.mark.skipif(
    not (DATA / "nasbench201.csv.gz").is_file(), reason="no nasbench201 in $SEARCHLAB_DATA"
)


def test_the_folder_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEARCHLAB_DATA", raising=False)
    with pytest.raises(ConfigError, match="SEARCHLAB_DATA"):
        nasbench201()
    with pytest.raises(ConfigError, match="allowed: one with nasbench201"):
        nasbench201(tmp_path)
    with pytest.raises(ConfigError, match="dataset 'imagenet'"):
        nasbench201(tmp_path, dataset="imagenet")  # type: ignore[arg-type]


def write_twin(folder: Path) -> None:
    """A table of the benchmark's shape whose values are made up, for machines without it."""
    import pandas as pd

    codes = np.array(list(itertools.product(range(5), repeat=6)))
    quality = (codes == 3).sum(axis=1) * 2.0 + (codes == 1).sum(axis=1) - (codes == 0).sum(axis=1)
    noise = uniforms(3, 0, 0, len(codes), 1)[:, 0]
    frame = pd.DataFrame({"genotype": ["".join(map(str, row)) for row in codes]})
    frame["iso_class"] = np.arange(len(codes)) // 2
    for dataset in ("cifar10", "cifar100"):
        frame[f"{dataset}_acc200"] = 80 + quality
        frame[f"{dataset}_val12"] = 60 + quality + 4 * noise
    for name in ("flops_m", "params_m"):
        frame[name] = (codes > 1).sum(axis=1)
    for name in ("naswot", "jacob_cov", "grad_norm", "snip", "plain", "log10_synflow"):
        frame[f"zc_{name}"] = quality
    frame.to_csv(folder / "nasbench201.csv.gz", index=False)


def test_the_twin_has_the_benchmarks_shape(tmp_path: Path) -> None:
    write_twin(tmp_path)
    for dataset, cost in (("cifar10", 0.03), ("cifar100", 0.06)):
        evaluator = nasbench201(tmp_path, dataset=dataset)  # type: ignore[arg-type]
        assert [f.cost for f in evaluator.fidelities] == [cost, 1.0]
        assert evaluator.space.count() == 15625
    assert len(evaluator.signals) == 8


@needs_data
def test_figures_of_the_benchmark() -> None:
    evaluator = nasbench201(DATA)
    values = evaluator.values()
    assert len(evaluator) == 15625
    assert np.sort(values[:, 0])[::-1][15] == 94.18
    space = nasbench201(DATA, canonical=True).space
    assert len(set(space.keys(space.canonicalise(space.enumerate())))) == 6466
