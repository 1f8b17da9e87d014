"""Closed-form diffusion problems: exact denoisers, and exact solutions of their sampling ODE.

They let a solver be measured without a trained model. The data are a Gaussian, G(s), or a mixture
of isotropic Gaussians, M; all values are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import SpaceError
from searchlab.spaces.solver_schedule.noise_schedule import NoiseSchedule, VpLinear

__all__ = ["GaussianProblem", "MixtureProblem"]

_FloatArray = NDArray[np.float64]


def _levels(noise: NoiseSchedule, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at the native times (B,), each (B, 1, ..., 1) float64 on x's device."""
    times = t.detach().to("cpu", torch.float64).numpy()
    shape = (-1,) + (1,) * (x.ndim - 1)
    alpha = torch.from_numpy(np.ascontiguousarray(noise.alpha(times))).reshape(shape)
    sigma = torch.from_numpy(np.ascontiguousarray(noise.sigma(times))).reshape(shape)
    return alpha.to(x.device), sigma.to(x.device)


@dataclass(frozen=True)
class GaussianProblem:
    """Independent data N(mean, s^2) in any shape; s = 0 is a single data point.

    Attributes:
        noise: the noise schedule.
        s: standard deviation of the data, >= 0.
        mean: mean of the data.
    """

    noise: NoiseSchedule
    s: float
    mean: float = 0.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.s) and self.s >= 0):
            raise SpaceError(f"s must be >= 0 and finite, got {self.s!r}")
        if not np.isfinite(self.mean):
            raise SpaceError(f"mean must be finite, got {self.mean!r}")

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """The data prediction E[x_0 | x_t]: x (B, ...), t (B,) native time -> (B, ...)."""
        alpha, sigma = _levels(self.noise, x, t)
        gain = alpha * self.s**2 / (alpha**2 * self.s**2 + sigma**2)
        return (self.mean + gain * (x.double() - alpha * self.mean)).to(x.dtype)

    def reference_solution(self, x: Tensor, *, start: float, end: float) -> Tensor:
        """The exact state at native time `end` of the path through `x` (B, ...) at `start`.

        Raises:
            SpaceError: the data are a single point and `start` is clean, so the path is undefined.
        """
        variances = [
            float(self.noise.alpha(t)) ** 2 * self.s**2 + float(self.noise.sigma(t)) ** 2
            for t in (start, end)
        ]
        if variances[0] == 0:
            raise SpaceError(f"no path starts at {start!r}: the state has variance 0 there")
        ratio = float(np.sqrt(variances[1] / variances[0]))
        centred = x.double() - float(self.noise.alpha(start)) * self.mean
        return float(self.noise.alpha(end)) * self.mean + ratio * centred


def _problem_m() -> tuple[_FloatArray, _FloatArray, _FloatArray]:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(5, 4))
    deviations = rng.uniform(0.05, 0.3, 5)
    weights = rng.uniform(0.5, 1.5, 5)
    return means, deviations, weights / weights.sum()


