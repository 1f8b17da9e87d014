"""Variables whose elements depend on each other: ordered reals, subsets and fixed sums."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from searchlab._variable import MAX_ELEMENTS, Variable, finite_range, normals, reflect
from searchlab.errors import SpaceError
from searchlab.uniforms import derived

__all__ = ["Affine", "Ordered", "Simplex", "Subset"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Ordered(Variable):
    """n increasing reals in [low, high] with at least `gap` between neighbours.

    The work is done on the slack values y_i = x_i - i * gap, which only have to be sorted: sorting
    and clipping there repairs any row, and sorted uniforms there are uniform over the valid set.
    Where a condition leaves only a prefix active, the prefix is spread over the whole range and
    the rest stands at `high`. With a shape there are that many groups of n, on the last axis.

    Args:
        n: how many values; low + (n - 1) * gap <= high.
        sigma: standard deviation of a mutation as a fraction of the range.
    """

    n: int
    low: float
    high: float
    gap: float = 0.0
    sigma: float = field(default=0.08, kw_only=True)
    kind: ClassVar[str] = "ordered"
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.n, int | np.integer) or self.n < 1:
            raise SpaceError(f"ordered of {self.n!r} values; allowed: a whole number, 1 or more")
        super().__post_init__()
        _append_length(self, self.n)
        if not (finite_range(self.low, self.high) and math.isfinite(self.gap) and self.gap >= 0):
            raise SpaceError(
                f"ordered range [{self.low}, {self.high}] with gap {self.gap}; "
                "allowed: finite, gap >= 0"
            )
        _check_sigma(self.kind, self.sigma)
        if self.low + (self.n - 1) * self.gap > self.high:
            raise SpaceError(
                f"{self.n} values with gap {self.gap} do not fit into [{self.low}, {self.high}]"
            )
        for name in ("low", "high", "gap"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def unit_count(self) -> int | None:
        return None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64)

    @property
    def neutral(self) -> Any:
        return self.high

    def sample(self, u: Array, active: Array | None = None) -> Array:
        # Sorting mixes the columns, so that the inactive ones must not take part.
        block = self._block(u).reshape(-1, self.n)
        count = self._counts(len(block), active)
        top = self.high - np.maximum(count - 1, 0) * self.gap
        slack = self.low + block * (top - self.low)[:, None]
        return self._from_slack(slack, count, top).reshape(len(u), *self.shape)

    def mutate(self, values: Array, mask: Array, u: Array, active: Array | None = None) -> Array:
        moved = values + normals(self._block(u)) * self.sigma * (self.high - self.low)
        moved = np.where(mask, reflect(moved, self.low, self.high), values)
        return self.repair(moved, active)

    def repair(self, values: Array, active: Array | None = None) -> Array:
        groups = values.reshape(-1, self.n)
        count = self._counts(len(groups), active)
        index = np.arange(self.n)
        inactive = index >= count[:, None]
        ordered = np.sort(np.where(inactive, np.inf, groups), axis=1)
        top = self.high - np.maximum(count - 1, 0) * self.gap
        slack = np.where(inactive, np.inf, ordered) - index * self.gap
        return self._from_slack(slack, count, top).reshape(values.shape)

    def _counts(self, groups: int, active: Array | None) -> Array:
        """How many values of each group count; the active ones come first."""
        if active is None:
            return np.full(groups, self.n)
        return cast(Array, active.reshape(-1, self.n).sum(axis=1))

    def _from_slack(self, slack: Array, count: Array, top: Array) -> Array:
        index = np.arange(self.n)
        inactive = index >= count[:, None]
        slack = np.sort(np.where(inactive, np.inf, slack), axis=1)
        slack = np.clip(slack, self.low, top[:, None])
        # The last place is clipped too: low + k * gap may round to just above high.
        return np.where(inactive, self.high, np.minimum(slack + index * self.gap, self.high))

    def valid(self, values: Array, active: Array) -> Array:
        inside = ((values >= self.low) & (values <= self.high)) | ~active
        both = active[..., 1:] & active[..., :-1]
        slip = 1e-9 * (self.high - self.low)
        apart = (np.diff(values, axis=-1) >= self.gap - slip) | ~both
        return self._rows(inside & apart.all(axis=-1, keepdims=True))

    def encode(self, values: Array, active: Array) -> Array:
        scale = (self.high - self.low) or 1.0
        code = np.where(active, (values - self.low) / scale, 0.0)
        return code.reshape(len(values), self.size).astype(np.float32)

    def decode(self, value: Array) -> Any:
        return value.tolist()

    def neighbours(self, value: Array, active: Array) -> Array:
        rows = []
        for i in np.flatnonzero(active):
            for sign in (-1.0, 1.0):
                row = value.copy()
                row.reshape(-1)[i] += sign * self.sigma * (self.high - self.low)
                row = self.repair(row[None], active[None])[0]
                if not np.array_equal(row, value):
                    rows.append(row)
        return np.array(rows, dtype=np.float64).reshape(len(rows), *self.shape)

    def _json(self) -> Any:
        return {"n": self.n, "low": self.low, "high": self.high, "gap": self.gap}

    def to_json(self) -> dict[str, Any]:
        out = super().to_json()
        if self.sigma != 0.08:
            out["sigma"] = self.sigma
        return out


@dataclass(frozen=True)
class Subset(Variable):
    """k of n members; stored as a mask of zeros and ones, decoded as increasing member numbers.

    A mask has one spelling per set, crosses element by element, and a budget is linear in it.
    A mutated member changes places with one outside. With a shape there are that many subsets,
    on the last axis. Inactive subsets are empty.

    Args:
        n: how many members there are.
        k: how many are taken, 0 <= k <= n.
    """

    n: int
    k: int
    kind: ClassVar[str] = "subset"
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole = all(
            isinstance(v, int | np.integer) and not isinstance(v, bool) for v in (self.n, self.k)
        )
        if not (whole and self.n >= 1 and 0 <= self.k <= self.n):
            raise SpaceError(
                f"subset of {self.k!r} out of {self.n!r}; allowed: whole numbers, 0 <= k <= n"
            )
        super().__post_init__()
        _append_length(self, self.n)

    @property
    def unit_count(self) -> int:
        return math.comb(self.n, self.k)

    def unit_values(self) -> Array:
        members = np.array(list(itertools.combinations(range(self.n), self.k)), dtype=np.int64)
        out = np.zeros((len(members), self.n), dtype=self.dtype)
        if self.k:
            np.put_along_axis(out, members, 1, axis=1)
        return out

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    @property
    def neutral(self) -> Any:
        return 0

    def _top(self, score: Array) -> Array:
        """The k smallest scores of each group, as a mask; ties by number."""
        order = np.argsort(score, axis=-1, kind="stable")[..., : self.k]
        out = np.zeros(score.shape, dtype=self.dtype)
        np.put_along_axis(out, order, 1, axis=-1)
        return out

    def sample(self, u: Array, active: Array | None = None) -> Array:
        return self._top(self._block(u))

    def mutate(self, values: Array, mask: Array, u: Array, active: Array | None = None) -> Array:
        # Marked members leave and marked others enter; who makes room for them, or takes their
        # place, is drawn. In the order of preference: entering, staying, drawn, leaving.
        inside = values > 0
        tier = np.where(inside, np.where(mask, 3, 1), np.where(mask, 0, 2))
        moved = self._top(tier + self._block(u))
        if active is not None:
            moved = np.where(active, moved, values).astype(self.dtype)
        return moved

    def cross(self, a: Array, b: Array, pick: Array) -> Array:
        """Keeps what both have; of what one has, the picked ones first, up to k members."""
        mixed = np.where(pick, b, a)
        both, one = (a > 0) & (b > 0), (a > 0) | (b > 0)
        tier = np.where(both, 0, np.where(one, np.where(mixed > 0, 1, 2), 3))
        child = self._top(tier + self._noise(mixed))
        # A parent whose subset is switched off has none to give.
        groups = a.any(axis=-1, keepdims=True) & b.any(axis=-1, keepdims=True)
        return np.where(groups, child, mixed).astype(self.dtype)

    def _noise(self, values: Array) -> Array:
        """Uniforms that depend on the values only, to break ties without a preference."""
        flat = (values > 0).reshape(len(values), self.size)
        return derived(flat.astype(np.uint64), 0, self.size).reshape(values.shape)

    def valid(self, values: Array, active: Array) -> Array:
        bits = (values == 0) | (values == 1)
        full = (values == 1).sum(axis=-1, keepdims=True) == self.k
        return self._rows((bits & full) | ~active)

    def repair(self, values: Array, active: Array | None = None) -> Array:
        """Adds or removes as few members as possible, which ones by a hash of the mask."""
        inside = values > 0
        good = values.dtype == self.dtype and bool((values <= 1).all())
        if good and bool((inside.sum(axis=-1) == self.k).all()):
            return values
        return self._top(np.where(inside, 0, 1) + self._noise(values))

    def encode(self, values: Array, active: Array) -> Array:
        return np.where(active, values, 0).reshape(len(values), self.size).astype(np.float32)

    def tokens(self, values: Array, active: Array) -> tuple[Array, Array]:
        codes = np.where(active, values, 0).reshape(len(values), self.size)
        return codes.astype(np.int32), np.zeros(codes.shape, np.float32)

    def decode(self, value: Array) -> Any:
        """Increasing member numbers from 0; one list per group."""
        if value.ndim == 1:
            return np.flatnonzero(value).tolist()
        return [self.decode(part) for part in value]

    def encode_labels(self, value: Any) -> Array:
        out = np.zeros(self.shape, dtype=self.dtype)
        self._write(value, out)
        return out

    def _write(self, value: Any, out: Array) -> None:
        if not isinstance(value, list | tuple | np.ndarray):
            raise SpaceError(f"value {value!r} for a subset; allowed: a list of member numbers")
        if out.ndim > 1:
            if len(value) != len(out):
                raise SpaceError(f"{len(value)} subsets; allowed: {len(out)}")
            for part, row in zip(value, out, strict=True):
                self._write(part, row)
            return
        members = [int(m) for m in value if isinstance(m, int | np.integer) and 0 <= m < self.n]
        if len(members) < len(value) or len(set(members)) < len(members):
            raise SpaceError(
                f"members {value!r} of a subset; allowed: different whole numbers in "
                f"[0, {self.n - 1}]"
            )
        # No members at all is how a subset that is switched off decodes.
        if members and len(members) != self.k:
            raise SpaceError(f"{len(members)} members of a subset; allowed: {self.k}")
        out[np.array(members, dtype=np.int64)] = 1

    def neighbours(self, value: Array, active: Array) -> Array:
        """Every exchange of one member for one outside."""
        groups, flags = value.reshape(-1, self.n), active.reshape(-1, self.n)
        rows = []
        for group in np.flatnonzero(flags.all(axis=1)):
            inside = np.flatnonzero(groups[group] > 0)
            for out, into in itertools.product(inside, np.flatnonzero(groups[group] == 0)):
                row = groups.copy()
                row[group, out], row[group, into] = 0, 1
                rows.append(row)
        return np.array(rows, dtype=self.dtype).reshape(len(rows), *self.shape)

    def _json(self) -> Any:
        return {"n": int(self.n), "k": int(self.k)}


@dataclass(frozen=True)
class Affine(Variable):
    """n reals in [low, high] with a fixed sum; negative ones are allowed (merge weights).

    Any row is repaired by the nearest point of the set: all elements move by one amount, clipped
    at the ends. Samples are uniform over the set where only one end of the range can be reached
    by n - 1 elements at the other (all of `Simplex`); else they are independent draws of largest
    entropy with the right mean, moved onto the sum, which is uniform but for the last step.
    With a shape there are that many vectors, on the last axis. Inactive ones are zero.

    Args:
        n: how many elements.
        total: their sum, n * low <= total <= n * high.
        low: the smallest element.
        high: the largest element.
        sigma: standard deviation of a mutation as a fraction of the usual spread of an element.
    """

    n: int
    total: float = 1.0
    low: float = field(kw_only=True)
    high: float = field(kw_only=True)
    sigma: float = field(default=0.1, kw_only=True)
    kind: ClassVar[str] = "affine"
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.n, int | np.integer) or isinstance(self.n, bool) or self.n < 1:
            raise SpaceError(
                f"{self.kind} of {self.n!r} elements; allowed: a whole number, 1 or more"
            )
        super().__post_init__()
        _append_length(self, self.n)
        ends = finite_range(self.low, self.high) and self.low <= self.high
        if not (ends and math.isfinite(self.total) and math.isfinite(self.n * self.low)):
            raise SpaceError(
                f"{self.kind} range [{self.low}, {self.high}] with total {self.total}; "
                "allowed: finite, low <= high"
            )
        for name in ("total", "low", "high"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not self.n * self.low - self._slip <= self.total <= self.n * self.high + self._slip:
            raise SpaceError(
                f"{self.n} elements in [{self.low}, {self.high}] cannot sum to {self.total}; "
                f"allowed: [{self.n * self.low:g}, {self.n * self.high:g}]"
            )
        _check_sigma(self.kind, self.sigma)

    @property
    def _slip(self) -> float:
        """What rounding of the sum may cost."""
        return 1e-9 * max(abs(self.total), self.n * max(abs(self.low), abs(self.high)))

    @property
    def _spread(self) -> float:
        """How far an element usually lies from the end that it is near to."""
        mean = self.total / self.n
        return min(self.high - self.low, 4 * max(0.0, min(mean - self.low, self.high - mean)))

    @property
    def unit_count(self) -> int | None:
        return 1 if self._spread == 0 else None

    def unit_values(self) -> Array:
        return self.repair(np.full((1, self.n), self.total / self.n))

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64)

    @property
    def neutral(self) -> Any:
        return 0.0

    def sample(self, u: Array, active: Array | None = None) -> Array:
        block, span = self._block(u), self.high - self.low
        room = self.total - self.n * self.low  # what is to be shared out above low
        if room <= span:
            values = self.low + room * _shares(block)
        elif self.n * span - room <= span:
            values = self.high - (self.n * span - room) * _shares(block)
        else:
            rate = _rate_of_mean(room / (self.n * span))
            values = self.low + span * _truncated_exponential(block, rate)
        return self.repair(values)

    def mutate(self, values: Array, mask: Array, u: Array, active: Array | None = None) -> Array:
        noise = normals(self._block(u)) * self.sigma * self._spread
        moved = np.where(mask, reflect(values + noise, self.low, self.high), values)
        return self.repair(moved, active)

    def _fits(self, values: Array) -> Array:
        """Which groups are valid, bool (..., 1)."""
        inside = ((values >= self.low) & (values <= self.high)).all(axis=-1)
        exact = np.abs(values.sum(axis=-1) - self.total) <= self._slip
        return np.asarray(inside & exact)[..., None]

    def valid(self, values: Array, active: Array) -> Array:
        return self._rows(self._fits(values) | ~active)

    def repair(self, values: Array, active: Array | None = None) -> Array:
        fits = self._fits(values)
        if active is not None:
            fits = fits | ~active
        if fits.all():
            return values
        # The nearest point is clip(x - shift); the shift is found by halving an interval.
        least = values.min(axis=-1, keepdims=True) - self.high
        most = values.max(axis=-1, keepdims=True) - self.low
        for _ in range(60):
            shift = (least + most) / 2
            above = np.clip(values - shift, self.low, self.high).sum(-1, keepdims=True) > self.total
            least, most = np.where(above, shift, least), np.where(above, most, shift)
        moved = np.clip(values - most, self.low, self.high)
        # What rounding leaves goes to the element with most room for it.
        rest = self.total - moved.sum(axis=-1, keepdims=True)
        room = np.where(rest > 0, self.high - moved, moved - self.low)
        place = room.argmax(axis=-1)[..., None]
        filled = np.clip(np.take_along_axis(moved, place, -1) + rest, self.low, self.high)
        np.put_along_axis(moved, place, filled, -1)
        return np.where(fits, values, moved)

    def encode(self, values: Array, active: Array) -> Array:
        scale = (self.high - self.low) or 1.0
        code = np.where(active, (values - self.low) / scale, 0.0)
        return code.reshape(len(values), self.size).astype(np.float32)

    def decode(self, value: Array) -> Any:
        return value.tolist()

    def neighbours(self, value: Array, active: Array) -> Array:
        """Each element up and down by a usual mutation, at the cost of all others."""
        reach, rows = self.sigma * self._spread, []
        for i in np.flatnonzero(active):
            for sign in (-1.0, 1.0):
                row = value.copy().reshape(-1)
                row[i] = min(self.high, max(self.low, row[i] + sign * reach))
                row = self.repair(row.reshape(1, *self.shape))[0]
                if not np.array_equal(row, value):
                    rows.append(np.where(active, row, value))
        return np.array(rows, dtype=np.float64).reshape(len(rows), *self.shape)

    def _json(self) -> Any:
        return {"n": int(self.n), "total": self.total, "low": self.low, "high": self.high}

    def to_json(self) -> dict[str, Any]:
        out = super().to_json()
        if self.sigma != 0.1:
            out["sigma"] = self.sigma
        return out


@dataclass(frozen=True)
class Simplex(Affine):
    """n shares: reals in [0, 1] that sum to one.

    Args:
        n: how many shares.
    """

    total: float = field(default=1.0, init=False)
    low: float = field(default=0.0, init=False, kw_only=True)
    high: float = field(default=1.0, init=False, kw_only=True)
    kind: ClassVar[str] = "simplex"

    def _json(self) -> Any:
        return {"n": int(self.n)}


def _append_length(variable: Variable, n: int) -> None:
    """Gives a grouped variable its last axis."""
    if variable.size * n > MAX_ELEMENTS:
        raise SpaceError(
            f"{variable.kind} of {variable.size} x {n} elements; allowed: at most {MAX_ELEMENTS}"
        )
    object.__setattr__(variable, "shape", (*variable.shape, int(n)))


def _check_sigma(kind: str, sigma: float) -> None:
    if not 0 < sigma <= 1:
        raise SpaceError(f"sigma {sigma} of an {kind}; allowed: in (0, 1]")


def _shares(u: Array) -> Array:
    """Uniform points of the simplex: spacings of exponential waiting times."""
    waits = np.maximum(-np.log1p(-u), 1e-15)
    return np.asarray(waits / waits.sum(axis=-1, keepdims=True))


@lru_cache(maxsize=64)
def _rate_of_mean(mean: float) -> float:
    """The rate at which an exponential on [0, 1] has this mean; negative above one half."""
    if mean > 0.5:
        return -_rate_of_mean(1 - mean)
    least, most = 0.0, 2 / mean
    for _ in range(80):
        rate = (least + most) / 2
        now = 0.5 - rate / 12 if rate < 1e-4 else 1 / rate - 1 / math.expm1(min(rate, 700.0))
        least, most = (rate, most) if now > mean else (least, rate)
    return (least + most) / 2


def _truncated_exponential(u: Array, rate: float) -> Array:
    """Numbers in [0, 1] with density proportional to exp(-rate x)."""
    if abs(rate) < 1e-8:
        return u
    return np.asarray(-np.log1p(u * math.expm1(-rate)) / rate)
