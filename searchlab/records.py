"""Records: what a run keeps of every job, as columns, and the rows that a store writes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from searchlab.errors import SearchlabWarning, StudyError
from searchlab.population import STATES, Evaluations, Jobs

__all__ = [
    "ANSWER_COLUMNS",
    "ITEMS_LIMIT",
    "RECORD_STATES",
    "ROW_COLUMNS",
    "TRACE_COLUMNS",
    "VOID",
    "Answer",
    "Items",
    "Records",
    "Row",
    "build_rows",
    "item_rows",
    "records_from_rows",
    "void_rows",
]

VOID = 4
"""State of an id that found no new candidate; it counts as told and was never evaluated."""

RECORD_STATES = (*STATES, "void")

ITEMS_LIMIT = 2**20
"""Longest list of per-item scores that is kept with one record."""

ROW_COLUMNS = (
    "id",
    "stage",
    "key",
    "genotype",
    "fidelity",
    "replicate",
    "evaluator",
    "state",
    "reason",
    "value",
    "values_blob",
    "std_error",
    "constraints",
    "signals",
    "cost_s",
    "told_at_ask",
    "predicted_mean",
    "predicted_sd",
    "origin",
    "parent_a",
    "parent_b",
    "attempts",
    "worker",
    "started",
    "finished",
    "cached",
)
ANSWER_COLUMNS = (
    "values_blob",
    "std_error",
    "constraints",
    "signals",
    "cost_s",
    "state",
    "reason",
)
_BLOBS = ("key", "genotype", "values_blob", "std_error", "constraints", "signals")
_TEXTS = ("reason", "origin", "worker")
_REALS = ("value", "cost_s", "predicted_mean", "predicted_sd", "started", "finished")
_NULL = (*_BLOBS[2:], "key", *_REALS[:4])
_TYPES: dict[str, set[type]] = {
    name: (
        ({bytes} if name in _BLOBS else {str} if name in _TEXTS else set())
        | ({int, float} if name in _REALS else set())
        | ({int, bool} if name not in (*_BLOBS, *_TEXTS, *_REALS) else set())
        | ({type(None)} if name in _NULL else set())
    )
    for name in ROW_COLUMNS
}
TRACE_COLUMNS = (
    "ids",
    "stage",
    "keys",
    "genotypes",
    "fidelity",
    "replicate",
    "state",
    "values",
)

Row = tuple[Any, ...]
"""One record in the order of `ROW_COLUMNS`; arrays are little-endian float64 bytes or None."""

Items = NDArray[np.floating[Any]]


class Answer(NamedTuple):
    """A recorded evaluation of one candidate: float64 vectors (m,), (m,) or None, (c,), (s,)."""

    values: NDArray[np.float64]
    std_error: NDArray[np.float64] | None
    constraints: NDArray[np.float64]
    signals: NDArray[np.float64]
    cost_s: float
    state: int
    reason: str

    @staticmethod
    def from_row(row: Sequence[Any]) -> Answer:
        """Reads the columns `ANSWER_COLUMNS`."""
        values, std_error, constraints, signals, cost_s, state, reason = row
        return Answer(
            _floats(values),
            None if std_error is None else _floats(std_error),
            _floats(constraints),
            _floats(signals),
            np.nan if cost_s is None else float(cost_s),
            int(state),
            reason,
        )


@dataclass(eq=False)
class Records:
    """Columns of a run's records, one row per job, ordered by id.

    Stages may differ in their numbers of objectives, constraints and signals: the arrays are then
    as wide as the widest row and padded with NaN, and `widths` says what each row has.

    Attributes:
        ids, stage, fidelity, replicate, told_at_ask, attempts: integers (n,).
        keys: canonical keys; None where void.
        genotypes: packed candidates (`Space.unpack` reads them); empty where void.
        evaluator: row ids of the evaluators (see `evaluators()` of the run); 0 = none.
        state: int8 (n,), an index into `RECORD_STATES`.
        values, std_error: float64 (n, m), the user's sign; std_error is NaN where there is none.
        constraints, signals: float64 (n, c) and (n, s).
        cost_s: float64 (n,), seconds.
        predicted_mean, predicted_sd: float64 (n,), NaN = no prediction.
        parents: int64 (n, 2), -1 = none.
        started, finished: float64 (n,), seconds since 1970.
        cached: bool (n,); answered by a record of another run or another id, hence not paid.
        widths: int32 (n, 4), widths of values, std_error (0 = none), constraints and signals.
        items: per-item scores, or None where there are none or they were not asked for.
    """

    ids: NDArray[np.int64]
    stage: NDArray[np.int32]
    keys: list[bytes | None]
    genotypes: list[bytes]
    fidelity: NDArray[np.int16]
    replicate: NDArray[np.int64]
    evaluator: NDArray[np.int64]
    state: NDArray[np.int8]
    reason: list[str]
    values: NDArray[np.float64]
    std_error: NDArray[np.float64]
    constraints: NDArray[np.float64]
    signals: NDArray[np.float64]
    cost_s: NDArray[np.float64]
    told_at_ask: NDArray[np.int64]
    predicted_mean: NDArray[np.float64]
    predicted_sd: NDArray[np.float64]
    origin: list[str]
    parents: NDArray[np.int64]
    attempts: NDArray[np.int32]
    worker: list[str]
    started: NDArray[np.float64]
    finished: NDArray[np.float64]
    cached: NDArray[np.bool_]
    widths: NDArray[np.int32]
    items: list[Items | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Any) -> Records:
        """The rows that an index array, a boolean mask or a slice selects; widths are kept."""
        index = np.arange(len(self))[rows]
        if len(index) == len(self) and (np.diff(index) == 1).all():
            return self  # every row in its place
        picked: dict[str, Any] = {}
        for column in fields(self):
            part = getattr(self, column.name)
            picked[column.name] = (
                [part[i] for i in index] if isinstance(part, list) else part[index]
            )
        return Records(**picked)

    def evaluations(self) -> Evaluations:
        """The rows as evaluations; a void row has NaN values and the state `VOID`.

        Raises:
            StudyError: the rows differ in their number of objectives; take one stage first.
        """
        real = self.widths[self.state != VOID]
        if len(real) and (real[:, 0] != real[0, 0]).any():
            raise StudyError(
                f"records with {sorted(set(real[:, 0].tolist()))} objectives; allowed: one number "
                "of objectives (take the rows of one stage first)"
            )
        m, e, c, s = real.max(axis=0, initial=0).tolist()
        return Evaluations(
            values=self.values[:, :m].copy(),
            state=self.state.copy(),
            reason=list(self.reason),
            std_error=self.std_error[:, :m].copy() if e else None,
            constraints=self.constraints[:, :c].copy(),
            signals=self.signals[:, :s].copy(),
            cost_s=self.cost_s.copy(),
            items=list(self.items) if any(x is not None for x in self.items) else None,
        )

    def trace(self) -> tuple[tuple[Any, ...], ...]:
        """The columns `TRACE_COLUMNS`, comparable with ==.

        Values are compared as bytes, so that equal means equal in every bit; all NaNs are one.
        """
        values = self.values.copy()
        values[np.isnan(values)] = np.nan
        raw = np.ascontiguousarray(values, "<f8").tobytes()
        step = 8 * values.shape[1]
        sizes = (8 * self.widths[:, 0].astype(np.int64)).tolist()
        return (
            tuple(self.ids.tolist()),
            tuple(self.stage.tolist()),
            tuple(self.keys),
            tuple(self.genotypes),
            tuple(self.fidelity.tolist()),
            tuple(self.replicate.tolist()),
            tuple(self.state.tolist()),
            tuple(raw[i * step : i * step + size] for i, size in enumerate(sizes)),
        )


# -- rows ---------------------------------------------------------------------------------------


def build_rows(
    jobs: Jobs,
    evaluations: Evaluations,
    *,
    packed: Sequence[bytes],
    evaluator: int,
    started: float,
    finished: float,
    worker: str = "local",
    attempts: int = 1,
    cached: ArrayLike | None = None,
    predicted: tuple[ArrayLike, ArrayLike] | None = None,
) -> list[Row]:
    """One row per job.

    Raises:
        StudyError: jobs, evaluations, packed candidates or predictions differ in length.
    """
    n = len(jobs)
    if not n == len(evaluations) == len(packed) == len(jobs.keys):
        raise StudyError(
            f"{n} jobs with {len(jobs.keys)} keys, {len(evaluations)} evaluations and "
            f"{len(packed)} packed candidates; allowed: equal numbers"
        )
    state, reason = np.asarray(evaluations.state), list(evaluations.reason or [""] * n)
    cost = np.asarray(evaluations.cost_s, np.float64)
    m = evaluations.values.shape[1]
    nothing: list[Any] = [None] * n
    means, deviations = nothing, nothing
    if predicted is not None:
        means, deviations = (_column(part, n, "predictions").tolist() for part in predicted)
    a, b = [[-1] * n] * 2 if jobs.parents is None else jobs.parents.T.tolist()
    return list(
        zip(
            jobs.ids.tolist(),
            [jobs.stage] * n,
            jobs.keys,
            packed,
            [jobs.fidelity] * n,
            [jobs.replicate] * n,
            [evaluator] * n,
            state.tolist(),
            _texts(reason),
            evaluations.values[:, 0].tolist() if m else nothing,
            _blobs(evaluations.values),
            nothing if evaluations.std_error is None else _blobs(evaluations.std_error),
            _blobs(evaluations.constraints),
            _blobs(evaluations.signals),
            cost.tolist(),
            [jobs.told_at_ask] * n,
            means,
            deviations,
            _texts(jobs.origin) if jobs.origin else [""] * n,
            a,
            b,
            [attempts] * n,
            [_text(worker)] * n,
            [float(started)] * n,
            [float(finished)] * n,
            [0] * n if cached is None else _column(cached, n, "cached").astype(int).tolist(),
            strict=True,
        )
    )


def void_rows(ids: Iterable[int], stage: int, told_at_ask: int, now: float) -> list[Row]:
    """Rows of ids that found no new candidate."""
    blank = (None, b"", 0, 0, 0, VOID, "", None, None, None, None, None, 0.0, told_at_ask)
    rest = (None, None, "", -1, -1, 0, "", now, now, 0)
    return [(int(index), stage, *blank, *rest) for index in ids]


def item_rows(jobs: Jobs, evaluations: Evaluations) -> list[tuple[int, str, bytes]]:
    """(id, dtype, bytes) of every row that has per-item scores.

    Scores are kept as float16, or as float32 where float16 cannot hold their range; more than
    `ITEMS_LIMIT` of them are left out with a warning.
    """
    if evaluations.items is None:
        return []
    out = []
    for index, scores in zip(jobs.ids.tolist(), evaluations.items, strict=True):
        if scores is None:
            continue
        wide = np.asarray(scores, np.float64).ravel()
        if len(wide) > ITEMS_LIMIT:
            warnings.warn(
                f"job {index} has {len(wide)} item scores; more than {ITEMS_LIMIT} are not kept",
                SearchlabWarning,
                stacklevel=4,
            )
            continue
        with np.errstate(over="ignore"):
            small = wide.astype("<f2")
            fits = bool((np.isfinite(small) == np.isfinite(wide)).all())
            kept = small if fits else wide.astype("<f4")
        out.append((index, kept.dtype.str, kept.tobytes()))
    return out


def records_from_rows(
    rows: Sequence[Row], items: Mapping[int, tuple[str, bytes]] | None = None
) -> Records:
    """Columns from rows that are ordered by id; `items` maps ids to (dtype, bytes).

    Raises:
        StudyError: values of another type than what is written: a file was changed by others.
    """
    columns: Sequence[Sequence[Any]] = list(zip(*rows, strict=True)) or [()] * len(ROW_COLUMNS)
    part = dict(zip(ROW_COLUMNS, columns, strict=True))
    for name, column in part.items():
        if not set(map(type, column)) <= _TYPES[name]:
            wrong = next(value for value in column if type(value) not in _TYPES[name])
            raise StudyError(f"damaged records: {name} {str(wrong)[:40]!r} has the wrong type")
    try:
        return _records(part, items or {})
    except (TypeError, ValueError, OverflowError) as error:
        raise StudyError(f"damaged records: {' '.join(str(error).split())[:200]}") from None


def _records(part: Mapping[str, Sequence[Any]], stored: Mapping[int, tuple[str, bytes]]) -> Records:
    values, m = _matrix(part["values_blob"])
    std_error, e = _matrix(part["std_error"], values.shape[1])
    constraints, c = _matrix(part["constraints"])
    signals, s = _matrix(part["signals"])
    states = part["state"]
    if len(states) and not 0 <= min(states) <= max(states) < len(RECORD_STATES):
        raise ValueError(f"states {min(states)} to {max(states)}")
    for name in ("id", "stage"):
        if len(part[name]) and min(part[name]) < 0:
            raise ValueError(f"{name} {min(part[name])}")
    if any(dtype not in ("<f2", "<f4") for dtype, _ in stored.values()):
        raise ValueError("item scores of an unknown type")
    return Records(
        ids=np.array(part["id"], np.int64),
        stage=np.array(part["stage"], np.int32),
        keys=list(part["key"]),
        genotypes=list(part["genotype"]),
        fidelity=np.array(part["fidelity"], np.int16),
        replicate=np.array(part["replicate"], np.int64),
        evaluator=np.array(part["evaluator"], np.int64),
        state=np.array(part["state"], np.int8),
        reason=list(part["reason"]),
        values=values,
        std_error=std_error,
        constraints=constraints,
        signals=signals,
        cost_s=_real(part["cost_s"]),
        told_at_ask=np.array(part["told_at_ask"], np.int64),
        predicted_mean=_real(part["predicted_mean"]),
        predicted_sd=_real(part["predicted_sd"]),
        origin=list(part["origin"]),
        parents=np.array([part["parent_a"], part["parent_b"]], np.int64).T.copy(),
        attempts=np.array(part["attempts"], np.int32),
        worker=list(part["worker"]),
        started=_real(part["started"]),
        finished=_real(part["finished"]),
        cached=np.array(part["cached"], bool),
        widths=np.stack([m, e, c, s], axis=1),
        items=[
            np.frombuffer(stored[i][1], stored[i][0]) if i in stored else None for i in part["id"]
        ],
    )


# -- pieces -------------------------------------------------------------------------------------


def _text(text: str) -> str:
    """The text without what a database refuses: lone surrogates and NUL."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()


