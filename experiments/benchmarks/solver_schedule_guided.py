"""Solver schedules with a predictor beside plain evolution: true evaluations, and all the time.

    python -m searchlab.experiments.benchmarks.solver_schedule_guided [--quick] [--check] [--out F]
        [--folder F] [--minutes M] [--problem mixture|digits] [--nfe N]...

Plain evolution (the recipe's default) has its whole budget of true evaluations, preset `guided`
30 % of it, on digits 25 %. Both begin at the same known points, on the same noise, and end with the
same selection; a ratio is the held-out error of the one's winner over that of the other's, below 1
where fewer evaluations gave more. Known points and their values are shared; the guided run comes
first, so that the plain one is answered from the cache where they meet. Seconds are those of the
search stage: from its first answers to its last, with fits, signals and the panel behind them; CPU
seconds of the same are what the aim is for, as others may use the machine. `signal_rows` counts the
samples that the model was called with for the signals.

`signals` says how well each signal orders what plain evolution told (Kendall's tau, among all
children and among the better half), and what it takes per candidate.

With `--folder` finished runs are kept there, so that a benchmark which was stopped, by `--minutes`
too, goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau

from searchlab.callbacks import Progress
from searchlab.evaluator import SELECTION_REPLICATE
from searchlab.evaluators.sampling import SamplingEvaluator
from searchlab.experiments.benchmarks import _schedule_runs as runs
from searchlab.experiments.benchmarks._common import Aim, Journal, flags, spread
from searchlab.experiments.solver_schedule import SolverScheduleOptions, build
from searchlab.population import Population
from searchlab.records import RECORD_STATES
from searchlab.search import run
from searchlab.study import Database

Problem = Literal["mixture", "digits"]
Who = Literal["plain", "guided"]

SHARE = 0.4  # of plain evolution's evaluations that may be used
NAMES = ("few", "typical", "path", "truncation")


@dataclass(frozen=True)
class Case:
    """One number of model calls of one problem.

    Attributes:
        problem: bundled problem.
        nfe: number of model calls.
        budget: true evaluations of plain evolution.
        seeds: of the searches, and of their noise banks.
        samples: per evaluation; None = the recipe's own.
        held_out: samples per bank of the selection and report splits; None = the recipe's own.
        banks: of the report split.
        limit: of the ratio.
        spent: share of plain evolution's evaluations that the guided search has.
    """

    problem: Problem
    nfe: int
    budget: int
    seeds: tuple[int, ...] = tuple(range(15))
    samples: int | None = None
    held_out: int | None = None
    banks: int = 4
    limit: float = 1.0
    spent: float = 0.3

    @property
    def name(self) -> str:
        return f"{self.problem}, nfe {self.nfe}"

    def options(self, who: Who, seed: int) -> SolverScheduleOptions:
        budget = self.budget if who == "plain" else int(self.spent * self.budget)
        return SolverScheduleOptions(
            preset="default" if who == "plain" else "guided",
            problem=self.problem,
            nfe=str(self.nfe),
            budget=budget,
            samples=self.samples,
            held_out=self.held_out,
            report_banks=self.banks,
            seed=seed,
            data_seed=seed,
        )


FULL = (
    *(Case("mixture", nfe, 1000) for nfe in (5, 6, 8, 10)),
    Case("digits", 6, 300, tuple(range(5)), spent=0.25),
)
QUICK = (Case("mixture", 5, 120, (0,), 512, 256, banks=2, limit=1.25),)


def measure(case: Case, seed: int) -> dict[Who, dict[str, Any]]:
    """Both runs of one seed, as JSON."""
    found: dict[Who, dict[str, Any]] = {}
    order: tuple[Who, ...] = ("guided", "plain")
    with runs.database(None) as base:
        for who in order:
            found[who] = _one(base, case, who, seed)
    return found


def _one(base: Database, case: Case, who: Who, seed: int) -> dict[str, Any]:
    config = build(case.options(who, seed))
    store = base.open_run(
        who,
        config=config.describe(),
        space=config.stages[-1].space.fingerprint,
        seed=seed,
        out="",
    )
    clock: list[tuple[float, float]] = []

    def heard(progress: Progress) -> None:
        if progress.stage == config.stages[-1].name:
            clock.append((time.perf_counter(), time.process_time()))

    result = run(config, store=store, callbacks=[heard])
    wall, cpu = (end - start for start, end in zip(clock[0], clock[-1], strict=True))
    outcome = runs.outcomes(result)[case.nfe]
    evaluator = config.stages[-1].evaluator
    assert isinstance(evaluator, SamplingEvaluator)
    records = result.records
    assert records is not None
    search = records.replicate < SELECTION_REPLICATE
    search &= records.stage == len(config.stages) - 1
    own = search & np.array([not text.startswith("baseline") for text in records.origin])
    own &= records.state == RECORD_STATES.index("ok")
    values = records.values[own, 0]
    note = (result.meta.get("proposals") or {}).get("search", {})
    proposing = float(note.get("seconds") or 0.0)
    state = note.get("state") or {}
    out = {
        "seed": seed,
        "evaluations": int((own & ~records.cached).sum()),
        "held_out": outcome.value,
        "fixed": outcome.fixed_value,
        "curve": np.fmin.accumulate(values).tolist(),
        "proposing_s": proposing,
        "search_s": wall,
        "search_cpu_s": cpu,
        "signal_rows": evaluator.signal_work.rows,
        "guard": state.get("guard"),
        "chosen": state.get("chosen"),
    }
    if who == "plain" and seed == case.seeds[0]:
        rows = [text for text, mine in zip(records.genotypes, own, strict=True) if mine]
        out["signals"] = signals(evaluator, evaluator.space.unpack(rows), values)
    return out


def signals(
    evaluator: SamplingEvaluator, population: Population, values: NDArray[np.float64]
) -> dict[str, Any]:
    """How each signal orders the last of these candidates, and what it takes."""
    assert evaluator.cheap is not None
    rows = np.flatnonzero(np.isfinite(values))[-300:]
    truth = values[rows]
    better = truth <= np.median(truth)
    out: dict[str, Any] = {"candidates": len(rows)}
    for name in NAMES:
        own = replace(evaluator, cheap=replace(evaluator.cheap, names=(name,)))
        wall = time.process_time()
        own.static_signals(population.take(rows[:1]))
        ready = time.process_time()
        figures = own.static_signals(population.take(rows))[:, -1]
        done = time.process_time()
        out[name] = {
            "tau": round(float(kendalltau(figures, truth)[0]), 3),
            "tau_better_half": round(float(kendalltau(figures[better], truth[better])[0]), 3),
            "ms_per_candidate": round(1e3 * (done - ready) / len(rows), 3),
            "once_s": round(ready - wall, 3),
        }
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments, add=_add)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    journal = Journal("solver_schedule_guided", options)
    cases = QUICK if options.quick else FULL
    for case in cases:
        if options.problem not in (None, case.problem):
            continue
        if options.nfe and case.nfe not in options.nfe:
            continue
        found: dict[Who, list[dict[str, Any]]] = {"plain": [], "guided": []}
        for seed in case.seeds:
            late = options.minutes and time.perf_counter() - started > 60 * options.minutes
            both = _kept(options.folder, case, seed, go=not late)
            if both is None:
                print(f"stopped before {case.name}, seed {seed}", file=sys.stderr)
                journal.close()  # the cases that are complete
                return 3
            for who, into in found.items():
                into.append(both[who])
        _report(journal, case, found)
    return journal.close()


def _add(parser: argparse.ArgumentParser) -> None:
    runs.add_flags(parser)
    parser.add_argument("--minutes", type=float, help="begin no further run after so long")
    parser.add_argument("--problem", choices=("mixture", "digits"), help="only this one")
    parser.add_argument("--nfe", type=int, action="append", help="only this number of model calls")


def _kept(folder: Path | None, case: Case, seed: int, *, go: bool) -> Any:
    """Both runs' figures from the folder, or measured now; None = neither."""
    path = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{case.problem} {case.nfe} {case.budget} {seed}.json"
        if path.exists():
            return json.loads(path.read_text("utf-8"))
    if not go:
        return None
    found = measure(case, seed)
    if path is not None:
        path.write_text(json.dumps(found), "utf-8")
    return found


