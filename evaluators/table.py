"""A table of measured candidates as an evaluator: values, fidelities and signals are columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError, DataError
from searchlab.evaluator import Fidelity, Objective, Signal
from searchlab.evaluators._table_file import Kind, file_digest, make_space, numbers, read_table
from searchlab.population import FAILED, Evaluations, Jobs, Population
from searchlab.space import Space

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TableEvaluator"]

Direction = Literal["min", "max"]
Columns = str | Sequence[str]


class TableEvaluator:
    """Looks candidates up in a CSV or Parquet file.

    `space` is made of the table's columns, so that every row is a candidate of it. A value is a
    pure function of the candidate and the fidelity; all replicates are equal.

    Args:
        path: a .csv, .csv.gz or .parquet file.
        variables: columns that say what a candidate is, with their kinds: "choice" (one label per
            distinct cell), "integer", "digits" (a text whose signs are the elements) or "auto"
            (integers where no whole number is left out, else a choice). A list means "auto".
        objectives: name -> direction. Without `fidelities` the names are columns.
        fidelities: name -> (column, relative cost), or (columns in the order of the objectives,
            cost); cheapest first, the truth last.
        signals: name -> direction of further columns that need no evaluation; or `Signal`s.
        std_error: objective -> column of its standard error at the highest fidelity.
        missing: what candidates without a row are: "restrict" = not in the space, "fail" = failed
            evaluations. A row with an empty cell fails at the fidelities that need it.
        duplicates: "refuse" rows of one candidate, or take their "mean" (and its standard error).
        classes: column whose equal values mean one candidate: all stand for the first row.

    Raises:
        ConfigError: settings that contradict each other.
        DataError: a file that cannot be read, a missing column, cells of the wrong kind, rows of
            one candidate.
    """

    reproducibility: Literal["exact"] = "exact"

    def __init__(
        self,
        path: str | Path,
        variables: Sequence[str] | Mapping[str, Kind],
        *,
        objectives: Mapping[str, Direction],
        fidelities: Mapping[str, tuple[Columns, float]] | None = None,
        signals: Mapping[str, Direction] | Sequence[Signal] = (),
        std_error: Mapping[str, str] | None = None,
        missing: Literal["restrict", "fail"] = "restrict",
        duplicates: Literal["refuse", "mean"] = "refuse",
        classes: str | None = None,
    ) -> None:
        if missing not in ("restrict", "fail") or duplicates not in ("refuse", "mean"):
            raise ConfigError(
                f"missing {missing!r}, duplicates {duplicates!r}; "
                "allowed: restrict or fail, refuse or mean"
            )
        kinds: dict[str, Kind] = (
            dict(variables)
            if isinstance(variables, Mapping)
            else dict.fromkeys([variables] if isinstance(variables, str) else variables, "auto")
        )
        if not kinds or not objectives:
            raise ConfigError("a table without variables or objectives; allowed: one or more")
        self.path = Path(path)
        self.objectives = tuple(Objective(name, to) for name, to in objectives.items())
        self.signals = _signals(signals)
        levels = _levels(fidelities, tuple(objectives))
        self.fidelities = tuple(Fidelity(name, cost) for name, _, cost in levels)
        errors = dict(std_error or {})
        for name in errors:
            if name not in objectives:
                raise ConfigError(f"std_error of {name!r}; allowed: {', '.join(objectives)}")
        self._digest, rows_digest = self._digests()
        self._choices = {
            "variables": list(kinds.items()),
            "columns": [list(columns) for _, columns, _ in levels],
            "signals": [signal.name for signal in self.signals],
            "std_error": errors,
            "missing": missing,
            "duplicates": duplicates,
            "classes": classes,
        }
        values = [column for _, columns, _ in levels for column in columns]
        used = [*kinds, *values, *(s.name for s in self.signals), *errors.values()]
        used += [] if classes is None else [classes]
        texts = [name for name, kind in kinds.items() if kind == "digits"]
        frame = self._read(texts, used)
        self.space, rows = make_space(
            frame, kinds, restrict=missing == "restrict", classes=classes, digest=rows_digest
        )
        self._levels = np.stack(
            [np.stack([numbers(frame, c) for c in columns], axis=1) for _, columns, _ in levels]
        )  # (fidelities, rows, objectives)
        self._columns = [columns for _, columns, _ in levels]
        none = np.empty((len(frame), 0))
        self._signals = (
            np.stack([numbers(frame, s.name) for s in self.signals], axis=1)
            if self.signals
            else none
        )
        self._signals[~np.isfinite(self._signals)] = np.nan
        self._errors = np.full((len(frame), len(self.objectives)), np.nan)
        for at, objective in enumerate(objectives):
            if objective in errors:
                self._errors[:, at] = numbers(frame, errors[objective])
        self._rows = self._index(Space(self.space.variables).keys(rows), merge=duplicates == "mean")
        self._has_errors = bool(errors) or duplicates == "mean"

    def _digests(self) -> tuple[str, str]:
        """Hashes of what the values, and of what the candidates are read from."""
        digest = file_digest(self.path)
        return digest, digest

    def _read(self, texts: Sequence[str], used: Sequence[str]) -> pd.DataFrame:
        """The table: `texts` are columns of text, `used` are all that have to be there."""
        return read_table(self.path, texts, used)

    def _measured(
        self, level: int, replicate: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Values and standard errors of all rows, (rows, objectives); None = there are none."""
        last = self._has_errors and level == len(self.fidelities) - 1
        return self._levels[level], self._errors if last else None

    def _index(self, keys: Sequence[bytes], *, merge: bool) -> dict[bytes, int]:
        """Row of every candidate. Raises DataError for two rows of one candidate."""
        places: dict[bytes, list[int]] = {}
        for row, key in enumerate(keys):
            places.setdefault(key, []).append(row)
        for rows in places.values():
            if len(rows) == 1:
                continue
            if not merge:
                raise DataError(
                    f"rows {rows[0]} and {rows[1]} of table {str(self.path)!r} are one candidate; "
                    "allowed: one row each, or duplicates='mean'"
                )
            group = self._levels[:, rows]
            if not (self._errors[rows] >= 0).any():
                spread = group[-1].std(axis=0, ddof=1) / math.sqrt(len(rows))
                self._errors[rows[0]] = spread
            self._levels[:, rows[0]] = group.mean(axis=1)
            self._signals[rows[0]] = self._signals[rows].mean(axis=0)
        return {key: rows[0] for key, rows in places.items()}

    def __len__(self) -> int:
        """How many different rows there are."""
        return len(self._rows)

    def setup(self) -> None:
        """Nothing to load."""

    def evaluate(self, jobs: Jobs) -> Evaluations:
        """See `Evaluator.evaluate`."""
        level = jobs.fidelity % len(self.fidelities)
        at = np.array([self._rows.get(key, -1) for key in jobs.keys], dtype=np.int64)
        found = at >= 0
        measured, errors = self._measured(level, jobs.replicate)
        values = np.where(found[:, None], measured[at], np.nan)
        state = np.zeros(len(jobs), dtype=np.int8)
        reason = [""] * len(jobs)
        for row in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
            state[row] = FAILED
            reason[row] = self._why(int(at[row]), level)
        return Evaluations(
            values,
            state=state,
            reason=reason,
            std_error=None if errors is None else np.where(found[:, None], errors[at], np.nan),
            signals=np.where(found[:, None], self._signals[at], np.nan),
        )

    def static_signals(self, population: Population) -> NDArray[np.float64]:
        """Signals of candidates without an evaluation, float64 (n, signals), NaN = missing."""
        at = self.rows_of(population)
        out: NDArray[np.float64] = np.where((at >= 0)[:, None], self._signals[at], np.nan)
        return out

    def rows_of(self, population: Population) -> NDArray[np.int64]:
        """Which row of the file each candidate is, (n,); -1 = there is none."""
        keys = self.space.keys(population)
        return np.array([self._rows.get(key, -1) for key in keys], dtype=np.int64)

    def _why(self, row: int, level: int) -> str:
        if row < 0:
            return "not in the table"
        at = int(np.flatnonzero(~np.isfinite(self._levels[level, row]))[0])
        return f"no value of {self._columns[level][at]!r} in row {row}"

    def values(self, fidelity: int = -1) -> NDArray[np.float64]:
        """All values of one fidelity, float64 (rows of the file, objectives), NaN = missing."""
        out: NDArray[np.float64] = self._levels[fidelity].copy()
        return out

    def identity(self) -> Mapping[str, Any]:
        """See `Evaluator.identity`: the file's hash and which columns mean what."""
        return {"version": 1, "table": self._digest, **_plain(self._choices)}


