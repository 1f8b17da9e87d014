"""What a candidate is worth: the evaluator's protocol, its objectives, fidelities and identity."""

from __future__ import annotations

import functools
import json
import platform
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from types import ModuleType
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, runtime_checkable

import numpy as np

from searchlab.errors import ConfigError, EvaluationError
from searchlab.population import FAILED, Evaluations, Jobs
from searchlab.space import Space

__all__ = [
    "REPORT_REPLICATE",
    "SELECTION_REPLICATE",
    "Evaluator",
    "EvaluatorFunction",
    "Fidelity",
    "FunctionEvaluator",
    "Objective",
    "Signal",
    "environment",
    "evaluator",
    "identity_digest",
    "losses",
]

# Replicates below the first number belong to the search; the engine refuses the others there.
SELECTION_REPLICATE = 2**19
REPORT_REPLICATE = 2**20

Reproducibility = Literal["exact", "batch", "noisy"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Objective:
    """One figure to optimise.

    Attributes:
        name: column name.
        direction: "min" or "max", in the user's sign.
        scope: "portable" (quality) or "device_bound" (latency, memory).
        unit: shown in tables.
    """

    name: str
    direction: Literal["min", "max"] = "min"
    scope: Literal["portable", "device_bound"] = "portable"
    unit: str = ""

    def __post_init__(self) -> None:
        if self.direction not in ("min", "max"):
            raise ConfigError(f"direction {self.direction!r} of {self.name!r}; allowed: min, max")


@dataclass(frozen=True)
class Fidelity:
    """How thoroughly a candidate is measured; `cost` is relative to the last, the truth."""

    name: str
    cost: float = 1.0


@dataclass(frozen=True)
class Signal:
    """A cheap quantity that says something about a candidate."""

    name: str
    direction: Literal["min", "max"] = "min"
    unit: str = ""
    cost_s: float = 0.0
    when: Literal["static", "with_evaluation", "on_request"] = "with_evaluation"


@runtime_checkable
class Evaluator(Protocol):
    """Scores whole chunks of candidates.

    `evaluate` is called by the executor with jobs of one fidelity and one replicate, at most
    `chunk` of them (None = any number), and returns rows in the order of the jobs. It may raise:
    the executor then makes every row of the chunk `failed` with the reason.
    `reproducibility` says what a value is a function of: "exact" = (candidate, fidelity,
    replicate), "batch" = the whole chunk, "noisy" = nothing is claimed.

    Optional attributes: `constraints` (a tuple of `searchlab.outcomes.Constraint`, in the order of
    the columns of `Evaluations.constraints`), `probe` (False = no call beyond the jobs is made to
    measure repeatability), `place(folder)` (told where the run keeps its files), `micro_batch` (how
    many rows, of whatever kind, are computed at once: after out-of-memory a worker sets it to half
    and calls `evaluate` again with the same chunk, which is never split otherwise).
    """

    @property
    def objectives(self) -> tuple[Objective, ...]: ...
    @property
    def fidelities(self) -> tuple[Fidelity, ...]: ...
    @property
    def signals(self) -> tuple[Signal, ...]: ...
    @property
    def reproducibility(self) -> Reproducibility: ...
    def setup(self) -> None:
        """Loads what is needed; called once per worker, before the first chunk."""

    def evaluate(self, jobs: Jobs) -> Evaluations:
        """Values of all jobs, in order."""

    def identity(self) -> Mapping[str, Any]:
        """JSON that determines the values: version, model and data hashes, settings, dtype."""


def environment() -> dict[str, str]:
    """What was true around the values: recorded, not part of the identity."""
    import importlib.metadata

    out = {"python": platform.python_version(), "machine": platform.machine(), "device": "cpu"}
    for package in ("searchlab", "numpy", "torch", "diffusers"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def identity_digest(evaluator: Evaluator) -> str:
    """Hex digest of an evaluator's identity; equal digests share cached values."""
    try:
        text = json.dumps(
            {
                "class": type(evaluator).__name__,
                "objectives": [(o.name, o.direction) for o in evaluator.objectives],
                "fidelities": [f.name for f in evaluator.fidelities],
                **evaluator.identity(),
            },
            sort_keys=True,
        )
    except TypeError as error:
        name = type(evaluator).__name__
        raise EvaluationError(f"identity of {name} is not JSON: {error}") from None
    return blake2b(text.encode(), digest_size=16).hexdigest()


def losses(evaluations: Evaluations, objectives: Sequence[Objective]) -> np.ndarray[Any, Any]:
    """What an algorithm minimises: float64 (n, m), +inf in rows that are not ok, never NaN."""
    out = evaluations.values
    if any(objective.direction != "min" for objective in objectives):
        out = out * np.array([1.0 if o.direction == "min" else -1.0 for o in objectives])
    assert evaluations.state is not None
    return np.where((evaluations.state == 0)[:, None] & np.isfinite(out), out, np.inf)


@dataclass
class FunctionEvaluator:
    """A Python function as an evaluator.

    Args:
        function: `f(**values)` for a plain function; `f(plans, fidelity, seed)` with `batch`, where
            plans is a list of decoded dicts; `f(columns, fidelity, seed)` with `columns`, where
            columns maps names to arrays. Batch forms return one number (or a tuple of numbers) per
            candidate; a dict by the names of the objectives stands for a tuple.
        space: how candidates are decoded.
        version: raised by hand when the function's values change. Without one the function has no
            identity beyond its run, so no value is shared with other runs.
        private: the run's name, which stands in for a missing version (`search` fills it in).
    """

    function: Callable[..., Any]
    space: Space
    objectives: tuple[Objective, ...] = (Objective("value"),)
    fidelities: tuple[Fidelity, ...] = (Fidelity("full"),)
    signals: tuple[Signal, ...] = ()
    reproducibility: Reproducibility = "exact"
    batch: bool = False
    columns: bool = False
    version: int | None = None
    seed: int = 0
    private: str = field(default="", repr=False)

    def setup(self) -> None:
        """Nothing to load."""

    def evaluate(self, jobs: Jobs) -> Evaluations:
        fidelity = self.fidelities[jobs.fidelity].name
        if self.columns:
            return self._shaped(
                self.function(dict(jobs.population.columns), fidelity, self.seed + jobs.replicate),
                len(jobs),
            )
        plans = self.space.decode(jobs.population)
        if self.batch:
            return self._shaped(
                self.function(plans, fidelity, self.seed + jobs.replicate), len(jobs)
            )
        n = len(plans)
        values = np.full((n, len(self.objectives)), np.nan)
        state, reason = np.zeros(n, np.int8), [""] * n
        notes: dict[str, str] = {}
        for row, plan in enumerate(plans):
            try:
                values[row] = self._values([self.function(**plan)], 1)[0]
            except Exception as error:  # one candidate's failure is that candidate's result
                notes.setdefault("traceback", traceback.format_exc())
                state[row], reason[row] = FAILED, f"{type(error).__name__}: {error}"
        return Evaluations(values=values, state=state, reason=reason, notes=notes)

    def _shaped(self, answer: Any, n: int) -> Evaluations:
        return answer if isinstance(answer, Evaluations) else Evaluations(self._values(answer, n))

    def _values(self, answer: Any, n: int) -> np.ndarray[Any, Any]:
        """What the function returned for n candidates as float64 (n, objectives)."""
        if answer is None or (isinstance(answer, list) and any(part is None for part in answer)):
            raise EvaluationError("the function returned None; allowed: numbers")
        if isinstance(answer, list | tuple) and any(isinstance(part, Mapping) for part in answer):
            answer = [self._ordered(part) for part in answer]
        try:
            values = np.asarray(answer, dtype=np.float64)
        except (TypeError, ValueError):
            raise EvaluationError(f"the function returned {answer!r}; allowed: numbers") from None
        m = len(self.objectives)
        if values.shape not in ((n,), (n, m)) or (values.ndim == 1 and m != 1):
            raise EvaluationError(
                f"the function returned shape {values.shape} for {n} candidates and {m} "
                f"objectives; allowed: ({n}, {m})"
            )
        return values.reshape(n, m)

    def _ordered(self, answer: Any) -> Any:
        """A dict of values as a tuple in the order of the objectives."""
        if not isinstance(answer, Mapping):
            return answer
        names = [objective.name for objective in self.objectives]
        missing = [name for name in names if name not in answer]
        if missing:
            raise EvaluationError(
                f"the function returned no {', '.join(missing)}; allowed: a value for each of "
                f"{', '.join(names)}"
            )
        return tuple(answer[name] for name in names)

    def identity(self) -> Mapping[str, Any]:
        name = f"{self.function.__module__}.{self.function.__qualname__}"
        out: dict[str, Any] = {"function": name, "seed": self.seed, "version": self.version}
        if self.version is None:
            out["private"] = self.private
        return out


@dataclass(eq=False)
class EvaluatorFunction(Generic[P, R]):
    """A function with what an evaluator needs to know of it; calling it calls the function.

    Made by the decorator `evaluator`; `build` makes the evaluator of a space.
    """

    function: Callable[P, R]
    objectives: tuple[Objective, ...]
    fidelities: tuple[Fidelity, ...]
    reproducibility: Reproducibility
    columns: bool
    version: int | None

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.function)

    def __reduce__(self) -> Any:
        """By name where a module holds it, as functions are; by its parts elsewhere."""
        found: Any = sys.modules.get(self.__module__)
        name: str = vars(self)["__qualname__"]
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is self:
            return name
        parts = (self.objectives, self.fidelities, self.reproducibility, self.columns, self.version)
        return type(self), (self.function, *parts)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def build(self, space: Space) -> FunctionEvaluator:
        """The function as an evaluator of candidates of this space."""
        return FunctionEvaluator(
            self,
            space,
            objectives=self.objectives,
            fidelities=self.fidelities,
            reproducibility=self.reproducibility,
            batch=not self.columns,
            columns=self.columns,
            version=self.version,
        )


def evaluator(
    *,
    objectives: Mapping[str, Literal["min", "max"]] | None = None,
    fidelities: Mapping[str, float] | None = None,
    reproducibility: Reproducibility = "exact",
    columns: bool = False,
    version: int | None = None,
) -> Callable[[Callable[P, R]], EvaluatorFunction[P, R]]:
    """Decorates a population function: `f(plans, fidelity, seed)` -> one value per plan.

    Args:
        objectives: name -> "min" or "max"; {"value": "min"} by default.
        fidelities: name -> relative cost, ascending; the last is the truth.
        reproducibility: "exact", "batch" or "noisy", see `Evaluator`.
        columns: hand over arrays by name (codes of choices) instead of a list of dicts.
        version: raised by hand when values change; needed to share values between runs.

    Raises:
        ConfigError: an unknown direction or reproducibility, no objective or no fidelity.
    """
    if reproducibility not in ("exact", "batch", "noisy"):
        raise ConfigError(f"reproducibility {reproducibility!r}; allowed: exact, batch, noisy")
    named = {"value": "min"} if objectives is None else dict(objectives)
    costs = {"full": 1.0} if fidelities is None else dict(fidelities)
    if not named or not costs:
        raise ConfigError("an evaluator without objectives or fidelities; allowed: one or more")

    def decorate(function: Callable[P, R]) -> EvaluatorFunction[P, R]:
        return EvaluatorFunction(
            function,
            tuple(Objective(name, direction) for name, direction in named.items()),  # type: ignore[arg-type]
            tuple(Fidelity(name, float(cost)) for name, cost in costs.items()),
            reproducibility,
            columns,
            version,
        )

    return decorate


class _CallableModule(ModuleType):
    """Lets `searchlab.evaluator(...)` be the decorator although this module bears its name."""

    __call__ = staticmethod(evaluator)


sys.modules[__name__].__class__ = _CallableModule
