"""The joined benchmark of algorithms: its own loop, its parts, and lines that stay in its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import searchlab as sl
from searchlab.algorithms import Evolution
from searchlab.errors import ConfigError
from searchlab.experiments.benchmarks import _algorithms_choices as choices
from searchlab.experiments.benchmarks import algorithms
from searchlab.experiments.benchmarks._common import Journal, data_folder, flags, lacking

HIDDEN = np.array([2, 0, 1, 1, 0])


@pytest.mark.parametrize("lag", [1, 4])
def test_evaluations_are_counted_as_the_engine_does(lag: int) -> None:
    space = sl.Space(x=sl.Choice(range(3), shape=(5,)))
    algorithm = Evolution(space, seed=4)
    count = choices.evaluations(algorithm, lambda x: (x != HIDDEN).sum(1).astype(float), lag=lag)
    result = sl.search(
        space,
        lambda x: float((np.array(x) != HIDDEN).sum()),
        budget=sl.Budget(243, target=0.0),
        algorithm="evolution",
        seed=4,
        lag=lag,
    )
    assert result.records is not None
    assert count == 1 + int(np.flatnonzero(result.records.values[:, 0] == 0)[0])


def test_a_search_that_finds_nothing_ends_at_the_limit() -> None:
    algorithm = Evolution(sl.Space(x=sl.Choice(range(3), shape=(5,))))
    assert choices.evaluations(algorithm, lambda x: np.ones(len(x)), lag=2, most=20) == 20


def test_the_cost_grows_with_what_an_algorithm_does_per_proposal() -> None:
    (setup, *_) = choices._setups()
    found = choices._costs("random", setup, (200, 400))
    assert found is not None
    assert all(0 < value < 1000 for value in found)


def test_every_part_is_found_and_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert algorithms.PARTS["choices"] == choices.__name__
    monkeypatch.setattr(algorithms, "PARTS", {"one": __name__, "two": __name__})
    out = tmp_path / "out.json"

    def lines(*arguments: str) -> list[tuple[str, str]]:
        assert algorithms.main([*arguments, "--out", str(out)]) == 0
        return [(line["part"], line["case"]) for line in json.loads(out.read_text("utf-8"))]

    monkeypatch.setattr(algorithms.importlib, "import_module", lambda name: _Part)
    assert lines("--quick") == [("one", "a case"), ("two", "a case")]
    assert lines("--quick", "--part", "one") == [("two", "a case"), ("one", "a case")]
    assert lines("--part", "one", "--part", "two") == [("one", "a case"), ("two", "a case")]
    with pytest.raises(ConfigError, match="mixes short and full forms"):
        lines("--quick", "--part", "one")
    assert capsys.readouterr().err == ""


class _Part:
    """Stands for a module of a part."""

    @staticmethod
    def run(journal: Journal, quick: bool) -> None:
        journal.case("a case", {"quick_form": quick})


def test_what_is_absent_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lacking("numpy") is None
    assert lacking("numpy", "no_such_peer", "nor_this") == "not installed: no_such_peer, nor_this"
    monkeypatch.delenv("SEARCHLAB_DATA", raising=False)
    assert data_folder("tables") is None
    monkeypatch.setenv("SEARCHLAB_DATA", str(tmp_path))
    assert data_folder("tables") is None
    (tmp_path / "tables").mkdir()
    assert data_folder("tables") == tmp_path / "tables"
    Journal("example", flags("", [])).skip("peer", "not installed: peer")
    (line,) = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert (line["case"], line["skipped"]) == ("peer", "not installed: peer")
    assert line["aims"] == []