def _texts(texts: Sequence[str]) -> list[str]:
    """`_text` of each; most are equal."""
    clean = {text: _text(text) for text in set(texts)}
    return [clean[text] for text in texts]


def _floats(blob: bytes | None) -> NDArray[np.float64]:
    return np.frombuffer(blob or b"", "<f8").astype(np.float64)


def _real(column: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array(column, np.float64)  # None becomes NaN


def _column(part: ArrayLike, n: int, what: str) -> NDArray[Any]:
    column = np.asarray(part)
    if column.shape != (n,):
        raise StudyError(f"{what} of shape {column.shape}; allowed: ({n},)")
    return column


def _blobs(matrix: NDArray[np.float64] | None) -> list[bytes] | list[None]:
    """Each row's bytes; None instead of rows without columns."""
    assert matrix is not None  # filled in by Evaluations.__post_init__
    n, width = matrix.shape
    if not width:
        return [None] * n
    raw = np.ascontiguousarray(matrix, "<f8").tobytes()
    return [raw[i : i + 8 * width] for i in range(0, 8 * width * n, 8 * width)]


def _matrix(
    blobs: Sequence[bytes | None], width: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """float64 (n, widest or `width`), NaN on the right of shorter rows; and the widths (n,)."""
    full = [blob or b"" for blob in blobs]
    sizes = np.array([len(blob) for blob in full], np.int32) // 8
    width = max(width, int(sizes.max(initial=0)))
    if (sizes == width).all():
        flat = np.frombuffer(b"".join(full), "<f8")
        return flat.reshape(len(full), width).astype(np.float64), sizes
    out = np.full((len(full), width), np.nan)
    for size in np.unique(sizes[sizes > 0]).tolist():
        rows = np.flatnonzero(sizes == size)
        flat = np.frombuffer(b"".join(full[i] for i in rows), "<f8")
        out[rows, :size] = flat.reshape(len(rows), size)
    return out, sizes
