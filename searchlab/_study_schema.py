"""Tables of the study, how its database is opened, and its errors in words."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from searchlab.errors import StudyError
from searchlab.records import ROW_COLUMNS, VOID

if TYPE_CHECKING:
    import sqlite3

    from sqlalchemy import Connection, Engine, MetaData, Table

__all__ = [
    "BUSY_TIMEOUT_S",
    "SCHEMA_VERSION",
    "Durability",
    "Tables",
    "check_schema",
    "create_schema",
    "errors_named",
    "file_system",
    "insert_rows",
    "is_network",
    "other_engine",
    "sqlite_engine",
    "tables",
    "without_password",
]

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 30.0
Durability = Literal["process", "power"]

_MOUNTS = Path("/proc/mounts")
# WAL keeps an index in memory that the machines of such a file system do not share.
_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs",
    "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb", "smb2", "smb3", "smbfs", "wekafs",
    "fuse.beegfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.curlftpfs", "fuse.gcsfuse",
    "fuse.glusterfs", "fuse.goofys", "fuse.juicefs", "fuse.mount_webdav", "fuse.rclone",
    "fuse.s3fs", "fuse.seaweedfs", "fuse.sshfs",
}  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """The tables of one schema."""

    metadata: MetaData
    meta: Table
    runs: Table
    run_meta: Table
    evaluators: Table
    run_evaluators: Table
    records: Table
    items: Table
    claims: Table


@functools.cache
def tables() -> Tables:
    """Builds the tables; imports SQLAlchemy."""
    import sqlalchemy as sa

    big, text, real, blob = sa.BigInteger, sa.Text, sa.Double, sa.LargeBinary
    kinds: dict[str, Any] = {
        "key": blob, "genotype": blob, "values_blob": blob, "std_error": blob, "constraints": blob,
        "signals": blob, "reason": text, "origin": text, "worker": text, "value": real,
        "cost_s": real, "predicted_mean": real, "predicted_sd": real, "started": real,
        "finished": real,
    }  # fmt: skip
    empty = {"key", "value", "values_blob", "std_error", "constraints", "signals", "cost_s",
             "predicted_mean", "predicted_sd"}  # fmt: skip
    metadata = sa.MetaData()

    def column(name: str, kind: Any, *, null: bool = False, unique: bool = False) -> sa.Column[Any]:
        return sa.Column(name, kind, nullable=null, unique=unique or None)

    def key(name: str, kind: Any = sa.Integer, *, counts: bool = False) -> sa.Column[Any]:
        return sa.Column(name, kind, primary_key=True, autoincrement="auto" if counts else False)

    meta = sa.Table("meta", metadata, key("key", text), column("value", text))
    runs = sa.Table(
        "runs",
        metadata,
        key("run", counts=True),
        column("name", text, unique=True),
        column("config", text),
        column("space", text),
        column("seed", text),
        column("out", text),
        column("created", real),
        column("updated", real),
        column("records", big),
        column("owner", text, null=True),
        column("lease_until", real),
    )
    run_meta = sa.Table(
        "run_meta",
        metadata,
        key("run"),
        key("key", text),
        column("value", text),
    )
    evaluators = sa.Table(
        "evaluators",
        metadata,
        key("evaluator", counts=True),
        column("digest", text, unique=True),
        column("identity", text),
    )
    run_evaluators = sa.Table(
        "run_evaluators",
        metadata,
        key("run"),
        key("evaluator"),
        column("environment", text),
        column("registered", real),
    )
    records = sa.Table(
        "records",
        metadata,
        key("run"),
        key("id", big),
        *[column(n, kinds.get(n, big), null=n in empty) for n in ROW_COLUMNS if n != "id"],
    )
    # Void rows have no key; leaving them out keeps the index to what a look-up can find.
    real_rows = records.c.state < VOID
    sa.Index("records_key", records.c.key, sqlite_where=real_rows, postgresql_where=real_rows)
    items = sa.Table(
        "items",
        metadata,
        key("run"),
        key("id", big),
        column("dtype", text),
        column("scores", blob),
    )
    # What a run evaluates just now, so that no other one of the database does the same.
    claims = sa.Table(
        "claims",
        metadata,
        key("key", blob),
        key("evaluator", big),
        key("fidelity", big),
        key("replicate", big),
        column("run", sa.Integer),
    )
    return Tables(
        metadata, meta, runs, run_meta, evaluators, run_evaluators, records, items, claims
    )


def insert_rows(
    connection: Connection, table: Table, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> None:
    """Inserts raw tuples in one call."""
    if not rows:
        return
    if connection.dialect.paramstyle == "qmark":
        # Straight to the driver: naming each value would double the time of a batch.
        marks = ", ".join("?" * len(columns))
        statement = f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES ({marks})"
        connection.exec_driver_sql(statement, list(rows))
    else:
        named: list[Mapping[str, Any]] = [dict(zip(columns, row, strict=True)) for row in rows]
        connection.execute(table.insert(), named)


# -- opening ------------------------------------------------------------------------------------


def sqlite_engine(path: Path, *, write: bool, wal: bool, durability: Durability) -> Engine:
    """An engine for one SQLite file; a connection for reading changes no record."""
    import sqlite3

    import sqlalchemy as sa

    def connect() -> sqlite3.Connection:
        # Transactions are begun below, hence no isolation level of the driver's own.
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={'rwc' if write else _reading(path)}",
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
            uri=True,
        )
        try:
            # The file may be a stranger's: what its schema calls has no side effects then.
            connection.execute("PRAGMA trusted_schema=OFF")
            if write:
                _set_journal(connection, "wal" if wal else "delete")
                # Without WAL, NORMAL may harm the file itself when power fails; FULL does not.
                full = durability == "power" or not wal
                connection.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
                connection.execute("PRAGMA journal_size_limit=67108864")
            else:
                connection.execute("PRAGMA query_only=ON")
        except BaseException:
            connection.close()
            raise
        return connection

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.pool.NullPool)

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that will write takes the lock at once: a later upgrade could fail.
        wanted = connection.get_execution_options().get("searchlab_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if wanted else "BEGIN")

    return engine


def other_engine(url: str) -> Engine:
    """An engine for a database server."""
    import sqlalchemy as sa

    try:
        return sa.create_engine(url, pool_pre_ping=True, hide_parameters=True)
    except (sa.exc.ArgumentError, ImportError, ValueError) as error:
        said = f": {error}" if isinstance(error, ImportError) else ""
        raise StudyError(
            f"database URL {without_password(url)!r} cannot be used{said}; allowed: a file path, "
            "sqlite:///PATH or the URL of an installed driver"
        ) from None


def without_password(url: str) -> str:
    """A URL without what nobody else may read: for messages, files and records."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    place, question, query = rest.partition("?")
    before, at, after = place.rpartition("@")
    if at:
        place = f"{before.partition(':')[0]}@{after}"
    kept = [
        part
        for part in query.split("&")
        if part and "pass" not in part.partition("=")[0].lower() and "@" not in part
    ]
    return f"{scheme}://{place}{question if kept else ''}{'&'.join(kept)}"


