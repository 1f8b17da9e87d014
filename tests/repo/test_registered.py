"""Every registered name is held to the conformance suite of its kind."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import searchlab.config
import searchlab.recipes
from searchlab.config import resolve

TESTS = Path(__file__).resolve().parents[1]


def registries() -> dict[str, dict[str, str]]:
    """Name -> registry of every mapping of names to "module:attribute" strings."""
    out = {}
    for module in (searchlab.config, searchlab.recipes):
        for name, value in vars(module).items():
            named = name.isupper() and isinstance(value, dict) and value
            if named and all(isinstance(text, str) and ":" in text for text in value.values()):
                out[name] = value
    return out


def held_to(suite: str) -> set[str]:
    """All names that stand in a test class which inherits a suite."""
    found: set[str] = set()
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            bases = [base.id for base in getattr(node, "bases", []) if isinstance(base, ast.Name)]
            # A suite for a narrower kind, such as IsolatingExecutorSuite, extends the general one.
            if isinstance(node, ast.ClassDef) and any(base.endswith(suite) for base in bases):
                found |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found


def test_the_registries_are_found() -> None:
    assert {"ALGORITHMS", "RECIPES"} <= registries().keys()


@pytest.mark.parametrize("registry", sorted(registries()))
def test_every_name_can_be_resolved(registry: str) -> None:
    names = registries()[registry]
    kind = registry.lower().removesuffix("s")
    for name in names:
        assert resolve(names, name, kind) is not None


@pytest.mark.parametrize("registry", sorted(set(registries()) - {"RECIPES"}))
def test_every_name_is_in_a_suite(registry: str) -> None:
    suite = registry.removesuffix("S").capitalize() + "Suite"
    classes = {target.split(":")[1] for target in registries()[registry].values()}
    assert classes - held_to(suite) == set()
    assert "NoSuchClass" not in held_to(suite)
