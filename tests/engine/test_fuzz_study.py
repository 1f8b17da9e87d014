"""Hostile files: whatever stands in them, only searchlab's own errors come out."""

from __future__ import annotations

import sqlite3
import string
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import searchlab as sl
from searchlab.compare import compare
from searchlab.errors import ConfigError, SearchlabError
from searchlab.experiments.solver_schedule import RECIPE
from searchlab.outcome import figures, read_outcome
from searchlab.recipes import options_from, read_config_file
from searchlab.runs import find_run
from searchlab.study import Database, Run

QUICK: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def only_own_errors(*calls: Callable[[], object]) -> int:
    """Makes all calls; returns how many were refused by name."""
    refused = 0
    for call in calls:
        try:
            call()
        except SearchlabError as error:
            refused += 1
            if "\n" in str(error).strip():
                raise
    return refused


# -- the configuration file ---------------------------------------------------------------------

NAMES = st.sampled_from(["nfe", "budget", "seed", "problem", "samples", "held-out", "objective"])
ODD: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["5..10", "1e3", "yes", "mixture", "rmse", "-1", "0x10", "٣", "1_0"]),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=2)
    ),
    max_leaves=4,
)
YAML = st.text(st.sampled_from(string.printable + "é\0\x85\ufeff"), max_size=60)


@settings(max_examples=1000, **QUICK)
@given(YAML | st.binary(max_size=60))
def test_any_configuration_file_is_read_or_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "options.yaml"
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    path.write_bytes(raw)
    only_own_errors(lambda: options_from(RECIPE, read_config_file(path)))


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 1200,
        "&a [*a]",
        "a: &a [*a, *a]\nnfe: *a",
        "!!python/object/apply:os.system [echo]",
        "nfe: 2024-13-45",
        "? [1, 2]\n: 3",
        "{nfe: 5, nfe: 6, [1]: 2}",
        "a: 0b_",
        "seed: 1:99:99",
        "nfe: !!binary x",
        "nfe: !!timestamp x",
        "nfe: !!int x",
        "nfe: !!float x",
        "nfe: !!set {1}",
        "<<: 1",
        "<<: [1]",
        "nfe: " + "9" * 5000,
    ],
)
def test_odd_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    assert only_own_errors(lambda: options_from(RECIPE, read_config_file(path))) == 1


@settings(max_examples=1000, **QUICK)
@given(st.dictionaries(NAMES.map(lambda name: name.replace("-", "_")), ODD, max_size=3))
def test_any_option_value_is_taken_or_refused(values: dict[str, Any]) -> None:
    try:
        options = options_from(RECIPE, values)
    except ConfigError:
        return
    assert options_from(RECIPE, asdict(options)) == options


# -- the study's reader -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with the run "a": baselines, failures, a final, and the same again as "b"."""
    folder = tmp_path_factory.mktemp("source")
    space = sl.Space(x=sl.Real(0, 1), y=sl.Choice(["a", "b", "c"], shape=(2,)))
    evaluator = sl.FunctionEvaluator(
        lambda x, y: x + y.count("a") if x < 0.8 else None, space, version=1
    )
    from searchlab.algorithms import Seeds
    from searchlab.config import AlgorithmSpec, Budget, Final, SearchConfig, Stage
    from searchlab.search import run

    seeds = Seeds(space.population([{"x": 0.5, "y": ["b", "b"]}]), ("baseline:b",))
    stage = Stage("search", space, evaluator, AlgorithmSpec("random"), Budget(15), seeds=seeds)
    with Database(folder / "study.db") as base:
        for seed, name in enumerate("ab"):
            config = SearchConfig((stage,), name=name, seed=seed, final=Final(k=2, report=2))
            store = base.open_run(
                name, config=config.describe(), space=space.fingerprint, seed=seed, out=name
            )
            run(config, store=store)
    return folder / "study.db"


