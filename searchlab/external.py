"""The contract with evaluators that are other programs: plans out, results in, both JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError, DataError
from searchlab.evaluator import Fidelity, Objective
from searchlab.outcomes import Constraint
from searchlab.population import FAILED, OK, Evaluations, Jobs
from searchlab.space import Space

__all__ = [
    "PLAN_SCHEMA",
    "RESULT_KEYS",
    "Outcome",
    "load_json",
    "parse_fidelity",
    "parse_objective",
    "parse_seconds",
    "plan_rows",
    "read_result",
    "read_space_file",
    "seed_of",
    "to_evaluations",
]

PLAN_SCHEMA = 1
RESULT_KEYS = (
    "objectives",
    "constraints",
    "standard_errors",
    "items",
    "cost",
    "state",
    "reason",
    "schema",
    "candidate_id",
)
MAX_REASON = 500
_UNITS = {"": 1.0, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


# -- what goes out ------------------------------------------------------------------------------


def seed_of(seed: int, replicate: int) -> int:
    """The seed that a replicate hands to the program, 0 to 2**31 - 1; equal for all candidates."""
    digest = blake2b(f"{seed} {replicate}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def plan_rows(
    space: Space, jobs: Jobs, fidelities: Sequence[Fidelity], *, seed: int
) -> list[dict[str, Any]]:
    """What a program is told of each job: `plan.json`, or one line of `searchlab ask`."""
    values = space.decode(jobs.population)
    plans = space.plans(jobs.population)
    return [
        {
            "schema": PLAN_SCHEMA,
            "candidate_id": int(job),
            "fidelity": fidelities[jobs.fidelity].name,
            "seed": seed_of(seed, jobs.replicate),
            "values": _plain(row),
            "plan": _plain(plan.to_json() if hasattr(plan, "to_json") else plan),
        }
        for job, row, plan in zip(jobs.ids.tolist(), values, plans, strict=True)
    ]


def _plain(value: Any) -> Any:
    """JSON of what a space decodes to: numbers of arrays become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return value


