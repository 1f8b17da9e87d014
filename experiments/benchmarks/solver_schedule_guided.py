"""Solver schedules with a predictor beside plain evolution: true evaluations, and all the time.

    python -m searchlab.experiments.benchmarks.solver_schedule_guided [--quick] [--check] [--out F]
        [--folder F] [--minutes M] [--problem mixture|digits]

Plain evolution (the recipe's default) has its whole budget of true evaluations, preset `guided` at
most 40 % of it. Both begin at the same known points, on the same noise, and end with
the same selection; a ratio is the held-out error of the one's winner over that of the other's,
below 1 where fewer evaluations gave more. Seconds are those of whole runs: known points, reference
solutions, signals, fits, search, selection and report. `model_rows` counts the samples that the
model was called with during known points and search, and for the signals apart.

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

from searchlab.evaluators.sampling import SamplingEvaluator
from searchlab.experiments.benchmarks import _schedule_runs as runs
from searchlab.experiments.benchmarks._common import Aim, Journal, flags, spread
from searchlab.experiments.solver_schedule import SolverScheduleOptions, build
from searchlab.population import Population
from searchlab.search import run
from searchlab.study import MemoryRun

Problem = Literal["mixture", "digits"]
Who = Literal["plain", "guided"]

SHARE = 0.4
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
        limit: of the ratio.
    """

    problem: Problem
    nfe: int
    budget: int
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    samples: int | None = None
    held_out: int | None = None
    limit: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.problem}, nfe {self.nfe}"

    def options(self, who: Who, seed: int) -> SolverScheduleOptions:
        budget = self.budget if who == "plain" else int(SHARE * self.budget)
        return SolverScheduleOptions(
            preset="default" if who == "plain" else "guided",
            problem=self.problem,
            nfe=str(self.nfe),
            budget=budget,
            samples=self.samples,
            held_out=self.held_out,
            seed=seed,
            data_seed=seed,
        )


FULL = (
    *(Case("mixture", nfe, 1000) for nfe in (5, 6, 8, 10)),
    Case("digits", 5, 300),
    Case("digits", 8, 300),
)
QUICK = (Case("mixture", 5, 160, (0,), 1024, 512, limit=1.25),)


def measure(case: Case, who: Who, seed: int) -> dict[str, Any]:
    """One run, as JSON."""
    wall, cpu = time.perf_counter(), time.process_time()
    config = build(case.options(who, seed))
    store = MemoryRun()
    result = run(config, store=store)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    outcome = runs.outcomes(result)[case.nfe]
    evaluator = config.stages[-1].evaluator
    assert isinstance(evaluator, SamplingEvaluator)
    records = store.records()
    search = np.asarray(records.stage) == len(config.stages) - 1
    known = np.array([text.startswith("baseline") for text in records.origin])
    own = search & ~known
    values = np.asarray(records.values, dtype=np.float64).reshape(len(own), -1)[own, 0]
    state = (result.meta.get("proposals") or {}).get("search", {}).get("state") or {}
    out = {
        "seed": seed,
        "evaluations": int(own.sum()),
        "held_out": outcome.value,
        "fixed": outcome.fixed_value,
        "curve": np.fmin.accumulate(np.where(np.isfinite(values), values, np.inf)).tolist(),
        "seconds": seconds,
        "proposing_s": (result.meta.get("proposals") or {}).get("search", {}).get("seconds"),
        "model_rows": evaluator.work.rows,
        "signal_rows": evaluator.signal_work.rows,
        "guard": state.get("guard"),
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
        found: dict[Who, list[dict[str, Any]]] = {"plain": [], "guided": []}
        for seed in case.seeds:
            for who, into in found.items():
                late = options.minutes and time.perf_counter() - started > 60 * options.minutes
                one = _kept(options.folder, case, who, seed, go=not late)
                if one is None:
                    print(f"stopped before {case.name}, {who}, seed {seed}", file=sys.stderr)
                    return 3
                into.append(one)
        _report(journal, case, found)
    return journal.close()


def _add(parser: argparse.ArgumentParser) -> None:
    runs.add_flags(parser)
    parser.add_argument("--minutes", type=float, help="begin no further run after so long")
    parser.add_argument("--problem", choices=("mixture", "digits"), help="only this one")


def _kept(folder: Path | None, case: Case, who: Who, seed: int, *, go: bool) -> Any:
    """A run's figures from the folder, or measured now; None = neither."""
    path = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{case.problem} {case.nfe} {case.budget} {who} {seed}.json"
        if path.exists():
            return json.loads(path.read_text("utf-8"))
    if not go:
        return None
    found = measure(case, who, seed)
    if path is not None:
        path.write_text(json.dumps(found), "utf-8")
    return found


def _report(journal: Journal, case: Case, found: dict[Who, list[dict[str, Any]]]) -> None:
    plain, guided = found["plain"], found["guided"]
    ratios = [g["held_out"] / p["held_out"] for g, p in zip(guided, plain, strict=True)]
    times = {
        kind: [g["seconds"][kind] / p["seconds"][kind] for g, p in zip(guided, plain, strict=True)]
        for kind in ("wall", "cpu")
    }
    rows = [
        (g["model_rows"] + g["signal_rows"]) / p["model_rows"]
        for g, p in zip(guided, plain, strict=True)
    ]
    until = [_until(g["curve"], p["curve"][-1]) for g, p in zip(guided, plain, strict=True)]
    share = max(g["evaluations"] / p["evaluations"] for g, p in zip(guided, plain, strict=True))
    journal.case(
        case.name,
        {
            "problem": case.problem,
            "nfe": case.nfe,
            "plain_evaluations": case.budget,
            "plain": _figures(plain),
            "guided": {
                **_figures(guided),
                "evaluations": [g["evaluations"] for g in guided],
                "proposing_s": spread([g["proposing_s"] or 0.0 for g in guided]),
                "guard": [g["guard"] for g in guided],
                "evaluations_until_plains_best": until,
            },
            "ratio": spread(ratios),
            "wall_ratio": spread(times["wall"]),
            "cpu_ratio": spread(times["cpu"]),
            "model_rows_ratio": spread(rows),
        },
        seeds=case.seeds,
        aims=[
            Aim("share of plain evolution's evaluations, highest", share, "at most", SHARE),
            Aim("held-out error over plain's, median", _median(ratios), "at most", case.limit),
            Aim(
                "CPU seconds over plain's, median",
                _median(times["cpu"]),
                "at most",
                1.0,
                not journal.options.quick,
            ),
        ],
    )
    journal.case(f"signals, {case.name}", plain[0]["signals"], seeds=case.seeds[:1])


def _figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "held_out": spread([one["held_out"] for one in found], 5),
        "wall_s": spread([one["seconds"]["wall"] for one in found]),
        "cpu_s": spread([one["seconds"]["cpu"] for one in found]),
        "model_rows": spread([one["model_rows"] + one["signal_rows"] for one in found]),
    }


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _until(curve: Sequence[float], value: float) -> int | None:
    """Evaluations until a curve of best values is as low as this; None = it never is."""
    reached = np.flatnonzero(np.asarray(curve) <= value)
    return int(reached[0]) + 1 if len(reached) else None


if __name__ == "__main__":
    sys.exit(main())
