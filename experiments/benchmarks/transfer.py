"""Predictors that are used again: evaluations that an earlier search saves the next one.

    python -m searchlab.experiments.benchmarks.transfer [--quick] [--check] [--out FILE]
        [--part order|cells|calls|models]... [--folder F] [--minutes M]

`order`: a predictor of CIFAR-10 labels of NAS-Bench-201 goes to a folder and is read back.
Kendall's tau on cells whose CIFAR-100 labels nobody has seen: as it is, refitted to 25 of them
(`warm`), and of a predictor that sees these 25 only. `cells`: true evaluations until one of the 16
best cells of CIFAR-100 is found, from scratch, with the ten best cells of a search on CIFAR-10 to
start at, and with the predictor that this search left beside them. `calls`: schedules of 6 model
calls, then of 8 (problem `mixture`); `models`: schedules of 6 calls for a small model of digits,
then for one 2.7 times as wide. Both from scratch, with the ten best of the first search, and with
its predictor beside them: evaluations to the error that the search from scratch ends with (one more
than there are = never), those to what it has after half of them, and the error at the end of as
many. What was begun with counts. Schedules of 6 calls get two steps more on the way, as with every
warm start, where the new problem's signal of few samples is lowest.

Seconds are CPU time of the whole second search, fits and signals included. NAS-Bench-201 is read
below $SEARCHLAB_DATA; its cases are skipped where it is not. With `--folder` finished seeds of
`calls` and `models` are kept there, so that a benchmark which was stopped, by `--minutes` too, goes
on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import searchlab as sl
from searchlab._tau import tau_of
from searchlab.config import Budget, SearchConfig
from searchlab.evaluator import SELECTION_REPLICATE
from searchlab.evaluators.nasbench201 import FILE, SIGNALS
from searchlab.evaluators.sampling import SamplingEvaluator
from searchlab.evaluators.table import TableEvaluator
from searchlab.experiments.benchmarks._common import (
    Aim,
    Journal,
    data_folder,
    flags,
    other_parts,
    spread,
)
from searchlab.experiments.checkpoint_mix_problems import small_digits
from searchlab.experiments.solver_schedule import SolverScheduleOptions, build
from searchlab.experiments.solver_schedule_problems import digits_problem
from searchlab.population import OK
from searchlab.predictor import Table, table_of
from searchlab.predictors.reuse import Earlier, Warm
from searchlab.predictors.stack import Stack
from searchlab.prior import PriorRequest, with_prior
from searchlab.runs import run_in_database
from searchlab.warm_start import best_of_run, with_warm_start

__all__ = ["main"]

Floats = NDArray[np.float64]
PARTS = ("order", "cells", "calls", "models")
SEEDS = 15  # of searches for schedules: five say little, as their errors differ by a fifth
MOST, TOP = 100, 16
FROM, TO = "6", "8"


def evaluator_of(folder: Path, dataset: str) -> TableEvaluator:
    """The benchmark's cells, measured in full only."""
    return TableEvaluator(
        folder / FILE,
        {"genotype": "digits"},
        objectives={"accuracy": "max"},
        fidelities={"200 epochs": (f"{dataset}_acc200", 1.0)},
        signals=SIGNALS,
    )


def whole_table(evaluator: TableEvaluator) -> tuple[Table, Floats]:
    """All cells and their losses."""
    population = evaluator.space.enumerate()
    rows = evaluator.rows_of(population)
    table = table_of(
        evaluator.space,
        population,
        signals=evaluator.static_signals(population),
        of=evaluator.signals,
    )
    return table, -evaluator.values()[rows, 0]


