"""Known solvers as points of the space: functions from a time grid to a `Schedule`.

A `times` argument is (n + 1,) falling native times; a last time with sigma = 0 is reached by an
order-1 step without corrector whatever the solver. `lower_order_final` caps the order of the last
steps by what is left (1 on the last step, 2 on the one before, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from searchlab.errors import SpaceError
from searchlab.spaces.solver_schedule.noise_schedule import FloatArray, NoiseSchedule
from searchlab.spaces.solver_schedule.schedule import (
    Corrector,
    Interpolation,
    Prediction,
    Relaxation,
    Schedule,
    Step,
)

__all__ = [
    "ddim",
    "deis",
    "dpm_2m_noise",
    "dpm_solver_2s",
    "dpm_solver_3s",
    "dpmpp_2m",
    "dpmpp_3m",
    "multistep",
    "singlestep",
    "singlestep_times",
    "unipc",
    "with_first_evaluation",
]

RelaxationOf = Callable[[int], Relaxation]


def multistep(
    times: ArrayLike,
    noise: NoiseSchedule,
    *,
    order: int,
    prediction: Prediction,
    relaxation: Relaxation | RelaxationOf = "none",
    corrector: Corrector = "none",
    scales: tuple[float, ...] = (),
    lower_order_final: bool = True,
    interpolation: Interpolation = "log_snr",
) -> Schedule:
    """The general multistep solver; the named ones below are settings of it.

    Args:
        times: (n + 1,) falling native times.
        noise: the noise schedule.
        order: q in 1..4; the first steps ramp up to it.
        prediction: data or noise, for all steps.
        relaxation: for all steps, or a function of a step's order.
        corrector: for all steps but the last, and none from alpha = 0.
        scales: factors of the second, third, ... derivative of steps of order >= 3.
        lower_order_final: cap the order of the last steps by the number of steps left.
        interpolation: variable the active points are interpolated in.
    """
    at = [float(v) for v in np.asarray(times, dtype=np.float64).ravel()]
    n = len(at) - 1
    if n < 1:
        raise SpaceError(f"times must hold at least 2 values, got {len(at)}")
    from_noise = float(noise.alpha(at[0])) == 0.0
    to_clean = float(noise.sigma(at[-1])) == 0.0
    steps = []
    for i in range(n):
        q = min(order, i + 1)
        if lower_order_final:
            q = min(q, n - i)
        if i == n - 1 and to_clean:
            q = 1
        bare = i == n - 1 or (i == 0 and from_noise)
        steps.append(
            Step(
                at[i + 1],
                prediction=prediction,
                order=q,
                relaxation=relaxation if isinstance(relaxation, str) else relaxation(q),
                corrector="none" if bare else corrector,
                scales=scales if q >= 3 else (),
            )
        )
    return Schedule(noise, at[0], tuple(steps), interpolation=interpolation)


def ddim(times: ArrayLike, noise: NoiseSchedule) -> Schedule:
    """DDIM without noise; also Euler in sigma and flow-matching Euler. Source: arXiv 2010.02502."""
    return multistep(times, noise, order=1, prediction="data")


def dpmpp_2m(
    times: ArrayLike,
    noise: NoiseSchedule,
    *,
    variant: Literal["midpoint", "heun"] = "midpoint",
    lower_order_final: bool = True,
) -> Schedule:
    """DPM-Solver++(2M). Source: arXiv 2211.01095, algorithm 2 (midpoint) and appendix (Heun)."""
    return multistep(
        times,
        noise,
        order=2,
        prediction="data",
        relaxation=_relaxation_of(variant),
        lower_order_final=lower_order_final,
    )


def dpm_2m_noise(
    times: ArrayLike,
    noise: NoiseSchedule,
    *,
    variant: Literal["midpoint", "heun"] = "midpoint",
    lower_order_final: bool = True,
) -> Schedule:
    """DPM-Solver-2 as a multistep method on noise predictions. Source: arXiv 2206.00927."""
    return multistep(
        times,
        noise,
        order=2,
        prediction="noise",
        relaxation=_relaxation_of(variant),
        lower_order_final=lower_order_final,
    )


def dpmpp_3m(
    times: ArrayLike,
    noise: NoiseSchedule,
    *,
    second_scale: float = 1.0,
    prediction: Prediction = "data",
    variant: Literal["midpoint", "heun"] = "midpoint",
    lower_order_final: bool = True,
) -> Schedule:
    """DPM-Solver++(3M): order 3 once two older evaluations exist.

    Args:
        times, noise: as in `multistep`.
        second_scale: rho_2, the factor of the second derivative. 1 is the true third-order solver;
            0.5 is what diffusers computes, which is only of second order.
        prediction: data, or noise for the variant without "++".
        variant: form of the order-2 steps.
        lower_order_final: as in `multistep`.
    """
    order_2 = _relaxation_of(variant)
    return multistep(
        times,
        noise,
        order=3,
        prediction=prediction,
        relaxation=lambda q: order_2 if q == 2 else "none",
        scales=(second_scale,) if second_scale != 1.0 else (),
        lower_order_final=lower_order_final,
    )


def deis(
    times: ArrayLike,
    noise: NoiseSchedule,
    *,
    order: int = 2,
    interpolation: Interpolation = "log_snr",
    lower_order_final: bool = True,
) -> Schedule:
    """DEIS on noise predictions; `time` and `rho` give tAB-DEIS and rhoAB-DEIS.

    Source: arXiv 2204.13902, section 3; "log_snr" is the "logrho" solver of diffusers.
    """
    return multistep(
        times,
        noise,
        order=order,
        prediction="noise",
        interpolation=interpolation,
        lower_order_final=lower_order_final,
    )


def unipc(
    times: ArrayLike,
    noise: NoiseSchedule,
    *,
    order: int = 2,
    prediction: Prediction = "data",
    variant: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
) -> Schedule:
    """UniPC-p: predictor of order p, corrector on all but the last step. Source: arXiv 2302.04867.

    B(h) cancels where the full system is solved; it acts on order-2 predictors and on the corrector
    of order-1 steps.
    """
    return multistep(
        times,
        noise,
        order=order,
        prediction=prediction,
        relaxation=lambda q: variant if q <= 2 else "none",
        corrector="pseudo",
        lower_order_final=lower_order_final,
    )


def singlestep_times(
    times: ArrayLike, noise: NoiseSchedule, *, fractions: Sequence[float]
) -> FloatArray:
    """Insert inner points at fractions of each step's lambda: (n + 1,) -> (n * (f + 1) + 1,)."""
    outer = np.asarray(times, dtype=np.float64).ravel()
    lam = noise.log_snr(outer)
    if not np.isfinite(lam).all():
        raise SpaceError("a singlestep solver needs finite log-SNR at all its times")
    answer = [outer[:1]]
    for i in range(len(outer) - 1):
        inner = lam[i] + np.asarray(fractions, dtype=np.float64) * (lam[i + 1] - lam[i])
        answer += [noise.time_of_log_snr(inner), outer[i + 1 : i + 2]]
    return np.concatenate(answer)


