"""Names that other packages add by entry point: used, listed, resumed, and named when broken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from plugin_tools import install

import searchlab as sl
from searchlab.algorithms import Evolution
from searchlab.cli import main
from searchlab.config import ALGORITHMS, known_names, resolve
from searchlab.errors import ConfigError
from searchlab.recipes import ALIASES, RECIPES, load_recipe
from searchlab.study import Database


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The distribution on `sys.path`, and an empty working folder."""
    monkeypatch.syspath_prepend(str(install(tmp_path / "site")))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield
    sys.modules.pop("tiny_plugin", None)


def test_an_algorithm_of_another_package_is_used_by_name(plugin: None) -> None:
    space = sl.Space(x=sl.Integer(0, 100), y=sl.Integer(0, 100))
    result = sl.search(space, lambda x, y: x - y, algorithm="corners", budget=3)
    assert result.best.plan in [{"x": x, "y": y} for x in (0, 100) for y in (0, 100)]
    assert set(result.records.origin) <= {"corner", ""}  # type: ignore[union-attr]
    assert "corners" in known_names(ALGORITHMS, "algorithm")


def test_names_of_searchlab_come_first(plugin: None) -> None:
    assert resolve(ALGORITHMS, "evolution", "algorithm") is Evolution


def test_a_recipe_of_another_package_is_run_resumed_and_verified(
    plugin: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "tiny", "--budget", "4", "--algorithm", "corners", "--quiet"]
    assert main([*arguments, "--name", "t"]) == 0
    assert main(["resume", "t", "--budget", "6"]) == 0
    assert main(["verify", "t"]) == 0
    with Database("runs/searchlab.db") as base:
        records = base.read("t").records()
    assert {origin for origin in records.origin if origin} == {"corner"}
    capsys.readouterr()
    assert main(["run"]) == 2
    out = capsys.readouterr().out
    assert "a parabola" in out
    assert "(recipe 'three' is 3; allowed: a Recipe)" in out
    assert main(["run", "three"]) == 2
    assert "recipe 'three' is 3; allowed: a Recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("algorithm", "broken", "of tiny-plugin cannot be loaded from 'tiny_plugin:Missing'"),
        ("executor", "broken", "No module named 'no_such_module'"),
        ("algorithm", "cornes", "unknown algorithm 'cornes'; known: broken, cma, corners, eda"),
    ],
)
def test_a_broken_or_unknown_plugin_is_named(
    plugin: None, kind: str, name: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(ALGORITHMS if kind == "algorithm" else {}, name, kind)


def test_without_plugins_only_the_registry_is_known() -> None:
    assert known_names(ALGORITHMS, "algorithm") == sorted(ALGORITHMS)
    for alias, name in ALIASES.items():
        assert load_recipe(alias) is load_recipe(name)
    with pytest.raises(ConfigError, match=r"unknown recipe 'tiny'; known: .*s3, .*usf"):
        load_recipe("tiny")
    assert set(ALIASES.values()) <= set(RECIPES)
