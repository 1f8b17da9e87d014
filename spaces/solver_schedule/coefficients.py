"""Coefficients of one exponential-integrator step, in float64 on the host.

With s the start and t the arrival of a step, h = lambda_t - lambda_s > 0 and m the data or the
noise prediction, the exact solution is (arXiv 2211.01095, eq. 8; arXiv 2206.00927, eq. 3.4)

- data:  x_t = (sigma_t / sigma_s) x_s + alpha_t * Int e^(lambda - lambda_t) m dlambda
- noise: x_t = (alpha_t / alpha_s) x_s - sigma_t * Int e^(lambda_t - lambda) m dlambda

and m is replaced by its Taylor polynomial at s with estimated derivatives. A search compiles
thousands of schedules of ten steps, so the small systems are solved in closed form with plain
floats: numpy's per-call cost on arrays of three numbers is larger than the whole computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from searchlab.errors import SpaceError
from searchlab.spaces.solver_schedule.noise_schedule import FloatArray, NoiseSchedule
from searchlab.spaces.solver_schedule.schedule import Interpolation, Relaxation

__all__ = [
    "Point",
    "StepWeights",
    "derivative_weights",
    "phi_functions",
    "relaxation_factor",
    "step_weights",
]

_FACTORIALS = tuple(math.factorial(k) for k in range(32))
_SERIES_TERMS = 20
# The upward recursion divides a difference by z at each level. Below |z| = 1 that loses digits, and
# there 20 terms of the series are exact to the last bit.
_SERIES_LIMIT = 1.0
_QUADRATURE_NODES = 32


def phi_functions(z: float, n: int) -> list[float]:
    """phi_1(z) .. phi_n(z), with phi_1(z) = (e^z - 1)/z and phi_{k+1} = (phi_k - 1/k!)/z.

    Args:
        z: any finite number; phi_k(0) = 1/k!.
        n: how many, 1..8.
    """
    if abs(z) < _SERIES_LIMIT:
        # phi_n = sum_i z^i / (i + n)!, then downwards, which multiplies errors by z < 1.
        value = 0.0
        for i in range(_SERIES_TERMS - 1, -1, -1):
            value = value * z + 1.0 / _FACTORIALS[i + n]
        answer = [value]
        for k in range(n - 1, 0, -1):
            value = value * z + 1.0 / _FACTORIALS[k]
            answer.append(value)
        answer.reverse()
        return answer
    value = math.expm1(z) / z
    answer = [value]
    for k in range(1, n):
        value = (value - 1.0 / _FACTORIALS[k]) / z
        answer.append(value)
    return answer


def derivative_weights(d: Sequence[float]) -> list[list[float]]:
    """Weights a with ``m^(k)(s) ~ sum_j a[k-1][j] (m_j - m_s)`` for k = 1..p, p = len(d).

    They solve ``sum_j a_j d_j^r / r! = [r = k]``, r = 1..p: the solution is k! times the
    coefficient of d^k in the Lagrange polynomial of node j, which needs no elimination.

    Args:
        d: distances of the active points from the start in the interpolation variable; distinct and
            not 0.
    """
    p = len(d)
    if p == 1:
        return [[1.0 / d[0]]]
    answer = [[0.0] * p for _ in range(p)]
    for j, dj in enumerate(d):
        # Coefficients of d * prod_{i != j} (d - d_i), lowest (d^1) first.
        poly = [1.0]
        scale = dj
        for i, di in enumerate(d):
            if i == j:
                continue
            scale *= dj - di
            raised = [0.0, *poly]
            for e, c in enumerate(poly):
                raised[e] -= di * c
            poly = raised
        for k, c in enumerate(poly):
            answer[k][j] = _FACTORIALS[k + 1] * c / scale
    return answer


def relaxation_factor(kind: Relaxation, z: float, h: float, coefficient: float) -> float:
    """R = 1 + O(h), the factor on the estimated first derivative.

    Args:
        kind: the decision; "none" gives 1.
        z: h for the noise, -h for the data prediction.
        h: the step in lambda, > 0.
        coefficient: c of "linear", R = 1 + c h.

    Source: arXiv 2312.07243, section 3; bh1 and bh2 are the B(h) of arXiv 2302.04867, written as
    R = B(z) / (2 z phi_2(z)) with B = z and e^z - 1.
    """
    if kind == "none":
        return 1.0
    if kind == "linear":
        return 1.0 + coefficient * h
    if kind == "plus_half_exp":
        return 1.0 + 0.5 * math.expm1(z)
    if kind == "minus_half_exp":
        return 1.0 - 0.5 * math.expm1(z)
    phi_1, phi_2 = phi_functions(z, 2)
    if kind == "bh1":
        return 0.5 / phi_2
    if kind == "bh2":
        return 0.5 * phi_1 / phi_2
    raise SpaceError(f"unknown relaxation {kind!r}")


@dataclass(frozen=True, slots=True)
class Point:
    """Where a point of the trajectory lies; all plain floats.

    Attributes:
        alpha, sigma, log_snr: of the noise schedule at the point.
        variable: value of the interpolation variable there.
    """

    alpha: float
    sigma: float
    log_snr: float
    variable: float


@dataclass(frozen=True, slots=True)
class StepWeights:
    """x_t = state x_s + start m_s + sum_j points[j] m_j, with m in the step's prediction type."""

    state: float
    start: float
    points: tuple[float, ...]


