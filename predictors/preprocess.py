"""What predictors read: codes, signals as normal scores, flags of missing ones; losses likewise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import rankdata

from searchlab.errors import ConfigError
from searchlab.predictor import Table
from searchlab.predictors.impute import ROWS, Imputer
from searchlab.space import Space, Tokens

__all__ = ["Features", "Inputs", "Labels", "Ruler", "usable_losses"]

Floats = NDArray[np.float64]

KNOTS = 257  # of a signal's distribution
QUANTILES = 65  # of the labels' distribution
BEYOND = 2.0  # most that the score of a value outside of what was seen goes on
WIDE = 256  # codes beyond which only their means fill signals in
_EQUAL = 1e-9
_FAR = 6.0  # robust standard deviations; losses beyond are cut


def normal_scores(values: Floats) -> Floats:
    """Normal quantiles of the ranks, ties at their mean rank; float64 (n,)."""
    out: Floats = ndtri((rankdata(values) - 0.5) / max(1, len(values)))
    return out


@dataclass(frozen=True)
class Ruler:
    """A signal's distribution: values (k,) increasing and their normal scores (k,)."""

    values: Floats
    scores: Floats
    low: float
    high: float

    @staticmethod
    def of(column: Floats) -> Ruler:
        """Of a column whose missing entries are NaN; at least one is there."""
        there = column[~np.isnan(column)]
        finite = there[np.isfinite(there)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        span = (high - low) or 1.0
        low, high = low - span, high + span  # where infinite values are put
        clipped = np.clip(there, low, high)
        values, first = np.unique(clipped, return_index=True)
        scores = normal_scores(clipped)[first]
        if len(values) > KNOTS:
            kept = np.unique(np.linspace(0, len(values) - 1, KNOTS).round().astype(np.int64))
            values, scores = values[kept], scores[kept]
        return Ruler(values, scores, low, high)

    def __call__(self, column: Floats) -> Floats:
        """Scores float64 (n,); missing = 0."""
        there = np.where(np.isnan(column), self.low, column)
        there = np.clip(there, self.low, self.high)
        scores = np.interp(there, self.values, self.scores) + self._beyond(there)
        return np.where(np.isnan(column), 0.0, scores)

    def _beyond(self, there: Floats) -> Floats:
        """How far scores go on outside what was seen, at the slope of the nearest tenth of it.

        A search looks for what is better than anything known: such values must stay apart.
        """
        tenth = max(1, len(self.values) // 10)
        out = np.zeros(len(there))
        for end, inner, side in ((0, tenth, -1.0), (-1, -1 - tenth, 1.0)):
            if len(self.values) <= tenth:
                continue
            run = abs(float(self.values[inner] - self.values[end]))
            slope = abs(float(self.scores[inner] - self.scores[end])) / run
            past = np.maximum(side * (there - self.values[end]), 0.0)
            out += side * np.minimum(slope * past, BEYOND)
        return out


@dataclass(frozen=True)
class Features:
    """Candidates as a predictor computes with them, float64 with n rows each.

    Attributes:
        x: (n, code_width), the codes of the space.
        scores: (n, k), normal scores of the signals that say something; where missing, what is
            expected.
        missing: (n, f), above 0 where a signal is missing that is there for others: 1 if that
            follows from the codes, less if it seems to be chance.
        means: (n, k), means of the codes over the elements of each variable: of choices the share
            of every label.
        elements: of a candidate.
        tokens: one for each element, for those that read sequences; None = not kept.
        there: bool (n, k), which scores are not filled in; None = not kept.
    """

    x: Floats
    scores: Floats
    missing: Floats
    means: Floats
    elements: float
    tokens: Tokens | None = None
    there: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def signals(self) -> Floats:
        """Scores and flags together, (n, k + f)."""
        return np.concatenate([self.scores, self.missing], axis=1)

    @property
    def all(self) -> Floats:
        """Everything in one matrix, (n, p)."""
        return np.concatenate([self.x, self.scores, self.missing, self.means], axis=1)

    @property
    def linear(self) -> Floats:
        """Everything but the means, which are sums of other columns."""
        return np.concatenate([self.x, self.scores, self.missing], axis=1)

    def take(self, rows: Any) -> Features:
        """The rows that an index array, a boolean mask or a slice selects."""
        parts = (self.x, self.scores, self.missing, self.means)
        x, scores, missing, means = (part[rows] for part in parts)
        tokens = None if self.tokens is None else Tokens(*(part[rows] for part in self.tokens))
        there = None if self.there is None else self.there[rows]
        return Features(x, scores, missing, means, self.elements, tokens, there)


class Inputs:
    """Turns tables into features, in a way that is fixed by the tables it was made from.

    A signal becomes the normal score of its rank among those seen, linear between them: units,
    outliers and monotone transformations change nothing. Signals that are constant, never there, or
    ordered as an earlier one (forwards or backwards) are left out. A missing score is filled in
    from the other signals and the codes; a flag says that it was missing, weighted by how far that
    follows from the codes.

    Args:
        table: the labelled candidates.
        pool: more candidates whose signals are seen; None = those of `table` only.
    """

    def __init__(self, table: Table, pool: Table | None = None) -> None:
        self.space: Space = table.space
        self.fingerprint = table.space.fingerprint
        self.signal_names = table.signal_names
        self.directions = table.directions
        self.rulers: dict[int, Ruler] = {}
        self.flags: list[int] = []
        seen, codes = table.signals, _codes(table)
        if pool is not None:
            self._check(pool)
            seen = np.concatenate([seen, pool.signals])
            codes = np.concatenate([codes, _codes(pool)])
        scores: list[Floats] = []
        flags: list[NDArray[np.bool_]] = []
        for at in range(seen.shape[1]):
            missing = np.isnan(seen[:, at])
            if missing.all():
                continue
            if missing.any() and not any(np.array_equal(missing, other) for other in flags):
                self.flags.append(at)
                flags.append(missing)
            ruler = Ruler.of(seen[:, at])
            column = ruler(seen[:, at])
            if len(ruler.values) < 2 or any(_same(column, other) for other in scores):
                continue
            self.rulers[at] = ruler
            scores.append(column)
        self.weights = np.array([_foreseen(codes, flag) for flag in flags])
        self.imputer: Imputer | None = None
        if scores:
            missing = np.isnan(seen[:, list(self.rulers)])
            self.imputer = Imputer.of(codes, np.stack(scores, axis=1), missing)

    def _check(self, table: Table) -> None:
        if table.space is not self.space and table.space.fingerprint != self.fingerprint:
            raise ConfigError(
                f"a table of space {table.space.fingerprint[:8]}; allowed: {self.fingerprint[:8]}, "
                "the one that was learnt from"
            )
        if table.signal_names != self.signal_names:
            raise ConfigError(
                f"a table with signals {list(table.signal_names)}; "
                f"allowed: {list(self.signal_names)}, those that were learnt from"
            )

    def __call__(self, table: Table) -> Features:
        """The features of a table.

        Raises:
            ConfigError: another space or other signals than those learnt from.
        """
        self._check(table)
        n = len(table)
        parts = [ruler(table.signals[:, at]) for at, ruler in self.rulers.items()]
        scores = np.stack(parts, axis=1) if parts else np.empty((n, 0))
        missing = np.isnan(table.signals[:, list(self.rulers)])
        if self.imputer is not None and missing.any():
            scores = self.imputer(_codes(table), scores, missing)
        return Features(
            table.x.astype(np.float64),
            scores,
            np.isnan(table.signals[:, self.flags]) * self.weights,
            _means(self.space, table.x),
            float(self.space.size),
            table.tokens,
            ~missing,
        )

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Everything but the space, as JSON and arrays."""
        rulers = list(self.rulers.values())
        config = {
            "signals": list(self.signal_names),
            "directions": list(self.directions),
            "kept": list(self.rulers),
            "flags": self.flags,
            "weights": self.weights.tolist(),
        }
        none = np.empty(0)
        arrays = {
            "values": np.concatenate([none, *(r.values for r in rulers)]),
            "scores": np.concatenate([none, *(r.scores for r in rulers)]),
            "lengths": np.array([len(r.values) for r in rulers], dtype=np.int64),
            "ends": np.array([[r.low, r.high] for r in rulers]).reshape(-1, 2),
        }
        if self.imputer is not None:
            arrays |= {f"imputer_{name}": a for name, a in self.imputer.arrays().items()}
        return config, arrays

    @staticmethod
    def of_state(
        space: Space, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> Inputs:
        """The inverse of `state`."""
        self = Inputs.__new__(Inputs)
        self.space, self.fingerprint = space, space.fingerprint
        self.signal_names = tuple(config["signals"])
        self.directions = tuple(config["directions"])
        self.flags = list(config["flags"])
        self.weights = np.array(config["weights"], dtype=np.float64)
        head = "imputer_"
        named = {name[len(head) :]: a for name, a in arrays.items() if name.startswith(head)}
        self.imputer = Imputer.of_arrays(named) if named else None
        cuts = np.cumsum(arrays["lengths"])[:-1]
        parts = zip(
            config["kept"],
            np.split(arrays["values"], cuts),
            np.split(arrays["scores"], cuts),
            arrays["ends"],
            strict=False,
        )
        self.rulers = {
            at: Ruler(values, scores, float(ends[0]), float(ends[1]))
            for at, values, scores, ends in parts
        }
        return self


def _codes(table: Table) -> Floats:
    """What missing signals are filled in from: codes, or means of them where these are many."""
    if table.x.shape[1] > WIDE:
        return _means(table.space, table.x)
    return table.x.astype(np.float64)


def _foreseen(codes: Floats, flag: NDArray[np.bool_]) -> float:
    """How far a flag follows from the codes, 0 to 1; what is missing by chance says nothing.

    It is the correlation of every other row's flag with a ridge regression on the rows between.
    """
    some = np.linspace(0, len(codes) - 1, min(len(codes), ROWS)).round().astype(np.int64)
    codes, wanted = codes[some] - codes[some].mean(axis=0), flag[some].astype(np.float64)
    wanted = wanted - wanted.mean()
    said = np.zeros(len(codes))
    for half in (0, 1):
        fit, test = codes[half::2], codes[1 - half :: 2]
        gram = fit.T @ fit + np.eye(codes.shape[1])
        said[1 - half :: 2] = test @ np.linalg.solve(gram, fit.T @ wanted[half::2])
    size = float(np.sqrt((said @ said) * (wanted @ wanted)))
    return max(0.0, float(said @ wanted) / size) if size > 0 else 0.0


def _means(space: Space, x: NDArray[np.float32]) -> Floats:
    """Means of the codes over the elements of each variable that has several, (n, k)."""
    parts, start = [np.empty((len(x), 0))], 0
    for variable in space.variables.values():
        block = x[:, start : start + variable.code_width]
        if variable.size > 1:
            parts.append(block.reshape(len(x), variable.size, -1).mean(axis=1, dtype=np.float64))
        start += variable.code_width
    return np.concatenate(parts, axis=1)


def _same(one: Floats, other: Floats) -> bool:
    """Whether two signals order the candidates alike, forwards or backwards."""
    return bool(np.abs(one - other).max() < _EQUAL or np.abs(one + other).max() < _EQUAL)


def usable_losses(losses: NDArray[Any], n: int) -> Floats:
    """Losses with failed ones at the worst finite loss, float64 (n,); all failed = zeros.

    Raises:
        ConfigError: none, as many as there are no candidates, or NaN.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if losses.shape != (n,) or not n:
        raise ConfigError(f"losses of shape {losses.shape} for {n} candidates; allowed: one each")
    if np.isnan(losses).any() or (losses == -np.inf).any():
        raise ConfigError("losses with NaN or -inf; allowed: numbers, and inf for failed ones")
    finite = np.isfinite(losses)
    worst = losses[finite].max() if finite.any() else 0.0
    return np.where(finite, losses, worst)


class Labels:
    """Losses as targets of a fit, and back.

    Args:
        losses: float64 (n,), finite.
        kind: "standard" = mean 0 and sd 1, with the far worse ones cut; "ranks" = normal scores of
            the ranks, so that only the order counts.
    """

    def __init__(self, losses: Floats, kind: Literal["standard", "ranks"]) -> None:
        self.kind = kind
        if kind == "standard":
            middle = float(np.median(losses))
            spread = 1.4826 * float(np.median(np.abs(losses - middle)))
            cut = np.minimum(losses, middle + _FAR * spread) if spread > 0 else losses
            mean, sd = float(cut.mean()), float(cut.std())
            self.knots = np.array([mean, mean + (sd or 1.0)])
            self.scores = np.array([0.0, 1.0])
            self.targets: Floats = (cut - mean) / (sd or 1.0)
            return
        self.targets = normal_scores(losses)
        self.knots, first = np.unique(losses, return_index=True)
        self.scores = self.targets[first]
        if len(self.knots) > QUANTILES:
            kept = np.linspace(0, len(self.knots) - 1, QUANTILES).round().astype(np.int64)
            self.knots, self.scores = self.knots[kept], self.scores[kept]
        if len(self.knots) == 1:  # the unit stands for a spread that nobody knows
            self.knots = np.array([self.knots[0], self.knots[0] + 1.0])
            self.scores = np.array([self.scores[0], self.scores[0] + 1.0])

    def _back(self, scores: Floats) -> Floats:
        """Losses of scores: linear between the knots, and beyond them by their overall slope."""
        inside = np.interp(scores, self.scores, self.knots)
        # The worst losses may be far off, so the slope is that of the better half.
        half = max(1, len(self.knots) // 2)
        good = (self.knots[half] - self.knots[0]) / (self.scores[half] - self.scores[0])
        below = np.minimum(scores - self.scores[0], 0.0)
        above = np.maximum(scores - self.scores[-1], 0.0)
        out: Floats = inside + good * (below + above)
        return out

    def restore(self, mean: Floats, sd: Floats) -> tuple[Floats, Floats]:
        """Means and standard deviations in the losses' unit; order is kept."""
        wide = (self._back(mean + sd) - self._back(mean - sd)) / 2
        unit = float(np.abs(np.diff(self.knots[[0, -1]]))[0])
        return self._back(mean), np.maximum(wide, 1e-9 * unit)

    def values(self, scores: Floats) -> Floats:
        """Losses of scores of any shape."""
        return self._back(scores)

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """The labels' distribution as quantiles; which candidate has which label is not in it."""
        return {"kind": self.kind}, {"knots": self.knots, "scores": self.scores}

    @staticmethod
    def of_state(config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Labels:
        """The inverse of `state`, without targets."""
        self = Labels.__new__(Labels)
        self.kind = config["kind"]
        self.knots, self.scores = arrays["knots"], arrays["scores"]
        self.targets = np.empty(0)
        return self
