"""The final: finalists and baselines scored again on splits that the search never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.config import Final
from searchlab.population import Population

__all__ = ["Contender", "FinalPlan", "Interval", "contenders", "paired", "plan_final"]

FINAL_ID = 2**40  # ids of finals live above every id of the search, so that a search can go on
ROUND_IDS = 2**32
LIST_IDS = 2**20
FINAL_STAGE = 1000


@dataclass(frozen=True)
class Interval:
    """A mean with the half width of its interval (NaN with a single value)."""

    mean: float
    half: float

    @staticmethod
    def of(values: Sequence[float] | NDArray[np.float64], alpha: float) -> Interval:
        """Student's interval of independent values."""
        array = np.asarray(values, dtype=np.float64)
        if len(array) < 2:
            return Interval(float(array[0]) if len(array) else float("nan"), float("nan"))
        from scipy.stats import t

        spread = float(array.std(ddof=1)) / np.sqrt(len(array))
        return Interval(float(array.mean()), float(t.ppf(1 - alpha / 2, len(array) - 1) * spread))

    def excludes_zero(self) -> bool:
        """Whether zero lies outside; False where there is no interval."""
        return bool(np.isfinite(self.half) and abs(self.mean) > self.half)

    def to_json(self) -> list[float | None]:
        return [_number(self.mean), _number(self.half)]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass
class Contender:
    """A candidate that the final may score, with all its values.

    Attributes:
        among: the population that holds the candidate.
        row: its row there.
        key: canonical key.
        origin: where it came from ("baseline:NAME", "vary", ...).
        group: value of the grouping cost, 0 without one.
        id: job id of the search record.
        search: value during the search, in the user's sign.
        selection: mean over the selection replicates; NaN until scored.
        report: one value per report replicate; empty until scored.
        violation: sum of broken outcome constraints in the search; 0 = it meets them all.
        behind: dropped by a race, so that its value is of fewer replicates than those of others.
        values: where objectives are traded off, the search value of each; else empty.
        selection_values: mean of each over the selection replicates.
        report_values: per report replicate, the value of each.
    """

    among: Population
    row: int
    key: bytes
    origin: str
    group: int
    id: int
    search: float
    selection: float = float("nan")
    report: tuple[float, ...] = ()
    violation: float = 0.0
    behind: bool = False
    values: tuple[float, ...] = ()
    selection_values: tuple[float, ...] = ()
    report_values: tuple[tuple[float, ...], ...] = ()

    def rank(self, sign: float) -> tuple[float, ...]:
        """What the search says of it: lower is better; sign is 1 to minimise, -1 to maximise."""
        return self.violation, self.behind, sign * self.search, self.id

    @property
    def population(self) -> Population:
        """The candidate alone."""
        return self.among.take(slice(self.row, self.row + 1))

    @property
    def kind(self) -> str:
        """ "searched", or the kind of baseline: the part of the origin before the colon."""
        return self.origin.split(":")[0] if self.origin.startswith("baseline") else "searched"

    @property
    def name(self) -> str:
        return self.origin.split(":", 1)[1] if ":" in self.origin else f"{self.origin} #{self.id}"


def contenders(
    population: Population,
    keys: Sequence[bytes],
    origin: Sequence[str],
    ids: Sequence[int],
    groups: Sequence[int],
    values: NDArray[np.float64],
    violation: NDArray[np.float64] | None = None,
    table: NDArray[np.float64] | None = None,
    behind: NDArray[np.bool_] | None = None,
) -> list[Contender]:
    """All successful candidates once; a baseline keeps its name where the search found it again.

    `values` are those of the main objective, `table` those of all where they are traded off.
    """
    found = values.tolist()
    bad = [0.0] * len(keys) if violation is None else violation.tolist()
    best: dict[bytes, Contender] = {}
    for row, key in enumerate(keys):
        known = best.get(key)
        if known is not None and (known.kind != "searched" or not origin[row].startswith("base")):
            continue
        best[key] = Contender(
            population,
            row,
            key,
            origin[row],
            groups[row],
            ids[row],
            found[row],
            violation=bad[row],
            behind=behind is not None and bool(behind[row]),
            values=() if table is None else tuple(table[row].tolist()),
        )
    return list(best.values())


@dataclass(frozen=True)
class FinalPlan:
    """Who is scored for one group: finalists, and baselines by kind."""

    group: int
    finalists: tuple[Contender, ...]
    baselines: tuple[Contender, ...]

    def all(self) -> tuple[Contender, ...]:
        return (*self.finalists, *self.baselines)