def _reading(path: Path) -> str:
    """How a reader opens a file: where it may, it also rolls back what a dead writer left."""
    import os

    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return "rw"
    # SQLite cannot make its locks there; without a journal nobody is writing.
    journal = any(path.with_name(path.name + end).exists() for end in ("-wal", "-journal"))
    return "ro" if journal else "ro&immutable=1"


def _set_journal(connection: sqlite3.Connection, mode: str) -> None:
    """Changes the journal; SQLite's own waiting does not cover this statement."""
    import sqlite3
    import time

    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute(f"PRAGMA journal_mode={mode}")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def file_system(path: Path) -> str:
    """Type of the file system that holds this path, "" where the system does not say."""
    try:
        lines = _MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    resolved = path.absolute().resolve()
    for line in lines:
        parts = line.split(" ")
        if len(parts) < 3:
            continue
        point = parts[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        # Of equal mount points the later line lies on top.
        if len(point) >= best and resolved.is_relative_to(point):
            best, kind = len(point), parts[2]
    return kind


def is_network(path: Path) -> bool:
    """Whether the path lies on a file system that several machines share."""
    return file_system(path) in _NETWORK


def create_schema(connection: Connection, where: str) -> None:
    """Makes the tables in an empty database; checks the version of any other."""
    import sqlalchemy as sa

    schema = tables()
    if connection.dialect.name == "postgresql":
        # Two processes may be the first at once; the number is searchlab's own.
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7204811)")
    there = sa.inspect(connection).get_table_names()
    if there:
        check_schema(connection, where)
        if schema.claims.name not in there:  # a database of before there were any
            schema.claims.create(connection)
        return
    schema.metadata.create_all(connection)
    insert_rows(connection, schema.meta, ("key", "value"), [("schema", str(SCHEMA_VERSION))])


