"""Noise schedules: the map between a model's native time and alpha, sigma and the log-SNR.

A diffusion model's state is ``x_t = alpha(t) x_0 + sigma(t) eps``. Native time falls from `start`
(noise) to `end` (data); ``log_snr = ln(alpha/sigma)`` (lambda in the papers) rises meanwhile. Every
family is a frozen dataclass; all maps take and return float64 arrays of any shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from searchlab.errors import DataError, SpaceError

__all__ = [
    "Edm",
    "Flow",
    "FloatArray",
    "NoiseSchedule",
    "VpDiscrete",
    "VpLinear",
    "noise_schedule_from_json",
    "shifted",
]

FloatArray = NDArray[np.float64]

_VERSION = 1


@dataclass(frozen=True)
class NoiseSchedule(ABC):
    """Base of the families.

    Attributes:
        family: name of the family in files.
        clean: the native time at which sigma is 0 (alpha is 1).
    """

    family: ClassVar[str]
    clean: ClassVar[float] = 0.0

    @property
    @abstractmethod
    def start(self) -> float:
        """Native time of pure (or nearly pure) noise, where sampling starts by default."""

    @property
    @abstractmethod
    def end(self) -> float:
        """Native time at which sampling stops by default."""

    @property
    @abstractmethod
    def latest(self) -> float:
        """The largest native time that is allowed (may be infinite)."""

    @abstractmethod
    def alpha(self, t: ArrayLike) -> FloatArray:
        """Signal scale at native times `t`, in [0, 1]."""

    @abstractmethod
    def sigma(self, t: ArrayLike) -> FloatArray:
        """Noise scale at native times `t`, >= 0."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: ArrayLike) -> FloatArray:
        """Native time at which ``ln(alpha/sigma)`` takes the given values; inverts `log_snr`."""

    def log_snr(self, t: ArrayLike) -> FloatArray:
        """``ln(alpha/sigma)``; +inf where sigma is 0 and -inf where alpha is 0."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.alpha(t)) - np.log(self.sigma(t)))

    def rho(self, t: ArrayLike) -> FloatArray:
        """``sigma/alpha``, the noise level after dividing the state by alpha."""
        with np.errstate(divide="ignore"):
            return np.asarray(self.sigma(t) / self.alpha(t))

    def time_of_rho(self, rho: ArrayLike) -> FloatArray:
        """Native time at which ``sigma/alpha`` takes the given values (0 gives `clean`)."""
        with np.errstate(divide="ignore"):
            return self.time_of_log_snr(-np.log(np.asarray(rho, dtype=np.float64)))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `noise_schedule_from_json` reads."""
        answer: dict[str, Any] = {"family": self.family, "version": _VERSION}
        for f in fields(self):
            if not f.init:
                continue
            value = getattr(self, f.name)
            answer[f.name] = list(value) if isinstance(value, tuple) else value
        return answer


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise SpaceError(f"{name} must be positive and finite, got {value!r}")


def _check_start_end(start: float, end: float) -> None:
    _check_positive("start_time", start)
    _check_positive("end_time", end)
    if not end < start:
        raise SpaceError(f"end_time must lie below start_time {start!r}, got {end!r}")


@dataclass(frozen=True)
class VpLinear(NoiseSchedule):
    """Variance preserving with a rate that is linear in continuous time, t in [0, 1].

    ``ln alpha = -(beta_1 - beta_0) t^2 / 4 - beta_0 t / 2``. Source: arXiv 2011.13456, eq. 32-33.

    Attributes:
        beta_0, beta_1: rate at t = 0 and t = 1 (per unit of time).
        start_time, end_time: default ends of sampling.
    """

    family: ClassVar[str] = "vp_linear"
    beta_0: float = 0.1
    beta_1: float = 20.0
    start_time: float = 1.0
    end_time: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive("beta_0", self.beta_0)
        _check_positive("beta_1", self.beta_1)
        if self.beta_1 < self.beta_0:
            raise SpaceError(f"beta_1 must be >= beta_0 = {self.beta_0!r}, got {self.beta_1!r}")
        _check_start_end(self.start_time, self.end_time)
        if self.start_time > 1.0:
            raise SpaceError(f"start_time must be <= 1, got {self.start_time!r}")

    @property
    def start(self) -> float:
        return self.start_time

    @property
    def end(self) -> float:
        return self.end_time

    @property
    def latest(self) -> float:
        return 1.0

    def _log_alpha(self, t: ArrayLike) -> FloatArray:
        time = np.asarray(t, dtype=np.float64)
        return np.asarray(-time * (0.25 * (self.beta_1 - self.beta_0) * time + 0.5 * self.beta_0))

    def alpha(self, t: ArrayLike) -> FloatArray:
        return np.asarray(np.exp(self._log_alpha(t)))

    def sigma(self, t: ArrayLike) -> FloatArray:
        return np.asarray(np.sqrt(-np.expm1(2.0 * self._log_alpha(t))))

    def time_of_log_snr(self, log_snr: ArrayLike) -> FloatArray:
        depth = 0.5 * np.logaddexp(0.0, -2.0 * np.asarray(log_snr, dtype=np.float64))
        half = 0.5 * self.beta_0
        root = np.sqrt(half * half + (self.beta_1 - self.beta_0) * depth)
        return np.asarray(2.0 * depth / (half + root))