@dataclass(frozen=True, eq=False)
class MixtureProblem:
    """A mixture of isotropic Gaussians in d dimensions.

    Without arguments this is problem M: five components in four dimensions, drawn from
    ``default_rng(0)`` (means normal, deviations uniform in 0.05..0.3, weights uniform in 0.5..1.5
    and normalised), under the linear VP schedule.

    Attributes:
        noise: the noise schedule.
        means: (k, d) component means.
        deviations: (k,) component standard deviations, > 0.
        weights: (k,) component weights, > 0, sum 1.
    """

    noise: NoiseSchedule = field(default_factory=VpLinear)
    means: _FloatArray = field(default_factory=lambda: _problem_m()[0])
    deviations: _FloatArray = field(default_factory=lambda: _problem_m()[1])
    weights: _FloatArray = field(default_factory=lambda: _problem_m()[2])

    def __post_init__(self) -> None:
        for name in ("means", "deviations", "weights"):
            array = np.array(getattr(self, name), dtype=np.float64)
            if not np.isfinite(array).all():
                raise SpaceError(f"{name} must be finite")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        k = len(self.means)
        if self.means.ndim != 2 or self.deviations.shape != (k,) or self.weights.shape != (k,):
            raise SpaceError(
                f"means (k, d) need k deviations and weights, got {self.means.shape},"
                f" {self.deviations.shape}, {self.weights.shape}"
            )
        if not (self.deviations > 0).all() or not (self.weights > 0).all():
            raise SpaceError("deviations and weights must be positive")
        if abs(self.weights.sum() - 1.0) > 1e-9:
            raise SpaceError(f"weights must sum to 1, got {self.weights.sum()!r}")

    @property
    def dimension(self) -> int:
        """d, the length of one data point."""
        return int(self.means.shape[1])

    @property
    def mean(self) -> Tensor:
        """(d,) float64 mean of the data, for schedules with an analytic first evaluation."""
        return torch.from_numpy(self.weights @ self.means)

    def start_noise(self, n: int, *, seed: int) -> Tensor:
        """(n, d) float64 standard normal values; longer draws of one seed extend shorter ones."""
        return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, self.dimension)))

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """The data prediction E[x_0 | x_t]: x (B, d), t (B,) native time -> (B, d)."""
        alpha, sigma = _levels(self.noise, x, t)
        return self._posterior_mean(x.double(), alpha, sigma).to(x.dtype)

    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x (B, d) float64; alpha, sigma (B, 1) or (1, 1)."""
        means = torch.tensor(self.means).to(x.device)  # (k, d)
        spread = torch.tensor(self.deviations).to(x.device) ** 2  # (k,)
        variance = alpha**2 * spread + sigma**2  # (B, k)
        offset = x[:, None, :] - alpha[:, :, None] * means  # (B, k, d)
        logits = torch.from_numpy(np.log(self.weights)).to(x.device) - 0.5 * (
            (offset**2).sum(-1) / variance + self.dimension * torch.log(variance)
        )
        share = torch.softmax(logits, dim=1)  # (B, k)
        gain = share * alpha * spread / variance
        return share @ means + (gain[:, :, None] * offset).sum(1)

    def reference_solution(
        self, x: Tensor, *, start: float, end: float, rtol: float = 1e-12
    ) -> Tensor:
        """The state at native time `end` of the paths through `x` (B, d) at `start`, float64.

        Solves ``dy/dlambda = x_theta - y`` for y = x / alpha by DOP853 with absolute tolerance
        `rtol`; this equals -e^(-lambda) eps.

        Raises:
            SpaceError: log-SNR is infinite at an end, or the solver fails.
        """
        from scipy.integrate import solve_ivp

        ends = [float(self.noise.log_snr(t)) for t in (start, end)]
        if not np.isfinite(ends).all():
            raise SpaceError(f"the reference needs finite log-SNR at both ends, got {ends}")
        one = torch.ones((1, 1), dtype=torch.float64)

        def slope(log_snr: float, flat: _FloatArray) -> _FloatArray:
            y = torch.from_numpy(flat.reshape(-1, self.dimension))
            sigma = torch.full_like(one, float(np.exp(-log_snr)))
            return np.asarray((self._posterior_mean(y, one, sigma) - y).numpy().ravel())

        y0 = x.detach().to("cpu", torch.float64).numpy() / float(self.noise.alpha(start))
        if y0.size == 0:
            return torch.from_numpy(y0)
        answer = solve_ivp(slope, ends, y0.ravel(), method="DOP853", rtol=rtol, atol=rtol)
        if not answer.success:
            raise SpaceError(f"the reference solver failed: {answer.message}")
        final = answer.y[:, -1].reshape(y0.shape) * float(self.noise.alpha(end))
        return torch.from_numpy(np.ascontiguousarray(final))
