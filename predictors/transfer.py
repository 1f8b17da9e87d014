"""`refined`: what an earlier predictor says, left as far as labels of the new task demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from searchlab.config import PREDICTORS, resolve
from searchlab.errors import ConfigError
from searchlab.predictor import Predictor, Table
from searchlab.predictors.artifact import load_state, save_state
from searchlab.predictors.base import LEAST, State, part_of
from searchlab.predictors.preprocess import Labels, Ruler, usable_losses
from searchlab.space import Space
from searchlab.uniforms import derived

__all__ = ["PREDICTED", "Refined", "state_of"]

Floats = NDArray[np.float64]

PREDICTED = "predicted"  # name of the signal that holds the old scores
SLOPE, SLOPE_SD, NOISE = 0.9, 0.2, 0.3  # of normal scores of new losses in those of old scores
FEW = 5  # labels that say nothing about which answer is better
_WORTH = 60.0  # labels' worth of belief that the old order needs no correction
_ODDS = 9.0
_TEMPER = 0.5  # of the evidence of labels held out


class Refined:
    """What an earlier predictor says, a correction, and a fit from scratch, weighed by labels.

    The earlier predictor's scores are a signal of the table (`with_prediction`); a table without
    this signal gives the fit from scratch alone. Two answers are held against each other:

    - old and correction: a multiple of the old scores, whose slope is near `SLOPE` a priori, and a
      predictor fitted to what is left; the correction counts as it foretells residuals that were
      held out, and less while labels are few. Few labels therefore cannot overrule a good old
      predictor.
    - a fit from scratch that knows nothing of the old scores.

    The odds between them are `odds` a priori, and follow what either says of labels held out; an
    old predictor that does not fit is left aside within a few labels.

    Where the predictor behind both cannot tell what it says of labels held out, there is no
    correction, and the odds stay those a priori.

    Args:
        prior: name of the signal.
        new: name of the predictor of the correction and of the fit from scratch.
        make: makes those; None = as `new` says.
        odds: that the old predictor is of use, before any label is seen.
    """

    name: ClassVar[str] = "refined"

    def __init__(
        self,
        *,
        prior: str = PREDICTED,
        new: str = "stack",
        make: Callable[[], Predictor] | None = None,
        odds: float = _ODDS,
    ) -> None:
        self.prior, self._odds = prior, odds
        self._make: Callable[[], Any] = make or resolve(PREDICTORS, new, "predictor")
        self.fresh: Any = self._make()
        self.left: Any = None
        self._labels: Labels | None = None
        self._ruler: Ruler | None = None
        self._unseen: Floats | None = None
        # Old scores become slope * (score - middle) / width; then share times the correction.
        self._middle, self._width, self._slope, self.share = 0.0, 1.0, 0.0, 0.0
        self._error, self.belief = 1.0, 0.0
        self._space: Space | None = None
        self.n_labels = 0

    def fit(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        """See `Predictor.fit`."""
        labels = Labels(usable_losses(losses, len(table)), "ranks")
        targets = labels.targets
        bare = self._bare(table)
        shown = None if pool is None else self._bare(pool)
        self.fresh = self._make()
        self.fresh.fit(bare, targets, seed=seed, pool=shown)
        self.left, self._ruler, self._unseen = None, None, _unseen_by(self.fresh)
        self.belief, self.n_labels = 0.0, len(table)
        self._labels, self._space = labels, table.space
        column = self._column(table)
        if np.isnan(column).all() or not np.ptp(targets):
            return
        seen = column if pool is None else np.concatenate([column, self._column(pool)])
        self._ruler = Ruler.of(seen)
        self._correct(bare, targets, self._ruler(column), seed, shown)

    def _correct(
        self, bare: Table, targets: Floats, old: Floats, seed: int, pool: Table | None
    ) -> None:
        """The slope, the correction of what it leaves, and the odds against the fit anew."""
        n = len(targets)
        # Labels of a search are of the better candidates, so old scores are taken among them.
        self._middle = float(old.sum() / (n + 1))
        self._width = float(np.sqrt((((old - self._middle) ** 2).sum() + 2) / (n + 2)))
        scaled = (old - self._middle) / self._width
        gram = scaled**2 / NOISE
        right = scaled * targets / NOISE
        before = 1 / SLOPE_SD**2
        self._slope = float((right.sum() + SLOPE * before) / (gram.sum() + before))
        others = (right.sum() - right + SLOPE * before) / (gram.sum() - gram + before)
        residual = targets - self._slope * scaled
        self.left = self._make()
        self.left.fit(bare, residual, seed=seed, pool=pool)
        said = _unseen_by(self.left)
        self.share, warm = 0.0, others * scaled
        if said is not None:
            found = float(said @ residual) / float(said @ said + 1e-9)
            self.share = float(np.clip(found, 0.0, 1.0)) * n / (n + _WORTH)
            warm = warm + self.share * said
        self._error = float(np.sqrt((((targets - warm) ** 2).sum() + 2.0) / (n + 2.0)))
        odds = np.log(self._odds)
        if n >= LEAST and self._unseen is not None:
            # A few labels are foreseen by chance, and the others are not independent: all were
            # held out of fits that share most of their labels. So each counts half.
            likely = max(0, n - FEW) / 2 * (_doubt(self._unseen, targets) - _doubt(warm, targets))
            odds += _TEMPER * likely
        self.belief = float(1 / (1 + np.exp(-np.clip(odds, -30, 30))))
        if n >= LEAST:
            fresh = warm if self._unseen is None else self._unseen
            self._unseen = self.belief * warm + (1 - self.belief) * fresh

    def update(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        """See `Predictor.update`: from scratch, so that nothing depends on earlier fits."""
        self.fit(table, losses, seed=seed, pool=pool)

    def held_out(self) -> Floats | None:
        """See `HoldsOut.held_out`."""
        if self._unseen is None or self._labels is None:
            return None
        return self._labels.values(self._unseen)

    # -- saying -----------------------------------------------------------------------------

    def predict(self, table: Table) -> tuple[Floats, Floats]:
        """See `Predictor.predict`."""
        labels = self._ready()
        return labels.restore(*self._scores(table))

    def rank(self, table: Table) -> Floats:
        """See `Predictor.rank`."""
        self._ready()
        return self._scores(table)[0]

    def draw(self, table: Table, u: Floats) -> Floats:
        """See `Predictor.draw`: of the answer that a coin with the odds picks."""
        labels = self._ready()
        u = np.asarray(u, dtype=np.float64)
        bare = self._bare(table)
        mean, moved = self._scores(table)[0], self.fresh.draw(bare, u)
        moved = moved - self.fresh.predict(bare)[0]
        if self.left is not None and len(u):
            warm = derived(u, 2, 1)[:, 0] < self.belief
            said, sd = self.left.predict(bare)
            scale = self._error / float(np.sqrt((sd**2).mean()))
            moved[warm] = scale * (self.left.draw(bare, u[warm]) - said)
        return labels.values(mean + moved)

    def _scores(self, table: Table) -> tuple[Floats, Floats]:
        bare = self._bare(table)
        fresh, fresh_sd = self.fresh.predict(bare)
        if self.left is None or self._ruler is None:
            return fresh, fresh_sd
        column = self._column(table)
        said, sd = self.left.predict(bare)
        scaled = (self._ruler(column) - self._middle) / self._width
        warm = self._slope * scaled + self.share * said
        warm_sd = self._error * sd / np.sqrt((sd**2).mean())
        weight = np.where(np.isnan(column), 0.0, self.belief)
        mean = weight * warm + (1 - weight) * fresh
        variance = weight * (warm_sd**2 + (warm - mean) ** 2)
        variance += (1 - weight) * (fresh_sd**2 + (fresh - mean) ** 2)
        return mean, np.sqrt(variance)

    def _ready(self) -> Labels:
        if self._labels is None:
            raise ConfigError(f"predictor {self.name!r} has learnt nothing; allowed: after fit")
        return self._labels

    def _column(self, table: Table) -> Floats:
        """The old scores, NaN where there are none."""
        if self.prior not in table.signal_names:
            return np.full(len(table), np.nan)
        return table.signals[:, table.signal_names.index(self.prior)]

    def _bare(self, table: Table) -> Table:
        """The table without the old scores."""
        kept = [at for at, name in enumerate(table.signal_names) if name != self.prior]
        if len(kept) == len(table.signal_names):
            return table
        return replace(
            table,
            signals=table.signals[:, kept],
            signal_names=tuple(table.signal_names[at] for at in kept),
            directions=tuple(table.directions[at] for at in kept),
        )

    # -- files ------------------------------------------------------------------------------

    def state(self, *, with_data: bool = False) -> State:
        """Everything that was learnt, as JSON and arrays; see `BasePredictor.state`."""
        labels = self._ready()
        config: dict[str, Any] = {
            "prior": self.prior,
            "new": self.fresh.name,
            "n_labels": self.n_labels,
            "numbers": [self._middle, self._width, self._slope, self.share, self._error],
            "belief": self.belief,
        }
        config["labels"], named = labels.state()
        arrays = {f"labels/{name}": array for name, array in named.items()}
        if self._ruler is not None:
            ends = np.array([self._ruler.low, self._ruler.high])
            ruler = {"values": self._ruler.values, "scores": self._ruler.scores, "ends": ends}
            arrays |= {f"ruler/{name}": array for name, array in ruler.items()}
        for part, fitted in (("fresh", self.fresh), ("left", self.left)):
            if fitted is not None:
                config[part], named = state_of(fitted, with_data=with_data)
                arrays |= {f"{part}/{name}": array for name, array in named.items()}
        return config, arrays

    def save(self, path: Path, *, with_data: bool = False) -> None:
        """See `Predictor.save`."""
        save_state(self, self._space, path, with_data=with_data)

    @classmethod
    def of_state(
        cls, space: Space, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The inverse of `state`."""
        self = cls(prior=str(config["prior"]), new=str(config["new"]))
        numbers = (float(value) for value in config["numbers"])
        self._middle, self._width, self._slope, self.share, self._error = numbers
        self.belief, self.n_labels = float(config["belief"]), int(config["n_labels"])
        self._labels = Labels.of_state(config["labels"], part_of(arrays, "labels"))
        self._space = space
        self.fresh = self.fresh.of_state(space, config["fresh"], part_of(arrays, "fresh"))
        if "left" in config:
            self.left = self.fresh.of_state(space, config["left"], part_of(arrays, "left"))
            ruler = part_of(arrays, "ruler")
            low, high = ruler["ends"].tolist()
            self._ruler = Ruler(ruler["values"], ruler["scores"], low, high)
        return self

    @classmethod
    def load(cls, path: Path, space: Space) -> Self:
        """See `Predictor.load`."""
        return load_state(cls, path, space)


def state_of(predictor: Predictor, *, with_data: bool) -> State:
    """What a predictor inside another has learnt.

    Raises:
        ConfigError: it cannot say.
    """
    if not (hasattr(predictor, "state") and hasattr(predictor, "of_state")):
        raise ConfigError(
            f"predictor {predictor.name!r} inside another; allowed: one with state and of_state"
        )
    out: State = predictor.state(with_data=with_data)
    return out


def _unseen_by(predictor: Predictor) -> Floats | None:
    """What it says of labels held out; None = it cannot tell."""
    held: Floats | None = getattr(predictor, "held_out", lambda: None)()
    return held


def _doubt(said: Floats, targets: Floats) -> float:
    """Log of the share of variance that predictions leave; 0 = they say nothing."""
    size = float(
        np.sqrt(((said - said.mean()) ** 2).sum() * ((targets - targets.mean()) ** 2).sum())
    )
    if not size > 0:
        return 0.0
    rho = float((said - said.mean()) @ (targets - targets.mean())) / size
    return float(np.log(1 - np.clip(rho, 0.0, 0.99) ** 2))
