"""Runs a configuration from its first id to its verdict, and the short form for Python."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab._repeat import measure_repeat
from searchlab._run_layout import LAYOUT, layout_of
from searchlab._stage_records import stage_answers
from searchlab._verify import verify
from searchlab.algorithms.base import Algorithm, Seeds
from searchlab.config import (
    ALGORITHMS,
    AlgorithmSpec,
    Budget,
    Final,
    SearchConfig,
    Stage,
    resolve,
    stage_digest,
)
from searchlab.errors import ConfigError, StudyError
from searchlab.evaluator import (
    REPORT_REPLICATE,
    SELECTION_REPLICATE,
    Evaluator,
    EvaluatorFunction,
    FunctionEvaluator,
    Objective,
    environment,
)
from searchlab.executors import (
    Executor,
    ExecutorOptions,
    LocalExecutor,
    ProcessExecutor,
    usage_of,
)
from searchlab.final import (
    FINAL_ID,
    FINAL_STAGE,
    LIST_IDS,
    ROUND_IDS,
    Contender,
    contenders,
    distinct,
    plan_final,
    score_final,
)
from searchlab.loop import Callback, StageRun
from searchlab.outcomes import constraints_of, violation
from searchlab.population import OK, Population
from searchlab.result import GroupResult, Result, curve_of
from searchlab.space import Space

if TYPE_CHECKING:
    from searchlab.study import Store

__all__ = ["run", "search", "stored_result", "verify"]

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
    return stage.algorithm.build(stage.space, seed=config.seed, first_id=first_id, seeds=seeds)


def run(
    config: SearchConfig,
    *,
    store: Store | None = None,
    executor: Executor | None = None,
    callbacks: Sequence[Callback] = (),
    share: bool = True,
) -> Result:
    """Runs (or resumes) a configuration.

    Args:
        config: what to run.
        store: where records go; a run in memory by default. What it holds already is not paid
            again.
        executor: where candidates are evaluated; this process by default.
        callbacks: called after every recorded batch.
        share: use values that other runs of the same database paid for.

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
    status, stop_reason = "failed", ""
    try:
        _check_budgets(config, store)
        for index, stage in enumerate(config.stages):
            if stage.adopt is None:  # the others need answers first
                build_algorithm(stage, index, 0, config, store)
        executor.start(evaluators)
        store.set_meta(LAYOUT, layout_of(config))
        for stage in config.stages:
            identity = {**stage.evaluator.identity(), "space": stage.space.fingerprint}
            store.register_evaluator(stage_digest(stage), identity, environment())
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
            if leg.interrupted:
                status = "interrupted"
                break
        else:
            status = "finished"
        result = collect(config, store)
        if config.final is not None and status == "finished":
            try:
                _run_final(config, result, store, executor, evaluators, share)
            except KeyboardInterrupt:
                status = "interrupted"
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
        )
        store.set_meta("result", result.to_json())
        store.commit()
        return result
    except KeyboardInterrupt:  # outside the stages, which keep what they have
        status = "interrupted"
        raise
    finally:
        executor.close()
        store.close(status)


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
    objective = last.evaluator.objectives[0]
    sign = 1.0 if objective.direction == "min" else -1.0
    # Stages that share evaluator, space and fidelity are one list: a candidate is in it once.
    same = [
        index
        for index, stage in enumerate(config.stages)
        if stage_digest(stage) == digest
        and stage.fidelity_index == len(stage.evaluator.fidelities) - 1
    ]
    part = records.take(np.flatnonzero(np.isin(records.stage, same) & (records.state == OK)))
    everyone: list[Contender] = []
    curve: dict[int, list[tuple[int, float]]] = {}
    if len(part):
        population = last.space.unpack(part.genotypes)
        groups = _groups_of(last.space, population, config.group_by).tolist()
        keys = [key or b"" for key in part.keys]
        ids, values = part.ids.tolist(), part.values[:, 0]
        broken = violation(part.constraints, constraints_of(last.evaluator))
        everyone = contenders(population, keys, part.origin, ids, groups, values, broken)
        allowed = np.where(broken == 0, values, np.nan)
        curve = curve_of(ids, groups, allowed.tolist(), sign)
    found_groups = sorted({contender.group for contender in everyone})
    groups_wanted = config.groups or tuple(found_groups)
    result_groups = []
    for group in groups_wanted:
        here = [c for c in everyone if (c.group <= group if config.upto else c.group == group)]
        ranked = sorted(here, key=lambda c: (c.violation, sign * c.search, c.id))
        searched = [c for c in ranked if c.kind == "searched"]
        baselines = [
            next(c for c in ranked if c.kind == kind)
            for kind in sorted({c.kind for c in ranked} - {"searched"})
        ]
        result_groups.append(GroupResult(group, next(iter(searched), None), baselines))
    stage_of_search = records.stage < FINAL_STAGE
    known = np.array([origin.startswith("baseline") for origin in records.origin], dtype=bool)
    paid = stage_of_search & ~records.cached & (records.state <= 2)
    counts = {
        "evaluations": int((paid & ~known).sum()),
        "baseline_evaluations": int((paid & known).sum()),
        "hits": int((stage_of_search & records.cached).sum()),
        "failed": int((stage_of_search & (records.state == 1)).sum()),
        "final": int((~stage_of_search & ~records.cached & (records.state <= 2)).sum()),
    }
    meta: dict[str, Any] = {
        "seed": config.seed,
        "recipe": config.recipe,
        "options": dict(config.options),
        "repeat": store.get_meta("repeat"),
        "pace": store.get_meta("pace") or {},
    }
    return Result(
        store.name,
        last.space,
        objective,
        result_groups,
        group_by=config.group_by or "",
        counts=counts,
        curve=curve,
        alpha=config.final.alpha if config.final else 0.05,
        meta=meta,
        records=records,
        everyone=everyone,
    )