@contextmanager
def changed_copy(content: bytes) -> Iterator[Path]:
    """A file of this content in a folder of its own; in memory where there is such a place."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        path = Path(folder) / "study.db"
        path.write_bytes(content)
        yield path


def read_everything(path: Path) -> int:
    """Every way to read a study; returns how many calls were refused."""
    with Database(path) as base:
        refused = only_own_errors(base.runs, lambda: find_run("b", str(path)))
        for name in ("a", "b"):
            try:
                store = base.read(name)
            except SearchlabError:
                refused += 1
                continue
            refused += read_run(store, path.parent / "out.csv")
            store.close("")
    return refused + only_own_errors(lambda: compare_both(path))


def read_run(store: Run, out: Path) -> int:
    wrong = sl.Space(x=sl.Real(0, 1))

    def answers() -> None:
        keys = [key for key in store.records().keys if key]
        for digest in store.evaluators().values():
            store.lookup(keys, evaluator=digest, fidelity=0, replicate=0, other_runs=True)

    return only_own_errors(
        lambda: store.records(items=True).trace(),
        lambda: store.records().evaluations(),
        store.to_pandas,
        lambda: store.export_csv(out, wrong, (sl.Objective("v"),)),
        lambda: [store.get_meta(key) for key in ("pace", "layout", "result", "status")],
        store.environments,
        store.identities,
        answers,
    )


def compare_both(path: Path) -> None:
    first, second = (read_outcome(find_run(name, str(path))) for name in ("a", "b"))
    figures(first)
    compare(first, second)


def test_a_sound_study_is_read_without_refusal_except_for_the_wrong_space(source: Path) -> None:
    assert read_everything(source) == 2  # the CSV of both runs was asked for with another space


CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, **QUICK)
@given(CHANGES, st.booleans())
def test_random_bytes_in_pages_give_named_errors(
    source: Path, changes: list[tuple[float, bytes]], salvage: bool
) -> None:
    content = bytearray(source.read_bytes())
    for place, raw in changes:
        start = int(place * len(content))
        content[start : start + len(raw)] = raw[: len(content) - start]
    with changed_copy(bytes(content)) as target:
        read_everything(target)
        if salvage:
            only_own_errors(lambda: Database.salvage(target))


CELLS = (
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=20)
    | st.sampled_from(["{}", "[]", "[1]", '"x"', "null", "1e999", "[" * 2000, "{", '{"rows": 1}'])
    | st.sampled_from([b"\xff" * 8, b"\xff" * 10, b"\0" * 16, "\ud7ff", 2**40, 5, 255, 10**9])
)
COLUMNS = {
    "runs": ["name", "config", "space", "seed", "out", "created", "updated", "records", "owner",
             "lease_until"],
    "run_meta": ["key", "value"],
    "evaluators": ["digest", "identity"],
    "run_evaluators": ["evaluator", "environment"],
    "records": ["id", "stage", "key", "genotype", "fidelity", "replicate", "evaluator", "state",
                "reason", "value", "values_blob", "std_error", "constraints", "signals", "cost_s",
                "told_at_ask", "origin", "parent_a", "attempts", "worker", "started", "cached"],
    "meta": ["value"],
}  # fmt: skip
PLACES = st.sampled_from([(table, column) for table, own in COLUMNS.items() for column in own])


@settings(max_examples=60, **QUICK)
@given(st.lists(st.tuples(PLACES, CELLS, st.integers(0, 3)), min_size=1, max_size=3))
def test_hostile_rows_give_named_errors(
    source: Path, changes: list[tuple[tuple[str, str], Any, int]]
) -> None:
    with changed_copy(source.read_bytes()) as target:
        with closing(sqlite3.connect(target, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=delete")
            for (table, column), cell, skip in changes:
                connection.execute(
                    f"UPDATE OR IGNORE {table} SET {column} = ? WHERE rowid IN "
                    f"(SELECT rowid FROM {table} LIMIT 2 OFFSET ?)",
                    (cell, skip),
                )
        read_everything(target)
