"""Ask and tell: candidates are handed out under leases, results come back in any order.

The proposals follow the lag rule of every other run: the state is rebuilt from the records by one
bulk tell, and what may be open now is proposed again, equal to what it was. A lease is only a note
of who may be at work on an id until when; it never changes what is proposed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from searchlab.auto import settled
from searchlab.errors import ConfigError, DataError, EvaluationError
from searchlab.executors.base import Chunk, Done
from searchlab.external import Outcome, load_json, plan_rows, read_result, to_evaluations
from searchlab.loop import StageRun
from searchlab.outcomes import constraints_of

if TYPE_CHECKING:
    from searchlab._stage_records import Known
    from searchlab.config import SearchConfig
    from searchlab.evaluator import Evaluator
    from searchlab.study import Store

__all__ = ["Asked", "DEFAULT_LEASE_S", "MAX_LINE_BYTES", "Told", "ask", "prepare", "tell"]

DEFAULT_LEASE_S = 24 * 3600.0
MAX_LINE_BYTES = 64 * 2**20
_LEASES = "leases"  # meta: id -> [seconds since 1970 at which it ends, how often it was handed out]


@dataclass(frozen=True)
class Asked:
    """What `ask` handed out.

    Attributes:
        plans: one per candidate, as `plan.json` of a command.
        again: how many of them were handed out before, under a lease that has ended.
        lag: how many may be open at once.
        open: how many are handed out and not answered, these included.
        reason: why there are fewer than wanted; empty if there are not.
        finished: nothing is open and nothing more will be proposed.
    """

    plans: list[dict[str, Any]]
    again: int
    lag: int
    open: int
    reason: str = ""
    finished: bool = False


@dataclass
class Told:
    """What became of the lines that were told.

    Attributes:
        recorded: results that were new; those of candidates that failed are counted here too.
        failed: how many of them are of candidates that failed, with or without saying so.
        duplicates: results of candidates that have one already.
        refused: what is wrong with each line that was not taken.
        open: how many candidates still wait for a result.
        finished: nothing is open and nothing more will be proposed.
        error: the run's own complaint: its first results failed one and all.
    """

    recorded: int = 0
    failed: int = 0
    duplicates: int = 0
    refused: list[str] = field(default_factory=list)
    open: int = 0
    finished: bool = False
    error: str = ""


class _Collector:
    """An executor that only takes jobs in."""

    workers = 1

    def __init__(self) -> None:
        self.chunks: dict[int, Chunk] = {}

    def start(self, evaluators: tuple[Evaluator, ...]) -> None:
        """Nothing to start."""

    def has_room(self) -> bool:
        """Always: the lag rule bounds what is open."""
        return True

    def submit(self, chunk: Chunk) -> None:
        """Keeps a chunk, which holds one job."""
        self.chunks[int(chunk.jobs.ids[0])] = chunk

    def wait(self, timeout: float | None = None) -> list[Done]:
        """Nothing finishes here."""
        return []

    def close(self) -> None:
        """Nothing to end."""


class _Leg(StageRun):
    """A stage whose values come from elsewhere: `take` brings them, nothing waits."""

    loaded: Known | None = None

    def fill(self) -> None:
        """Submits every job that may be open now, known answers apart."""
        if self.loaded is None:
            self.loaded = self._load()
        try:
            self._fill(self.loaded)
        finally:
            self.store.commit()

    @property
    def open_jobs(self) -> int:
        """Jobs that are submitted and not finished."""
        return self._open

    @property
    def budget_spent(self) -> bool:
        """Whether what is done and what is open use up the budget."""
        return self._left() <= 0


def prepare(config: SearchConfig, store: Store) -> None:
    """Notes what a run's values stand for, once it is opened. Raises SearchlabError."""
    from searchlab.config import stage_digest
    from searchlab.evaluator import environment

    stage = settled(config, store).stages[0]
    stage.algorithm.build(stage.space, seed=config.seed, first_id=0, seeds=stage.seeds)
    identity = {**stage.evaluator.identity(), "space": stage.space.fingerprint}
    store.register_evaluator(stage_digest(stage), identity, environment())
    store.commit()


def ask(
    config: SearchConfig,
    store: Store,
    n: int,
    *,
    lag: int | None = None,
    lease_s: float = DEFAULT_LEASE_S,
    again: bool = False,
    now: float | None = None,
) -> Asked:
    """Hands out up to n candidates.

    Those whose lease has ended come first, then new ones in the order of their ids. The first call
    fixes the lag of the run: n unless it is given.

    Args:
        config: of a run with one stage.
        store: the run, open for writing; committed before this returns.
        n: how many are wanted.
        lag: at most so many are open at once; kept from the first call on.
        lease_s: after so many seconds a candidate may be handed out again.
        again: take every lease as ended.
        now: seconds since 1970.

    Raises:
        ConfigError: n, lag or lease_s out of range, or another lag than the run's.
    """
    if n < 1:
        raise ConfigError(f"{n} candidates; allowed: 1 or more")
    if lag is not None and lag < 1:
        raise ConfigError(f"lag {lag}; allowed: 1 or more")
    if not 0 < lease_s < 1e12:
        raise ConfigError(f"lease of {lease_s} seconds; allowed: more than 0")
    now = time.time() if now is None else now
    leg, collector = _leg(config, store, lag if lag is not None else n)
    if lag is not None and lag != leg.lag:
        raise ConfigError(f"lag {lag}; run {store.name!r} has {leg.lag}, fixed at its first ask")
    leg.fill()
    leases = _leases(store)
    ended = [i for i in collector.chunks if i in leases and (again or leases[i][0] <= now)]
    fresh = [i for i in collector.chunks if i not in leases]
    chosen = [*sorted(ended), *sorted(fresh)][:n]
    plans = []
    for i in chosen:
        plans += plan_rows(
            leg.stage.space,
            collector.chunks[i].jobs,
            leg.stage.evaluator.fidelities,
            seed=getattr(leg.stage.evaluator, "seed", 0),
        )
        leases[i] = (now + lease_s, leases.get(i, (0.0, 0))[1] + 1)
    leases = {i: lease for i, lease in leases.items() if i in collector.chunks}
    _keep(store, leases)
    finished = _note_end(leg, store)
    store.commit()
    reason = ""
    if len(chosen) < n:
        reason = _why_fewer(leg, len(leases))
    return Asked(plans, sum(i in ended for i in chosen), leg.lag, len(leases), reason, finished)


