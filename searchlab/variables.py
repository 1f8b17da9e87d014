"""What may vary: choices, integers, reals and ordered reals, each with a shape and a condition."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import SpaceError

__all__ = [
    "ActiveBelow",
    "ActiveIf",
    "Choice",
    "Integer",
    "Ordered",
    "Real",
    "Variable",
]

Array = NDArray[Any]

_NUMBERS = {
    "choice": "labels",
    "integer": "whole numbers",
    "real": "finite numbers",
    "ordered": "finite numbers",
}


@dataclass(frozen=True)
class ActiveIf:
    """Active where an earlier choice takes one of these labels (element-wise, broadcast)."""

    variable: str
    labels: tuple[Any, ...]

    def to_json(self) -> dict[str, Any]:
        return {"variable": self.variable, "labels": list(self.labels)}


@dataclass(frozen=True)
class ActiveBelow:
    """Element i (first axis) is active where i < value + offset of an earlier integer scalar.

    Where the integer itself is inactive, no element is active.
    """

    variable: str
    offset: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"variable": self.variable, "below": True, "offset": self.offset}


Condition = ActiveIf | ActiveBelow


@dataclass(frozen=True)
class Variable:
    """Base of the variables: a block of elements of one kind.

    Attributes:
        shape: elements per candidate; () is a scalar.
        when: conditions that all must hold for an element to be active.
    """

    shape: tuple[int, ...] = field(default=(), kw_only=True)
    when: tuple[Condition, ...] = field(default=(), kw_only=True)
    kind: ClassVar[str] = ""
    uniforms_per_element: ClassVar[int] = 1

    def __post_init__(self) -> None:
        # A bare size or condition and lists are accepted: what stands afterwards is a tuple.
        given: Any = self.shape
        sizes = tuple(given) if isinstance(given, Sequence) else (given,)
        if not all(isinstance(size, int | np.integer) and size >= 1 for size in sizes):
            raise SpaceError(f"shape {given!r} of a {self.kind}; allowed: sizes of at least 1")
        object.__setattr__(self, "shape", tuple(int(size) for size in sizes))
        given = self.when
        when = tuple(given) if isinstance(given, Sequence) else (given,)
        if not all(isinstance(part, ActiveIf | ActiveBelow) for part in when):
            raise SpaceError(f"condition {given!r}; allowed: ActiveIf, ActiveBelow")
        object.__setattr__(self, "when", when)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Uniforms that one `sample` or one `mutate` consumes per candidate."""
        return self.size * self.uniforms_per_element

    @property
    def dtype(self) -> np.dtype[Any]:
        raise NotImplementedError

    @property
    def neutral(self) -> Any:
        """What stands in an inactive element."""
        raise NotImplementedError

    def sample(self, u: Array, active: Array | None = None) -> Array:
        """Uniform values from uniforms (n, width) -> (n, *shape)."""
        raise NotImplementedError

    def mutate(self, values: Array, mask: Array, u: Array, active: Array | None = None) -> Array:
        """New values where mask (n, *shape) holds."""
        raise NotImplementedError

    def valid(self, values: Array, active: Array) -> Array:
        """Which rows are within bounds, bool (n,)."""
        raise NotImplementedError

    def repair(self, values: Array, active: Array | None = None) -> Array:
        """The nearest valid values, row by row."""
        return values

    @property
    def code_width(self) -> int:
        """Columns of the float encoding."""
        return self.size

    def encode(self, values: Array, active: Array) -> Array:
        """float32 (n, code_width); inactive elements are zero."""
        raise NotImplementedError

    def decode(self, value: Array) -> Any:
        """One candidate's value as plain Python objects."""
        raise NotImplementedError

    def encode_labels(self, value: Any) -> Array:
        """The inverse of `decode`: an array of `dtype` and `shape`. Raises SpaceError."""
        given = np.asarray(value)
        array = given.astype(self.dtype)
        numbers = given.dtype.kind in "biuf" and np.isfinite(given).all()
        if not (numbers and np.array_equal(given, array)):
            raise SpaceError(f"value {value!r} for a {self.kind}; allowed: {_NUMBERS[self.kind]}")
        if array.shape != self.shape:
            raise SpaceError(f"value of shape {array.shape} for a {self.kind} of {self.shape}")
        return array

    def neighbours(self, value: Array, active: Array) -> Array:
        """All single-element moves from one value (*shape) -> (k, *shape)."""
        raise NotImplementedError

    def _json(self) -> Any:
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {self.kind: self._json()}
        if self.shape:
            out["shape"] = list(self.shape)
        if self.when:
            out["when"] = [condition.to_json() for condition in self.when]
        return out

    def _rows(self, flags: Array) -> NDArray[np.bool_]:
        """Per-row conjunction of (n, *shape) flags."""
        return cast(NDArray[np.bool_], flags.reshape(len(flags), self.size).all(axis=1))

    def _block(self, u: Array) -> Array:
        return u[:, : self.size].reshape(len(u), *self.shape)


