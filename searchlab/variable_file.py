"""Reads one variable from the JSON or YAML form of a space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from searchlab.errors import SpaceError
from searchlab.variables import (
    ActiveBelow,
    ActiveIf,
    Choice,
    Condition,
    Integer,
    Ordered,
    Real,
    Variable,
)

__all__ = ["variable_from_json"]


_KEYS = {
    "choice": ("shape", "when"),
    "integer": ("shape", "when"),
    "real": ("shape", "when", "step", "default"),
    "ordered": ("when", "step"),
}
_ORDERED_KEYS = ("n", "low", "high", "gap")


def _condition_from_json(data: Any) -> Condition:
    if isinstance(data, Mapping) and "variable" in data:
        rest = set(data) - {"variable"}
        if data.get("below") is True and rest <= {"below", "offset"}:
            return ActiveBelow(data["variable"], int(data.get("offset", 0)))
        if rest == {"labels"} and isinstance(data["labels"], list | tuple):
            return ActiveIf(data["variable"], tuple(data["labels"]))
    raise SpaceError(
        f"condition {data!r}; allowed: {{variable, labels: [...]}} or "
        "{variable, below: true, offset}"
    )


def _conditions_from_json(data: Any) -> tuple[Condition, ...]:
    parts = data if isinstance(data, list | tuple) else [data]
    return tuple(_condition_from_json(part) for part in parts)


def variable_from_json(name: str, data: Any) -> Variable:
    """Reads one variable of a space file.

    Raises:
        SpaceError: names the variable, what stands there and what is allowed.
    """
    kinds = tuple(_KEYS)
    if not isinstance(data, Mapping):
        raise SpaceError(f"variable {name!r} is {data!r}; allowed: a mapping with one of {kinds}")
    found = [kind for kind in kinds if kind in data]
    if len(found) != 1:
        raise SpaceError(
            f"variable {name!r} has keys {sorted(map(str, data))}; allowed: exactly one of {kinds}"
        )
    kind, body = found[0], data[found[0]]
    extra = set(data) - {kind, *_KEYS[kind]}
    if extra:
        raise SpaceError(
            f"variable {name!r} has keys {sorted(map(str, extra))}; "
            f"allowed beside {kind!r}: {_KEYS[kind]}"
        )
    try:
        return _build(kind, body, data)
    except SpaceError as error:
        raise SpaceError(f"variable {name!r}: {error}") from None
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise SpaceError(f"variable {name!r} cannot be read: {body!r} ({error})") from None


def _build(kind: str, body: Any, data: Mapping[str, Any]) -> Variable:
    shape = data.get("shape", ())
    when = _conditions_from_json(data.get("when", ()))
    if kind == "choice":
        return Choice(body, shape=shape, when=when)
    if kind == "integer":
        low, high = body
        return Integer(low, high, shape=shape, when=when)
    if kind == "real":
        low, high = body
        default = data.get("default")
        return Real(
            float(low),
            float(high),
            shape=shape,
            when=when,
            step=float(data.get("step", 0.1)),
            default=None if default is None else float(default),
        )
    if not isinstance(body, Mapping) or set(body) - set(_ORDERED_KEYS):
        raise SpaceError(f"ordered {body!r}; allowed: a mapping of {_ORDERED_KEYS}")
    return Ordered(
        body["n"],
        float(body["low"]),
        float(body["high"]),
        float(body.get("gap", 0.0)),
        when=when,
        step=float(data.get("step", 0.08)),
    )
