"""Coordinate-wise sensitivity: one element changed at a time, and the table that comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Seeds
from searchlab.algorithms.simple import Listed
from searchlab.config import Answers
from searchlab.constraints import Tie
from searchlab.errors import ConfigError
from searchlab.evaluator import Evaluator, Fidelity, Objective, Reproducibility, Signal
from searchlab.population import OK, Evaluations, Jobs, Population
from searchlab.repair import option_prices
from searchlab.space import Space
from searchlab.variables import Choice, Integer

__all__ = ["Elements", "Profile", "ProfileTable", "Replicated", "isotonic", "profile_space"]

Array = NDArray[Any]

MOST_LABELS = 1024  # of one element


@dataclass(frozen=True, eq=False)
class Elements:
    """The elements of a space of choices and integers, each with its labels by number.

    Tied elements are one, with the sum of their costs.

    Raises:
        ConfigError: a variable that has no labels, or a condition.
    """

    space: Space

    def __post_init__(self) -> None:
        for key, variable in self.space.variables.items():
            fit = isinstance(variable, Choice | Integer) and not variable.when
            if not fit:
                what = variable.kind + " with a condition" * bool(variable.when)
                raise ConfigError(
                    f"{key!r} is a {what}; allowed for a separable program: choices and integers "
                    "without conditions (evolution serves every space)"
                )
            if isinstance(variable, Integer) and variable.unit_count > MOST_LABELS:
                raise ConfigError(
                    f"{key!r} has {variable.unit_count} values; allowed for a separable program: "
                    f"at most {MOST_LABELS} (see `step`, or evolution)"
                )

    @cached_property
    def leaders(self) -> NDArray[np.int64]:
        """Which element of the space each element here is."""
        follow = {i for group in self.space.tied for i in group[1:]}
        return np.array([i for i in range(self.space.size) if i not in follow])

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        parts = [
            np.full(variable.size, variable.unit_count or 0)
            for variable in self.space.variables.values()
        ]
        return np.concatenate(parts)

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """Which labels exist, bool (e, k)."""
        counts = self._counts[self.leaders]
        return np.arange(counts.max()) < counts[:, None]

    def codes(self, population: Population) -> NDArray[np.int64]:
        """The label of every element, int64 (n, e)."""
        parts = []
        for key, variable in self.space.variables.items():
            flat = population[key].reshape(len(population), variable.size).astype(np.int64)
            if isinstance(variable, Integer):
                flat = (flat - variable.low) // variable.step
            parts.append(flat)
        return np.concatenate(parts, axis=1)[:, self.leaders]

    def population(self, codes: Array) -> Population:
        """Candidates of labels (n, e), canonical; budgets are not looked at."""
        full = np.zeros((len(codes), self.space.size), dtype=np.int64)
        full[:, self.leaders] = codes
        columns, start = {}, 0
        for key, variable in self.space.variables.items():
            part = full[:, start : start + variable.size]
            if isinstance(variable, Integer):
                part = variable.low + part * variable.step
            columns[key] = part.astype(variable.dtype).reshape(len(codes), *variable.shape)
            start += variable.size
        return self.space.canonicalise(Population(columns))

    @cached_property
    def costs(self) -> NDArray[np.float64]:
        """What every label costs in every budget, float64 (b, e, k)."""
        budgets = self.space.budgets
        full = np.zeros((len(budgets), self.space.size, self.allowed.shape[1]))
        start = 0
        for key, variable in self.space.variables.items():
            if any(key in budget.table for budget in budgets):
                assert isinstance(variable, Choice | Integer)
                prices = option_prices(key, variable, budgets).transpose(2, 1, 0)
                full[:, start : start + variable.size, : prices.shape[2]] = prices
            start += variable.size
        for leader, *others in self.space.tied:
            full[:, leader] += full[:, others].sum(axis=1)
        return full[:, self.leaders]

    def named(self, element: int) -> str:
        """An element in words."""
        number, start = int(self.leaders[element]), 0
        for key, variable in self.space.variables.items():
            if number < start + variable.size:
                place = np.unravel_index(number - start, variable.shape) if variable.shape else ()
                return f"{key}{[int(i) for i in place] or ''}"
            start += variable.size
        raise IndexError(element)


def profile_space(space: Space) -> Space:
    """The same variables and ties without budgets and predicates.

    A profile changes one element of a reference at a time, and few of those candidates keep a
    budget: they are measured all the same, as points that say what an element is worth.

    Raises:
        ConfigError: a space of its own class with constraints, whose rules cannot be taken off.
    """
    if all(isinstance(part, Tie) for part in space.constraints):
        return space
    if type(space) is not Space:
        raise ConfigError(
            f"profile of {type(space).__name__} with constraints; allowed: a plain Space "
            "(evolution serves every space)"
        )
    ties = [part for part in space.constraints if isinstance(part, Tie)]
    return Space(space.variables, constraints=ties, name=f"{space.name} without budgets")


def profile_plan(space: Space, reference: Mapping[str, Any] | None) -> Seeds:
    """The reference, then every other label of every element, one at a time."""
    elements = Elements(space)
    if reference is None:
        base = elements.allowed.sum(axis=1) - 1
    else:
        base = elements.codes(space.population([reference]))[0]
    codes, origin = [base], ["profile:reference"]
    for element, label in np.argwhere(elements.allowed).tolist():
        if label != base[element]:
            row = base.copy()
            row[element] = label
            codes.append(row)
            origin.append(f"profile:{element}:{label}")
    return Seeds(elements.population(np.array(codes)), tuple(origin))


class Profile(Listed):
    """Measures a reference and every candidate that differs from it in one element.

    All are measured under the same replicate, so that differences are paired. Tied elements change
    together. Ends by itself.

    Args:
        space, seed, first_id, seeds, quantum: see `Listed`; seeds come before the profile.
        reference: values by name; by default the last label (the highest number) everywhere.

    Raises:
        ConfigError: variables without labels; a space that refuses candidates of the profile.
    """

    name: ClassVar[str] = "profile"
    pools = False

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        quantum: int = 1,
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        plan = profile_plan(space, reference)
        refused = int((~space.is_feasible(plan.population)).sum())
        if refused:
            raise ConfigError(
                f"the space refuses {refused} of the {len(plan.origin)} candidates of the profile; "
                "allowed: searchlab.algorithms.profile.profile_space(space), or the algorithm "
                "evolution"
            )
        seeds = plan if seeds is None else seeds.joined(plan)
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds, quantum=quantum)
        self.reference = None if reference is None else dict(reference)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "reference": self.reference}


@dataclass(frozen=True, eq=False)
class ProfileTable:
    """What every label of every element adds to the reference's loss.

    Attributes:
        losses: float64 (e, k), zero for the reference's own labels; NaN where nothing stands.
        std_error: float64 (e, k), of paired differences; NaN with a single replicate.
        base: int64 (e,), the reference.
        loss: what the reference loses itself.
    """

    losses: NDArray[np.float64]
    std_error: NDArray[np.float64]
    base: NDArray[np.int64]
    loss: float

    @classmethod
    def of(cls, answers: Answers) -> ProfileTable:
        """The table of a finished profile; several objectives are replicates of one.

        Raises:
            ConfigError: the reference or an entry is missing or failed (names the element).
        """
        elements = Elements(answers.space)
        codes, origin = elements.codes(answers.population), answers.origin
        if "profile:reference" not in origin:
            raise ConfigError("the profile has no reference; allowed: answers of `profile`")
        at = origin.index("profile:reference")
        base, own = codes[at], answers.losses[at]
        shape = elements.allowed.shape
        mean, error = np.full(shape, np.nan), np.full(shape, np.nan)
        mean[np.arange(shape[0]), base] = 0.0
        error[np.arange(shape[0]), base] = 0.0
        differ = codes != base
        for row in np.flatnonzero(differ.sum(axis=1) == 1).tolist():
            place = int(differ[row].argmax())
            change = answers.losses[row] - own
            mean[place, codes[row, place]] = change.mean()
            if len(change) > 1:
                spread = change.std(ddof=1) if np.isfinite(change).all() else np.nan
                error[place, codes[row, place]] = spread / np.sqrt(len(change))
        table = cls(mean, error, base, float(own.mean()))
        bad = np.argwhere(elements.allowed & ~np.isfinite(mean))
        if len(bad) or not np.isfinite(own).all():
            what = (
                "the reference"
                if not len(bad)
                else (f"label {bad[0, 1]} of element {elements.named(int(bad[0, 0]))}")
            )
            raise ConfigError(
                f"the profile has no finite value of {what} ({max(len(bad), 1)} missing); allowed: "
                "all of them (a larger budget, or an evaluator that does not fail there)"
            )
        return table

    def monotone(self, order: Array, floor: float = 0.0) -> ProfileTable:
        """Cleaned: the floor taken off, and no label worse than one before it in the order.

        Args:
            order: float64 (e, k), by which labels are sorted; the loss falls along it.
            floor: what is measured where nothing was changed (noise power, rounding).
        """
        out = np.array(self.losses)
        for element, row in enumerate(self.losses):
            at = np.flatnonzero(np.isfinite(row))
            at = at[np.argsort(order[element, at], kind="stable")]
            error = self.std_error[element, at]
            known = np.isfinite(error) & (error > 0)
            least = error[known].min() if known.any() else 1.0
            weight = 1.0 / np.where(known, error, least) ** 2
            out[element, at] = -isotonic(-(row[at] - floor), weight)
        return replace(self, losses=out)


def isotonic(values: Sequence[float] | Array, weights: Array | None = None) -> Array:
    """The nearest rising sequence in weighted squares, by pooling adjacent violators."""
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, mass, count = pools.pop()
            both = mass + pool[1]
            pool = ((mean * mass + pool[0] * pool[1]) / both, both, count + pool[2])
        pools.append(pool)
    return np.repeat([mean for mean, _, _ in pools], [count for _, _, count in pools])


@dataclass
class Replicated:
    """An evaluator that measures each candidate under several replicates, as objectives apart.

    Replicate r is the same noise for all candidates, so that differences are paired within each.
    One job costs as many evaluations as there are replicates.

    Attributes:
        inner: the evaluator of one objective that is asked.
        replicates: 0 .. replicates - 1 are measured.
    """

    inner: Evaluator
    replicates: int

    def __post_init__(self) -> None:
        if len(self.inner.objectives) != 1 or not 2 <= self.replicates <= 64:
            raise ConfigError(
                f"{self.replicates} replicates of {len(self.inner.objectives)} objectives; "
                "allowed: 2 to 64 of one"
            )

    @property
    def objectives(self) -> tuple[Objective, ...]:
        one = self.inner.objectives[0]
        return tuple(replace(one, name=f"{one.name}@{r}") for r in range(self.replicates))

    @property
    def fidelities(self) -> tuple[Fidelity, ...]:
        return self.inner.fidelities

    @property
    def signals(self) -> tuple[Signal, ...]:
        return ()

    @property
    def reproducibility(self) -> Reproducibility:
        return self.inner.reproducibility

    def setup(self) -> None:
        self.inner.setup()

    def evaluate(self, jobs: Jobs) -> Evaluations:
        parts = [
            self.inner.evaluate(replace(jobs, replicate=jobs.replicate + r))
            for r in range(self.replicates)
        ]
        states = np.stack([part.state for part in parts if part.state is not None])
        reasons = [part.reason or [""] * len(jobs) for part in parts]
        worst = (states != OK).argmax(axis=0)
        return Evaluations(
            values=np.concatenate([part.values for part in parts], axis=1),
            state=states[worst, np.arange(len(jobs))],
            reason=[reasons[r][i] for i, r in enumerate(worst.tolist())],
        )

    def identity(self) -> Mapping[str, Any]:
        return {**self.inner.identity(), "replicates": self.replicates}
