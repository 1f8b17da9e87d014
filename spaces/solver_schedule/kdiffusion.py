"""Running schedules where k-diffusion's samplers run: ``sample(model, x, sigmas, ...)``.

`model(x, sigma, **extra_args)` returns the denoised x, with x in the variance-exploding scale
(alpha = 1), ``x_T = sigmas[0] * noise``, and sigma of shape (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from searchlab.errors import SpaceError
from searchlab.spaces.solver_schedule.execute import run_table
from searchlab.spaces.solver_schedule.noise_schedule import Edm
from searchlab.spaces.solver_schedule.points import dpmpp_2m
from searchlab.spaces.solver_schedule.schedule import Schedule
from searchlab.spaces.solver_schedule.table import compile_schedule

__all__ = ["as_edm", "sample_searched"]


def as_edm(schedule: Schedule) -> Schedule:
    """The image of a schedule under ``x / alpha``: native time becomes rho = sigma/alpha.

    Log-SNR, and with it every coefficient of the scaled problem, stays the same.

    Raises:
        SpaceError: the schedule starts at alpha = 0 (rho is infinite), or interpolates in native
            time, which the image does not have.
    """
    if isinstance(schedule.noise, Edm):
        return schedule
    if schedule.interpolation == "time":
        raise SpaceError("a schedule interpolated in native time has no image in rho")
    rho = [float(v) for v in schedule.noise.rho(schedule.times)]
    noise = Edm(start_time=rho[0], end_time=min(v for v in rho if v > 0) * 0.5)
    steps = tuple(replace(s, time=t) for s, t in zip(schedule.steps, rho[1:], strict=True))
    return replace(schedule, noise=noise, start_time=rho[0], steps=steps)


def sample_searched(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas_or_schedule: Schedule | Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    mean: Tensor | None = None,
) -> Tensor:
    """Sample with a schedule, called like the samplers of k-diffusion.

    Args:
        model: ``model(x, sigma, **extra_args)``, the denoised x (the data prediction).
        x: (B, ...) initial state, noise times the first sigma.
        sigmas_or_schedule: the schedule; one of another noise schedule is taken at its noise levels
            rho (see `as_edm`). A plain (n + 1,) tensor of falling sigmas names no solver: it runs
            DPM-Solver++(2M) midpoint with an order-1 step to sigma 0, i.e. `sample_dpmpp_2m`.
        extra_args: passed to the model by name.
        callback: called after each model call with a dictionary of x (the state it was called at),
            i (index of the evaluation, an analytic first one counted), sigma and sigma_hat (0-d
            tensors, equal) and denoised.
        disable: accepted for the calling form; there is no progress bar.
        mean: data mean, for schedules whose first evaluation is "mean".

    Returns:
        (B, ...) the sample.

    Raises:
        SpaceError: sigmas that are no valid grid, or a schedule without an image in rho.
    """
    if isinstance(sigmas_or_schedule, Schedule):
        schedule = as_edm(sigmas_or_schedule)
    else:
        sigmas = torch.as_tensor(sigmas_or_schedule).detach().double().cpu().numpy()
        if sigmas.ndim != 1 or len(sigmas) < 2:
            raise SpaceError(f"sigmas must be a vector of at least 2 values, got {sigmas.shape}")
        schedule = dpmpp_2m(sigmas, Edm(), lower_order_final=False)
    table = compile_schedule(schedule)
    passed = dict(extra_args or {})
    done = table.evaluations - table.nfe

    def denoise(state: Tensor, t: Tensor) -> Tensor:
        nonlocal done
        sigma = t.to(state.dtype)
        denoised = model(state, sigma, **passed)
        if callback is not None:
            level = torch.tensor(float(table.times[done]), dtype=state.dtype, device=state.device)
            callback(
                {"x": state, "i": done, "sigma": level, "sigma_hat": level, "denoised": denoised}
            )
        done += 1
        return denoised

    return run_table(table, denoise, x, mean=mean)
