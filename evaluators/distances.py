"""Distances between samples and data in a feature space: Fréchet distance and kernel distance.

Everything is float64 on the CPU. Features may be numpy arrays or torch tensors of any device.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from searchlab.errors import EvaluationError

__all__ = [
    "FeatureStatistics",
    "Features",
    "FrechetReference",
    "frechet_distance",
    "frechet_distances",
    "kid",
]

Array: TypeAlias = npt.NDArray[np.float64]
Features: TypeAlias = npt.NDArray[np.floating] | torch.Tensor

_KERNEL_ROWS = 1024  # rows of a kernel matrix held at a time
_LARGE = 256  # features from which L' S L, at half the cost, replaces R S R
_FULL_RANK = 1e-10  # least of the largest eigenvalue, below which a covariance has no factor


def _as_array(features: Features, dimensions: int) -> Array:
    """The features as float64 with the given number of axes; not checked for finite values."""
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu().numpy()
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != dimensions:
        raise EvaluationError(f"features have shape {array.shape}; {dimensions} axes are needed")
    return array


def _finite_rows(features: Features) -> Array:
    """(n, d) features as float64; rows with NaN or infinity are an error."""
    array = _as_array(features, 2)
    bad = int(np.count_nonzero(~np.isfinite(array).all(axis=1)))
    if bad:
        raise EvaluationError(f"{bad} of {len(array)} feature rows are not finite")
    return array


class FeatureStatistics:
    """Mean and covariance of features that arrive in parts.

    Sums are taken of features minus a fixed shift, which keeps the covariance from cancelling when
    the mean is large against the spread. Up to d - 1 rows are kept as they are, because with fewer
    rows than dimensions they are smaller than the outer product and give a faster distance.
    The cut into parts changes results by rounding only (1e-12 relative).

    Attributes:
        shift: (d,) float64, subtracted from every row: the mean of the reference.
        count: Rows seen so far.
    """

    def __init__(self, shift: npt.ArrayLike) -> None:
        self.shift: Array = np.array(shift, dtype=np.float64)
        if self.shift.ndim != 1 or not np.isfinite(self.shift).all():
            raise EvaluationError(f"shift has shape {self.shift.shape}; (d,) finite is needed")
        self.count = 0
        self._rows: list[Array] | None = []
        self._sum = np.zeros_like(self.shift)
        self._outer = np.zeros((self.shift.size, self.shift.size))

    @property
    def size(self) -> int:
        """Number of features d."""
        return int(self.shift.size)

    def add(self, features: Features) -> None:
        """Takes more rows.

        Args:
            features: (n, d) floating point; n may be 0.

        Raises:
            EvaluationError: For another shape, or rows with NaN or infinity (their number is named;
                nothing is added).
        """
        array = _finite_rows(features)
        if array.shape[1] != self.size:
            raise EvaluationError(f"features have {array.shape[1]} columns; {self.size} are needed")
        self._take(array - self.shift)

    def merge(self, other: FeatureStatistics) -> None:
        """Takes the rows that another object with the same shift has seen.

        Raises:
            EvaluationError: If the shifts differ.
        """
        if not np.array_equal(self.shift, other.shift):
            raise EvaluationError("statistics with different shifts cannot be merged")
        if other._rows is not None:
            for rows in list(other._rows):
                self._take(rows)
            return
        self._condense()
        self.count += other.count
        self._sum = self._sum + other._sum
        self._outer = self._outer + other._outer

    def mean(self) -> Array:
        """(d,) mean of the rows.

        Raises:
            EvaluationError: Without rows.
        """
        if self.count < 1:
            raise EvaluationError("0 feature rows; a mean needs at least 1")
        return self.shift + self._shifted_sum() / self.count

    def covariance(self) -> Array:
        """(d, d) unbiased covariance of the rows.

        Raises:
            EvaluationError: With fewer than 2 rows.
        """
        self._need_two()
        if self._rows is not None:
            centred = self._centred()
            return centred.T @ centred / (self.count - 1)
        mean = self._sum / self.count
        return (self._outer - self.count * np.outer(mean, mean)) / (self.count - 1)

    def centred_rows(self) -> Array | None:
        """(n, d) rows minus their mean while there are fewer than d of them, else None.

        Raises:
            EvaluationError: With fewer than 2 rows.
        """
        self._need_two()
        return None if self._rows is None else self._centred()

    def _take(self, shifted: Array) -> None:
        self.count += len(shifted)
        if self._rows is not None and self.count < self.size:
            self._rows.append(shifted)
            return
        self._condense()
        self._add_sums(shifted)

    def _condense(self) -> None:
        """Replaces kept rows by their sums."""
        rows, self._rows = self._rows, None
        for part in rows or ():
            self._add_sums(part)

    def _add_sums(self, shifted: Array) -> None:
        self._sum = self._sum + shifted.sum(axis=0)
        self._outer = self._outer + shifted.T @ shifted

    def _shifted_sum(self) -> Array:
        if self._rows is None:
            return self._sum
        total: Array = np.concatenate(self._rows).sum(axis=0)
        return total

    def _centred(self) -> Array:
        rows = np.concatenate(self._rows or [np.zeros((0, self.size))])
        centred: Array = rows - rows.mean(axis=0)
        return centred

    def _need_two(self) -> None:
        if self.count < 2:
            raise EvaluationError(f"{self.count} feature rows; a covariance needs at least 2")


@dataclass(frozen=True, eq=False)
class FrechetReference:
    """The fixed side of a Fréchet distance, with the root of its covariance.

    Attributes:
        mean: (d,) float64 mean.
        covariance: (d, d) float64, symmetric and positive semi-definite.
        root: (d, d) symmetric root R of the covariance.
        factor: (d, d) lower L with L L' = the covariance, for `_LARGE` features and more where the
            covariance has full rank; else None.
        trace: Trace of the covariance.

    Raises:
        EvaluationError: If the shapes do not fit, or the covariance is not finite, symmetric and
            positive semi-definite.
    """

    mean: Array
    covariance: Array
    root: Array = field(init=False)
    factor: Array | None = field(init=False)
    trace: float = field(init=False)

    def __post_init__(self) -> None:
        centre = np.array(self.mean, dtype=np.float64)
        spread = np.array(self.covariance, dtype=np.float64)
        if centre.ndim != 1 or spread.shape != (centre.size, centre.size):
            raise EvaluationError(
                f"mean {centre.shape} and covariance {spread.shape} do not fit; "
                "(d,) and (d, d) are needed"
            )
        if not (np.isfinite(centre).all() and np.isfinite(spread).all()):
            raise EvaluationError("the reference mean or covariance is not finite")
        if not np.allclose(spread, spread.T, rtol=1e-8, atol=1e-12 * float(abs(spread).max())):
            raise EvaluationError("the reference covariance is not symmetric")
        values, vectors = np.linalg.eigh((spread + spread.T) / 2)
        if values[0] < -1e-8 * max(float(values[-1]), 0.0):
            raise EvaluationError(
                f"the reference covariance has the eigenvalue {values[0]:.3g}; "
                "it must be positive semi-definite"
            )
        root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
        for name, array in (("mean", centre), ("covariance", spread), ("root", root)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "trace", float(np.trace(spread)))
        factor: Array | None = None
        if centre.size >= _LARGE and values[0] > _FULL_RANK * values[-1]:
            factor = np.asfortranarray(np.linalg.cholesky((spread + spread.T) / 2))
            factor.setflags(write=False)
        object.__setattr__(self, "factor", factor)

    @property
    def digest(self) -> str:
        """sha256 of mean and covariance, for the provenance of a result."""
        return hashlib.sha256(self.mean.tobytes() + self.covariance.tobytes()).hexdigest()

    @classmethod
    def from_features(cls, features: Features) -> FrechetReference:
        """From the (n, d) features of the data, n at least 2; unbiased covariance.

        Raises:
            EvaluationError: For too few rows, or rows that are not finite.
        """
        array = _finite_rows(features)
        if len(array) < 2:
            raise EvaluationError(f"{len(array)} feature rows; a covariance needs at least 2")
        mean = array.mean(axis=0)
        centred = array - mean
        return cls(mean, centred.T @ centred / (len(array) - 1))

    def statistics(self) -> FeatureStatistics:
        """Empty statistics for samples, shifted by the mean of this reference."""
        return FeatureStatistics(self.mean)


def frechet_distance(statistics: FeatureStatistics, reference: FrechetReference) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the normal laws with these moments.

    |m - m_r|^2 + tr S + tr S_r - 2 sum sqrt(eig(R S R)), R the symmetric root of S_r (with many
    features L' S L, S_r = L L', which has the same eigenvalues), and with fewer rows than features
    the same sum from the small matrix X_c S_r X_c' / (N - 1). No matrix
    root per call, unlike the common sqrtm(S S_r) form, which it equals for full-rank references.
    The distance falls with the number of rows N (by about d/N + d(d+1)/(4N) for white features):
    never compare distances of different N.

    Args:
        statistics: Of at least 2 sample rows.
        reference: The data.

    Returns:
        The distance, in units of squared features, 0 or more.

    Raises:
        EvaluationError: If the sizes differ or there are fewer than 2 rows.

    Source: arXiv 1706.08500, eq. 6.
    """
    offset, trace, product = _parts(statistics, reference)
    return float(_combine(offset, trace, _eigenvalues(product), reference))