@lru_cache(maxsize=1)
def _legendre() -> tuple[FloatArray, FloatArray]:
    nodes, weights = np.polynomial.legendre.leggauss(_QUADRATURE_NODES)
    return 0.5 * (nodes + 1.0), 0.5 * weights


def _moments(
    noise: NoiseSchedule, interpolation: Interpolation, data: bool, s: Point, t: Point, n: int
) -> list[float]:
    """Int w(lambda) (v - v_s)^k / k! dlambda for k = 1..n, w the kernel with its outer factor.

    For lambda itself the integral is h^(k+1) phi_{k+1}; otherwise it is a Gauss-Legendre sum in
    lambda, exact to rounding for smooth schedules.
    """
    h = t.log_snr - s.log_snr
    outer = t.alpha if data else -t.sigma
    if interpolation == "log_snr":
        phis = phi_functions(-h if data else h, n + 1)
        return [outer * h ** (k + 1) * phis[k] for k in range(1, n + 1)]
    u, w = _legendre()
    at = s.log_snr + h * u
    v = noise.time_of_log_snr(at) if interpolation == "time" else np.exp(-at)
    distance = v - s.variable
    kernel = (outer * h) * w * np.exp((at - t.log_snr) if data else (t.log_snr - at))
    return [float(kernel @ distance**k) / _FACTORIALS[k] for k in range(1, n + 1)]


def step_weights(
    s: Point,
    t: Point,
    active: Sequence[Point],
    *,
    data: bool,
    noise: NoiseSchedule,
    interpolation: Interpolation = "log_snr",
    estimators: Sequence[int] | None = None,
    relaxation: Relaxation = "none",
    coefficient: float = 0.0,
    scales: Sequence[float] = (),
) -> StepWeights:
    """Weights of one Taylor step of order ``len(active) + 1``.

    Args:
        s: the start; alpha 0 (lambda = -inf) only without active points and for data.
        t: the arrival; sigma 0 (lambda = +inf) only without active points.
        active: the active points, finite lambda, all different from `s` and from one another.
        data: whether data predictions are expanded, else noise predictions.
        noise: needed when the interpolation variable is not lambda.
        interpolation: the variable of the Taylor polynomial.
        estimators: positions in `active` that estimate the first derivative; None means all.
        relaxation, coefficient: factor on the first derivative, see `relaxation_factor`.
        scales: factors of the second, third, ... derivative.
    """
    h = t.log_snr - s.log_snr
    if data:
        state = t.sigma / s.sigma
        start = -t.alpha * math.expm1(-h)
    else:
        state = t.alpha / s.alpha
        # sigma_t (e^h - 1), whose limit at sigma_t = 0 is alpha_t sigma_s / alpha_s.
        start = -t.sigma * math.expm1(h) if t.sigma > 0 else -t.alpha * s.sigma / s.alpha
    p = len(active)
    if p == 0:
        return StepWeights(state, start, ())
    distances = [a.variable - s.variable for a in active]
    moments = _moments(noise, interpolation, data, s, t, p)
    rows = derivative_weights(distances)
    if estimators is not None:
        first = [0.0] * p
        chosen = derivative_weights([distances[j] for j in estimators])[0]
        for j, weight in zip(estimators, chosen, strict=True):
            first[j] = weight
        rows[0] = first
    if relaxation != "none":
        moments[0] *= relaxation_factor(relaxation, h if not data else -h, h, coefficient)
    for k, scale in enumerate(scales[: p - 1], start=1):
        moments[k] *= scale
    points = []
    for j in range(p):
        weight = 0.0
        for k in range(p):
            weight += moments[k] * rows[k][j]
        points.append(weight)
    return StepWeights(state, start - math.fsum(points), tuple(points))
