"""Missing signals, from the other signals and the codes of the same candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Imputer"]

Floats = NDArray[np.float64]

ROWS = 2000  # candidates that it learns from at most
ROUNDS = 8
_BLOCK = 1 << 20  # numbers of small matrices that are solved at once


@dataclass(frozen=True)
class Imputer:
    """The expected normal score of a missing signal, given what is there of a candidate.

    Signals and codes are taken as jointly normal. The numbers are found by expectation and
    maximisation over candidates whose signals are missing here and there, shrunk towards
    independence where candidates are few.

    Attributes:
        inner: float64 (k, k), precision of the k signals given the codes.
        slopes: float64 (k, p), of the signals' means in the centred codes.
        means: float64 (k,), of the signals.
        centre: float64 (p,), of the codes.
    """

    inner: Floats
    slopes: Floats
    means: Floats
    centre: Floats

    @staticmethod
    def of(codes: Floats, scores: Floats, missing: NDArray[np.bool_]) -> Imputer:
        """Learns from codes (n, p), and scores (n, k) with zeros where `missing` (n, k)."""
        if len(codes) > ROWS:
            some = np.linspace(0, len(codes) - 1, ROWS).round().astype(np.int64)
            codes, scores, missing = codes[some], scores[some], missing[some]
        n, p = codes.shape
        k = scores.shape[1]
        there = np.maximum((~missing).sum(axis=0), 1)
        means = scores.sum(axis=0) / there
        centre = codes.mean(axis=0)
        x = codes - centre
        # A ridge on the codes: the prior variance that all of them explain is that of a signal.
        gram = x.T @ x + max(1.0, float((x**2).sum(axis=1).mean())) * np.eye(p)
        spread = np.maximum(((scores - means) ** 2 * ~missing).sum(axis=0) / there, 1e-6)
        inner = np.diag(1 / spread)
        filled, more = np.where(missing, means, scores), np.zeros((k, k))
        slopes = np.zeros((k, p))
        for _ in range(ROUNDS if missing.any() else 1):
            slopes = np.linalg.solve(gram, x.T @ (filled - means)).T
            left = filled - means - x @ slopes.T
            found = left.T @ left + more
            # As many candidates' worth of belief that signals are independent.
            prior = 2.0 + k / 2
            covariance = (found + prior * np.diag(np.diag(found) / n + 1e-3)) / (n + prior)
            inner = np.linalg.inv(covariance)
            now = Imputer(inner, slopes, means, centre)
            filled, more = now._expected(codes, scores, missing, spread=True)
            means = filled.mean(axis=0)
        return Imputer(inner, slopes, means, centre)

    def __call__(self, codes: Floats, scores: Floats, missing: NDArray[np.bool_]) -> Floats:
        """The scores (n, k) with what is expected where `missing` (n, k)."""
        return self._expected(codes, scores, missing)[0]

    def _expected(
        self,
        codes: Floats,
        scores: Floats,
        missing: NDArray[np.bool_],
        *,
        spread: bool = False,
    ) -> tuple[Floats, Floats]:
        """Filled scores, and the sum of what is left open of them (k, k) if `spread`."""
        k = scores.shape[1]
        out, open_ = scores.copy(), np.zeros((k, k))
        rows = np.flatnonzero(missing.any(axis=1))
        step = max(1, _BLOCK // (k * k))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            gone = missing[some].astype(np.float64)
            base = self.means + (codes[some] - self.centre) @ self.slopes.T
            known = (scores[some] - base) * (1 - gone)
            # Rows of what is there become the identity: only what is missing is solved for.
            matrix = self.inner * gone[:, :, None] * gone[:, None, :]
            matrix[:, np.arange(k), np.arange(k)] += 1 - gone
            right = -(known @ self.inner) * gone
            moved = np.linalg.solve(matrix, right[:, :, None])[:, :, 0]
            out[some] = np.where(missing[some], base + moved, scores[some])
            if spread:
                both = gone[:, :, None] * gone[:, None, :]
                open_ += (np.linalg.inv(matrix) * both).sum(axis=0)
        return out, open_

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything by name."""
        names = ("inner", "slopes", "means", "centre")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def of_arrays(arrays: Mapping[str, NDArray[Any]]) -> Imputer:
        """The inverse of `arrays`."""
        return Imputer(*(arrays[name] for name in ("inner", "slopes", "means", "centre")))
