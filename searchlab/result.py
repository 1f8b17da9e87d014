"""What a run found: per group the winner, the baselines, all their values, and one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from searchlab.evaluator import Objective
from searchlab.final import Contender, Interval, paired
from searchlab.space import Space

if TYPE_CHECKING:
    import pandas as pd

    from searchlab.records import Records
    from searchlab.trade_offs import TradeOffs

__all__ = ["Best", "GroupResult", "Result"]


@dataclass(frozen=True)
class Best:
    """One candidate with its plan and values."""

    space: Space
    contender: Contender

    @property
    def plan(self) -> Any:
        """The candidate as its space decodes it (a dict of values, or a domain's own plan)."""
        return self.space.plans(self.contender.population)[0]

    @property
    def value(self) -> float:
        """The most trustworthy value there is: report, else selection, else search."""
        c = self.contender
        if c.report:
            return float(np.mean(c.report))
        return c.selection if np.isfinite(c.selection) else c.search


@dataclass
class GroupResult:
    """One group (for example one number of model calls)."""

    group: int
    winner: Contender | None
    baselines: list[Contender] = field(default_factory=list)
    finalists: list[Contender] = field(default_factory=list)

    def best_baseline(self, kind: str = "baseline") -> Contender | None:
        """The best baseline of a kind by selection (else search) value; they come sorted."""
        return next((c for c in self.baselines if c.kind == kind), None)


@dataclass
class Result:
    """The outcome of a run.

    Attributes:
        name: the run.
        space: of the last stage.
        objective: the one that steers; the first where several are traded off.
        groups: ascending; one with group 0 where the search has none.
        group_by: what the groups are, "" without.
        counts: jobs by kind (paid, hits, failed, baselines, final).
        curve: per group, rows (paid so far, best value so far).
        alpha: intervals cover 1 - alpha.
        everyone: all successful candidates of the search, once each.
        meta: seed, lag, chunk, stop reason, repeat_sd, environment, seconds.
        trade_offs: the front of several objectives; None with one, or where one steers. A group's
            winner is then the middle of its front.
        main: column of `objective` in the records' values.
    """

    name: str
    space: Space
    objective: Objective
    groups: list[GroupResult]
    group_by: str = ""
    counts: dict[str, float] = field(default_factory=dict)
    curve: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    alpha: float = 0.05
    meta: dict[str, Any] = field(default_factory=dict)
    records: Records | None = None
    everyone: list[Contender] = field(default_factory=list, repr=False)
    out: Path | None = None
    trade_offs: TradeOffs | None = None
    main: int = 0

    @property
    def sign(self) -> float:
        return 1.0 if self.objective.direction == "min" else -1.0

    @property
    def best(self) -> Best:
        """The best candidate of the last group, baselines included.

        It is chosen by selection values, or by search values without a final, but never by report
        values: they are looked at once. Where objectives are traded off: the middle of the front,
        baselines left out if it has any other members.
        """
        from searchlab.errors import StudyError

        group = self.groups[-1] if self.groups else None
        if self.trade_offs is not None and group is not None and group.winner is not None:
            return Best(self.space, group.winner)
        everyone = [] if group is None else [c for c in (group.winner, *group.baselines) if c]
        if not everyone:
            raise StudyError(f"run {self.name!r} has no successful evaluation yet")
        seen = all(np.isfinite(c.selection) for c in everyone)
        chosen = min(
            everyone,
            key=lambda c: (c.violation, self.sign * (c.selection if seen else c.search)),
        )
        return Best(self.space, chosen)

    @property
    def front(self) -> list[tuple[float, ...]]:
        """(group, value of the winner) where no lower group is as good.

        Where objectives are traded off: the values of all candidates that nothing dominates, see
        `trade_offs`.
        """
        if self.trade_offs is not None:
            return self.trade_offs.points
        out: list[tuple[float, ...]] = []
        for group in self.groups:
            if group.winner is None or group.winner.violation:
                continue
            value = Best(self.space, group.winner).value
            if not out or self.sign * value < self.sign * out[-1][1]:
                out.append((group.group, value))
        return out

    def rows(self) -> list[dict[str, Any]]:
        """One row per contender and group: values of the three splits, ratio to the baseline."""
        if self.trade_offs is not None:
            return self.trade_offs.rows()
        out = []
        for group in self.groups:
            base = group.best_baseline()
            entries = [("searched", group.winner)] if group.winner else []
            entries += [(c.kind, c) for c in group.baselines]
            for kind, contender in entries:
                assert contender is not None
                report = Interval.of(contender.report, self.alpha) if contender.report else None
                row: dict[str, Any] = {
                    "group": group.group,
                    "kind": kind,
                    "name": contender.name,
                    "id": contender.id,
                    "search": _clean(contender.search),
                    "selection": _clean(contender.selection),
                    "report": report.to_json()[0] if report else None,
                    "report_half": report.to_json()[1] if report else None,
                    "report_values": list(contender.report),
                    "ratio_to_baseline": None,
                    "violation": _clean(contender.violation),
                }
                if base is not None and base.report and contender.report:
                    below = float(np.mean(base.report))
                    if below:
                        ratio = float(np.mean(contender.report)) / below
                        row["ratio_to_baseline"] = _clean(ratio)
                out.append(row)
        return out

    def to_json(self) -> dict[str, Any]:
        """Best, baselines, values of the three splits, counts and seeds."""
        return {
            "run": self.name,
            "objective": {
                "name": self.objective.name,
                "direction": self.objective.direction,
                **({"column": self.main} if self.main else {}),
            },
            "group_by": self.group_by,
            "alpha": self.alpha,
            "rows": self.rows(),
            "front": [list(point) for point in self.front],
            "plans": {
                str(g.group): _plan_json(self.space.plans(g.winner.population)[0])
                for g in self.groups
                if g.winner is not None
            },
            "counts": self.counts,
            "verdict": self.verdict(),
            **(
                {}
                if self.trade_offs is None
                else {"trade_offs": self.trade_offs.to_json(self.space)}
            ),
            **self.meta,
        }

    def to_pandas(self) -> pd.DataFrame:
        """`rows` as a data frame; of a front with one column per objective."""
        import pandas as pd

        if self.trade_offs is not None:
            return pd.DataFrame(self.trade_offs.flat_rows())
        return pd.DataFrame(self.rows())

    def verdict(self) -> str:
        """One sentence: the gain over the best baseline, and whether it is distinguishable."""
        if self.trade_offs is not None and self.everyone:
            return self.trade_offs.verdict()
        parts = [self._verdict_of(group) for group in self.groups]
        parts = [part for part in parts if part]
        if not parts:
            return "no candidate was evaluated successfully."
        return f"{self.objective.name}: " + "; ".join(parts) + "."

    def _verdict_of(self, group: GroupResult) -> str:
        where = f"{self.group_by} {group.group}: " if self.group_by else ""
        winner, base = group.winner, group.best_baseline()
        if winner is not None and winner.violation:
            return (
                f"{where}no candidate meets the constraints; the nearest has "
                f"{winner.search:.4g} and breaks them by {winner.violation:.3g}"
            )
        if winner is None:
            return f"{where}nothing beyond the baselines was found" if base else ""
        if base is None:
            return f"{where}best {Best(self.space, winner).value:.4g}, no baseline to compare with"
        if not (winner.report and base.report):
            return (
                f"{where}best {winner.search:.4g} against {base.search:.4g} of {base.name} "
                "(search values, no report split)"
            )
        if winner.key == base.key:  # see `Final.known`
            value = float(np.mean(winner.report))
            return f"{where}{value:.4g} of {base.name}: nothing else was better on selection"
        gain = paired(winner, base, self.alpha, self.sign)
        interval: Interval = gain["gain"]
        mean = float(np.mean(winner.report))
        level = round(100 * (1 - self.alpha))
        change = f"gain {interval.mean + 0.0:.3g} ± {interval.half:.2g}"
        if not np.isfinite(interval.half):
            change, sure = f"gain {interval.mean + 0.0:.3g}", "one replicate, so no interval"
        elif gain["distinguishable"]:
            word = "better" if interval.mean > 0 else "worse"
            sure = f"{word}, distinguishable at {level} %"
        else:
            sure = f"not distinguishable at {level} %"
        return (
            f"{where}{mean:.4g} against {np.mean(base.report):.4g} of {base.name} "
            f"({gain['ratio']:.2f} x, {change}, {sure})"
        )

    def __str__(self) -> str:
        return "\n".join([self.table(), "", *self.meta.get("notes", ()), self.verdict()])

    def table(self) -> str:
        """The table of winners and baselines as text."""
        if self.trade_offs is not None:
            return self.trade_offs.table()
        header = [self.group_by or "group", "what", "search", "selection", "report", "ratio"]
        lines = [header]
        rows = self.rows()
        broken = any(row["violation"] != 0 for row in rows)
        if broken:
            header.append("violation")
        for row in rows:
            half = row["report_half"]
            report = "-" if row["report"] is None else f"{row['report']:.4g}"
            lines.append(
                [
                    str(row["group"]),
                    ("searched" if row["kind"] == "searched" else f"{row['kind']} {row['name']}"),
                    _text(row["search"]),
                    _text(row["selection"]),
                    report + (f" ± {half:.2g}" if half is not None else ""),
                    "" if row["ratio_to_baseline"] is None else f"{row['ratio_to_baseline']:.2f}",
                    *([_text(row["violation"])] if broken else ()),
                ]
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 1 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def export(self, directory: str | Path) -> list[Path]:
        """Writes every group's winner into a directory in the form its space exports."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        plans = {
            g.group: self.space.plans(g.winner.population)[0]
            for g in self.groups
            if g.winner is not None
        }
        return self.space.export(plans, target)


def _clean(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _plan_json(plan: Any) -> Any:
    return plan.to_json() if hasattr(plan, "to_json") else plan


def write_plans(plans: Mapping[int, Any], directory: Path) -> list[Path]:
    """The export of spaces without a form of their own: plan.json, or plan_GROUP.json."""
    from searchlab.runs import write_text  # a new file, also where a link lies

    paths = []
    for group, plan in plans.items():
        path = directory / ("plan.json" if len(plans) == 1 else f"plan_{group}.json")
        write_text(path, json.dumps(_plan_json(plan), indent=1) + "\n")
        paths.append(path)
    return paths


def curve_of(
    ids: Sequence[int], groups: Sequence[int], values: Sequence[float], sign: float
) -> dict[int, list[tuple[int, float]]]:
    """Best value so far per group, as (jobs told in the group, value) at every improvement."""
    out: dict[int, list[tuple[int, float]]] = {}
    order = np.argsort(np.asarray(ids), kind="stable")
    groups_in_order = np.asarray(groups)[order]
    losses = sign * np.asarray(values, dtype=np.float64)[order]
    losses[~np.isfinite(losses)] = np.inf
    for group in dict.fromkeys(groups_in_order.tolist()):
        here = losses[groups_in_order == group]
        before = np.concatenate([[np.inf], np.minimum.accumulate(here)[:-1]])
        better = np.flatnonzero(here < before)
        line = [
            (at + 1, sign * loss)
            for at, loss in zip(better.tolist(), here[better].tolist(), strict=True)
        ]
        if line and line[-1][0] < len(here):
            line.append((len(here), line[-1][1]))
        out[group] = line
    return out
