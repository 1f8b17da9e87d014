"""What can still be read of a damaged study file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab._study_schema import create_schema, sqlite_engine
from searchlab.errors import StudyError
from searchlab.records import RECORD_STATES, ROW_COLUMNS, Records, Row, records_from_rows

if TYPE_CHECKING:
    import sqlite3

__all__ = ["Salvage", "read_damaged", "salvage"]

_FURTHEST = 2**34  # rows to look ahead behind a damaged page
_BLOBS = ("key", "genotype", "values_blob", "std_error", "constraints", "signals")
_NUMBERS = _BLOBS[2:]
_TEXTS = ("reason", "origin", "worker")
_REALS = ("value", "cost_s", "predicted_mean", "predicted_sd", "started", "finished")
_RANGES = {
    "id": (0, 2**62),
    "replicate": (0, 2**62),
    "told_at_ask": (0, 2**62),
    "parent_a": (-1, 2**62),
    "parent_b": (-1, 2**62),
    "state": (0, len(RECORD_STATES) - 1),
    "fidelity": (-(2**15), 2**15 - 1),
}
_NUMBER = (float, int)
_TABLES: dict[str, dict[str, Any]] = {
    "runs": {
        "run": int,
        "name": str,
        "config": str,
        "space": str,
        "seed": str,
        "out": str,
        "created": _NUMBER,
        "updated": _NUMBER,
        "records": int,
    },
    "run_meta": {"run": int, "key": str, "value": str},
    "evaluators": {"evaluator": int, "digest": str, "identity": str},
    "run_evaluators": {"run": int, "evaluator": int, "environment": str, "registered": _NUMBER},
    "items": {"run": int, "id": int, "dtype": str, "scores": bytes},
}
_NULL = {"key", "value", *_NUMBERS, *_REALS[1:4]}


@dataclass
class Salvage:
    """Readable rows of a damaged file.

    Attributes:
        runs, run_meta, evaluators, run_evaluators, items: rows in the columns of `_TABLES`.
        records: rows in the columns of `ROW_COLUMNS`, by (run, id).
    """

    runs: dict[int, Row] = field(default_factory=dict)
    run_meta: dict[tuple[int, str], Row] = field(default_factory=dict)
    evaluators: dict[int, Row] = field(default_factory=dict)
    run_evaluators: dict[tuple[int, int], Row] = field(default_factory=dict)
    items: dict[tuple[int, int], Row] = field(default_factory=dict)
    records: dict[tuple[int, int], Row] = field(default_factory=dict)

    def names(self) -> dict[int, str]:
        """A name for every run that has records; a lost one is "run-NUMBER", none repeats."""
        out: dict[int, str] = {}
        for run in sorted({run for run, _ in self.records}):
            name = self.runs[run][1] if run in self.runs else f"run-{run}"
            while name in out.values():
                name += "+"
            out[run] = name
        return out

    def rows_of(self, run: int) -> list[Row]:
        """Its records' rows, ordered by id."""
        return [row for (of, _), row in sorted(self.records.items()) if of == run]


def salvage(path: Path) -> dict[str, Records]:
    """Records by run name; see `Database.salvage`."""
    found = read_damaged(path)
    return {name: records_from_rows(found.rows_of(run)) for run, name in found.names().items()}


def read_damaged(path: Path) -> Salvage:
    """Whatever can be read of a file; the file is not changed.

    Raises:
        StudyError: there is no such file, or no record can be read.
    """
    import sqlite3

    if not path.is_file():
        raise StudyError(f"there is no database {path}")
    found = Salvage()
    with tempfile.TemporaryDirectory(prefix="searchlab-salvage-") as folder:
        # A copy: opening a file with a journal beside it would change the file.
        copy = Path(folder) / "copy.db"
        shutil.copyfile(path, copy)
        for suffix in ("-wal", "-journal"):
            beside = path.with_name(path.name + suffix)
            if beside.is_file():
                shutil.copyfile(beside, copy.with_name(copy.name + suffix))
        for attempt in (_read, _read_with_new_head):
            try:
                found = attempt(copy)
            except (sqlite3.Error, UnicodeDecodeError, OSError):
                continue
            if found.records:
                break
    if not found.records:
        raise StudyError(f"{path}: no record can be read")
    return found


