"""Two runs side by side: winners on the report replicates both have, and common candidates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import StudyError
from searchlab.evaluator import REPORT_REPLICATE, SELECTION_REPLICATE
from searchlab.final import Interval
from searchlab.outcome import Outcome
from searchlab.population import OK

__all__ = ["Comparison", "Pairing", "compare"]

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Pairing:
    """One paired difference.

    Attributes:
        what: "winner", or "common candidates".
        group: the group of the winners, None for candidates.
        unit: what is paired ("report replicates", "items", "candidates").
        n: how many pairs.
        first, second: means of the two runs over the pairs, in the user's sign.
        gain: mean and half width of the differences; positive = the second run is better.
    """

    what: str
    group: int | None
    unit: str
    n: int
    first: float
    second: float
    gain: Interval

    def verdict(self, alpha: float) -> str:
        """Better, worse, equal or not to be told apart."""
        if not np.isfinite(self.gain.half):
            return "one pair, so no interval"
        level = round(100 * (1 - alpha))
        if not self.gain.mean and not self.gain.half:
            return "equal in every pair"
        if not self.gain.excludes_zero():
            return f"not distinguishable at {level} %"
        return f"{'better' if self.gain.mean > 0 else 'worse'}, distinguishable at {level} %"


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common, and what it says.

    Attributes:
        first, second: names.
        objective: the figure that is compared.
        group_by: what the groups are, "" without.
        pairings: winners by group, then common candidates.
        notes: why something was left out.
        alpha: intervals cover 1 - alpha.
    """

    first: str
    second: str
    objective: str
    group_by: str
    pairings: tuple[Pairing, ...]
    notes: tuple[str, ...]
    alpha: float

    def table(self) -> str:
        """The pairings as text."""
        lines = [["what", "pairs", self.first, self.second, "gain", "+-"]]
        for part in self.pairings:
            of_group = self.group_by and part.group is not None
            half = part.gain.half
            lines.append(
                [
                    f"{part.what} {self.group_by} {part.group}" if of_group else part.what,
                    f"{part.n} {part.unit}",
                    f"{part.first:.4g}",
                    f"{part.second:.4g}",
                    f"{part.gain.mean:.3g}",
                    f"{half:.2g}" if np.isfinite(half) else "-",
                ]
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def sentence(self) -> str:
        """What the comparison comes to; winners count where they could be paired."""
        winners = [part for part in self.pairings if part.group is not None]
        winners = winners or [part for part in self.pairings if part.what.startswith("hypervolume")]
        parts = []
        for part in winners or self.pairings:
            where = ""
            if part.what.startswith("hypervolume"):
                where = f"{part.what} "
            elif part.group is None:
                where = part.what.replace("common", "on common") + " "
            elif self.group_by:
                where = f"{self.group_by} {part.group}: "
            half = part.gain.half
            sure = f" +- {half:.2g}" if np.isfinite(half) else ""
            parts.append(
                f"{where}{self.second} {part.second:.4g} against {part.first:.4g} of {self.first} "
                f"(gain {part.gain.mean:.3g}{sure} over {part.n} {part.unit}, "
                f"{part.verdict(self.alpha)})"
            )
        return f"{self.objective}: " + "; ".join(parts) + "."

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "objective": self.objective,
            "group_by": self.group_by,
            "alpha": self.alpha,
            "pairings": [
                {
                    "what": part.what,
                    "group": part.group,
                    "unit": part.unit,
                    "n": part.n,
                    "first": part.first,
                    "second": part.second,
                    "gain": part.gain.to_json()[0],
                    "half": part.gain.to_json()[1],
                    "verdict": part.verdict(self.alpha),
                }
                for part in self.pairings
            ],
            "notes": list(self.notes),
            "sentence": self.sentence(),
        }


