"""Columns of arrays, one row per candidate: populations, jobs and evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import EvaluationError, SpaceError

__all__ = ["FAILED", "INFEASIBLE", "OK", "PRUNED", "STATES", "Evaluations", "Jobs", "Population"]

OK, FAILED, PRUNED, INFEASIBLE = 0, 1, 2, 3
STATES = ("ok", "failed", "pruned", "infeasible")
MANY = 1_000  # rows from which on it pays to see whether all of them are meant
_ARRAYS = ("values", "state", "std_error", "constraints", "signals", "cost_s")
_PARTS = ("state", "reason", "cost_s", "constraints", "signals", "std_error", "items")


def _are_all(rows: NDArray[Any], n: int) -> bool:
    """Whether an index of many rows is of all of them in order: nothing has to be copied then."""
    if n < MANY or len(rows) != n:
        return False
    if rows.dtype == bool:
        return bool(rows.all())
    return bool(rows[0] == 0 and rows[-1] == n - 1 and (np.diff(rows) == 1).all())


def _sent(array: NDArray[Any] | None) -> Any:
    """An array as plain parts: pickling those takes a tenth of the time for small arrays."""
    if array is None or array.dtype.hasobject:
        return array
    return array.dtype.str, array.shape, array.tobytes()


def _arrived(sent: Any) -> Any:
    """The inverse of `_sent`."""
    if not isinstance(sent, tuple):
        return sent
    kind, shape, raw = sent
    return np.ndarray(shape, kind, raw).copy()


class Population:
    """Candidates as read-only columns; every column has one row per candidate.

    Args:
        columns: name -> array (n, *shape of the variable).
    """

    __slots__ = ("_columns", "_length")

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        lengths = {len(column) for column in columns.values()}
        if len(lengths) > 1:
            sizes = {name: len(column) for name, column in columns.items()}
            raise SpaceError(f"columns of a population differ in length: {sizes}")
        views = {name: column.view() for name, column in columns.items()}
        for view in views.values():
            view.flags.writeable = False
        self._columns: dict[str, NDArray[Any]] = views
        self._length = lengths.pop() if lengths else 0

    @classmethod
    def _of(cls, columns: dict[str, NDArray[Any]], length: int) -> Population:
        """A population of arrays of one length that nobody else can write to."""
        out = cls.__new__(cls)
        for column in columns.values():
            column.flags.writeable = False
        out._columns = columns
        out._length = length
        return out

    def __reduce__(self) -> Any:
        """Columns come out of another process as read-only as they went in."""
        columns = {name: _sent(column) for name, column in self._columns.items()}
        return _population_of, (columns, self._length)

    @property
    def columns(self) -> Mapping[str, NDArray[Any]]:
        return self._columns

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name]

    def __len__(self) -> int:
        return self._length

    def take(self, rows: Any) -> Population:
        """The rows that an index array, a boolean mask or a slice selects."""
        if isinstance(rows, np.ndarray) and _are_all(rows, self._length):
            return self
        out, taken, length = Population.__new__(Population), {}, 0
        for name, column in self._columns.items():
            taken[name] = part = column[rows]
            part.flags.writeable = False
            length = len(part)
        out._columns, out._length = taken, length
        return out

    def replace(self, **columns: NDArray[Any]) -> Population:
        """The same population with some columns exchanged."""
        return Population({**self._columns, **columns})

    @staticmethod
    def concat(parts: Sequence[Population]) -> Population:
        """All rows of the parts, in order; the parts have the same columns."""
        if not parts:
            return Population({})
        if len(parts) == 1:
            return parts[0]
        joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0].columns}
        return Population._of(joined, sum(map(len, parts)))

    def equals(self, other: Population) -> bool:
        """Whether names, shapes and all values are the same, bit for bit."""
        return self._columns.keys() == other._columns.keys() and all(
            np.array_equal(column, other[name]) for name, column in self._columns.items()
        )


def _population_of(columns: dict[str, Any], length: int) -> Population:
    return Population._of({name: _arrived(column) for name, column in columns.items()}, length)


@dataclass(frozen=True)
class Jobs:
    """Candidates to evaluate, one row per job = candidate x fidelity x replicate.

    Attributes:
        ids: int64 (n,), increasing. Ids that found no new candidate are void and missing here.
        population: n rows.
        keys: n canonical keys of 16 bytes.
        fidelity: index into the evaluator's fidelities (the last one is the truth).
        replicate: which noise block; equal for all candidates that are compared.
        stage: index of the stage.
        told_at_ask: how many jobs the algorithm had been told when it proposed these.
        bound: float64 (n,), a loss beyond which a candidate need not be finished; NaN = none.
        origin: what made each row ("baseline", "seed", "random", "vary", ...).
        parents: int64 (n, 2), ids of the parents; -1 = none.
        predicted: float64 (n, 2), mean and standard deviation of the loss as predicted when the
            row was proposed; NaN or None = no prediction.
    """

    ids: NDArray[np.int64]
    population: Population
    keys: tuple[bytes, ...]
    fidelity: int = -1
    replicate: int = 0
    stage: int = 0
    told_at_ask: int = 0
    bound: NDArray[np.float64] | None = None
    origin: tuple[str, ...] = ()
    parents: NDArray[np.int64] | None = None
    predicted: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> Any:
        arrays = _sent(self.ids), _sent(self.bound), _sent(self.parents), _sent(self.predicted)
        place = self.fidelity, self.replicate, self.stage, self.told_at_ask
        return _jobs_of, (arrays, self.population, self.keys, place, self.origin)

    def take(self, rows: Iterable[int]) -> Jobs:
        """The jobs at these positions."""
        index = np.asarray(list(rows), dtype=np.int64)
        return Jobs(
            ids=self.ids[index],
            population=self.population.take(index),
            keys=tuple(self.keys[i] for i in index),
            fidelity=self.fidelity,
            replicate=self.replicate,
            stage=self.stage,
            told_at_ask=self.told_at_ask,
            bound=None if self.bound is None else self.bound[index],
            origin=tuple(self.origin[i] for i in index) if self.origin else (),
            parents=None if self.parents is None else self.parents[index],
            predicted=None if self.predicted is None else self.predicted[index],
        )

    @staticmethod
    def concat(parts: Sequence[Jobs]) -> Jobs:
        """All jobs of the parts, which are of one fidelity, replicate and stage, in order."""
        bounds = [part.bound for part in parts if part.bound is not None]
        parents = [part.parents for part in parts if part.parents is not None]
        predicted = [part.predicted for part in parts if part.predicted is not None]
        return replace(
            parts[0],
            ids=np.concatenate([part.ids for part in parts]),
            population=Population.concat([part.population for part in parts]),
            keys=tuple(key for part in parts for key in part.keys),
            bound=np.concatenate(bounds) if bounds else None,
            origin=tuple(text for part in parts for text in part.origin),
            parents=np.concatenate(parents) if parents else None,
            predicted=np.concatenate(predicted) if predicted else None,
        )


def _jobs_of(
    arrays: tuple[Any, ...],
    population: Population,
    keys: tuple[bytes, ...],
    place: tuple[int, int, int, int],
    origin: tuple[str, ...],
) -> Jobs:
    ids, bound, parents, predicted = map(_arrived, arrays)
    return Jobs(ids, population, keys, *place, bound, origin, parents, predicted)


@dataclass
class Evaluations:
    """What an evaluator found out, one row per job, in the order of the jobs.

    Attributes:
        values: float64 (n, m), one column per objective, in the user's sign.
        state: int8 (n,), `OK`, `FAILED`, `PRUNED` or `INFEASIBLE`.
        reason: n strings, empty where ok.
        std_error: float64 (n, m) or None.
        constraints: float64 (n, c); outcome constraints.
        signals: float64 (n, s); low-fidelity quantities, NaN = missing.
        cost_s: float64 (n,), seconds spent on each row.
        items: per-item scores of each row (float arrays), or None.
    """

    values: NDArray[np.float64]
    state: NDArray[np.int8] | None = None
    reason: list[str] | None = None
    std_error: NDArray[np.float64] | None = None
    constraints: NDArray[np.float64] | None = None
    signals: NDArray[np.float64] | None = None
    cost_s: NDArray[np.float64] | None = None
    items: list[NDArray[np.floating[Any]] | None] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = np.asarray(self.values, dtype=np.float64)
        if self.values.ndim == 1:
            self.values = self.values[:, None]
        if self.values.ndim != 2:
            raise EvaluationError(
                f"values have shape {self.values.shape}; allowed: (candidates, objectives)"
            )
        n = len(self.values)
        self.state = np.zeros(n, np.int8) if self.state is None else np.asarray(self.state, np.int8)
        self.reason = [""] * n if self.reason is None else list(self.reason)
        self.cost_s = np.zeros(n) if self.cost_s is None else np.asarray(self.cost_s, np.float64)
        if self.constraints is None:
            self.constraints = np.empty((n, 0))
        if self.signals is None:
            self.signals = np.empty((n, 0))
        for name in _PARTS:
            part = getattr(self, name)
            if part is not None and len(part) != n:
                raise EvaluationError(f"{name} has {len(part)} rows; values have {n}")
        # A value that is not a number is a failure with a name, never something to compare.
        finite = np.isfinite(self.values)
        if finite.all():
            return
        bad = (self.state == OK) & ~finite.all(axis=1)
        for row in np.flatnonzero(bad):
            self.state[row] = FAILED
            self.reason[row] = f"value is not finite: {self.values[row].tolist()}"

    def __len__(self) -> int:
        return len(self.values)

    def __reduce__(self) -> Any:
        state = vars(self)
        return _evaluations_of, (
            {name: _sent(state[name]) if name in _ARRAYS else state[name] for name in state},
        )

    def take(self, rows: Iterable[int]) -> Evaluations:
        """The evaluations at these positions."""
        index = np.asarray(list(rows), dtype=np.int64)
        assert self.state is not None
        assert self.reason is not None
        assert self.cost_s is not None
        assert self.constraints is not None
        assert self.signals is not None
        return Evaluations(
            values=self.values[index],
            state=self.state[index],
            reason=[self.reason[i] for i in index],
            std_error=None if self.std_error is None else self.std_error[index],
            constraints=self.constraints[index],
            signals=self.signals[index],
            cost_s=self.cost_s[index],
            items=None if self.items is None else [self.items[i] for i in index],
        )

    @staticmethod
    def failed(n: int, objectives: int, reason: str, *, signals: int = 0) -> Evaluations:
        """n rows that failed for one reason."""
        return Evaluations(
            values=np.full((n, objectives), np.nan),
            state=np.full(n, FAILED, np.int8),
            reason=[reason] * n,
            signals=np.full((n, signals), np.nan),
        )


def _evaluations_of(parts: dict[str, Any]) -> Evaluations:
    """They were checked where they were made."""
    out = Evaluations.__new__(Evaluations)
    vars(out).update({name: _arrived(p) if name in _ARRAYS else p for name, p in parts.items()})
    return out
