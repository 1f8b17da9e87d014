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
from searchlab.predictors.transfer import PREDICTED, SLOPE, Refined, state_of
from searchlab.space import Space

__all__ = ["PREDICTED", "Earlier", "Warm", "with_prediction"]

Floats = NDArray[np.float64]
_ODDS = 19.0  # that what somebody chose to begin with is of use
_EARLIER = "earlier:predicted"  # no name of an evaluator's signal
State = tuple[dict[str, Any], dict[str, NDArray[Any]]]


def with_prediction(
    table: Table, predictor: Predictor | Earlier, *, name: str = PREDICTED
) -> Table:
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
        config, arrays = state_of(self.predictor, with_data=with_data)
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

    The earlier predictor's scores become a signal, and `Refined` learns how far they hold: few
    labels cannot overrule the earlier order, unless it is wrong. Before the first fit it says what
    the earlier predictor says, in that one's unit.

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
        self.refined: Refined | None = None
        self._labels: Labels | None = None
        self._unseen: Floats | None = None
        self._offset, self._centre, self._unit, self._spread = 0.0, 0.0, 1.0, 1.0
        self._space: Space | None = None
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
        if self.frozen and self.earlier is not None:
            self._scale(self.earlier, table, losses, pool)
        else:
            refined = Refined(prior=_EARLIER, make=self._make, odds=_ODDS)
            wide = None if pool is None else self._wide(pool)
            refined.fit(self._wide(table), losses, seed=seed, pool=wide)
            self.refined = refined
        self._space, self.n_labels = table.space, len(table)

    def update(self, table: Table, losses: Floats, *, seed: int, pool: Table | None = None) -> None:
        """See `Predictor.update`: from scratch, so that nothing depends on earlier fits."""
        self.fit(table, losses, seed=seed, pool=pool)

    def _wide(self, table: Table) -> Table:
        if self.earlier is None:
            return table
        return with_prediction(table, self.earlier, name=_EARLIER)

    def _scale(self, earlier: Earlier, table: Table, losses: Floats, pool: Table | None) -> None:
        """The line that gives the earlier scores the unit of these losses."""
        labels = Labels(usable_losses(losses, len(table)), "ranks")
        scores = earlier.rank(table)
        every = scores if pool is None else np.concatenate([scores, earlier.rank(pool)])
        self._centre, self._unit = float(every.mean()), float(every.std()) or 1.0
        old = SLOPE * (scores - self._centre) / self._unit
        self._offset = float((labels.targets - old).mean())
        rest = labels.targets - self._offset - old
        self._spread = float(np.sqrt((rest @ rest + 2.0) / (len(rest) + 2.0)))
        self._labels, self._unseen = labels, labels.values(self._offset + old)

    def storable(self, make: Callable[[], Predictor]) -> Warm:
        """An unfitted one that begins at the same predictor and learns by another kind."""
        return Warm(self.earlier, make=make, frozen=self.frozen)

    def held_out(self) -> Floats | None:
        """See `HoldsOut.held_out`; the earlier predictor has seen none of the labels."""
        return self._unseen if self.refined is None else self.refined.held_out()

    # -- predicting ---------------------------------------------------------------------------

    def predict(self, table: Table) -> tuple[Floats, Floats]:
        """See `Predictor.predict`."""
        earlier = self._begins(table)
        if earlier is None:
            return self._refined.predict(self._wide(table))
        if self._labels is None:
            return earlier.predict(table)
        return self._labels.restore(self._line(earlier, table), np.full(len(table), self._spread))

    def rank(self, table: Table) -> Floats:
        """See `Predictor.rank`."""
        earlier = self._begins(table)
        return self._refined.rank(self._wide(table)) if earlier is None else earlier.rank(table)

    def draw(self, table: Table, u: Floats) -> Floats:
        """See `Predictor.draw`; as the earlier predictor's draws move where there is no other."""
        earlier = self._begins(table)
        if earlier is None:
            return self._refined.draw(self._wide(table), u)
        if self._labels is None:
            return earlier.draw(table, u)
        moved = earlier.draw(table, u) - earlier.predict(table)[0]
        size = float(np.abs(moved).mean()) or 1.0
        return self._labels.values(self._line(earlier, table) + moved * (self._spread / 2 / size))

    def _line(self, earlier: Earlier, table: Table) -> Floats:
        return self._offset + SLOPE * (earlier.rank(table) - self._centre) / self._unit

    @property
    def _refined(self) -> Refined:
        assert self.refined is not None
        return self.refined

    def _begins(self, table: Table) -> Earlier | None:
        """The earlier predictor where it has the say; None = what was learnt has it."""
        if self._space is not None and table.space.fingerprint != self._space.fingerprint:
            raise ConfigError(
                f"a table of space {table.space.fingerprint[:8]}; allowed: "
                f"{self._space.fingerprint[:8]}, the one that was learnt from"
            )
        if self.refined is not None:
            return None
        if self.earlier is None:
            raise ConfigError("predictor 'warm' has learnt nothing; allowed: after fit")
        return self.earlier

    # -- files --------------------------------------------------------------------------------

    def state(self, *, with_data: bool = False) -> State:
        """Everything that was learnt, as JSON and arrays named "part/name".

        Raises:
            ConfigError: nothing was learnt, or a part cannot be told apart from its data.
        """
        if self._labels is None and self.refined is None:
            raise ConfigError("predictor 'warm' has learnt nothing; allowed: after fit")
        out: dict[str, Any] = {"n_labels": self.n_labels, "frozen": self.frozen}
        named: dict[str, NDArray[Any]] = {}
        if self.refined is not None:
            out["refined"], arrays = self.refined.state(with_data=with_data)
            named |= {f"refined/{name}": array for name, array in arrays.items()}
        if self._labels is not None:
            out["line"] = [self._offset, self._centre, self._unit, self._spread]
            out["labels"], arrays = self._labels.state()
            named |= {f"labels/{name}": array for name, array in arrays.items()}
        if self.earlier is not None:
            out["earlier"], arrays = self.earlier.state(with_data=with_data)
            named |= {f"earlier/{name}": array for name, array in arrays.items()}
        return out, named

    @classmethod
    def of_state(
        cls, space: Space, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The inverse of `state`."""
        self = cls(frozen=bool(config["frozen"]))
        if "earlier" in config:
            self.earlier = Earlier.of_state(config["earlier"], part_of(arrays, "earlier"))
        if "refined" in config:
            self.refined = Refined.of_state(space, config["refined"], part_of(arrays, "refined"))
        if "labels" in config:
            self._labels = Labels.of_state(config["labels"], part_of(arrays, "labels"))
            line = (float(value) for value in config["line"])
            self._offset, self._centre, self._unit, self._spread = line
        self.n_labels, self._space = int(config["n_labels"]), space
        return self

    def save(self, path: Path, *, with_data: bool = False) -> None:
        """See `Predictor.save`."""
        save_state(self, self._space, path, with_data=with_data)

    @classmethod
    def load(cls, path: Path, space: Space) -> Self:
        """See `Predictor.load`."""
        return load_state(cls, path, space)