def compare(first: Outcome, second: Outcome, *, alpha: float = 0.05) -> Comparison:
    """Pairs whatever the two runs have in common.

    Winners of equal groups are paired on the report replicates that both runs scored, if their
    evaluators are the same: a replicate is one block of noise there. With a single common
    replicate they are paired on its items. Candidates that both runs paid for are paired too,
    whatever the evaluators, if the spaces are the same: that shows two evaluators, or two devices,
    apart.

    Args:
        first, second: the runs; gains are the second's.
        alpha: intervals cover 1 - alpha.

    Raises:
        StudyError: nothing can be compared; says why.
    """
    names = f"runs {first.name!r} and {second.name!r}"
    if first.trades != second.trades:
        listed = [", ".join(name for name, _ in o.trades) or o.objective for o in (first, second)]
        raise StudyError(
            f"nothing to compare between {names}: their objectives are {listed[0]} and {listed[1]}"
        )
    if (first.objective, first.sign) != (second.objective, second.sign):
        raise StudyError(
            f"nothing to compare between {names}: their objectives are {_goal(first)} and "
            f"{_goal(second)}"
        )
    notes: list[str] = []
    if first.trades or second.trades:
        pairings = _fronts(first, second, alpha, notes)
    else:
        pairings = _winners(first, second, alpha, notes)
    columns = [(o, sign, column) for column, (o, sign) in enumerate(first.trades)]
    for objective, sign, column in columns or [("", first.sign, -1)]:
        common = _candidates(first, second, notes, column)
        if common is None:
            break
        what = f"common candidates, {objective}" if objective else "common candidates"
        pairings.append(_paired(what, None, "candidates", common, sign, alpha))
    if not pairings:
        raise StudyError(f"nothing to compare between {names}: {'; '.join(notes)}")
    return Comparison(
        first.name if first.name != second.name else "first",
        second.name if first.name != second.name else "second",
        ", ".join(name for name, _ in first.trades) or first.objective,
        str(second.result.get("group_by", "")),
        tuple(pairings),
        tuple(notes),
        alpha,
    )


def _goal(outcome: Outcome) -> str:
    return f"{outcome.objective} ({'min' if outcome.sign > 0 else 'max'})"


def _paired(
    what: str, group: int | None, unit: str, pair: Pair, sign: float, alpha: float
) -> Pairing:
    a, b = pair
    gain = Interval.of(sign * (a - b), alpha)
    return Pairing(what, group, unit, len(a), float(a.mean()), float(b.mean()), gain)


# -- winners ------------------------------------------------------------------------------------


def _winners(first: Outcome, second: Outcome, alpha: float, notes: list[str]) -> list[Pairing]:
    ours, theirs = _winner_rows(first), _winner_rows(second)
    groups = sorted(ours.keys() & theirs.keys())
    if not groups:
        notes.append("no group has a winner on the report split in both")
        return []
    differs = _difference(_report_identity(first), _report_identity(second))
    if differs:
        notes.append(f"the report splits are of other evaluators ({differs})")
        return []
    if first.result.get("group_by", "") != second.result.get("group_by", ""):
        notes.append("the groups are by other costs")
        return []
    out = []
    for group in groups:
        a, b = ours[group], theirs[group]
        pair = _finite(a["report_values"], b["report_values"])
        unit = "report replicates"
        if len(pair[0]) < 2:
            items = _items(first, second, a, b)
            if items is not None:
                pair, unit = items, "items"
        if len(pair[0]):
            out.append(_paired("winner", group, unit, pair, first.sign, alpha))
        else:
            notes.append(f"no report replicate of group {group} succeeded in both")
    return out


def _fronts(first: Outcome, second: Outcome, alpha: float, notes: list[str]) -> list[Pairing]:
    """Hypervolumes of both fronts from the farther of the two reference points."""
    from searchlab.fronts import hypervolume

    signs = np.array([sign for _, sign in first.trades])
    names = [name for name, _ in first.trades]
    points = [
        signs * [float(o.result["trade_offs"]["reference"][name]) for name in names]
        for o in (first, second)
    ]
    point = np.max(points, axis=0)
    out = []
    reported = [_reported(outcome) for outcome in (first, second)]
    differs = _difference(_report_identity(first), _report_identity(second))
    if not all(reported):
        notes.append("not both have members of the front on the report split")
    elif differs:
        notes.append(f"the report splits are of other evaluators ({differs})")
    else:
        columns = [
            [
                hypervolume(_whole(np.array(values, dtype=np.float64) * signs), point)
                for values in zip(*rows, strict=True)
            ]
            for rows in reported
        ]
        pair = _finite(*columns)
        out.append(_paired("hypervolume", None, "report replicates", pair, -1.0, alpha))
    search = [
        hypervolume(_whole(np.array(o.result["front"], dtype=np.float64) * signs), point)
        for o in (first, second)
        if o.result["front"]
    ]
    if len(search) == 2:
        values = np.array(search)
        pair = values[:1], values[1:]
        out.append(_paired("hypervolume in the search", None, "fronts", pair, -1.0, alpha))
    else:
        notes.append("not both have a front")
    return out


