"""A space as a YAML or JSON file: read with the safe loader, every slip named in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from searchlab.budget import LinearBudget
from searchlab.constraints import Predicate, Tie
from searchlab.errors import SpaceError
from searchlab.space import Constraint, Space
from searchlab.variable_file import brief, variable_from_json

if TYPE_CHECKING:
    from yaml.nodes import Node

__all__ = ["read_space", "space_from_yaml", "space_to_yaml"]

_KEYS = ("variables", "constraints", "name")
_BUDGET_KEYS = ("table", "upper", "lower", "name", "offset")
_MOST_BYTES = 16 * 2**20
_MOST_VALUES = 1_000_000  # in a file, each use of an alias counted in full


def read_space(data: Any, *, predicates: Sequence[Predicate] = ()) -> Space:
    """Reads a space from the content of a file; see `space_from_json`."""
    if not isinstance(data, Mapping) or not isinstance(data.get("variables"), Mapping):
        raise SpaceError("a space file needs a mapping 'variables'")
    extra = set(data) - set(_KEYS)
    if extra:
        raise SpaceError(
            f"space file has keys {sorted(map(str, extra))}; allowed: {', '.join(_KEYS)}"
        )
    try:
        variables = {str(k): variable_from_json(str(k), v) for k, v in data["variables"].items()}
        parts = data.get("constraints") or ()
        if not isinstance(parts, list | tuple):
            raise SpaceError(f"constraints {brief(parts)}; allowed: a list")
        known = {predicate.name: predicate for predicate in predicates}
        constraints = [_constraint(part, known) for part in parts]
        return Space(variables, constraints=constraints, name=str(data.get("name", "space")))
    except RecursionError:
        raise SpaceError("space file is nested too deeply") from None


def _constraint(part: Any, predicates: Mapping[str, Predicate]) -> Constraint:
    if isinstance(part, Mapping) and "tie" in part and len(part) == 1:
        return Tie(part["tie"])
    if isinstance(part, Mapping) and "predicate" in part:
        name, version = part["predicate"], part.get("version", 1)
        if set(part) - {"predicate", "version"} or not isinstance(name, str):
            raise SpaceError(f"constraint {brief(part)}; allowed: {{predicate, version}}")
        if name not in predicates:
            raise SpaceError(
                f"predicate {name!r} is a function, which no file can hold; pass it as "
                f"`predicates`; given: {sorted(predicates)}"
            )
        if predicates[name].version != version:
            raise SpaceError(
                f"predicate {name!r} has version {predicates[name].version}; the file says "
                f"{brief(version)}"
            )
        return predicates[name]
    if not isinstance(part, Mapping) or set(part) - set(_BUDGET_KEYS):
        raise SpaceError(
            f"constraint {brief(part)}; allowed: a mapping of {sorted(_BUDGET_KEYS)}, {{tie}} or "
            "{predicate, version}"
        )
    try:
        upper, lower = part.get("upper"), part.get("lower")
        return LinearBudget(
            part["table"],
            upper=np.inf if upper is None else float(upper),
            lower=-np.inf if lower is None else float(lower),
            name=str(part.get("name", "budget")),
            offset=float(part.get("offset", 0.0)),
        )
    except SpaceError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise SpaceError(f"constraint {brief(part)} cannot be read ({brief(error)})") from None


def space_from_yaml(source: str | Path, *, predicates: Sequence[Predicate] = ()) -> Space:
    """Reads a YAML file or text; see `Space.from_yaml`."""
    import yaml

    text, where = source, "space file"
    try:
        if isinstance(source, Path) or not ("\n" in source or ":" in source):
            where = f"space file {str(source)!r}"
            with Path(source).open("rb") as file:
                raw = file.read(_MOST_BYTES + 1)
            if len(raw) > _MOST_BYTES:
                raise SpaceError(f"{where} is larger than {_MOST_BYTES} bytes")
            text = raw.decode("utf-8")
        assert isinstance(text, str)
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            _weigh(node, {})
            data = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except OSError as error:
        raise SpaceError(f"{where} cannot be opened: {error.strerror or error}") from None
    except RecursionError:
        raise SpaceError(f"{where} is nested too deeply") from None
    except SpaceError:
        raise
    # A date or a number that does not exist surfaces from the loader as a plain error.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise SpaceError(f"{where} is no YAML: {brief(error)}") from None
    return read_space(data, predicates=predicates)


def _weigh(node: Node | None, seen: dict[int, int]) -> int:
    """How many values a node stands for when every alias is written out.

    Raises:
        SpaceError: too many, or a node within itself.
    """
    if node is None:
        return 0
    if id(node) in seen:
        if not seen[id(node)]:
            raise SpaceError("space file has an alias within the value that it stands for")
        return seen[id(node)]
    seen[id(node)] = 0
    total = 1
    for part in node.value if isinstance(node.value, list) else ():
        for inner in part if isinstance(part, tuple) else (part,):
            total += _weigh(inner, seen)
            if total > _MOST_VALUES:
                raise SpaceError(f"space file has more than {_MOST_VALUES} values")
    seen[id(node)] = total
    return total


def space_to_yaml(space: Space) -> str:
    """The text of a file that `space_from_yaml` reads."""
    import json

    import yaml

    # Through JSON: tuples among the labels are lists in a file.
    data = json.loads(json.dumps({"name": space.name, **space.to_json()}))
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, allow_unicode=True)
