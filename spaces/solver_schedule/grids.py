"""Time grids: where a run's points lie between noise and data.

Every grid is a function ``grid(noise, n, start, end)`` that returns (n + 1,) native times falling
from `start` to `end`, both exact. Grids are defined in lambda or in rho = sigma/alpha, so a grid of
one noise schedule and its image under another are the same points.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from searchlab.errors import SpaceError, unknown_name
from searchlab.spaces.solver_schedule.noise_schedule import FloatArray, NoiseSchedule, VpLinear

__all__ = [
    "GRIDS",
    "Grid",
    "arctan_grid",
    "grid_named",
    "karras_grid",
    "log_snr_grid",
    "time_grid",
    "vp_quadratic_grid",
    "vp_time_grid",
]

Grid = Callable[[NoiseSchedule, int, float, float], FloatArray]


def _ends(noise: NoiseSchedule, n: int, start: float, end: float) -> tuple[float, float]:
    """Log-SNR of both ends."""
    if n < 1:
        raise SpaceError(f"a grid needs n >= 1 steps, got {n}")
    if not noise.clean <= end < start <= noise.latest:
        raise SpaceError(
            f"a grid needs {noise.clean:g} <= end < start <= {noise.latest:g},"
            f" got start {start!r}, end {end!r}"
        )
    return float(noise.log_snr(start)), float(noise.log_snr(end))


def _finite_ends(noise: NoiseSchedule, n: int, start: float, end: float) -> tuple[float, float]:
    first, last = _ends(noise, n, start, end)
    if not np.isfinite([first, last]).all():
        raise SpaceError(
            f"this grid needs a finite log-SNR at both ends, got {first:g} at {start!r}"
            f" and {last:g} at {end!r}"
        )
    return first, last


def _pinned(times: FloatArray, start: float, end: float) -> FloatArray:
    times = np.array(times, dtype=np.float64)
    times[0], times[-1] = start, end
    return times


def time_grid(noise: NoiseSchedule, n: int, start: float, end: float) -> FloatArray:
    """Uniform in native time."""
    _ends(noise, n, start, end)
    return _pinned(np.linspace(start, end, n + 1), start, end)


def log_snr_grid(noise: NoiseSchedule, n: int, start: float, end: float) -> FloatArray:
    """Uniform in lambda. Source: arXiv 2206.00927, section 3.4."""
    first, last = _finite_ends(noise, n, start, end)
    return _pinned(noise.time_of_log_snr(np.linspace(first, last, n + 1)), start, end)


def karras_grid(
    noise: NoiseSchedule, n: int, start: float, end: float, *, exponent: float = 7.0
) -> FloatArray:
    """Uniform in ``rho ** (1 / exponent)``. Source: arXiv 2206.00364, eq. 5."""
    if not (np.isfinite(exponent) and exponent > 0):
        raise SpaceError(f"exponent must be positive, got {exponent!r}")
    first, last = _finite_ends(noise, n, start, end)
    roots = np.linspace(np.exp(-first / exponent), np.exp(-last / exponent), n + 1)
    return _pinned(noise.time_of_log_snr(-exponent * np.log(roots)), start, end)


_VP = VpLinear()


def vp_time_grid(noise: NoiseSchedule, n: int, start: float, end: float) -> FloatArray:
    """Uniform in the time of the linear-rate VP schedule that has the same log-SNR."""
    times = _VP.time_of_log_snr(np.array(_finite_ends(noise, n, start, end)))
    mapped = _VP.log_snr(np.linspace(times[0], times[1], n + 1))
    return _pinned(noise.time_of_log_snr(mapped), start, end)


def vp_quadratic_grid(noise: NoiseSchedule, n: int, start: float, end: float) -> FloatArray:
    """As `vp_time_grid`, uniform in the square root of that time. Source: arXiv 2010.02502, D.3."""
    times = np.sqrt(_VP.time_of_log_snr(np.array(_finite_ends(noise, n, start, end))))
    mapped = _VP.log_snr(np.linspace(times[0], times[1], n + 1) ** 2)
    return _pinned(noise.time_of_log_snr(mapped), start, end)


def arctan_grid(noise: NoiseSchedule, n: int, start: float, end: float) -> FloatArray:
    """Uniform in ``arctan(rho)``, the time of a cosine schedule; rho may be infinite."""
    first, last = _ends(noise, n, start, end)
    angles = np.linspace(np.arctan(np.exp(-first)), np.arctan(np.exp(-last)), n + 1)
    inner = np.tan(angles[1:-1])
    times = np.concatenate([[start], noise.time_of_rho(inner), [end]])
    return _pinned(times, start, end)


def _karras_3(noise: NoiseSchedule, n: int, start: float, end: float) -> FloatArray:
    return karras_grid(noise, n, start, end, exponent=3.0)


GRIDS: dict[str, Grid] = {
    "log_snr": log_snr_grid,
    "karras7": karras_grid,
    "karras3": _karras_3,
    "vp_time": vp_time_grid,
    "vp_quadratic": vp_quadratic_grid,
    "arctan": arctan_grid,
    "time": time_grid,
}
"""All grids by name; "karrasN" is `karras_grid` with exponent N."""


def grid_named(name: str) -> Grid:
    """The grid of a name.

    Raises:
        ConfigError: no such grid.
    """
    if name not in GRIDS:
        raise unknown_name("time grid", name, GRIDS)
    return GRIDS[name]