def check_schema(connection: Connection, where: str) -> None:
    """Raises StudyError for a database that is no study, or one of a newer version."""
    import sqlalchemy as sa

    meta = tables().meta
    if not sa.inspect(connection).has_table("meta"):
        raise StudyError(f"{where} is a database, but no study: it has no table 'meta'")
    try:
        found = connection.execute(sa.select(meta.c.value).where(meta.c.key == "schema")).scalar()
    except sa.exc.OperationalError:
        found = None  # somebody else's table of that name
    if found is None or not found.isdecimal():
        raise StudyError(f"{where} is a database, but no study: its schema version is {found!r}")
    if int(found) > SCHEMA_VERSION:
        raise StudyError(
            f"{where} has schema version {found[:20]}; this searchlab reads up to "
            f"{SCHEMA_VERSION}: use a newer searchlab"
        )
    if int(found) < 1:
        raise StudyError(f"{where} has schema version {found}; allowed: 1 to {SCHEMA_VERSION}")


# -- errors -------------------------------------------------------------------------------------


@contextmanager
def errors_named(where: str) -> Iterator[None]:
    """Turns errors of the driver into `StudyError`s of one line."""
    try:
        yield
    except StudyError:
        raise
    except Exception as error:
        text = _explain(error, where)
        if text is None:
            raise
        raise StudyError(text) from error


def _explain(error: Exception, where: str) -> str | None:
    import errno
    import sqlite3

    import sqlalchemy as sa

    cause: BaseException = error
    if isinstance(error, UnicodeError | ValueError | TypeError):
        said = " ".join(str(error).split())
        return (
            f"{where} holds values that no study has ({said[:200]}); `searchlab salvage` reads them"
        )
    if isinstance(error, sa.exc.DBAPIError) and error.orig is not None:
        cause = error.orig
    elif not isinstance(error, sqlite3.Error | OSError | sa.exc.SQLAlchemyError):
        return None
    said = " ".join(str(cause).split())
    full = "is full" in said or getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or ("disk I/O error" in said and _no_space(where)):
        return (
            f"disk full at {where}: earlier records are kept, and the batch waits in memory for "
            "another commit()"
        )
    if "not a database" in said:
        return f"{where} is not a study database ({said}); `searchlab salvage` reads what is left"
    if "malformed" in said:
        return f"{where} is corrupt ({said}); `searchlab salvage` reads what is left"
    if "locked" in said:
        return f"{where} stayed locked by another process for {BUSY_TIMEOUT_S:.0f} s"
    return f"{where}: {said}"


def _no_space(where: str) -> bool:
    try:
        return shutil.disk_usage(Path(where).parent).free < 2**16
    except OSError:
        return False