# -- what comes back ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a program found out about one candidate.

    Attributes:
        values: float64 (m,), NaN where it failed.
        constraints: float64 (c,), NaN where it failed.
        std_error: float64 (m,), NaN where none is given, or None.
        items: per-item scores of the first objective, or None.
        cost_s: device seconds that it says it took; NaN = not said.
        reason: why it failed; empty = it did not.
    """

    values: NDArray[np.float64]
    constraints: NDArray[np.float64]
    std_error: NDArray[np.float64] | None = None
    items: NDArray[np.float64] | None = None
    cost_s: float = math.nan
    reason: str = ""

    @staticmethod
    def failed(
        reason: str, objectives: Sequence[Objective], constraints: Sequence[Constraint]
    ) -> Outcome:
        """A candidate without values."""
        text = " ".join(reason.split())[:MAX_REASON] or "it says it failed and gives no reason"
        return Outcome(
            np.full(len(objectives), np.nan), np.full(len(constraints), np.nan), reason=text
        )


def load_json(raw: bytes, what: str) -> Any:
    """JSON of a file or a line from outside; NaN and Infinity are read as numbers.

    Raises:
        DataError: names what it is and what is wrong with it.
    """
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{what} is not UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{what} is not whole JSON: {error.msg} at {where}") from None
    except (ValueError, RecursionError) as error:  # a number of very many digits, deep nesting
        raise DataError(f"{what} cannot be read: {str(error)[:100]}") from None


def read_result(
    data: Any, objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> Outcome:
    """Reads the content of `result.json`.

    Every required number must be there and finite; names that nobody asked for are left alone, so
    that a program may report more than one search uses. A constraint's value may also stand among
    the objectives.

    Raises:
        DataError: names the entry and what is allowed; the candidate has then failed.
    """
    if not isinstance(data, dict):
        raise DataError(f"the result is a {_kind(data)}; allowed: an object with 'objectives'")
    extra = sorted(set(data) - set(RESULT_KEYS))
    if extra:
        raise DataError(f"the result has keys {extra}; allowed: {list(RESULT_KEYS)}")
    state = data.get("state", "ok")
    if state not in ("ok", "failed"):
        raise DataError(f"state {_short(state)}; allowed: ok, failed")
    reason = data.get("reason")
    if reason is not None and not isinstance(reason, str):
        raise DataError(f"reason {_short(reason)}; allowed: a text")
    if state == "failed":
        return Outcome.failed(reason or "", objectives, constraints)
    values = _mapping(data, "objectives")
    limits = {**values, **_mapping(data, "constraints")}
    errors = _mapping(data, "standard_errors")
    std_error = None
    if any(o.name in errors for o in objectives):
        std_error = np.array(
            [
                _number(errors, o.name, "standard error", least=0.0) if o.name in errors else np.nan
                for o in objectives
            ]
        )
    return Outcome(
        np.array([_number(values, o.name, "objective") for o in objectives]),
        np.array([_number(limits, c.name, "constraint") for c in constraints], dtype=np.float64),
        std_error,
        _items(data, objectives[0].name),
        _cost(data),
    )


def to_evaluations(outcomes: Sequence[Outcome]) -> Evaluations:
    """Outcomes of one chunk, in order."""
    first = outcomes[0]
    missing = np.full(len(first.values), np.nan)
    some_errors = any(o.std_error is not None for o in outcomes)
    some_items = any(o.items is not None for o in outcomes)
    return Evaluations(
        values=np.stack([o.values for o in outcomes]),
        state=np.array([FAILED if o.reason else OK for o in outcomes], np.int8),
        reason=[o.reason for o in outcomes],
        std_error=np.stack([missing if o.std_error is None else o.std_error for o in outcomes])
        if some_errors
        else None,
        constraints=np.stack([o.constraints for o in outcomes]),
        cost_s=np.array([0.0 if math.isnan(o.cost_s) else o.cost_s for o in outcomes]),
        items=[o.items for o in outcomes] if some_items else None,
    )


def _mapping(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = data.get(key)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise DataError(f"{key} is a {_kind(part)}; allowed: an object of names and numbers")
    return part


def _number(part: Mapping[str, Any], name: str, what: str, least: float = -math.inf) -> float:
    if name not in part:
        known = sorted(part)[:20]
        raise DataError(f"{what} {name!r} is missing; there are {known}")
    value = part[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{what} {name!r} is {_short(value)}; allowed: a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < least:
        rule = "a finite number" if least == -math.inf else f"a finite number from {least:g}"
        raise DataError(f"{what} {name!r} is {_short(value)}; allowed: {rule}")
    return number


def _items(data: Mapping[str, Any], name: str) -> NDArray[np.float64] | None:
    part = data.get("items")
    if part is None:
        return None
    if not isinstance(part, dict) or not all(isinstance(row, list) for row in part.values()):
        raise DataError(f"items is {_short(part)}; allowed: an object of names and lists")
    if name not in part:
        return None
    row = part[name]
    for value in row:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"items of {name!r} hold {_short(value)}; allowed: numbers")
    try:
        return np.array(row, dtype=np.float64)
    except OverflowError:
        raise DataError(f"items of {name!r} hold a number beyond float64") from None


def _cost(data: Mapping[str, Any]) -> float:
    part = _mapping(data, "cost")
    if "gpu_seconds" not in part:
        return math.nan
    return _number(part, "gpu_seconds", "cost", least=0.0)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, int) else str(value)[:60]
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- texts of the command line ------------------------------------------------------------------


def parse_objective(text: str) -> Objective:
    """Reads `NAME:min` or `NAME:max`. Raises ConfigError naming the text."""
    name, _, direction = text.rpartition(":")
    found: Literal["min", "max"]
    if direction.strip() == "min":
        found = "min"
    elif direction.strip() == "max":
        found = "max"
    else:
        raise ConfigError(f"objective {text!r}; allowed: NAME:min or NAME:max")
    if not name.strip():
        raise ConfigError(f"objective {text!r}; allowed: NAME:min or NAME:max")
    return Objective(name.strip(), found)


def parse_fidelity(text: str) -> Fidelity:
    """Reads `NAME:COST`, the cost relative to the last. Raises ConfigError naming the text."""
    name, _, cost = text.rpartition(":")
    try:
        number = float(cost)
    except ValueError:
        number = math.nan
    if not name.strip() or not math.isfinite(number) or number <= 0:
        raise ConfigError(f"fidelity {text!r}; allowed: NAME:COST with a cost above 0")
    return Fidelity(name.strip(), number)


def parse_seconds(text: str) -> float:
    """Reads `90`, `90s`, `30min`, `1.5h` or `2d`. Raises ConfigError naming the text."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", str(text))
    if match is None or match[2] not in _UNITS or not 0 < float(match[1]) < 1e9:
        raise ConfigError(f"time {text!r}; allowed: a number with s, min, h or d, as in 30min")
    return float(match[1]) * _UNITS[match[2]]


def read_space_file(path: str | Path) -> dict[str, Any]:
    """The content of a space file (YAML or JSON, no code) as plain JSON.

    Raises:
        ConfigError: missing, not YAML, or holding what JSON cannot say.
    """
    import yaml

    where = f"space file {str(path)!r}"
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{where} is not YAML: {line}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}; allowed: a mapping with 'variables'")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} holds what JSON cannot say: {error}") from None
    return plain
