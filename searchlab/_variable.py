"""The base of all variables, and the conditions under which their elements count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import SpaceError

__all__ = [
    "ActiveBelow",
    "ActiveIf",
    "Condition",
    "Variable",
    "finite_range",
    "move_each",
    "normals",
    "reflect",
]

Array = NDArray[Any]

MAX_ELEMENTS = 2**24  # of one variable; a slip in a file must not ask for all memory

_NUMBERS = {"choice": "labels", "integer": "whole numbers"}


@dataclass(frozen=True)
class ActiveIf:
    """Active where an earlier choice takes one of these labels (element-wise, broadcast)."""

    variable: str
    labels: tuple[Any, ...]

    def __post_init__(self) -> None:
        _check_name(self.variable)
        given: Any = self.labels
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise SpaceError(f"condition on labels {given!r}; allowed: a tuple of labels")
        object.__setattr__(self, "labels", tuple(given))

    def to_json(self) -> dict[str, Any]:
        return {"variable": self.variable, "labels": list(self.labels)}


@dataclass(frozen=True)
class ActiveBelow:
    """Element i (first axis) is active where i < value + offset of an earlier integer scalar.

    Where the integer itself is inactive, no element is active.
    """

    variable: str
    offset: int = 0

    def __post_init__(self) -> None:
        _check_name(self.variable)
        if not isinstance(self.offset, int | np.integer) or abs(self.offset) >= 2**31:
            raise SpaceError(f"offset {self.offset!r} of a condition; allowed: whole numbers")

    def to_json(self) -> dict[str, Any]:
        return {"variable": self.variable, "below": True, "offset": self.offset}


Condition = ActiveIf | ActiveBelow


@dataclass(frozen=True)
class Variable:
    """Base of the variables: a block of elements of one kind.

    A new kind (a permutation, say) overrides the methods that raise NotImplementedError here; the
    spaces, the variation operators, the files and the conformance suite use nothing else. A kind
    whose elements depend on each other along the last axis sets `grouped`: conditions then switch
    whole groups, and `mutate` and `cross` keep what the group promises.

    Attributes:
        shape: elements per candidate; () is a scalar. A grouped variable appends its own length.
        when: conditions that all must hold for an element to be active.
    """

    shape: tuple[int, ...] = field(default=(), kw_only=True)
    when: tuple[Condition, ...] = field(default=(), kw_only=True)
    kind: ClassVar[str] = ""
    uniforms_per_element: ClassVar[int] = 1
    grouped: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # A bare size or condition and lists are accepted: what stands afterwards is a tuple.
        given: Any = self.shape
        sizes = tuple(given) if isinstance(given, Sequence) else (given,)
        if not all(isinstance(size, int | np.integer) and size >= 1 for size in sizes):
            raise SpaceError(f"shape {given!r} of a {self.kind}; allowed: sizes of at least 1")
        if math.prod(map(int, sizes)) > MAX_ELEMENTS:
            raise SpaceError(
                f"shape {given!r} of a {self.kind}; allowed: at most {MAX_ELEMENTS} elements"
            )
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
    def unit(self) -> int:
        """Elements that are only valid together: the last axis of a grouped variable, else 1."""
        return self.shape[-1] if self.grouped else 1

    @property
    def unit_count(self) -> int | None:
        """How many values one active unit has; None = not countable."""
        raise NotImplementedError

    def unit_values(self) -> Array:
        """All values of one unit, (unit_count, unit); only where countable."""
        raise NotImplementedError

    @property
    def count(self) -> int | None:
        """How many values the whole variable has when all is active; None = not countable."""
        return None if self.unit_count is None else self.unit_count ** (self.size // self.unit)

    @property
    def uniform(self) -> bool:
        """Whether `sample` draws each value with the same probability (density)."""
        return True

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

    def cross(self, a: Array, b: Array, pick: Array) -> Array:
        """Values of parent b where pick (n, *shape) holds, else of a; `repair` comes later."""
        return np.where(pick, b, a)

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

    def tokens(self, values: Array, active: Array) -> tuple[Array, Array]:
        """Codes int32 and values float32, both (n, size); inactive elements are zero.

        Kinds with labels fill the codes, kinds with numbers the values (scaled as in `encode`).
        """
        scaled = self.encode(values, active).reshape(len(values), self.size)
        return np.zeros(scaled.shape, np.int32), scaled

    def decode(self, value: Array) -> Any:
        """One candidate's value as plain Python objects."""
        raise NotImplementedError

    def encode_labels(self, value: Any) -> Array:
        """The inverse of `decode`: an array of `dtype` and `shape`. Raises SpaceError."""
        given = np.asarray(value)
        array = given.astype(self.dtype)
        numbers = given.dtype.kind in "biuf" and np.isfinite(given).all()
        if not (numbers and np.array_equal(given, array)):
            allowed = _NUMBERS.get(self.kind, "finite numbers")
            raise SpaceError(f"value {value!r} for a {self.kind}; allowed: {allowed}")
        if array.shape != self.shape:
            raise SpaceError(f"value of shape {array.shape} for a {self.kind} of {self.shape}")
        return array

    def neighbours(self, value: Array, active: Array) -> Array:
        """All smallest moves from one value (*shape) -> (k, *shape)."""
        raise NotImplementedError

    def _json(self) -> Any:
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {self.kind: self._json()}
        outer = self.shape[:-1] if self.grouped else self.shape
        if outer:
            out["shape"] = list(outer)
        if self.when:
            out["when"] = [condition.to_json() for condition in self.when]
        return out

    def _rows(self, flags: Array) -> NDArray[np.bool_]:
        """Per-row conjunction of (n, *shape) flags."""
        return cast(NDArray[np.bool_], flags.reshape(len(flags), self.size).all(axis=1))

    def _block(self, u: Array) -> Array:
        return u[:, : self.size].reshape(len(u), *self.shape)


def move_each(value: Array, active: Array, options: Sequence[Any]) -> Array:
    """Copies of a value with one active element exchanged for each other option."""
    flat, flags = value.reshape(-1), active.reshape(-1)
    moves = [(i, option) for i in np.flatnonzero(flags) for option in options if option != flat[i]]
    out = np.repeat(flat[None], len(moves), axis=0)
    for row, (i, option) in enumerate(moves):
        out[row, i] = option
    return out.reshape(len(moves), *value.shape)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise SpaceError(f"condition on {name!r}; allowed: the name of a variable")


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


def finite_range(low: float, high: float) -> bool:
    """Whether both ends and twice their distance are finite."""
    return math.isfinite(low) and math.isfinite(high) and math.isfinite(2 * (high - low))
