"""What a run is: stages, budgets, the final, and the registries that names are looked up in."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from searchlab.auto import AUTO, BaselineRule, check_baselines
from searchlab.errors import ConfigError, unknown_name
from searchlab.evaluator import Evaluator, Fidelity, identity_digest
from searchlab.population import Population
from searchlab.space import Space

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from searchlab.algorithms.base import Algorithm, Seeds
    from searchlab.result import Result

__all__ = [
    "ALGORITHMS",
    "EXECUTORS",
    "PREDICTORS",
    "AdoptBest",
    "AlgorithmSpec",
    "Answers",
    "Budget",
    "Final",
    "SearchConfig",
    "Stage",
    "best_rows",
    "known_names",
    "resolve",
    "stage_digest",
]

ALGORITHMS: dict[str, str] = {
    "cma": "searchlab.algorithms.cma:CMA",
    "eda": "searchlab.algorithms.eda:EDA",
    "es11": "searchlab.algorithms.es11:OnePlusOne",
    "evolution": "searchlab.algorithms.evolution:Evolution",
    "gp": "searchlab.algorithms.optuna:GP",
    "guided": "searchlab.algorithms.guided:Guided",
    "kriging": "searchlab.algorithms.kriging:Kriging",
    "listed": "searchlab.algorithms.simple:Listed",
    "local_search": "searchlab.algorithms.local_search:LocalSearch",
    "nsga2": "searchlab.algorithms.front:NSGA2",
    "nsga3": "searchlab.algorithms.front:NSGA3",
    "paired_race": "searchlab.algorithms.paired_race:PairedRace",
    "profile": "searchlab.algorithms.profile:Profile",
    "race": "searchlab.algorithms.racing:Race",
    "random": "searchlab.algorithms.simple:Random",
    "regularised_evolution": "searchlab.algorithms.aging:RegularisedEvolution",
    "separable": "searchlab.algorithms.separable:Separable",
    "staged": "searchlab.algorithms.staged:Staged",
    "successive_halving": "searchlab.algorithms.halving:SuccessiveHalving",
    "tpe": "searchlab.algorithms.optuna:TPE",
}
EXECUTORS: dict[str, str] = {
    "local": "searchlab.executors.local:LocalExecutor",
    "processes": "searchlab.executors.processes:ProcessExecutor",
    "ray": "searchlab.executors.ray:RayExecutor",
}
PREDICTORS: dict[str, str] = {
    "additive": "searchlab.predictors.additive:Additive",
    "dele": "searchlab.predictors.dele:Dele",
    "dynamic": "searchlab.predictors.dynamic:Dynamic",
    "gbdt": "searchlab.predictors.boosted:Boosted",
    "gp": "searchlab.predictors.gp:GaussianProcess",
    "local": "searchlab.predictors.local:Local",
    "mfes": "searchlab.predictors.mfes:MultiFidelity",
    "refined": "searchlab.predictors.transfer:Refined",
    "rf": "searchlab.predictors.forest:Forest",
    "ridge": "searchlab.predictors.ridge:Ridge",
    "stack": "searchlab.predictors.stack:Stack",
    "warm": "searchlab.predictors.reuse:Warm",
    "steps": "searchlab.predictors.steps:Steps",
}

MAX_REPLICATES = 64  # of one split of a final; ids of finals are laid out for so many


def resolve(registry: Mapping[str, str], name: str, kind: str) -> Any:
    """Imports what a name stands for: a "module:attribute" string of a registry, or a plugin.

    Another package adds names by entry points of the group "searchlab.KINDs", for example
    "searchlab.algorithms"; names of the registry come first.

    Args:
        registry: names that come with searchlab.
        name: what is wanted.
        kind: "algorithm", "executor", "evaluator", "predictor" or "recipe".

    Raises:
        ConfigError: the name is not registered (lists the known ones), or its plugin cannot be
            loaded.
    """
    if name in registry:
        module, attribute = registry[name].split(":")
        return getattr(importlib.import_module(module), attribute)
    for entry in _plugins(kind):
        if entry.name == name:
            try:
                return entry.load()
            except Exception as error:  # whatever a module of others does when it is imported
                origin = f" of {entry.dist.name}" if entry.dist is not None else ""
                raise ConfigError(
                    f"{kind} {name!r}{origin} cannot be loaded from {entry.value!r}: "
                    f"{type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
    raise unknown_name(kind, name, known_names(registry, kind))


def known_names(registry: Mapping[str, str], kind: str) -> list[str]:
    """Every name that `resolve` knows, plugins included."""
    return sorted({*registry, *(entry.name for entry in _plugins(kind))})


def _plugins(kind: str) -> Iterable[EntryPoint]:
    import importlib.metadata

    return importlib.metadata.entry_points(group=f"searchlab.{kind}s")


@dataclass(frozen=True)
class AlgorithmSpec:
    """An algorithm by name with its options (the keyword arguments of its class)."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def kind(self) -> Callable[..., Algorithm] | None:
        """The class that the name stands for; None where that is not settled yet."""
        if self.name == AUTO:
            return None
        factory: Callable[..., Algorithm] = resolve(ALGORITHMS, self.name, "algorithm")
        return factory

    def notes(self, result: Result) -> list[str]:
        """What the algorithm has to say of a finished search."""
        says = getattr(self.kind(), "notes", None)
        return [] if says is None else list(says(result))

    def build(
        self,
        space: Space,
        *,
        seed: int,
        first_id: int,
        seeds: Seeds | None,
        fidelities: Sequence[Fidelity] = (),
        signals: object = None,
    ) -> Algorithm:
        """The algorithm at the beginning of a stage.

        Args:
            space, seed, first_id, seeds: see `Algorithm`.
            fidelities: those it may choose among; an algorithm that has an option `fidelities`
                gets their costs.
            signals: an evaluator with `static_signals`; an algorithm that has an option `signals`
                gets it.
        """
        if self.name == AUTO:
            raise ConfigError("auto is settled when a run is opened; see searchlab.auto.settled")
        factory: Callable[..., Algorithm] = resolve(ALGORITHMS, self.name, "algorithm")
        options = dict(self.options)
        if fidelities and "fidelities" in inspect.signature(factory).parameters:
            options.setdefault("fidelities", tuple(fidelity.cost for fidelity in fidelities))
        if signals is not None and "signals" in inspect.signature(factory).parameters:
            options.setdefault("signals", signals)
        try:
            return factory(space, seed=seed, first_id=first_id, seeds=seeds, **options)
        except TypeError as error:
            raise ConfigError(f"options of {self.name}: {error}") from None


