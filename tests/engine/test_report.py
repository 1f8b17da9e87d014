"""The report of a run: complete, self-contained, harmless whatever the data say."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchlab.algorithms.base import Seeds
from searchlab.budget import LinearBudget
from searchlab.config import AlgorithmSpec, Budget, Final, SearchConfig, Stage
from searchlab.errors import ConfigError
from searchlab.evaluator import evaluator
from searchlab.final import paired
from searchlab.population import FAILED, OK, Evaluations
from searchlab.report import Section, figure_curve, figure_front, write_report
from searchlab.result import Result
from searchlab.search import run, search
from searchlab.space import Space
from searchlab.variables import Integer, Real

HOSTILE = "<script>alert('name')</script>"
HOSTILE_REASON = "<img src=x onerror=alert(1)> & more"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Reads a page, checks that its tags close, and keeps what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def images(self) -> list[bytes]:
        """The bytes of all embedded images."""
        sources = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        assert all(source.startswith("data:image/") for source in sources)
        return [base64.b64decode(source.split(",", 1)[1], validate=True) for source in sources]


def check_contained(path: Path) -> Page:
    """Asserts that a page needs nothing from outside and runs nothing; returns it."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "link"}
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "srcset", "action"):
            assert re.match(r"data:|#|$", attrs.get(name) or "")
    assert not re.search(r"url\(\s*['\"]?https?:|@import", text)
    for image in page.images():
        assert not re.search(rb"<script|(href|src)\s*=\s*['\"]https?:|@import", image)
    return page


@evaluator(objectives={"error": "min"}, reproducibility="exact")
def error_of(plans: Sequence[dict[str, Any]], fidelity: str, seed: int) -> Evaluations:
    """Falls with the steps and towards x = 0.3; noise depends on the replicate alone."""
    noise = 0.02 * np.random.default_rng(seed).normal()
    values = [(1 / plan["steps"] + (plan["x"] - 0.3) ** 2) * np.exp(noise) for plan in plans]
    state = np.array([FAILED if plan["x"] > 0.9 else OK for plan in plans], dtype=np.int8)
    reason = [HOSTILE_REASON if bad else "" for bad in state]
    column = np.where(state == OK, values, np.nan)[:, None]
    return Evaluations(values=column, state=state, reason=reason)


def a_space() -> Space:
    return Space(
        steps=Integer(1, 3),
        x=Real(0.0, 1.0),
        constraints=[LinearBudget({"steps": 1.0}, upper=3, name="steps")],
    )


def a_config(*, final: Final | None = None, baselines: bool = True) -> SearchConfig:
    space = a_space()
    seeds = None
    if baselines:
        known = [{"steps": n, "x": x} for n in (1, 2, 3) for x in (0.8, 0.31)]
        origin = [
            f"{kind}:{HOSTILE}{n}" for n in (1, 2, 3) for kind in ("baseline", "baseline-tuned")
        ]
        seeds = Seeds(space.population(known), tuple(origin))
    stage = Stage(
        "search", space, error_of.build(space), AlgorithmSpec("random"), Budget(60), seeds=seeds
    )
    return SearchConfig(
        (stage,),
        name="tiny <b>run</b>",
        seed=3,
        group_by="steps",
        groups=(1, 2, 3),
        final=final,
        options={"note": "<script>option</script>", "list": [1, 2]},
    )


@pytest.fixture(scope="module")
def result() -> Result:
    return run(a_config(final=Final(k=3, report=4)))


def test_a_report_is_self_contained_and_has_every_row(result: Result, tmp_path: Path) -> None:
    path = write_report(result, tmp_path / "deep" / "report.html")
    page = check_contained(path)
    assert [child.name for child in path.parent.iterdir()] == ["report.html"]
    rows = result.rows()
    assert len(rows) == 9
    values = page.rows[1 : 1 + len(rows)]
    for row, cells in zip(rows, values, strict=True):
        assert cells[0] == str(row["group"])
        assert cells[1] == f"{row['kind']} {row['name']}"
        assert cells[2:4] == [f"{row['search']:.4g}", f"{row['selection']:.4g}"]
        assert cells[4] == f"{row['report']:.4g} ± {row['report_half']:.2g}"
        assert cells[5] == f"{row['ratio_to_baseline']:.3f}"


def test_the_verdict_comes_before_everything_else(result: Result, tmp_path: Path) -> None:
    page = check_contained(write_report(result, tmp_path / "report.html"))
    body = page.text[page.text.index("tiny <b>run</b>", page.text.index("}\n")) :]
    assert result.verdict() in body
    assert body.index(result.verdict()) < body.index("Values")