def singlestep(
    times: ArrayLike,
    noise: NoiseSchedule,
    *,
    block: Literal[2, 3],
    prediction: Prediction = "noise",
    relaxation: Relaxation = "none",
    taylor: bool = False,
) -> Schedule:
    """Singlestep solvers on a grid that holds the inner points too.

    Args:
        times: (block * n + 1,) falling native times, `block` points per outer step.
        noise: the noise schedule.
        block: calls per outer step: 2 or 3.
        prediction: data or noise.
        relaxation: of the second step of each block.
        taylor: whether the last step of a block of 3 uses both inner points (order 3) or one
            difference, at the second inner point (order 2 in form, still of third order when the
            inner points lie at 1/3 and 2/3).
    """
    at = [float(v) for v in np.asarray(times, dtype=np.float64).ravel()]
    if block not in (2, 3):
        raise SpaceError(f"block must be 2 or 3, got {block!r}")
    if len(at) < block + 1 or (len(at) - 1) % block:
        raise SpaceError(f"times must hold a multiple of {block}, plus 1, values; got {len(at)}")
    steps = []
    for i in range(1, len(at), block):
        steps.append(Step(at[i], prediction))
        if block == 2:
            steps.append(Step(at[i + 1], prediction, 2, start=-2, relaxation=relaxation))
        else:
            active = (-1, -2) if taylor else (-1,)
            steps.append(Step(at[i + 1], prediction, 2, -2, (-1,), relaxation=relaxation))
            steps.append(Step(at[i + 2], prediction, len(active) + 1, start=-3, points=active))
    return Schedule(noise, at[0], tuple(steps))


def dpm_solver_2s(
    times: ArrayLike,
    noise: NoiseSchedule,
    *,
    prediction: Prediction = "noise",
    ratio: float = 0.5,
    relaxation: Relaxation = "bh2",
) -> Schedule:
    """DPM-Solver-2: pairs of calls, 2 per outer step. Source: arXiv 2206.00927, algorithm 1.

    Args:
        times: (n + 1,) OUTER times; the run has 2n calls.
        noise: the noise schedule; log-SNR finite at all times.
        prediction: noise, or data for DPM-Solver++(2S).
        ratio: where the inner point lies, as a fraction of the step in lambda.
        relaxation: "bh2" as published, "none" for the plain Taylor form.
    """
    at = singlestep_times(times, noise, fractions=(ratio,))
    return singlestep(at, noise, block=2, prediction=prediction, relaxation=relaxation)


def dpm_solver_3s(
    times: ArrayLike,
    noise: NoiseSchedule,
    *,
    prediction: Prediction = "noise",
    ratios: tuple[float, float] = (1 / 3, 2 / 3),
    relaxation: Relaxation = "none",
    taylor: bool = False,
) -> Schedule:
    """DPM-Solver-3: triples of calls, 3 per outer step. Source: arXiv 2206.00927, algorithm 2.

    Args:
        times: (n + 1,) OUTER times; the run has 3n calls.
        noise: the noise schedule; log-SNR finite at all times.
        prediction: noise, or data for the "++" form.
        ratios: inner points as fractions of the step in lambda.
        relaxation: of the step to the second inner point: "none" as published; diffusers uses "bh2"
            together with ``taylor=False``.
        taylor: False: the last third uses one difference, at the second inner point; True: both
            inner points and a second derivative.
    """
    at = singlestep_times(times, noise, fractions=ratios)
    return singlestep(
        at, noise, block=3, prediction=prediction, relaxation=relaxation, taylor=taylor
    )


def _relaxation_of(variant: str) -> Relaxation:
    if variant == "midpoint":
        return "bh2"
    if variant == "heun":
        return "none"
    raise SpaceError(f"variant must be midpoint or heun, got {variant!r}")


def with_first_evaluation(schedule: Schedule, first: Literal["model", "zero", "mean"]) -> Schedule:
    """The same schedule with another first evaluation (an analytic one saves a call)."""
    return replace(schedule, first_evaluation=first)