@dataclass(frozen=True)
class Budget:
    """When a stage stops.

    Attributes:
        evaluations: jobs that are paid, baselines apart; None = until the algorithm is exhausted.
        seconds: wall time of the stage in this process.
        includes_hits: count jobs that the cache answered too.
        device_hours: hours of devices that the evaluations of all processes took.
        price: US dollars, at `gpu_price` per device hour.
        gpu_price: US dollars per device hour.
        target: value of the objective that steers, in the user's sign, that is good enough.
    """

    evaluations: int | None = None
    seconds: float | None = None
    includes_hits: bool = False
    device_hours: float | None = field(default=None, kw_only=True)
    price: float | None = field(default=None, kw_only=True)
    gpu_price: float | None = field(default=None, kw_only=True)
    target: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        number = self.evaluations
        if number is not None and (
            isinstance(number, bool) or not isinstance(number, int) or number < 0
        ):
            raise ConfigError(f"budget of {number!r} evaluations; allowed: 0 or more")
        limits = {
            "seconds": self.seconds,
            "device hours": self.device_hours,
            "dollars": self.price,
            "dollars per device hour": self.gpu_price,
        }
        for what, value in limits.items():
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(f"budget of {value} {what}; allowed: more than 0")
        if self.price is not None and self.gpu_price is None:
            raise ConfigError(f"budget of {self.price} dollars; allowed with a gpu_price")
        if self.target is not None and not np.isfinite(self.target):
            raise ConfigError(f"target {self.target}; allowed: a finite value")


