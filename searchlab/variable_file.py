"""Reads one variable from the JSON or YAML form of a space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from searchlab.errors import SpaceError
from searchlab.variables import (
    ActiveBelow,
    ActiveIf,
    Affine,
    Choice,
    Condition,
    Integer,
    Ordered,
    Real,
    Simplex,
    Subset,
    Variable,
)

__all__ = ["brief", "variable_from_json"]


_KEYS = {
    "choice": ("shape", "when"),
    "integer": ("shape", "when", "log", "step"),
    "real": ("shape", "when", "sigma", "default", "log", "step"),
    "ordered": ("shape", "when", "sigma"),
    "subset": ("shape", "when"),
    "affine": ("shape", "when", "sigma"),
    "simplex": ("shape", "when", "sigma"),
}
_BODIES = {
    "ordered": ("n", "low", "high", "gap"),
    "subset": ("n", "k"),
    "affine": ("n", "total", "low", "high"),
    "simplex": ("n",),
}


def brief(value: object) -> str:
    """What stands in a file, on one line of bounded length."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."


def _condition_from_json(data: Any) -> Condition:
    if isinstance(data, Mapping) and "variable" in data:
        rest = set(data) - {"variable"}
        if data.get("below") is True and rest <= {"below", "offset"}:
            return ActiveBelow(data["variable"], int(data.get("offset", 0)))
        if rest == {"labels"} and isinstance(data["labels"], list | tuple):
            return ActiveIf(data["variable"], tuple(data["labels"]))
    raise SpaceError(
        f"condition {brief(data)}; allowed: {{variable, labels: [...]}} or "
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
        raise SpaceError(
            f"variable {name!r} is {brief(data)}; allowed: a mapping with one of {kinds}"
        )
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
        raise SpaceError(
            f"variable {name!r} cannot be read: {brief(body)} ({brief(error)})"
        ) from None


def _build(kind: str, body: Any, data: Mapping[str, Any]) -> Variable:
    shape = data.get("shape", ())
    when = _conditions_from_json(data.get("when", ()))
    if kind == "choice":
        return Choice(body, shape=shape, when=when)
    if kind == "integer":
        low, high = body
        log, step = data.get("log", False), data.get("step", 1)
        return Integer(low, high, shape=shape, when=when, log=log, step=step)
    if kind == "real":
        low, high = body
        default, grid = data.get("default"), data.get("step")
        return Real(
            float(low),
            float(high),
            shape=shape,
            when=when,
            sigma=float(data.get("sigma", 0.1)),
            default=None if default is None else float(default),
            log=data.get("log", False),
            step=None if grid is None else float(grid),
        )
    if kind == "simplex" and isinstance(body, int):
        body = {"n": body}
    allowed = _BODIES[kind]
    if not isinstance(body, Mapping) or set(body) - set(allowed):
        raise SpaceError(f"{kind} {brief(body)}; allowed: a mapping of {allowed}")
    if kind == "subset":
        return Subset(body["n"], body["k"], shape=shape, when=when)
    if kind == "ordered":
        return Ordered(
            body["n"],
            float(body["low"]),
            float(body["high"]),
            float(body.get("gap", 0.0)),
            shape=shape,
            when=when,
            sigma=float(data.get("sigma", 0.08)),
        )
    sigma = float(data.get("sigma", 0.1))
    if kind == "simplex":
        return Simplex(body["n"], shape=shape, when=when, sigma=sigma)
    return Affine(
        body["n"],
        float(body.get("total", 1.0)),
        low=float(body["low"]),
        high=float(body["high"]),
        shape=shape,
        when=when,
        sigma=sigma,
    )
