"""What the loop needs of a store, the batch that every store keeps open, and runs in memory."""

from __future__ import annotations

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from searchlab.errors import StudyError
from searchlab.population import OK, PRUNED, Evaluations, Jobs
from searchlab.records import (
    ANSWER_COLUMNS,
    ROW_COLUMNS,
    Answer,
    Records,
    Row,
    build_rows,
    item_rows,
    records_from_rows,
    void_rows,
)

if TYPE_CHECKING:
    import pandas as pd

    from searchlab.evaluator import Objective
    from searchlab.space import Space

__all__ = ["MAX_ID", "MemoryRun", "Recorder", "Store"]

MAX_ID = 2**62
_PAGE = 2**16
_COLUMN = {name: index for index, name in enumerate(ROW_COLUMNS)}
_ANSWER_AT = tuple(_COLUMN[name] for name in ANSWER_COLUMNS)
_KEY, _EVALUATOR, _STATE = _COLUMN["key"], _COLUMN["evaluator"], _COLUMN["state"]
_STAGE, _FIDELITY, _REPLICATE = _COLUMN["stage"], _COLUMN["fidelity"], _COLUMN["replicate"]


@runtime_checkable
class Store(Protocol):
    """Where the loop keeps its records. What is recorded becomes durable with `commit`."""

    @property
    def name(self) -> str: ...
    def records(self, *, items: bool = False) -> Records:
        """All committed records, ordered by id; per-item scores only when asked for."""

    def record(
        self,
        jobs: Jobs,
        evaluations: Evaluations,
        *,
        packed: Sequence[bytes],
        evaluator: str,
        started: float,
        finished: float,
        worker: str = "local",
        attempts: int = 1,
        cached: ArrayLike | None = None,
        predicted: tuple[ArrayLike, ArrayLike] | None = None,
    ) -> None:
        """Adds one evaluated chunk to the open batch.

        Args:
            jobs: the chunk.
            evaluations: its values, in the order of the jobs.
            packed: the candidates as `Space.pack` gives them.
            evaluator: hex digest of the evaluator's identity.
            started, finished: seconds since 1970.
            worker: who did it.
            attempts: how many tries it took.
            cached: bool (n,); rows that were answered by an earlier record and cost nothing.
            predicted: the mean and the standard deviation that were predicted before, (n,) each.

        Raises:
            StudyError: an id that is recorded already, parts of different length, a run that is
                read only or whose lease another driver has taken.
        """

    def record_void(self, ids: Iterable[int], stage: int, told_at_ask: int) -> None:
        """Adds ids that found no new candidate to the open batch."""

    def commit(self) -> None:
        """Makes the open batch durable in one transaction.

        After an error nothing of the batch is stored, and it stays open for another `commit`.
        """

    def lookup(
        self,
        keys: Sequence[bytes],
        *,
        evaluator: str,
        fidelity: int,
        replicate: int,
        other_runs: bool,
        stage: int | None = None,
        pruned: bool = False,
    ) -> dict[bytes, Answer]:
        """Earlier values of these candidates, the open batch included; rows that are ok.

        Args:
            keys: canonical keys.
            evaluator: hex digest; values of other evaluators answer nothing.
            fidelity: its index.
            replicate: noise block.
            other_runs: whether runs of the same database and space may answer as well.
            stage: only records of this stage (for runs whose stages have different spaces).
            pruned: also rows that are pruned, where no ok row answers.
        """

    def claim(
        self, keys: Sequence[bytes], *, evaluator: str, fidelity: int, replicate: int
    ) -> set[bytes]:
        """Those of the candidates that another run of the database is evaluating now.

        All others are this run's until they are recorded or it is closed. Where there are no other
        runs, or nobody asked for claims, nothing is claimed and the set is empty.
        """

    def set_meta(self, key: str, value: Any) -> None:
        """Sets a JSON value of the run; part of the open batch."""

    def get_meta(self, key: str, default: Any = None) -> Any:
        """A JSON value of the run, the open batch included."""

    def register_evaluator(
        self, digest: str, identity: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> None:
        """Notes what a digest stands for, and in which environment this run evaluates."""

    def evaluators(self) -> dict[int, str]:
        """Digest of every row id that `Records.evaluator` of this run may name."""

    def heartbeat(self) -> None:
        """Keeps the driver's lease; to be called every few seconds while evaluations run."""

    def close(self, status: str) -> None:
        """Commits, notes the status and gives the lease back. Closing twice does nothing."""


class Recorder(ABC):
    """The open batch of a run: checks, rows and values that are not committed yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._rows: list[Row] = []
        self._items: list[tuple[int, str, bytes]] = []
        self._meta: dict[str, str] = {}
        self._seen: dict[int, NDArray[np.bool_]] = {}
        self._lock = threading.RLock()
        self._closed = False

    def record(
        self,
        jobs: Jobs,
        evaluations: Evaluations,
        *,
        packed: Sequence[bytes],
        evaluator: str,
        started: float,
        finished: float,
        worker: str = "local",
        attempts: int = 1,
        cached: ArrayLike | None = None,
        predicted: tuple[ArrayLike, ArrayLike] | None = None,
    ) -> None:
        """See `Store.record`."""
        with self._lock:
            self._check_open()
            rows = build_rows(
                jobs,
                evaluations,
                packed=packed,
                evaluator=self._evaluator_row(evaluator),
                started=started,
                finished=finished,
                worker=worker,
                attempts=attempts,
                cached=cached,
                predicted=predicted,
            )
            items = item_rows(jobs, evaluations)
            self._note(np.asarray(jobs.ids, np.int64))
            self._rows += rows
            self._items += items

    def record_void(self, ids: Iterable[int], stage: int, told_at_ask: int) -> None:
        """See `Store.record_void`."""
        with self._lock:
            self._check_open()
            listed = np.array(list(ids), np.int64)
            self._note(listed)
            self._rows += void_rows(listed.tolist(), stage, told_at_ask, time.time())

    def claim(
        self, keys: Sequence[bytes], *, evaluator: str, fidelity: int, replicate: int
    ) -> set[bytes]:
        """See `Store.claim`."""
        return set()

    def set_meta(self, key: str, value: Any) -> None:
        """See `Store.set_meta`."""
        try:
            text = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise StudyError(f"value of {key!r} is not JSON: {error}") from None
        with self._lock:
            self._check_open()
            self._meta[key] = text

    def get_meta(self, key: str, default: Any = None) -> Any:
        """See `Store.get_meta`."""
        with self._lock:
            text = self._meta.get(key)
            text = self._stored_meta(key) if text is None else text
        try:
            return default if text is None else json.loads(text)
        except (ValueError, TypeError, RecursionError):
            raise StudyError(f"the value of {key!r} of run {self.name!r} is damaged") from None

    def to_pandas(
        self,
        space: Space | Sequence[Space] | None = None,
        objectives: Sequence[Objective] | None = None,
    ) -> pd.DataFrame:
        """All committed records as a data frame, one row each, ordered by id.

        Args:
            space: the space of all stages, or one per stage; later stages, such as the final's,
                have the last one. By default what the run itself keeps of its variables.
            objectives: they name the columns of the values; by default the run's own.

        Returns:
            A frame with a column per part of a record and per variable; a variable with a shape
            is a column of lists. Candidates are left out where no space is known.

        Raises:
            StudyError: more objectives in the records than names.
            SpaceError: stored candidates are not of the given space.
        """
        from searchlab._run_layout import LAYOUT, read_layout
        from searchlab._study_table import to_pandas

        if space is None or objectives is None:
            layout = read_layout(self.get_meta(LAYOUT), self.name)
            if layout is not None:
                space = layout.spaces if space is None else space
                objectives = layout.objectives if objectives is None else objectives
        return to_pandas(self.records(), space, objectives)

    def export_csv(
        self,
        path: str | Path,
        space: Space | Sequence[Space],
        objectives: Sequence[Objective],
    ) -> None:
        """Writes one line per record, candidates decoded; the file appears whole or not at all.

        Args:
            path: target; replaced if it exists.
            space: the space of all stages, or one per stage; later stages, such as the final's,
                have the last one.
            objectives: they name the columns of the values.
        """
        from searchlab._study_table import write_csv

        write_csv(Path(path), self.records(), space, objectives)

    def export_parquet(
        self,
        path: str | Path,
        space: Space | Sequence[Space],
        objectives: Sequence[Objective],
    ) -> None:
        """Like `export_csv`, as Parquet. Raises ConfigError where pyarrow is not installed."""
        from searchlab._study_table import write_parquet

        write_parquet(Path(path), self.records(), space, objectives)

    def _note(self, ids: NDArray[np.int64]) -> None:
        """Marks ids as recorded. Raises StudyError for one that is marked already."""
        if len(ids) == 1 and 0 <= (i := int(ids[0])) <= MAX_ID:
            flags = self._seen.get(i // _PAGE)
            if flags is None:
                flags = self._seen[i // _PAGE] = np.zeros(_PAGE, dtype=bool)
            if flags[i % _PAGE]:
                raise self._repeated(i)
            flags[i % _PAGE] = True
            return
        if not len(ids):
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > MAX_ID:
            raise StudyError(f"id {low if low < 0 else high}; allowed: 0 to {MAX_ID}")
        if len(ids) > 1 and not (ids[1:] > ids[:-1]).all():
            unique, counts = np.unique(ids, return_counts=True)
            if (counts > 1).any():
                raise self._repeated(int(unique[counts > 1][0]))
        # Pages of flags: ids are dense in places, and a final's lie far above the search's.
        first, last = low // _PAGE, high // _PAGE
        pages = [first] if first == last else np.unique(ids // _PAGE).tolist()
        parts = [(page, ids[ids // _PAGE == page] % _PAGE) for page in pages]
        for page, places in parts:
            flags = self._seen.get(page)
            if flags is not None and flags[places].any():
                raise self._repeated(page * _PAGE + int(places[flags[places]][0]))
        for page, places in parts:
            self._seen.setdefault(page, np.zeros(_PAGE, dtype=bool))[places] = True

    def _repeated(self, index: int) -> StudyError:
        return StudyError(f"job {index} of run {self.name!r} is recorded already")

    def _buffered(
        self,
        wanted: set[bytes],
        evaluator: int,
        fidelity: int,
        replicate: int,
        stage: int | None,
        pruned: bool,
    ) -> dict[bytes, Answer]:
        out: dict[bytes, Answer] = {}
        for state in (OK, PRUNED) if pruned else (OK,):
            for row in self._rows:
                fits = row[_STATE] == state and row[_KEY] in wanted
                if fits and _answers(row, evaluator, fidelity, replicate, stage):
                    out.setdefault(row[_KEY], Answer.from_row([row[i] for i in _ANSWER_AT]))
        return out

    def _check_open(self) -> None:
        if self._closed:
            raise StudyError(f"run {self.name!r} is closed")

    @abstractmethod
    def records(self, *, items: bool = False) -> Records: ...
    @abstractmethod
    def _evaluator_row(self, digest: str) -> int: ...
    @abstractmethod
    def _stored_meta(self, key: str) -> str | None: ...


def _answers(row: Row, evaluator: int, fidelity: int, replicate: int, stage: int | None) -> bool:
    return bool(
        row[_EVALUATOR] == evaluator
        and row[_FIDELITY] == fidelity
        and row[_REPLICATE] == replicate
        and (stage is None or row[_STAGE] == stage)
    )


class MemoryRun(Recorder):
    """A run without a file: everything is lost when the process ends."""

    def __init__(self, name: str = "memory") -> None:
        super().__init__(name)
        self._stored: list[Row] = []
        self._stored_items: dict[int, tuple[str, bytes]] = {}
        self._meta_stored: dict[str, str] = {"status": json.dumps("running")}
        self._digests: dict[str, int] = {}
        self._index: dict[tuple[bytes, int, int, int], list[int]] = {}
        self._indexed = 0

    def records(self, *, items: bool = False) -> Records:
        """See `Store.records`."""
        with self._lock:
            rows = sorted(self._stored, key=lambda row: cast(int, row[0]))
            return records_from_rows(rows, self._stored_items if items else None)

    def commit(self) -> None:
        """See `Store.commit`."""
        with self._lock:
            if not self._closed:
                self._stored += self._rows
                self._stored_items.update({i: (kind, raw) for i, kind, raw in self._items})
                self._meta_stored.update(self._meta)
                self._rows, self._items, self._meta = [], [], {}

    def lookup(
        self,
        keys: Sequence[bytes],
        *,
        evaluator: str,
        fidelity: int,
        replicate: int,
        other_runs: bool,
        stage: int | None = None,
        pruned: bool = False,
    ) -> dict[bytes, Answer]:
        """See `Store.lookup`; there are no other runs."""
        with self._lock:
            row_id = self._digests.get(evaluator)
            if row_id is None:
                return {}
            for position in range(self._indexed, len(self._stored)):
                row = self._stored[position]
                if row[_STATE] in (OK, PRUNED):
                    place = (row[_KEY], row[_EVALUATOR], row[_FIDELITY], row[_REPLICATE])
                    self._index.setdefault(place, []).append(position)
            self._indexed = len(self._stored)
            out: dict[bytes, Answer] = {}
            for key in keys:
                rows = [
                    self._stored[i] for i in self._index.get((key, row_id, fidelity, replicate), ())
                ]
                rows = [row for row in rows if stage is None or row[_STAGE] == stage]
                rows = [row for row in rows if pruned or row[_STATE] == OK]
                if rows:
                    first = min(rows, key=lambda row: (row[_STATE] != OK, cast(int, row[0])))
                    out[key] = Answer.from_row([first[i] for i in _ANSWER_AT])
            missing = set(keys) - out.keys()
            return {**out, **self._buffered(missing, row_id, fidelity, replicate, stage, pruned)}

    def register_evaluator(
        self, digest: str, identity: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> None:
        """See `Store.register_evaluator`."""
        self._evaluator_row(digest)

    def evaluators(self) -> dict[int, str]:
        """See `Store.evaluators`."""
        return {row: digest for digest, row in self._digests.items()}

    def heartbeat(self) -> None:
        """Nothing to keep."""

    def close(self, status: str) -> None:
        """See `Store.close`."""
        with self._lock:
            if not self._closed:
                self.set_meta("status", status)
                self.commit()
                self._closed = True

    def _evaluator_row(self, digest: str) -> int:
        return self._digests.setdefault(digest, len(self._digests) + 1)

    def _stored_meta(self, key: str) -> str | None:
        return self._meta_stored.get(key)
