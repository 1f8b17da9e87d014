"""Search seeded by a separable program: profile, program, then moves that true values judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Seeds
from searchlab.algorithms.evolution import Evolution, ParentRule
from searchlab.algorithms.profile import (
    Elements,
    Profile,
    ProfileTable,
    Replicated,
    profile_space,
)
from searchlab.algorithms.variation import UniformVariation
from searchlab.config import AlgorithmSpec, Answers, Budget, Stage
from searchlab.errors import ConfigError
from searchlab.evaluator import Evaluator
from searchlab.population import Population
from searchlab.programs import Limit, SeparableProgram
from searchlab.space import Space
from searchlab.uniforms import derived

if TYPE_CHECKING:
    from searchlab.result import Result

__all__ = [
    "Additivity",
    "AdoptProfile",
    "ProgramSeeds",
    "ProgramVariation",
    "Separable",
    "additivity",
    "program_of",
    "stages",
]

Array = NDArray[Any]

DRAWS = 32  # changes that a move chooses among


def program_of(space: Space, losses: Array) -> SeparableProgram:
    """A space's budgets over a table of losses (e, k) of its elements (see `Elements`)."""
    elements = Elements(space)
    limits = [
        Limit(costs, budget.upper - budget.offset, budget.lower - budget.offset, budget.name)
        for budget, costs in zip(space.budgets, elements.costs, strict=True)
    ]
    return SeparableProgram(losses, limits, elements.allowed)


@dataclass(frozen=True)
class ProgramSeeds(Seeds):
    """Seeds with what a change of one element is predicted to cost.

    Attributes:
        priced: float64 (e, k), loss plus the price of the budgets it uses; None = not known.
    """

    priced: NDArray[np.float64] | None = None

    def joined(self, more: Seeds) -> Seeds:
        both = super().joined(more)
        return replace(self, population=both.population, origin=both.origin)


@dataclass(frozen=True)
class AdoptProfile:
    """Turns a profile into seeds: the program's optimum, then plans of the front below it.

    Attributes:
        front: how many plans besides the optimum.
        monotone: clean the table: more of the first budget never hurts.
        floor: taken off every entry of the table, see `ProfileTable.monotone`.
    """

    front: int = 8
    monotone: bool = False
    floor: float = 0.0

    def __call__(self, answers: Answers, space: Space) -> Seeds:
        elements = Elements(space)
        table = ProfileTable.of(answers)
        if self.monotone:
            if not space.budgets:
                raise ConfigError("monotone without a budget; allowed: with a budget")
            table = table.monotone(elements.costs[0], self.floor)
        program = program_of(space, table.losses)
        best = program.solve()
        plans, origin = [best.labels], ["program:optimum"]
        if len(space.budgets) == 1:
            front = program.front()
            points = np.arange(len(front))[::-1][: self.front]
            plans += list(front.labels(points)) if len(points) else []
            origin += [f"program:front{i}" for i in range(len(points))]
        population = elements.population(np.array(plans))
        width = max(1, space.repair_width)
        population = space.repair(population, np.full((len(plans), width), 0.5))
        priced = np.where(elements.allowed, table.losses, np.inf)
        for price, costs in zip(best.prices.values(), elements.costs, strict=True):
            priced = priced + price * costs
        return ProgramSeeds(population, tuple(origin), priced)


