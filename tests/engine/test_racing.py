"""Exact racing: candidates that cannot win stop early, and nothing that is found changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab._stage_records import under_bound
from searchlab.algorithms import Evolution, Race, Seeds
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.errors import ConfigError
from searchlab.evaluator import Objective
from searchlab.item_evaluator import ItemEvaluator
from searchlab.population import OK, PRUNED, Jobs
from searchlab.records import Answer
from searchlab.search import run, verify
from searchlab.space import Space
from searchlab.study import Database, MemoryRun
from searchlab.uniforms import uniforms
from searchlab.variables import Choice

N_ITEMS = 40
SPACE = Space(x=Choice(tuple(range(6)), shape=(5,)))


class Instance:
    """A random problem whose scores lie in [0, 1]; counts the scores that were asked for."""

    def __init__(self, seed: int, direction: Any = "min", range_known: bool = True) -> None:
        rng = np.random.default_rng(seed)
        self.weights = rng.random((5, 6))
        self.hardness = rng.random(N_ITEMS)
        self.scored = 0
        self.evaluator = ItemEvaluator(
            self,
            SPACE,
            N_ITEMS,
            item_range=(0.0, 1.0) if range_known else None,
            block=8,
            objective=Objective("value", direction),
            version=seed,
        )
        self.__module__, self.__qualname__ = "tests", "instance"

    def __call__(
        self, plans: list[dict[str, Any]], items: NDArray[Any], fidelity: str, seed: int
    ) -> NDArray[np.float64]:
        self.scored += len(plans) * len(items)
        x = np.array([plan["x"] for plan in plans])
        skill = self.weights[np.arange(5), x].mean(axis=1)
        scores: NDArray[np.float64] = np.clip(
            skill[:, None] + 0.4 * (self.hardness[items] - 0.5), 0, 1
        )
        return scores


def _seeds(seed: int, n: int = 60) -> Seeds:
    rows = SPACE.sample(uniforms(seed, 0, 0, n, SPACE.sample_width))
    return Seeds(rows, tuple(f"seed:{i}" for i in range(n)))


def _stage(instance: Instance, name: str, options: dict[str, Any], **more: Any) -> SearchConfig:
    stage = Stage("race", SPACE, instance.evaluator, AlgorithmSpec(name, options), **more)
    return SearchConfig((stage,), seed=7)


def _run(config: SearchConfig, store: Any = None) -> tuple[Any, Any]:
    store = store if store is not None else MemoryRun()
    return run(config, store=store), store


@pytest.mark.parametrize("seed", range(50))
def test_racing_a_list_finds_the_same_best(seed: int) -> None:
    direction = "max" if seed % 2 else "min"
    full, raced = Instance(seed, direction), Instance(seed, direction)
    a, _ = _run(_stage(full, "listed", {"quantum": 4}, seeds=_seeds(seed)))
    b, store = _run(_stage(raced, "race", {"quantum": 4, "keep": 3}, seeds=_seeds(seed)))
    assert a.best.value == b.best.value
    assert a.best.plan == b.best.plan
    ranked = [sorted(r.everyone, key=lambda c: (r.sign * c.search, c.id))[:3] for r in (a, b)]
    assert [c.key for c in ranked[0]] == [c.key for c in ranked[1]]
    records = store.records()
    assert (records.state == PRUNED).sum() > 10
    assert raced.scored < full.scored


@pytest.mark.parametrize("seed", range(3))
def test_a_raced_evolution_proposes_what_a_full_one_does(seed: int) -> None:
    full, raced = Instance(seed), Instance(seed)
    a, all_of_it = _run(_stage(full, "evolution", {"quantum": 4}, budget=Budget(160)))
    config = _stage(raced, "evolution", {"race": True, "quantum": 4}, budget=Budget(160))
    b, store = _run(config)
    assert all_of_it.records().keys == store.records().keys
    assert a.best.value == b.best.value
    state, values = store.records().state, store.records().values[:, 0]
    true = all_of_it.records().values[:, 0]
    assert (state == PRUNED).sum() > 20
    assert (values[state == OK] == true[state == OK]).all()
    assert (values[state == PRUNED] < true[state == PRUNED]).all()  # proven, not measured
    assert b.counts["failed"] == 0
    assert verify(config, store) == []


def test_whether_a_job_is_pruned_does_not_depend_on_how_it_was_found() -> None:
    """Without a known range every item is scored, and the records are the same."""
    early, late = Instance(3), Instance(3, range_known=False)
    stores = [_run(_stage(part, "race", {}, seeds=_seeds(3)))[1] for part in (early, late)]
    assert stores[0].records().trace() == stores[1].records().trace()
    assert early.scored < late.scored


def _jobs(bounds: list[float]) -> Jobs:
    rows = _seeds(1, len(bounds)).population
    return Jobs(np.arange(len(bounds)), rows, SPACE.keys(rows), 0, bound=np.array(bounds))


def test_values_of_pruned_rows_are_their_bounds() -> None:
    instance = Instance(1, "max")
    out = instance.evaluator.evaluate(_jobs([-0.99, np.nan, -0.01]))
    assert out.state is not None
    assert out.state.tolist() == [PRUNED, OK, OK]
    assert out.values[0, 0] == 0.99
    assert out.items is not None
    assert out.items[0] is None
    scores = out.items[1]
    assert scores is not None
    assert scores.mean() == out.values[1, 0]
    assert out.reason == ["proven worse than its bound", "", ""]


def _answer(state: int, value: float) -> Answer:
    none = np.empty(0)
    return Answer(np.array([value]), None, none, none, 0.0, state, "")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_pruned_record_answers_bounds_that_are_equal_or_tighter(sign: float) -> None:
    pruned = _answer(PRUNED, sign * 0.5)
    for bound in (0.5, 0.3):
        found = under_bound(pruned, bound, sign)
        assert found is not None
        assert (found.state, found.values[0]) == (PRUNED, sign * bound)
    assert under_bound(pruned, 0.6, sign) is None
    assert under_bound(pruned, np.nan, sign) is None
    full = _answer(OK, sign * 0.5)
    assert under_bound(full, np.nan, sign) is full
    assert under_bound(full, 0.5, sign) is full
    worse = under_bound(full, 0.4, sign)
    assert worse is not None
    assert (worse.state, worse.values[0]) == (PRUNED, sign * 0.4)


@pytest.mark.parametrize("kind", ["memory", "database"])
def test_pruned_rows_are_found_only_where_they_are_asked_for(tmp_path: Path, kind: str) -> None:
    instance = Instance(2)
    config = _stage(instance, "race", {}, seeds=_seeds(2))
    store: Any = MemoryRun()
    if kind == "database":
        base = Database(tmp_path / "a.db")
        store = base.open_run(
            "a", config=config.describe(), space=SPACE.fingerprint, seed=7, out=""
        )
    seen: list[Any] = []

    def look(progress: Any) -> None:
        records = store.records()
        keys = [key for key, s in zip(records.keys, records.state, strict=True) if s == PRUNED]
        digest = next(iter(store.evaluators().values()))
        where: Any = {"evaluator": digest, "fidelity": 0, "replicate": 0, "other_runs": False}
        seen.append((keys, store.lookup(keys, **where), store.lookup(keys, **where, pruned=True)))

    run(config, store=store, callbacks=[look])
    keys, without, with_them = seen[-1]
    assert keys
    assert without == {}
    assert set(with_them) == set(keys)
    assert {answer.state for answer in with_them.values()} == {PRUNED}


def test_a_second_run_shares_pruned_values_and_its_trace_is_its_own(tmp_path: Path) -> None:
    traces: list[Any] = []
    scored: list[int] = []
    for database in ("shared", "shared", "alone"):
        instance = Instance(5)
        config = _stage(instance, "evolution", {"race": True, "quantum": 4}, budget=Budget(100))
        config = SearchConfig(config.stages, seed=len(traces) + 1 if database == "shared" else 2)
        with Database(tmp_path / f"{database}.db") as base:
            store = base.open_run(
                f"run {len(traces)}",
                config=config.describe(),
                space=SPACE.fingerprint,
                seed=config.seed,
                out="",
            )
            run(config, store=store)
            traces.append(base.read(f"run {len(traces)}").records().trace())
        scored.append(instance.scored)
    n = len(traces[2][0])
    assert [column[:n] for column in traces[1]] == list(traces[2])
    assert scored[1] / len(traces[1][0]) < scored[2] / n


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="redraw"):
        Evolution(SPACE, race=True, repeats="allow")
    with pytest.raises(ConfigError, match="keep 0"):
        Race(SPACE, keep=0)
    with pytest.raises(ConfigError, match="item_range"):
        ItemEvaluator(_zeros, SPACE, 4, item_range=(1.0, 0.0))
    with pytest.raises(ConfigError, match="1 or more"):
        ItemEvaluator(_zeros, SPACE, 0)


def _zeros(plans: list[Any], items: Any, fidelity: str, seed: int) -> Any:
    return np.zeros((len(plans), len(items)))


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda p, i, f, s: np.zeros(len(p)), "shape"),
        (lambda p, i, f, s: np.full((len(p), len(i)), 2.0), "score 2.0"),
        (lambda p, i, f, s: "many", "allowed: numbers"),
        (lambda p, i, f, s: np.full((len(p), len(i)), np.nan), "not finite"),
    ],
)
def test_wrong_scores_are_failures_with_a_reason(function: Any, text: str) -> None:
    from searchlab.executors import Chunk, evaluate_chunk

    evaluator = ItemEvaluator(function, SPACE, 4, item_range=(0.0, 1.0))
    done = evaluate_chunk(evaluator, Chunk(_jobs([np.nan, np.nan])))
    assert done.evaluations.reason is not None
    assert all(text in reason for reason in done.evaluations.reason)