def frechet_distances(features: Features, reference: FrechetReference) -> Array:
    """Fréchet distances of a whole population.

    Each value has the same bits as `frechet_distance` of statistics that got the rows of that
    candidate in one `add`.

    Args:
        features: (C, N, d), N at least 2.
        reference: The data.

    Returns:
        (C,) float64. A candidate with a row that is not finite gets NaN, so that one diverged
        candidate does not cost the others.

    Raises:
        EvaluationError: For another shape or fewer than 2 rows.
    """
    array = _as_array(features, 3)
    count, rows, size = array.shape
    if size != reference.mean.size or rows < 2:
        raise EvaluationError(
            f"features have shape {array.shape}; (C, N >= 2, {reference.mean.size}) is needed"
        )
    distances = np.full(count, np.nan)
    usable = np.flatnonzero(np.isfinite(array).all(axis=(1, 2)))
    if not len(usable):
        return distances
    offsets, traces, products = [], [], []
    for candidate in usable:
        statistics = reference.statistics()
        statistics.add(array[candidate])
        offset, trace, product = _parts(statistics, reference)
        offsets.append(offset)
        traces.append(trace)
        products.append(product)
    values = np.stack([_eigenvalues(product) for product in products])
    distances[usable] = _combine(np.array(offsets), np.array(traces), values, reference)
    return distances