def _move_each(value: Array, active: Array, options: Sequence[Any]) -> Array:
    """Copies of a value with one active element exchanged for each other option."""
    flat, flags = value.reshape(-1), active.reshape(-1)
    moves = [(i, option) for i in np.flatnonzero(flags) for option in options if option != flat[i]]
    out = np.repeat(flat[None], len(moves), axis=0)
    for row, (i, option) in enumerate(moves):
        out[row, i] = option
    return out.reshape(len(moves), *value.shape)


@dataclass(frozen=True)
class Choice(Variable):
    """One of a list of labels per element; stored as an integer code, looked up at decode.

    Args:
        labels: at least one distinct JSON value.
    """

    labels: tuple[Any, ...]
    kind: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.labels
        if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
            raise SpaceError(f"labels {given!r} of a choice; allowed: a list of JSON values")
        labels = tuple(given)
        if not labels:
            raise SpaceError("a choice without labels; allowed: one label or more")
        try:
            texts = {json.dumps(label, allow_nan=False, sort_keys=True) for label in labels}
        except (TypeError, ValueError):
            raise SpaceError(f"labels {given!r} of a choice; allowed: JSON values") from None
        # 1, 1.0 and True are one label: the code of a label is found by equality.
        if len(texts) < len(labels) or any(
            label in labels[:i] for i, label in enumerate(labels) if isinstance(label, int | float)
        ):
            raise SpaceError(f"labels of a choice repeat: {list(labels)}")
        object.__setattr__(self, "labels", labels)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8 if len(self.labels) <= 256 else np.uint32)

    @property
    def neutral(self) -> Any:
        return 0

    def sample(self, u: Array, active: Array | None = None) -> Array:
        return (self._block(u) * len(self.labels)).astype(self.dtype)

    def mutate(self, values: Array, mask: Array, u: Array, active: Array | None = None) -> Array:
        k = len(self.labels)
        if k == 1:
            return values
        # A step of 1..k-1 around the ring: uniform over the other labels, never the same one.
        # Few elements change, so only those are computed.
        where = np.nonzero(mask)
        step = 1 + (self._block(u)[where] * (k - 1)).astype(np.int64)
        out = np.array(values, dtype=self.dtype)
        out[where] = (out[where] + step) % k
        return out

    def valid(self, values: Array, active: Array) -> Array:
        return self._rows((values >= 0) & (values < len(self.labels)))

    def repair(self, values: Array, active: Array | None = None) -> Array:
        # Codes are nearly always valid, and clipping costs as much as all the rest of a repair.
        if values.dtype == self.dtype and (values < len(self.labels)).all():
            return values
        return np.clip(values, 0, len(self.labels) - 1).astype(self.dtype)

    @property
    def code_width(self) -> int:
        return self.size * len(self.labels)

    def encode(self, values: Array, active: Array) -> Array:
        codes = np.arange(len(self.labels))
        hot: Array = (values[..., None] == codes) & active[..., None]
        return hot.reshape(len(values), self.code_width).astype(np.float32)

    def decode(self, value: Array) -> Any:
        if not self.shape:
            return self.labels[int(value)]
        table = np.empty(len(self.labels), dtype=object)
        for code, label in enumerate(self.labels):
            table[code] = label  # one by one: labels may be lists themselves
        return table[value.astype(np.int64)].tolist()

    def encode_labels(self, value: Any) -> Array:
        def code(label: Any) -> Any:
            if isinstance(label, list | tuple) and label not in self.labels:
                return [code(part) for part in label]
            if label not in self.labels:
                raise SpaceError(f"label {label!r} of a choice; allowed: {list(self.labels)}")
            return self.labels.index(label)

        return super().encode_labels(code(value))

    def neighbours(self, value: Array, active: Array) -> Array:
        return _move_each(value, active, range(len(self.labels)))

    def _json(self) -> Any:
        return list(self.labels)