def _whole(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    return losses[np.isfinite(losses).all(axis=1)]


def _reported(outcome: Outcome) -> list[Any]:
    """Per reported member of the front its values, by replicate."""
    return [
        row["replicates"]
        for row in outcome.rows
        if row["scored"] and row["replicates"] and not row["violation"]
    ]


def _winner_rows(outcome: Outcome) -> dict[int, Mapping[str, Any]]:
    return {
        int(row["group"]): row
        for row in outcome.rows
        if row["kind"] == "searched" and row["report_values"]
    }


def _finite(a: Sequence[float], b: Sequence[float]) -> Pair:
    """The common replicates: both count them from the first of the report split."""
    n = min(len(a), len(b))
    first, second = np.array(a[:n], np.float64), np.array(b[:n], np.float64)
    good = np.isfinite(first) & np.isfinite(second)
    return first[good], second[good]


def _items(first: Outcome, second: Outcome, a: Mapping[str, Any], b: Mapping[str, Any]) -> Any:
    """Scores per item of both winners on the report replicate that they have in common."""
    parts = []
    for outcome, row in ((first, a), (second, b)):
        records = outcome.records
        at = np.flatnonzero(records.ids == row["id"])
        key = records.keys[int(at[0])] if len(at) else None
        rows = np.flatnonzero((records.replicate == REPORT_REPLICATE) & (records.state == OK))
        found = [
            r for r in rows.tolist() if records.keys[r] == key and records.items[r] is not None
        ]
        if not found:
            return None
        scores = np.asarray(records.items[found[-1]], np.float64)
        value = float(records.values[found[-1], outcome.column])
        # Items are the objective's only where it is their mean (float16 keeps three digits).
        if not len(scores) or abs(scores.mean() - value) > 1e-2 * max(1.0, abs(value)):
            return None
        parts.append(scores)
    if len(parts[0]) != len(parts[1]):
        return None
    pair = _finite(parts[0].tolist(), parts[1].tolist())
    return pair if len(pair[0]) > 1 else None


def _report_identity(outcome: Outcome) -> dict[str, Any]:
    """What scored the report split; the space is left out, as other spaces may be compared."""
    rows = np.flatnonzero(outcome.records.replicate >= REPORT_REPLICATE)
    if not len(rows):
        return {}
    digest = outcome.evaluators.get(int(outcome.records.evaluator[rows[-1]]), "")
    return {k: v for k, v in outcome.identities.get(digest, {}).items() if k != "space"}


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The first entry that differs, "" where none does."""
    for key in sorted({*a, *b}):
        old, new = (json.dumps(side.get(key), sort_keys=True) for side in (a, b))
        if old != new:
            hint = ""
            if key == "private":
                hint = "; a function counts as the same in two runs when it has a version"
            return f"{key}: {old[:60]} and {new[:60]}{hint}"
    return ""


# -- candidates ---------------------------------------------------------------------------------


def _candidates(first: Outcome, second: Outcome, notes: list[str], column: int) -> Pair | None:
    """Values of what both paid for; column -1 = of the objective that steers."""
    if first.space != second.space:
        notes.append("the spaces differ, so that no candidate is common")
        return None
    ours, theirs = _paid(first, column), _paid(second, column)
    # Where both wrote down one payment, equal values say nothing.
    common = [place for place in ours if place in theirs]
    if not common:
        notes.append("no candidate was paid for in both")
        return None
    return np.array([ours[p] for p in common]), np.array([theirs[p] for p in common])


def _paid(outcome: Outcome, column: int) -> dict[tuple[bytes, int, int], float]:
    """Values of the search by key, fidelity and replicate; cached ones are left out."""
    records = outcome.records
    column = outcome.column if column < 0 else column
    of_space = [
        row
        for row, digest in outcome.evaluators.items()
        if outcome.identities.get(digest, {}).get("space") == outcome.space
    ]
    rows = np.flatnonzero(
        (records.state == OK)
        & ~records.cached
        & (records.replicate < SELECTION_REPLICATE)
        & np.isin(records.evaluator, np.array(of_space, np.int64))
        & np.isfinite(records.values[:, column])
    )
    return {
        (
            records.keys[row] or b"",
            int(records.fidelity[row]),
            int(records.replicate[row]),
        ): float(records.values[row, column])
        for row in rows.tolist()
    }
