"""`stack`: a weighted mean of predictors, weighed by what they say of labels they did not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from searchlab.errors import ConfigError
from searchlab.predictors._latest import Latest
from searchlab.predictors.additive import Additive, Parts
from searchlab.predictors.base import LEAST, BasePredictor, State, folds_of, part_of
from searchlab.predictors.boosted import Boosted
from searchlab.predictors.forest import SHARE, Forest
from searchlab.predictors.gp import GaussianProcess
from searchlab.predictors.label_numbers import number_columns
from searchlab.predictors.preprocess import Features, Inputs, Labels
from searchlab.predictors.ridge import Ridge

__all__ = ["Stack"]

Floats = NDArray[np.float64]

MEMBERS_FROM = {"gbdt": 100}  # labels below which a member is not worth its fit
JUDGED = 10  # labels from which on weights are fitted
# Weights before any label is seen, as ratios.
_BELIEF = {"additive": 0.7, "gp": 0.7, "gbdt": 0.15, "ridge": 0.1, "rf": 0.05}
# Without signals `gp` knows only how many elements differ. Of several variables, some of which
# matter, trees see other things than a sum of effects does, above all what makes losses far worse.
_ALONE, _SEVERAL = {"additive": 4.0}, {True: {"rf": 2.0}, False: {"rf": 0.4}}
_WORTH = 60.0  # labels that this belief is worth


def _member(
    name: str,
    parts: Parts | None = None,
    numbers: Floats | None = None,
    labels: Labels | None = None,
) -> BasePredictor:
    """A new member; with `labels` the forest learns losses and splits by any column."""
    share = SHARE if labels is None else 1.0
    made: dict[str, Any] = {
        "additive": lambda: Additive(parts),
        "gp": GaussianProcess,
        "ridge": Ridge,
        "rf": lambda: Forest(trees=60, share=share, numbers=numbers, labels=labels),
        "gbdt": lambda: Boosted(trees=120, rate=0.1, judged=False),
    }
    member: BasePredictor = made[name]()
    return member


class Stack(BasePredictor):
    """The default: `additive`, `gp`, `gbdt`, `ridge` and `rf` with signals as inputs, joined.

    The weights are those that fit best what the members say of labels in left-out folds, none
    negative, mixed with a fixed belief that counts as much as `_WORTH` labels. `gbdt` joins from
    100 labels on; with fewer it adds time only. `additive` joins where there are several variables;
    of a single one it knows no more than `gp` and `ridge` do. The standard
    deviation joins the members' own and their disagreement, scaled so that it fits the left-out
    labels.

    Without its data, a folder holds all members but `additive` and `gp`; the others' weights are
    then raised.

    Args:
        members: names among additive, gp, gbdt, ridge and rf.
    """

    name: ClassVar[str] = "stack"
    folds_cheaply: ClassVar[bool] = True

    def __init__(self, *, members: Sequence[str] = tuple(_BELIEF)) -> None:
        super().__init__()
        unknown = [name for name in members if name not in _BELIEF]
        if unknown or not members or len(set(members)) < len(members):
            raise ConfigError(
                f"members {list(members)} of a stack; allowed: one or more of {list(_BELIEF)}"
            )
        self.wanted = tuple(members)
        self._parts: Parts | None = None
        self._numbers: Floats | None = None
        self._several, self._alone = True, False
        self.members = {name: _member(name) for name in members}
        self.weights = self._belief()
        self._scale = 1.0
        self._unseen: Floats | None = None
        self._latest: Latest[tuple[Floats, Floats]] = Latest()

    def _belief(self) -> Floats:
        ratios = _BELIEF | _ALONE if self._alone else _BELIEF
        if self._several:
            ratios = ratios | _SEVERAL[self._alone]
        belief = np.array([ratios[name] for name in self.members])
        out: Floats = belief / belief.sum()
        return out

    def _prepare(self, inputs: Inputs, pool: Features | None) -> None:
        self._parts, self._numbers = Parts.of(inputs.space), number_columns(inputs.space)
        self._several = len(inputs.space.variables) > 1

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        n, self._alone = len(targets), not features.signals.shape[1]
        self._latest = Latest()
        names = [name for name in self.wanted if n >= MEMBERS_FROM.get(name, 0)]
        names = [name for name in names if name != "additive" or self._several]
        labels = self._labels if self._several else None
        self.members = {
            name: _member(name, self._parts, self._numbers, labels) for name in names or self.wanted
        }
        members = self.members.values()
        for member in members:
            member._learn(features, targets, seed)
        self.weights, self._scale, self._unseen = self._belief(), 1.0, None
        if n < LEAST or not np.ptp(targets):
            return
        folds = folds_of(n, seed)
        said = np.stack([m.left_out(features, targets, folds, seed) for m in members], axis=1)
        self._unseen = said @ self.weights
        if n < JUDGED:
            return
        for rows in folds:  # what the stack says is to be unseen too, weights included
            rest = np.setdiff1d(np.arange(n), rows)
            self._unseen[rows] = said[rows] @ self._weighed(said[rest], targets[rest])
        self.weights = self._weighed(said, targets)
        # As many labels' worth of belief that the members' own sd is right.
        errors = (said @ self.weights - targets) ** 2
        _, sd = self._scores(features)
        ratio = (errors / np.maximum(sd, 1e-9) ** 2).sum()
        self._scale = float(np.sqrt((ratio + 10.0) / (n + 10.0)))

    def _weighed(self, said: Floats, targets: Floats) -> Floats:
        """Weights (m,) from what the members say (n, m) of labels that they have not seen."""
        found = nnls(said, targets)[0]
        if not found.sum() > 0:
            return self._belief()
        trust = len(targets) / (len(targets) + _WORTH)
        out: Floats = trust * found / found.sum() + (1 - trust) * self._belief()
        return out

    def _held_out(self, features: Features, targets: Floats, seed: int) -> Floats | None:
        return self._unseen

    def _said(self, features: Features) -> tuple[Floats, Floats]:
        """Means and standard deviations of each member, (m, n) each."""

        def made() -> tuple[Floats, Floats]:
            said = [member._scores(features) for member in self.members.values()]
            return np.stack([mean for mean, _ in said]), np.stack([sd for _, sd in said])

        return self._latest.of(features, made)

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        means, sds = self._said(features)
        mean = self.weights @ means
        variance = self.weights @ (sds**2 + (means - mean) ** 2)
        return mean, self._scale * np.sqrt(variance)

    def _draw(self, features: Features, u: Floats) -> Floats:
        """The mean, moved as one member's draw is; each draw takes a member by its weight."""
        u = np.asarray(u, dtype=np.float64)
        means = self._said(features)[0]
        mean = self.weights @ means
        out = np.empty((len(u), len(features)))
        which = np.searchsorted(np.cumsum(self.weights)[:-1], u[:, 0], side="right")
        for at, member in enumerate(self.members.values()):
            rows = which == at
            if rows.any():
                moved = member._draw(features, u[rows]) - means[at]
                out[rows] = mean + self._scale * moved
        return out

    def _model_state(self, *, with_data: bool) -> State:
        kept = [name for name, m in self.members.items() if with_data or not m.keeps_data]
        if not kept:
            raise ConfigError(
                f"members {list(self.members)} are their data; allowed: with_data, or more members"
            )
        weights = self.weights[[list(self.members).index(name) for name in kept]]
        total = float(weights.sum())
        config: dict[str, Any] = {
            "members": kept,
            "wanted": list(self.wanted),
            "left_out": [name for name in self.members if name not in kept],
            "weights": (weights / total if total > 0 else weights + 1 / len(kept)).tolist(),
            "scale": self._scale,
        }
        arrays: dict[str, NDArray[Any]] = {}
        for name in kept:
            config[name], named = self.members[name]._state()
            arrays |= {f"{name}/{key}": array for key, array in named.items()}
        return config, arrays

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self.members = {str(name): _member(name) for name in config["members"]}
        self.wanted = tuple(str(name) for name in config["wanted"])
        self.weights = np.array(config["weights"], dtype=np.float64)
        self._scale = float(config["scale"])
        for name, member in self.members.items():
            member._restore(config[name], part_of(arrays, name))
