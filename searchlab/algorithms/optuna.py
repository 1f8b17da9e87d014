"""Samplers of Optuna behind our contract: rebuilt for every proposal, fed with what was told."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told, no_parents
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.variables import Choice, Integer, Subset, Variable

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

__all__ = ["GP", "TPE", "Parameters", "Sampled"]

Array = NDArray[Any]

_PLAIN = (bool, int, float, str, type(None))
_OWN_WORDS = "relative_params"  # what TPE and GP note for other processes; nothing reads it here
_STATEFUL = {
    "BruteForceSampler": "random",
    "CmaEsSampler": "cma",
    "GridSampler": "listed",
    "NSGAIISampler": "nsga2",
    "NSGAIIISampler": "nsga3",
    "QMCSampler": "random",
}


class Parameters:
    """A space's elements as named parameters of Optuna.

    Choices are categorical, by label (labels that are lists or mappings as their JSON); members of
    a subset are categorical in (0, 1); integers and reals keep range and logarithm, integers also
    their step. Elements of shaped variables are named "key[i,j]". What ranges cannot say (steps of
    reals, order, sums, budgets, ties, predicates) is left to `Space.repair`, and the sampler is
    told the repaired candidate.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._texts = {
            key
            for key, variable in space.variables.items()
            if isinstance(variable, Choice)
            and not all(isinstance(label, _PLAIN) for label in variable.labels)
        }
        self._names: dict[str, list[tuple[str, tuple[int, ...]]]] = {
            key: [
                (f"{key}[{','.join(map(str, index))}]" if index else key, index)
                for index in np.ndindex(*variable.shape)
            ]
            for key, variable in space.variables.items()
        }
        self._kinds = {
            key: self._distribution(key, variable) for key, variable in space.variables.items()
        }

    def _distribution(self, key: str, variable: Variable) -> BaseDistribution:
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if isinstance(variable, Choice):
            texts = key in self._texts
            return CategoricalDistribution(
                tuple(json.dumps(label) if texts else label for label in variable.labels)
            )
        if isinstance(variable, Subset):
            return CategoricalDistribution((0, 1))
        if isinstance(variable, Integer):
            step = 1 if variable.log else variable.step
            return IntDistribution(variable.low, variable.high, log=variable.log, step=step)
        low, high = getattr(variable, "low", None), getattr(variable, "high", None)
        if low is None or high is None:
            raise ConfigError(
                f"{key!r} is a {variable.kind}; allowed for samplers of Optuna: choices, subsets "
                "and numbers within a range (the algorithm 'evolution' takes every space)"
            )
        return FloatDistribution(float(low), float(high), log=bool(getattr(variable, "log", False)))

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Name -> distribution of every element, in declaration order."""
        return {name: self._kinds[key] for key, names in self._names.items() for name, _ in names}

    def suggest(self, trial: Trial, u: Array) -> Population:
        """One valid candidate of a trial's suggestions; uniforms (1, repair_width)."""
        columns: dict[str, Array] = {}
        active: dict[str, Array] = {}
        for key, variable in self.space.variables.items():
            active[key] = self.space.activity(key, columns, active, 1)
            column = np.full((1, *variable.shape), variable.neutral, dtype=variable.dtype)
            for name, index in self._names[key]:
                if active[key][(0, *index)]:
                    column[(0, *index)] = self._suggested(trial, name, key, variable)
            columns[key] = column
        return self.space.repair(Population(columns), u)

    def _suggested(self, trial: Trial, name: str, key: str, variable: Variable) -> Any:
        kind: Any = self._kinds[key]
        if isinstance(variable, Choice):
            return kind.choices.index(trial.suggest_categorical(name, kind.choices))
        if isinstance(variable, Subset):
            return trial.suggest_categorical(name, kind.choices)
        if isinstance(variable, Integer):
            return trial.suggest_int(name, kind.low, kind.high, log=kind.log, step=kind.step)
        return trial.suggest_float(name, kind.low, kind.high, log=kind.log)

    def of(self, population: Population) -> list[dict[str, Any]]:
        """Name -> value of every active element, one dict per candidate."""
        active = self.space.active(population)
        out: list[dict[str, Any]] = [{} for _ in range(len(population))]
        for key, names in self._names.items():
            choices = getattr(self._kinds[key], "choices", None)
            column = population[key].tolist()
            flags = active[key].tolist()
            for row, values in enumerate(out):
                for name, index in names:
                    value, counts = column[row], flags[row]
                    for place in index:
                        value, counts = value[place], counts[place]
                    if counts:
                        values[name] = value if choices is None else choices[value]
        return out


