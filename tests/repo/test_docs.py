"""Every Python block of these pages runs, in order, in an empty folder."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from searchlab.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


# Tests of their own run these pages, with the files and runs that their blocks speak of.
ELSEWHERE = {"external.md"}
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.rglob("*.md")
    if BLOCK.search(path.read_text("utf-8")) and path.name not in ELSEWHERE
)


def run_page(name: str) -> dict[str, Any]:
    """The names that a page's blocks leave behind."""
    names: dict[str, Any] = {"__name__": f"docs_{Path(name).stem}"}
    text = (DOCS / name).read_text("utf-8")
    for found in BLOCK.finditer(text):
        line = text[: found.start(1)].count("\n")
        code = compile("\n" * line + found.group(1), str(DOCS / name), "exec")
        exec(code, names)
    return names


SLOW = {"solver_schedules.md"}  # searches with a network


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in PAGES]
)
def test_every_python_block_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "study.md":  # reads the run that the README's commands make
        small = "--problem mixture --nfe 5 --budget 8 --samples 64 --held-out 64 --report-banks 2"
        assert main(["run", "s3", *small.split(), "--quiet", "--name", "second"]) == 0
    names = run_page(name)
    if name == "callbacks.md":
        check_callbacks(names, tmp_path)


def test_the_pages_of_each_way_of_use_are_among_them() -> None:
    assert {"python.md", "callbacks.md"} <= set(PAGES)


def check_callbacks(names: dict[str, Any], folder: Path) -> None:
    """The logs hold what the runs reported."""
    names["log"].file.close()
    with open(folder / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["finished"]) for row in rows] == list(range(1, 41))
    assert int(rows[-1]["paid"]) == 40
    best = [float(row["best"]) for row in rows]
    assert best == sorted(best, reverse=True)
    logged: list[tuple[dict[str, float], int]] = []
    told: list[dict[str, float]] = []
    mlflow = object.__new__(names["MLflowLog"])
    mlflow.log = lambda figures, step: logged.append((figures, step))

    class Run:
        def log(self, figures: dict[str, float]) -> None:
            told.append(figures)

    names["sl"].search(
        names["space"], lambda x: sum(x), budget=5, callbacks=[mlflow, names["WandbLog"](Run())]
    )
    assert [step for _, step in logged] == [1, 2, 3, 4, 5]
    assert [figures for figures, _ in logged] == told
    assert told[-1]["search/paid"] == 5