def order(journal: Journal, folder: Path) -> None:
    """Tau on CIFAR-100 with 25 labels."""
    quick = journal.options.quick
    seeds = range(1 if quick else 5)
    labels, ranked, most = (100, 500, 1000) if quick else (781, 2000, None)
    table, old_losses = whole_table(evaluator_of(folder, "cifar10"))
    _, losses = whole_table(evaluator_of(folder, "cifar100"))
    found: dict[str, list[float]] = {"as it is": [], "warm": [], "from scratch": []}
    for seed in seeds:
        rows = np.random.default_rng(seed).permutation(len(table))
        first, second, test = rows[:labels], rows[labels : labels + 25], rows[7813:][:most]
        old = Stack()
        old.fit(table.take(first), old_losses[first], seed=seed, pool=table.take(rows[:ranked]))
        with tempfile.TemporaryDirectory() as scratch:
            old.save(Path(scratch), with_data=True)
            earlier = Earlier.of_folder(
                Path(scratch), table.space, adapted=True, background=lambda: table
            )
        pool = table.take(rows[:ranked])
        warm, cold = Warm(earlier), Stack()
        for predictor in (warm, cold):
            predictor.fit(table.take(second), losses[second], seed=seed, pool=pool)
        told = table.take(test)
        for name, scores in (
            ("as it is", earlier.rank(told)),
            ("warm", warm.rank(told)),
            ("from scratch", cold.rank(told)),
        ):
            found[name].append(tau_of(scores, losses[test]).tau)
    means = {name: statistics.fmean(values) for name, values in found.items()}
    journal.case(
        f"{labels} labels of CIFAR-10, then 25 of CIFAR-100",
        {"tau": {name: spread(values) for name, values in found.items()}},
        seeds=seeds,
        aims=[
            Aim("tau, warm", means["warm"], "at least", 0.79, not quick),
            Aim(
                "tau beyond scratch", means["warm"] - means["from scratch"], "at least", 0.10,
                not quick,
            ),
            Aim(
                "tau lost by the refit", means["as it is"] - means["warm"], "at most", 0.01,
                not quick,
            ),
        ],
    )  # fmt: skip


# -- cells --------------------------------------------------------------------------------------


def until_found(values: Floats, wanted: float, most: int) -> int:
    """Evaluations until a value is reached; most + 1 = it was not."""
    hits = np.flatnonzero(values >= wanted)
    return int(hits[0]) + 1 if len(hits) else most + 1