@dataclass(frozen=True)
class Answers:
    """What a finished stage knows, for the rule that starts the next one.

    `violation` is the sum of broken outcome constraints, (n,); None = there are none. `main` is the
    column of the losses that says what is best; None = the objectives are traded off.
    """

    space: Space
    population: Population
    origin: tuple[str, ...]
    losses: NDArray[np.float64]
    violation: NDArray[np.float64] | None = None
    main: int | None = 0


class Adopt(Protocol):
    """Turns the answers of the stage before into seeds of the next, as a pure function of them."""

    def __call__(self, answers: Answers, space: Space) -> Seeds: ...


@dataclass(frozen=True)
class AdoptBest:
    """Seeds the next stage with the best candidates of the one before.

    Attributes:
        k: how many, per group.
        per: name of a static cost (`space.cost`) whose integer values are the groups; None = one.
        kinds: prefixes of origins that get a quota of k each ("" = everything), so that for
            example a family of known points does not crowd out another one.
    """

    k: int
    per: str | None = None
    kinds: tuple[str, ...] = ("",)

    def __call__(self, answers: Answers, space: Space) -> Seeds:
        from searchlab.algorithms.base import Seeds

        rows = best_rows(answers, self.k, self.per, self.kinds)
        population = answers.population.take(rows)
        return Seeds(population, tuple(answers.origin[i] for i in rows))


def best_rows(answers: Answers, k: int, per: str | None, kinds: Sequence[str]) -> NDArray[np.int64]:
    """Rows of the k best successes of every group and kind, best first."""
    if answers.main is None:
        from searchlab.fronts import front_order

        losses = answers.losses
        loss = np.full(len(losses), np.inf)
        ranked = front_order(losses, answers.violation)
        loss[ranked] = np.arange(len(ranked))
        broken = np.zeros(len(losses))
    else:
        loss = answers.losses[:, answers.main]
        broken = np.zeros(len(loss)) if answers.violation is None else answers.violation
    if per is None:
        groups = np.zeros(len(loss), dtype=np.int64)
    else:
        groups = np.rint(answers.space.cost(answers.population)[per]).astype(np.int64)
    chosen: dict[int, None] = {}
    for group in np.unique(groups):
        for kind in kinds:
            member = np.array([origin.startswith(kind) for origin in answers.origin])
            rows = np.flatnonzero((groups == group) & member & np.isfinite(loss))
            order = rows[np.lexsort((loss[rows], broken[rows]))][:k]
            chosen.update(dict.fromkeys(order.tolist()))
    return np.array(list(chosen), dtype=np.int64)


