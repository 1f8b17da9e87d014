"""The loop: asks by the lag rule, submits, records, tells in id order; resume is not special."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Told
from searchlab.config import Answers, Stage, stage_digest
from searchlab.errors import EvaluationError, StudyError
from searchlab.evaluator import losses
from searchlab.executors.base import Chunk, Done, Executor
from searchlab.population import OK, Evaluations, Jobs

if TYPE_CHECKING:
    from searchlab.records import Records
    from searchlab.study import Store

__all__ = ["Callback", "Progress", "StageRun", "stage_answers"]

HOPELESS = 20  # a stage whose first jobs all failed is stopped after this many
MAX_EMPTY_GROUPS = 16  # consecutive groups without a new candidate: the space is taken as exhausted


@dataclass(frozen=True)
class Progress:
    """What a callback hears after every recorded batch."""

    stage: str
    issued: int
    finished: int
    paid: int
    hits: int
    failed: int
    budget: int | None
    seconds: float
    best: dict[int, float]
    done: tuple[Done, ...] = ()


class Callback(Protocol):
    """Hears of progress; what it raises stops the run after everything finished was recorded."""

    def __call__(self, progress: Progress) -> None: ...


@dataclass
class _Group:
    """Jobs of one ask group with what is known of them."""

    jobs: Jobs
    first_id: int
    end_id: int
    losses: NDArray[np.float64]
    violation: NDArray[np.float64]
    done: NDArray[np.bool_]
    told: int = 0  # rows told so far


@dataclass
class StageRun:
    """Runs one stage of a run from its first id to its end.

    Group g of q jobs is proposed by the state that was told exactly the jobs with
    id < first + g * q + q - lag: proposals depend on the seed, the lag and the recorded values,
    never on timing. Records that exist already are answers like any other, so that resuming a run
    and starting one are the same code.

    Attributes:
        stage: what to run.
        index: its number within the run.
        first_id: its first job id.
        seed, lag, chunk: see `SearchConfig`; lag >= the algorithm's quantum.
        store: where records go.
        executor: where chunks go; it was started with this stage's evaluator at `evaluator_index`.
        replicate: the noise block of this stage's jobs.
        seeds: what the algorithm proposes first.
        recompute: ask for every group, also for known ones, and compare (verify).
    """

    stage: Stage
    index: int
    first_id: int
    seed: int
    store: Store
    executor: Executor | None
    algorithm: Algorithm
    lag: int
    chunk: int
    evaluator_index: int = 0
    replicate: int = 0
    group_by: str | None = None
    callbacks: tuple[Callback, ...] = ()
    other_runs: bool = True
    recompute: bool = False
    mismatches: list[str] = field(default_factory=list)
    stop_reason: str = ""
    interrupted: bool = False

    def __post_init__(self) -> None:
        self._q = self.algorithm.quantum
        self._groups: deque[_Group] = deque()
        self._by_id: dict[int, tuple[_Group, int]] = {}
        self._waiting: dict[bytes, list[int]] = {}
        self._next_id = self.first_id
        self._told_bound = self.first_id
        self._open = 0
        self._empty_groups = 0
        self._fidelity = self.stage.fidelity_index
        self._digest = stage_digest(self.stage)
        self._started = time.monotonic()
        self.paid = self.hits = self.finished = self.failed = 0
        self.best: dict[int, float] = {}
        self._m = len(self.stage.evaluator.objectives)

    # -- running ----------------------------------------------------------------------------

    def run(self) -> int:
        """Runs to the end of the stage; returns the first id after it.

        Raises:
            EvaluationError: the first jobs failed one and all.
        """
        known = self._load()
        try:
            while True:
                self._fill(known)
                if not self._open:
                    break
                self._drain()
        except KeyboardInterrupt:
            self.interrupted = True
            self.stop_reason = "interrupted"
        finally:
            self.store.commit()
        return self._next_id

    def _load(self) -> _Known:
        records = self.store.records()
        records = records.take(np.flatnonzero(records.stage == self.index))
        known = _Known(records, self.stage)
        self.algorithm.issue(known.jobs.ids, known.jobs.keys)
        return known

    def _fill(self, known: _Known) -> None:
        """Asks and submits while the lag rule, the executor and the budget allow."""
        while not self.stop_reason:
            start, q = self._next_id, self._q
            need = start + q - self.lag
            if not self._answered_below(need):
                return
            if not self.recompute and (self._next_id + q - 1) < known.complete_until(q, start):
                self._take_known(known)
                continue
            if self.executor is not None and not self.executor.has_room():
                return
            n = self._room(q)
            if n == 0:
                return
            self._tell_below(need)
            jobs = self.algorithm.ask(start, n)
            jobs = replace(
                jobs,
                fidelity=self._fidelity,
                replicate=self.replicate,
                stage=self.index,
                told_at_ask=max(0, need - self.first_id),
            )
            if self.recompute and not self._compare(jobs, known, start, n):
                return
            self._empty_groups = 0 if len(jobs) else self._empty_groups + 1
            if self._exhausted(start):
                self.stop_reason = "exhausted"
                return
            self._enter(jobs, start, start + n, known)

    def _exhausted(self, start: int) -> bool:
        if not self._empty_groups:
            return False
        only_seeds = self.algorithm.name == "listed"
        if only_seeds:
            return start - self.first_id >= len(self.algorithm.seeds.population)
        return self._empty_groups >= MAX_EMPTY_GROUPS

    def _room(self, q: int) -> int:
        """How many jobs of the next group the budget allows."""
        budget = self.stage.budget
        if budget.seconds is not None and time.monotonic() - self._started > budget.seconds:
            self.stop_reason = "time is up"
            return 0
        if budget.evaluations is None:
            return q
        # Jobs in flight will be paid; seeds that are baselines are not part of the budget.
        used = self.paid + self._in_flight + (self.hits if budget.includes_hits else 0)
        baselines = self._baselines_in(self._next_id, q)
        room = min(q, budget.evaluations - used + baselines)
        if room <= 0:
            if not self._open:
                self.stop_reason = "budget"
            return 0
        return room

    @property
    def _in_flight(self) -> int:
        return self._open_paid

    _open_paid = 0

    def _baselines_in(self, first_id: int, n: int) -> int:
        start = first_id - self.first_id
        origins = self.algorithm.seeds.origin[start : start + n]
        return sum(origin.startswith("baseline") for origin in origins)

    def _enter(self, jobs: Jobs, first_id: int, end_id: int, known: _Known) -> None:
        group = _Group(
            jobs,
            first_id,
            end_id,
            np.full((len(jobs), self._m), np.inf),
            np.zeros(len(jobs)),
            np.zeros(len(jobs), dtype=bool),
        )
        self._groups.append(group)
        self._next_id = end_id
        void = np.setdiff1d(np.arange(first_id, end_id), jobs.ids)
        void = void[~np.isin(void, known.void_ids)]
        if len(void) and not self.recompute:
            self.store.record_void(void, self.index, max(0, first_id + self._q - self.lag))
        if not len(jobs):
            return
        open_rows = self._answer_from_records(group, known)
        if self.recompute:
            if open_rows:
                self.stop_reason = "end of records"
            return
        if open_rows:
            open_rows = self._answer_from_cache(group, open_rows)
        if open_rows:
            self._submit(group, open_rows)

    def _answer_from_records(self, group: _Group, known: _Known) -> list[int]:
        missing = []
        for row, i in enumerate(group.jobs.ids.tolist()):
            at = known.row_of.get(i)
            if at is None:
                missing.append(row)
                continue
            if known.jobs.keys[at] != group.jobs.keys[row]:
                raise StudyError(
                    f"record {i} of stage {self.stage.name!r} holds another candidate than this "
                    "version proposes; run `searchlab verify` or start under a new name"
                )
            group.losses[row] = known.losses[at]
            group.violation[row] = known.violation[at]
            group.done[row] = True
            self._count(group, row, bool(known.cached[at]), bool(known.failed[at]))
        return missing

    def _answer_from_cache(self, group: _Group, rows: list[int]) -> list[int]:
        """Answers of equal jobs: of this run always, of other runs where values are exact."""
        exact = self.stage.evaluator.reproducibility == "exact"
        shared = exact and self.other_runs
        repeats = self.algorithm.repeats == "allow"
        if not (shared or repeats):
            return rows
        keys = [group.jobs.keys[row] for row in rows]
        answers = self.store.lookup(
            keys,
            evaluator=self._digest,
            fidelity=self._fidelity,
            replicate=self.replicate,
            other_runs=shared,
        )
        if not answers:
            return rows
        hit = [row for row, key in zip(rows, keys, strict=True) if key in answers]
        if not exact and len(hit) < len(rows):
            return rows  # a chunk is answered whole or not at all
        found = [answers[group.jobs.keys[row]] for row in hit]
        evaluations = Evaluations(
            values=np.array([answer.values for answer in found]),
            std_error=_stacked([answer.std_error for answer in found]),
            constraints=np.array([answer.constraints for answer in found]),
            signals=np.array([answer.signals for answer in found]),
            cost_s=np.array([answer.cost_s for answer in found]),
        )
        self._record(group, hit, evaluations, cached=True)
        rest = set(rows) - set(hit)
        return sorted(rest)

    def _submit(self, group: _Group, rows: list[int]) -> None:
        assert self.executor is not None
        exact = self.stage.evaluator.reproducibility == "exact"
        fresh = []
        for row in rows:
            key, i = group.jobs.keys[row], int(group.jobs.ids[row])
            self._by_id[i] = (group, row)
            self._open += 1
            if exact and key in self._waiting:
                self._waiting[key].append(i)  # one submission answers several ids
            else:
                self._waiting.setdefault(key, [])
                fresh.append(row)
                self._open_paid += not _is_baseline(group.jobs, row)
        for start in range(0, len(group.jobs), self.chunk):
            block = [row for row in fresh if start <= row < start + self.chunk]
            if not block:
                continue
            if not exact:
                block = list(range(start, min(start + self.chunk, len(group.jobs))))
            rows_to = self.chunk if not exact else 0
            self.executor.submit(Chunk(group.jobs.take(block), self.evaluator_index, rows_to))

    def _drain(self) -> None:
        assert self.executor is not None
        finished = self.executor.wait()
        for done in finished:
            self._finish(done)
        self.store.commit()
        if self.callbacks:
            progress = Progress(
                self.stage.name,
                self._next_id - self.first_id,
                self.finished,
                self.paid,
                self.hits,
                self.failed,
                self.stage.budget.evaluations,
                time.monotonic() - self._started,
                dict(self.best),
                tuple(finished),
            )
            for callback in self.callbacks:
                callback(progress)
        if self.finished >= HOPELESS and self.failed == self.finished:
            self.store.commit()
            reason = next(
                (r for done in finished for r in done.evaluations.reason or () if r), "no reason"
            )
            raise EvaluationError(
                f"the first {self.finished} evaluations of stage {self.stage.name!r} all failed, "
                f"the last with: {reason}"
            )

    def _finish(self, done: Done) -> None:
        jobs = done.chunk.jobs
        group = self._by_id[int(jobs.ids[-1])][0]
        rows, keep, also = [], [], []
        for position, i in enumerate(jobs.ids.tolist()):
            entry = self._by_id.pop(i, None)
            if entry is None:
                continue  # answered before, or padding
            rows.append(entry[1])
            keep.append(position)
            self._open -= 1
            self._open_paid -= not _is_baseline(group.jobs, entry[1])
            also += [(j, position) for j in self._waiting.pop(jobs.keys[position], [])]
        evaluations = done.evaluations.take(keep)
        self._record(group, rows, evaluations, done=done)
        for j, position in also:
            other, row = self._by_id.pop(j)
            self._open -= 1
            self._record(other, [row], done.evaluations.take([position]), cached=True)

    def _record(
        self,
        group: _Group,
        rows: list[int],
        evaluations: Evaluations,
        *,
        cached: bool = False,
        done: Done | None = None,
    ) -> None:
        jobs = group.jobs.take(rows)
        now = time.time()
        self.store.record(
            jobs,
            evaluations,
            packed=self.stage.space.pack(jobs.population),
            evaluator=self._digest,
            started=done.started if done else now,
            finished=done.finished if done else now,
            worker=done.worker if done else "cache",
            attempts=done.attempts if done else 0,
            cached=np.full(len(rows), cached),
        )
        loss = losses(evaluations, self.stage.evaluator.objectives)
        assert evaluations.state is not None
        for at, row in enumerate(rows):
            group.losses[row] = loss[at]
            group.done[row] = True
            self._count(group, row, cached, bool(evaluations.state[at] != OK))

    def _count(self, group: _Group, row: int, cached: bool, failed: bool) -> None:
        self.finished += 1
        self.failed += failed
        if cached:
            self.hits += 1
        elif not _is_baseline(group.jobs, row):
            self.paid += 1
        if not failed:
            place = 0
            if self.group_by is not None:
                single = group.jobs.population.take([row])
                place = round(float(self.stage.space.cost(single)[self.group_by][0]))
            value = float(group.losses[row, 0])
            self.best[place] = min(value, self.best.get(place, np.inf))

    # -- the lag rule -----------------------------------------------------------------------

    def _answered_below(self, bound: int) -> bool:
        for group in self._groups:
            if group.first_id >= bound:
                return True
            rows = group.jobs.ids < bound
            if not group.done[rows].all():
                return False
        return True

    def _tell_below(self, bound: int) -> None:
        while self._groups and self._groups[0].first_id < bound:
            group = self._groups[0]
            stop = int(np.searchsorted(group.jobs.ids, bound))
            if stop > group.told:
                rows = slice(group.told, stop)
                self.algorithm.tell(
                    Told(
                        group.jobs.ids[rows],
                        group.jobs.population.take(rows),
                        group.losses[rows],
                        group.violation[rows],
                    )
                )
                group.told = stop
            if group.end_id > bound:
                return
            self._groups.popleft()

    def _take_known(self, known: _Known) -> None:
        """Enters whole groups that records answer, without asking for them again."""
        end = known.complete_until(self._q, self._next_id)
        rows = np.flatnonzero((known.jobs.ids >= self._next_id) & (known.jobs.ids < end))
        group = _Group(
            known.jobs.take(rows),
            self._next_id,
            end,
            known.losses[rows],
            known.violation[rows],
            np.ones(len(rows), dtype=bool),
        )
        self._groups.append(group)
        self._next_id = end
        for row, at in enumerate(rows):
            self._count(group, row, bool(known.cached[at]), bool(known.failed[at]))

    # -- verify -----------------------------------------------------------------------------

    def _compare(self, jobs: Jobs, known: _Known, first_id: int, n: int) -> bool:
        """Holds a recomputed group against the records; False where the records end."""
        asked = dict(zip(jobs.ids.tolist(), jobs.keys, strict=True))
        for i in range(first_id, first_id + n):
            at = known.row_of.get(i)
            if at is None and i not in known.void_set:
                self.stop_reason = "end of records"
                return False
            stored = None if at is None else known.jobs.keys[at]
            if asked.get(i) != stored:
                self.mismatches.append(
                    f"id {i}: recorded {stored.hex() if stored else 'void'}, "
                    f"proposed {asked[i].hex() if i in asked else 'void'}"
                )
        return True


class _Known:
    """Records of one stage, ready to be looked up by id."""

    def __init__(self, records: Records, stage: Stage) -> None:
        from searchlab.records import VOID

        void = records.state == VOID
        self.void_ids = records.ids[void]
        self.void_set = set(self.void_ids.tolist())
        rows = np.flatnonzero(~void)
        records = records.take(rows)
        self.jobs = Jobs(
            ids=records.ids,
            population=stage.space.unpack(records.genotypes),
            keys=tuple(key or b"" for key in records.keys),
            origin=tuple(records.origin),
            parents=records.parents,
        )
        evaluations = records.evaluations()
        m = len(stage.evaluator.objectives)
        if len(records) and records.values.shape[1] < m:
            raise StudyError(f"records of stage {stage.name!r} have {records.values.shape[1]} "
                             f"values per candidate; the evaluator gives {m}")
        evaluations.values = evaluations.values[:, :m].reshape(len(records), m)
        self.losses = losses(evaluations, stage.evaluator.objectives)
        self.violation = np.zeros(len(records))
        self.cached = np.asarray(records.cached, dtype=bool)
        self.failed = records.state != OK
        self.row_of = {i: row for row, i in enumerate(records.ids.tolist())}
        ids = np.union1d(records.ids, self.void_ids)
        gaps = np.flatnonzero(np.diff(ids) > 1) if len(ids) else np.empty(0, int)
        first = int(ids[0]) if len(ids) else 0
        self._first = first
        self._unbroken = int(ids[gaps[0]] + 1 if len(gaps) else ids[-1] + 1) if len(ids) else 0

    def complete_until(self, q: int, start: int) -> int:
        """The first id of the first group, counted from `start`, that is not wholly known."""
        if not len(self.row_of) or self._first > start:
            return start
        return start + max(0, self._unbroken - start) // q * q


def _stacked(
    parts: list[NDArray[np.float64] | None],
) -> NDArray[np.float64] | None:
    present = [part for part in parts if part is not None]
    return np.array(present) if present and len(present) == len(parts) else None


def _is_baseline(jobs: Jobs, row: int) -> bool:
    return bool(jobs.origin) and jobs.origin[row].startswith("baseline")


def stage_answers(store: Store, stage: Stage, index: int) -> Answers:
    """What a stage's records say, for the rule that starts the next stage."""
    records = store.records()
    known = _Known(records.take(np.flatnonzero(records.stage == index)), stage)
    return Answers(stage.space, known.jobs.population, known.jobs.origin, known.losses)
