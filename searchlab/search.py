"""Runs a configuration from its first id to its verdict, and the short form for Python."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab._comparable import comparable, paid_below
from searchlab._repeat import measure_repeat
from searchlab._run_final import (
    fill_final,
    keep_reference,
    pick_middles,
    reference_losses,
    run_final,
    stored_reference,
)
from searchlab._run_layout import LAYOUT, layout_of
from searchlab._stage_memory import evaluator_environment, memory_notes
from searchlab._stage_records import stage_answers
from searchlab._verify import verify
from searchlab.algorithms.base import Algorithm, Seeds
from searchlab.auto import AUTO, reasons, settled
from searchlab.config import AlgorithmSpec, Budget, Final, SearchConfig, Stage, stage_digest
from searchlab.errors import ConfigError, StudyError
from searchlab.evaluator import Evaluator, EvaluatorFunction, FunctionEvaluator, Objective
from searchlab.executors import (
    Executor,
    ExecutorOptions,
    LocalExecutor,
    ProcessExecutor,
    RayExecutor,
    usage_of,
)
from searchlab.final import FINAL_STAGE, Contender, contenders
from searchlab.interruption import Interruption, note_interruption
from searchlab.loop import Callback, StageRun
from searchlab.outcomes import constraints_of, violation
from searchlab.population import OK, Population
from searchlab.prior import PriorRequest, leave_all, with_prior
from searchlab.result import GroupResult, Result, curve_of
from searchlab.space import Space
from searchlab.trade_offs import trade_offs_of

if TYPE_CHECKING:
    from searchlab.study import Store

__all__ = ["as_evaluator", "run", "search", "stored_result", "verify"]

LAG_PER_WORKER = 2


@dataclass(frozen=True)
class _Pace:
    """What is fixed when a run is opened and kept by every resume."""

    lag: int
    chunk: int
    free: bool = False


def pace_of(
    index: int,
    first_id: int,
    config: SearchConfig,
    algorithm: Algorithm,
    workers: int,
    store: Store,
) -> _Pace:
    """The stored pace of a stage, or the one that this run fixes for good.

    Raises:
        StudyError: another quantum, or another budget of the stage before than at the beginning.
    """
    stage = config.stages[index]
    every: dict[str, dict[str, Any]] = store.get_meta("pace") or {}
    before = config.stages[index - 1].budget.evaluations if index else None
    if str(index) not in every:
        chunk = stage.chunk or config.chunk or algorithm.quantum
        free = config.lag == "free"
        lag = None if config.lag == "free" else config.lag
        if lag is None:
            # One worker in this process is never idle, so that waiting costs nothing there.
            lag = algorithm.quantum if workers == 1 else LAG_PER_WORKER * workers * chunk
        lag = max(lag, algorithm.quantum)
        if algorithm.max_lag is not None:
            lag = min(lag, max(algorithm.max_lag, algorithm.quantum))
        mine = {
            "lag": lag,
            "free": free,
            "chunk": chunk,
            "quantum": algorithm.quantum,
            "first_id": first_id,
            "budget_before": before,
        }
        every = {**every, str(index): mine}
        store.set_meta("pace", every)
    stored = every[str(index)]
    if stored["quantum"] != algorithm.quantum:
        raise StudyError(
            f"run {store.name!r} was opened with quantum {stored['quantum']}, not "
            f"{algorithm.quantum}; allowed: the same"
        )
    return _Pace(stored["lag"], stored["chunk"], bool(stored.get("free")))


def _check_budgets(config: SearchConfig, store: Store) -> None:
    """Raises StudyError where a stage would grow although the next one has begun."""
    every: dict[str, dict[str, Any]] = store.get_meta("pace") or {}
    for index, stage in enumerate(config.stages[:-1]):
        begun = every.get(str(index + 1))
        if begun is not None and begun["budget_before"] != stage.budget.evaluations:
            raise StudyError(
                f"run {store.name!r} began stage {config.stages[index + 1].name!r} after a budget "
                f"of {begun['budget_before']} for {stage.name!r}, not {stage.budget.evaluations}; "
                "allowed: the same (only the last stage can grow)"
            )


def build_algorithm(
    stage: Stage, index: int, first_id: int, config: SearchConfig, store: Store
) -> Algorithm:
    seeds = stage.seeds or Seeds(stage.space.empty(), ())
    if stage.adopt is not None:
        if index == 0:
            raise ConfigError(f"stage {stage.name!r} adopts, but there is no stage before it")
        adopted = stage.adopt(
            stage_answers(store, config.stages[index - 1], index - 1), stage.space
        )
        seeds = replace(  # what else a rule hands over to its algorithm goes with them
            adopted,
            population=Population.concat([seeds.population, adopted.population]),
            origin=(*seeds.origin, *adopted.origin),
        )
    algorithm = stage.build_algorithm(seed=config.seed, first_id=first_id, seeds=seeds)
    stage.check_objectives(algorithm)
    return algorithm


def run(
    config: SearchConfig,
    *,
    store: Store | None = None,
    executor: Executor | None = None,
    callbacks: Sequence[Callback] = (),
    share: bool = True,
    folder: Path | None = None,
    with_data: bool = False,
) -> Result:
    """Runs (or resumes) a configuration.

    Args:
        config: what to run.
        store: where records go; a run in memory by default. What it holds already is not paid
            again.
        executor: where candidates are evaluated; this process by default.
        callbacks: called after every recorded batch.
        share: use values that other runs of the same database paid for.
        folder: gets the predictors of the searches that learn one, when they have finished.
        with_data: keep what these were fitted to in there.

    Returns:
        The result; of an interrupted run what is known so far (meta["status"] says so).

    Raises:
        SearchlabError: bad configuration, before anything costly; an evaluator that fails always.
    """
    from searchlab.study import MemoryRun

    store = store if store is not None else MemoryRun(config.name)
    executor = executor if executor is not None else LocalExecutor()
    evaluators = _evaluators(config)
    started = time.monotonic()
    legs: list[StageRun] = []
    status, stop_reason = "failed", ""
    try:
        config = settled(config, store)
        _check_budgets(config, store)
        for index, stage in enumerate(config.stages):
            if stage.adopt is None:  # the others need answers first
                build_algorithm(stage, index, 0, config, store)
        executor.start(evaluators)
        store.set_meta(LAYOUT, layout_of(config))
        keep_reference(config, store)
        for stage in config.stages:
            identity = {**stage.evaluator.identity(), "space": stage.space.fingerprint}
            around = evaluator_environment(stage, store)
            store.register_evaluator(stage_digest(stage), identity, around)
        first_id = 0
        for index, stage in enumerate(config.stages):
            algorithm = build_algorithm(stage, index, first_id, config, store)
            pace = pace_of(index, first_id, config, algorithm, executor.workers, store)
            leg = StageRun(
                stage,
                index,
                first_id,
                config.seed,
                store,
                executor,
                algorithm,
                pace.lag,
                pace.chunk,
                evaluator_index=evaluators.index(stage.evaluator),
                group_by=config.group_by,
                callbacks=tuple(callbacks),
                other_runs=share,
                free=pace.free,
                reference=reference_losses(stage, config, store),
            )
            if index == 0:
                try:
                    at = leg.evaluator_index
                    measure_repeat(stage, algorithm, pace.chunk, store, executor, at)
                except KeyboardInterrupt:
                    status = "interrupted"
                    break
                algorithm = leg.algorithm = build_algorithm(stage, index, first_id, config, store)
            first_id = leg.run()
            stop_reason = leg.stop_reason
            _note_proposals(leg, store)
            legs.append(leg)
            if leg.interrupted:
                status = "interrupted"
                break
        else:
            status = "finished"
        result = collect(config, store)
        if config.final is not None and status == "finished":
            try:
                run_final(config, result, store, executor, evaluators, share)
            except KeyboardInterrupt:
                status = "interrupted"
        if folder is not None and status == "finished":
            result.meta["notes"] += leave_all(legs, folder, with_data=with_data)
        note_interruption(executor, store)
        usage = usage_of(executor)
        if usage is not None and usage.busy_s > 0:
            store.set_meta("usage", usage.to_json())
        seconds = (store.get_meta("seconds") or 0.0) + time.monotonic() - started
        store.set_meta("seconds", seconds)
        store.set_meta("stop_reason", stop_reason)
        result.meta.update(
            status=status,
            stop_reason=stop_reason,
            seconds=seconds,
            usage=store.get_meta("usage"),
            notes=[*result.meta["notes"], *memory_notes(store)],
        )
        store.set_meta("result", result.to_json())
        store.commit()
        return result
    except KeyboardInterrupt:  # outside the stages, which keep what they have
        status = "interrupted"
        note_interruption(executor, store)
        raise
    finally:
        executor.close()
        store.close(status)


def _note_proposals(leg: StageRun, store: Store) -> None:
    """Keeps what proposing took, over all processes of the run, and what the algorithm says."""
    notes: dict[str, Any] = store.get_meta("proposals") or {}
    before = notes.get(leg.stage.name, {})
    seconds = before.get("seconds", 0.0) + leg.proposing_s
    note = {"seconds": seconds, "seconds_per_evaluation": seconds / max(leg.paid, 1.0)}
    state = leg.algorithm.report() or before.get("state", {})
    store.set_meta(
        "proposals", {**notes, leg.stage.name: {**note, **({"state": state} if state else {})}}
    )


def _evaluators(config: SearchConfig) -> tuple[Evaluator, ...]:
    out: list[Evaluator] = []
    for stage in config.stages:
        if not any(stage.evaluator is known for known in out):
            out.append(stage.evaluator)
    return tuple(out)


# -- results ------------------------------------------------------------------------------------


def collect(config: SearchConfig, store: Store) -> Result:
    """The result as the records of the search tell it, without selection and report values."""
    records = store.records()
    last = config.stages[-1]
    digest = stage_digest(last)
    objectives = last.evaluator.objectives
    objective, sign = objectives[last.main], last.sign
    # Stages that share evaluator, space and fidelity are one list: a candidate is in it once.
    same = [
        index
        for index, stage in enumerate(config.stages)
        if stage_digest(stage) == digest
        and stage.fidelity_index == len(stage.evaluator.fidelities) - 1
    ]
    top = len(last.evaluator.fidelities) - 1
    part, behind = comparable(records.take(np.flatnonzero(np.isin(records.stage, same))), top)
    part, behind = part.take(np.flatnonzero(part.state == OK)), behind[part.state == OK]
    everyone: list[Contender] = []
    curve: dict[int, list[tuple[int, float]]] = {}
    if len(part):
        population = last.space.unpack(part.genotypes)
        groups = _groups_of(last.space, population, config.group_by).tolist()
        keys = [key or b"" for key in part.keys]
        ids, values = part.ids.tolist(), part.values[:, last.main]
        broken = violation(part.constraints, constraints_of(last.evaluator))
        table = part.values[:, : len(objectives)] if last.trades else None
        everyone = contenders(
            population, keys, part.origin, ids, groups, values, broken, table, behind
        )
        allowed = np.where((broken == 0) & ~behind, values, np.nan)
        curve = curve_of(ids, groups, allowed.tolist(), sign)
    found_groups = sorted({contender.group for contender in everyone})
    groups_wanted = config.groups or tuple(found_groups)
    result_groups = []
    for group in groups_wanted:
        first: dict[str, Contender] = {}
        for contender in everyone:
            if contender.group <= group if config.upto else contender.group == group:
                best = first.setdefault(contender.kind, contender)
                if contender.rank(sign) < best.rank(sign):
                    first[contender.kind] = contender
        searched = first.pop("searched", None)
        baselines = [first[kind] for kind in sorted(first)]
        result_groups.append(GroupResult(group, searched, baselines))
    alpha = config.final.alpha if config.final else 0.05
    trades = None
    if last.trades:
        point = stored_reference(config, store)
        trades = trade_offs_of(everyone, objectives, point, alpha)
        curve = {}
        pick_middles(trades, result_groups, everyone, upto=config.upto)
    stage_of_search = records.stage < FINAL_STAGE
    known = np.array([origin.startswith("baseline") for origin in records.origin], dtype=bool)
    paid = stage_of_search & ~records.cached & (records.state <= 2)
    counts: dict[str, float] = {
        "evaluations": int((paid & ~known).sum()),
        "baseline_evaluations": int((paid & known).sum()),
        "hits": int((stage_of_search & records.cached).sum()),
        "failed": int((stage_of_search & (records.state == 1)).sum()),
        "final": int((~stage_of_search & ~records.cached & (records.state <= 2)).sum()),
    }
    cheaper, cost = paid_below(records, config.stages)
    if cheaper:
        counts.update(at_lower_fidelities=cheaper, worth_full_evaluations=round(cost, 3))
    meta: dict[str, Any] = {
        "seed": config.seed,
        "recipe": config.recipe,
        "options": dict(config.options),
        "repeat": store.get_meta("repeat"),
        "pace": store.get_meta("pace") or {},
        "proposals": store.get_meta("proposals"),
        "algorithm": reasons(config, store),
    }
    result = Result(
        store.name,
        last.space,
        objective,
        result_groups,
        group_by=config.group_by or "",
        counts=counts,
        curve=curve,
        alpha=alpha,
        meta=meta,
        records=records,
        everyone=everyone,
        trade_offs=trades,
        main=last.main,
    )
    meta["notes"] = last.algorithm.notes(result)
    return result


def _groups_of(space: Space, population: Population, group_by: str | None) -> NDArray[np.int64]:
    if group_by is None:
        return np.zeros(len(population), dtype=np.int64)
    return np.rint(space.cost(population)[group_by]).astype(np.int64)


def stored_result(config: SearchConfig, store: Store) -> Result:
    """The result of a run as its records tell it, the final included; evaluates nothing."""
    result = collect(config, store)
    fill_final(config, result, store)
    result.meta.update(
        status=store.get_meta("status"),
        stop_reason=store.get_meta("stop_reason") or "",
        seconds=store.get_meta("seconds"),
        usage=store.get_meta("usage"),
        notes=[*result.meta["notes"], *memory_notes(store)],
    )
    return result


# -- the short form -----------------------------------------------------------------------------


def search(
    space: Space,
    objective: Callable[..., Any] | Evaluator,
    *,
    budget: int | str | Budget = 200,
    gpu_price: float | None = None,
    target: float | None = None,
    seed: int = 0,
    algorithm: str | AlgorithmSpec = AUTO,
    direction: Literal["min", "max"] = "min",
    objectives: Mapping[str, Literal["min", "max"]] | None = None,
    steer: str | None = None,
    reference: Mapping[str, float] | None = None,
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
    warm_start: str | Path | None = None,
    predictor: str | Path | None = None,
    refit: Literal["never", "warm", "scratch"] = "warm",
    with_data: bool = False,
    final: Final | None = None,
    name: str = "search",
    out: str | Path | None = None,
    database: str | Path | None = None,
    executor: str | Executor | None = None,
    workers: int | None = None,
    lag: int | Literal["free"] | None = None,
    chunk: int | None = None,
    deadline: float | None = None,
    retries: int | None = None,
    stop_grace: float | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Searches a space for what an objective likes best.

    Args:
        space: what may vary.
        objective: `f(**values) -> float` (with `objectives`: a tuple in their order, or a dict), a
            function decorated with `searchlab.evaluator`, or an Evaluator.
        budget: evaluations to pay for, baselines apart; or a text such as "90min", "6gpuh" or
            "50usd" (see `searchlab.budget_text`), or a `Budget`.
        gpu_price: US dollars per device hour, for a budget in dollars.
        target: a value that is good enough to stop.
        seed: the one seed; equal seeds give equal traces.
        algorithm: a registered name or a spec with options; "auto" chooses by space, budget and
            number of objectives when the run is opened (`result.meta["algorithm"]` says why).
        direction: of a plain function's value.
        objectives: name -> "min" or "max", of a plain function that returns several values. With
            two or more the result is a front (`result.trade_offs`), unless one of them steers.
        steer: name of the one objective to optimise; the others are only recorded.
        reference: objective -> value from which hypervolumes are measured; by default a little
            beyond the worst of the first 16 candidates.
        baselines: name -> values; scored first, shown beside the result and used as parents.
        warm_start: name (in `database`) or folder of another run over an equal space or one of its
            kind (see `searchlab.warm_start.best_of_run`); its ten best are proposed after the
            baselines. A run that is resumed keeps those that it began with.
        predictor: folder of an earlier search's predictor to begin with; the search is then guided.
        refit: "never" = it stays as it is, "warm" = fits begin at it, "scratch" = it chooses until
            the first fit, which forgets it.
        with_data: the predictor that is left in `out` keeps the candidates it was fitted to.
        final: rescore the best on splits the search never saw; for evaluators with replicates.
        name: of the run.
        out: a folder for the run's artefacts (result.json, the best plan, report.html); gives the
            run a database there, and the same call goes on with the run.
        database: a SQLite path or an SQLAlchemy URL; in memory when neither it nor `out` is given.
        executor: where candidates are evaluated: "local" (this process, the default of one
            worker), "processes" (the default of several), or an executor of your own.
        workers: how many candidates (chunks) are evaluated at once; 1 by default.
        lag: at most this many evaluations are open; 2 per worker by default. Runs of equal seed,
            lag and chunk are equal, whatever their workers. "free" = as many as there is room for:
            never idle, and reproducible from the run's own records only. Kept by the run.
        chunk: candidates per call of the evaluator; kept by the run.
        deadline: seconds that one call of the evaluator may take; needs processes.
        retries: how often a call is repeated whose worker died or was too slow; needs processes.
        stop_grace: seconds that evaluations have to finish after a Ctrl-C, SIGTERM or SIGUSR1,
            which then end the search as "interrupted" (`searchlab.interruption`); None = signals do
            what they do in Python, where a Ctrl-C drops what is being evaluated.
        callbacks: called after every recorded batch.

    Returns:
        The result; `result.best.plan` holds the values. Of several objectives
        `result.trade_offs.members` are what nothing dominates, and `best` is the middle of them.

    Raises:
        ConfigError: a function that worker processes cannot load, among other bad input.
    """
    from searchlab.budget_text import parse_budget

    limit = parse_budget(budget, gpu_price=gpu_price, target=target)
    if executor is None or isinstance(executor, str):
        executor = ExecutorOptions(executor, workers, deadline, retries).build()
    elif (workers, deadline, retries) != (None, None, None):
        raise ConfigError("workers, deadline and retries belong to the executor that is given")
    evaluator = as_evaluator(space, objective, direction, objectives, name)
    spec = AlgorithmSpec(algorithm) if isinstance(algorithm, str) else algorithm
    seeds = None
    if baselines:
        population = space.population(list(baselines.values()))
        feasible = space.is_feasible(population)
        for row, key in enumerate(baselines):
            if not feasible[row]:
                raise ConfigError(f"baseline {key!r} is not allowed by the space")
        seeds = Seeds(population, tuple(f"baseline:{key}" for key in baselines))
    place: tuple[Path, str] | None = None
    if out is not None or database is not None:
        folder = Path(out) if out is not None else Path("runs") / name
        place = folder, str(database if database is not None else folder / "searchlab.db")
    if warm_start is not None:
        from searchlab._kept_seeds import kept_seeds, noted
        from searchlab.warm_start import best_of_run

        names = [o.name for o in evaluator.objectives]
        of = evaluator.objectives
        if steer in names:
            of = (of[names.index(steer)],)
        try:
            warm = best_of_run(warm_start, space, of, database=database, evaluator=evaluator)
        except ConfigError:  # it is gone: the run that is to go on keeps what it began with
            kept = None if place is None else kept_seeds(noted(place[1], name), space)
            if kept is None:
                raise
            warm = kept
        seeds = warm if seeds is None else seeds.joined(warm)
    stage = Stage("search", space, evaluator, spec, limit, seeds=seeds, steer=steer)
    expand: Callable[[Stage], tuple[Stage, ...]] | None = getattr(spec.kind(), "expand", None)
    stages = (stage,) if expand is None else expand(stage)
    config = SearchConfig(
        stages, name=name, seed=seed, lag=lag, chunk=chunk, final=final, reference=reference
    )
    if predictor is not None:
        config = with_prior(config, PriorRequest(Path(predictor), refit))
    if isinstance(executor, ProcessExecutor | RayExecutor):
        executor.check((evaluator,))  # before a run folder is made
    with ExitStack() as stack:
        if stop_grace is not None:
            executor = stack.enter_context(Interruption(stop_grace).listening()).guard(executor)
        if place is None:
            return run(config, executor=executor, callbacks=callbacks)
        from searchlab.runs import run_in_database

        folder, base = place
        return run_in_database(
            config,
            name=name,
            out=folder,
            database=base,
            executor=executor,
            callbacks=callbacks,
            with_data=with_data,
        )


