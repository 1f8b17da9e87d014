"""Variables whose elements are independent: choices, integers and reals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab._variable import Variable, finite_range, move_each, normals, reflect
from searchlab.errors import SpaceError

__all__ = ["Choice", "Integer", "Real"]

Array = NDArray[Any]


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
    def unit_count(self) -> int:
        return len(self.labels)

    def unit_values(self) -> Array:
        return np.arange(len(self.labels), dtype=self.dtype)[:, None]

    @cached_property
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
        where = np.flatnonzero(mask)
        step = 1 + (self._block(u).take(where) * (k - 1)).astype(np.int64)
        out = np.array(values, dtype=self.dtype, order="C")
        flat = out.reshape(-1)
        flat[where] = (flat[where] + step) % k
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

    def tokens(self, values: Array, active: Array) -> tuple[Array, Array]:
        codes = np.where(active, values, 0).reshape(len(values), self.size)
        return codes.astype(np.int32), np.zeros(codes.shape, np.float32)

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
        return move_each(value, active, range(len(self.labels)))

    def _json(self) -> Any:
        return list(self.labels)


@dataclass(frozen=True)
class Integer(Variable):
    """A whole number in [low, high] per element.

    Args:
        low: the smallest value; at least 1 with `log`.
        high: the largest value; lowered to the last one that low + i * step reaches.
        log: ratios count instead of differences: small values are drawn as often as large ones,
            and mutations multiply.
        step: distance of the allowed values.
    """

    low: int
    high: int
    log: bool = field(default=False, kw_only=True)
    step: int = field(default=1, kw_only=True)
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
        if not (math.isfinite(self.step) and int(self.step) == self.step and self.step >= 1):
            raise SpaceError(f"step {self.step} of an integer; allowed: whole numbers from 1")
        _check_log("integer", self.log, self.low, least=1)
        object.__setattr__(self, "low", int(self.low))
        object.__setattr__(self, "step", int(self.step))
        object.__setattr__(self, "log", bool(self.log))
        count = (int(self.high) - self.low) // self.step + 1
        object.__setattr__(self, "high", self.low + (count - 1) * self.step)

    @property
    def unit_count(self) -> int:
        return (self.high - self.low) // self.step + 1

    def unit_values(self) -> Array:
        return np.arange(self.low, self.high + 1, self.step, dtype=np.int64)[:, None]

    @property
    def uniform(self) -> bool:
        return not self.log

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int64)

    @property
    def neutral(self) -> Any:
        return self.low

    def _index(self, values: Array) -> Array:
        """The number of the nearest allowed value."""
        places = np.rint((values - self.low) / self.step)
        return np.clip(places, 0, self.unit_count - 1).astype(np.int64)

    def sample(self, u: Array, active: Array | None = None) -> Array:
        if self.log:
            drawn = log_uniform(self._block(u), self.low, self.high, self.step)
            return self.low + self.step * self._index(drawn)
        return self.low + self.step * (self._block(u) * self.unit_count).astype(np.int64)

    def mutate(self, values: Array, mask: Array, u: Array, active: Array | None = None) -> Array:
        if self.high == self.low:
            return values
        # Steps up or down within the room that is left: near moves are likelier, every value stays
        # reachable and none repeats. Without room on one side the step goes to the other one.
        block = self._block(u)
        at = (values - self.low) // self.step
        above, below = self.unit_count - 1 - at, at
        up = ((block < 0.5) | (below <= 0)) & (above > 0)
        depth = np.where(block < 0.5, block * 2, block * 2 - 1)
        room = np.maximum(1, np.where(up, above, below))
        if self.log:
            present = np.clip(values, self.low, self.high)
            end = np.where(up, self.high, self.low)
            there = present * np.exp(np.log(end / present) * depth**3)
            reach = np.clip(np.abs(self._index(there) - at), 1, room)
        else:
            reach = np.minimum(room, 1 + np.floor(room * depth**3).astype(np.int64))
        moved = values + self.step * np.where(up, reach, -reach)
        return np.where(mask, moved, values).astype(np.int64)

    def valid(self, values: Array, active: Array) -> Array:
        inside = (values >= self.low) & (values <= self.high)
        return self._rows(inside & ((values - self.low) % self.step == 0))

    def repair(self, values: Array, active: Array | None = None) -> Array:
        if self.step > 1:
            return self.low + self.step * self._index(values)
        return np.clip(values, self.low, self.high)

    def encode(self, values: Array, active: Array) -> Array:
        if self.log:
            scale = math.log(self.high / self.low) or 1.0
            place = np.log(np.clip(values, self.low, self.high) / self.low) / scale
        else:
            place = (values - self.low) / max(1, self.high - self.low)
        return np.where(active, place, 0.0).reshape(len(values), self.size).astype(np.float32)

    def decode(self, value: Array) -> Any:
        return value.tolist()

    def neighbours(self, value: Array, active: Array) -> Array:
        """One step down and up; with `log` also half and double."""
        flat, flags = value.reshape(-1), active.reshape(-1)
        rows = []
        for i in np.flatnonzero(flags):
            moves = [flat[i] - self.step, flat[i] + self.step]
            if self.log:
                moves += [self.low + self.step * self._index(flat[i] * f) for f in (0.5, 2.0)]
            for moved in dict.fromkeys(int(move) for move in moves):
                if self.low <= moved <= self.high and moved != flat[i]:
                    row = flat.copy()
                    row[i] = moved
                    rows.append(row)
        return np.array(rows, dtype=np.int64).reshape(len(rows), *value.shape)

    def _json(self) -> Any:
        return [self.low, self.high]

    def to_json(self) -> dict[str, Any]:
        out = super().to_json()
        if self.log:
            out["log"] = True
        if self.step != 1:
            out["step"] = self.step
        return out


@dataclass(frozen=True)
class Real(Variable):
    """A real number in [low, high] per element.

    Args:
        low: the smallest value; above 0 with `log`.
        high: the largest value; with `step` lowered to the last one that low + i * step reaches.
        sigma: standard deviation of a mutation as a fraction of the range.
        default: the neutral value where inactive; low when not given.
        log: ratios count instead of differences, in drawing, mutation and encoding.
        step: distance of the allowed values; None = every number.
    """

    low: float
    high: float
    sigma: float = field(default=0.1, kw_only=True)
    default: float | None = field(default=None, kw_only=True)
    log: bool = field(default=False, kw_only=True)
    step: float | None = field(default=None, kw_only=True)
    kind: ClassVar[str] = "real"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (finite_range(self.low, self.high) and self.low <= self.high):
            raise SpaceError(f"real range [{self.low}, {self.high}]; allowed: finite, low <= high")
        if self.default is not None and not math.isfinite(self.default):
            raise SpaceError(f"default {self.default} of a real; allowed: finite")
        if not 0 < self.sigma <= 1:
            raise SpaceError(f"sigma {self.sigma} of a real; allowed: in (0, 1]")
        _check_log("real", self.log, self.low, least=0)
        # Whole numbers become floats, so that a space read from a file has the same text.
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))
        object.__setattr__(self, "log", bool(self.log))
        if self.step is None:
            return
        fits = math.isfinite(self.step) and self.step > 0
        if not (fits and (self.high - self.low) / self.step < 2**31):
            raise SpaceError(
                f"step {self.step} of a real in [{self.low}, {self.high}]; allowed: above 0, at "
                "most 2**31 values"
            )
        object.__setattr__(self, "step", float(self.step))
        low, high = self._grid(np.array([0, self._steps()]))
        object.__setattr__(self, "low", float(low))
        object.__setattr__(self, "high", float(high))

    def _steps(self) -> int:
        """The number of the last allowed value."""
        assert self.step is not None
        return int((self.high - self.low) / self.step * (1 + 1e-12) + 1e-9)

    def _grid(self, index: Array) -> Array:
        """Allowed values by number, without the last digits that sums of a step collect."""
        assert self.step is not None
        values = self.low + index * self.step
        digits = min(15, max(0, 12 - math.floor(math.log10(self.step))))
        if max(abs(self.low), abs(self.high)) * 10.0**digits < 2**52:
            values = np.round(values, digits)
        return np.asarray(values, dtype=np.float64)

    def _snap(self, values: Array) -> Array:
        if self.step is None:
            return values
        return self._grid(np.clip(np.rint((values - self.low) / self.step), 0, self._steps()))

    @property
    def unit_count(self) -> int | None:
        if self.step is None:
            return 1 if self.low == self.high else None
        return self._steps() + 1

    def unit_values(self) -> Array:
        if self.step is None:
            return np.array([[self.low]])
        return self._grid(np.arange(self._steps() + 1))[:, None]

    @property
    def uniform(self) -> bool:
        return not self.log

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64)

    @property
    def neutral(self) -> Any:
        return self.low if self.default is None else self.default

    def sample(self, u: Array, active: Array | None = None) -> Array:
        block = self._block(u)
        if self.log:
            drawn = log_uniform(block, self.low, self.high, self.step or 0.0)
            return self._snap(np.clip(drawn, self.low, self.high))
        if self.step is not None:
            return self._grid(np.floor(block * (self._steps() + 1)))
        # Rounding may step over the end.
        return np.minimum(self.low + block * (self.high - self.low), self.high)

    def mutate(self, values: Array, mask: Array, u: Array, active: Array | None = None) -> Array:
        where = np.nonzero(mask)  # few elements change, and normals are dear
        out = np.array(values, dtype=self.dtype)
        out[where] = self._moved(out[where], normals(self._block(u)[where]) * self.sigma)
        return out

    def _moved(self, values: Array, noise: Array) -> Array:
        if self.log:
            ends = math.log(self.low), math.log(self.high)
            present = np.log(np.clip(values, self.low, self.high))
            moved = np.exp(reflect(present + noise * (ends[1] - ends[0]), *ends))
            moved = np.clip(moved, self.low, self.high)
        else:
            moved = reflect(values + noise * (self.high - self.low), self.low, self.high)
        if self.step is not None and self.high > self.low:
            # A move that is too small for a step takes one step all the same.
            moved = self._snap(moved)
            up = (noise >= 0) & (values < self.high) | (values <= self.low)
            onwards = self._snap(values + np.where(up, self.step, -self.step))
            moved = np.where(moved == values, onwards, moved)
        return moved

    def valid(self, values: Array, active: Array) -> Array:
        inside = (values >= self.low) & (values <= self.high) & (self._snap(values) == values)
        return self._rows(inside | ~active)

    def repair(self, values: Array, active: Array | None = None) -> Array:
        return self._snap(np.clip(values, self.low, self.high))

    def encode(self, values: Array, active: Array) -> Array:
        if self.log:
            scale = math.log(self.high / self.low) or 1.0
            place = np.log(np.clip(values, self.low, self.high) / self.low) / scale
        else:
            place = (values - self.low) / ((self.high - self.low) or 1.0)
        return np.where(active, place, 0.0).reshape(len(values), self.size).astype(np.float32)

    def decode(self, value: Array) -> Any:
        return value.tolist()

    def encode_labels(self, value: Any) -> Array:
        array = super().encode_labels(value)
        if self.step is None:
            return array
        # 0.3 and 3 * 0.1 are one value of a grid; what lies between two values stays as it is.
        snapped = self._snap(array)
        return np.where(np.abs(snapped - array) <= 1e-6 * self.step, snapped, array)

    def neighbours(self, value: Array, active: Array) -> Array:
        flat, flags = value.reshape(-1), active.reshape(-1)
        reach = self.sigma * (self.high - self.low)
        factor = math.exp(self.sigma * math.log(self.high / self.low)) if self.log else 1.0
        rows = []
        for i in np.flatnonzero(flags):
            for sign in (-1.0, 1.0):
                row = flat.copy()
                moved = row[i] * factor**sign if self.log else row[i] + sign * reach
                if self.step is not None:
                    moved = row[i] + sign * self.step
                row[i] = self._snap(np.clip(moved, self.low, self.high))
                if row[i] != flat[i]:
                    rows.append(row)
        return np.array(rows, dtype=np.float64).reshape(len(rows), *value.shape)

    def _json(self) -> Any:
        return [self.low, self.high]

    def to_json(self) -> dict[str, Any]:
        out = super().to_json()
        if self.sigma != 0.1:
            out["sigma"] = self.sigma
        if self.default is not None:
            out["default"] = self.default
        if self.log:
            out["log"] = True
        if self.step is not None:
            out["step"] = self.step
        return out


def log_uniform(u: Array, low: float, high: float, step: float) -> Array:
    """Log-uniform numbers; with a step, over the bins of the grid, half a step beyond the ends."""
    # The lower edge lies as many ratios below low as low + step / 2 lies above it.
    edges = math.log(low) * 2 - math.log(low + step / 2), math.log(high + step / 2)
    return np.asarray(np.exp(edges[0] + u * (edges[1] - edges[0])), dtype=np.float64)


def _check_log(kind: str, log: object, low: float, *, least: int) -> None:
    if not isinstance(log, bool | np.bool_):
        raise SpaceError(f"log {log!r} of a {kind}; allowed: true or false")
    if log and not (low >= least and low > 0):
        allowed = "at least 1" if least else "above 0"
        raise SpaceError(f"low {low} of a {kind} with log; allowed: {allowed}")
