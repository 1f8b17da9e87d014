"""Reading a pipeline's own scheduler: its noise schedule, its times, and what else a search fixes.

Everything is read from attributes and `config`, so this module works on any object shaped like a
diffusers scheduler and needs no such library itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from searchlab.errors import ConfigError, SpaceError
from searchlab.spaces.solver_schedule.model_outputs import default_prediction_type
from searchlab.spaces.solver_schedule.noise_schedule import (
    Edm,
    FloatArray,
    Flow,
    NoiseSchedule,
    VpDiscrete,
)
from searchlab.spaces.solver_schedule.points import ddim, dpmpp_2m, unipc
from searchlab.spaces.solver_schedule.schedule import Schedule

__all__ = [
    "describe",
    "export_sigmas",
    "known_solver",
    "noise_schedule_of",
    "prediction_type_of",
    "sigma_data_of",
    "times_of",
    "without_ends",
]

_NAMED_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def _config(scheduler: Any) -> Mapping[str, Any]:
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"{type(scheduler).__name__} is no scheduler of a pipeline; allowed: an object with a"
            " config mapping"
        )
    return config


def _is_continuous_v(config: Mapping[str, Any]) -> bool:
    return (
        config.get("timestep_type") == "continuous"
        and config.get("prediction_type") == "v_prediction"
    )


def noise_schedule_of(scheduler: Any) -> NoiseSchedule:
    """The noise schedule of an installed diffusers scheduler.

    Flow matching (`FlowMatch...`, or `use_flow_sigmas`) gives `Flow`: a shift only re-times the
    grid (see `times_of`). Schedulers with `sigma_data`, and Euler with continuous times on
    velocities, give `Edm` with their sigma range. All others with `alphas_cumprod` give
    `VpDiscrete`, with its betas by name where they have one. The last value of a table with zero
    terminal SNR becomes 2**-24 or half the one before it: alpha must fall, and stay above 0.

    Raises:
        ConfigError: a scheduler of another kind.
    """
    from searchlab.spaces.solver_schedule.noise_schedule import noise_schedule_from_json

    config = _config(scheduler)
    stored = config.get("schedules")
    if stored:
        return noise_schedule_from_json(next(iter(stored.values()))["noise"])
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flow or type(scheduler).__name__.startswith("FlowMatch"):
        return Flow()
    if "sigma_data" in config or _is_continuous_v(config):
        high, low = config.get("sigma_max"), config.get("sigma_min")
        if high is None or low is None:
            raise ConfigError(f"{type(scheduler).__name__} names no sigma_min and sigma_max")
        return Edm(float(high), float(low))
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise ConfigError(
            f"no noise schedule is known for {type(scheduler).__name__}; allowed: flow matching,"
            " EDM, or a table alphas_cumprod"
        )
    name = config.get("beta_schedule")
    if (
        config.get("trained_betas") is None
        and not config.get("rescale_betas_zero_snr")
        and name in _NAMED_BETAS
    ):
        start, end = float(config["beta_start"]), float(config["beta_end"])
        return VpDiscrete(name, start, end, int(config["num_train_timesteps"]))
    values = [float(v) for v in table]
    if values[-1] <= 0:
        values[-1] = min(2.0**-24, 0.5 * values[-2])
    return VpDiscrete("custom", alphas_cumprod=tuple(values))


def without_ends(noise: NoiseSchedule) -> NoiseSchedule:
    """The map between time and noise alone: the default ends of sampling put to their defaults."""
    if isinstance(noise, Edm):
        return Edm()
    return Flow() if isinstance(noise, Flow) else noise


def prediction_type_of(scheduler: Any) -> str:
    """What the network behind a scheduler predicts, as the scheduler's config says it."""
    noise = noise_schedule_of(scheduler)
    named = _config(scheduler).get("prediction_type")
    if isinstance(noise, Flow) and named in (None, "epsilon"):
        # Flow-matching schedulers either have no such entry or leave it at a default.
        return default_prediction_type(noise)
    return str(named) if named is not None else default_prediction_type(noise)


def sigma_data_of(scheduler: Any) -> float:
    """EDM's standard deviation of the data; 1 for schedulers with continuous times, 0.5 else."""
    config = _config(scheduler)
    fallback = 1.0 if _is_continuous_v(config) else 0.5
    return float(config.get("sigma_data", fallback))