def as_evaluator(
    space: Space,
    objective: Callable[..., Any] | Evaluator | EvaluatorFunction[..., Any],
    direction: Literal["min", "max"],
    objectives: Mapping[str, Literal["min", "max"]] | None,
    name: str,
) -> Evaluator:
    """The evaluator that a user's function, decorated function or evaluator stands for."""
    if objectives is not None:
        if isinstance(objective, EvaluatorFunction | Evaluator) or not objectives:
            raise ConfigError(
                f"objectives {dict(objectives)!r}; allowed: one or more, of a plain function (an "
                "evaluator has its own)"
            )
        if direction != "min":
            raise ConfigError(f"direction {direction!r} beside objectives; allowed: either")
        named = tuple(Objective(key, value) for key, value in objectives.items())
    else:
        named = (Objective("value", direction),)
    if isinstance(objective, EvaluatorFunction):
        objective = objective.build(space)
    elif not isinstance(objective, Evaluator):
        if not callable(objective):
            raise ConfigError(f"objective {objective!r}; allowed: a function or an Evaluator")
        objective = FunctionEvaluator(objective, space, objectives=named)
    from searchlab.item_evaluator import ItemEvaluator

    if isinstance(objective, FunctionEvaluator | ItemEvaluator) and objective.version is None:
        # Without a version nobody can tell two functions apart: values stay within the run.
        return replace(objective, private=name)
    return objective


class _CallableModule(ModuleType):
    """Lets `searchlab.search(...)` be the function although this module bears its name."""

    __call__ = staticmethod(search)


sys.modules[__name__].__class__ = _CallableModule