@dataclass(frozen=True)
class Stage:
    """One leg of a run: a space searched by an algorithm under an evaluator at one fidelity.

    Attributes:
        name: shown in tables and progress.
        algorithm: its name may be "auto" (see `searchlab.auto.choose`).
        seeds: baselines ("baseline:NAME") and warm starts ("seed:NAME") proposed first; those with
            a baseline's origin are counted apart from the budget.
        adopt: makes further seeds from the stage before.
        fidelity: index into the evaluator's fidelities; -1 = the truth.
        chunk: jobs per call of the evaluator in this stage; None = as the run has it.
        baselines: which of the seeds that are baselines are scored: "all", "none", the named ones,
            or "auto": the first ones, at most a third of the evaluations that the run is opened
            with (never less than one).
        chosen: what `auto` settled on and why, once a run is opened; empty = it was named.
        steer: name of the objective that algorithms hear of and that says what is best, where the
            evaluator has several; the others are recorded. None = they are traded off.
    """

    name: str
    space: Space
    evaluator: Evaluator
    algorithm: AlgorithmSpec
    budget: Budget = Budget()
    fidelity: int = -1
    seeds: Seeds | None = None
    adopt: Adopt | None = None
    chunk: int | None = None
    baselines: BaselineRule = "all"
    chosen: str = field(default="", compare=False)
    steer: str | None = None

    def __post_init__(self) -> None:
        names = [objective.name for objective in self.evaluator.objectives]
        if self.steer is not None and self.steer not in names:
            raise unknown_name("objective", self.steer, names)
        check_baselines(self.baselines, () if self.seeds is None else self.seeds.origin)

    @property
    def main(self) -> int:
        """The column of the objective that steers; of the first one where none is named."""
        names = [objective.name for objective in self.evaluator.objectives]
        return 0 if self.steer is None else names.index(self.steer)

    @property
    def sign(self) -> float:
        """1 where less of that objective is better, -1 where more is."""
        return 1.0 if self.evaluator.objectives[self.main].direction == "min" else -1.0

    @property
    def trades(self) -> bool:
        """Whether there are several objectives, none of which steers."""
        return self.steer is None and len(self.evaluator.objectives) > 1

    def check_objectives(self, algorithm: Algorithm) -> None:
        """Raises ConfigError where the algorithm does not serve this stage's objectives."""
        if self.main and getattr(algorithm, "race", False):
            raise ConfigError(
                f"race with {self.steer!r} steering; allowed: the first objective, which bounds "
                "are held against"
            )
        objectives = self.evaluator.objectives
        algorithm.check_objectives(len(objectives) if self.trades else 1)
        if self.trades and self.budget.target is not None:
            names = ", ".join(objective.name for objective in objectives)
            raise ConfigError(
                f"target {self.budget.target:g} with the objectives {names}; allowed: with one "
                "objective, or with the name of the one that steers"
            )

    @property
    def fidelity_index(self) -> int:
        n = len(self.evaluator.fidelities)
        if not -n <= self.fidelity < n:
            raise ConfigError(
                f"fidelity {self.fidelity} of stage {self.name!r}; allowed: 0..{n - 1}"
            )
        return self.fidelity % n

    def build_algorithm(self, *, seed: int, first_id: int, seeds: Seeds | None) -> Algorithm:
        """The algorithm of this stage; it may choose fidelities up to the stage's own."""
        return self.algorithm.build(
            self.space,
            seed=seed,
            first_id=first_id,
            seeds=seeds,
            fidelities=self.evaluator.fidelities[: self.fidelity_index + 1],
            signals=self.evaluator if hasattr(self.evaluator, "static_signals") else None,
        )


def stage_digest(stage: Stage) -> str:
    """Under which values of a stage are shared: the evaluator's identity and the space.

    The space belongs to it because a candidate's key is a hash of its row alone.
    """
    text = f"{identity_digest(stage.evaluator)} {stage.space.fingerprint}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _described(stage: Stage, seed: int) -> dict[str, Any]:
    """The settings of a stage's algorithm; of `auto` its name: what it chose is kept apart."""
    if stage.algorithm.name == AUTO:
        return {"name": AUTO}
    return stage.build_algorithm(seed=seed, first_id=0, seeds=None).settings()


