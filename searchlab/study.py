"""The study: a database of runs, each a list of records that survives crashes and is resumed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab._study_lease import Owner, holder_of
from searchlab._study_run import Run
from searchlab._study_schema import (
    Durability,
    check_schema,
    create_schema,
    errors_named,
    file_system,
    insert_rows,
    is_network,
    other_engine,
    sqlite_engine,
    tables,
    without_password,
)
from searchlab._study_store import MemoryRun, Store
from searchlab.errors import RunInUseError, SearchlabWarning, StudyError
from searchlab.records import RECORD_STATES, VOID, Answer, Records

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

__all__ = [
    "RECORD_STATES",
    "VOID",
    "Answer",
    "Database",
    "MemoryRun",
    "Records",
    "Run",
    "RunInfo",
    "Store",
]

_warned: set[Path] = set()


@dataclass(frozen=True)
class RunInfo:
    """One line about a run.

    Attributes:
        name: unique in its database.
        status: what the run was closed with; "running" while it is open, or after a crash.
        live: whether a driver holds the lease and its process is not known to be dead.
        driver: "host:pid" of the lease's holder, "" without one.
        created, updated: seconds since 1970; the latter is the last commit or heartbeat.
        records: committed records, void ones included.
        best: the JSON value that the driver keeps under "best", or None.
        seed, out, space: as given to `open_run`.
    """

    name: str
    status: str
    live: bool
    driver: str
    created: float
    updated: float
    records: int
    best: Any
    seed: int
    out: str
    space: str


class Database:
    """A file or a database server that holds runs.

    Nothing is opened before the first call, and a file is made only by `open_run`.

    Args:
        url_or_path: path of an SQLite file, or an SQLAlchemy URL.
        durability: "process": what was committed survives the death of the process; "power": also
            of the machine (each commit waits for the disk). SQLite only.
        claims: whether runs that are driven at the same time wait for each other's values instead
            of evaluating the same candidate twice; None = on a database server, where a team works.

    Raises:
        StudyError: an unknown durability, or a database in memory.
    """

    def __init__(
        self,
        url_or_path: str | Path,
        *,
        durability: Durability = "process",
        claims: bool | None = None,
    ) -> None:
        if durability not in ("process", "power"):
            raise StudyError(f"durability {durability!r}; allowed: process, power")
        self._durability = durability
        self._engines: dict[bool, Engine] = {}
        self._path = _sqlite_path(url_or_path)
        self._url = "" if self._path else str(url_or_path)
        self._claims = self._path is None if claims is None else claims
        self._where = str(self._path) if self._path else without_password(self._url)

    # -- runs ------------------------------------------------------------------------------

    def open_run(
        self,
        name: str,
        *,
        config: Mapping[str, Any],
        space: str,
        seed: int,
        out: str,
        create: bool = True,
        lease_s: float = 60.0,
    ) -> Run:
        """Makes a run, or resumes it, and takes its lease.

        Args:
            name: of the run.
            config: JSON that determines the run; it must be equal on resume.
            space: fingerprint; it must be equal on resume.
            seed: must be equal on resume.
            out: the run's folder; replaced on resume, as folders may be moved.
            create: False = only resume.
            lease_s: how long the lease holds without a commit or a heartbeat, in seconds.

        Raises:
            RunInUseError: another live process drives the run.
            StudyError: the stored run differs, does not exist (create=False), or the database
                cannot be opened.
        """
        if not name or lease_s <= 0:
            raise StudyError(
                f"name {name!r}, lease_s {lease_s}; allowed: a name, a positive number"
            )
        try:
            # Once through JSON, so that tuples and lists compare equal on resume.
            wanted = json.loads(json.dumps(dict(config)))
        except (TypeError, ValueError) as error:
            raise StudyError(f"config of run {name!r} is not JSON: {error}") from None
        if self._path is not None and not create and not self._path.exists():
            raise StudyError(f"no run {name!r}: there is no database {self._where}")
        owner = Owner.here()
        with errors_named(self._where):
            engine = self._engine(write=True)
            with engine.connect() as connection:
                connection = connection.execution_options(searchlab_write=True)
                with connection.begin():
                    row = self._find(connection, name, lock=True)
                    now = time.time()
                    if row is None:
                        if not create:
                            raise self._unknown(connection, name)
                        self._insert(connection, name, wanted, space, seed, out, now)
                        row = self._find(connection, name)
                        assert row is not None
                    else:
                        _check_same(row, wanted, space, seed)
                        _check_free(row, now)
                    self._take(connection, row, owner, now + lease_s, now, out)
        row = {**row, "out": out}
        return Run(engine, self._where, row, owner=owner, lease_s=lease_s, claims=self._claims)

    def read(self, name: str) -> Run:
        """A run for reading, also while it is driven. Raises StudyError if there is none."""
        with errors_named(self._where):
            engine = self._engine(write=False)
            with engine.connect() as connection, connection.begin():
                row = self._find(connection, name)
                if row is None:
                    raise self._unknown(connection, name)
        return Run(engine, self._where, row, owner=None)

    def runs(self) -> list[RunInfo]:
        """All runs, oldest first; takes no lease. Raises StudyError if there is no database."""
        import sqlalchemy as sa

        schema = tables()
        meta = schema.run_meta
        with errors_named(self._where):
            engine = self._engine(write=False)
            with engine.connect() as connection, connection.begin():
                rows = connection.execute(sa.select(schema.runs).order_by(schema.runs.c.run))
                found = [dict(row._mapping) for row in rows]
                wanted = sa.select(meta.c.run, meta.c.key, meta.c.value).where(
                    meta.c.key.in_(("status", "best"))
                )
                texts = [tuple(row) for row in connection.execute(wanted)]
        now = time.time()
        try:
            values = {(run, key): json.loads(text) for run, key, text in texts}
            return [self._info(row, values, now) for row in found]
        except (RecursionError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise StudyError(f"{self._where}: the table of runs is damaged ({error})") from None

    @staticmethod
    def _info(row: Mapping[str, Any], values: Mapping[tuple[int, str], Any], now: float) -> RunInfo:
        return RunInfo(
            name=str(row["name"]),
            status=str(values.get((row["run"], "status"), "running")),
            live=holder_of(row, now) is not None,
            driver="" if row["owner"] is None else row["owner"].rpartition(":")[0],
            created=float(row["created"]),
            updated=float(row["updated"]),
            records=int(row["records"]),
            best=values.get((row["run"], "best")),
            seed=int(row["seed"]),
            out=str(row["out"]),
            space=str(row["space"]),
        )

    def close(self) -> None:
        """Lets go of the database; runs that are open keep their own connection."""
        for engine in self._engines.values():
            engine.dispose()
        self._engines.clear()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @staticmethod
    def salvage(path: str | Path) -> dict[str, Records]:
        """Whatever records of a damaged file can still be read, by run name.

        The file is not changed. A run whose name is lost is called "run-NUMBER".

        Raises:
            StudyError: nothing can be read.
        """
        from searchlab._study_salvage import salvage

        return salvage(Path(path))

    # -- pieces ----------------------------------------------------------------------------

    def _engine(self, *, write: bool) -> Engine:
        if write in self._engines:
            return self._engines[write]
        engine = self._connect(write=write)
        with engine.connect() as connection:
            connection = connection.execution_options(searchlab_write=write)
            with connection.begin():
                (create_schema if write else check_schema)(connection, self._where)
        self._engines[write] = engine
        return engine

    def _connect(self, *, write: bool) -> Engine:
        if self._path is None:
            return other_engine(self._url)
        shared = is_network(self._path)
        if write:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if shared and self._path not in _warned:
                _warned.add(self._path)
                warnings.warn(
                    f"{self._where} is on a network file system ({file_system(self._path)}): "
                    "slower journal, and readers wait for the writer; a local path is better",
                    SearchlabWarning,
                    stacklevel=5,
                )
        elif not self._path.is_file():
            raise StudyError(f"there is no database {self._where}")
        return sqlite_engine(self._path, write=write, wal=not shared, durability=self._durability)

    @staticmethod
    def _find(connection: Connection, name: str, *, lock: bool = False) -> dict[str, Any] | None:
        import sqlalchemy as sa

        runs = tables().runs
        query = sa.select(runs).where(runs.c.name == name)
        # SQLite has locked the file by then; a server locks the row.
        row = connection.execute(query.with_for_update() if lock else query).first()
        return None if row is None else dict(row._mapping)

    def _unknown(self, connection: Connection, name: str) -> StudyError:
        import sqlalchemy as sa

        runs = tables().runs
        names = connection.execute(sa.select(runs.c.name).order_by(runs.c.run)).scalars().all()
        known = ", ".join(map(str, names)) or "none"
        return StudyError(f"no run {name!r} in {self._where}; there: {known}")

    @staticmethod
    def _insert(
        connection: Connection,
        name: str,
        config: Mapping[str, Any],
        space: str,
        seed: int,
        out: str,
        now: float,
    ) -> None:
        values = {
            "name": name,
            "config": json.dumps(config),
            "space": space,
            "seed": str(seed),
            "out": out,
            "created": now,
            "updated": now,
            "records": 0,
            "lease_until": 0.0,
        }
        insert_rows(connection, tables().runs, tuple(values), [tuple(values.values())])

    @staticmethod
    def _take(
        connection: Connection,
        row: Mapping[str, Any],
        owner: Owner,
        until: float,
        now: float,
        out: str,
    ) -> None:
        schema = tables()
        runs, meta = schema.runs, schema.run_meta
        connection.execute(
            runs.update()
            .where(runs.c.run == row["run"])
            .values(owner=str(owner), lease_until=until, updated=now, out=out)
        )
        connection.execute(schema.claims.delete().where(schema.claims.c.run == row["run"]))
        connection.execute(
            meta.delete().where((meta.c.run == row["run"]) & (meta.c.key == "status"))
        )
        status = [(row["run"], "status", json.dumps("running"))]
        insert_rows(connection, meta, ("run", "key", "value"), status)


# -- checks -------------------------------------------------------------------------------------


def _check_free(row: Mapping[str, Any], now: float) -> None:
    owner = holder_of(row, now)
    if owner is not None:
        raise RunInUseError(
            f"run {row['name']!r} is driven by process {owner.pid} on {owner.host}; its lease ends "
            f"in {row['lease_until'] - now:.0f} s unless it is renewed"
        )


def _check_same(row: Mapping[str, Any], config: Any, space: str, seed: int) -> None:
    differs: tuple[str, Any, Any] | None
    try:
        settings, stored_seed = json.loads(row["config"]), int(row["seed"])
    except (TypeError, ValueError, RecursionError):
        raise StudyError(f"the settings of run {row['name']!r} are damaged") from None
    differs = _difference(settings, config, "config")
    for what, stored, given in (("space", row["space"], space), ("seed", stored_seed, seed)):
        if differs is None and stored != given:
            differs = what, stored, given
    if differs is not None:
        where, old, new = differs
        raise StudyError(
            f"run {row['name']!r} was opened with another {where}: stored {old}, given {new}; "
            "choose another name or the stored settings"
        )


def _difference(old: Any, new: Any, where: str) -> tuple[str, str, str] | None:
    """The first place where two JSON values differ, in the order of the stored one."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in old or key not in new:
                return (
                    f"{where}.{key}",
                    _short(old[key]) if key in old else "nothing",
                    _short(new[key]) if key in new else "nothing",
                )
            found = _difference(old[key], new[key], f"{where}.{key}")
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            found = _difference(a, b, f"{where}[{index}]")
            if found:
                return found
        return None
    # As text: NaN equals itself, True is not 1, and 1 is not 1.0.
    return None if json.dumps(old) == json.dumps(new) else (where, _short(old), _short(new))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _sqlite_path(url_or_path: str | Path) -> Path | None:
    text = str(url_or_path)
    if isinstance(url_or_path, str) and "://" in text:
        if not text.startswith("sqlite"):
            return None
        text = text.partition(":///")[2].partition("?")[0]
    if text in ("", ":memory:"):
        raise StudyError(f"database {str(url_or_path)!r}; allowed: a file (MemoryRun needs none)")
    return Path(text).expanduser()
