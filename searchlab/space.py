"""Spaces: named variables, conditions and budgets; valid by construction, one row per candidate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.budget import REPAIR_WIDTH, LinearBudget
from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.repair import repair_budgets
from searchlab.variable_file import variable_from_json
from searchlab.variables import (
    ActiveBelow,
    ActiveIf,
    Choice,
    Integer,
    Ordered,
    Variable,
)

__all__ = ["KEY_BYTES", "Space", "space_from_json"]

KEY_BYTES = 16
_ENCODING_VERSION = 1

Array = NDArray[Any]


class Space:
    """What may vary.

    Every method takes and returns whole populations. Randomness comes in as uniforms, so that a
    row is a function of its own uniforms and of nothing else.

    Args:
        variables: name -> variable, in declaration order; also accepted as keywords.
        constraints: budgets that every candidate keeps.
        name: shown in reports; no part of the fingerprint.

    Raises:
        SpaceError: an empty space, a condition on a later or unknown variable, a budget that no
            candidate can keep.
    """

    def __init__(
        self,
        variables: Mapping[str, Variable] | None = None,
        /,
        *,
        constraints: Sequence[LinearBudget] = (),
        name: str = "space",
        **more: Variable,
    ) -> None:
        self.variables: dict[str, Variable] = {**(variables or {}), **more}
        self.constraints = tuple(constraints)
        self.name = name
        if not self.variables:
            raise SpaceError("a space without variables; allowed: one variable or more")
        for key, variable in self.variables.items():
            if not isinstance(variable, Variable):
                raise SpaceError(f"{key!r} is {variable!r}; allowed: a Variable such as Choice")
        self._check_conditions()
        names = [budget.name for budget in self.constraints]
        if len(set(names)) < len(names):
            raise SpaceError(f"budgets have equal names: {names}")
        for budget in self.constraints:
            budget.check(self.variables)

    def _check_conditions(self) -> None:
        seen: dict[str, Variable] = {}
        for key, variable in self.variables.items():
            for condition in variable.when:
                other = seen.get(condition.variable)
                if other is None:
                    raise SpaceError(
                        f"{key!r} depends on {condition.variable!r}, not declared before it"
                    )
                if isinstance(condition, ActiveBelow) and not (
                    isinstance(other, Integer) and other.shape == () and variable.shape
                ):
                    raise SpaceError(f"{key!r}: 'below' needs a scalar integer and a shape")
                if isinstance(condition, ActiveIf):
                    if not isinstance(other, Choice):
                        raise SpaceError(f"{key!r} depends on {condition.variable!r}, no choice")
                    missing = [x for x in condition.labels if x not in other.labels]
                    if missing:
                        raise SpaceError(f"{key!r} depends on unknown labels {missing}")
                    if not _fits_into(other.shape, variable.shape):
                        raise SpaceError(
                            f"{key!r} of shape {variable.shape} depends on shape {other.shape}"
                        )
                    if isinstance(variable, Ordered) and other.size > 1:
                        raise SpaceError(
                            f"{key!r} is ordered and depends on shape {other.shape}; allowed: one "
                            "element, so that the active values come first"
                        )
            seen[key] = variable

    # -- figures ----------------------------------------------------------------------------

    @cached_property
    def size(self) -> int:
        """Number of elements of a candidate."""
        return sum(variable.size for variable in self.variables.values())

    @cached_property
    def sample_width(self) -> int:
        """Uniforms per candidate that `sample` consumes."""
        own = sum(variable.width for variable in self.variables.values())
        return own + self.repair_width

    @property
    def repair_width(self) -> int:
        """Uniforms per candidate that `repair` consumes."""
        return REPAIR_WIDTH * len(self.constraints)

    @cached_property
    def code_width(self) -> int:
        """Columns of `encode`."""
        return sum(variable.code_width for variable in self.variables.values())

    # -- candidates -------------------------------------------------------------------------

    def empty(self) -> Population:
        """A population of no candidates."""
        return Population({k: np.empty((0, *v.shape), v.dtype) for k, v in self.variables.items()})

    def sample(self, u: Array) -> Population:
        """Random valid candidates from uniforms (n, sample_width)."""
        columns: dict[str, Array] = {}
        active: dict[str, Array] = {}
        start = 0
        for key, variable in self.variables.items():
            active[key] = self.activity(key, columns, active, len(u))
            block = u[:, start : start + variable.width]
            columns[key] = variable.sample(block, active[key] if variable.when else None)
            start += variable.width
        return self.repair(Population(columns), u[:, start:])

    def active(self, population: Population) -> dict[str, Array]:
        """Which elements count, bool (n, *shape) per variable."""
        out: dict[str, Array] = {}
        for key in self.variables:
            out[key] = self.activity(key, population.columns, out, len(population))
        return out

    def activity(
        self, key: str, columns: Mapping[str, Array], active: Mapping[str, Array], n: int
    ) -> Array:
        """Which elements of one variable count, given all earlier variables; (n, *shape)."""
        variable = self.variables[key]
        mask = np.ones((n, *variable.shape), dtype=bool)
        for condition in variable.when:
            other = columns[condition.variable]
            choice = self.variables[condition.variable]
            holds = active[condition.variable]
            if isinstance(condition, ActiveBelow):
                inner = [1] * (len(variable.shape) - 1)
                index = np.arange(variable.shape[0]).reshape(1, -1, *inner)
                limit = other.reshape(-1, *[1] * len(variable.shape)) + condition.offset
                mask &= (index < limit) & holds.reshape(limit.shape)
            else:
                assert isinstance(choice, Choice)
                codes = [choice.labels.index(label) for label in condition.labels]
                lookup = np.zeros(len(choice.labels), dtype=bool)
                lookup[codes] = True
                holds = lookup[other] & holds
                missing = len(variable.shape) - len(choice.shape)
                mask &= holds.reshape(n, *[1] * missing, *choice.shape)
        return mask

    def canonicalise(self, population: Population) -> Population:
        """The same candidates with one spelling each: inactive elements become neutral.

        A domain space extends this by its own dead parts; equal meaning must end as equal rows.
        """
        if not self._conditional:
            return population
        columns = dict(population.columns)
        active: dict[str, Array] = {}
        for key, variable in self.variables.items():
            active[key] = self.activity(key, columns, active, len(population))
            if variable.when:
                columns[key] = np.where(active[key], columns[key], variable.neutral).astype(
                    variable.dtype
                )
        return Population(columns)

    def repair(self, population: Population, u: Array) -> Population:
        """Valid candidates near the given ones, canonical; uniforms (n, repair_width)."""
        population = self._repair_bounds(population)
        if not self.constraints:
            return population
        population = repair_budgets(
            population,
            u,
            variables=self.variables,
            budgets=self.constraints,
            active_of=self.active,
            canonicalise=self.canonicalise,
            revive=self._revive,
        )
        # A budget may have switched elements on: they take their place among their neighbours.
        return self._repair_bounds(population) if self._conditional else population

    @cached_property
    def _conditional(self) -> bool:
        return any(variable.when for variable in self.variables.values())

    def _repair_bounds(self, population: Population) -> Population:
        """Each variable within its own bounds, canonical; budgets are not looked at."""
        columns = dict(population.columns)
        active: dict[str, Array] = {}
        for key, variable in self.variables.items():
            active[key] = self.activity(key, columns, active, len(population))
            columns[key] = variable.repair(
                np.asarray(columns[key]), active[key] if variable.when else None
            )
        return self.canonicalise(Population(columns))

    def _revive(self, before: Population, after: Population, u: Array) -> Population:
        """Draws the elements that a change made active, and canonicalises."""
        if self._conditional:
            was = self.active(before)
            columns = dict(after.columns)
            active: dict[str, Array] = {}
            for key, variable in self.variables.items():
                active[key] = self.activity(key, columns, active, len(after))
                born = active[key] & ~was[key]
                if not born.any():
                    continue
                # Few uniforms serve many elements here: drawn values may repeat within a row.
                block = np.resize(u.T, (variable.width, len(u))).T
                fresh = variable.sample(block, active[key])
                columns[key] = variable.repair(
                    np.where(born, fresh, columns[key]).astype(variable.dtype), active[key]
                )
            after = Population(columns)
        return self.canonicalise(after)

    def is_feasible(self, population: Population) -> NDArray[np.bool_]:
        """Which rows keep bounds and budgets, bool (n,)."""
        active = self.active(population)
        ok = np.ones(len(population), dtype=bool)
        for key, variable in self.variables.items():
            ok &= variable.valid(population[key], active[key])
        for budget in self.constraints:
            ok &= budget.holds(budget.cost(self.variables, population, active))
        return ok

    def cost(self, population: Population) -> dict[str, NDArray[np.float64]]:
        """Static figures per candidate, float64 (n,) each: the sums of the budgets.

        A domain space adds its own (bytes, steps, table latency).
        """
        active = self.active(population)
        return {b.name: b.cost(self.variables, population, active) for b in self.constraints}

    def keys(self, population: Population) -> tuple[bytes, ...]:
        """Canonical keys of canonical candidates: blake2b of the row's bytes, 16 bytes each."""
        raw, width = self._packed(population)
        return tuple(
            blake2b(raw[i : i + width], digest_size=KEY_BYTES).digest()
            for i in range(0, width * len(population), width)
        )

    def _packed(self, population: Population) -> tuple[bytes, int]:
        n = len(population)
        if not n:
            return b"", 1
        parts = []
        for key, variable in self.variables.items():
            column = np.ascontiguousarray(population[key], dtype=variable.dtype)
            if column.dtype.kind == "f":
                column = column + 0.0  # -0.0 and 0.0 are one value
            parts.append(column.reshape(n, -1).view(np.uint8).reshape(n, -1))
        packed = np.concatenate(parts, axis=1)
        return packed.tobytes(), packed.shape[1]

    def pack(self, population: Population) -> list[bytes]:
        """Each candidate as bytes, as the study stores it."""
        raw, width = self._packed(population)
        return [raw[i : i + width] for i in range(0, width * len(population), width)]

    def unpack(self, rows: Sequence[bytes]) -> Population:
        """The inverse of `pack`. Raises SpaceError for rows of another space."""
        n = len(rows)
        if not n:
            return self.empty()
        widths = [v.size * v.dtype.itemsize for v in self.variables.values()]
        if any(len(row) != sum(widths) for row in rows):
            raise SpaceError(f"stored candidates are not of this space ({sum(widths)} bytes each)")
        raw = np.frombuffer(b"".join(rows), np.uint8).reshape(n, sum(widths))
        columns, start = {}, 0
        for (key, variable), width in zip(self.variables.items(), widths, strict=True):
            block = np.ascontiguousarray(raw[:, start : start + width])
            columns[key] = block.view(variable.dtype).reshape(n, *variable.shape).copy()
            if isinstance(variable, Choice) and (columns[key] >= len(variable.labels)).any():
                raise SpaceError(f"stored candidates are not of this space ({key!r} has no label)")
            start += width
        return Population(columns)

    def encode(self, population: Population) -> NDArray[np.float32]:
        """Numbers for a predictor: one-hot choices, scaled reals; float32 (n, code_width)."""
        active = self.active(population)
        parts = [v.encode(population[k], active[k]) for k, v in self.variables.items()]
        return np.concatenate(parts, axis=1)

    def decode(self, population: Population) -> list[dict[str, Any]]:
        """Labels and numbers by name, one dict per candidate."""
        return [
            {key: variable.decode(population[key][i]) for key, variable in self.variables.items()}
            for i in range(len(population))
        ]

    def plans(self, population: Population) -> list[Any]:
        """What the user applies, one per candidate; decoded values unless a domain has more."""
        return list(self.decode(population))

    def export(self, plans: Mapping[int, Any], directory: Path) -> list[Path]:
        """Writes plans (by group) into an existing directory; returns the files."""
        from searchlab.result import write_plans

        return write_plans(plans, directory)

    def population(self, values: Sequence[Mapping[str, Any]]) -> Population:
        """The inverse of `decode`, canonical. Raises SpaceError naming the variable."""
        columns: dict[str, list[Array]] = {key: [] for key in self.variables}
        for row in values:
            if set(row) != set(self.variables):
                raise SpaceError(f"values {sorted(row)}; allowed: {sorted(self.variables)}")
            for key, variable in self.variables.items():
                try:
                    columns[key].append(variable.encode_labels(row[key]))
                except SpaceError as error:
                    raise SpaceError(f"variable {key!r}: {error}") from None
                except (TypeError, ValueError, OverflowError):
                    raise SpaceError(f"variable {key!r}: cannot read {row[key]!r}") from None
        if not values:
            return self.empty()
        return self.canonicalise(Population({k: np.stack(v) for k, v in columns.items()}))

    def neighbours(self, candidate: Population) -> Population:
        """All feasible single-element moves from a population of one, each once.

        Elements that a move switches on stand at their neutral value; ordered values that thereby
        come too close make room.

        Raises:
            SpaceError: not exactly one candidate.
        """
        if len(candidate) != 1:
            raise SpaceError(f"neighbours of {len(candidate)} candidates; allowed: one")
        active = self.active(candidate)
        parts = []
        for key, variable in self.variables.items():
            moved = variable.neighbours(candidate[key][0], active[key][0])
            if len(moved):
                columns = {
                    other: np.repeat(column, len(moved), axis=0)
                    for other, column in candidate.columns.items()
                }
                parts.append(self._repair_bounds(Population({**columns, key: moved})))
        if not parts:
            return self.empty()
        out = Population.concat(parts)
        seen = set(self.keys(self.canonicalise(candidate)))
        fresh = self.is_feasible(out)
        for row, own in enumerate(self.keys(out)):
            fresh[row] &= own not in seen
            seen.add(own)
        return out.take(fresh)

    # -- description ------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything that `space_from_json` needs; also the YAML form of a space file."""
        out: dict[str, Any] = {
            "variables": {key: variable.to_json() for key, variable in self.variables.items()}
        }
        if self.constraints:
            out["constraints"] = [
                {
                    "name": budget.name,
                    "table": {key: table.tolist() for key, table in budget.table.items()},
                    "upper": budget.upper if np.isfinite(budget.upper) else None,
                    "lower": budget.lower if np.isfinite(budget.lower) else None,
                    "offset": budget.offset,
                }
                for budget in self.constraints
            ]
        return out

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of names, types, bounds, labels, budgets and the encoding's version."""
        text = json.dumps({"encoding": _ENCODING_VERSION, **self.to_json()}, sort_keys=True)
        return blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.variables)})"