@dataclass(frozen=True)
class Integer(Variable):
    """A whole number in [low, high] per element."""

    low: int
    high: int
    kind: ClassVar[str] = "integer"
    uniforms_per_element: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = (self.low, self.high)
        whole = all(math.isfinite(end) and int(end) == end for end in ends)
        if not (whole and self.low <= self.high and max(map(abs, ends)) < 2**53):
            raise SpaceError(
                f"integer range [{self.low}, {self.high}]; allowed: whole numbers, low <= high"
            )
        object.__setattr__(self, "low", int(self.low))
        object.__setattr__(self, "high", int(self.high))

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int64)

    @property
    def neutral(self) -> Any:
        return self.low

    def sample(self, u: Array, active: Array | None = None) -> Array:
        return self.low + (self._block(u) * (self.high - self.low + 1)).astype(np.int64)

    def mutate(self, values: Array, mask: Array, u: Array, active: Array | None = None) -> Array:
        if self.high == self.low:
            return values
        # Steps up or down within the room that is left: near moves are likelier, every value stays
        # reachable and none repeats. Without room on one side the step goes to the other one.
        block = self._block(u)
        above, below = self.high - values, values - self.low
        up = ((block < 0.5) | (below <= 0)) & (above > 0)
        depth = np.where(block < 0.5, block * 2, block * 2 - 1)
        room = np.maximum(1, np.where(up, above, below))
        reach = np.minimum(room, 1 + np.floor(room * depth**3).astype(np.int64))
        moved = values + np.where(up, reach, -reach)
        return np.where(mask, moved, values).astype(np.int64)

    def valid(self, values: Array, active: Array) -> Array:
        return self._rows((values >= self.low) & (values <= self.high))

    def repair(self, values: Array, active: Array | None = None) -> Array:
        return np.clip(values, self.low, self.high)

    def encode(self, values: Array, active: Array) -> Array:
        scale = max(1, self.high - self.low)
        code = np.where(active, (values - self.low) / scale, 0.0)
        return code.reshape(len(values), self.size).astype(np.float32)

    def decode(self, value: Array) -> Any:
        return value.tolist()

    def neighbours(self, value: Array, active: Array) -> Array:
        flat, flags = value.reshape(-1), active.reshape(-1)
        rows = []
        for i in np.flatnonzero(flags):
            for step in (-1, 1):
                if self.low <= flat[i] + step <= self.high:
                    row = flat.copy()
                    row[i] += step
                    rows.append(row)
        return np.array(rows, dtype=np.int64).reshape(len(rows), *value.shape)

    def _json(self) -> Any:
        return [self.low, self.high]