@dataclass(frozen=True, eq=False)
class ProgramVariation:
    """Moves of budget between elements, the likelier the less they are predicted to cost.

    A child changes one element of its parent and, where that breaks a budget (or leaves one
    unused), a second one so that the budgets hold. Both are drawn by rank of their predicted change
    among `DRAWS` random ones. Other children come from `UniformVariation`. The space repairs what
    two changes cannot mend.

    Attributes:
        priced: float64 (e, k), see `ProgramSeeds`; None = changes are drawn evenly.
        share: of children that are made like this.
    """

    priced: NDArray[np.float64] | None
    share: float = 0.5
    other: UniformVariation = field(default_factory=UniformVariation)

    def settings(self) -> dict[str, Any]:
        return {"name": "program", "share": self.share, "other": self.other.settings()}

    def width(self, space: Space) -> int:
        return 4 + self.other.width(space)

    def vary(
        self,
        space: Space,
        a: Population,
        b: Population,
        u: Array,
        *,
        strength: float = 1.0,
        targets: Array | None = None,
    ) -> Population:
        mine = u[:, 0] < self.share
        order = np.concatenate([np.flatnonzero(mine), np.flatnonzero(~mine)])
        parts = []
        if mine.any():
            parts.append(self._moved(space, a.take(mine), u[mine], strength))
        if not mine.all():
            rest = ~mine
            parts.append(
                self.other.vary(space, a.take(rest), b.take(rest), u[rest, 4:], strength=strength)
            )
        return Population.concat(parts).take(np.argsort(order, kind="stable"))

    def _moved(self, space: Space, a: Population, u: Array, strength: float) -> Population:
        elements = _elements(space)
        codes = elements.codes(a)
        lower = np.array([x.lower - x.offset - x.slip for x in space.budgets])
        upper = np.array([x.upper - x.offset + x.slip for x in space.budgets])
        moves = 1 + int(np.log2(max(strength, 1.0)) / 2)
        for number in range(moves):
            draws = derived(u[:, 1:4], number, 4 * DRAWS + 3)
            first = self._change(elements, codes, draws[:, : 2 * DRAWS], draws[:, -1])
            rows = np.arange(len(codes))
            codes[rows, first[0]] = first[1]
            if not len(lower):
                continue
            spent = elements.costs[:, np.arange(codes.shape[1])[None], codes].sum(axis=2).T
            holds = ((spent >= lower) & (spent <= upper)).all(axis=1)
            again = ~holds | (draws[:, -2] < 0.5)
            second = self._change(
                elements,
                codes,
                draws[:, 2 * DRAWS : 4 * DRAWS],
                draws[:, -3],
                within=(spent, lower, upper),
                besides=first[0],
            )
            again &= second[0] >= 0
            codes[rows[again], second[0][again]] = second[1][again]
        return space.repair(elements.population(codes), u[:, -max(1, space.repair_width) :])

    def _change(
        self,
        elements: Elements,
        codes: Array,
        draws: Array,
        chance: Array,
        within: tuple[Array, Array, Array] | None = None,
        besides: Array | None = None,
    ) -> tuple[Array, Array]:
        """Element and label of one change per row; -1 where none of those drawn fits."""
        counts = elements.allowed.sum(axis=1)
        place = (draws[:, ::2] * codes.shape[1]).astype(np.int64)
        now = np.take_along_axis(codes, place, 1)
        step = 1 + (draws[:, 1::2] * np.maximum(counts[place] - 1, 1)).astype(np.int64)
        label = (now + step) % counts[place]
        if self.priced is None:
            score = draws[:, 1::2]
        else:
            score = self.priced[place, label] - self.priced[place, now]
        fits = label != now
        if within is not None and besides is not None:
            spent, lower, upper = within
            added = elements.costs[:, place, label] - elements.costs[:, place, now]
            sums = spent.T[:, :, None] + added
            fits &= ((sums >= lower[:, None, None]) & (sums <= upper[:, None, None])).all(axis=0)
            fits &= place != besides[:, None]
        order = np.argsort(np.where(fits, score, np.inf), axis=1, kind="stable")
        number = fits.sum(axis=1)
        # Log-uniform ranks: the best is the likeliest, and none is left out.
        rank = np.minimum((number + 1.0) ** chance, np.maximum(number, 1)).astype(np.int64) - 1
        pick = order[np.arange(len(codes)), rank]
        rows = np.arange(len(codes))
        none = -1 if within is not None else place[:, 0]
        chosen = np.where(number > 0, place[rows, pick], none)
        return chosen, np.where(number > 0, label[rows, pick], now[rows, 0])


def _elements(space: Space) -> Elements:
    """The elements of a space, looked up once."""
    known = vars(space).get("_program_elements")
    if known is None:
        known = vars(space)["_program_elements"] = Elements(space)
    assert isinstance(known, Elements)
    return known


class Separable(Evolution):
    """Evolution among a program's plans: true values decide, predicted ones propose.

    Sums of single changes lie where elements interact, so the program's optimum is where this
    search begins. Its usual form is the second of two stages (see `stages`): the first measures
    the profile. Alone it has no predictions and draws its moves evenly.

    Args:
        space: choices and integers without conditions.
        seed, first_id, seeds, repeats, n_random, parents, quantum: see `Evolution`.
        share: of children that are moves of budget between elements.
    """

    name: ClassVar[str] = "separable"
    pools = False

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        repeats: Literal["redraw", "allow"] = "redraw",
        n_random: int = 0,
        parents: ParentRule | None = None,
        quantum: int = 1,
        share: float = 0.5,
    ) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"share {share}; allowed: 0 to 1")
        elements = _elements(space)
        priced = seeds.priced if isinstance(seeds, ProgramSeeds) else None
        if priced is not None and priced.shape != elements.allowed.shape:
            raise ConfigError(
                f"predictions of shape {priced.shape}; allowed: {elements.allowed.shape}"
            )
        super().__init__(
            space,
            seed=seed,
            first_id=first_id,
            seeds=seeds,
            repeats=repeats,
            n_random=n_random,
            parents=parents,
            variation=ProgramVariation(priced, share),
            quantum=quantum,
        )

    @staticmethod
    def notes(result: Result) -> list[str]:
        """How additive the space turned out to be, where there was a profile."""
        try:
            return [f"{additivity(result)}."]
        except ConfigError:
            return []

    @staticmethod
    def expand(stage: Stage) -> tuple[Stage, ...]:
        """The profile and the search of a stage whose budget covers both."""
        first, second = stages(
            stage.space,
            stage.evaluator,
            stage.budget,
            options=stage.algorithm.options,
        )
        # What else the stage was given (baselines, which objective steers) stays with the search.
        return first, replace(stage, budget=second.budget, adopt=second.adopt)