@lru_cache(maxsize=16)
def _named_alphas_cumprod(
    name: str, beta_start: float, beta_end: float, n: int
) -> tuple[float, ...]:
    if name == "linear":
        betas = np.linspace(beta_start, beta_end, n)
    elif name == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, n) ** 2
    else:
        u = np.arange(n + 1) / n
        bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1.0 - bar[1:] / bar[:-1], 0.999)
    return tuple(float(v) for v in np.cumprod(1.0 - betas))


@lru_cache(maxsize=16)
def _discrete_tables(alphas_cumprod: tuple[float, ...]) -> tuple[FloatArray, FloatArray]:
    """The values with 1 put in front (time -1) and half their logarithm, both read-only."""
    values = np.concatenate([[1.0], np.asarray(alphas_cumprod, dtype=np.float64)])
    logs = 0.5 * np.log(values)
    values.setflags(write=False)
    logs.setflags(write=False)
    return values, logs


_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "custom")


@dataclass(frozen=True)
class VpDiscrete(NoiseSchedule):
    """Variance preserving given by a table of training times 0..n-1.

    Fractional times interpolate ``ln alpha`` linearly; whole times give the table's values exactly
    (alpha = sqrt(a), sigma = sqrt(1 - a)). Time -1 is the clean end (a = 1).

    Attributes:
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2" (their values are computed in
            float64 from the three numbers below), or "custom" (`alphas_cumprod` is given).
        beta_start, beta_end: first and last beta; unused by the cosine one and by "custom".
        num_train_timesteps: n, the length of the table.
        alphas_cumprod: the table for "custom": n values falling from below 1 to above 0; else ().
    """

    family: ClassVar[str] = "vp_discrete"
    clean: ClassVar[float] = -1.0
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_train_timesteps: int = 1000
    alphas_cumprod: tuple[float, ...] = ()
    _key: tuple[float, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        if self.beta_schedule not in _BETA_SCHEDULES:
            allowed = ", ".join(_BETA_SCHEDULES)
            raise SpaceError(f"beta_schedule must be one of {allowed}; got {self.beta_schedule!r}")
        table = tuple(float(v) for v in self.alphas_cumprod)
        object.__setattr__(self, "alphas_cumprod", table)
        if self.beta_schedule == "custom":
            object.__setattr__(self, "num_train_timesteps", len(table))
        elif table:
            raise SpaceError("alphas_cumprod is only for beta_schedule 'custom'")
        if self.num_train_timesteps < 2:
            raise SpaceError(f"need at least 2 training times, got {self.num_train_timesteps}")
        if self.beta_schedule != "custom":
            for name in ("beta_start", "beta_end"):
                value = getattr(self, name)
                if not 0 < value < 1:
                    raise SpaceError(f"{name} must lie in (0, 1), got {value!r}")
            table = _named_alphas_cumprod(
                self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps
            )
        values = np.asarray(table)
        if not (values[-1] > 0 and values[0] < 1 and bool((np.diff(values) < 0).all())):
            raise SpaceError("alphas_cumprod must fall strictly from below 1 to above 0")
        object.__setattr__(self, "_key", table)

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> VpDiscrete:
        """The schedule of a table of betas (n,), multiplied up in float64."""
        table = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))
        return cls("custom", alphas_cumprod=tuple(float(v) for v in table))

    @property
    def start(self) -> float:
        return float(self.num_train_timesteps - 1)

    @property
    def end(self) -> float:
        return 0.0

    @property
    def latest(self) -> float:
        return float(self.num_train_timesteps - 1)

    def _alpha_squared(self, t: ArrayLike) -> FloatArray:
        time = np.asarray(t, dtype=np.float64)
        values, logs = _discrete_tables(self._key)
        below = np.clip(np.floor(time).astype(np.int64) + 1, 0, len(values) - 2)
        part = time + 1.0 - below
        mixed = np.exp(2.0 * (logs[below] + part * (logs[below + 1] - logs[below])))
        # The exponential of a logarithm may miss the table by one bit; whole times must not.
        mixed = np.where(part == 1.0, values[below + 1], mixed)
        return np.asarray(np.where(part == 0.0, values[below], mixed))

    def alpha(self, t: ArrayLike) -> FloatArray:
        return np.asarray(np.sqrt(self._alpha_squared(t)))

    def sigma(self, t: ArrayLike) -> FloatArray:
        return np.asarray(np.sqrt(1.0 - self._alpha_squared(t)))

    def time_of_log_snr(self, log_snr: ArrayLike) -> FloatArray:
        depth = 0.5 * np.logaddexp(0.0, -2.0 * np.asarray(log_snr, dtype=np.float64))
        _, logs = _discrete_tables(self._key)
        return np.asarray(np.interp(depth, -logs, np.arange(len(logs)) - 1.0))