def _parts(
    statistics: FeatureStatistics, reference: FrechetReference
) -> tuple[float, float, Array]:
    """Squared offset of the means, trace of S, and the symmetric matrix whose roots are summed."""
    if statistics.size != reference.mean.size:
        raise EvaluationError(
            f"statistics of {statistics.size} features against {reference.mean.size} of the data"
        )
    difference = statistics.mean() - reference.mean
    offset = float(difference @ difference)
    rows = statistics.centred_rows()
    if rows is not None:
        scaled = rows @ reference.root / math.sqrt(statistics.count - 1)
        return offset, float((rows**2).sum()) / (statistics.count - 1), scaled @ scaled.T
    covariance = statistics.covariance()
    if reference.factor is not None:
        from scipy.linalg.lapack import dsygst

        trace = float(np.trace(covariance))
        # Columns first, as LAPACK has it: symmetric matrices need no copy for that.
        half, _ = dsygst(covariance.T, reference.factor, itype=2, lower=1, overwrite_a=1)
        return offset, trace, half  # the lower half is all that is read
    product = reference.root @ covariance @ reference.root
    return offset, float(np.trace(covariance)), (product + product.T) / 2


def _eigenvalues(product: Array) -> Array:
    """Of a symmetric matrix, of which the lower half is read."""
    if len(product) >= _LARGE:
        from scipy.linalg import eigh

        large: Array = eigh(
            product, eigvals_only=True, lower=True, check_finite=False, overwrite_a=True
        )
        return large
    small: Array = np.linalg.eigvalsh(product).astype(np.float64, copy=False)
    return small


