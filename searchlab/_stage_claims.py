"""Jobs that another run of the same database is evaluating: their values are waited for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from searchlab._stage_records import Group, of_answer, under_bounds
from searchlab.config import stage_digest
from searchlab.executors.base import Chunk, Done

if TYPE_CHECKING:
    from searchlab.loop import StageRun
    from searchlab.records import Answer

__all__ = ["Claims"]

POLL_S = 0.2  # seconds between looks at what others have found out


class Claims:
    """Claims a stage's jobs before they are submitted, and keeps those that others have.

    Only values of exact evaluators answer other runs, so that only theirs are claimed.
    """

    def __init__(self, leg: StageRun) -> None:
        self._leg = leg
        self._digest = stage_digest(leg.stage)
        exact = leg.stage.evaluator.reproducibility == "exact"
        self._shares = exact and leg.other_runs and hasattr(leg.store, "claim")
        self._elsewhere: dict[int, tuple[Group, int]] = {}

    def mine(self, group: Group, rows: list[int]) -> list[int]:
        """Those of the rows that this run is to evaluate; the others are waited for."""
        if not self._shares or not rows:
            return rows
        keys, jobs = [group.jobs.keys[row] for row in rows], group.jobs
        store = self._leg.store
        taken = store.claim(
            keys, evaluator=self._digest, fidelity=jobs.fidelity, replicate=jobs.replicate
        )
        if not taken and not getattr(store, "claims", False):
            return rows
        # Who held a claim a moment ago may have recorded the value since it was looked for.
        known = self._answers(group, [row for row in rows if jobs.keys[row] not in taken])
        out = []
        for row in rows:
            if jobs.keys[row] in taken or jobs.keys[row] in known:
                self._elsewhere[int(jobs.ids[row])] = group, row
            else:
                out.append(row)
        return out

    def wait(self) -> list[Done]:
        """What has finished, here or elsewhere; waits for at least something to happen."""
        executor = self._leg.executor
        assert executor is not None
        if not self._elsewhere:
            return executor.wait()
        found = self._found()
        if found:
            return found
        began = time.monotonic()
        done = executor.wait(POLL_S)
        if not done:
            time.sleep(max(0.0, POLL_S - (time.monotonic() - began)))
            self._take_over()
        return done

    def _found(self) -> list[Done]:
        """Values that other runs have recorded by now."""
        out, now = [], time.time()
        for group, rows in self._by_group():
            answers = self._answers(group, rows)
            for row in rows:
                key = group.jobs.keys[row]
                if key in answers:
                    del self._elsewhere[int(group.jobs.ids[row])]
                    chunk = Chunk(group.jobs.take([row]), self._leg.evaluator_index)
                    value = of_answer(answers[key])
                    out.append(Done(chunk, value, now, now, "cache", 0, cached=True))
        return out

    def _take_over(self) -> None:
        """Evaluates what others have given up: their run has ended, or failed at it."""
        for group, rows in self._by_group():
            for row in rows:
                del self._elsewhere[int(group.jobs.ids[row])]
            own = self.mine(group, rows)
            if own:
                self._leg.submit(group, own)

    def _by_group(self) -> list[tuple[Group, list[int]]]:
        groups: dict[int, tuple[Group, list[int]]] = {}
        for group, row in self._elsewhere.values():
            groups.setdefault(id(group), (group, []))[1].append(row)
        return list(groups.values())

    def _answers(self, group: Group, rows: list[int]) -> dict[bytes, Answer]:
        leg, jobs = self._leg, group.jobs
        prunes = bool(getattr(leg.stage.evaluator, "prunes", False))
        if not rows:
            return {}
        found = leg.store.lookup(
            [jobs.keys[row] for row in rows],
            evaluator=self._digest,
            fidelity=jobs.fidelity,
            replicate=jobs.replicate,
            other_runs=True,
            pruned=prunes,
        )
        return under_bounds(found, jobs, leg.sign) if prunes else found
