"""A new, sound study from what a damaged file still holds."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchlab._run_layout import LAYOUT, read_layout
from searchlab._study_salvage import Salvage, read_damaged
from searchlab._study_schema import create_schema, errors_named, insert_rows, sqlite_engine, tables
from searchlab._study_table import write_csv
from searchlab.errors import ConfigError, SearchlabError, StudyError
from searchlab.records import ROW_COLUMNS, Records
from searchlab.study import Database, Run

__all__ = ["Rescued", "rescue"]

NEW_NAME = "searchlab.db"
_WIDTHS = {"<f2": 2, "<f4": 4}  # bytes per score


@dataclass(frozen=True)
class Rescued:
    """One run that was read.

    Attributes:
        name: of the run; "run-NUMBER" where it was lost.
        records: how many could be read.
        expected: how many there were, None where that was lost.
        table: the CSV file.
        decoded: whether the table has the variables' values (else the packed candidates as hex).
    """

    name: str
    records: int
    expected: int | None
    table: Path
    decoded: bool


def rescue(path: Path, directory: Path) -> list[Rescued]:
    """Writes every readable row of a damaged file into a new study and into a CSV file per run.

    The damaged file is not changed. A run of the new study can be resumed if its settings could
    be read: the records that were lost are evaluated again.

    Args:
        path: the damaged SQLite file; its journal beside it is read too.
        directory: gets `searchlab.db` and RUN.csv files; must not hold such a study yet.

    Raises:
        ConfigError: the directory holds a study already.
        StudyError: nothing can be read, or the directory cannot be written.
    """
    target = directory / NEW_NAME
    if target.exists():
        raise ConfigError(f"{str(target)!r} exists; allowed: a folder without a study")
    found = read_damaged(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"cannot make {str(directory)!r}: {error.strerror or error}") from None
    names = found.names()
    _write(target, found, names)
    out = []
    with Database(target) as base:
        for run, name in names.items():
            store = base.read(name)
            records = store.records()
            stem = re.sub(r"[^A-Za-z0-9._+-]", "_", name)[:100]
            table = directory / f"{stem}.csv"
            if table.exists() or stem.startswith("."):
                table = directory / f"run-{run}-{stem}.csv"
            decoded = _write_table(table, store, records)
            store.close("")
            expected = int(found.runs[run][8]) if run in found.runs else None
            out.append(Rescued(name, len(records), expected, table, decoded))
    return out


def _write_table(table: Path, store: Run, records: Records) -> bool:
    try:
        layout = read_layout(store.get_meta(LAYOUT), store.name)
        if layout is not None:
            write_csv(table, records, layout.spaces, layout.objectives)
            return True
    except SearchlabError:  # a damaged layout is worth less than the records
        pass
    write_csv(table, records, None, None)
    return False


def _write(target: Path, found: Salvage, names: dict[int, str]) -> None:
    schema = tables()
    now = time.time()
    engine = sqlite_engine(target, write=True, wal=False, durability="power")
    with errors_named(str(target)), engine.connect() as connection, connection.begin():
        create_schema(connection, str(target))
        runs: list[tuple[Any, ...]] = []
        meta = {place: row for place, row in found.run_meta.items() if place[0] in names}
        for run, name in names.items():
            own = len(found.rows_of(run))
            _, _, config, space, seed, out, created, updated, expected = found.runs.get(
                run, (run, name, "{}", "", "0", "", now, now, None)
            )
            if not _is_json(config) or not re.fullmatch(r"-?\d{1,40}", seed):
                config, seed = "{}", "0"
            runs.append((run, name, config, space, seed, out, created, updated, own, None, 0.0))
            if own != expected or (run, "status") not in meta:
                meta[run, "status"] = (run, "status", json.dumps("salvaged"))
        columns = ("run", "name", "config", "space", "seed", "out", "created", "updated")
        insert_rows(connection, schema.runs, (*columns, "records", "owner", "lease_until"), runs)
        kept = [row for row in meta.values() if _is_json(row[2])]
        insert_rows(connection, schema.run_meta, ("run", "key", "value"), kept)
        evaluators, digests = {}, set()
        for row in found.evaluators.values():
            if row[1] not in digests and _is_json(row[2]):
                digests.add(row[1])
                evaluators[row[0]] = row
        # A number that is free again must not be given to another evaluator.
        number = ROW_COLUMNS.index("evaluator")
        for used in sorted({int(row[number]) for row in found.records.values()} - {0}):
            evaluators.setdefault(used, (used, f"lost-{used}", "{}"))
        insert_rows(
            connection,
            schema.evaluators,
            ("evaluator", "digest", "identity"),
            list(evaluators.values()),
        )
        uses = [
            row
            for row in found.run_evaluators.values()
            if row[0] in names and row[1] in evaluators and _is_json(row[2])
        ]
        insert_rows(
            connection,
            schema.run_evaluators,
            ("run", "evaluator", "environment", "registered"),
            uses,
        )
        rows = [(run, *row) for (run, _), row in sorted(found.records.items())]
        insert_rows(connection, schema.records, ("run", *ROW_COLUMNS), rows)
        items = [
            row
            for place, row in found.items.items()
            if place in found.records and _WIDTHS.get(row[2]) and len(row[3]) % _WIDTHS[row[2]] == 0
        ]
        insert_rows(connection, schema.items, ("run", "id", "dtype", "scores"), items)
    engine.dispose()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
