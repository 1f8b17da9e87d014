"""Runs the final of a search, or reads it from records; single figures and fronts alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchlab._stage_records import stage_answers
from searchlab.algorithms.base import Seeds
from searchlab.config import AlgorithmSpec, Budget, Final, SearchConfig, Stage
from searchlab.evaluator import REPORT_REPLICATE, SELECTION_REPLICATE, Evaluator
from searchlab.final import (
    FINAL_ID,
    FINAL_STAGE,
    LIST_IDS,
    ROUND_IDS,
    Contender,
    FinalPlan,
    chosen,
    distinct,
    plan_final,
    score_final,
    winner_of,
)
from searchlab.loop import StageRun
from searchlab.population import OK, Population
from searchlab.trade_offs import TradeOffs, middle, plan_front_final, score_front, signs_of

if TYPE_CHECKING:
    from searchlab.executors import Executor
    from searchlab.result import GroupResult, Result
    from searchlab.study import Store

__all__ = [
    "fill_final",
    "keep_reference",
    "pick_middles",
    "reference_losses",
    "run_final",
    "stored_reference",
]

_REFERENCE = "reference"

Score = Callable[[str, int, Sequence[Contender]], NDArray[np.float64]]
"""(split, replicate number, contenders) -> values (n, m) in the user's sign, NaN where failed."""


def run_final(
    config: SearchConfig,
    result: Result,
    store: Store,
    executor: Executor,
    evaluators: tuple[Evaluator, ...],
    share: bool,
) -> None:
    """Scores the finalists and baselines of a finished search on splits that it never saw."""
    assert config.final is not None
    stage = config.stages[-1]
    plans = _plans(config, result)
    entrants = distinct([c for plan in plans for c in plan.all()])
    round_number = _final_round(store, entrants)
    base = {"selection": SELECTION_REPLICATE, "report": REPORT_REPLICATE}
    chunk = (store.get_meta("pace") or {})[str(len(config.stages) - 1)]["chunk"]
    signs = signs_of(stage.evaluator.objectives)

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
        found = np.where(np.isfinite(answers.losses), signs * answers.losses, np.nan)
        keys = stage.space.keys(answers.population)
        return _looked_up(parts, dict(zip(keys, found, strict=True)), signs)

    _apply(config, result, plans, score)
    records = store.records()
    result.records = records
    result.counts["final"] = int(
        ((records.stage >= FINAL_STAGE) & ~records.cached & (records.state <= 2)).sum()
    )


def fill_final(config: SearchConfig, result: Result, store: Store) -> None:
    """Fills in what the records know of a final; evaluates nothing."""
    round_number = (store.get_meta("final") or {}).get("round")
    if config.final is None or round_number is None:
        return
    objectives = config.stages[-1].evaluator.objectives
    values: dict[int, dict[bytes, NDArray[np.float64]]] = {}
    records = store.records()
    base = FINAL_STAGE + 128 * int(round_number)
    for stage in np.unique(records.stage[records.stage >= base]).tolist():
        part = records.take(np.flatnonzero((records.stage == stage) & (records.state == OK)))
        keys = [key or b"" for key in part.keys]
        table = part.values[:, : len(objectives)]
        values[stage - base] = dict(zip(keys, table, strict=True))
    signs = signs_of(objectives)

    def score(split: str, number: int, parts: Sequence[Contender]) -> NDArray[np.float64]:
        return _looked_up(parts, values.get(number + (64 if split == "report" else 0), {}), signs)

    _apply(config, result, _plans(config, result), score)


def _looked_up(
    parts: Sequence[Contender],
    values: dict[bytes, NDArray[np.float64]],
    signs: NDArray[np.float64],
) -> NDArray[np.float64]:
    nothing = np.full(len(signs), np.nan)
    rows = [values.get(contender.key, nothing) for contender in parts]
    return np.array(rows, dtype=np.float64).reshape(-1, len(signs))


