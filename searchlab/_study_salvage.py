"""What can still be read of a damaged study file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab._study_schema import create_schema, sqlite_engine
from searchlab.errors import StudyError
from searchlab.records import RECORD_STATES, ROW_COLUMNS, Records, Row, records_from_rows

if TYPE_CHECKING:
    import sqlite3

__all__ = ["salvage"]

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
_NULL = {"key", "value", *_NUMBERS, *_REALS[1:4]}


def salvage(path: Path) -> dict[str, Records]:
    """Records by run name; see `Database.salvage`."""
    import sqlite3

    if not path.is_file():
        raise StudyError(f"there is no database {path}")
    with tempfile.TemporaryDirectory(prefix="searchlab-salvage-") as folder:
        # A copy: opening a file with a journal beside it would change the file.
        copy = Path(folder) / "copy.db"
        shutil.copyfile(path, copy)
        for suffix in ("-wal", "-journal"):
            beside = path.with_name(path.name + suffix)
            if beside.is_file():
                shutil.copyfile(beside, copy.with_name(copy.name + suffix))
        names: dict[int, str] = {}
        rows: dict[tuple[int, int], Row] = {}
        for attempt in (_read, _read_with_new_head):
            try:
                names, rows = attempt(copy)
            except (sqlite3.Error, OSError):
                continue
            if rows:
                break
    if not rows:
        raise StudyError(f"{path}: no record can be read")
    out: dict[str, Records] = {}
    for run in sorted({run for run, _ in rows}):
        own = [row for (of, _), row in sorted(rows.items()) if of == run]
        out[names.get(run, f"run-{run}")] = records_from_rows(own)
    return out


def _read(path: Path) -> tuple[dict[int, str], dict[tuple[int, int], Row]]:
    import sqlite3

    with closing(sqlite3.connect(path)) as connection:
        connection.text_factory = lambda raw: raw.decode(errors="replace")
        names = {
            run: name
            for run, name in _scan(connection, "runs", ("run", "name"))
            if isinstance(run, int) and isinstance(name, str)
        }
        rows: dict[tuple[int, int], Row] = {}
        for run, *row in _scan(connection, "records", ("run", *ROW_COLUMNS)):
            if isinstance(run, int) and _is_sound(row):
                rows.setdefault((run, row[0]), tuple(row))
        return names, rows


def _read_with_new_head(path: Path) -> tuple[dict[int, str], dict[tuple[int, int], Row]]:
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
        except sqlite3.Error:
            return False
        return True

    last = 0
    while True:
        try:
            for rowid, *row in connection.execute(statement, (last,)):
                last = rowid
                yield tuple(row)
            return
        except sqlite3.Error:
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