def _seeds_digest(stage: Stage) -> str:
    """Which candidates a stage is given, and what they are called."""
    if stage.seeds is None:
        return ""
    digest = blake2b(digest_size=16)
    for key, origin in zip(
        stage.space.keys(stage.seeds.population), stage.seeds.origin, strict=True
    ):
        digest.update(key + origin.encode("utf-8", "backslashreplace") + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class Final:
    """Scores the best again where the search never looked.

    The k best of every group and the baselines are scored on `selection` fresh replicates; then the
    winner and the chosen baseline of each group once on each of the `report` replicates.

    Attributes:
        k: finalists per group.
        selection: replicates of the selection split.
        report: replicates (noise banks) of the report split; 2 or more give an interval.
        baselines: at most this many baselines per group and kind reach the selection split, best
            search value first; `named` ones always do.
        named: names of baselines that are scored on both splits whatever their rank.
        known: a baseline that is best on the selection split wins: it is what the group returns.
            Single objectives only; a front holds no baselines.
        alpha: the interval covers 1 - alpha.
    """

    k: int = 5
    selection: int = 1
    report: int = 4
    baselines: int = 5
    named: tuple[str, ...] = ()
    known: bool = False
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if min(self.k, self.selection, self.report, self.baselines) < 1:
            raise ConfigError("final: k, selection, report and baselines are 1 or more")
        if max(self.selection, self.report) > MAX_REPLICATES:
            raise ConfigError(
                f"final: {self.selection} selection and {self.report} report replicates; "
                f"allowed: at most {MAX_REPLICATES} each"
            )
        if not 0 < self.alpha < 1:
            raise ConfigError(f"final: alpha {self.alpha}; allowed: between 0 and 1")


@dataclass(frozen=True)
class SearchConfig:
    """Everything that determines a run.

    Attributes:
        stages: in order; ids go on from one to the next.
        name: default name of the run.
        seed: the one user seed.
        lag: at most this many jobs are open; fixed when the run is opened. None = chosen from the
            number of workers; "free" = as many as the executor has room for, so that proposals
            depend on timing and are reproducible from the run's records only.
        chunk: jobs per call of the evaluator; None = the algorithm's quantum.
        group_by: static cost whose integer values are reported apart (model calls, for example).
        groups: the groups that are reported; empty = whatever occurs.
        upto: a group is a limit: what needs less competes in it too.
        final: None = no final.
        reference: objective -> value, in the user's sign, from which hypervolumes of the last stage
            are measured; None = beyond the worst of the first candidates.
        recipe: name of the recipe that made this, "" for a search made in Python.
        options: the recipe's options as JSON.
    """

    stages: tuple[Stage, ...]
    name: str = "search"
    seed: int = 0
    lag: int | Literal["free"] | None = None
    chunk: int | None = None
    group_by: str | None = None
    groups: tuple[int, ...] = ()
    upto: bool = False
    final: Final | None = None
    recipe: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("a search without stages; allowed: one stage or more")
        if self.reference is not None:
            names = [objective.name for objective in self.stages[-1].evaluator.objectives]
            if set(self.reference) != set(names) or not all(
                np.isfinite(value) for value in self.reference.values()
            ):
                raise ConfigError(
                    f"reference {dict(self.reference)!r}; allowed: a finite value for each of "
                    f"{', '.join(names)}"
                )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed}; allowed: 0 to 2**63 - 1")
        for name, value in (("lag", self.lag), ("chunk", self.chunk)):
            if value == "free" and name == "lag":
                continue
            if value is not None and (not isinstance(value, int) or value < 1):
                more = " or 'free'" if name == "lag" else ""
                raise ConfigError(f"{name} {value!r}; allowed: 1 or more{more}")

    def describe(self) -> dict[str, Any]:
        """JSON that must be equal for a run to be resumed (budgets may grow)."""
        from searchlab.recipes import GROWABLE

        return {
            "recipe": self.recipe,
            "options": {k: v for k, v in self.options.items() if k not in GROWABLE},
            "seed": self.seed,
            "group_by": self.group_by,
            "stages": [
                {
                    "name": stage.name,
                    "space": stage.space.fingerprint,
                    "algorithm": _described(stage, self.seed),
                    "fidelity": stage.evaluator.fidelities[stage.fidelity_index].name,
                    "evaluator": stage_digest(stage),
                    "seeds": _seeds_digest(stage),
                    **({} if stage.baselines == "all" else {"baselines": stage.baselines}),
                    **({} if stage.steer is None else {"steer": stage.steer}),
                }
                for stage in self.stages
            ],
        }