@dataclass(frozen=True)
class Edm(NoiseSchedule):
    """Variance exploding with native time sigma: alpha = 1, sigma = t, lambda = -ln t.

    Source: arXiv 2206.00364 (sigma 80 -> 0.002). Time 0 is the clean end.
    """

    family: ClassVar[str] = "edm"
    start_time: float = 80.0
    end_time: float = 2e-3

    def __post_init__(self) -> None:
        _check_start_end(self.start_time, self.end_time)

    @property
    def start(self) -> float:
        return self.start_time

    @property
    def end(self) -> float:
        return self.end_time

    @property
    def latest(self) -> float:
        return math.inf

    def alpha(self, t: ArrayLike) -> FloatArray:
        return np.ones_like(np.asarray(t, dtype=np.float64))

    def sigma(self, t: ArrayLike) -> FloatArray:
        return np.array(t, dtype=np.float64)

    def time_of_log_snr(self, log_snr: ArrayLike) -> FloatArray:
        return np.asarray(np.exp(-np.asarray(log_snr, dtype=np.float64)))


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    """Straight path of flow matching: alpha = 1 - t, sigma = t, t from 1 (alpha 0) to 0 (clean).

    A resolution-dependent shift is a re-timing of the grid, not another schedule: see `shifted`.
    """

    family: ClassVar[str] = "flow"
    start_time: float = 1.0
    end_time: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.start_time <= 1:
            raise SpaceError(f"start_time must lie in (0, 1], got {self.start_time!r}")
        if not 0 <= self.end_time < self.start_time:
            raise SpaceError(f"end_time must lie in [0, start_time), got {self.end_time!r}")

    @property
    def start(self) -> float:
        return self.start_time

    @property
    def end(self) -> float:
        return self.end_time

    @property
    def latest(self) -> float:
        return 1.0

    def alpha(self, t: ArrayLike) -> FloatArray:
        return np.asarray(1.0 - np.asarray(t, dtype=np.float64))

    def sigma(self, t: ArrayLike) -> FloatArray:
        return np.array(t, dtype=np.float64)

    def time_of_log_snr(self, log_snr: ArrayLike) -> FloatArray:
        # 1 / (1 + e^lambda), written so that neither end overflows.
        return np.asarray(np.exp(-np.logaddexp(0.0, np.asarray(log_snr, dtype=np.float64))))


def shifted(t: ArrayLike, mu: float) -> FloatArray:
    """Flow times moved towards noise: ``mu t / (1 + (mu - 1) t)``; mu = 1 changes nothing.

    Source: arXiv 2403.03206, eq. 23.

    Raises:
        SpaceError: `mu` is not positive.
    """
    _check_positive("mu", mu)
    time = np.asarray(t, dtype=np.float64)
    return np.asarray(mu * time / (1.0 + (mu - 1.0) * time))


_FAMILIES: dict[str, type[NoiseSchedule]] = {
    cls.family: cls for cls in (VpLinear, VpDiscrete, Edm, Flow)
}


def noise_schedule_from_json(data: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule that `NoiseSchedule.to_json` wrote.

    Raises:
        DataError: unknown family, newer version, unknown or badly typed entry, or invalid value.
    """
    if not isinstance(data, Mapping):
        raise DataError(f"a noise schedule must be a JSON object, got {type(data).__name__}")
    family = data.get("family")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise DataError(f"unknown noise family {family!r}; known: {', '.join(sorted(_FAMILIES))}")
    version = data.get("version")
    if version != _VERSION:
        raise DataError(f"noise schedule version {version!r} is not readable; known: {_VERSION}")
    cls = _FAMILIES[family]
    types = {f.name: f.type for f in fields(cls) if f.init}
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name in ("family", "version"):
            continue
        if name not in types:
            raise DataError(f"unknown entry {name!r} in a noise schedule of family {family!r}")
        values[name] = _typed(name, value, str(types[name]))
    try:
        return cls(**values)
    except SpaceError as error:
        raise DataError(f"invalid noise schedule: {error}") from None


def _typed(name: str, value: object, kind: str) -> object:
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    if kind.startswith("tuple") and isinstance(value, (list, tuple)):
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
            return tuple(float(v) for v in value)
        raise DataError(f"noise schedule entry {name!r} must hold numbers only")
    raise DataError(f"noise schedule entry {name!r} must be a {kind}, got {value!r:.60}")
