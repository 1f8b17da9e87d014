"""The loop: asks by the lag rule, submits, records, tells in id order; resume is not special."""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchlab._stage_asked import AskedAt
from searchlab._stage_best import BestSoFar
from searchlab._stage_claims import Claims
from searchlab._stage_levels import LevelRule
from searchlab._stage_limits import Limits
from searchlab._stage_memory import note_memory
from searchlab._stage_progress import hopeless, tell_progress
from searchlab._stage_records import (
    Group,
    Known,
    differences,
    jobs_in,
    of_answer,
    under_bounds,
    wrong_keys,
)
from searchlab.algorithms.base import Algorithm
from searchlab.callbacks import Callback, Progress
from searchlab.config import Stage, stage_digest
from searchlab.errors import StudyError
from searchlab.evaluator import losses
from searchlab.executors.base import Chunk, Done, Executor
from searchlab.outcomes import constraints_of, violation
from searchlab.population import INFEASIBLE, OK, PRUNED, Evaluations, Jobs

if TYPE_CHECKING:
    from searchlab.records import Answer
    from searchlab.study import Store

__all__ = ["Callback", "Progress", "StageRun"]

HOPELESS = 20  # a stage whose first jobs all failed is stopped after this many
ROUNDING = 1e-9  # of sums of relative costs
MAX_EMPTY_IDS = 256  # consecutive void ids (whole groups): the space is taken as exhausted


