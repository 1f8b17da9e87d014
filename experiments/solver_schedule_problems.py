"""The bundled problems of the solver-schedule room: a trained digits model, and a closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from searchlab.errors import ConfigError
from searchlab.evaluators.distances import FrechetReference
from searchlab.evaluators.gaussian_mixture import MixtureProblem
from searchlab.evaluators.sampling import SampleDistance, SamplingProblem
from searchlab.evaluators.trajectories import PrefixTree
from searchlab.experiments.zoo.digits import (
    DigitsDenoiser,
    data_mean,
    load_digits_classifier,
    load_digits_denoiser,
    reference_features,
)
from searchlab.spaces.solver_schedule.grids import GRIDS
from searchlab.spaces.solver_schedule.noise_schedule import Edm
from searchlab.spaces.solver_schedule.points import dpmpp_3m
from searchlab.spaces.solver_schedule.schedule import Schedule, Step
from searchlab.spaces.solver_schedule.table import CoefficientTable, compile_schedule

__all__ = ["digits_problem", "mixture_problem", "reference_schedule"]


def reference_schedule(noise: Edm, steps: int) -> Schedule:
    """The many-step solution: third order on Karras' grid (rho 7), then the step to sigma = 0."""
    times = GRIDS["karras7"](noise, steps - 1, noise.start, noise.end)
    inner = dpmpp_3m(times, noise, lower_order_final=False)
    return Schedule(noise, inner.start_time, (*inner.steps, Step(noise.clean)))


# Classes rather than closures, so that a problem can be sent to worker processes.
@dataclass(frozen=True)
class _ManySteps:
    """The reference solution of a model: a schedule of many steps."""

    denoise: Callable[[Tensor, Tensor], Tensor]
    table: CoefficientTable

    def __call__(self, x: Tensor) -> Tensor:
        return PrefixTree(self.denoise, x, remember=False).run([self.table])[0]


@dataclass(frozen=True)
class _ClosedForm:
    """The reference solution of problem M, as exact as an integrator makes it."""

    def __call__(self, x: Tensor) -> Tensor:
        return _solution(x.detach().to("cpu", torch.float64).numpy().tobytes()).clone()


@lru_cache(maxsize=16)
def _solution(rows: bytes) -> Tensor:
    """Runs of one process often have equal noise banks, and each takes a second."""
    mixture = MixtureProblem()
    x = torch.frombuffer(bytearray(rows), dtype=torch.float64).reshape(-1, mixture.dimension)
    return mixture.reference_solution(x, start=mixture.noise.start, end=mixture.noise.end)


def digits_problem(
    *,
    label: int | None = None,
    reference_steps: int = 60,
    model: DigitsDenoiser | None = None,
) -> tuple[SamplingProblem, SampleDistance]:
    """Sampling scikit-learn's digits with the bundled model, and their feature distance.

    Args:
        label: class to sample, 0 to 9; None = unconditional.
        reference_steps: model calls of the reference solution.
        model: another one, without `label`; None = the bundled one.
    """
    if reference_steps < 20:
        raise ConfigError(f"reference_steps {reference_steps}; allowed: 20 or more")
    noise = Edm()
    denoise = load_digits_denoiser(label=label) if model is None else model
    table = compile_schedule(reference_schedule(noise, reference_steps))
    identity: dict[str, Any] = {
        "model": denoise.model_hash,
        "reference": f"3m karras7 {reference_steps}",
    }
    problem = SamplingProblem(
        "digits" if label is None else f"digits, class {label}",
        noise,
        denoise,
        denoise.shape,
        denoise.sigma_max,
        _ManySteps(denoise, table),
        identity,
        mean=torch.as_tensor(data_mean(), dtype=torch.float32),
    )
    classifier = load_digits_classifier()
    rows = reference_features(classifier)
    return problem, SampleDistance(classifier, FrechetReference.from_features(rows), rows)


def mixture_problem() -> SamplingProblem:
    """Problem M: five Gaussians in four dimensions under the linear VP schedule, in closed form."""
    mixture = MixtureProblem()
    noise = mixture.noise

    return SamplingProblem(
        "mixture M",
        noise,
        mixture.denoise,
        (mixture.dimension,),
        1.0,
        _ClosedForm(),
        {"problem": "M", "reference": "DOP853 1e-12"},
        mean=mixture.mean,
        dtype=torch.float64,
    )