def _combine(
    offset: float | Array, trace: float | Array, values: Array, reference: FrechetReference
) -> Array:
    roots = np.sqrt(values.clip(min=0.0)).sum(axis=-1)
    distance: Array = np.maximum(offset + trace + reference.trace - 2 * roots, 0.0)
    return distance


def kid(
    features: Features, reference_features: Features, *, block: int | None = None
) -> tuple[float, float]:
    """Kernel distance: the unbiased squared maximum mean discrepancy with a cubic kernel.

    k(x, y) = (x.y / d + 1)^3, without the diagonals. Unbiased for any number of rows, so values of
    different N may be compared, and equal laws may give a negative value.

    Args:
        features: (n, d), n at least 2.
        reference_features: (m, d), m at least 2.
        block: Rows per block, at least 2. min(n, m) // block disjoint blocks of both sides are
            estimated apart. Their rows are drawn by a fixed shuffle, because data sets are often
            ordered, or cycle through their classes. None takes all rows in one estimate.

    Returns:
        The mean over blocks, and its standard error (NaN with a single block).

    Raises:
        EvaluationError: For shapes that do not fit, rows that are not finite, or a block that is
            too small or too large.

    Source: arXiv 1801.01401, section 4.
    """
    x, y = _finite_rows(features), _finite_rows(reference_features)
    if x.shape[1] != y.shape[1]:
        raise EvaluationError(f"{x.shape[1]} features against {y.shape[1]} of the data")
    least = min(len(x), len(y))
    if least < 2:
        raise EvaluationError(f"{least} feature rows; a kernel distance needs at least 2")
    if block is None:
        return _discrepancy(x, y), math.nan
    if not 2 <= block <= least:
        raise EvaluationError(f"block is {block}; it must be 2 to {least}, the smaller row count")
    blocks = least // block
    x, y = x[_shuffle(len(x), 0)], y[_shuffle(len(y), 1)]
    cuts = [slice(j * block, (j + 1) * block) for j in range(blocks)]
    values = np.array([_discrepancy(x[cut], y[cut]) for cut in cuts])
    error = float(values.std(ddof=1)) / math.sqrt(blocks) if blocks > 1 else math.nan
    return float(values.mean()), error


def _discrepancy(x: Array, y: Array) -> float:
    within_x = (_kernel_sum(x, x) - _kernel_diagonal(x)) / (len(x) * (len(x) - 1))
    within_y = (_kernel_sum(y, y) - _kernel_diagonal(y)) / (len(y) * (len(y) - 1))
    return within_x + within_y - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _shuffle(rows: int, side: int) -> npt.NDArray[np.intp]:
    """A fixed order of the rows, the same on every platform."""
    words = np.asarray(np.random.Philox(key=side).random_raw(rows))
    return np.argsort(words, kind="stable")


def _cubed(values: Array) -> Array:
    # Far faster than a power with an exponent.
    return values * values * values


def _kernel_sum(x: Array, y: Array) -> float:
    size = x.shape[1]
    parts = (x[start : start + _KERNEL_ROWS] for start in range(0, len(x), _KERNEL_ROWS))
    return math.fsum(float(_cubed(part @ y.T / size + 1).sum()) for part in parts)


def _kernel_diagonal(x: Array) -> float:
    return float(_cubed((x**2).sum(axis=1) / x.shape[1] + 1).sum())