def _groups_of(space: Space, population: Population, group_by: str | None) -> NDArray[np.int64]:
    if group_by is None:
        return np.zeros(len(population), dtype=np.int64)
    return np.rint(space.cost(population)[group_by]).astype(np.int64)


def _run_final(
    config: SearchConfig,
    result: Result,
    store: Store,
    executor: Executor,
    evaluators: tuple[Evaluator, ...],
    share: bool,
) -> None:
    assert config.final is not None
    final, sign, stage = config.final, result.sign, config.stages[-1]
    groups = [group.group for group in result.groups]
    plans = plan_final(result.everyone, final, groups, sign, upto=config.upto)
    entrants = distinct([c for plan in plans for c in plan.all()])
    round_number = _final_round(store, entrants)
    base = {"selection": SELECTION_REPLICATE, "report": REPORT_REPLICATE}
    chunk = (store.get_meta("pace") or {})[str(len(config.stages) - 1)]["chunk"]

    def score(split: str, number: int, parts: Sequence[Contender]) -> NDArray[np.float64]:
        listed = Seeds(
            Population.concat([c.population for c in parts]), tuple(c.origin for c in parts)
        )
        offset = number + (64 if split == "report" else 0)
        first_id = FINAL_ID + round_number * ROUND_IDS + offset * LIST_IDS
        final_stage = replace(
            stage,
            name=f"{split} {number}",
            algorithm=AlgorithmSpec("listed", {"repeats": "allow", "quantum": chunk}),
            budget=Budget(),
            seeds=listed,
            adopt=None,
            fidelity=-1,
        )
        algorithm = final_stage.algorithm.build(
            stage.space, seed=config.seed, first_id=first_id, seeds=listed
        )
        leg = StageRun(
            final_stage,
            FINAL_STAGE + 128 * round_number + offset,
            first_id,
            config.seed,
            store,
            executor,
            algorithm,
            2 * executor.workers * chunk,
            chunk,
            evaluator_index=evaluators.index(stage.evaluator),
            replicate=base[split] + number,
            group_by=None,
            other_runs=share,
        )
        leg.run()
        if leg.interrupted:
            raise KeyboardInterrupt
        answers = stage_answers(store, final_stage, leg.index)
        value = dict(
            zip(stage.space.keys(answers.population), sign * answers.losses[:, 0], strict=True)
        )
        out = np.array([value.get(c.key, np.nan) for c in parts])
        return np.where(np.isfinite(out), out, np.nan)

    score_final(plans, final, sign, score)
    _fill_groups(result, plans, final, sign)
    records = store.records()
    result.records = records
    result.counts["final"] = int(
        ((records.stage >= FINAL_STAGE) & ~records.cached & (records.state <= 2)).sum()
    )


def _fill_groups(result: Result, plans: Any, final: Final, sign: float) -> None:
    from searchlab.final import best_of, chosen

    for group, plan in zip(result.groups, plans, strict=True):
        order = [c for c in chosen(plan, final, sign) if c.kind != "searched"]
        group.winner = best_of(plan.finalists, sign) or group.winner
        group.baselines = sorted(order, key=lambda c: (c.kind, c.violation, sign * c.selection))
        group.finalists = list(plan.finalists)


def _final_round(store: Store, entrants: Sequence[Contender]) -> int:
    """A new round where the finalists are others than last time (the search went on)."""
    keys = [contender.key.hex() for contender in entrants]
    stored = store.get_meta("final") or {"round": -1, "keys": []}
    if stored["keys"] != keys:
        stored = {"round": stored["round"] + 1, "keys": keys}
        store.set_meta("final", stored)
    return int(stored["round"])