class Sampled(Algorithm):
    """Any sampler of Optuna that decides by the values of finished trials alone.

    Every proposal is made by a new sampler, with a seed that is a function of (seed, id), over a
    study in memory that holds the told successes; so nothing of the sampler's is stored, and the
    same told history gives the same proposal. Open jobs are unknown to it. Failed candidates are
    left out, as Optuna does. A candidate that is known already is sampled once more and then drawn
    uniformly.

    Args:
        space, seed, first_id, seeds, repeats: see `Algorithm`.
        sampler: makes a sampler from a seed in [0, 2**32).
        label: what its candidates' origin says.

    Raises:
        ConfigError: a sampler that keeps state in its study (NSGA-II, CMA-ES, ...): names ours.
    """

    name: ClassVar[str] = "optuna"
    pools = False
    max_objectives: ClassVar[int | None] = None

    def __init__(
        self,
        space: Space,
        *,
        sampler: Callable[[int], BaseSampler],
        label: str = "optuna",
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds)
        self._sampler = sampler
        self._label = label
        self._parameters = Parameters(space)
        self._kind = _checked(sampler)
        self._study: optuna.Study | None = None
        self._constrained = False

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "sampler": self._kind}

    def _width(self) -> int:
        return 1 + self.space.sample_width

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        if strength > 4.0:
            population = self.space.sample(u[:, 1:])
            return Draw(population, ["random"] * len(ids), no_parents(len(ids)))
        rows = [self._propose(u[i : i + 1]) for i in range(len(ids))]
        return Draw(Population.concat(rows), [self._label] * len(ids), no_parents(len(ids)))

    def _propose(self, u: Array) -> Population:
        from optuna.trial import TrialState

        if self._study is None:
            self._study = _new_study(1)
        with _quiet():
            self._study.sampler = self._sampler(int(u[0, 0] * 2**32))
            trial = self._study.ask()
            try:
                return self._parameters.suggest(trial, u[:, 1 : 1 + self.space.repair_width])
            finally:
                # Failed trials count for nothing: the proposal leaves no trace.
                self._check(self._study.tell(trial, state=TrialState.FAIL))

    def _check(self, trial: FrozenTrial) -> None:
        words = [word for word in trial.system_attrs if _OWN_WORDS not in word]
        if words:
            raise ConfigError(
                f"{self._kind} keeps {words[0]!r} in its trials; allowed: samplers that decide by "
                "the values of finished trials alone, such as TPESampler and GPSampler"
            )

    def _learn(self, told: Told) -> None:
        from optuna.trial import create_trial

        m = told.losses.shape[1]
        if self._study is None or len(self._study.directions) != m:
            self._study = _new_study(m)
        if not self._constrained and (told.violation > 0).any():
            self._constrain(m)
        good = np.flatnonzero(np.isfinite(told.losses).all(axis=1) & np.isfinite(told.violation))
        kinds = self._parameters.distributions
        with _quiet():
            self._study.add_trials(
                create_trial(
                    values=losses,
                    params=params,
                    distributions={name: kinds[name] for name in params},
                    system_attrs={"constraints": [broken]} if self._constrained else None,
                )
                for losses, broken, params in zip(
                    told.losses[good].tolist(),
                    told.violation[good].tolist(),
                    self._parameters.of(told.population.take(good)),
                    strict=True,
                )
            )

    def _constrain(self, m: int) -> None:
        """From the first violation on every trial states one, also those told before."""
        from optuna.trial import TrialState, create_trial

        assert self._study is not None
        before = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        self._study, self._constrained = _new_study(m), True
        with _quiet():
            self._study.add_trials(
                create_trial(
                    values=trial.values,
                    params=trial.params,
                    distributions=trial.distributions,
                    system_attrs={"constraints": [0.0]},
                )
                for trial in before
            )


class TPE(Sampled):
    """Optuna's tree-structured Parzen estimator.

    Args:
        space, seed, first_id, seeds: see `Algorithm`.
        startup: random candidates before the first estimate.
        multivariate: whether parameters are drawn jointly; None = as Optuna decides.
    """

    name: ClassVar[str] = "tpe"

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        startup: int = 10,
        multivariate: bool | None = None,
    ) -> None:
        from optuna.samplers import TPESampler

        _check_startup(startup)
        given: Mapping[str, Any] = {} if multivariate is None else {"multivariate": multivariate}

        def sampler(number: int) -> BaseSampler:
            return TPESampler(
                seed=number, n_startup_trials=startup, warn_independent_sampling=False, **given
            )

        super().__init__(
            space, sampler=sampler, label=self.name, seed=seed, first_id=first_id, seeds=seeds
        )
        self._options = {"startup": startup, "multivariate": multivariate}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self._options}


class GP(Sampled):
    """Optuna's Gaussian process with expected improvement: for costly evaluations, some hundred.

    Conditional elements that not all told candidates have are drawn at random.

    Args:
        space, seed, first_id, seeds: see `Algorithm`.
        startup: random candidates before the first fit.
        deterministic: the values have no noise.
    """

    name: ClassVar[str] = "gp"

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        startup: int = 10,
        deterministic: bool = False,
    ) -> None:
        from optuna.samplers import GPSampler

        _check_startup(startup)

        def sampler(number: int) -> BaseSampler:
            return GPSampler(
                seed=number,
                n_startup_trials=startup,
                deterministic_objective=deterministic,
                warn_independent_sampling=False,
            )

        super().__init__(
            space, sampler=sampler, label=self.name, seed=seed, first_id=first_id, seeds=seeds
        )
        self._options = {"startup": startup, "deterministic": deterministic}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self._options}


def _check_startup(startup: int) -> None:
    if startup < 1:
        raise ConfigError(f"startup {startup}; allowed: 1 or more")


def _checked(sampler: Callable[[int], BaseSampler]) -> str:
    """The class of what a factory makes. Raises ConfigError where that cannot be used."""
    from optuna.samplers import BaseSampler

    with _quiet():
        made = sampler(0)
    kind = type(made).__name__
    if not isinstance(made, BaseSampler):
        raise ConfigError(f"sampler factory made {made!r}; allowed: a sampler of Optuna")
    if kind in _STATEFUL:
        raise ConfigError(
            f"{kind} keeps state in its study; allowed: samplers that decide by the values of "
            f"finished trials alone, such as TPESampler (the algorithm {_STATEFUL[kind]!r} fits)"
        )
    return kind


def _new_study(objectives: int) -> optuna.Study:
    import optuna

    with _quiet():
        return optuna.create_study(directions=["minimize"] * objectives)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says that studies begin and that samplers are experimental; ours are neither news."""
    import optuna

    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(loud)
