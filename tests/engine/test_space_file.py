"""Space files: a documented one, every slip, and thousands of random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchlab.constraints import Tie
from searchlab.errors import SearchlabError, SpaceError
from searchlab.space import Space, space_from_json
from searchlab.testing.space import random_population

TEXT = """
name: serving
variables:
  max_num_seqs:   {choice: [64, 128, 256, 512]}
  chunked_tokens: {integer: [512, 16384], log: true}
  learning_rate:  {real: [1.0e-5, 0.1], log: true}
  dropout:        {real: [0, 0.5], step: 0.05}
  heads:          {subset: {n: 12, k: 4}, shape: [2]}
  merge:          {affine: {n: 3, total: 1, low: -0.5, high: 1.5}}
  mix:            {simplex: 4}
  bits:           {choice: [2, 4, 8], shape: 6}
constraints:
  - {name: heads, table: {heads: [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]}, upper: 12}
  - tie: [[bits, 0], [bits, 5]]
"""


def test_a_file_with_every_kind_is_read(tmp_path: Path) -> None:
    space = Space.from_yaml(TEXT)
    assert space.name == "serving"
    assert space.variables["heads"].shape == (2, 12)
    assert space.constraints[1] == Tie((("bits", 0), ("bits", 5)))
    rows = random_population(space, 20)
    assert space.is_feasible(rows).all()
    file = tmp_path / "space.yaml"
    file.write_text(space.to_yaml())
    for source in (file, str(file)):
        assert Space.from_yaml(source).fingerprint == space.fingerprint


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 8)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variables: [", "no YAML"),
        ("variables: {x: {choice: !!python/object:os.system [ls]}}", "no YAML"),
        ("variables: {x: {choice: [2001-99-99]}}", "no YAML"),
        ("variables: {x: {choice: [2001-01-01]}}", "JSON values"),
        ("variables: &v {x: *v}", "alias within"),
        (BOMB, "more than 1000000 values"),
        ("[" * 3000 + ":", "nested too deeply|no YAML"),
        ("a: b", "needs a mapping 'variables'"),
        ("", "cannot be opened"),
        ("missing.yaml", "cannot be opened"),
        ("variables: {x: {integer: [1, .inf]}}", "integer range"),
        ("variables: {x: {choice: [1, 2]}}\nconstraints: 3", "constraints 3"),
        ("variables: {x: {choice: [1, 2], when: {variable: [1], labels: [1]}}}", "condition"),
        ("variables: {x: {real: [0, 1], log: 1}}", "log 1"),
        ("variables: {x: {subset: [3, 1]}}", "subset .3, 1.; allowed: a mapping"),
    ],
)
def test_a_text_that_is_no_space_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        Space.from_yaml(text)
    assert "\n" not in str(caught.value)


WORDS = st.sampled_from(
    [
        "choice",
        "integer",
        "real",
        "ordered",
        "subset",
        "affine",
        "simplex",
        "shape",
        "when",
        "n",
        "k",
        "low",
        "high",
        "total",
        "gap",
        "log",
        "step",
        "sigma",
        "default",
        "variable",
        "labels",
        "below",
        "offset",
        "x",
        "y",
        "table",
        "upper",
        "lower",
        "name",
        "tie",
        "predicate",
        "variables",
        "constraints",
        "version",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([10**400, -(2**63), 2**31, 2**53])
    | st.floats()
    | WORDS
    | st.text(max_size=3)
    | st.dates()
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | SCALARS, inner, max_size=4),
    max_leaves=8,
)
GOOD: dict[str, Any] = yaml.safe_load(TEXT)


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """The documented file with one part exchanged for something else."""

    def change(part: Any) -> Any:
        if isinstance(part, dict) and part and draw(st.integers(0, 9)):
            key = draw(st.sampled_from(sorted(part, key=str)))
            return {**part, key: change(part[key])}
        if isinstance(part, list) and part and draw(st.integers(0, 3)):
            place = draw(st.integers(0, len(part) - 1))
            return [*part[:place], change(part[place]), *part[place + 1 :]]
        return draw(TREES)

    return change(GOOD)


def _read(read: Any, source: Any) -> None:
    try:
        answer = read(source)
    except SearchlabError as error:
        answer = str(error)
    assert isinstance(answer, Space) or "\n" not in answer


FUZZ = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(data=damaged())
def test_damaged_files_give_our_errors_only(data: Any) -> None:
    _read(space_from_json, data)


@FUZZ
@given(one=TREES, two=TREES, rule=TREES)
def test_random_content_gives_our_errors_only(one: Any, two: Any, rule: Any) -> None:
    _read(space_from_json, {"variables": {"x": one, "y": two}, "constraints": [rule]})


@FUZZ
@given(text=st.text(max_size=40), place=st.integers(0, len(TEXT)), cut=st.integers(0, 30))
def test_damaged_texts_give_our_errors_only(text: str, place: int, cut: int) -> None:
    _read(Space.from_yaml, "#:\n" + TEXT[:place] + text + TEXT[place + cut :])