def _report(journal: Journal, case: Case, found: dict[Who, list[dict[str, Any]]]) -> None:
    pairs = list(zip(found["guided"], found["plain"], strict=True))
    ratios = [g["held_out"] / p["held_out"] for g, p in pairs]
    times = [g["search_s"] / p["search_s"] for g, p in pairs]
    cpu = [g["search_cpu_s"] / p["search_cpu_s"] for g, p in pairs]
    share = max(g["evaluations"] / p["evaluations"] for g, p in pairs)
    long = not journal.options.quick
    journal.case(
        case.name,
        {
            "problem": case.problem,
            "nfe": case.nfe,
            "plain": _figures(found["plain"]),
            "guided": {
                **_figures(found["guided"]),
                "signal_rows": spread([g["signal_rows"] for g, _ in pairs]),
                "guard": [g["guard"] for g, _ in pairs],
                "chosen": [g["chosen"] for g, _ in pairs],
                "evaluations_until_plains_best": [
                    _until(g["curve"], p["curve"][-1]) for g, p in pairs
                ],
            },
            "ratio": spread(ratios),
            "search_s_ratio": spread(times),
            "search_cpu_s_ratio": spread(cpu),
        },
        seeds=case.seeds,
        aims=[
            Aim("share of plain evolution's evaluations, highest", share, "at most", SHARE),
            Aim("held-out error over plain's, median", _median(ratios), "at most", case.limit),
            Aim("CPU seconds of search over plain's, median", _median(cpu), "at most", 1.0, long),
        ],
    )
    journal.case(f"signals, {case.name}", found["plain"][0]["signals"], seeds=case.seeds[:1])


def _figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "evaluations": [one["evaluations"] for one in found],
        "held_out": spread([one["held_out"] for one in found], 5),
        "best_fixed": spread([one["fixed"] for one in found], 5),
        "search_s": spread([one["search_s"] for one in found]),
        "proposing_s": spread([one["proposing_s"] for one in found]),
        "search_cpu_s": spread([one["search_cpu_s"] for one in found]),
    }


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _until(curve: Sequence[float], value: float) -> int | None:
    """Evaluations until a curve of best values is as low as this; None = it never is."""
    reached = np.flatnonzero(np.asarray(curve) <= value)
    return int(reached[0]) + 1 if len(reached) else None


if __name__ == "__main__":
    sys.exit(main())