def _read(path: Path) -> Salvage:
    import sqlite3

    out = Salvage()
    with closing(sqlite3.connect(path)) as connection:
        connection.text_factory = lambda raw: raw.decode(errors="replace")
        for name, columns in _TABLES.items():
            keys = 2 if name in ("run_meta", "run_evaluators", "items") else 1
            kept: dict[Any, Row] = getattr(out, name)
            try:
                for row in _scan(connection, name, tuple(columns)):
                    if all(
                        isinstance(v, kind) for v, kind in zip(row, columns.values(), strict=True)
                    ):
                        kept.setdefault(row[:keys] if keys > 1 else row[0], row)
            except (sqlite3.Error, UnicodeDecodeError):
                continue  # a table that is not there
        for run, *record in _scan(connection, "records", ("run", *ROW_COLUMNS)):
            if isinstance(run, int) and _is_sound(record):
                out.records.setdefault((run, record[0]), tuple(record))
    return out


def _read_with_new_head(path: Path) -> Salvage:
    """Reads behind a first page that is taken from a new file.

    The first page holds the file's header and the places of the tables, and these are the same in
    every file of one schema.
    """
    fresh = path.with_name("fresh.db")
    engine = sqlite_engine(fresh, write=True, wal=False, durability="process")
    with engine.connect() as connection, connection.begin():
        create_schema(connection, str(fresh))
    engine.dispose()
    head = fresh.read_bytes()
    size = int.from_bytes(head[16:18], "big")
    page = bytearray(head[:size])
    page[28:32] = (path.stat().st_size // size).to_bytes(4, "big")
    page[92:96] = page[24:28]  # says that the size in the header counts
    with open(path, "r+b") as file:
        file.write(page)
    return _read(path)


def _scan(connection: sqlite3.Connection, table: str, columns: tuple[str, ...]) -> Iterator[Row]:
    """All rows of a table that can be read, in the order they were written."""
    import sqlite3

    statement = f"SELECT rowid, {', '.join(columns)} FROM {table} WHERE rowid > ? ORDER BY rowid"

    def readable(after: int) -> bool:
        try:
            connection.execute(f"{statement} LIMIT 1", (after,)).fetchall()
        except (sqlite3.Error, UnicodeDecodeError):  # its own message may be damaged text
            return False
        return True

    last = 0
    while True:
        try:
            for rowid, *row in connection.execute(statement, (last,)):
                if rowid <= last:  # pages that point at each other give rows without end
                    raise sqlite3.DatabaseError("rows are out of order")
                last = rowid
                yield tuple(row)
            return
        except (sqlite3.Error, UnicodeDecodeError):
            # Looks ahead in growing steps, then goes back to the first place that can be read.
            step = 1
            while not readable(last + step):
                step *= 2
                if step > _FURTHEST:
                    return
            low, high = last + step // 2, last + step
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if readable(middle) else (middle, high)
            last = high


def _is_sound(row: list[Any]) -> bool:
    """Whether each value has the type that was written."""
    for name, value in zip(ROW_COLUMNS, row, strict=True):
        if value is None:
            sound = name in _NULL
        elif name in _BLOBS:
            sound = isinstance(value, bytes) and (name not in _NUMBERS or len(value) % 8 == 0)
        elif name in _TEXTS:
            sound = isinstance(value, str)
        elif name in _REALS:
            sound = isinstance(value, float | int)
        else:
            low, high = _RANGES.get(name, (-(2**31), 2**31 - 1))
            sound = isinstance(value, int) and low <= value <= high
        if not sound:
            return False
    return True