def plan_final(
    everyone: Sequence[Contender], final: Final, groups: Sequence[int], sign: float, *, upto: bool
) -> list[FinalPlan]:
    """Finalists and baselines of every group.

    Args:
        everyone: see `contenders`.
        final: how many.
        groups: which groups, ascending.
        sign: 1 to minimise, -1 to maximise.
        upto: a group is a limit: candidates of lower groups compete in it too.
    """
    plans = []
    for group in groups:
        here = [c for c in everyone if (c.group <= group if upto else c.group == group)]
        ranked = sorted(here, key=lambda c: c.rank(sign))
        finalists = [c for c in ranked if c.kind == "searched"][: final.k]
        chosen: list[Contender] = []
        for kind in sorted({c.kind for c in here} - {"searched"}):
            of_kind = [c for c in ranked if c.kind == kind]
            chosen += of_kind[: final.baselines]
            chosen += [c for c in of_kind[final.baselines :] if c.name in final.named]
        plans.append(FinalPlan(group, tuple(finalists), tuple(chosen)))
    return plans


def distinct(parts: Sequence[Contender]) -> list[Contender]:
    """Contenders once each, first appearance first."""
    return list({contender.key: contender for contender in parts}.values())


def score_final(
    plans: Sequence[FinalPlan],
    final: Final,
    sign: float,
    score: Callable[[str, int, Sequence[Contender]], NDArray[np.float64]],
) -> None:
    """Fills in selection and report values.

    Args:
        plans: see `plan_final`; contenders are changed in place.
        final: how often.
        sign: 1 to minimise, -1 to maximise.
        score: (split, replicate number, contenders) -> values (n,) in the user's sign, NaN where
            failed.
    """
    entrants = distinct([c for plan in plans for c in plan.all()])
    if not entrants:
        return
    columns = [score("selection", r, entrants) for r in range(final.selection)]
    for contender, value in zip(entrants, np.mean(columns, axis=0), strict=True):
        contender.selection = float(value)
    reported = distinct([c for plan in plans for c in chosen(plan, final, sign)])
    rows = [score("report", r, reported) for r in range(final.report)]
    for at, contender in enumerate(reported):
        contender.report = tuple(float(row[at]) for row in rows)


def chosen(plan: FinalPlan, final: Final, sign: float) -> list[Contender]:
    """The winner, the best baseline of each kind, and the named baselines of one group."""
    out = []
    winner = winner_of(plan, final, sign)
    if winner is not None:
        out.append(winner)
    for kind in sorted({c.kind for c in plan.baselines}):
        best = best_of([c for c in plan.baselines if c.kind == kind], sign)
        if best is not None:
            out.append(best)
    out += [c for c in plan.baselines if c.name in final.named]
    return distinct(out)


def winner_of(plan: FinalPlan, final: Final, sign: float) -> Contender | None:
    """What a group returns: a searched candidate, or with `Final.known` maybe a baseline.

    Where a baseline is as good on the selection split, it stays: nothing shows a gain over it.
    """
    winner = best_of(plan.finalists, sign)
    known = best_of(plan.baselines, sign) if final.known else None
    if winner is None or known is None:
        return winner or known
    ours, theirs = ((c.violation, sign * c.selection) for c in (winner, known))
    return known if theirs <= ours else winner


def best_of(parts: Sequence[Contender], sign: float) -> Contender | None:
    """The best by selection value, candidates that meet their constraints first.

    Ties go to the better search value, then the lower id.
    """
    scored = [c for c in parts if np.isfinite(c.selection)]
    return min(
        scored,
        key=lambda c: (c.violation, sign * c.selection, sign * c.search, c.id),
        default=None,
    )


def paired(winner: Contender, baseline: Contender, alpha: float, sign: float) -> dict[str, Any]:
    """Gain of the winner over a baseline on the same report replicates (common random numbers).

    Returns:
        gain: `Interval` of the paired differences, positive = the winner is better.
        ratio: winner / baseline of the means.
        ratios: per replicate.
        distinguishable: the interval excludes zero.
    """
    w, b = np.array(winner.report), np.array(baseline.report)
    gain = Interval.of(sign * (b - w), alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = w / b
    return {
        "gain": gain,
        "ratio": float(w.mean() / b.mean()) if b.mean() else float("nan"),
        "ratios": ratios.tolist(),
        "distinguishable": gain.excludes_zero(),
    }