@dataclass(frozen=True)
class Real(Variable):
    """A real number in [low, high] per element.

    Args:
        step: standard deviation of a mutation as a fraction of the range.
        default: the neutral value where inactive; low when not given.
    """

    low: float
    high: float
    step: float = field(default=0.1, kw_only=True)
    default: float | None = field(default=None, kw_only=True)
    kind: ClassVar[str] = "real"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (_finite_range(self.low, self.high) and self.low <= self.high):
            raise SpaceError(f"real range [{self.low}, {self.high}]; allowed: finite, low <= high")
        if self.default is not None and not math.isfinite(self.default):
            raise SpaceError(f"default {self.default} of a real; allowed: finite")
        # Whole numbers become floats, so that a space read from a file has the same text.
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))
        if not 0 < self.step <= 1:
            raise SpaceError(f"step {self.step} of a real; allowed: in (0, 1]")

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64)

    @property
    def neutral(self) -> Any:
        return self.low if self.default is None else self.default

    def sample(self, u: Array, active: Array | None = None) -> Array:
        # Rounding may step over the end.
        return np.minimum(self.low + self._block(u) * (self.high - self.low), self.high)

    def mutate(self, values: Array, mask: Array, u: Array, active: Array | None = None) -> Array:
        where = np.nonzero(mask)  # few elements change, and normals are dear
        moves = normals(self._block(u)[where]) * self.step * (self.high - self.low)
        out = np.array(values, dtype=self.dtype)
        out[where] = reflect(out[where] + moves, self.low, self.high)
        return out

    def valid(self, values: Array, active: Array) -> Array:
        return self._rows(((values >= self.low) & (values <= self.high)) | ~active)

    def repair(self, values: Array, active: Array | None = None) -> Array:
        return np.clip(values, self.low, self.high)

    def encode(self, values: Array, active: Array) -> Array:
        scale = (self.high - self.low) or 1.0
        code = np.where(active, (values - self.low) / scale, 0.0)
        return code.reshape(len(values), self.size).astype(np.float32)

    def decode(self, value: Array) -> Any:
        return value.tolist()

    def neighbours(self, value: Array, active: Array) -> Array:
        flat, flags = value.reshape(-1), active.reshape(-1)
        rows = []
        for i in np.flatnonzero(flags):
            for sign in (-1.0, 1.0):
                row = flat.copy()
                moved = row[i] + sign * self.step * (self.high - self.low)
                row[i] = min(self.high, max(self.low, moved))
                if row[i] != flat[i]:
                    rows.append(row)
        return np.array(rows, dtype=np.float64).reshape(len(rows), *value.shape)

    def _json(self) -> Any:
        return [self.low, self.high]

    def to_json(self) -> dict[str, Any]:
        out = super().to_json()
        if self.step != 0.1:
            out["step"] = self.step
        if self.default is not None:
            out["default"] = self.default
        return out


