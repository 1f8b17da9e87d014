"""Families of fixed points: the baselines a search has to beat, all of them at one number of calls.

Two settings of one family may be the same point (`lower_order_final` does nothing at order 1, or
with order 2 and a clean end): names are kept apart, equal points share their canonical form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from searchlab.errors import ConfigError, SpaceError
from searchlab.spaces.solver_schedule import points
from searchlab.spaces.solver_schedule.grids import GRIDS
from searchlab.spaces.solver_schedule.noise_schedule import FloatArray, NoiseSchedule
from searchlab.spaces.solver_schedule.schedule import Corrector, Prediction, Relaxation, Schedule

__all__ = ["ENDINGS", "analytic_first_family", "fixed_family"]

ENDINGS: dict[str, tuple[float, bool]] = {
    "stop_.002": (0.002, False),
    "stop_.02": (0.02, False),
    "clean_.02": (0.02, True),
    "clean_.1": (0.1, True),
}
"""Endings of the digits family: (last rho of the grid, whether one more step goes to sigma = 0)."""

_MIXTURE_GRIDS = ("log_snr", "karras7", "vp_time", "vp_quadratic")
_DIGITS_GRIDS = ("log_snr", "karras7", "karras3", "vp_time", "vp_quadratic", "arctan")

_Make = Callable[[FloatArray, NoiseSchedule, bool], Schedule]


def _multistep(order: int, prediction: Prediction, kind: Literal["bh1", "bh2"]) -> _Make:
    return lambda times, noise, final: points.unipc(
        times,
        noise,
        order=order,
        prediction=prediction,
        variant=kind,
        lower_order_final=final,
    )


# Name, maker, and whether lower_order_final makes a difference.
_DIGITS_SOLVERS: tuple[tuple[str, _Make, bool], ...] = (
    ("ddim", lambda t, s, f: points.ddim(t, s), False),
    (
        "dpmpp_2m_midpoint",
        lambda t, s, f: points.dpmpp_2m(t, s, variant="midpoint", lower_order_final=f),
        True,
    ),
    (
        "dpmpp_2m_heun",
        lambda t, s, f: points.dpmpp_2m(t, s, variant="heun", lower_order_final=f),
        True,
    ),
    ("dpm_2m_noise", lambda t, s, f: points.dpm_2m_noise(t, s, lower_order_final=f), True),
    (
        "dpmpp_3m_half",
        lambda t, s, f: points.dpmpp_3m(t, s, second_scale=0.5, lower_order_final=f),
        True,
    ),
    ("dpmpp_3m", lambda t, s, f: points.dpmpp_3m(t, s, lower_order_final=f), True),
    ("deis_2", lambda t, s, f: points.deis(t, s, order=2, lower_order_final=f), True),
    ("deis_3", lambda t, s, f: points.deis(t, s, order=3, lower_order_final=f), True),
    ("unipc_1_data_bh2", _multistep(1, "data", "bh2"), False),
    ("unipc_1_noise_bh2", _multistep(1, "noise", "bh2"), False),
    ("unipc_2_data_bh1", _multistep(2, "data", "bh1"), True),
    ("unipc_2_data_bh2", _multistep(2, "data", "bh2"), True),
    ("unipc_2_noise_bh2", _multistep(2, "noise", "bh2"), True),
    ("unipc_3_data_bh2", _multistep(3, "data", "bh2"), True),
    ("unipc_3_noise_bh2", _multistep(3, "noise", "bh2"), True),
)


def fixed_family(
    noise: NoiseSchedule,
    nfe: int,
    *,
    family: Literal["digits", "mixture"] = "digits",
    start: float | None = None,
    end: float | None = None,
) -> dict[str, Schedule]:
    """All fixed points at exactly `nfe` model calls, by name, in a fixed order.

    - "mixture": 4 grids x {noise, data} x order 1..3 x {none, bh1, bh2} (order >= 2) x
      {no corrector, pseudo} x lower_order_final: 224 points from `start` to `end`.
    - "digits": 6 grids x 4 endings x 15 solvers, 12 of them with and without lower_order_final: 648
      points. Endings are noise levels rho; an ending with a last step to sigma = 0 needs
      ``nfe >= 2`` and is left out below that.

    Args:
        noise: the noise schedule.
        nfe: number of model calls, >= 1.
        family: which family.
        start: native start time; default `noise.start`.
        end: native end time of "mixture"; default `noise.end`. "digits" has its own ends.

    Raises:
        ConfigError: unknown family, or `end` given for "digits".
        SpaceError: `nfe` below 1, or ends between which no grid fits.
    """
    if nfe < 1:
        raise SpaceError(f"nfe must be at least 1, got {nfe}")
    begin = noise.start if start is None else start
    if family == "mixture":
        return dict(_mixture(noise, nfe, begin, noise.end if end is None else end))
    if family != "digits":
        raise ConfigError(f"family must be digits or mixture, got {family!r}")
    if end is not None:
        raise ConfigError(f"the digits family has its own endings; end must be None, got {end!r}")
    return dict(_digits(noise, nfe, begin))


def analytic_first_family(
    noise: NoiseSchedule,
    nfe: int,
    *,
    family: Literal["digits", "mixture"] = "digits",
    first_evaluation: Literal["zero", "mean"] = "mean",
    start: float | None = None,
    end: float | None = None,
) -> dict[str, Schedule]:
    """`fixed_family` with an analytic first evaluation: one more step at the same `nfe` calls.

    Common solvers do not do this, so these points are kept apart from `fixed_family`; each name
    ends in "+zero" or "+mean".
    """
    plain = fixed_family(noise, nfe + 1, family=family, start=start, end=end)
    return {
        f"{name}+{first_evaluation}": points.with_first_evaluation(s, first_evaluation)
        for name, s in plain.items()
    }


def _mixture(
    noise: NoiseSchedule, nfe: int, start: float, end: float
) -> Iterator[tuple[str, Schedule]]:
    predictions: tuple[Prediction, ...] = ("data", "noise")
    relaxations: tuple[Relaxation, ...] = ("none", "bh1", "bh2")
    correctors: tuple[Corrector, ...] = ("none", "pseudo")
    for grid in _MIXTURE_GRIDS:
        times = GRIDS[grid](noise, nfe, start, end)
        for prediction in predictions:
            for order in (1, 2, 3):
                for relaxation in relaxations if order > 1 else relaxations[:1]:
                    for corrector in correctors:
                        for final in (True, False):
                            name = (
                                f"{grid}/{prediction}/q{order}/{relaxation}/{corrector}"
                                f"/{'final' if final else 'full'}"
                            )
                            yield (
                                name,
                                points.multistep(
                                    times,
                                    noise,
                                    order=order,
                                    prediction=prediction,
                                    relaxation=relaxation,
                                    corrector=corrector,
                                    lower_order_final=final,
                                ),
                            )


def _digits(noise: NoiseSchedule, nfe: int, start: float) -> Iterator[tuple[str, Schedule]]:
    for grid in _DIGITS_GRIDS:
        for ending, (rho, clean) in ENDINGS.items():
            n = nfe - clean
            if n < 1:
                continue
            last = float(noise.time_of_rho(rho))
            times = GRIDS[grid](noise, n, start, last)
            if clean:
                times = np.append(times, noise.clean)
            for solver, make, ends_matter in _DIGITS_SOLVERS:
                for final in (True, False) if ends_matter else (True,):
                    suffix = "" if final else "/full"
                    yield f"{grid}/{ending}/{solver}{suffix}", make(times, noise, final)
