"""Separable programs: a published table of bit-widths, attention spans, and interactions."""

from __future__ import annotations

import csv
import itertools
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.separable import additivity, stages
from searchlab.budget import LinearBudget
from searchlab.config import SearchConfig
from searchlab.evaluator import FunctionEvaluator
from searchlab.experiments.benchmarks._common import Aim, spread, timed
from searchlab.programs import Limit, SeparableProgram, Solution
from searchlab.search import run as run_search
from searchlab.space import Space
from searchlab.variables import Choice

__all__ = ["run"]

Array = NDArray[Any]
GROUPS = (("content", "ssim", (2, 4, 8)), ("quality", "db", (4, 8)), (None, "noise", (2, 4, 8)))
FRONTS = {"ssim": (832, 0.888673), "db": (375, 0.724164), "noise": (1587, 0.991804)}


class Report(Protocol):
    """What writes a case."""

    def case(
        self,
        name: str,
        figures: Mapping[str, Any],
        *,
        seeds: Sequence[int] = (0,),
        aims: Sequence[Aim] = (),
    ) -> None: ...


@cache
def _table() -> tuple[list[dict[str, str]], dict[str, Any]] | None:
    folder = Path(os.environ.get("SEARCHLAB_DATA", "")) / "mixdq"
    if not (folder / "sdxl_turbo_layers.csv").is_file():
        return None
    with open(folder / "sdxl_turbo_layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((folder / "reference_optima.json").read_text("utf-8"))


def _instance(
    rows: list[dict[str, str]], kind: str, group: str | None, bits: tuple[int, ...], of: str = "w"
) -> tuple[Array, Array, list[dict[str, str]]]:
    """Losses and costs of one group, and its rows."""
    some = [row for row in rows if group in (None, row["group"])]
    if of == "a":
        some = [row for row in some if row["act_fp16"] == "0"]
    column = f"{of}_{'ssim' if kind == 'ssim' else 'sqnr'}"
    values = np.array([[float(row[f"{column}_{b}"]) for b in bits] for row in some])
    losses = 10 ** (-values / 10) if kind == "noise" else values.max(1, keepdims=True) - values
    sizes = np.array([float(row["w_params" if of == "w" else "a_elems"]) for row in some])
    return losses, sizes[:, None] * np.array(bits, dtype=float), some


def _solved(program: SeparableProgram) -> tuple[Solution, float]:
    """The answer and the seconds that it took."""
    begun = time.perf_counter()
    answer = program.solve()
    return answer, time.perf_counter() - begun


def published(report: Report) -> None:
    """The bits of the published weight configurations at their own budgets."""
    found = _table()
    if found is None:
        report.case("published weight configurations", {"skipped": "no SEARCHLAB_DATA/mixdq"})
        return
    rows, reference = found
    for config in ("3.66", "4.00", "4.08", "5.02"):
        same, seconds, off = 0, 0.0, 0.0
        for group, kind, bits in GROUPS[:2]:
            losses, costs, some = _instance(rows, kind, group, bits)
            wanted = reference[f"w{config}_{group}"]
            program = SeparableProgram(losses, [Limit(costs, wanted["budget_bits"])])
            answer, taken = _solved(program)
            seconds = max(seconds, taken)
            own = np.array([float(row[f"w{config}"]) for row in some])
            same += int((np.array(bits)[answer.labels] == own).sum())
            off = max(off, abs(answer.loss / wanted["loss_opt"] - 1), answer.gap)
        report.case(
            f"bit-widths of 794 layers, published configuration {config}",
            {"identical_layers": same, "seconds": seconds, "largest_relative_difference": off},
            aims=[
                Aim("identical layers", same, "at least", 794),
                Aim("relative difference or gap", off, "at most", 1e-9),
                Aim("seconds", seconds, "at most", 1.0),
            ],
        )


def optima(report: Report) -> None:
    """The other reference optima; those of the noise are not optimal, and are beaten."""
    found = _table()
    if found is None:
        report.case("reference optima", {"skipped": "no SEARCHLAB_DATA/mixdq"})
        return
    rows, reference = found
    ratios: dict[str, float] = {}
    gap = 0.0
    for name, wanted in reference.items():
        if name.startswith("a7"):
            kind = name.split("_")[2]
            losses, costs, _ = _instance(rows, kind, "content", (4, 8), "a")
            upper = wanted["budget_bits"]
        elif name.startswith("joint"):
            losses, costs, _ = _instance(rows, "noise", None, (2, 4, 8))
            upper = wanted["avg_bits"] * costs[:, 0].sum() / 2
        else:
            continue
        answer = SeparableProgram(losses, [Limit(costs, upper)]).solve()
        ratios[name] = answer.loss / wanted["loss_opt"]
        gap = max(gap, answer.gap)
    report.case(
        "bit-widths, proved optima over the reference's",
        {"ratios": ratios, "largest_gap": gap},
        aims=[
            Aim("largest ratio", max(ratios.values()), "at most", 1 + 1e-9),
            Aim("largest gap", gap, "at most", 0.0),
        ],
    )


def sweeps(report: Report, quick: bool) -> None:
    """A hundred budgets each; the hull's front."""
    found = _table()
    if found is None:
        report.case("sweeps of 100 budgets", {"skipped": "no SEARCHLAB_DATA/mixdq"})
        return
    for group, kind, bits in GROUPS:
        losses, costs, _ = _instance(found[0], kind, group, bits)
        low, high = costs.min(axis=1).sum(), costs.max(axis=1).sum()
        seconds, gaps = [], []
        for share in np.linspace(0.005, 0.995, 100)[:: 5 if quick else 1]:
            program = SeparableProgram(losses, [Limit(costs, low + share * (high - low))])
            answer, taken = _solved(program)
            seconds.append(taken)
            gaps.append(answer.gap)
        report.case(
            f"bit-widths, sweep of budgets, {group or 'all'} layers, {kind}",
            {
                "budgets": len(seconds),
                "median_s": statistics.median(seconds),
                "slowest_s": max(seconds),
                "largest_gap": max(gaps),
            },
            aims=[
                Aim("slowest, s", max(seconds), "at most", 1.0),
                Aim("largest gap", max(gaps), "at most", 0.0),
            ],
        )
        times = []
        for _ in range(3 if quick else 9):
            fresh = SeparableProgram(losses, [Limit(costs)])
            times.append(1e3 * timed(fresh.front).wall)
        front = SeparableProgram(losses, [Limit(costs)]).front()
        x = (front.costs - front.costs[0]) / (high - front.costs[0])
        y = (front.losses - front.losses[-1]) / (front.losses[0] - front.losses[-1])
        volume = float((np.diff(np.append(x, 1.0)) * (1 - y)).sum())
        points, wanted = FRONTS[kind]
        report.case(
            f"bit-widths, hull front, {group or 'all'} layers, {kind}",
            {"ms": spread(times), "points": len(front), "hypervolume": volume},
            aims=[
                Aim("ms", statistics.median(times), "at most", 10.0),
                Aim("points off", abs(len(front) - points), "at most", 0),
                Aim("hypervolume off", abs(volume - wanted), "at most", 1e-6),
            ],
        )


# -- spans of attention heads ---------------------------------------------------------------------

BLOCK = 64
LENGTHS = (2048, 4096, 8192, 16384)


def span_rules() -> Array:
    """Linear rules (alpha, beta) of a head's span, float (48, 2)."""
    grid = itertools.product(np.linspace(-2048, 8192, 11), np.arange(9) / 8)
    rules = [
        (a, b)
        for a, b in grid
        if a + b * 8192 <= 8192 and a + b * 16384 <= 16384 and a + b * 2048 > 0
    ]
    return np.array(sorted(rules, key=lambda rule: (rule[0] + rule[1] * 16384, rule)))


def span_widths(rules: Array, length: int) -> Array:
    """Blocks that a head keeps: band, diagonal and one sink block."""
    blocks = length // BLOCK
    band = np.maximum((rules[:, 0] // BLOCK + rules[:, 1] * blocks).astype(int), 1)
    return np.asarray(np.minimum(band + 1, blocks))


def spans(heads: int, seed: int, sigma: float) -> SeparableProgram:
    """Made-up sensitivities of heads of 32 layers under the rules, half the memory at each length.

    A head loses scale * ((1 + w / reach)^-power - (1 + T / reach)^-power) at width w of T blocks,
    summed over the three shorter lengths: log10 scale ~ N(0, sigma), power ~ U(.3, 2.5),
    reach ~ U(1, 40).
    """
    rng, rules = np.random.default_rng(seed), span_rules()
    scale = 10 ** rng.normal(0, sigma, (heads, 1))
    power, reach = rng.uniform(0.3, 2.5, (heads, 1)), rng.uniform(1, 40, (heads, 1))
    losses = np.zeros((heads, len(rules)))
    for length in LENGTHS[:3]:
        width, full = span_widths(rules, length), length // BLOCK
        losses += scale * ((1 + width / reach) ** -power - (1 + full / reach) ** -power)
    budgets = [
        Limit(span_widths(rules, n) / (n // BLOCK) / heads, 0.5, name=f"density at {n}")
        for n in LENGTHS
    ]
    return SeparableProgram(losses, budgets, None, (), 2, np.arange(heads) * 32 // heads)


def heads(report: Report, quick: bool) -> None:
    """Four budgets and two rules per layer."""
    spans(32, 0, 0.5).solve()  # scipy's solvers are loaded
    for sigma in (0.5,) if quick else (0.5, 0.8):
        seeds = range(1 if quick else 10)
        seconds, gaps, limited = [], [], True
        for seed in seeds:
            program = spans(1024, seed, sigma)
            answer, taken = _solved(program)
            seconds.append(taken)
            labels = answer.labels.reshape(32, 32)
            limited &= max(len(set(row)) for row in labels.tolist()) <= 2
            limited &= max(answer.costs.values()) <= 0.5 + 1e-9
            gaps.append(answer.gap)
        report.case(
            f"1,024 heads, 48 rules, four budgets, two rules per layer, sigma {sigma}",
            {"seconds": spread(seconds), "certified_gap": spread(gaps), "feasible": limited},
            seeds=seeds,
            aims=[
                Aim("slowest, s", max(seconds), "at most", 5.0),
                Aim("largest gap", max(gaps), "at most", 1e-3),
                Aim("plans within all limits", float(limited), "at least", 1),
            ],
        )


# -- where sums lie -------------------------------------------------------------------------------


def _coupled(rows: list[dict[str, str]], rho: float, mean: float) -> tuple[Space, Any, float]:
    """Twelve layers whose errors correlate: space, loss of columns, and the optimum."""
    inside = [f"down_blocks.2.attentions.1.transformer_blocks.{i}." for i in (0, 1)]
    layers = sorted(
        (row for row in rows if row["layer"].startswith(tuple(inside))), key=lambda r: r["layer"]
    )[:12]
    noise = np.array(
        [[10 ** (-float(row[f"w_sqnr_{b}"]) / 20) for b in (2, 4, 8)] for row in layers]
    )
    size = np.array([float(row["w_params"]) for row in layers])
    sign = np.where(np.arange(12) % 3 == 0, -1.0, 1.0)
    apart = np.abs(np.arange(12)[:, None] - np.arange(12))
    gram = np.outer(sign, sign) * float(rho) ** apart

    def value(columns: Any, fidelity: str, seed: int) -> Array:
        a = noise[np.arange(12), np.asarray(columns["bits"]).astype(int)]
        return np.asarray(np.einsum("ni,ij,nj->n", a, gram, a))

    costs = size[:, None] * np.array([2.0, 4.0, 8.0]) / size.sum()
    space = Space(
        bits=Choice((2, 4, 8), shape=(12,)),
        constraints=[LinearBudget({"bits": costs}, upper=mean, name="mean bits")],
    )
    every = np.stack(np.meshgrid(*[np.arange(3)] * 12, indexing="ij"), -1).reshape(-1, 12)
    kept = costs[np.arange(12), every].sum(axis=1) <= mean + 1e-9
    best = min(float(value({"bits": part}, "", 0).min()) for part in np.array_split(every[kept], 8))
    return space, value, best


def interactions(report: Report, quick: bool) -> None:
    """What the additive program reaches, and the search that it seeds, over the true optimum."""
    found = _table()
    if found is None:
        report.case("interacting layers", {"skipped": "no SEARCHLAB_DATA/mixdq"})
        return
    cases = [(0.6, 4.0)] if quick else [(0.0, 4.0), *itertools.product((0.3, 0.6), (3.0, 4.0, 5.0))]
    for rho, mean in cases:
        space, value, best = _coupled(found[0], rho, mean)
        evaluator = FunctionEvaluator(value, space, columns=True, version=1)
        seeds = range(3 if quick else 15)
        reached: dict[int, list[float]] = {100: [], 300: []}
        first, tau = 1.0, 1.0
        for seed in seeds:
            result = run_search(SearchConfig(stages(space, evaluator, 300), seed=seed))
            records = result.records
            assert records is not None
            order = np.argsort(records.ids)
            after = order[np.asarray(records.stage)[order] == 1]
            values = np.asarray(records.values)[after, 0]
            for n, out in reached.items():
                out.append(float(np.nanmin(values[: n - 25])) / best)
            first = float(values[records.origin[after[0]] != "program:optimum" :][0]) / best
            tau = additivity(result).kendall_tau
        report.case(
            f"12 interacting layers, correlation {rho}, {mean:g} bits: loss over the optimum",
            {
                "optimum": best,
                "additive_program": first,
                "evaluations_100": spread(reached[100]),
                "evaluations_300": spread(reached[300]),
                "within_1.02_at_300": float(np.mean(np.array(reached[300]) <= 1.02)),
                "kendall_tau": tau,
                "profile_included": 25,
            },
            seeds=seeds,
            aims=[
                Aim(
                    "median at 300",
                    statistics.median(reached[300]),
                    "at most",
                    1.02,
                    binding=False,
                )
            ],
        )


def run(report: Report, quick: bool) -> None:
    """All cases of this part."""
    published(report)
    optima(report)
    sweeps(report, quick)
    heads(report, quick)
    interactions(report, quick)