@dataclass(frozen=True)
class Ordered(Variable):
    """n increasing reals in [low, high] with at least `gap` between neighbours.

    The work is done on the slack values y_i = x_i - i * gap, which only have to be sorted: sorting
    and clipping there repairs any row, and sorted uniforms there are uniform over the valid set.
    Where a condition leaves only a prefix active, the prefix is spread over the whole range and
    the rest stands at `high`.

    Args:
        n: how many values; low + (n - 1) * gap <= high.
        step: standard deviation of a mutation as a fraction of the range.
    """

    n: int
    low: float
    high: float
    gap: float = 0.0
    step: float = field(default=0.08, kw_only=True)
    kind: ClassVar[str] = "ordered"

    def __post_init__(self) -> None:
        if not isinstance(self.n, int | np.integer) or self.n < 1:
            raise SpaceError(f"ordered of {self.n!r} values; allowed: a whole number, 1 or more")
        object.__setattr__(self, "shape", (self.n,))
        super().__post_init__()
        if not (_finite_range(self.low, self.high) and math.isfinite(self.gap) and self.gap >= 0):
            raise SpaceError(
                f"ordered range [{self.low}, {self.high}] with gap {self.gap}; "
                "allowed: finite, gap >= 0"
            )
        if not 0 < self.step <= 1:
            raise SpaceError(f"step {self.step} of an ordered; allowed: in (0, 1]")
        if self.low + (self.n - 1) * self.gap > self.high:
            raise SpaceError(
                f"{self.n} values with gap {self.gap} do not fit into [{self.low}, {self.high}]"
            )
        for name in ("low", "high", "gap"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64)

    @property
    def neutral(self) -> Any:
        return self.high

    def sample(self, u: Array, active: Array | None = None) -> Array:
        # Sorting mixes the columns, so that the inactive ones must not take part.
        values = self.low + self._block(u) * (self.high - self.low)
        count = _counts(values, active)
        top = self.high - np.maximum(count - 1, 0) * self.gap
        slack = self.low + self._block(u) * (top - self.low)[:, None]
        return self._from_slack(slack, count, top)

    def mutate(self, values: Array, mask: Array, u: Array, active: Array | None = None) -> Array:
        moved = values + normals(self._block(u)) * self.step * (self.high - self.low)
        moved = np.where(mask, reflect(moved, self.low, self.high), values)
        return self.repair(moved, active)

    def repair(self, values: Array, active: Array | None = None) -> Array:
        count = _counts(values, active)
        index = np.arange(self.n)
        inactive = index >= count[:, None]
        ordered = np.sort(np.where(inactive, np.inf, values), axis=1)
        top = self.high - np.maximum(count - 1, 0) * self.gap
        slack = np.where(inactive, np.inf, ordered) - index * self.gap
        return self._from_slack(slack, count, top)

    def _from_slack(self, slack: Array, count: Array, top: Array) -> Array:
        index = np.arange(self.n)
        inactive = index >= count[:, None]
        slack = np.sort(np.where(inactive, np.inf, slack), axis=1)
        slack = np.clip(slack, self.low, top[:, None])
        # The last place is clipped too: low + k * gap may round to just above high.
        return np.where(inactive, self.high, np.minimum(slack + index * self.gap, self.high))

    def valid(self, values: Array, active: Array) -> Array:
        inside = ((values >= self.low) & (values <= self.high)) | ~active
        both = active[:, 1:] & active[:, :-1]
        slip = 1e-9 * (self.high - self.low)
        apart = (np.diff(values, axis=1) >= self.gap - slip) | ~both
        return self._rows(inside) & apart.all(axis=1)

    def encode(self, values: Array, active: Array) -> Array:
        scale = (self.high - self.low) or 1.0
        return np.where(active, (values - self.low) / scale, 0.0).astype(np.float32)

    def decode(self, value: Array) -> Any:
        return value.tolist()

    def neighbours(self, value: Array, active: Array) -> Array:
        rows = []
        for i in np.flatnonzero(active):
            for sign in (-1.0, 1.0):
                row = value.copy()
                row[i] += sign * self.step * (self.high - self.low)
                row = self.repair(row[None], active[None])[0]
                if not np.array_equal(row, value):
                    rows.append(row)
        return np.array(rows, dtype=np.float64).reshape(len(rows), self.n)

    def _json(self) -> Any:
        return {"n": self.n, "low": self.low, "high": self.high, "gap": self.gap}

    def to_json(self) -> dict[str, Any]:
        out = super().to_json()
        out.pop("shape")
        if self.step != 0.08:
            out["step"] = self.step
        return out


def _counts(values: Array, active: Array | None) -> Array:
    if active is None:
        return np.full(len(values), values.shape[1])
    return cast(Array, active.sum(axis=1))


def normals(u: Array) -> Array:
    """Standard normal values by inverse distribution function: one uniform each, never rejected."""
    from scipy.special import ndtri

    return cast(Array, ndtri(np.clip(u, 1e-15, 1 - 1e-15)))


def reflect(values: Array, low: float, high: float) -> Array:
    """Values folded back at the ends of a range."""
    if high <= low:
        return np.full_like(values, low)
    turn = np.mod(values - low, 2 * (high - low))
    folded = low + np.where(turn > high - low, 2 * (high - low) - turn, turn)
    return np.clip(folded, low, high)  # rounding may step over an end


def _finite_range(low: float, high: float) -> bool:
    """Whether both ends and twice their distance are finite."""
    return math.isfinite(low) and math.isfinite(high) and math.isfinite(2 * (high - low))
