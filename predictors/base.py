"""What the predictors share: preparation of tables and losses, draws, and how they are kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from searchlab.errors import ConfigError
from searchlab.predictor import DRAW_WIDTH, Table
from searchlab.predictors._latest import Latest
from searchlab.predictors.artifact import State as State
from searchlab.predictors.artifact import load_state, save_state
from searchlab.predictors.preprocess import Features, Inputs, Labels, usable_losses
from searchlab.space import Space
from searchlab.uniforms import derived

__all__ = ["BasePredictor", "folds_of", "normals_of"]

Floats = NDArray[np.float64]
Folds = Sequence[NDArray[np.int64]]


LEAST = 4  # labels of which some can be left out
FEW, FEW_FOLDS, FOLDS = 40, 10, 5  # where labels are few, a fit to fewer says too little


def folds_of(n: int, seed: int) -> list[NDArray[np.int64]]:
    """The rows of each group of labels that are left out together; each label is in one."""
    order = np.random.default_rng(seed).permutation(n)
    folds = min(n, FEW_FOLDS if n < FEW else FOLDS)
    return [np.sort(order[fold::folds]) for fold in range(folds)]


def normals_of(u: Floats, width: int) -> Floats:
    """Standard normals (d, width) from a predictor's uniforms (d, DRAW_WIDTH).

    Raises:
        ConfigError: uniforms of another shape.
    """
    u = np.asarray(u, dtype=np.float64)
    if u.ndim != 2 or u.shape[1] != DRAW_WIDTH:
        raise ConfigError(f"uniforms of shape {u.shape}; allowed: (draws, {DRAW_WIDTH})")
    # 2**-54 keeps the zero among the uniforms away from minus infinity.
    out: Floats = ndtri(derived(u, 0, width) + 2.0**-54)
    return out


class BasePredictor:
    """A predictor of scores: `_learn` and `_scores` see features and standardised targets only.

    Subclasses set `name`, and write `_learn`, `_scores`, `_state` and `_restore`.
    """

    name: ClassVar[str]
    labels_kind: ClassVar[Literal["standard", "ranks"]] = "ranks"
    keeps_data: ClassVar[bool] = False  # whether its state holds the candidates it learnt from
    folds_cheaply: ClassVar[bool] = False  # whether `left_out` costs no more than a fit or so

    def __init__(self) -> None:
        self._inputs: Inputs | None = None
        self._labels: Labels | None = None
        self.n_labels = 0
        self._fit_to: tuple[Features, Floats, int] | None = None
        self._read: Latest[Features] = Latest()

    def fit(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        """See `Predictor.fit`."""
        usable = usable_losses(losses, len(table))
        inputs = Inputs(table, pool)
        labels = Labels(usable, self.labels_kind)
        self._prepare(inputs, None if pool is None else inputs(pool))
        features = inputs(table)
        self._labels, self._read = labels, Latest()
        self._learn(features, labels.targets, seed)
        self._fit_to = features, labels.targets, seed
        self._inputs, self.n_labels = inputs, len(table)

    def update(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        """See `Predictor.update`: from scratch, so that nothing depends on earlier fits."""
        self.fit(table, losses, seed=seed, pool=pool)

    def predict(self, table: Table) -> tuple[Floats, Floats]:
        """See `Predictor.predict`."""
        features, labels = self._ready(table)
        return labels.restore(*self._scores(features))

    def rank(self, table: Table) -> Floats:
        """See `Predictor.rank`."""
        return self._scores(self._ready(table)[0])[0]

    def draw(self, table: Table, u: Floats) -> Floats:
        """See `Predictor.draw`: independent at each candidate unless a subclass knows better."""
        features, labels = self._ready(table)
        return labels.values(self._draw(features, u))

    def held_out(self) -> Floats | None:
        """See `HoldsOut.held_out`."""
        if self._fit_to is None or self._labels is None or not self.folds_cheaply:
            return None
        features, targets, seed = self._fit_to
        if len(targets) < LEAST or not np.ptp(targets):
            return None
        said = self._held_out(features, targets, seed)
        return None if said is None else self._labels.values(said)

    def _held_out(self, features: Features, targets: Floats, seed: int) -> Floats | None:
        return self.left_out(features, targets, folds_of(len(targets), seed), seed)

    def _draw(self, features: Features, u: Floats) -> Floats:
        mean, sd = self._scores(features)
        return mean + sd * normals_of(u, len(features))

    def _ready(self, table: Table) -> tuple[Features, Labels]:
        if self._inputs is None or self._labels is None:
            raise ConfigError(f"predictor {self.name!r} has learnt nothing; allowed: after fit")
        inputs = self._inputs
        return self._read.of(table, lambda: inputs(table)), self._labels

    # -- what a subclass writes -------------------------------------------------------------

    def _prepare(self, inputs: Inputs, pool: Features | None) -> None:
        """A look at the space and the pool before `_learn`, for those that need them."""

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        """Fits targets (n,): mean 0 and about sd 1, the smaller the better."""
        raise NotImplementedError

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        """Means and standard deviations of the targets, (n,) each; sd > 0."""
        raise NotImplementedError

    def left_out(self, features: Features, targets: Floats, folds: Folds, seed: int) -> Floats:
        """Scores of each label by a fit that did not see it, (n,); `folds` are its groups.

        The mean of the scores of what was fitted is taken off each fold's, see `HoldsOut`.
        """
        out = np.empty(len(targets))
        for rows in folds:
            rest = np.setdiff1d(np.arange(len(targets)), rows)
            other = copy.copy(self)
            other._learn(features.take(rest), targets[rest], seed)
            centre = other._scores(features.take(rest))[0].mean()
            out[rows] = other._scores(features.take(rows))[0] - centre
        return out

    def _state(self) -> State:
        """What `_learn` found, as JSON and arrays."""
        raise NotImplementedError

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """The inverse of `_state`."""
        raise NotImplementedError

    # -- files ------------------------------------------------------------------------------

    def state(self, *, with_data: bool = False) -> State:
        """Everything that was learnt, as JSON and arrays named "part/name".

        Raises:
            ConfigError: nothing was learnt, or it cannot be told apart from the data.
        """
        if self._inputs is None or self._labels is None:
            raise ConfigError(f"predictor {self.name!r} has learnt nothing; allowed: after fit")
        if self.keeps_data and not with_data:
            raise ConfigError(
                f"predictor {self.name!r} is its data; allowed: with_data, or another predictor"
            )
        config: dict[str, Any] = {"n_labels": self.n_labels}
        arrays: dict[str, NDArray[Any]] = {}
        parts = {
            "inputs": self._inputs.state(),
            "labels": self._labels.state(),
            "model": self._model_state(with_data=with_data),
        }
        for part, (values, named) in parts.items():
            config[part] = values
            arrays.update({f"{part}/{name}": array for name, array in named.items()})
        return config, arrays

    def _model_state(self, *, with_data: bool) -> State:
        return self._state()

    @classmethod
    def of_state(
        cls, space: Space, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The inverse of `state`."""
        self = cls()
        self._inputs = Inputs.of_state(space, config["inputs"], part_of(arrays, "inputs"))
        self._labels = Labels.of_state(config["labels"], part_of(arrays, "labels"))
        self._restore(config["model"], part_of(arrays, "model"))
        self.n_labels = int(config["n_labels"])
        return self

    def save(self, path: Path, *, with_data: bool = False) -> None:
        """See `Predictor.save`."""
        space = None if self._inputs is None else self._inputs.space
        save_state(self, space, path, with_data=with_data)

    @classmethod
    def load(cls, path: Path, space: Space) -> Self:
        """See `Predictor.load`."""
        return load_state(cls, path, space)


def part_of(arrays: Mapping[str, NDArray[Any]], part: str) -> dict[str, NDArray[Any]]:
    """The arrays of one part, without its name."""
    head = f"{part}/"
    return {name[len(head) :]: array for name, array in arrays.items() if name.startswith(head)}
