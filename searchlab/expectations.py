"""Expectations of a run, such as `best < 0.05`: a grammar of their own, nothing is executed.

expectation = sum (< | <= | > | >= | == | !=) sum
sum         = product ((+ | -) product)*
product     = factor ((* | /) factor)*
factor      = number | name | name[group] | - factor | ( sum )
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from searchlab.errors import ConfigError, unknown_name

__all__ = ["Verdict", "expect"]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9]*(?:\[\s*-?\d+\s*\])?)"
    r"|(?P<sign><=|>=|==|!=|[-+*/()<>]))",
    re.ASCII,
)
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_DEEPEST = 50
_LONGEST = 1000


@dataclass(frozen=True)
class Verdict:
    """Whether an expectation holds, and with which values.

    Attributes:
        text: the expectation as it was given.
        holds: False also where a figure is missing.
        left, right: what its sides come to.
        missing: names of figures that the run does not have.
    """

    text: str
    holds: bool
    left: float
    right: float
    missing: tuple[str, ...]

    def __str__(self) -> str:
        if self.missing:
            return f"{self.text}: the run has no {', '.join(self.missing)}"
        return f"{self.text}: {self.left:.6g} against {self.right:.6g}"


def expect(text: str, figures: Mapping[str, float]) -> Verdict:
    """Checks one expectation.

    Args:
        text: see the module's grammar; at most 1000 characters.
        figures: the numbers it may name; NaN = the run has none.

    Raises:
        ConfigError: it cannot be read, or names something that is no figure.
    """
    return _Reader(text, figures).verdict()


class _Reader:
    """Reads one expectation from left to right."""

    def __init__(self, text: str, figures: Mapping[str, float]) -> None:
        self._text = text
        self._figures = figures
        self._missing: dict[str, None] = {}
        self._tokens = self._split()
        self._at = 0

    def _split(self) -> list[tuple[str, str]]:
        if len(self._text) > _LONGEST:
            raise self._wrong(f"{len(self._text)} characters; allowed: {_LONGEST}")
        out, at = [], 0
        stripped = self._text.rstrip()
        while at < len(stripped):
            match = _TOKEN.match(stripped, at)
            if match is None:
                raise self._wrong(f"{stripped[at:].strip()[:20]!r} cannot be read")
            kind = str(match.lastgroup)
            out.append((kind, match.group(kind)))
            at = match.end()
        return out

    def verdict(self) -> Verdict:
        left = self._sum(0)
        _, sign = self._next()
        if sign not in _COMPARE:
            raise self._wrong("there is no comparison")
        right = self._sum(0)
        if self._at < len(self._tokens):
            raise self._wrong(f"{self._tokens[self._at][1]!r} comes after its end")
        known = not math.isnan(left) and not math.isnan(right)
        holds = known and not self._missing and _COMPARE[sign](left, right)
        return Verdict(self._text.strip(), holds, left, right, tuple(self._missing))

    def _peek(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _next(self) -> tuple[str, str]:
        if self._at >= len(self._tokens):
            return "", ""
        self._at += 1
        return self._tokens[self._at - 1]

    def _sum(self, depth: int) -> float:
        value = self._product(depth)
        while self._peek() in ("+", "-"):
            sign = -1.0 if self._next()[1] == "-" else 1.0
            value += sign * self._product(depth)
        return value

    def _product(self, depth: int) -> float:
        value = self._factor(depth)
        while self._peek() in ("*", "/"):
            if self._next()[1] == "*":
                value *= self._factor(depth)
            else:
                divisor = self._factor(depth)
                value = value / divisor if divisor else math.nan
        return value

    def _factor(self, depth: int) -> float:
        if depth > _DEEPEST:
            raise self._wrong(f"deeper than {_DEEPEST} brackets and signs")
        kind, token = self._next()
        if kind == "number":
            return float(token)
        if kind == "name":
            return self._figure(re.sub(r"\s", "", token))
        if token == "-":
            return -self._factor(depth + 1)
        if token == "(":
            value = self._sum(depth + 1)
            if self._next()[1] != ")":
                raise self._wrong("a bracket is not closed")
            return value
        raise self._wrong(f"a number or a name is missing{f' before {token!r}' if token else ''}")

    def _figure(self, name: str) -> float:
        if name not in self._figures:
            raise unknown_name("figure", name, self._figures)
        value = self._figures[name]
        if math.isnan(value):
            self._missing[name] = None
        return value

    def _wrong(self, why: str) -> ConfigError:
        return ConfigError(
            f"expectation {self._text[:80]!r}: {why}; allowed: a comparison such as 'best < 0.05'"
        )