def stored_result(config: SearchConfig, store: Store) -> Result:
    """The result of a run as its records tell it, the final included; evaluates nothing."""
    result = collect(config, store)
    final = config.final
    round_number = (store.get_meta("final") or {}).get("round")
    if final is not None and round_number is not None:
        groups = [group.group for group in result.groups]
        plans = plan_final(result.everyone, final, groups, result.sign, upto=config.upto)
        values: dict[int, dict[bytes, float]] = {}
        records = store.records()
        base = FINAL_STAGE + 128 * int(round_number)
        for stage in np.unique(records.stage[records.stage >= base]).tolist():
            part = records.take(np.flatnonzero((records.stage == stage) & (records.state == OK)))
            keys = [key or b"" for key in part.keys]
            values[stage - base] = dict(zip(keys, part.values[:, 0].tolist(), strict=True))

        def score(split: str, number: int, parts: Sequence[Contender]) -> NDArray[np.float64]:
            known = values.get(number + (64 if split == "report" else 0), {})
            return np.array([known.get(contender.key, np.nan) for contender in parts])

        score_final(plans, final, result.sign, score)
        _fill_groups(result, plans, final, result.sign)
    result.meta.update(
        status=store.get_meta("status"),
        stop_reason=store.get_meta("stop_reason") or "",
        seconds=store.get_meta("seconds"),
        usage=store.get_meta("usage"),
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
    algorithm: str | AlgorithmSpec = "evolution",
    direction: Literal["min", "max"] = "min",
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
    warm_start: str | Path | None = None,
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
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Searches a space for what an objective likes best.

    Args:
        space: what may vary.
        objective: `f(**values) -> float`, a function decorated with `searchlab.evaluator`, or an
            Evaluator.
        budget: evaluations to pay for, baselines apart; or a text such as "90min", "6gpuh" or
            "50usd" (see `searchlab.budget_text`), or a `Budget`.
        gpu_price: US dollars per device hour, for a budget in dollars.
        target: a value that is good enough to stop.
        seed: the one seed; equal seeds give equal traces.
        algorithm: a registered name or a spec with options.
        direction: of a plain function's value.
        baselines: name -> values; scored first, shown beside the result and used as parents.
        warm_start: name (in `database`) or folder of another run over an equal space; its ten best
            are proposed after the baselines. It must not have gone on when this run is resumed.
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
        callbacks: called after every recorded batch.

    Returns:
        The result; `result.best.plan` holds the values.

    Raises:
        ConfigError: a function that worker processes cannot load, among other bad input.
    """
    from searchlab.budget_text import parse_budget

    limit = parse_budget(budget, gpu_price=gpu_price, target=target)
    if executor is None or isinstance(executor, str):
        executor = ExecutorOptions(executor, workers, deadline, retries).build()
    elif (workers, deadline, retries) != (None, None, None):
        raise ConfigError("workers, deadline and retries belong to the executor that is given")
    evaluator = _as_evaluator(space, objective, direction, name)
    spec = AlgorithmSpec(algorithm) if isinstance(algorithm, str) else algorithm
    seeds = None
    if baselines:
        population = space.population(list(baselines.values()))
        feasible = space.is_feasible(population)
        for row, key in enumerate(baselines):
            if not feasible[row]:
                raise ConfigError(f"baseline {key!r} is not allowed by the space")
        seeds = Seeds(population, tuple(f"baseline:{key}" for key in baselines))
    if warm_start is not None:
        from searchlab.warm_start import best_of_run

        warm = best_of_run(warm_start, space, evaluator.objectives[0], database=database)
        seeds = warm if seeds is None else seeds.joined(warm)
    stage = Stage("search", space, evaluator, spec, limit, seeds=seeds)
    stages = getattr(resolve(ALGORITHMS, spec.name, "algorithm"), "expand", as_it_is)(stage)
    config = SearchConfig(stages, name=name, seed=seed, lag=lag, chunk=chunk, final=final)
    if isinstance(executor, ProcessExecutor):
        executor.check((evaluator,))  # before a run folder is made
    if out is None and database is None:
        return run(config, executor=executor, callbacks=callbacks)
    from searchlab.runs import run_in_database

    folder = Path(out) if out is not None else Path("runs") / name
    base = str(database) if database is not None else str(folder / "searchlab.db")
    return run_in_database(
        config, name=name, out=folder, database=base, executor=executor, callbacks=callbacks
    )


def as_it_is(stage: Stage) -> tuple[Stage, ...]:
    """The stages of an algorithm that needs one."""
    return (stage,)


def _as_evaluator(
    space: Space,
    objective: Callable[..., Any] | Evaluator | EvaluatorFunction[..., Any],
    direction: Literal["min", "max"],
    name: str,
) -> Evaluator:
    if isinstance(objective, EvaluatorFunction):
        objective = objective.build(space)
    elif not isinstance(objective, Evaluator):
        if not callable(objective):
            raise ConfigError(f"objective {objective!r}; allowed: a function or an Evaluator")
        objective = FunctionEvaluator(objective, space, objectives=(Objective("value", direction),))
    from searchlab.item_evaluator import ItemEvaluator

    if isinstance(objective, FunctionEvaluator | ItemEvaluator) and objective.version is None:
        # Without a version nobody can tell two functions apart: values stay within the run.
        return replace(objective, private=name)
    return objective


class _CallableModule(ModuleType):
    """Lets `searchlab.search(...)` be the function although this module bears its name."""

    __call__ = staticmethod(search)


sys.modules[__name__].__class__ = _CallableModule
