"""Which run evaluates which candidate just now, in a database that several runs share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from searchlab._study_lease import holder_of
from searchlab._study_schema import tables

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["claim", "release"]

_AT_ONCE = 200  # keys of one statement


def claim(
    connection: Connection, run: int, keys: Sequence[bytes], place: tuple[int, int, int]
) -> set[bytes]:
    """Claims candidates for a run; returns those that another live run holds.

    Claims of a run whose driver is dead, or has let its lease run out, are taken over. To be called
    in a transaction that writes.

    Args:
        connection: of the database.
        run: who claims.
        keys: of the candidates.
        place: row id of the evaluator, fidelity and replicate.
    """
    taken: set[bytes] = set()
    wanted = sorted(set(keys))  # in one order for all, so that no two wait for each other
    for start in range(0, len(wanted), _AT_ONCE):
        taken |= _claim(connection, run, wanted[start : start + _AT_ONCE], place)
    return taken


def _claim(
    connection: Connection, run: int, keys: list[bytes], place: tuple[int, int, int]
) -> set[bytes]:
    import sqlalchemy as sa

    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]

    schema = tables()
    claims, runs = schema.claims, schema.runs
    evaluator, fidelity, replicate = place
    rows = [
        {
            "key": key,
            "evaluator": evaluator,
            "fidelity": fidelity,
            "replicate": replicate,
            "run": run,
        }
        for key in keys
    ]
    connection.execute(insert(claims).on_conflict_do_nothing(), rows)
    here = (
        (claims.c.evaluator == evaluator)
        & (claims.c.fidelity == fidelity)
        & (claims.c.replicate == replicate)
    )
    others = connection.execute(
        sa.select(claims.c.key, claims.c.run, runs.c.owner, runs.c.lease_until)
        .join(runs, runs.c.run == claims.c.run, isouter=True)
        .where(claims.c.key.in_(keys) & here & (claims.c.run != run))
    ).all()
    now, taken = time.time(), set()
    for key, other, owner, until in others:
        if holder_of({"owner": owner, "lease_until": until}, now) is not None:
            taken.add(bytes(key))
            continue
        # Only one of those who find a dead run's claim gets it.
        changed = connection.execute(
            claims.update()
            .where((claims.c.key == key) & here & (claims.c.run == other))
            .values(run=run)
        ).rowcount
        if changed != 1:
            taken.add(bytes(key))
    return taken


def release(connection: Connection, run: int, places: Sequence[Sequence[Any]] | None) -> None:
    """Ends a run's claims: of these (key, evaluator, fidelity, replicate), or all where None."""
    import sqlalchemy as sa

    if places is None:
        connection.execute(sa.text("DELETE FROM claims WHERE run = :run"), {"run": run})
        return
    rows = [
        {"run": run, "key": key, "evaluator": evaluator, "fidelity": fidelity, "replicate": block}
        for key, evaluator, fidelity, block in places
        if key is not None
    ]
    if rows:
        connection.execute(
            sa.text(
                "DELETE FROM claims WHERE run = :run AND key = :key AND evaluator = :evaluator "
                "AND fidelity = :fidelity AND replicate = :replicate"
            ),
            rows,
        )
