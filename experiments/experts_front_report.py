"""What the report of a search for a front of fewer experts adds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from searchlab.config import SearchConfig
from searchlab.evaluator import REPORT_REPLICATE, SELECTION_REPLICATE
from searchlab.evaluators.language.intervals import paired_difference, summarise
from searchlab.evaluators.noise import Split
from searchlab.experiments.experts_front import FRONT_FOLDER, FULL
from searchlab.experiments.experts_setup import Loaded
from searchlab.figures import COLOURS, canvas, legend_beside, style, to_svg
from searchlab.final import Contender
from searchlab.population import Jobs, Population
from searchlab.report import Section
from searchlab.result import Result
from searchlab.trade_offs import TradeOffs

__all__ = ["figure_sizes", "front_sections"]

_SPLITS: tuple[tuple[Split, int], ...] = (
    ("search", 0),
    ("selection", SELECTION_REPLICATE),
    ("report", REPORT_REPLICATE),
)


def front_sections(loaded: Loaded, config: SearchConfig, result: Result) -> list[Section]:
    """Sizes and values of what was scored on report items, and the line that writes a member."""
    trades, stage = result.trade_offs, config.stages[-1]
    assert trades is not None
    scored = [c for c in (*trades.rivals, *trades.finalists) if c.report_values]
    scored.sort(key=lambda c: -_cost(trades, c, "bytes"))
    out = []
    if trades.members:
        caption = "Line: the front by search values, one for each number of active experts. "
        caption += "Diamonds: baselines. Crosses: values on the report items."
        figure = figure_sizes(trades, stage.space.active_of)  # type: ignore[attr-defined]
        out.append(Section("Quality against memory", figure=figure, caption=caption))
    if scored:
        out.append(
            Section(
                "Experts: members of the front on the same items",
                text=_text(loaded),
                table=_rows(loaded, config, trades, scored),
            )
        )
    if result.out is not None and trades.members:
        some = result.out / "export" / FRONT_FOLDER / f"{trades.members[0].id}.json"
        line = f"searchlab apply {some} DIR --model {loaded.prepared.options.model}"
        text = f"Every member is a file of {FRONT_FOLDER}/, by its id; the export is the middle."
        out.append(Section("A member as a checkpoint", text=text, pre=line))
    return out


def _cost(trades: TradeOffs, contender: Contender, name: str) -> float:
    return contender.values[trades.names.index(name)] if name in trades.names else math.nan


def _text(loaded: Loaded) -> str:
    task = loaded.prepared.task
    counts = ", ".join(f"{len(task.splits[split])} {split}" for split, _ in _SPLITS)
    return (
        f"Task {task.name}: {counts} items. Brackets are 95 % intervals over items; differences to "
        "the full model are paired, on the report items. Operations are those of a token in its "
        "experts and routers; attention and what else stays are the same for all."
    )


def _rows(
    loaded: Loaded, config: SearchConfig, trades: TradeOffs, scored: list[Contender]
) -> list[dict[str, str]]:
    stage: Any = config.stages[-1]
    space, evaluator = stage.space, stage.evaluator
    population = Population.concat([c.population for c in scored])
    costs, plans = space.cost(population), space.plans(population)
    layout = space.layout
    blocks = len(layout.blocks)
    full_bytes = layout.other_bytes + blocks * layout.experts * layout.expert_bytes
    tables = {split: _scores(evaluator, population, split, at) for split, at in _SPLITS}
    everything = [n for n, c in enumerate(scored) if c.name == FULL]
    rows = []
    for number, (contender, plan) in enumerate(zip(scored, plans, strict=True)):
        counts = sorted(set(plan.counts))
        row = {
            "what": contender.name if contender.kind == "baseline" else f"found {contender.id}",
            "experts": f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}",
            "active": str(plan.top_k),
            "memory": f"{costs['bytes'][number] / full_bytes:.1%}",
            "MFLOP/token": f"{costs['flops'][number] / 1e6:.4g}",
        }
        for split, _ in _SPLITS:
            value, items, failures = tables[split][number]
            figures = summarise(evaluator.problem.task, split, value, items, failures=failures)
            row[split] = f"{value:.4g} [{figures.low:.4g}, {figures.high:.4g}]"
            if split == "report" and not math.isnan(failures):
                row["format failures"] = f"{failures:.3g}"
        if everything and number != everything[0]:
            of_full = tables["report"][everything[0]][1]
            gain, low, high = paired_difference(tables["report"][number][1], of_full)
            row["more than full"] = f"{gain:+.3g} [{low:+.3g}, {high:+.3g}]"
        rows.append(row)
    return rows


def _scores(
    evaluator: Any, population: Population, split: Split, replicate: int
) -> list[tuple[float, Any, float]]:
    """(value, items, share of answers without a valid form) of each candidate."""
    n = len(population)
    last = len(evaluator.fidelities) - 1
    jobs = Jobs(np.arange(n), population, (b"",) * n, fidelity=last, replicate=replicate)
    done = evaluator.evaluate(jobs)
    return [
        (float(value), np.asarray(items, dtype=np.float64), float(signal[1]))
        for value, items, signal in zip(done.values[:, 0], done.items, done.signals, strict=True)
    ]


def figure_sizes(trades: TradeOffs, active_of: Any) -> bytes:
    """Quality against bytes, a line for each number of active experts."""
    figure, axes = canvas()
    at = trades.names.index("bytes")
    unit, scale = next(
        (pair for pair in (("GiB", 2**30), ("MiB", 2**20)) if trades.points[0][at] >= pair[1]),
        ("KiB", 2**10),
    )
    members = trades.members
    active = np.array([int(active_of(c.population)[0]) for c in members])
    entries = 0
    for i, k in enumerate(sorted(set(active.tolist()), reverse=True)):
        own = [c for c, its in zip(members, active, strict=True) if its == k]
        points = np.array(sorted((c.values[at] / scale, c.values[0]) for c in own))
        colour = COLOURS[i % len(COLOURS)]
        label = f"front, {k} active"
        axes.plot(points[:, 0], points[:, 1], "o-", color=colour, lw=1.2, ms=4, label=label)
        entries += 1
    if trades.baselines:
        own_points = np.array([(c.values[at] / scale, c.values[0]) for c in trades.baselines])
        x, y = own_points[:, 0], own_points[:, 1]
        axes.plot(x, y, "D", ms=4, mfc="none", color=COLOURS[-1], label="baselines")
        entries += 1
    reported = [c for c in (*trades.finalists, *trades.rivals) if c.report_values]
    if reported:
        cross = np.array([(c.values[at] / scale, c.report_values[0][0]) for c in reported])
        axes.plot(cross[:, 0], cross[:, 1], "x", color="#666666", ms=6, label="report items")
        entries += 1
    style(axes, x=f"weights [{unit}]", y=trades.names[0])
    legend_beside(axes, entries)
    return to_svg(figure)
