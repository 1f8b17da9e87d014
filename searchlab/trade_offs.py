"""What a search with several objectives came to: its front, what it covers, and the final of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.config import Final
from searchlab.evaluator import Objective
from searchlab.final import Contender, FinalPlan, Interval, distinct
from searchlab.fronts import (
    dominating,
    front_order,
    hypervolume,
    knee,
    non_dominated,
    reference_point,
    spread,
)
from searchlab.space import Space

__all__ = ["TradeOffs", "plan_front_final", "score_front", "trade_offs_of"]

CHECKPOINTS = 40  # of the curve of a hypervolume
MOST_MEASURED = 4  # objectives; beyond that a choice by hypervolume takes too long
MOST_MEMBERS = 200  # that are written down with their plans


@dataclass
class TradeOffs:
    """The front of a run, by the values of the search, with what the final says of some of it.

    Attributes:
        objectives: two or more.
        reference: from where hypervolumes are measured, a value of each objective, in its unit.
        members: candidates that meet the constraints and that nothing dominates, baselines
            included, ordered by the first objective, best first.
        baselines: all baselines, on the front or not.
        curve: (candidates in id order, hypervolume of them).
        alpha: intervals cover 1 - alpha.
        finalists: members that the final scored again; see `searchlab.fronts.spread`.
        rivals: baselines that it scored.
    """

    objectives: tuple[Objective, ...]
    reference: tuple[float, ...]
    members: list[Contender]
    baselines: list[Contender]
    curve: list[tuple[int, float]] = field(default_factory=list)
    alpha: float = 0.05
    finalists: list[Contender] = field(default_factory=list)
    rivals: list[Contender] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(objective.name for objective in self.objectives)

    @property
    def points(self) -> list[tuple[float, ...]]:
        """Search values of the members, one per objective."""
        return [member.values for member in self.members]

    def losses(self, parts: Sequence[Contender], split: str = "search") -> NDArray[np.float64]:
        """Minimised figures of candidates, float64 (n, m); NaN where a split has none."""
        rows = [values_of(part, split, len(self.objectives)) for part in parts]
        return np.array(rows, dtype=np.float64).reshape(-1, len(self.objectives)) * self._signs

    @property
    def _signs(self) -> NDArray[np.float64]:
        return signs_of(self.objectives)

    def volume(self, parts: Sequence[Contender], split: str = "search") -> float:
        """Hypervolume of candidates that meet the constraints, by one split."""
        losses = self.losses([part for part in parts if not part.violation], split)
        fine = losses[np.isfinite(losses).all(axis=1)]
        return hypervolume(fine, np.array(self.reference) * self._signs)

    @property
    def hypervolume(self) -> float:
        """Of the front, by search values."""
        return self.volume(self.members)

    def report(self) -> dict[str, Any] | None:
        """Hypervolumes on the report split: of what the search found, and of the baselines.

        Returns:
            found, baselines: one value per replicate (common noise), gain: `Interval` of their
            differences; None without finalists that were reported. Without reported baselines
            baselines and gain are None.
        """
        found = [c for c in self.finalists if c.report_values]
        rivals = [c for c in self.rivals if c.report_values]
        if not found:
            return None
        ours = self._volumes(found)
        if not rivals:
            return {"found": ours, "baselines": None, "gain": None, "n": len(found)}
        theirs = self._volumes(rivals)
        gain = Interval.of(np.array(ours) - np.array(theirs), self.alpha)
        return {"found": ours, "baselines": theirs, "gain": gain, "n": len(found)}

    def _volumes(self, parts: Sequence[Contender]) -> list[float]:
        point = np.array(self.reference) * self._signs
        allowed = [part.report_values for part in parts if not part.violation]
        if not allowed:
            return [0.0] * len(parts[0].report_values)
        out = []
        for replicate in zip(*allowed, strict=True):
            losses = np.array(replicate) * self._signs
            out.append(hypervolume(losses[np.isfinite(losses).all(axis=1)], point))
        return out

    def verdict(self) -> str:
        """One sentence: what the front covers against what the baselines do."""
        names = ", ".join(f"{o.name} ({o.direction})" for o in self.objectives)
        if not self.members:
            return f"{names}: no candidate meets the constraints."
        size = f"{len(self.members)} on the front"
        reported = self.report()
        if reported is None:
            text = f"hypervolume {self.hypervolume:.4g}"
            if not self.baselines:
                return f"{names}: {size}, {text}, no baseline to compare with."
            base = self.volume(self.baselines)
            times = f"{self.hypervolume / base:.2f} x, " if base else ""
            return (
                f"{names}: {size}, {text} against {base:.4g} of the baselines' front "
                f"({times}search values, no report split)."
            )
        mean = float(np.mean(reported["found"]))
        text = f"hypervolume {mean:.4g} of {reported['n']} members on the report split"
        gain: Interval | None = reported["gain"]
        if gain is None:
            return f"{names}: {size}, {text}, no baseline to compare with."
        base = float(np.mean(reported["baselines"]))
        times = f"{mean / base:.2f} x, " if base else ""
        level = round(100 * (1 - self.alpha))
        if not np.isfinite(gain.half):
            sure = "one replicate, so no interval"
        elif gain.excludes_zero():
            word = "better" if gain.mean > 0 else "worse"
            sure = f"gain {gain.mean:.3g} ± {gain.half:.2g}, {word}, distinguishable at {level} %"
        else:
            sure = f"gain {gain.mean:.3g} ± {gain.half:.2g}, not distinguishable at {level} %"
        return (
            f"{names}: {size}, {text} against {base:.4g} of the baselines' front ({times}{sure})."
        )

    def shown(self) -> list[Contender]:
        """Members and baselines once each, members first."""
        return distinct([*self.members, *self.rivals, *self.baselines])

    def rows(self) -> list[dict[str, Any]]:
        """One row per member and baseline; the figures of each split by objective."""
        on_front = {member.key for member in self.members}
        scored = {member.key for member in self.finalists}
        out = []
        for c in self.shown():
            row: dict[str, Any] = {
                "group": c.group,
                "kind": c.kind,
                "name": c.name,
                "id": c.id,
                "front": c.key in on_front,
                "search": _clean(c.search),
                "selection": _clean(c.selection),
                "report": _clean(float(np.mean(c.report))) if c.report else None,
                "report_half": Interval.of(c.report, self.alpha).to_json()[1] if c.report else None,
                "report_values": list(c.report),
                "ratio_to_baseline": None,
                "violation": _clean(c.violation),
                "replicates": [list(map(_clean, values)) for values in c.report_values],
                "scored": c.key in scored,
                "values": {
                    split: dict(zip(self.names, map(_clean, figures), strict=True))
                    for split in ("search", "selection", "report")
                    if np.isfinite(figures := values_of(c, split, len(self.objectives))).any()
                },
            }
            out.append(row)
        return out

    def flat_rows(self) -> list[dict[str, Any]]:
        """`rows` with a column per objective, and per objective and split of the final."""
        out = []
        for row in self.rows():
            flat = {k: row[k] for k in ("group", "kind", "name", "id", "front", "violation")}
            values = row["values"]
            flat |= dict(values.get("search", {}))
            for split in ("selection", "report"):
                found = values.get(split, {})
                flat |= {f"{name} ({split})": found.get(name) for name in self.names}
            out.append(flat)
        return out

    def table(self) -> str:
        """Members and baselines as text, most trustworthy values last."""
        splits = ["search"]
        rows = self.rows()
        splits += [s for s in ("selection", "report") if any(s in row["values"] for row in rows)]
        header = ["what", *(f"{name} {s}" for s in splits for name in self.names), ""]
        lines = [header]
        shown = [row for row in rows if row["kind"] != "searched" or len(splits) == 1]
        shown += [row for row in rows if row["kind"] == "searched" and len(splits) > 1]
        for row in shown[:MOST_MEMBERS]:
            what = row["name"] if row["kind"] == "searched" else f"{row['kind']} {row['name']}"
            cells = [
                "-" if (v := row["values"].get(s, {}).get(name)) is None else f"{v:.4g}"
                for s in splits
                for name in self.names
            ]
            note = "front" if row["front"] else "violation" if row["violation"] else ""
            lines.append([what, *cells, note])
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i in (0, len(header) - 1) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def to_json(self, space: Space) -> dict[str, Any]:
        """Objectives, reference, hypervolumes, and the members with their plans."""
        reported = self.report()
        named = self.members[:MOST_MEMBERS]
        return {
            "objectives": [{"name": o.name, "direction": o.direction} for o in self.objectives],
            "reference": dict(zip(self.names, self.reference, strict=True)),
            "hypervolume": self.hypervolume,
            "hypervolume_baselines": self.volume(self.baselines) if self.baselines else None,
            "hypervolume_report": None if reported is None else reported["found"],
            "hypervolume_report_baselines": None if reported is None else reported["baselines"],
            "size": len(self.members),
            "members": [
                {
                    "id": member.id,
                    "name": member.name,
                    "values": dict(zip(self.names, member.values, strict=True)),
                    "plan": plan.to_json() if hasattr(plan, "to_json") else plan,
                }
                for member in named
                for plan in space.plans(member.population)
            ],
        }


def values_of(contender: Contender, split: str, m: int) -> NDArray[np.float64]:
    """A candidate's figures on a split, float64 (m,), in the user's sign; NaN where it has none."""
    if split == "report" and contender.report_values:
        return np.asarray(np.mean(contender.report_values, axis=0), dtype=np.float64)
    if split == "selection" and contender.selection_values:
        return np.array(contender.selection_values, dtype=np.float64)
    if split == "search" and contender.values:
        return np.array(contender.values, dtype=np.float64)
    return np.full(m, np.nan)


def signs_of(objectives: Sequence[Objective]) -> NDArray[np.float64]:
    """1 where less is better, -1 where more is, float64 (m,)."""
    return np.array([1.0 if o.direction == "min" else -1.0 for o in objectives])


def trade_offs_of(
    everyone: Sequence[Contender],
    objectives: tuple[Objective, ...],
    reference: Sequence[float] | None,
    alpha: float,
) -> TradeOffs:
    """The front of all successful candidates of a search.

    Args:
        everyone: see `searchlab.final.contenders`, with values.
        objectives: two or more.
        reference: given by the user, in their sign; None = by the first candidates.
        alpha: intervals cover 1 - alpha.
    """
    signs = signs_of(objectives)
    order = sorted(everyone, key=lambda c: c.id)
    losses = np.array([c.values for c in order], dtype=np.float64).reshape(-1, len(signs)) * signs
    broken = np.array([c.violation for c in order])
    ids = np.array([c.id for c in order], dtype=np.int64)
    fine = np.flatnonzero(broken == 0)
    if reference is not None:
        point = np.array(reference, dtype=np.float64) * signs
    elif len(order):
        early = fine if len(fine) else np.arange(len(order))
        point = reference_point(ids[early], losses[early])
    else:
        point = np.full(len(signs), np.nan)
    rows = non_dominated(losses, broken)
    rows = rows[np.lexsort(losses[rows].T[::-1])]
    out = TradeOffs(
        objectives,
        tuple((point * signs).tolist()),
        [order[row] for row in rows.tolist()],
        [c for c in order if c.kind != "searched"],
        alpha=alpha,
    )
    stops = np.unique(np.geomspace(1, max(1, len(order)), CHECKPOINTS).astype(np.int64))
    front = np.empty((0, len(signs)))
    before = 0
    for stop in stops.tolist() if len(order) else ():
        new = np.arange(before, stop)
        front = np.concatenate([front, losses[new][broken[new] == 0]])
        front = front[non_dominated(front)]
        out.curve.append((stop, hypervolume(front, point)))
        before = stop
    return out


# -- the final ----------------------------------------------------------------------------------


def plan_front_final(
    trades: TradeOffs, everyone: Sequence[Contender], final: Final, group: int
) -> FinalPlan:
    """Finalists: the k members of the front that dominate most, and baselines by kind."""
    found = [c for c in trades.members if c.kind == "searched"]
    if not found:  # nothing meets the constraints, or only baselines are on the front
        rest = [c for c in everyone if c.kind == "searched"]
        ranked = _ranked(trades, rest)
        found = ranked[:1]
    losses = trades.losses(found) if found else np.empty((0, len(trades.names)))
    if len(trades.names) <= MOST_MEASURED:
        point = np.array(trades.reference) * trades._signs
        rows = dominating(losses, final.k, point)
    else:
        rows = spread(losses, final.k)
    finalists = [found[row] for row in rows]
    chosen: list[Contender] = []
    for kind in sorted({c.kind for c in trades.baselines}):
        of_kind = _ranked(trades, [c for c in trades.baselines if c.kind == kind])
        chosen += of_kind[: final.baselines]
        chosen += [c for c in of_kind[final.baselines :] if c.name in final.named]
    return FinalPlan(group, tuple(finalists), tuple(chosen))


def _ranked(trades: TradeOffs, parts: Sequence[Contender]) -> list[Contender]:
    if not parts:
        return []
    broken = np.array([c.violation for c in parts])
    return [parts[row] for row in front_order(trades.losses(parts), broken).tolist()]


def score_front(
    trades: TradeOffs,
    plan: FinalPlan,
    final: Final,
    score: Callable[[str, int, Sequence[Contender]], NDArray[np.float64]],
) -> None:
    """Fills in selection and report values of all objectives.

    On the report split come those finalists that no other finalist dominates on the selection
    split, and those baselines that no other baseline does.

    Args:
        trades: takes the finalists and their rivals.
        plan: see `plan_front_final`; contenders are changed in place.
        final: how often.
        score: (split, replicate number, contenders) -> values (n, m) in the user's sign, NaN where
            failed.
    """
    trades.finalists, trades.rivals = list(plan.finalists), list(plan.baselines)
    entrants = distinct(plan.all())
    if not entrants:
        return
    means = np.mean([score("selection", r, entrants) for r in range(final.selection)], axis=0)
    for contender, values in zip(entrants, means, strict=True):
        contender.selection_values = tuple(values.tolist())
        contender.selection = float(values[0])
    named = [c for c in plan.baselines if c.name in final.named]
    reported = distinct([*_best(trades, plan.finalists), *_best(trades, plan.baselines), *named])
    tables = [score("report", r, reported) for r in range(final.report)]
    for at, contender in enumerate(reported):
        contender.report_values = tuple(tuple(table[at].tolist()) for table in tables)
        contender.report = tuple(float(table[at, 0]) for table in tables)


def _best(trades: TradeOffs, parts: Sequence[Contender]) -> list[Contender]:
    """Those that nothing dominates on the selection split; the least bad where all break bounds."""
    if not parts:
        return []
    losses = trades.losses(parts, "selection")
    broken = np.array([c.violation for c in parts])
    rows = non_dominated(losses, broken)
    if not len(rows):
        rows = front_order(losses, broken)[:1]
    return [parts[row] for row in rows.tolist()]


def middle(
    trades: TradeOffs, parts: Sequence[Contender], split: str = "search"
) -> Contender | None:
    """The knee of candidates: the one that stands for them where a single one is wanted."""
    losses = trades.losses(parts, split)
    rows = non_dominated(losses, np.array([c.violation for c in parts]))
    if not len(rows):
        rows = front_order(losses, np.array([c.violation for c in parts]))[:1]
    return parts[int(rows[knee(losses[rows])])] if len(rows) else None


def _clean(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
