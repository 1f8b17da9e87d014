"""Spaces: named variables and constraints; valid by construction, one row per candidate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from searchlab._conditions import check_conditions
from searchlab.budget import REPAIR_WIDTH, LinearBudget
from searchlab.constraints import Predicate, Tie, tied_places
from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.repair import repair_budgets
from searchlab.uniforms import derived
from searchlab.variables import ActiveBelow, Choice, Variable

if TYPE_CHECKING:
    from searchlab._feasible_sampler import FeasibleSampler

__all__ = ["KEY_BYTES", "Constraint", "Space", "Tokens", "space_from_json"]

KEY_BYTES = 16
_ENCODING_VERSION = 1
_PREDICATE_WIDTH = 2  # uniforms per candidate that all further tries are derived from

Array = NDArray[Any]
Constraint = LinearBudget | Tie | Predicate


class Tokens(NamedTuple):
    """Candidates as sequences with one token per element, in declaration order.

    Attributes:
        codes: int32 (n, size), codes of choices and masks of subsets; zero for numbers.
        values: float32 (n, size), numbers scaled as in `encode`; zero for labels.
        active: bool (n, size); what is not active is zero in both.
    """

    codes: NDArray[np.int32]
    values: NDArray[np.float32]
    active: NDArray[np.bool_]


class Space:
    """What may vary.

    Every method takes and returns whole populations. Randomness comes in as uniforms, so that a
    row is a function of its own uniforms and of nothing else.

    Args:
        variables: name -> variable, in declaration order; also accepted as keywords.
        constraints: budgets, ties and predicates that every candidate keeps.
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
        constraints: Sequence[Constraint] = (),
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
        check_conditions(self.variables)
        for part in self.constraints:
            if not isinstance(part, Constraint):
                raise SpaceError(
                    f"constraint {part!r}; allowed: a LinearBudget, a Tie or a Predicate"
                )
            if not isinstance(part, Predicate):
                part.check(self.variables)
        for kind, parts in (("budgets", self.budgets), ("predicates", self.predicates)):
            names = [part.name for part in parts]
            if len(set(names)) < len(names):
                raise SpaceError(f"{kind} have equal names: {names}")

    @cached_property
    def budgets(self) -> tuple[LinearBudget, ...]:
        """The constraints that are budgets."""
        return tuple(part for part in self.constraints if isinstance(part, LinearBudget))

    @cached_property
    def predicates(self) -> tuple[Predicate, ...]:
        """The constraints that are functions of the user."""
        return tuple(part for part in self.constraints if isinstance(part, Predicate))

    @cached_property
    def tied(self) -> list[list[int]]:
        """Groups of element numbers with equal values, the leader first."""
        ties = [part for part in self.constraints if isinstance(part, Tie)]
        return tied_places(ties, self.variables)

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
        return REPAIR_WIDTH * len(self.budgets) + _PREDICATE_WIDTH * bool(self.predicates)

    @cached_property
    def code_width(self) -> int:
        """Columns of `encode`."""
        return sum(variable.code_width for variable in self.variables.values())

    # -- candidates -------------------------------------------------------------------------

    def empty(self) -> Population:
        """A population of no candidates."""
        return Population({k: np.empty((0, *v.shape), v.dtype) for k, v in self.variables.items()})

    def sample(self, u: Array) -> Population:
        """Random valid candidates from uniforms (n, sample_width).

        Where the constraints leave few enough candidates to list, or one budget can be counted,
        every candidate is as likely as any other; see `FeasibleSampler` for what else is done.
        """
        population, rest = self._draw(u)
        population = self._within_budgets(population, rest, fewest=False)
        return self._fulfil(population, rest, near=False) if self.predicates else population

    def _draw(self, u: Array) -> tuple[Population, Array]:
        """Candidates within the bounds of each variable, and the uniforms that are left."""
        columns: dict[str, Array] = {}
        active: dict[str, Array] = {}
        start = 0
        for key, variable in self.variables.items():
            active[key] = self.activity(key, columns, active, len(u))
            block = u[:, start : start + variable.width]
            columns[key] = variable.sample(block, active[key] if variable.when else None)
            start += variable.width
        population = Population(columns)
        if self._sampler is not None and len(u):
            population = self._sampler(population, u)
        return population, u[:, start:]

    @cached_property
    def _sampler(self) -> FeasibleSampler | None:
        if not (self.constraints or self.conditional):
            return None
        from searchlab._feasible_sampler import feasible_sampler

        return feasible_sampler(self)

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
        if self.tied:
            population = self._follow(population)
        if not self.conditional:
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

    @cached_property
    def _places(self) -> list[tuple[str, int]]:
        """The variable of each element, and the element's number in it."""
        return [(key, i) for key, variable in self.variables.items() for i in range(variable.size)]

    def _follow(self, population: Population) -> Population:
        """Every tied element takes the value of its leader."""
        columns = dict(population.columns)
        for leader, *others in self.tied:
            key, inner = self._places[leader]
            value = columns[key].reshape(len(population), self.variables[key].size)[:, inner]
            for other in others:
                key, inner = self._places[other]
                flat = np.array(columns[key]).reshape(len(population), self.variables[key].size)
                flat[:, inner] = value
                columns[key] = flat.reshape(columns[key].shape)
        return Population(columns)

    def spread_ties(self, mask: Array) -> Array:
        """Flags (n, size) of elements, with each leader flagged where one of its group is."""
        for group in self.tied:
            mask[:, group[0]] = mask[:, group].any(axis=1)
        return mask

    def repair(self, population: Population, u: Array) -> Population:
        """Valid candidates near the given ones, canonical; uniforms (n, repair_width)."""
        population = self._within_budgets(population, u)
        return self._fulfil(population, u, near=True) if self.predicates else population

    def _within_budgets(
        self, population: Population, u: Array, *, fewest: bool = True
    ) -> Population:
        """Bounds, ties and budgets are kept; predicates are not looked at."""
        population = self._repair_bounds(population)
        if not self.budgets:
            return population
        population = repair_budgets(
            population,
            u[:, : REPAIR_WIDTH * len(self.budgets)],
            variables=self.variables,
            budgets=self.budgets,
            tied=self.tied,
            active_of=self.active,
            canonicalise=self.canonicalise,
            revive=self._revive,
            fewest=fewest,
        )
        # A budget may have switched elements on: they take their place among their neighbours.
        return self._repair_bounds(population) if self.conditional else population

    def _predicates_hold(self, population: Population) -> NDArray[np.bool_]:
        ok = np.ones(len(population), dtype=bool)
        for predicate in self.predicates:
            ok &= predicate.holds(population.columns, len(population))
        return ok

    def _fulfil(self, population: Population, u: Array, *, near: bool) -> Population:
        """Replaces the rows that a predicate refuses, by near ones first or by fresh ones only."""
        rows = np.flatnonzero(~self._predicates_hold(population))
        if not len(rows):
            return population
        columns = {key: np.array(column) for key, column in population.columns.items()}
        tries = max(predicate.tries for predicate in self.predicates)
        for attempt in range(tries):
            seeds = u[rows, -_PREDICATE_WIDTH:]
            if near and attempt < tries * 3 // 4:
                trial = self._near(population.take(rows), seeds, attempt)
            else:
                trial, rest = self._draw(derived(seeds, attempt, self.sample_width))
                trial = self._within_budgets(trial, rest, fewest=False)
            good = self._predicates_hold(trial)
            for key, column in columns.items():
                column[rows[good]] = trial[key][good]
            rows = rows[~good]
            if not len(rows):
                return Population(columns)
        names = ", ".join(repr(predicate.name) for predicate in self.predicates)
        raise SpaceError(
            f"predicate {names}: nothing feasible found in {tries} tries; allowed: predicates that "
            "random candidates fulfil (loosen them, raise `tries`, or write them as budgets)"
        )

    def _near(self, population: Population, seeds: Array, attempt: int) -> Population:
        """One changed element at least, and the more the more attempts have failed."""
        n, own = len(population), self.sample_width - self.repair_width
        u = derived(seeds, attempt, 1 + self.size + self.sample_width)
        mask = u[:, 1 : 1 + self.size] < (attempt / 16) / self.size
        mask[np.arange(n), (u[:, 0] * self.size).astype(np.int64)] = True
        mask, u = self.spread_ties(mask), u[:, 1 + self.size :]
        active = self.active(population)
        columns, start, at = {}, 0, 0
        for key, variable in self.variables.items():
            flags = mask[:, start : start + variable.size].reshape(n, *variable.shape)
            columns[key] = variable.mutate(
                population[key],
                flags & active[key],
                u[:, at : at + variable.width],
                active[key] if variable.when else None,
            )
            start, at = start + variable.size, at + variable.width
        moved = self._revive(population, Population(columns), u)
        return self._within_budgets(moved, u[:, own:], fewest=False)

    @cached_property
    def conditional(self) -> bool:
        """Whether any variable has conditions."""
        return any(variable.when for variable in self.variables.values())

    def _repair_bounds(self, population: Population) -> Population:
        """Each variable within its own bounds, canonical; budgets are not looked at."""
        if self.tied:
            population = self._follow(population)
        columns = dict(population.columns)
        active: dict[str, Array] = {}
        for key, variable in self.variables.items():
            if self.conditional:
                active[key] = self.activity(key, columns, active, len(population))
            where = active[key] if variable.when else None
            columns[key] = variable.repair(np.asarray(columns[key]), where)
        same = all(column is population[key] for key, column in columns.items())
        return self.canonicalise(population if same else Population(columns))

    def _revive(self, before: Population, after: Population, u: Array) -> Population:
        """Draws the elements that a change made active, and canonicalises."""
        if self.conditional:
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
        """Which rows keep bounds, budgets, ties and predicates, bool (n,)."""
        active = self.active(population)
        ok = np.ones(len(population), dtype=bool)
        for key, variable in self.variables.items():
            ok &= variable.valid(population[key], active[key])
        for budget in self.budgets:
            # Only sums of values within bounds are defined.
            cost = np.full(len(ok), np.nan)
            cost[ok] = budget.cost(
                self.variables,
                population.take(ok),
                {key: flags[ok] for key, flags in active.items()},
            )
            ok &= budget.holds(cost)
        if self.tied:
            tied = self._follow(population)
            for key, variable in self.variables.items():
                same = (tied[key] == population[key]).reshape(len(ok), variable.size)
                ok &= same.all(axis=1)
        if self.predicates:
            ok[ok] = self._predicates_hold(population.take(ok))
        return ok

    def cost(self, population: Population) -> dict[str, NDArray[np.float64]]:
        """Static figures per candidate, float64 (n,) each: the sums of the budgets.

        A domain space adds its own (bytes, steps, table latency).
        """
        active = self.active(population)
        return {b.name: b.cost(self.variables, population, active) for b in self.budgets}

    def count(self, limit: int = 1_000_000) -> int | None:
        """How many different feasible candidates there are, exactly; None = not known.

        Products and single budgets are counted without listing anything; everything else is
        listed, as long as no more than `limit` partial candidates are held at once. None also
        stands for spaces with real numbers that are not on a grid.
        """
        from searchlab.enumeration import count

        return count(self, limit=limit)

    def enumerate(self, limit: int = 100_000) -> Population:
        """All feasible candidates, canonical, each once.

        Raises:
            SpaceError: real numbers that are not on a grid, or more than `limit` candidates
                (or partial ones, which no bound excludes).
        """
        from searchlab.enumeration import enumerate_space

        return enumerate_space(self, limit=limit)

    def keys(self, population: Population) -> tuple[bytes, ...]:
        """Canonical keys of canonical candidates: blake2b of the row's bytes, 16 bytes each."""
        raw, width = self._packed(population)
        size = KEY_BYTES
        starts = range(0, width * len(population), width)
        return tuple([blake2b(raw[i : i + width], digest_size=size).digest() for i in starts])

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

    def tokens(self, population: Population) -> Tokens:
        """One token per element, for predictors that read sequences."""
        active = self.active(population)
        n = len(population)
        parts = [v.tokens(population[k], active[k]) for k, v in self.variables.items()]
        return Tokens(
            np.concatenate([codes for codes, _ in parts], axis=1),
            np.concatenate([values for _, values in parts], axis=1),
            np.concatenate(
                [active[k].reshape(n, v.size) for k, v in self.variables.items()], axis=1
            ),
        )

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
        """All feasible smallest moves from a population of one, each once.

        One element changes, or two members of a subset change places; elements that are tied to a
        moved one go with it. Elements that a move switches on stand at their neutral value; ordered
        values that thereby come too close make room.

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
            out["constraints"] = [part.to_json() for part in self.constraints]
        return out

    def to_yaml(self) -> str:
        """The space as the text of a YAML file; predicates are named only."""
        from searchlab.space_file import space_to_yaml

        return space_to_yaml(self)

    @staticmethod
    def from_yaml(source: str | Path, *, predicates: Sequence[Predicate] = ()) -> Space:
        """Reads a YAML file (a path) or its text.

        Args:
            source: a path, or text with at least one line break or colon in it.
            predicates: the functions that the file names.

        Raises:
            SpaceError: what stands there and what is allowed.
        """
        from searchlab.space_file import space_from_yaml

        return space_from_yaml(source, predicates=predicates)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of names, types, bounds, labels, budgets and the encoding's version."""
        text = json.dumps({"encoding": _ENCODING_VERSION, **self.to_json()}, sort_keys=True)
        return blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.variables)})"


def space_from_json(data: Mapping[str, Any], *, predicates: Sequence[Predicate] = ()) -> Space:
    """Reads what `Space.to_json` gives, or a YAML file's content, see `space_file.read_space`.

    Raises:
        SpaceError: names what stands there and what is allowed.
    """
    from searchlab.space_file import read_space

    return read_space(data, predicates=predicates)