def test_every_reported_baseline_is_compared_in_pairs(result: Result, tmp_path: Path) -> None:
    page = check_contained(write_report(result, tmp_path / "report.html"))
    shown = {(row[0], row[1]): row for row in page.rows if len(row) == 7 and row[0].isdigit()}
    shown = {key: row for key, row in shown.items() if key[1] in ("baseline", "baseline-tuned")}
    assert len(shown) == 6
    words = set()
    for group in result.groups:
        assert group.winner is not None
        for base in group.baselines:
            gain = paired(group.winner, base, result.alpha, result.sign)
            row = shown[(str(group.group), base.kind)]
            assert row[3] == f"{gain['gain'].mean:.4g} ± {gain['gain'].half:.2g}"
            assert row[4] == f"{gain['ratio']:.3f}"
            better = "better" if gain["gain"].mean > 0 else "worse"
            assert row[6] == (better if gain["distinguishable"] else "not distinguishable")
            words.add(row[6])
    assert "better" in words


def test_what_comes_from_data_is_escaped(result: Result, tmp_path: Path) -> None:
    sections = [
        Section(
            "Title </h2><script>1</script>",
            text="one <i>\n\ntwo",
            table=[{"<u>column": HOSTILE}, {"<u>column": None, "other": 0.123456}],
            pre="</pre><script>2</script>",
            caption="c",
        )
    ]
    path = write_report(result, tmp_path / "report.html", sections=sections)
    page = check_contained(path)
    for text in (HOSTILE, HOSTILE_REASON, "<script>option", "</pre><script>2", "<u>column"):
        assert text in page.text
    assert "<script" not in path.read_text()
    assert "numpy" in page.text  # the environment
    assert ["<u>column", "other"] in page.rows
    assert ["–", "0.1235"] in page.rows


def test_failures_are_counted_by_reason(result: Result, tmp_path: Path) -> None:
    assert result.records is not None
    count = int((result.records.state == FAILED).sum())
    assert count > 0
    page = check_contained(write_report(result, tmp_path / "report.html"))
    assert [row for row in page.rows if row[:3] == [str(count), "failed", HOSTILE_REASON]]


def test_an_indistinguishable_gain_is_called_so(result: Result, tmp_path: Path) -> None:
    """A winner against a baseline that is itself: every difference is 0."""
    winner = result.groups[0].winner
    assert winner is not None
    group = replace(result.groups[0], baselines=[replace(winner, origin="baseline:itself")])
    path = write_report(replace(result, groups=[group]), tmp_path / "report.html")
    assert check_contained(path).rows[1][-1] == "not distinguishable"


def test_an_interrupted_run_without_final_is_reported(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    stopped = run(a_config(final=Final(k=3, report=4)), callbacks=[stop])
    assert stopped.meta["status"] == "interrupted"
    page = check_contained(write_report(stopped, tmp_path / "report.html"))
    assert "This run has not finished (interrupted)" in page.text
    assert "no report values" in page.text
    assert "Paired comparison" not in page.text


def test_no_baselines_and_no_final(tmp_path: Path) -> None:
    plain = run(a_config(baselines=False))
    page = check_contained(write_report(plain, tmp_path / "report.html"))
    assert "no baseline to compare with" in page.text
    assert "Paired comparison" not in page.text
    assert len(page.images()) == 2


def test_a_single_group_has_a_curve_and_no_front(tmp_path: Path) -> None:
    space = Space(x=Real(0.0, 1.0))
    single = search(space, lambda x: (x - 0.3) ** 2, budget=20, baselines={"half": {"x": 0.5}})
    assert figure_front(single) is None
    page = check_contained(write_report(single, tmp_path / "report.html"))
    assert page.rows[0][0] == "what"
    assert "Front" not in page.text
    assert len(page.images()) == 1


def test_a_run_without_any_value(tmp_path: Path) -> None:
    empty = Result("empty", a_space(), error_of.build(a_space()).objectives[0], [])
    assert figure_curve(empty) is None
    page = check_contained(write_report(empty, tmp_path / "report.html"))
    assert "No candidate was evaluated successfully." in page.text


def test_figures_are_equal_each_time_and_follow_the_theme(result: Result) -> None:
    for draw in (figure_curve, figure_front):
        svg = draw(result)
        assert svg is not None
        assert svg == draw(result)
        assert svg.startswith(b"<svg")
        assert b"prefers-color-scheme" in svg
        assert b"currentColor" in svg


def test_figures_embed_as_they_are(result: Result, tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n" + bytes(20)
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'></svg>"
    sections = [Section("a", figure=png), Section("b", figure=svg)]
    page = check_contained(write_report(result, tmp_path / "report.html", sections=sections))
    assert page.images()[-2:] == [png, svg]


@pytest.mark.parametrize("figure", [b"", b"GIF89a", b"<html></html>", b"<?xml version='1.0'?>"])
def test_other_figures_are_refused(figure: bytes) -> None:
    with pytest.raises(ConfigError, match="PNG or SVG"):
        Section("a", figure=figure)


def test_a_section_needs_a_title() -> None:
    with pytest.raises(ConfigError, match="title"):
        Section("")


def test_a_failed_write_leaves_the_older_report(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("older")

    def refuse(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_report(result, path)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]