def _plain(choices: Mapping[str, Any]) -> dict[str, Any]:
    return {**choices, "variables": [list(pair) for pair in choices["variables"]]}


def _signals(given: Mapping[str, Direction] | Sequence[Signal]) -> tuple[Signal, ...]:
    if not isinstance(given, Mapping):
        return tuple(given)
    for name, direction in given.items():
        if direction not in ("min", "max"):
            raise ConfigError(f"direction {direction!r} of signal {name!r}; allowed: min, max")
    return tuple(Signal(name, to, when="static") for name, to in given.items())


def _levels(
    fidelities: Mapping[str, tuple[Columns, float]] | None, objectives: tuple[str, ...]
) -> list[tuple[str, tuple[str, ...], float]]:
    """Name, columns and cost of every fidelity."""
    if fidelities is None:
        return [("full", objectives, 1.0)]
    out = []
    for name, (columns, cost) in fidelities.items():
        listed = (columns,) if isinstance(columns, str) else tuple(columns)
        if len(listed) != len(objectives):
            raise ConfigError(
                f"fidelity {name!r} has columns {', '.join(listed)} for {len(objectives)} "
                "objectives; allowed: one each"
            )
        if not 0 < cost < math.inf:
            raise ConfigError(f"cost {cost} of fidelity {name!r}; allowed: above 0")
        out.append((name, listed, float(cost)))
    costs = [cost for *_, cost in out]
    if not out or costs != sorted(costs):
        raise ConfigError(f"fidelities cost {costs}; allowed: cheapest first, the truth last")
    return out