def _plans(config: SearchConfig, result: Result) -> list[FinalPlan]:
    assert config.final is not None
    if result.trade_offs is not None:
        group = result.groups[-1].group if result.groups else 0
        return [plan_front_final(result.trade_offs, result.everyone, config.final, group)]
    groups = [group.group for group in result.groups]
    return plan_final(result.everyone, config.final, groups, result.sign, upto=config.upto)


def _apply(config: SearchConfig, result: Result, plans: Sequence[FinalPlan], score: Score) -> None:
    """Scores everybody and chooses the winners."""
    assert config.final is not None
    final, sign, main = config.final, result.sign, config.stages[-1].main
    if result.trade_offs is not None:
        score_front(result.trade_offs, plans[0], final, score)
        _fill_middle(result, result.trade_offs)
        return

    def of_main(split: str, number: int, parts: Sequence[Contender]) -> NDArray[np.float64]:
        return score(split, number, parts)[:, main]

    score_final(plans, final, sign, of_main)
    _fill_groups(result, plans, final, sign)


def _fill_groups(result: Result, plans: Sequence[FinalPlan], final: Final, sign: float) -> None:
    for group, plan in zip(result.groups, plans, strict=True):
        order = [c for c in chosen(plan, final, sign) if c.kind != "searched"]
        group.winner = winner_of(plan, final, sign) or group.winner
        group.baselines = sorted(order, key=lambda c: (c.kind, c.violation, sign * c.selection))
        group.finalists = list(plan.finalists)


def _fill_middle(result: Result, trades: TradeOffs) -> None:
    """The last group's winner becomes the middle of the finalists that were reported."""
    if not result.groups:
        return
    group = result.groups[-1]
    reported = [c for c in trades.finalists if c.report_values]
    if reported:
        group.winner = middle(trades, reported, "selection") or group.winner
    group.baselines = [c for c in trades.rivals if c.report_values] or group.baselines
    group.finalists = list(trades.finalists)


def _final_round(store: Store, entrants: Sequence[Contender]) -> int:
    """A new round where the finalists are others than last time (the search went on)."""
    keys = [contender.key.hex() for contender in entrants]
    stored = store.get_meta("final") or {"round": -1, "keys": []}
    if stored["keys"] != keys:
        stored = {"round": stored["round"] + 1, "keys": keys}
        store.set_meta("final", stored)
    return int(stored["round"])


# -- fronts -------------------------------------------------------------------------------------


def pick_middles(
    trades: TradeOffs,
    groups: Sequence[GroupResult],
    everyone: Sequence[Contender],
    *,
    upto: bool,
) -> None:
    """Every group's winner becomes the knee of its front: the one that stands for it."""
    for group in groups:
        own = [
            c
            for c in everyone
            if c.kind == "searched" and (c.group <= group.group if upto else c.group == group.group)
        ]
        group.winner = middle(trades, own) if own else None


def keep_reference(config: SearchConfig, store: Store) -> None:
    """Writes down the point that the user gave; a run keeps it until another one is given."""
    if config.reference is not None:
        names = [objective.name for objective in config.stages[-1].evaluator.objectives]
        store.set_meta(_REFERENCE, [float(config.reference[name]) for name in names])


def stored_reference(config: SearchConfig, store: Store) -> tuple[float, ...] | None:
    """The given point in the user's sign, of this configuration or of the run; None = by rule."""
    if config.reference is not None:
        objectives = config.stages[-1].evaluator.objectives
        return tuple(float(config.reference[objective.name]) for objective in objectives)
    stored = store.get_meta(_REFERENCE)
    return None if stored is None else tuple(map(float, stored))


def reference_losses(stage: Stage, config: SearchConfig, store: Store) -> tuple[float, ...] | None:
    """The given point as losses of a stage, None where the stage measures other objectives."""
    point = stored_reference(config, store)
    objectives = stage.evaluator.objectives
    if point is None or objectives != config.stages[-1].evaluator.objectives:
        return None
    return tuple((np.array(point) * signs_of(objectives)).tolist())
