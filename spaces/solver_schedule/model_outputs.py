"""What a network takes and gives in a schedule's terms: time steps, scale, data prediction."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from searchlab.errors import ConfigError
from searchlab.spaces.solver_schedule.noise_schedule import (
    Edm,
    FloatArray,
    Flow,
    NoiseSchedule,
    VpDiscrete,
)

__all__ = [
    "PREDICTION_TYPES",
    "default_prediction_type",
    "input_scale",
    "model_timesteps",
    "native_times",
    "prediction_weights",
]

PREDICTION_TYPES: dict[type[NoiseSchedule], tuple[str, ...]] = {
    VpDiscrete: ("epsilon", "sample", "v_prediction"),
    Edm: ("epsilon", "sample", "v_prediction"),
    Flow: ("flow_prediction", "sample"),
}
"""What networks of each family may predict; the first is the usual one."""


def _allowed(noise: NoiseSchedule) -> tuple[str, ...]:
    for family, types in PREDICTION_TYPES.items():
        if isinstance(noise, family):
            return types
    known = ", ".join(family.family for family in PREDICTION_TYPES)
    raise ConfigError(f"no pipeline has the noise schedule {noise.family!r}; allowed: {known}")


def default_prediction_type(noise: NoiseSchedule) -> str:
    """The usual prediction type of a noise schedule's family.

    Raises:
        ConfigError: a family that no pipeline uses.
    """
    return _allowed(noise)[0]


def prediction_weights(
    noise: NoiseSchedule, prediction_type: str, t: ArrayLike, *, sigma_data: float = 0.5
) -> tuple[FloatArray, FloatArray]:
    """Weights (a, b) of ``x_theta = a x + b output`` at native times `t`, any shape, float64.

    "v_prediction" is ``alpha eps - sigma x_0`` for VP. For EDM "epsilon" and "v_prediction" name
    the raw output F of ``c_skip x + c_out F`` with positive and negative c_out (arXiv 2206.00364,
    table 1). "flow_prediction" is ``eps - x_0``.

    Args:
        noise: the noise schedule.
        prediction_type: one of `PREDICTION_TYPES` for its family.
        t: native times; sigma > 0 there.
        sigma_data: standard deviation of the data in EDM's scalings.

    Raises:
        ConfigError: a prediction type the family does not have.
    """
    allowed = _allowed(noise)
    if prediction_type not in allowed:
        raise ConfigError(
            f"prediction_type {prediction_type!r} does not go with noise schedule"
            f" {noise.family!r}; allowed: {', '.join(allowed)}"
        )
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    if prediction_type == "sample":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction_type == "flow_prediction":
        return np.ones_like(alpha), -sigma
    if isinstance(noise, Edm):
        total = sigma**2 + sigma_data**2
        out = sigma * sigma_data / np.sqrt(total)
        return sigma_data**2 / total, out if prediction_type == "epsilon" else -out
    if prediction_type == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    return alpha, -sigma


def model_timesteps(
    noise: NoiseSchedule, t: ArrayLike, *, num_train_timesteps: int = 1000
) -> FloatArray:
    """What the network is told at native times `t`: fractional, never rounded to whole numbers.

    VP tables: t itself; flow: t times `num_train_timesteps`; EDM: ln(sigma)/4.

    Raises:
        ConfigError: a family that no pipeline uses.
    """
    _allowed(noise)
    time = np.asarray(t, dtype=np.float64)
    if isinstance(noise, Edm):
        return np.asarray(0.25 * np.log(time))
    return np.asarray(time * num_train_timesteps) if isinstance(noise, Flow) else time


def native_times(
    noise: NoiseSchedule, timesteps: ArrayLike, *, num_train_timesteps: int = 1000
) -> FloatArray:
    """Inverse of `model_timesteps`."""
    _allowed(noise)
    value = np.asarray(timesteps, dtype=np.float64)
    if isinstance(noise, Edm):
        return np.asarray(np.exp(4.0 * value))
    return np.asarray(value / num_train_timesteps) if isinstance(noise, Flow) else value


def input_scale(noise: NoiseSchedule, t: ArrayLike, *, sigma_data: float = 0.5) -> FloatArray:
    """What the state is multiplied by before the network sees it: EDM's c_in, else 1."""
    sigma = noise.sigma(t)
    if isinstance(noise, Edm):
        return np.asarray(1.0 / np.sqrt(sigma**2 + sigma_data**2))
    return np.ones_like(sigma)
