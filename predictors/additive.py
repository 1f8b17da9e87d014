"""`additive`: what each variable adds, what signals add, and a Gaussian process for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from searchlab.predictors.base import State
from searchlab.predictors.label_numbers import numbers_of
from searchlab.predictors.preprocess import Features, Inputs
from searchlab.predictors.process import JITTER, Process
from searchlab.space import Space

__all__ = ["Additive", "Parts"]

Floats = NDArray[np.float64]

APART = 12  # variables beyond which all of them share their numbers
DECAY = 2.8  # of what is no sum, per share of elements that differ
BEND = 0.25  # length over which the effect of a number in [0, 1] changes
# Variances a priori: of all labels' effects, all lines, all bends, what is no sum, signals, noise.
LABELS, LINES, BENDS, REST, SIGNALS, NOISE = 2.0, 0.4, 0.3, 0.3, 0.3, 0.15
_WIDTHS = (0.7, 0.75)  # sd of the log of a variance a priori, and of the noise's
_LINE, _LABEL, _BEND = 0, 1, 2


@dataclass(frozen=True)
class Parts:
    """The effects that add up, as linear maps of the codes.

    Attributes:
        maps: (code_width, r), what a column of an effect is of the codes.
        shift: (r,), what is taken off it.
        part: int64 (r,), the effect that a column belongs to.
        kind: int64 (parts,), a line or labels, whose covariance is the product of their columns, or
            a bend, whose covariance falls with the distance.
    """

    maps: Floats
    shift: Floats
    part: NDArray[np.int64]
    kind: NDArray[np.int64]

    @staticmethod
    def of(space: Space) -> Parts:
        """One effect for each variable; a line besides for a choice among three numbers or more.

        Labels of an array of choices are names even where they are written as numbers.
        """
        several = len(space.variables) > APART
        maps: list[Floats] = []
        shift: list[Floats] = []
        part: list[tuple[int, int]] = []
        start = 0
        for at, variable in enumerate(space.variables.values()):
            width, size = variable.code_width, variable.size
            number = 0 if several else at

            def add(block: Floats, off: Floats, kind: int, *, number: int = number) -> None:
                whole = np.zeros((space.code_width, block.shape[1]))
                whole[start : start + len(block)] = block  # noqa: B023
                maps.append(whole)
                shift.append(off)
                part.extend([(kind, number)] * block.shape[1])

            share = 1 / math.sqrt(size * (len(space.variables) if several else 1))
            if width > size:
                add(share * np.eye(width), np.zeros(width), _LABEL)
                values = numbers_of(variable)
                if values is not None:
                    add(share * values[:, None], np.zeros(1), _LINE)
            elif width:
                unit = share * math.sqrt(12) * np.eye(width)
                add(unit, unit.sum(axis=0) / 2, _LINE)
                add(share / BEND * np.eye(width), np.zeros(width), _BEND)
            start += width
        names = sorted(set(part))
        return Parts(
            np.concatenate([np.empty((space.code_width, 0)), *maps], axis=1),
            np.concatenate([np.empty(0), *shift]),
            np.array([names.index(one) for one in part], dtype=np.int64),
            np.array([kind for kind, _ in names], dtype=np.int64),
        )

    def __call__(self, x: Floats) -> Floats:
        """The columns of all effects, (n, r)."""
        out: Floats = x @ self.maps - self.shift
        return out

    def medians(self) -> Floats:
        """Variances of the effects a priori, (parts,)."""
        whole = np.array([LINES, LABELS, BENDS])
        return whole[self.kind] / np.bincount(self.kind, minlength=3)[self.kind]

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "maps": self.maps,
            "shift": self.shift,
            "part": self.part,
            "kind": self.kind,
        }


class Additive(Process):
    """A sum: an effect of each variable, a line in the signals, and what is left.

    Every effect has a variance of its own, so that few labels tell which variables matter; a choice
    among numbers also has a line in them, or in their logs. What is no sum is drawn from a process
    that falls with the share of elements that differ. The variances have priors and are fitted by
    evidence; what is kept of the labels, and draws, see `Process`.
    """

    name: ClassVar[str] = "additive"

    def __init__(self, parts: Parts | None = None) -> None:
        super().__init__()
        self.parts = parts

    def _prepare(self, inputs: Inputs, pool: Features | None) -> None:
        self.parts = Parts.of(inputs.space)

    def _blocks(self, one: Features, other: Features) -> tuple[list[Floats], Floats]:
        """The covariances (n, m) of each part at variance 1: effects, signals, and the rest."""
        assert self.parts is not None
        ours, theirs = self.parts(one.x), self.parts(other.x)
        out = []
        for at, kind in enumerate(self.parts.kind.tolist()):
            mine = self.parts.part == at
            product = ours[:, mine] @ theirs[:, mine].T
            if kind == _BEND:
                lengths = (ours[:, mine] ** 2).sum(axis=1)[:, None]
                product = lengths + (theirs[:, mine] ** 2).sum(axis=1) - 2 * product
                product = np.exp(-np.maximum(product, 0.0))
            out.append(product)
        if one.signals.shape[1]:
            out.append(one.signals @ other.signals.T / one.signals.shape[1])
        lengths = (one.x**2).sum(axis=1)[:, None] + (other.x**2).sum(axis=1)
        apart = np.maximum(lengths - 2 * one.x @ other.x.T, 0.0) / (2 * one.elements)
        return out, np.exp(-DECAY * apart)

    def _fitted(self, features: Features, targets: Floats, some: NDArray[np.int64]) -> Floats:
        assert self.parts is not None
        rows = features.take(some)
        blocks, rest = self._blocks(rows, rows)
        stack = np.stack([*blocks, rest])
        signals = [SIGNALS] if features.signals.shape[1] else []
        median = np.log([*self.parts.medians(), *signals, REST, NOISE])
        width = np.full(len(median), _WIDTHS[0])
        width[-1] = _WIDTHS[1]
        found = minimize(
            _misfit,
            median,
            args=(stack, targets[some], median, width),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(median - 4 * width, median + 4 * width, strict=True)),
            options={"maxiter": 30},
        )
        return np.asarray(found.x, dtype=np.float64)

    def _covariance(self, one: Features, other: Features) -> Floats:
        blocks, rest = self._blocks(one, other)
        variances = np.exp(self._log)
        out: Floats = variances[-2] * rest
        for variance, block in zip(variances[:-2], blocks, strict=True):
            out += variance * block
        return out

    def _variance(self, features: Features) -> Floats:
        assert self.parts is not None
        variances = np.exp(self._log)
        kind, part = self.parts.kind, self.parts.part
        linear = np.where(kind == _BEND, 0.0, variances[: len(kind)])
        out: Floats = (self.parts(features.x) ** 2) @ linear[part]
        out += variances[-2] + variances[: len(kind)][kind == _BEND].sum()
        s = features.signals
        if s.shape[1]:
            out += variances[-3] * (s**2).mean(axis=1)
        return out

    def _state(self) -> State:
        assert self.parts is not None
        config, arrays = super()._state()
        return config, arrays | self.parts.arrays()

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        super()._restore(config, arrays)
        maps, shift = arrays["maps"], arrays["shift"]
        self.parts = Parts(maps, shift, arrays["part"], arrays["kind"])


def _misfit(
    log: Floats, stack: Floats, targets: Floats, median: Floats, width: Floats
) -> tuple[float, Floats]:
    """Negative log of evidence times prior, and its gradient."""
    variances = np.exp(log)
    covariance = np.tensordot(variances[:-1], stack, 1)
    covariance[np.diag_indices_from(covariance)] += variances[-1] + JITTER
    root = cho_factor(covariance, lower=True)
    inverse = cho_solve(root, np.eye(len(targets)))
    weights = inverse @ targets
    away = (log - median) / width
    value = 0.5 * targets @ weights + np.log(np.diag(root[0])).sum() + 0.5 * (away**2).sum()
    inner = inverse - np.outer(weights, weights)
    slopes = np.append(np.tensordot(stack, inner, 2), np.trace(inner))
    return float(value), 0.5 * variances * slopes + away / width