def times_of(scheduler: Any, n: int, *, mu: float | None = None) -> FloatArray:
    """Native times of a scheduler's own run of `n` steps, (n + 1,) falling, float64.

    The scheduler itself is not changed. With a named solver of `points` this gives the pipeline's
    usual sampler as a schedule.

    Args:
        scheduler: an installed diffusers scheduler of first order (one call per step).
        n: number of steps.
        mu: dynamic shift, for schedulers with `use_dynamic_shifting`.

    Raises:
        ConfigError: a scheduler of another kind, a missing `mu`, or one that visits times twice.
    """
    noise = noise_schedule_of(scheduler)
    config = _config(scheduler)
    own = copy.deepcopy(scheduler)
    settings: dict[str, Any] = {}
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise ConfigError(f"{type(scheduler).__name__} shifts dynamically; give mu, got None")
        if "mu" in inspect.signature(own.set_timesteps).parameters:
            settings["mu"] = mu
    if "mu" in settings and not config.get("use_flow_sigmas"):
        # Pipelines that shift dynamically hand this grid over where the scheduler has no own.
        settings["sigmas"] = np.linspace(1.0, 1.0 / n, n).tolist()
    own.set_timesteps(n, **settings)
    sigmas = getattr(own, "sigmas", None)
    if sigmas is not None and len(sigmas) == n + 1:
        levels = np.asarray([float(v) for v in sigmas])
        times = noise.time_of_rho(levels) if isinstance(noise, VpDiscrete) else levels
    elif isinstance(noise, VpDiscrete) and len(own.timesteps) == n:
        end = noise.clean if config.get("set_alpha_to_one", True) else 0.0
        times = np.asarray([*(float(v) for v in own.timesteps), end])
    else:
        times = np.zeros(1)
    times = np.clip(times, noise.clean, noise.latest)
    if len(times) != n + 1 or not (np.diff(times) < 0).all():
        raise ConfigError(
            f"{type(scheduler).__name__} does not take {n} falling steps; allowed: schedulers with"
            " one call per step"
        )
    return times


def describe(
    scheduler: Any,
    *,
    model: str | None = None,
    model_class: str | None = None,
    width: int | None = None,
    height: int | None = None,
    guidance_scale: float | None = None,
    mu: float | None = None,
) -> dict[str, Any]:
    """What a schedule was, or is to be, used with: the entries of its validity, JSON-ready.

    Args:
        scheduler: the pipeline's scheduler; gives prediction type, noise schedule and shift.
        model: id or directory of the pipeline.
        model_class: class of the denoiser.
        width, height: pixels.
        guidance_scale: as handed to the pipeline.
        mu: dynamic shift in use.
    """
    config = _config(scheduler)
    noise = noise_schedule_of(scheduler)
    shift = None
    if isinstance(noise, Flow) and not config.get("use_dynamic_shifting"):
        shift = float(config.get("flow_shift") or config.get("shift") or 1.0)
    return {
        "model": model,
        "model_class": model_class,
        "prediction_type": prediction_type_of(scheduler),
        "noise": noise.to_json(),
        "shift": shift,
        "mu": mu,
        "width": width,
        "height": height,
        "guidance_scale": guidance_scale,
    }


def known_solver(schedule: Schedule) -> str | None:
    """The usual solver that a schedule is, apart from its grid; None where it is none of them.

    Returns:
        "euler" (also DDIM), "dpmpp_2m" (DPM-Solver++ 2M, midpoint) or "unipc" (order 2, bh2, data
        prediction), whether or not they lower the order of the last steps.
    """
    plain = schedule.canonical()
    for name, solver in _SOLVERS.items():
        for lower in (True, False):
            if plain == solver(schedule, lower).canonical():
                return name
    return None


_SOLVERS: dict[str, Callable[[Schedule, bool], Schedule]] = {
    "euler": lambda s, _: ddim(s.times, s.noise),
    "dpmpp_2m": lambda s, lower: dpmpp_2m(s.times, s.noise, lower_order_final=lower),
    "unipc": lambda s, lower: unipc(s.times, s.noise, lower_order_final=lower),
}


def export_sigmas(schedule: Schedule) -> list[float]:
    """The schedule as a plain list of noise levels, where that and a usual solver say it all.

    n + 1 falling values for a tool that takes `sigmas`: sigma for flow and EDM, sigma/alpha for VP.
    They are to be run with `known_solver` of the schedule.

    Raises:
        SpaceError: a schedule that is no usual solver on any grid; says which step differs from
            order 1.
    """
    if known_solver(schedule) is None:
        raise SpaceError(
            f"a list of sigmas cannot say {_peculiarity(schedule)}; allowed: {', '.join(_SOLVERS)}"
            " on any grid (export the JSON instead)"
        )
    noise, times = schedule.noise, np.array(schedule.times)
    levels = noise.rho(times) if isinstance(noise, VpDiscrete) else noise.sigma(times)
    return [float(v) for v in levels]


def _peculiarity(schedule: Schedule) -> str:
    plain = schedule.canonical()
    if plain.first_evaluation != "model":
        return f"that the first evaluation is {plain.first_evaluation!r}"
    for i, step in enumerate(plain.steps):
        if step.order > 1 or step.corrector != "none" or step.start != -1:
            return (
                f"that step {i} has prediction {step.prediction!r}, order {step.order}, relaxation"
                f" {step.relaxation!r} and corrector {step.corrector!r}"
            )
    return "what its steps do"