def cells(journal: Journal, folder: Path) -> None:
    """Evaluations to a top cell of CIFAR-100 after a search on CIFAR-10."""
    quick = journal.options.quick
    seeds = range(1 if quick else 5)
    most = 20 if quick else MOST
    new = evaluator_of(folder, "cifar100")
    top = float(np.sort(new.values()[:, 0])[-TOP])
    ways: dict[str, dict[str, Any]] = {
        "from scratch": {},
        "ten best": {"warm_start": True},
        "ten best and predictor": {"warm_start": True, "predictor": True},
        "predictor": {"predictor": True},
    }
    counts: dict[str, list[int]] = {way: [] for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    lines = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            old = Path(scratch) / "old"
            sl.search(
                new.space,
                evaluator_of(folder, "cifar10"),
                budget=most,
                algorithm="guided",
                seed=100 + seed,
                out=old,
            )
            for way, more in ways.items():
                options = {
                    "warm_start": old if "warm_start" in more else None,
                    "predictor": old / "predictor" if "predictor" in more else None,
                }
                start = time.process_time()
                result = sl.search(
                    new.space,
                    new,
                    budget=Budget(most, target=top),
                    algorithm="guided",
                    seed=seed,
                    **options,  # type: ignore[arg-type]
                )
                seconds[way].append(time.process_time() - start)
                records = result.records
                assert records is not None
                done = records.values[records.state == OK, 0]
                counts[way].append(until_found(done, top, most))
                lines += [note for note in result.meta["notes"] if "refit" in note]
    journal.case(
        "CIFAR-10 to CIFAR-100, evaluations to one of the 16 best cells",
        {
            "evaluations": {way: spread(found) for way, found in counts.items()},
            "most": most,
            "cpu_s": {way: spread(found) for way, found in seconds.items()},
            "lines": lines,
        },
        seeds=seeds,
        aims=[
            Aim(
                "median evaluations with the predictor, of those from scratch",
                statistics.median(counts["ten best and predictor"])
                / statistics.median(counts["from scratch"]),
                "at most",
                1.0,
                not quick,
            )
        ],
    )


# -- schedules ----------------------------------------------------------------------------------


def _schedules(nfe: str, seed: int, quick: bool) -> SearchConfig:
    config = build(
        SolverScheduleOptions(
            preset="guided",
            problem="mixture",
            nfe=nfe,
            budget=20 if quick else 120,
            samples=128 if quick else 1024,
            held_out=64 if quick else 256,
            seed=seed,
            data_seed=seed,
        )
    )
    return replace(config, final=None)


def _errors(config: SearchConfig, out: Path) -> tuple[Floats, int, list[str]]:
    """The errors of the search stage in order, model rows of its signals, and the notes."""
    result = run_in_database(config, name=out.name, out=out, database=str(out / "runs.db"))
    records = result.records
    assert records is not None
    own = (records.stage == len(config.stages) - 1) & (records.state == OK)
    own &= records.replicate < SELECTION_REPLICATE
    own &= np.array([not text.startswith("baseline") for text in records.origin])
    work = getattr(config.stages[-1].evaluator, "signal_work", None)
    rows = 0 if work is None else int(work.rows)
    return np.fmin.accumulate(records.values[own, 0]), rows, list(result.meta["notes"])


def _ten_best(config: SearchConfig, run: Path) -> SearchConfig:
    """The search with the ten best schedules of an earlier run, and nothing else, to start at."""
    stage = config.stages[-1]
    seeds = best_of_run(run, stage.space, stage.evaluator.objectives[0], evaluator=stage.evaluator)
    return replace(config, stages=(*config.stages[:-1], replace(stage, seeds=seeds)))


WAYS = ("from scratch", "ten best", "ten best and predictor")


def _more_calls(seed: int, quick: bool) -> dict[str, Any]:
    """See `_other_model`."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        old = _schedules(FROM, seed, quick)
        _errors(old, base / "old")
        for way in WAYS:
            start = time.process_time()
            config = _schedules(TO, seed, quick)
            if way != "from scratch":
                config = _ten_best(config, base / "old")
            if "predictor" in way:
                config = with_prior(config, PriorRequest(base / "old" / "predictor"))
            found[way] = _told(config, base / way.replace(" ", "_"), start)
    return found


def _told(config: SearchConfig, out: Path, start: float) -> dict[str, Any]:
    curve, rows, notes = _errors(config, out)
    return {
        "curve": curve.tolist(),
        "seconds": time.process_time() - start,
        "rows": rows,
        "lines": [note for note in notes if "refit" in note],
    }


def calls(journal: Journal) -> None:
    """Schedules of 8 model calls after a search for those of 6."""
    _reuse(journal, "calls", f"schedules of {FROM} calls to {TO}", _more_calls)


# -- models -------------------------------------------------------------------------------------


def _digits(seed: int, quick: bool, *, small: bool) -> SearchConfig:
    config = build(
        SolverScheduleOptions(
            preset="guided",
            problem="digits",
            nfe=FROM,
            budget=16 if quick else 60,
            samples=192 if quick else 256,
            held_out=256,
            seed=seed + 100 * small,
            data_seed=seed,
        )
    )
    stages = config.stages
    if small:
        problem = digits_problem(model=small_digits())[0]
        stages = tuple(
            replace(
                stage, evaluator=replace(cast(SamplingEvaluator, stage.evaluator), problem=problem)
            )
            for stage in stages
        )
    return replace(config, stages=stages, final=None)


def _other_model(seed: int, quick: bool) -> dict[str, Any]:
    """The error after each evaluation, CPU seconds and model rows of each way, and the notes."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        _errors(_digits(seed, quick, small=True), base / "old")
        for way in WAYS:
            start = time.process_time()
            config = _digits(seed, quick, small=False)
            if way != "from scratch":
                config = with_warm_start(config, base / "old")
            if "predictor" in way:
                config = with_prior(config, PriorRequest(base / "old" / "predictor"))
            found[way] = _told(config, base / way.replace(" ", "_"), start)
    return found


def models(journal: Journal) -> None:
    """Schedules for the bundled model of digits after a search for those of a smaller one."""
    name = f"schedules of {FROM} calls, a small model of digits to a larger one"
    _reuse(journal, "models", name, _other_model)


# -- both ---------------------------------------------------------------------------------------


def _runs(
    journal: Journal, part: str, measure: Callable[[int, bool], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What every seed came to, from the folder or measured now."""
    options, runs = journal.options, []
    for seed in range(1 if options.quick else SEEDS):
        file = None if options.folder is None else options.folder / f"{part} {seed}.json"
        if file is not None and file.exists():
            runs.append(json.loads(file.read_text("utf-8")))
            continue
        if options.minutes is not None and time.monotonic() - options.begun > 60 * options.minutes:
            raise TimeoutError
        runs.append(measure(seed, bool(options.quick)))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(runs[-1]), "utf-8")
    return runs


def _reuse(
    journal: Journal, part: str, name: str, measure: Callable[[int, bool], dict[str, Any]]
) -> None:
    """Evaluations to the errors that the search from scratch has at its end and half way."""
    runs = _runs(journal, part, measure)
    half, whole = (
        {way: [_until(run, way, share) for run in runs] for way in WAYS} for share in (0.5, 1.0)
    )
    ends = {
        way: [run[way]["curve"][-1] / run["from scratch"]["curve"][-1] for run in runs]
        for way in WAYS[1:]
    }
    last = WAYS[-1]
    medians = {way: statistics.median(found) for way, found in whole.items()}
    journal.case(
        f"{name}, evaluations to the same error",
        {
            "evaluations": {way: spread(found) for way, found in whole.items()},
            "to the error of half of them": {way: spread(found) for way, found in half.items()},
            "error at the end, of that from scratch": {w: spread(e) for w, e in ends.items()},
            "cpu_s": {way: spread([run[way]["seconds"] for run in runs]) for way in WAYS},
            "signal_rows": {way: spread([run[way]["rows"] for run in runs]) for way in WAYS},
            "lines": [line for run in runs for line in run[last]["lines"]],
        },
        seeds=range(len(runs)),
        aims=[
            Aim(
                "median evaluations, of those from scratch",
                medians[last] / medians["from scratch"],
                "at most",
                1.0,
                False,
            ),
            Aim("of those with the ten best", medians[last] / medians["ten best"], "at most", 1.0,
                False),
            Aim("error at the end, of that from scratch", statistics.median(ends[last]), "at most",
                1.0, False),
            Aim(
                "error at the end, of that with the ten best",
                statistics.median(a / b for a, b in zip(ends[last], ends["ten best"], strict=True)),
                "at most",
                1.0,
                False,
            ),
        ],
    )  # fmt: skip


def _until(run: dict[str, Any], way: str, share: float) -> int:
    """Evaluations until the error that scratch has after a share of its own; one more = never."""
    scratch, curve = run["from scratch"]["curve"], np.array(run[way]["curve"])
    return until_found(-curve, -scratch[max(1, round(share * len(scratch))) - 1], len(curve))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status says whether aims were kept where that was asked."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--part", action="append", choices=PARTS, help="these only")
        parser.add_argument("--folder", type=Path, help="keep finished seeds of schedules there")
        parser.add_argument("--minutes", type=float, help="begin no further seed after so long")

    options = flags(__doc__, arguments, add=add)
    options.begun = time.monotonic()
    journal = Journal("transfer", options, lines=other_parts(options))
    folder = data_folder("nasbench201")
    for part in options.part or PARTS:
        if options.part is None and options.quick and part == "models":
            continue  # a minute and more
        journal.part = part
        if part in ("calls", "models"):
            try:
                (calls if part == "calls" else models)(journal)
            except TimeoutError:
                print("stopped by --minutes; the same command goes on", file=sys.stderr)
                return 3
        elif folder is None:
            journal.skip(part, "no nasbench201 below $SEARCHLAB_DATA")
        elif part == "order":
            order(journal, folder)
        else:
            cells(journal, folder)
    return journal.close()


if __name__ == "__main__":
    sys.exit(main())
