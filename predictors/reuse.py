"""What an earlier predictor knows, as the start of a new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from searchlab.config import PREDICTORS, resolve
from searchlab.errors import ConfigError, DataError
from searchlab.evaluator import Signal
from searchlab.predictor import Predictor, Table, table_of
from searchlab.predictor_folder import SignalSchema, space_kind
from searchlab.predictors._mapping import mapped_table, matched
from searchlab.predictors.artifact import (
    described_space,
    kept_space,
    load_predictor,
    load_state,
    read_artifact,
    save_state,
)
from searchlab.predictors.base import part_of
from searchlab.predictors.preprocess import Labels, usable_losses
from searchlab.predictors.stack import Stack
from searchlab.space import Space

__all__ = ["PREDICTED", "Earlier", "Warm", "with_prediction"]

Floats = NDArray[np.float64]
State = tuple[dict[str, Any], dict[str, NDArray[Any]]]

PREDICTED = "predicted"
BELIEF, WORTH = (
    0.7,
    10.0,
)  # slope of new scores on old ones before any label, and its worth in labels
RESERVE = 10.0  # labels' worth of doubt in what is learnt beyond the old scores
FEWEST = 4  # labels below which nothing is learnt beyond them


def with_prediction(table: Table, predictor: Predictor, *, name: str = PREDICTED) -> Table:
    """The table with one more signal: the scores that a fitted predictor gives its candidates.

    Args:
        table: candidates, with the signals that `predictor` was fitted with.
        predictor: fitted on the same space.
        name: of the new signal.

    Raises:
        ConfigError: a signal of this name is there; or the table does not suit the predictor.
    """
    if name in table.signal_names:
        raise ConfigError(f"signal {name!r} is in the table; allowed: a new name")
    scores = predictor.rank(table)
    return replace(
        table,
        signals=np.concatenate([table.signals, scores[:, None]], axis=1),
        signal_names=(*table.signal_names, name),
        directions=(*table.directions, "min"),
    )


class Earlier:
    """A fitted predictor that reads candidates of another space of its kind, or of another task.

    Args:
        predictor: fitted.
        space: what it was fitted on.
        signals: what it was fitted with; None = whatever a table has.
        adapted: the task is another one, so that signals are compared by their ranks among random
            candidates. False = they mean the same.
        background: random candidates of the new task with their signals; needed where adapted.
    """

    def __init__(
        self,
        predictor: Predictor,
        space: Space,
        signals: tuple[SignalSchema, ...] | None,
        *,
        adapted: bool = False,
        background: Callable[[], Table] | None = None,
    ) -> None:
        self.predictor, self.space, self.signals = predictor, space, signals
        self.adapted, self._background = adapted, background
        self._seen: Table | None = None

    @staticmethod
    def of_folder(
        folder: Path, space: Space, *, adapted: bool, background: Callable[[], Table] | None = None
    ) -> Earlier:
        """The predictor in a folder, for candidates of `space`.

        Raises:
            DataError: see `read_artifact`; or it is of a space of another kind.
        """
        artifact = read_artifact(folder)
        if artifact.fingerprint != space.fingerprint and artifact.kind != space_kind(space):
            raise DataError(
                f"predictor in {str(folder)!r} is of {artifact.kind}; allowed: {space_kind(space)}"
            )
        own = space if artifact.fingerprint == space.fingerprint else artifact.space
        signals = None if artifact.task is None else artifact.task.signals
        predictor = load_predictor(folder, own)
        return Earlier(predictor, own, signals, adapted=adapted, background=background)

    def table(self, table: Table) -> Table:
        """Candidates of the new space and task as the predictor reads them."""
        if self.signals is not None:
            table = self._matched(table, self.signals)
        if table.space.fingerprint == self.space.fingerprint:
            return table
        return mapped_table(table, self.space)

    def _matched(self, table: Table, signals: tuple[SignalSchema, ...]) -> Table:
        wanted = {signal.name: signal.direction for signal in signals}
        if self.adapted and wanted and self._seen is None and self._background is not None:
            self._seen = self._background()
        quantiles = {signal.name: signal.quantiles for signal in signals}
        return matched(table, wanted, self._seen if self.adapted else None, quantiles)

    def rank(self, table: Table) -> Floats:
        """See `Predictor.rank`."""
        return self.predictor.rank(self.table(table))

    def predict(self, table: Table) -> tuple[Floats, Floats]:
        """See `Predictor.predict`; in the unit of the old task."""
        return self.predictor.predict(self.table(table))

    def draw(self, table: Table, u: Floats) -> Floats:
        """See `Predictor.draw`; in the unit of the old task."""
        return self.predictor.draw(self.table(table), u)

    def state(self, *, with_data: bool) -> State:
        """Everything, as JSON and arrays."""
        config, arrays = _state_of(self.predictor, with_data=with_data)
        if self.adapted and self.signals and self._seen is None and self._background is not None:
            self._seen = self._background()
        seen = self._seen
        out = {
            "predictor": self.predictor.name,
            "space": described_space(self.space),
            "signals": None
            if self.signals is None
            else [signal.to_json() for signal in self.signals],
            "adapted": self.adapted,
            "state": config,
            "background": None if seen is None else list(seen.signal_names),
        }
        named = {f"state/{name}": array for name, array in arrays.items()}
        if seen is not None:
            named["background"] = seen.signals
        return out, named

    @staticmethod
    def of_state(config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Earlier:
        """The inverse of `state`."""
        space = kept_space(config["space"], str(config["predictor"]))
        kind = resolve(PREDICTORS, str(config["predictor"]), "predictor")
        predictor = kind.of_state(space, config["state"], part_of(arrays, "state"))
        signals = None
        if config["signals"] is not None:
            signals = tuple(SignalSchema.from_json(part) for part in config["signals"])
        self = Earlier(predictor, space, signals, adapted=bool(config["adapted"]))
        if config["background"] is not None:
            # Which candidates they were is not kept: only their signals are looked at.
            names, columns = tuple(config["background"]), arrays["background"]
            rows = space.sample(np.zeros((len(columns), space.sample_width)))
            of = [Signal(name) for name in names]
            self._seen = table_of(Space(space.variables), rows, signals=columns, of=of)
        return self


class Warm:
    """A new predictor that begins at what an earlier one says.

    Targets are normal scores of the losses. A line through the earlier predictor's scores is the
    prior mean, and a new predictor learns what is left. How far that is believed is found from
    labels left out, with doubt that is worth `RESERVE` labels: few labels cannot overrule the
    earlier predictor's order, unless it is wrong. The slope of the line is never negative, and
    labels without any relation to the earlier scores bring it to zero.

    Before the first fit it says what the earlier predictor says, in that one's unit.

    Args:
        earlier: None = there is none, and this is the new predictor on normal scores.
        make: a new predictor; `stack` by default.
        frozen: nothing is learnt but the unit.
    """

    name: ClassVar[str] = "warm"

    def __init__(
        self,
        earlier: Earlier | None = None,
        *,
        make: Callable[[], Predictor] = Stack,
        frozen: bool = False,
    ) -> None:
        self.earlier, self._make, self.frozen = earlier, make, frozen
        self.new: Predictor | None = None
        self.slope, self.share = 0.0, 1.0
        self._offset, self._centre, self._unit = 0.0, 0.0, 1.0
        self._spread = 1.0
        self._labels: Labels | None = None
        self._space: Space | None = None
        self._unseen: Floats | None = None
        self.n_labels = 0

    @classmethod
    def begins_at(
        cls,
        folder: Path,
        space: Space,
        *,
        adapted: bool,
        background: Callable[[], Table],
        make: Callable[[], Predictor],
        frozen: bool,
    ) -> Callable[[], Warm]:
        """What makes predictors that begin at the one in a folder.

        Raises:
            DataError: see `Earlier.of_folder`.
        """
        earlier = Earlier.of_folder(folder, space, adapted=adapted, background=background)
        return lambda: cls(earlier, make=make, frozen=frozen)

    # -- fitting ------------------------------------------------------------------------------

    def fit(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        """See `Predictor.fit`."""
        labels = Labels(usable_losses(losses, len(table)), "ranks")
        y = labels.targets
        old = self._old(table, pool)
        self.slope = self._slope(old, y)
        self._offset = float((y - self.slope * old).mean())
        rest = y - self._offset - self.slope * old
        self.new, self.share, self._unseen = None, 0.0, None
        self._spread = float(np.sqrt((rest @ rest + 2.0) / (len(rest) + 2.0)))
        first = self.earlier is None
        if not self.frozen and (first or len(y) >= FEWEST):
            self.new = self._make()
            self.new.fit(table, rest, seed=seed, pool=pool)
            held = getattr(self.new, "held_out", lambda: None)()
            self.share = 1.0 if first else self._believed(held, rest)
            if held is not None:
                self._unseen = labels.values(self._offset + self.slope * old + self.share * held)
        elif not first:
            self._unseen = labels.values(self._offset + self.slope * old)
        self._labels, self._space, self.n_labels = labels, table.space, len(table)

    def update(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        """See `Predictor.update`: from scratch, so that nothing depends on earlier fits."""
        self.fit(table, losses, seed=seed, pool=pool)

    def _old(self, table: Table, pool: Table | None) -> Floats:
        """Standardised scores of the earlier predictor, (n,); zeros without one."""
        if self.earlier is None:
            return np.zeros(len(table))
        scores = self.earlier.rank(table)
        every = scores if pool is None else np.concatenate([scores, self.earlier.rank(pool)])
        self._centre, self._unit = float(every.mean()), float(every.std()) or 1.0
        return (scores - self._centre) / self._unit

    def _slope(self, old: Floats, y: Floats) -> float:
        if self.earlier is None:
            return 0.0
        if self.frozen:
            return BELIEF
        centred = old - old.mean()
        found = (WORTH * BELIEF + centred @ y) / (WORTH + centred @ centred)
        return float(max(found, 0.0))

    @staticmethod
    def _believed(held: Floats | None, rest: Floats) -> float:
        """Share of what is learnt beyond the old scores that is believed, 0 to 1."""
        if held is None:
            return float(len(rest) / (len(rest) + 10 * RESERVE))
        size = float(held @ held)
        if not size > 0:
            return 0.0
        found = float(held @ rest) / (size * (1 + RESERVE / len(rest)) ** 2)
        return float(np.clip(found, 0.0, 1.0))

    def storable(self, make: Callable[[], Predictor]) -> Warm:
        """An unfitted one that begins at the same predictor and learns by another kind."""
        return Warm(self.earlier, make=make, frozen=self.frozen)

    def held_out(self) -> Floats | None:
        """See `HoldsOut.held_out`; the earlier predictor has seen none of the labels."""
        return self._unseen

    # -- predicting ---------------------------------------------------------------------------

    def _scores(self, table: Table) -> tuple[Floats, Floats]:
        old = np.zeros(len(table))
        if self.earlier is not None:
            old = (self.earlier.rank(table) - self._centre) / self._unit
        mean, sd = self._offset + self.slope * old, np.full(len(table), self._spread)
        if self.new is not None:
            more, sd = self.new.predict(table)
            mean = mean + self.share * more
        return mean, sd

    def predict(self, table: Table) -> tuple[Floats, Floats]:
        """See `Predictor.predict`."""
        self._check(table)
        if self._labels is None:
            assert self.earlier is not None
            return self.earlier.predict(table)
        return self._labels.restore(*self._scores(table))

    def rank(self, table: Table) -> Floats:
        """See `Predictor.rank`."""
        self._check(table)
        if self._labels is None:
            assert self.earlier is not None
            return self.earlier.rank(table)
        return self._scores(table)[0]

    def draw(self, table: Table, u: Floats) -> Floats:
        """See `Predictor.draw`: the mean, moved as draws of what is learnt anew are."""
        self._check(table)
        if self._labels is None:
            assert self.earlier is not None
            return self.earlier.draw(table, u)
        mean, sd = self._scores(table)
        if self.new is None:
            assert self.earlier is not None
            moved = self.earlier.draw(table, u) - self.earlier.predict(table)[0]
            size = float(np.abs(moved).mean()) or 1.0
            return self._labels.values(mean + moved * (float(sd.mean()) / 2 / size))
        return self._labels.values(mean + self.new.draw(table, u) - self.new.predict(table)[0])

    def _check(self, table: Table) -> None:
        if self._labels is None and self.earlier is None:
            raise ConfigError("predictor 'warm' has learnt nothing; allowed: after fit")
        if self._space is not None and table.space.fingerprint != self._space.fingerprint:
            raise ConfigError(
                f"a table of space {table.space.fingerprint[:8]}; allowed: "
                f"{self._space.fingerprint[:8]}, the one that was learnt from"
            )

    # -- files --------------------------------------------------------------------------------

    def state(self, *, with_data: bool = False) -> State:
        """Everything that was learnt, as JSON and arrays named "part/name".

        Raises:
            ConfigError: nothing was learnt, or a part cannot be told apart from its data.
        """
        if self._labels is None:
            raise ConfigError("predictor 'warm' has learnt nothing; allowed: after fit")
        config, arrays = self._labels.state()
        out: dict[str, Any] = {
            "n_labels": self.n_labels,
            "labels": config,
            "line": [self.slope, self._offset, self._centre, self._unit, self._spread],
            "share": self.share,
            "frozen": self.frozen,
        }
        named = {f"labels/{name}": array for name, array in arrays.items()}
        if self.earlier is not None:
            out["earlier"], arrays = self.earlier.state(with_data=with_data)
            named |= {f"earlier/{name}": array for name, array in arrays.items()}
        if self.new is not None:
            out["predictor"] = self.new.name
            out["new"], arrays = _state_of(self.new, with_data=with_data)
            named |= {f"new/{name}": array for name, array in arrays.items()}
        return out, named

    @classmethod
    def of_state(
        cls, space: Space, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The inverse of `state`."""
        self = cls(frozen=bool(config["frozen"]))
        if "earlier" in config:
            self.earlier = Earlier.of_state(config["earlier"], part_of(arrays, "earlier"))
        if "new" in config:
            kind = resolve(PREDICTORS, str(config["predictor"]), "predictor")
            self.new = kind.of_state(space, config["new"], part_of(arrays, "new"))
        self._labels = Labels.of_state(config["labels"], part_of(arrays, "labels"))
        line = (float(value) for value in config["line"])
        self.slope, self._offset, self._centre, self._unit, self._spread = line
        self.share, self.n_labels = float(config["share"]), int(config["n_labels"])
        self._space = space
        return self

    def save(self, path: Path, *, with_data: bool = False) -> None:
        """See `Predictor.save`."""
        save_state(self, self._space, path, with_data=with_data)

    @classmethod
    def load(cls, path: Path, space: Space) -> Self:
        """See `Predictor.load`."""
        return load_state(cls, path, space)


def _state_of(predictor: Predictor, *, with_data: bool) -> State:
    if not (hasattr(predictor, "state") and hasattr(predictor, "of_state")):
        raise ConfigError(
            f"predictor {predictor.name!r} inside another; allowed: one with state and of_state"
        )
    out: State = predictor.state(with_data=with_data)
    return out
