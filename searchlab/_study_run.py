"""A run in a database, written under a driver's lease."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from searchlab._study_claims import claim, release
from searchlab._study_lease import Owner
from searchlab._study_schema import errors_named, insert_rows, tables
from searchlab._study_store import Recorder
from searchlab.errors import StudyError
from searchlab.population import OK, PRUNED
from searchlab.records import ANSWER_COLUMNS, ROW_COLUMNS, Answer, Records, Row, records_from_rows

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

__all__ = ["Run"]

_KEY = ROW_COLUMNS.index("key")
CLAIM_COLUMNS = [ROW_COLUMNS.index(name) for name in ("key", "evaluator", "fidelity", "replicate")]
_KEYS_AT_ONCE = 500  # keys of one look-up statement


class Run(Recorder):
    """A run in a database; made by `Database.open_run` and, for reading, by `Database.read`.

    Attributes:
        name: unique in its database.
        config: what the run was opened with.
        space: fingerprint of its space.
        seed: its seed.
        out: its folder, as given.
        created: seconds since 1970.
        claims: whether `claim` keeps other runs from evaluating the same.
    """

    def __init__(
        self,
        engine: Engine,
        where: str,
        row: Mapping[str, Any],
        *,
        owner: Owner | None,
        lease_s: float = 60.0,
        claims: bool = False,
    ) -> None:
        super().__init__(row["name"])
        self._where = where
        with self._reading():
            self.config: dict[str, Any] = json.loads(row["config"])
            self.space = str(row["space"])
            self.seed = int(row["seed"])
            self.out = str(row["out"])
            self.created = float(row["created"])
        self._run = int(row["run"])
        self._owner = owner
        self._lease_s = lease_s
        self.claims = claims and owner is not None
        self._renewed = time.time()
        self._lost = False
        self._digests: dict[str, int] = {}  # registered for this run
        self._found: dict[str, int] = {}
        self._mine: set[bytes] | None = None  # all keys in the database, where that is known
        self._alone_at: int | None = None  # version of the file in which no other run has records
        self._write: bool | None = None  # what the connection's next transactions are
        with errors_named(where):
            self._connection: Connection = engine.connect()
            if owner is not None:
                ids = self._read("SELECT id FROM records WHERE run = :run", run=self._run)
                self._note(np.array([i for (i,) in ids], np.int64))
                self._mine = None if ids else set()

    # -- reading ---------------------------------------------------------------------------

    def records(self, *, items: bool = False) -> Records:
        """See `Store.records`."""
        listed = ", ".join(ROW_COLUMNS)
        statement = f"SELECT {listed} FROM records WHERE run = :run ORDER BY id"
        with self._lock, errors_named(self._where), _uncollected():
            # One transaction: scores belong to the rows that are seen.
            with self._transaction(write=False) as connection:
                rows = self._fetch(connection, statement, run=self._run)
                scores: list[Row] = []
                if items:
                    scores = self._fetch(
                        connection,
                        "SELECT id, dtype, scores FROM items WHERE run = :run",
                        run=self._run,
                    )
            with self._reading():
                return records_from_rows(rows, {i: (kind, raw) for i, kind, raw in scores})

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
        """See `Store.lookup`; this run answers before others, and earlier runs before later."""
        with self._lock, errors_named(self._where):
            row_id = self._find_evaluator(evaluator)
            if row_id is None:
                return {}
            wanted = dict.fromkeys(keys)
            out: dict[bytes, Answer] = {}
            written = self._all_keys()
            listed = [key for key in wanted if written is None or key in written]
            for start in range(0, len(listed), _KEYS_AT_ONCE):
                part = listed[start : start + _KEYS_AT_ONCE]
                out |= self._stored_answers(
                    part, row_id, fidelity, replicate, other_runs, stage, pruned
                )
            missing = {key for key in wanted if key not in out or out[key].state != OK}
            return out | self._buffered(missing, row_id, fidelity, replicate, stage, pruned)

    def _all_keys(self) -> set[bytes] | None:
        """Every key in the database, if nobody else has written to it; None = not known."""
        if self._mine is None:
            return None
        version = self._version()
        if version is None or version != self._alone_at:
            others = "SELECT 1 FROM runs WHERE run != :run AND records > 0 LIMIT 1"
            if self._read(others, run=self._run):
                return None
            self._alone_at = version
        return self._mine

    def _version(self) -> int | None:
        """Changes when anybody else writes to the file; None where a database cannot tell."""
        driver = self._connection.connection.driver_connection
        if driver is None or self._connection.dialect.name != "sqlite":
            return None
        # Past SQLAlchemy, as this needs no transaction and is asked for before every proposal.
        return int(driver.execute("PRAGMA data_version").fetchone()[0])

    def _stored_answers(
        self,
        keys: list[bytes],
        evaluator: int,
        fidelity: int,
        replicate: int,
        other_runs: bool,
        stage: int | None,
        pruned: bool,
    ) -> dict[bytes, Answer]:
        values: dict[str, Any] = {f"k{i}": key for i, key in enumerate(keys)}
        columns = ", ".join(f"r.{name}" for name in ("key", "run", "id", *ANSWER_COLUMNS))
        # "state < 4" repeats the index's own condition, else it is not used; the plus keeps SQLite
        # from walking through the whole run instead.
        statement = (
            f"SELECT {columns} FROM records r WHERE r.key IN ({', '.join(f':{k}' for k in values)})"
            f" AND r.state < 4 AND r.state IN ({OK}, {PRUNED if pruned else OK})"
            " AND r.evaluator = :evaluator"
            " AND r.fidelity = :fidelity AND r.replicate = :replicate"
        )
        values |= {"evaluator": evaluator, "fidelity": fidelity, "replicate": replicate}
        if other_runs:
            statement += " AND +r.run IN (SELECT run FROM runs WHERE space = :space)"
            values["space"] = self.space
        else:
            statement += " AND +r.run = :run"
            values["run"] = self._run
        if stage is not None:
            statement += " AND r.stage = :stage"
            values["stage"] = stage
        rows = self._read(statement, **values)
        place = 3 + ANSWER_COLUMNS.index("state")
        rows.sort(key=lambda row: (row[place] != OK, row[1] != self._run, row[1], row[2]))
        out: dict[bytes, Answer] = {}
        for key, _, _, *answer in rows:
            if key not in out:
                with self._reading():
                    out[key] = Answer.from_row(answer)
        return out

    def chunk_seconds(self, most: int) -> list[float]:
        """How long the newest evaluations of the search took, one number per call, by id."""
        with self._lock, errors_named(self._where):
            rows = self._read(
                "SELECT started, finished, worker FROM records WHERE run = :run AND cached = 0 "
                "AND state < 3 AND stage < 1000 ORDER BY id DESC LIMIT :most",
                run=self._run,
                most=most,
            )
        calls = dict.fromkeys((row[2], row[0], row[1]) for row in reversed(rows))
        return [max(0.0, float(end) - float(start)) for _, start, end in calls]

    def first_values(self, fidelity: int) -> list[tuple[float, str]]:
        """(value of the first objective, origin) of all that is ok in the search, by id."""
        with self._lock, errors_named(self._where):
            rows = self._read(
                "SELECT value, origin FROM records WHERE run = :run AND state = 0 "
                "AND stage < 1000 AND fidelity = :fidelity ORDER BY id",
                run=self._run,
                fidelity=fidelity,
            )
        return [(float(value), str(origin)) for value, origin in rows if value is not None]

    def evaluators(self) -> dict[int, str]:
        """See `Store.evaluators`."""
        with self._lock, errors_named(self._where):
            rows = self._read(
                "SELECT e.evaluator, e.digest FROM evaluators e JOIN run_evaluators r "
                "ON r.evaluator = e.evaluator WHERE r.run = :run",
                run=self._run,
            )
            with self._reading():
                return {int(row): str(digest) for row, digest in rows}

    def environments(self) -> dict[str, dict[str, Any]]:
        """The environment in which this run uses each evaluator, by digest."""
        with self._lock, errors_named(self._where):
            rows = self._read(
                "SELECT e.digest, r.environment FROM evaluators e JOIN run_evaluators r "
                "ON r.evaluator = e.evaluator WHERE r.run = :run",
                run=self._run,
            )
            return self._mappings(rows)

    def identities(self) -> dict[str, dict[str, Any]]:
        """What each evaluator of this run is, by digest; see `register_evaluator`."""
        with self._lock, errors_named(self._where):
            rows = self._read(
                "SELECT e.digest, e.identity FROM evaluators e JOIN run_evaluators r "
                "ON r.evaluator = e.evaluator WHERE r.run = :run",
                run=self._run,
            )
            return self._mappings(rows)

    # -- writing ---------------------------------------------------------------------------

    def commit(self) -> None:
        """See `Store.commit`."""
        with self._lock:
            if not (self._rows or self._items or self._meta):
                return
            self._check_open()
            run, schema = self._run, tables()
            with errors_named(self._where), self._transaction(write=True) as connection:
                now = self._renew(connection, len(self._rows))
                rows = [(run, *row) for row in self._rows]
                if self._mine is not None:
                    self._mine.update(key for row in self._rows if (key := row[_KEY]) is not None)
                insert_rows(connection, schema.records, ("run", *ROW_COLUMNS), rows)
                items = [(run, *item) for item in self._items]
                insert_rows(connection, schema.items, ("run", "id", "dtype", "scores"), items)
                self._write_meta(connection, self._meta)
                if self.claims:
                    places = [[row[i] for i in CLAIM_COLUMNS] for row in self._rows]
                    release(connection, run, places)
            self._renewed = now
            self._rows, self._items, self._meta = [], [], {}

    def register_evaluator(
        self, digest: str, identity: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> None:
        """See `Store.register_evaluator`; durable at once. Raises StudyError if it is not JSON."""
        try:
            texts = json.dumps(dict(identity)), json.dumps(dict(environment))
        except (TypeError, ValueError) as error:
            raise StudyError(f"evaluator {digest} is not described in JSON: {error}") from None
        with self._lock:
            self._check_open()
            self._register(digest, *texts)

    def claim(
        self, keys: Sequence[bytes], *, evaluator: str, fidelity: int, replicate: int
    ) -> set[bytes]:
        """See `Store.claim`."""
        if not self.claims or not keys:
            return set()
        with self._lock:
            self._check_open()
            place = self._evaluator_row(evaluator), fidelity, replicate
            with errors_named(self._where), self._transaction(write=True) as connection:
                return claim(connection, self._run, keys, place)

    def note(self, key: str, value: Any) -> None:
        """Sets a JSON value at once, apart from the open batch; renews the lease."""
        with self._lock:
            self._check_open()
            with errors_named(self._where), self._transaction(write=True) as connection:
                now = self._renew(connection, 0)
                self._write_meta(connection, {key: json.dumps(value)})
            self._renewed = now

    def heartbeat(self) -> None:
        """See `Store.heartbeat`; writes once per third of the lease. Raises if it was lost."""
        with self._lock:
            self._check_open()
            if time.time() - self._renewed >= self._lease_s / 3:
                self._hold()

    def close(self, status: str) -> None:
        """See `Store.close`."""
        with self._lock:
            if self._closed:
                return
            try:
                if self._owner is not None and not self._lost:
                    self.set_meta("status", status)
                    self.commit()
                    with errors_named(self._where), self._transaction(write=True) as connection:
                        if self.claims:
                            release(connection, self._run, None)
                        self._execute(
                            connection,
                            "UPDATE runs SET owner = NULL, lease_until = 0 "
                            "WHERE run = :run AND owner = :owner",
                            run=self._run,
                            owner=str(self._owner),
                        )
            finally:
                if not self._rows:  # else a full disk: the batch waits for another close
                    self._closed = True
                    self._connection.close()

    # -- pieces ----------------------------------------------------------------------------

    def _check_open(self) -> None:
        super()._check_open()
        if self._owner is None:
            raise StudyError(f"run {self.name!r} is open for reading only")
        if self._lost:
            raise StudyError(f"run {self.name!r} was taken over by another driver")
        if time.time() - self._renewed > self._lease_s:
            self._hold()  # overdue, so another driver may have come

    def _hold(self) -> None:
        with errors_named(self._where), self._transaction(write=True) as connection:
            now = self._renew(connection, 0)
        self._renewed = now

    def _renew(self, connection: Connection, records: int) -> float:
        """Renews the lease in the transaction that writes, so that no other driver fits between."""
        now = time.time()
        held = self._execute(
            connection,
            "UPDATE runs SET lease_until = :until, updated = :now, records = records + :n "
            "WHERE run = :run AND owner = :owner",
            until=now + self._lease_s,
            now=now,
            n=records,
            run=self._run,
            owner=str(self._owner),
        )
        if held != 1:
            self._lost = True
            raise StudyError(f"run {self.name!r} was taken over by another driver")
        return now

    def _write_meta(self, connection: Connection, values: Mapping[str, str]) -> None:
        for key in values:
            self._execute(
                connection,
                "DELETE FROM run_meta WHERE run = :run AND key = :key",
                run=self._run,
                key=key,
            )
        rows = [(self._run, key, text) for key, text in values.items()]
        insert_rows(connection, tables().run_meta, ("run", "key", "value"), rows)

    def _stored_meta(self, key: str) -> str | None:
        with errors_named(self._where):
            rows = self._read(
                "SELECT value FROM run_meta WHERE run = :run AND key = :key", run=self._run, key=key
            )
        return rows[0][0] if rows else None

    def _evaluator_row(self, digest: str) -> int:
        row = self._digests.get(digest)
        return self._register(digest, "{}", None) if row is None else row

    def _find_evaluator(self, digest: str) -> int | None:
        """Row id of a digest that any run has registered; row ids never change."""
        if digest not in self._found:
            rows = self._read(
                "SELECT evaluator FROM evaluators WHERE digest = :digest", digest=digest
            )
            if not rows:
                return None
            self._found[digest] = int(rows[0][0])
        return self._found[digest]

    def _register(self, digest: str, identity: str, environment: str | None) -> int:
        try:
            return self._registered(digest, identity, environment)
        except StudyError:
            # Another run of a shared server may have registered it at the same moment.
            if self._find_evaluator(digest) is None:
                raise
            return self._registered(digest, identity, environment)

    def _registered(self, digest: str, identity: str, environment: str | None) -> int:
        schema = tables()
        with errors_named(self._where), self._transaction(write=True) as connection:
            self._renew(connection, 0)
            found = "SELECT evaluator FROM evaluators WHERE digest = :digest"
            rows = self._fetch(connection, found, digest=digest)
            if not rows:
                insert_rows(
                    connection, schema.evaluators, ("digest", "identity"), [(digest, identity)]
                )
                rows = self._fetch(connection, found, digest=digest)
            row = int(rows[0][0])
            known = self._fetch(
                connection,
                "SELECT environment FROM run_evaluators WHERE run = :run AND evaluator = :row",
                run=self._run,
                row=row,
            )
            if not known:
                insert_rows(
                    connection,
                    schema.run_evaluators,
                    ("run", "evaluator", "environment", "registered"),
                    [(self._run, row, environment or "{}", time.time())],
                )
            elif environment is not None:
                self._execute(
                    connection,
                    "UPDATE run_evaluators SET environment = :text "
                    "WHERE run = :run AND evaluator = :row",
                    text=environment,
                    run=self._run,
                    row=row,
                )
            if identity != "{}":
                self._execute(
                    connection,
                    "UPDATE evaluators SET identity = :text WHERE evaluator = :row",
                    text=identity,
                    row=row,
                )
        self._digests[digest] = row
        return row

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Names the run where what is stored cannot be understood."""
        try:
            yield
        except (ValueError, TypeError, OverflowError, RecursionError, AttributeError) as error:
            text = " ".join(str(error).split())[:200]
            raise StudyError(f"run {self.name!r} in {self._where} is damaged ({text})") from None
        except StudyError as error:
            raise StudyError(f"run {self.name!r} in {self._where}: {error}") from None

    def _mappings(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        with self._reading():
            return {str(digest): dict(json.loads(text)) for digest, text in rows}

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Connection]:
        super()._check_open()
        if write is not self._write:
            self._connection.execution_options(searchlab_write=write)
            self._write = write
        with self._connection.begin():
            yield self._connection

    def _read(self, statement: str, **values: Any) -> list[Row]:
        with self._transaction(write=False) as connection:
            return self._fetch(connection, statement, **values)

    @staticmethod
    def _fetch(connection: Connection, statement: str, **values: Any) -> list[Row]:
        import sqlalchemy as sa

        if connection.dialect.name == "sqlite":
            # The driver reads these names itself, and its own tuples are enough: a look-up takes a
            # third of the time, a large read half.
            result = connection.exec_driver_sql(statement, values)
            return cast("list[Row]", result.cursor.fetchall() if result.cursor else [])
        rows = connection.execute(sa.text(statement), values)
        return [tuple(bytes(v) if isinstance(v, memoryview) else v for v in row) for row in rows]

    @staticmethod
    def _execute(connection: Connection, statement: str, **values: Any) -> int:
        import sqlalchemy as sa

        if connection.dialect.name == "sqlite":
            return connection.exec_driver_sql(statement, values).rowcount
        return connection.execute(sa.text(statement), values).rowcount


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage cycles meanwhile: a million new objects set off hundreds in vain."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
