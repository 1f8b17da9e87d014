"""Constraints that are not budgets: elements tied to each other, and a user's own predicate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import SpaceError
from searchlab.variables import Choice, Integer, Variable

__all__ = ["Predicate", "Tie", "tied_places"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Tie:
    """Elements that always have equal values; the first one leads.

    Args:
        elements: two or more places: a name for a scalar, or (name, i, j, ...) for one element of
            a shaped variable. All are choices with the same labels or integers of the same range,
            and none has a condition.

    Raises:
        SpaceError: fewer than two places, a place that is not written like that, or twice.
    """

    elements: tuple[Any, ...]

    def __post_init__(self) -> None:
        given: Any = self.elements
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise SpaceError(f"tie of {given!r}; allowed: a list of places")
        places = tuple(_place(element) for element in given)
        if len(places) < 2 or len(set(places)) < len(places):
            raise SpaceError(f"tie of {list(self.elements)}; allowed: two or more different places")
        object.__setattr__(self, "elements", places)

    def check(self, variables: Mapping[str, Variable]) -> None:
        """Raises SpaceError where a place does not exist or cannot be tied to the others."""
        kinds = []
        for name, *index in self.elements:
            variable = variables.get(name)
            if variable is None:
                raise SpaceError(f"tie names {name!r}; known: {sorted(variables)}")
            inside = len(index) == len(variable.shape) and all(
                0 <= i < n for i, n in zip(index, variable.shape, strict=True)
            )
            if not inside:
                raise SpaceError(
                    f"tie names element {tuple(index)} of {name!r}; "
                    f"allowed: inside {variable.shape}"
                )
            if variable.when or not isinstance(variable, Choice | Integer):
                what = variable.kind + " with a condition" * bool(variable.when)
                raise SpaceError(
                    f"tie names {name!r}, a {what}; "
                    "allowed: choices and integers without conditions"
                )
            kinds.append(
                variable.labels
                if isinstance(variable, Choice)
                else (variable.low, variable.high, variable.step)
            )
        for kind, (name, *_) in zip(kinds, self.elements, strict=True):
            if kind != kinds[0] or type(variables[name]) is not type(
                variables[self.elements[0][0]]
            ):
                raise SpaceError(
                    f"tie joins {self.elements[0][0]!r} and {name!r}; "
                    "allowed: equal labels or ranges"
                )

    def to_json(self) -> dict[str, Any]:
        return {"tie": [list(place) for place in self.elements]}


def _place(element: Any) -> tuple[Any, ...]:
    parts = (element,) if isinstance(element, str) else element
    if isinstance(parts, list | tuple) and parts and isinstance(parts[0], str):
        rest = parts[1:]
        if len(rest) == 1 and isinstance(rest[0], list | tuple):
            rest = rest[0]
        if all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in rest):
            return (parts[0], *(int(i) for i in rest))
    raise SpaceError(f"place {element!r} of a tie; allowed: a name or (name, index, ...)")


def tied_places(ties: Sequence[Tie], variables: Mapping[str, Variable]) -> list[list[int]]:
    """Groups of element numbers (over all variables), leader first; ties that meet are joined."""
    first, start = {}, 0
    for key, variable in variables.items():
        first[key] = start
        start += variable.size
    groups: list[list[int]] = []
    for tie in ties:
        numbers = []
        for name, *index in tie.elements:
            shape = variables[name].shape
            inner = int(np.ravel_multi_index(tuple(index), shape)) if shape else 0
            numbers.append(first[name] + inner)
        meeting = [group for group in groups if set(group) & set(numbers)]
        groups = [group for group in groups if group not in meeting]
        joined = [number for group in meeting for number in group] + numbers
        groups.append(list(dict.fromkeys(joined)))
    return groups


@dataclass(frozen=True, eq=False)
class Predicate:
    """A user's own condition on candidates, kept by rejection.

    Where a sample or a child does not fulfil it, others near it are drawn instead, then fresh
    ones. A function is not data: a space file names it only, and the fingerprint of the space
    holds the name and the version, so that the version has to be raised when the meaning changes.

    Args:
        function: maps columns (name -> read-only array (n, *shape); codes of choices, masks of
            subsets) to bool (n,).
        name: how it is called in errors and fingerprints.
        version: raised by hand.
        tries: how many replacements are drawn for a row before the search gives up.

    Raises:
        SpaceError: no function, an empty name, tries below 1.
    """

    function: Callable[[Mapping[str, Array]], Any]
    name: str
    version: int = 1
    tries: int = 500

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise SpaceError(f"predicate {self.name!r} is {self.function!r}; allowed: a function")
        if not (isinstance(self.name, str) and self.name):
            raise SpaceError(f"name {self.name!r} of a predicate; allowed: a text")
        if not isinstance(self.version, int):
            raise SpaceError(f"version {self.version!r} of a predicate; allowed: whole numbers")
        if not (isinstance(self.tries, int) and self.tries >= 1):
            raise SpaceError(f"tries {self.tries!r} of a predicate; allowed: whole numbers from 1")

    def holds(self, columns: Mapping[str, Array], n: int) -> NDArray[np.bool_]:
        """Which rows fulfil it, bool (n,). Raises SpaceError for any other answer."""
        if not n:
            return np.zeros(0, dtype=bool)
        try:
            answer = np.asarray(self.function(columns))
        except Exception as error:  # a user's function may raise anything
            raise SpaceError(
                f"predicate {self.name!r} raised {type(error).__name__}: {_line(error)}"
            ) from error
        if answer.shape != (n,) or answer.dtype != np.bool_:
            raise SpaceError(
                f"predicate {self.name!r} answered {answer.dtype} of shape {answer.shape}; "
                f"allowed: bool of shape ({n},)"
            )
        return answer

    def to_json(self) -> dict[str, Any]:
        return {"predicate": self.name, "version": self.version}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