def tell(config: SearchConfig, store: Store, lines: Iterable[bytes]) -> Told:
    """Takes results in: one JSON object per line, `result.json` of a command and `candidate_id`.

    Every line stands for itself: what is good is recorded, also beside lines that are refused. A
    line of a known candidate that lacks a value, or has one that is not finite, is that candidate's
    failure. The first result of a candidate counts, also when it comes after its lease has ended.

    Args:
        config: of a run with one stage.
        store: the run, open for writing; committed before this returns.
        lines: JSON lines; empty ones are skipped.
    """
    report = Told()
    if store.get_meta("pace") is None:
        _refuse_all(report, lines, "no candidate of this run was handed out yet")
        return report
    leg, collector = _leg(config, store, 1)
    leg.fill()
    leases = _leases(store)
    done_before = _answered(store)
    evaluator = leg.stage.evaluator
    objectives, constraints = evaluator.objectives, constraints_of(evaluator)
    finished: dict[int, Done] = {}
    moment = time.time()
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        where = f"line {number}"
        try:
            index, data = _read_line(raw, where)
        except DataError as error:
            report.refused.append(str(error))
            continue
        if index in finished or index in done_before:
            report.duplicates += 1
            continue
        if index not in leases or index not in collector.chunks:
            report.refused.append(f"{where}: candidate {index} was never handed out")
            continue
        try:
            outcome = read_result(data, objectives, constraints)
        except DataError as error:
            outcome = Outcome.failed(str(error), objectives, constraints)
        report.failed += bool(outcome.reason)
        finished[index] = Done(
            collector.chunks[index],
            to_evaluations([outcome]),
            moment,
            moment,
            worker="told",
            attempts=leases[index][1],
        )
    report.recorded = len(finished)
    _keep(store, {i: lease for i, lease in leases.items() if i not in finished})
    try:
        leg.take([finished[i] for i in sorted(finished)])
    except EvaluationError as error:
        report.error = str(error)
    report.open = len(_leases(store))
    leg.fill()  # whether anything is left to propose
    report.finished = _note_end(leg, store)
    store.commit()
    return report


def _leg(config: SearchConfig, store: Store, lag: int) -> tuple[_Leg, _Collector]:
    """The run's only stage, with nothing asked yet; fixes the lag where none is stored."""
    from searchlab.search import build_algorithm, pace_of

    if len(config.stages) != 1:
        raise ConfigError(f"ask and tell know runs of one stage; this has {len(config.stages)}")
    config = settled(config, store)
    algorithm = build_algorithm(config.stages[0], 0, 0, config, store)
    pace = pace_of(0, 0, replace(config, lag=lag), algorithm, 1, store)
    collector = _Collector()
    leg = _Leg(
        config.stages[0], 0, 0, config.seed, store, collector, algorithm, pace.lag, pace.chunk
    )
    return leg, collector


def _answered(store: Store) -> set[int]:
    """Ids of the candidates that have a result."""
    from searchlab.records import VOID

    records = store.records()
    return set(records.ids[records.state != VOID].tolist())


def _leases(store: Store) -> dict[int, tuple[float, int]]:
    stored: dict[str, list[float]] = store.get_meta(_LEASES) or {}
    return {int(i): (float(until), int(times)) for i, (until, times) in stored.items()}


def _keep(store: Store, leases: Mapping[int, tuple[float, int]]) -> None:
    store.set_meta(_LEASES, {str(i): list(lease) for i, lease in leases.items()})


def _note_end(leg: _Leg, store: Store) -> bool:
    """Notes whether the run is at its end; returns it."""
    finished = not leg.open_jobs and bool(leg.stop_reason)
    store.set_meta("stop_reason", leg.stop_reason)
    return finished


def _why_fewer(leg: _Leg, leased: int) -> str:
    if leg.stop_reason == "budget" or (leg.open_jobs < leg.lag and leg.budget_spent):
        return f"the budget of {leg.stage.budget.evaluations} evaluations is handed out"
    if leg.stop_reason:
        return f"the search has ended ({leg.stop_reason})"
    return (
        f"{leased} candidates wait for results, and the lag of {leg.lag} lets a new one come only "
        "when the oldest are told"
    )


def _read_line(raw: bytes, where: str) -> tuple[int, dict[str, Any]]:
    if len(raw) > MAX_LINE_BYTES:
        raise DataError(f"{where} has {len(raw)} bytes; allowed: at most {MAX_LINE_BYTES}")
    data = load_json(raw, where)
    if not isinstance(data, dict) or "candidate_id" not in data:
        raise DataError(f"{where} has no candidate_id; allowed: an object with it, as in the plan")
    index = data["candidate_id"]
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 2**62:
        raise DataError(f"{where}: candidate_id {str(index)[:40]!r}; allowed: a number of a plan")
    return index, data


def _refuse_all(report: Told, lines: Iterable[bytes], why: str) -> None:
    report.refused = [
        f"line {number}: {why}" for number, raw in enumerate(lines, start=1) if raw.strip()
    ]