def _fits_into(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether arrays of a shape broadcast to another shape without enlarging it."""
    try:
        return np.broadcast_shapes(shape, other) == other
    except ValueError:
        return False


def space_from_json(data: Mapping[str, Any]) -> Space:
    """Reads a space from JSON or from a YAML file's content.

    Raises:
        SpaceError: names what stands there and what is allowed.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("variables"), Mapping):
        raise SpaceError("a space file needs a mapping 'variables'")
    extra = set(data) - {"variables", "constraints", "name"}
    if extra:
        raise SpaceError(
            f"space file has keys {sorted(map(str, extra))}; allowed: variables, constraints, name"
        )
    variables = {str(k): variable_from_json(str(k), v) for k, v in data["variables"].items()}
    constraints = []
    allowed = {"table", "upper", "lower", "name", "offset"}
    for part in data.get("constraints") or ():
        if not isinstance(part, Mapping) or set(part) - allowed:
            raise SpaceError(f"constraint {part!r}; allowed: a mapping of {sorted(allowed)}")
        try:
            upper, lower = part.get("upper"), part.get("lower")
            constraints.append(
                LinearBudget(
                    part["table"],
                    upper=np.inf if upper is None else float(upper),
                    lower=-np.inf if lower is None else float(lower),
                    name=str(part.get("name", "budget")),
                    offset=float(part.get("offset", 0.0)),
                )
            )
        except SpaceError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise SpaceError(f"constraint {part!r} cannot be read ({error})") from None
    return Space(variables, constraints=constraints, name=str(data.get("name", "space")))