@dataclass
class StageRun:
    """Runs one stage of a run from its first id to its end.

    Group g of q jobs is proposed by the state that was told exactly the jobs with
    id < first + g * q + q - lag: proposals depend on the seed, the lag and the recorded values,
    never on timing. Records that exist already are answers like any other, so that resuming a run
    and starting one are the same code. A group is always asked for as a whole; a budget that ends
    within it only leaves its last ids unevaluated, so that a larger budget goes on from there.

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
        free: ask whenever the executor has room. A group is then proposed by the state that was
            told all ids below the first one that is still open, which its records keep as
            `told_at_ask`: timing decides, and the records repeat it.
        reference: from where hypervolumes are measured, as losses; None = by the first ids.
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
    free: bool = False
    reference: tuple[float, ...] | None = None
    mismatches: list[str] = field(default_factory=list)
    stop_reason: str = ""
    interrupted: bool = False

    def __post_init__(self) -> None:
        self._q = self.algorithm.quantum
        self._groups: deque[Group] = deque()
        self._answered = 0  # how many of them, from the first on, have no open job
        self._partial: Group | None = None  # the newest group while the budget holds it back
        self._by_id: dict[int, tuple[Group, int]] = {}
        # Where repeats are jobs of their own: keys of open jobs with the ids that wait for them,
        # and what became of those that failed.
        self._repeats = self.algorithm.repeats == "allow"
        self._waiting: dict[bytes, list[int]] = {}
        self._broken: dict[bytes, tuple[int, str]] = {}
        self._own_jobs: set[tuple[bytes | None, int, int]] = set()
        self.next_id = self.first_id
        self._open = self._empty_ids = 0
        self._levels = LevelRule(self.stage, self.replicate, self.algorithm)
        self.digest = stage_digest(self.stage)
        self._claims = Claims(self)
        self._exact = self.stage.evaluator.reproducibility == "exact"
        self._constraints = constraints_of(self.stage.evaluator)
        self.started = time.monotonic()
        self.proposing_s = 0.0  # seconds of this process that tells and asks took
        self._limits = Limits(self.stage)
        self._asked_at = AskedAt(self.store, self.index, self._q)
        self.hits = self.finished = self.failed = 0
        self.paid: float = 0  # in evaluations at the stage's fidelity; then, those in flight
        self._open_paid: float = 0
        self._free_hits: float = 0  # hits that may count; `repeated` ones do
        self.repeated = 0
        self.best_so_far = BestSoFar(self.stage, self.group_by, self.reference)
        self.best = self.best_so_far.losses
        self._m = len(self.stage.evaluator.objectives)
        self._prunes = bool(getattr(self.stage.evaluator, "prunes", False))
        self.sign = self.stage.sign

    # -- running ----------------------------------------------------------------------------

    def run(self) -> int:
        """Runs to the end of the stage; returns the first id after it.

        Raises:
            EvaluationError: the first jobs failed one and all.
        """
        known = self._load()
        self.started = time.monotonic()
        self._limits.begin()
        try:
            while True:
                self._fill(known)
                if not self._open:
                    break
                self.take(self._claims.wait())
        except KeyboardInterrupt:
            self.interrupted = True
            self.stop_reason = "interrupted"
        finally:
            self.store.commit()
        return self.next_id

    def _load(self) -> Known:
        records = self.store.records()
        # What this and later stages have recorded came after the jobs that are missing here: it
        # must not make them free, or the budget would reach further than it did at first.
        self._own_jobs = jobs_in(records.take(np.flatnonzero(records.stage >= self.index)))
        known = Known(records.take(np.flatnonzero(records.stage == self.index)), self.stage)
        self.algorithm.issue(known.jobs.ids, known.jobs.keys)
        if self._repeats:
            for at in np.flatnonzero(~np.isin(known.state, (OK, PRUNED)) & ~known.cached).tolist():
                self._broken[known.jobs.keys[at]] = int(known.state[at]), known.reason[at]
        if self.free:
            self._asked_at.load()
        if self.recompute:
            self.mismatches += wrong_keys(known, self.stage.space)
        return known

    def _fill(self, known: Known) -> None:
        """Asks and submits while the lag rule, the executor and the budget allow."""
        while not self.stop_reason:
            if self._partial is not None:
                if not self._enter(self._partial, known):
                    return
                continue
            start, q = self.next_id, self._q
            need = self._told_for(start, known)
            if not ((first := self._first_open()) is None or first.answered_below(need)):
                return
            if not self.recompute and start < (end := known.complete_until(q, start)):
                self._take_known(known, end)
                continue
            if self.executor is not None and not self.executor.has_room():
                return
            if not self._may_ask(q):
                return
            asked = time.perf_counter()
            self._tell_below(need)
            if self.free and not self.recompute:
                self._asked_at.note(start, need - self.first_id)
            jobs = self._levels.set(
                self.algorithm.ask(start, q),
                stage=self.index,
                told_at_ask=max(0, need - self.first_id),
            )
            self.proposing_s += time.perf_counter() - asked
            if self.recompute:
                differing = differences(jobs, known, start, q)
                if differing is None:
                    self.stop_reason = "end of records"
                else:
                    self.mismatches += differing
                    self._take_known(known, start + q)
                continue
            if not len(jobs) and self._exhausted(start, q):
                self.stop_reason = "exhausted"
                return
            self._open_group(jobs, start, known)

    def _exhausted(self, start: int, q: int) -> bool:
        if self.algorithm.name == "listed":
            return start - self.first_id >= len(self.algorithm.seeds.population)
        return self._empty_ids + q >= MAX_EMPTY_IDS

    # -- the budget -------------------------------------------------------------------------

    def _may_ask(self, q: int) -> bool:
        """Whether the budget has room for any job of the next group."""
        self.stop_reason = self._limits.reached(self.best.values())
        if self.stop_reason:
            return False
        at = self.next_id - self.first_id
        if self._left() > ROUNDING or self.algorithm.seeds.baselines(at, q):
            return True
        if not self._open:
            self.stop_reason = "budget"
        return False

    def _left(self) -> float:
        """Evaluations that the budget has left; jobs in flight are spent.

        Baselines are apart. A repeat that the algorithm insists on counts; what other runs paid for
        does not, unless the budget says so.
        """
        budget = self.stage.budget
        if budget.evaluations is None:
            return np.inf
        hits = self._free_hits if budget.includes_hits else 0
        return budget.evaluations - self.paid - self._open_paid - self.repeated - hits

    def _affordable(self, group: Group) -> float:
        """How many more jobs of a group the budget has room for."""
        return max(0.0, self._left() + ROUNDING) / group.price

    # -- groups -----------------------------------------------------------------------------

    def _open_group(self, jobs: Jobs, first_id: int, known: Known) -> None:
        n, end_id = len(jobs), first_id + self._q
        void = [] if n == self._q else sorted({*range(first_id, end_id)} - {*jobs.ids.tolist()})
        group = Group(
            jobs,
            first_id,
            end_id,
            np.full((n, self._m), np.inf),
            np.zeros(n),
            np.zeros(n, dtype=bool),
            voids=deque(i for i in void if i not in known.void_set),
            answers=self._paid_elsewhere(jobs, known),
            levels=self._levels.of(jobs),
        )
        self._empty_ids = 0 if n else self._empty_ids + self._q
        self._groups.append(group)
        self.next_id = end_id
        self._enter(group, known)

    def _paid_elsewhere(self, jobs: Jobs, known: Known) -> dict[bytes, Answer]:
        """Values that other stages, and other runs where that is wanted, have paid for.

        Those of evaluators that are not exact belong to their chunk and answer nothing else.
        """
        if not self._exact:
            return {}
        rows = zip(jobs.ids.tolist(), jobs.keys, strict=True)
        place, own = (jobs.fidelity, jobs.replicate), self._own_jobs
        keys = [
            key
            for i, key in rows
            if not (i in known.row_of or (key, *place) in own or self._is_repeat(key, i))
        ]
        found = self._lookup(keys, place, other_runs=self.other_runs, stage=None) if keys else {}
        return under_bounds(found, jobs, self.sign) if self._prunes else found

    def _lookup(
        self, keys: list[bytes], place: tuple[int, int], *, other_runs: bool, stage: int | None
    ) -> dict[bytes, Answer]:
        return self.store.lookup(
            keys,
            evaluator=self.digest,
            fidelity=place[0],
            replicate=place[1],
            other_runs=other_runs,
            stage=stage,
            pruned=self._prunes,
        )

    def _enter(self, group: Group, known: Known) -> bool:
        """Answers or submits the rows of the newest group, in order, as far as the budget goes.

        Returns:
            Whether that was the whole group.
        """
        jobs, fresh = group.jobs, self._enter_unknown(group, known)
        while group.entered < len(jobs):
            row = group.entered
            i, key = int(jobs.ids[row]), jobs.keys[row]
            self._record_voids(group, i)
            repeat = self._is_repeat(key, i)
            if not self._answer_from_records(group, row, known):
                free = key in group.answers and not repeat
                if free and not self.stage.budget.includes_hits:
                    self._record(group, [row], of_answer(group.answers[key]), cached=True)
                elif self._affordable(group) < 1 and not group.baseline[row]:
                    break
                elif free:
                    self._record(group, [row], of_answer(group.answers[key]), cached=True)
                elif repeat and key in self._waiting:
                    self._waiting[key].append(i)  # one submission answers several ids
                    self._by_id[i] = group, row
                    self._open += 1
                    self.repeated += not group.baseline[row]
                elif repeat and (answer := self._own_answer(key)) is not None:
                    self._record(group, [row], answer, cached=True)
                else:
                    fresh.append(row)
                    self._by_id[i] = group, row
                    self._open += 1
                    self._open_paid += 0 if group.baseline[row] else group.price
                    if self._repeats:
                        self._waiting[key] = []
            group.entered += 1
        if fresh:
            self.submit(group, self._claims.mine(group, fresh))
        whole = group.entered == len(jobs)
        if whole:
            self._record_voids(group, group.end_id)
        elif not self._open:
            self.stop_reason = "budget"
        self._partial = None if whole else group
        return whole

    def _enter_unknown(self, group: Group, known: Known) -> list[int]:
        """The rows of a group of which nothing is known, as far as the budget goes, all at once."""
        if self._repeats or group.answers or group.baseline.any() or known.last >= group.first_id:
            return []
        start = group.entered
        stop = int(min(len(group.jobs), start + self._affordable(group)))
        fresh = list(range(start, stop))
        self._by_id.update(
            (i, (group, row))
            for i, row in zip(group.jobs.ids[start:stop].tolist(), fresh, strict=True)
        )
        if stop > start:
            self._record_voids(group, int(group.jobs.ids[stop - 1]))
        self._open += len(fresh)
        self._open_paid += group.price * len(fresh)
        group.entered = stop
        return fresh

    def _record_voids(self, group: Group, before: int) -> None:
        ids = []
        while group.voids and group.voids[0] < before:
            ids.append(group.voids.popleft())
        if ids:
            self.store.record_void(ids, self.index, group.jobs.told_at_ask)

    def _answer_from_records(self, group: Group, row: int, known: Known) -> bool:
        i, key = int(group.jobs.ids[row]), group.jobs.keys[row]
        at = known.row_of.get(i)
        if at is None:
            return False
        if known.jobs.keys[at] != key:
            raise StudyError(
                f"record {i} of stage {self.stage.name!r} holds another candidate than this "
                "version proposes; run `searchlab verify` or start under a new name"
            )
        group.losses[row] = known.losses[at]
        group.violation[row] = known.violation[at]
        group.take_predictions(row, known.jobs, at)
        group.done[row] = True
        one = [at]
        self._count(group, [row], known.cached[one], known.state[one], known.cost_s[one])
        return True

    def _own_answer(self, key: bytes) -> Evaluations | None:
        """What this stage found out about a candidate at an earlier id."""
        if key in self._broken:
            state, reason = self._broken[key]
            answer = Evaluations.failed(1, self._m, reason)
            answer.state = np.array([state], np.int8)
            return answer
        place = self._levels.fidelity, self.replicate
        found = self._lookup([key], place, other_runs=False, stage=self.index)
        return of_answer(found[key]) if key in found else None

    def submit(self, group: Group, fresh: list[int]) -> None:
        assert self.executor is not None
        for start, rows_of in itertools.groupby(fresh, lambda row: row - row % self.chunk):
            block = list(rows_of)
            if not self._exact:
                block = group.block(start, self.chunk, self._is_repeat)
            rows = 0 if self._exact else self.chunk
            jobs = group.jobs if len(block) == len(group.jobs) else group.jobs.take(block)
            self.executor.submit(Chunk(jobs, self.evaluator_index, rows))

    def _is_repeat(self, key: bytes, i: int) -> bool:
        """Whether this stage has an earlier job of the same candidate."""
        return self._repeats and self.algorithm.issued_before(key, i)

    def take(self, finished: list[Done]) -> None:
        """Records finished chunks and tells the callbacks.

        Raises:
            EvaluationError: the first jobs failed one and all.
        """
        for done in finished:
            self._finish(done)
        if self.free:
            first = self._first_open()
            self._asked_at.keep(self.next_id if first is None else first.first_id)
        self.store.commit()
        tell_progress(self, finished)
        if self.finished >= HOPELESS and self.failed == self.finished:
            raise hopeless(self, finished)

    def _finish(self, done: Done) -> None:
        jobs = done.chunk.jobs
        rows, keep = [], []
        for position, i in enumerate(jobs.ids.tolist()):
            entry = self._by_id.pop(i, None)
            if entry is None:
                continue  # a neighbour of its chunk only
            group, row = entry
            rows.append(row)
            keep.append(position)
            self._open -= 1
            self._open_paid -= 0 if group.baseline[row] else group.price
        if not rows:
            return
        whole = keep == list(range(len(done.evaluations)))
        evaluations = done.evaluations if whole else done.evaluations.take(keep)
        same = len(rows) == len(jobs)
        self._record(group, rows, evaluations, jobs if same else None, done.cached, done)
        for position in keep if self._repeats else ():
            key = jobs.keys[position]
            answer = done.evaluations.take([position])
            assert answer.state is not None
            assert answer.reason is not None
            if answer.state[0] not in (OK, PRUNED):
                self._broken[key] = int(answer.state[0]), answer.reason[0]
            for j in self._waiting.pop(key, []):
                other, row = self._by_id.pop(j)
                self._open -= 1
                self.repeated -= not other.baseline[row]  # counted again as recorded
                self._record(other, [row], answer, cached=True)

    def _record(
        self,
        group: Group,
        rows: list[int],
        evaluations: Evaluations,
        jobs: Jobs | None = None,
        cached: bool = False,
        done: Done | None = None,
    ) -> None:
        if jobs is None:
            # Rows are in order and differ, so that as many as there are are all of them.
            jobs = group.jobs if len(rows) == len(group.jobs) else group.jobs.take(rows)
        now = time.time()
        flags = np.full(len(rows), cached)
        self.store.record(
            jobs,
            evaluations,
            packed=self.stage.space.pack(jobs.population),
            evaluator=self.digest,
            started=done.started if done else now,
            finished=done.finished if done else now,
            worker=note_memory(self, done, len(rows)) if done else "cache",
            attempts=done.attempts if done else 0,
            cached=flags,
            predicted=None if jobs.predicted is None else (*jobs.predicted.T,),
        )
        group.losses[rows] = losses(evaluations, self.stage.evaluator.objectives)
        group.violation[rows] = violation(evaluations.constraints, self._constraints)
        group.done[rows] = True
        assert evaluations.state is not None
        assert evaluations.cost_s is not None
        self._count(group, rows, flags, evaluations.state, evaluations.cost_s)

    def _count(
        self,
        group: Group,
        rows: list[int],
        cached: NDArray[np.bool_],
        state: NDArray[np.int8],
        cost_s: NDArray[np.float64],
    ) -> None:
        """Adds rows that are answered, in id order where repeats are jobs."""
        if len(rows) == 1:
            self._count_one(group, rows[0], bool(cached[0]), int(state[0]), float(cost_s[0]))
            return
        jobs = group.jobs
        self.finished += len(rows)
        self.failed += int(((state != OK) & (state != PRUNED)).sum())
        self.hits += int(cached.sum())
        self._limits.spend(cost_s[~cached])
        own = ~group.baseline[rows]
        self.paid += group.worth(rows, own & ~cached & (state != INFEASIBLE))
        for at in np.flatnonzero(own & cached).tolist():
            if self._is_repeat(jobs.keys[rows[at]], int(jobs.ids[rows[at]])):
                self.repeated += 1
            else:
                self._free_hits += group.worth(rows[at : at + 1], np.array([True]))
        good = np.asarray(rows, dtype=np.int64)[(state == OK) & (group.violation[rows] == 0)]
        if group.levels is not None:
            good = good[group.levels.counts[good]]
        if len(good):
            self.best_so_far.add(jobs.ids[good], jobs.population.take(good), group.losses[good])

    def _count_one(self, group: Group, row: int, cached: bool, state: int, cost_s: float) -> None:
        """The same for one row, as most algorithms ask for one candidate at a time."""
        jobs, levels = group.jobs, group.levels
        price = 1 if levels is None else float(levels.price[row])
        self.finished += 1
        self.failed += state not in (OK, PRUNED)
        self.hits += cached
        if not cached:
            self._limits.spend_seconds(cost_s)
        if group.baseline[row]:
            pass
        elif not cached:
            self.paid += 0 if state == INFEASIBLE else price
        elif self._is_repeat(jobs.keys[row], int(jobs.ids[row])):
            self.repeated += 1
        else:
            self._free_hits += price
        if (levels is None or levels.counts[row]) and state == OK and group.violation[row] == 0:
            here = slice(row, row + 1)
            self.best_so_far.add(jobs.ids[here], jobs.population.take(here), group.losses[here])

    # -- the lag rule -----------------------------------------------------------------------

    def _told_for(self, start: int, known: Known) -> int:
        """The id below which the state is told that proposes the group from `start` on."""
        if not self.free:
            return start + self._q - self.lag
        told = known.told_at_ask(start, start + self._q)
        told = self._asked_at.get(start) if told is None else told
        if told is not None:
            return self.first_id + told
        first = self._first_open()
        done = self.next_id if first is None else int(first.jobs.ids[np.argmin(first.done)])
        bound = self.algorithm.max_lag
        return done if bound is None else max(done, start + self._q - max(bound, self._q))

    def _first_open(self) -> Group | None:
        """The oldest group that is not wholly answered."""
        groups, n = self._groups, len(self._groups)
        while self._answered < n and groups[self._answered].done.all():
            self._answered += 1
        return groups[self._answered] if self._answered < n else None

    def _tell_below(self, bound: int) -> None:
        while self._groups and self._groups[0].first_id < bound:
            group = self._groups[0]
            stop = len(group.jobs)
            if group.end_id > bound:
                stop = int(np.searchsorted(group.jobs.ids, bound))
            if stop > group.told:
                self.algorithm.tell(group.answers_until(stop, self.stage))
            if group.end_id > bound:
                return
            self._groups.popleft()
            self._answered = max(0, self._answered - 1)

    def _take_known(self, known: Known, end: int) -> None:
        """Enters whole groups that records answer, without asking for them again."""
        start = self.next_id
        rows = np.flatnonzero((known.jobs.ids >= start) & (known.jobs.ids < end))
        group = Group(
            known.jobs.take(rows),
            start,
            end,
            known.losses[rows],
            known.violation[rows],
            np.ones(len(rows), dtype=bool),
            levels=self._levels.each(known.fidelity[rows], known.replicate[rows]),
            known_fidelity=np.asarray(known.fidelity[rows], dtype=np.int64),
        )
        self._groups.append(group)
        self.next_id = end
        if len(rows):
            last = int(group.jobs.ids[-1])
            self._empty_ids = (end - start - 1 - (last - start)) // self._q * self._q
        else:
            self._empty_ids += end - start
        every = list(range(len(rows)))
        self._count(group, every, known.cached[rows], known.state[rows], known.cost_s[rows])
