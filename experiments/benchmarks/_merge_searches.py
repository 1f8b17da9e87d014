"""The searches of the benchmark `merge`: the ring flow by card, the digits by their recipe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from searchlab.evaluators.generated_samples import SampleScore
from searchlab.evaluators.merged_model import MergedModelEvaluator
from searchlab.experiments.benchmarks._common import Aim, Journal
from searchlab.experiments.checkpoint_mix import (
    CheckpointMixOptions,
    algorithm_of,
    averages,
    build,
)
from searchlab.experiments.checkpoint_mix_problems import ring_score, train_ring
from searchlab.spaces.checkpoint_mix import CheckpointBank, CheckpointMixSpace, find_checkpoints

__all__ = ["digits", "digits_more", "ring"]

GUIDED = "guided, 40 % of the evaluations"
SAME = 1.03
"""How far a held-out distance may be above another to count as the same: less than searches with
other seeds differ by."""


def ring(journal: Journal, quick: bool, folder: Path) -> None:
    """Searches of 400 evaluations on a flow trained here, for several training seeds."""
    seeds = (0,) if quick else (0, 1, 2)
    budget = 48 if quick else 400
    gains: dict[str, list[float]] = {}
    for seed in seeds:
        line = _ring_of(folder / str(seed), seed, budget, quick)
        for name, found in line["searches"].items():
            gains.setdefault(name, []).append(found["gain"])
        journal.case(f"ring, training seed {seed}", line, seeds=(seed,))
    aims = []
    for name, values in gains.items():
        if name == "default" or (name in ("paper", GUIDED) and not quick):
            limit = 0.0 if quick else 0.04
            aims.append(Aim(f"least gain of {name}", min(values), "at least", limit))
    figures: dict[str, Any] = {"evaluations": budget, "gains": gains}
    if GUIDED in gains:
        shares = [(1 - g) / (1 - d) for g, d in zip(gains[GUIDED], gains["default"], strict=True)]
        figures["guided_over_default"] = shares
        mean = float(np.mean(shares))
        aims.append(Aim("held-out, guided over default, mean", mean, "at most", SAME))
    name = "ring, gains over the best moving average"
    journal.case(name, figures, seeds=seeds, aims=aims)


def _ring_of(folder: Path, seed: int, budget: int, quick: bool) -> dict[str, Any]:
    from searchlab.config import Budget, SearchConfig, Stage
    from searchlab.search import run

    folder.mkdir(parents=True)
    started = time.process_time()
    train_ring(folder, seed=seed, **({"steps": 700, "after": 300} if quick else {}))
    trained = time.process_time() - started
    bank = CheckpointBank(find_checkpoints([folder]))
    score = ring_score(samples=(500 if quick else 2000,), held_out=2000 if quick else 20000)
    line: dict[str, Any] = {
        "checkpoints": len(bank),
        "training_cpu_s": trained,
        "evaluations": budget,
        "searches": {},
    }
    variants: dict[str, CheckpointMixOptions] = {"default": CheckpointMixOptions()}
    if not quick:
        variants["paper"] = CheckpointMixOptions(preset="paper")
        variants[GUIDED] = CheckpointMixOptions(guided=True)
        variants["simplex"] = CheckpointMixOptions(constraint="simplex", preset="paper")
    for name, options in variants.items():
        space = CheckpointMixSpace(bank.names, constraint=options.constraint)
        evaluator = MergedModelEvaluator(space, bank, score)
        paid = int(0.4 * budget) if options.guided else budget
        known = averages(space, bank)
        stage = Stage(
            "search", space, evaluator, algorithm_of(options, space), Budget(paid), seeds=known
        )
        began = time.process_time()
        result = run(SearchConfig((replace(stage, chunk=8),), seed=seed))
        best = min(
            (c for c in result.everyone if not c.origin.startswith("baseline")),
            key=lambda c: c.search,
        )
        base = min(
            (c for c in result.everyone if "ema_" in c.origin or c.origin.endswith(":last")),
            key=lambda c: c.search,
        )
        took = time.process_time() - began
        rows = [_row(space, known, base.name), space.coefficients(best.population)[0, 0]]
        held = _held_out(bank, score, rows)
        line["searches"][name] = {
            "evaluations": paid,
            "search": best.search,
            "held_out": held[1],
            "best_average": base.name,
            "average_search": base.search,
            "average_held_out": held[0],
            "gain": 1 - held[1] / held[0],
            "optimism": held[1] - best.search,
            "sum_of_magnitudes": float(np.abs(rows[1]).sum()),
            "cpu_s": took,
        }
    if not quick:
        line["held_out_of_averages"] = _averages_held_out(bank, score)
    return line


def _row(space: CheckpointMixSpace, known: Any, name: str) -> Any:
    place = [origin.split(":", 1)[1] for origin in known.origin].index(name)
    return space.coefficients(known.population)[place, 0]


def _held_out(bank: CheckpointBank, score: SampleScore, rows: Sequence[Any]) -> list[float]:
    """Distances on noise of the report split, with `held_out` samples."""
    from searchlab.evaluator import REPORT_REPLICATE
    from searchlab.spaces.checkpoint_mix import states

    return [
        float(score.score(state, 0, REPORT_REPLICATE)[0][0])
        for state in states(bank, np.stack(rows))
    ]


def _averages_held_out(bank: CheckpointBank, score: SampleScore) -> dict[str, float]:
    from searchlab.spaces.checkpoint_mix.baselines import named

    rows = named(len(bank), singles=False)
    return dict(zip(rows, _held_out(bank, score, list(rows.values())), strict=True))


def digits(journal: Journal, quick: bool, folder: Path) -> None:
    """The recipe on the bundled checkpoints, against every known average and every checkpoint."""
    seeds = (0,) if quick else (0, 1, 2)
    _digits(journal, "default", {"budget": 16 if quick else 400}, seeds, quick)


def digits_more(journal: Journal, quick: bool, folder: Path) -> None:
    """The same with a predictor and 40 % of the evaluations, and as the paper has it."""
    if quick:
        return
    _digits(journal, GUIDED, {"budget": 160, "guided": True}, (0, 1, 2), quick)
    _digits(journal, "paper", {"preset": "paper", "budget": 400}, (0,), quick)


def _digits(
    journal: Journal, name: str, settings: dict[str, Any], seeds: Sequence[int], quick: bool
) -> None:
    lines = [_digits_of(seed, settings, quick) for seed in seeds]
    ratios = [line["ratio"] for line in lines]
    aims = [
        Aim("highest ratio", max(ratios), "at most", 1.0, binding=name != "paper" and not quick)
    ]
    figures = {**settings, "runs": lines, "ratios": ratios}
    journal.case(f"digits, {name}", figures, seeds=seeds, aims=aims)


def _digits_of(seed: int, settings: dict[str, Any], quick: bool) -> dict[str, Any]:
    from searchlab.search import run

    sizes: dict[str, Any] = {"samples": 100, "held_out": 300, "report_banks": 2} if quick else {}
    options = CheckpointMixOptions(seed=seed, **settings, **sizes)
    began = time.process_time()
    result = run(build(options))
    group = result.groups[-1]
    winner, base = group.winner, group.best_baseline()
    assert winner is not None
    assert base is not None
    return {
        "seed": seed,
        "report": float(np.mean(winner.report)),
        "report_values": list(winner.report),
        "selection": winner.selection,
        "search": winner.search,
        "best_average": base.name,
        "average_report": float(np.mean(base.report)),
        "average_search": base.search,
        "ratio": float(np.mean(winner.report) / np.mean(base.report)),
        "verdict": result.verdict(),
        "cpu_s": time.process_time() - began,
    }
