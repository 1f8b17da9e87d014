"""What a stored run came to, read from its database: for comparing runs and for checking them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from searchlab.errors import StudyError
from searchlab.final import Interval

if TYPE_CHECKING:
    from searchlab.records import Records
    from searchlab.runs import RunAddress
    from searchlab.study import Run

__all__ = ["Outcome", "figures", "read_outcome"]

_FIGURES = (
    "best",
    "search",
    "selection",
    "report",
    "half",
    "baseline",
    "ratio",
    "gain",
    "gain_low",
    "gain_high",
)


@dataclass(frozen=True)
class Outcome:
    """A run's result with the records it rests on.

    Attributes:
        name: of the run.
        result: what `Result.to_json` gives.
        records: all of them.
        identities: digest -> JSON identity of every evaluator of the run, its space included.
        evaluators: row id in the records -> digest.
        space: fingerprint of the last stage's space.
    """

    name: str
    result: Mapping[str, Any]
    records: Records
    identities: Mapping[str, Mapping[str, Any]]
    evaluators: Mapping[int, str]
    space: str

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """One per group and contender; see `Result.rows`."""
        return list(self.result["rows"])

    @property
    def sign(self) -> float:
        """1 where less is better, -1 where more is."""
        return 1.0 if self.result["objective"]["direction"] == "min" else -1.0

    @property
    def objective(self) -> str:
        return str(self.result["objective"]["name"])

    @property
    def column(self) -> int:
        """Where the objective stands among the values of a record."""
        return int(self.result["objective"].get("column", 0))

    @property
    def trades(self) -> list[tuple[str, float]]:
        """Name and sign of each objective where several are traded off; else empty."""
        parts = (self.result.get("trade_offs") or {}).get("objectives", ())
        return [(str(o["name"]), 1.0 if o["direction"] == "min" else -1.0) for o in parts]


def read_outcome(address: RunAddress) -> Outcome:
    """The outcome of a run; evaluates nothing.

    A run that has ended keeps its result; that of a run which is still going, or was killed, is
    made from its records.

    Raises:
        StudyError: no such run, one that cannot be read, or one made from Python that never ended.
    """
    from searchlab.study import Database

    with Database(address.database) as base:
        store = base.read(address.name)
        result = store.get_meta("result")
        if store.get_meta("status") not in ("finished", "interrupted") or result is None:
            result = _made_from_records(address, store)
        outcome = Outcome(
            address.name,
            result,
            store.records(items=True),
            store.identities(),
            store.evaluators(),
            store.space,
        )
        store.close("")
    try:
        _ = outcome.sign, outcome.objective, outcome.column, outcome.trades
        for row in outcome.rows:
            _ = row["group"], row["kind"], row["name"], row["id"], row["search"]
            _ = [float(value) for value in row["report_values"]]
            _ = int(row["group"]), int(row["id"])
        figures(outcome)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise StudyError(f"the result of run {address.name!r} is damaged") from None
    return outcome


def _made_from_records(address: RunAddress, store: Run) -> dict[str, Any]:
    from searchlab.runs import open_config
    from searchlab.search import stored_result

    if not store.get_meta("recipe"):
        raise StudyError(
            f"run {address.name!r} was made from Python and has not ended: its result is known "
            "when it has"
        )
    return stored_result(open_config(address).config, store).to_json()


# -- figures ------------------------------------------------------------------------------------


def figures(outcome: Outcome) -> dict[str, float]:
    """Every number that an expectation may name; NaN where a run has none.

    A group's own are called NAME[GROUP]; without brackets they are the last group's.

    - `best`: of the group, baselines included, by the most trustworthy split that it has.
    - `search`, `selection`, `report`, `half`: the winner's value on each split, and the half width
      of the report's interval.
    - `baseline`: the best baseline, by its most trustworthy split; `ratio`: winner / baseline.
    - `gain`, `gain_low`, `gain_high`: how much better the winner is on the same report
      replicates, positive = better, with its interval.
    - `evaluations`, `baseline_evaluations`, `hits`, `failed`, `final`: jobs.
    - `records`, `seconds`; `finished`: 1 or 0.
    - Of a front: `front` (how many members), `hypervolume`, `hypervolume_baselines` by search
      values, and `hypervolume_report`, `hypervolume_report_baselines`, means over the replicates.
    """
    result = outcome.result
    out: dict[str, float] = {}
    groups = sorted({int(row["group"]) for row in outcome.rows})
    for group in groups:
        own = _group_figures(outcome, [r for r in outcome.rows if int(r["group"]) == group])
        out |= {f"{name}[{group}]": value for name, value in own.items()}
        out |= own  # the last group's stay
    for name in _FIGURES:
        out.setdefault(name, math.nan)
    out |= {str(name): _number(value) for name, value in result["counts"].items()}
    trades = result.get("trade_offs")
    if trades is not None:
        out["front"] = _number(trades["size"])
        for name in ("hypervolume", "hypervolume_baselines"):
            out[name] = _number(trades[name])
        for name in ("hypervolume_report", "hypervolume_report_baselines"):
            values = trades[name]
            out[name] = float(np.mean(values)) if values else math.nan
    out["records"] = float(len(outcome.records))
    out["seconds"] = _number(result.get("seconds"))
    out["finished"] = float(result.get("status") == "finished")
    return out


def _group_figures(outcome: Outcome, rows: list[Mapping[str, Any]]) -> dict[str, float]:
    sign = outcome.sign
    out = dict.fromkeys(_FIGURES, math.nan)
    # A value on the report split outranks one of the search: the search's are selected, hence
    # too good.
    trust = {id(row): _trusted(row) for row in rows}
    known = [row for row in rows if math.isfinite(trust[id(row)])]
    if known:
        deepest = max(_depth(row) for row in known)
        level = [trust[id(row)] for row in known if _depth(row) == deepest]
        out["best"] = sign * min(sign * value for value in level)
    winner = next((row for row in rows if row["kind"] == "searched"), None)
    base = next((row for row in rows if row["kind"] == "baseline"), None)
    if base is not None:
        out["baseline"] = _trusted(base)
    if winner is not None:
        for name, key in (
            ("search", "search"),
            ("selection", "selection"),
            ("report", "report"),
            ("half", "report_half"),
            ("ratio", "ratio_to_baseline"),
        ):
            out[name] = _number(winner.get(key))
    if winner is not None and base is not None:
        ours, theirs = winner["report_values"], base["report_values"]
        if ours and len(ours) == len(theirs):
            alpha = float(outcome.result.get("alpha", 0.05))
            gain = Interval.of(sign * (np.array(theirs) - np.array(ours)), alpha)
            out["gain"] = gain.mean
            out["gain_low"], out["gain_high"] = gain.mean - gain.half, gain.mean + gain.half
    return out


def _depth(row: Mapping[str, Any]) -> int:
    splits = [row.get("search"), row.get("selection"), row.get("report")]
    return max((i for i, value in enumerate(splits) if value is not None), default=-1)


def _trusted(row: Mapping[str, Any]) -> float:
    for split in ("report", "selection", "search"):
        if row.get(split) is not None:
            return _number(row[split])
    return math.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