def stages(
    space: Space,
    evaluator: Evaluator,
    budget: int | Budget,
    *,
    reference: Mapping[str, Any] | None = None,
    replicates: int = 1,
    adopt: AdoptProfile | None = None,
    options: Mapping[str, Any] | None = None,
    seeds: Seeds | None = None,
) -> tuple[Stage, Stage]:
    """The two stages of a search by a separable program.

    Args:
        space: what may vary, with its budgets.
        evaluator: of one objective.
        budget: evaluations of both stages together, the profile's included.
        reference: values by name that the profile departs from; the last labels by default.
        replicates: of the profile; 2 and more give standard errors and cost as many evaluations.
        adopt: how the table becomes seeds.
        options: of `Separable`.
        seeds: baselines of the search; the profile measures none.

    Raises:
        ConfigError: a space without a profile, a budget that the profile uses up.
    """
    limit = budget if isinstance(budget, Budget) else Budget(budget)
    if len(evaluator.objectives) != 1:
        raise ConfigError(
            f"separable with {len(evaluator.objectives)} objectives; allowed: one (nsga2 or nsga3 "
            "serve several)"
        )
    wide = profile_space(space)
    jobs = len(Profile(wide, reference=reference).seeds.origin)
    paid = jobs * replicates
    if limit.evaluations is None or limit.evaluations <= paid:
        raise ConfigError(
            f"budget of {limit.evaluations} evaluations where the profile alone takes {paid}; "
            f"allowed: {paid + 1} or more (evolution needs no profile)"
        )
    judge = evaluator if replicates == 1 else Replicated(evaluator, replicates)
    first = Stage(
        "profile",
        wide,
        judge,
        AlgorithmSpec("profile", {"reference": reference} if reference else {}),
        Budget(jobs),
    )
    second = Stage(
        "search",
        space,
        evaluator,
        AlgorithmSpec("separable", dict(options or {})),
        replace(limit, evaluations=limit.evaluations - paid),
        seeds=seeds,
        adopt=adopt or AdoptProfile(),
    )
    return first, second


@dataclass(frozen=True)
class Additivity:
    """How far sums of single changes predict what candidates are worth.

    Attributes:
        kendall_tau: rank correlation of predicted and true losses, in [-1, 1].
        candidates: how many it was computed from.
    """

    kendall_tau: float
    candidates: int

    def __str__(self) -> str:
        return f"Kendall tau {self.kendall_tau:.3f} of additivity over {self.candidates} candidates"


def additivity(result: Result) -> Additivity:
    """Compares the profile of a run made by `stages` with all that its search measured.

    Raises:
        ConfigError: a run without a profile, or with fewer than three candidates beside it.
    """
    from scipy.stats import kendalltau

    records = result.records
    if records is None or not any(text == "profile:reference" for text in records.origin):
        raise ConfigError(f"run {result.name!r} has no profile; allowed: runs of `stages`")
    fine = records.take(np.flatnonzero(records.state == 0))
    wide = profile_space(result.space)
    rows = np.flatnonzero(np.asarray(fine.stage) == 0)
    first, then = fine.take(rows), fine.take(np.flatnonzero(np.asarray(fine.stage) == 1))
    if len(then) < 3:
        raise ConfigError(f"{len(then)} candidates beside the profile; allowed: 3 or more")
    values = result.sign * np.asarray(first.values)
    values = values[:, np.isfinite(values).all(axis=0)]
    answers = Answers(wide, wide.unpack(first.genotypes), tuple(first.origin), values)
    table = ProfileTable.of(answers)
    codes = Elements(result.space).codes(result.space.unpack(then.genotypes))
    predicted = table.losses[np.arange(codes.shape[1]), codes].sum(axis=1)
    tau = kendalltau(predicted, result.sign * np.asarray(then.values)[:, 0]).statistic
    return Additivity(float(tau), len(then))
