"""The calling form of k-diffusion's samplers."""

from __future__ import annotations

import math

import pytest
import torch

from searchlab.errors import SpaceError
from searchlab.evaluators.gaussian_mixture import MixtureProblem
from searchlab.spaces.solver_schedule import (
    Edm,
    Flow,
    Schedule,
    Step,
    VpLinear,
    compile_schedule,
    points,
)
from searchlab.spaces.solver_schedule.execute import run_table
from searchlab.spaces.solver_schedule.grids import karras_grid
from searchlab.spaces.solver_schedule.kdiffusion import as_edm, sample_searched

PROBLEM = MixtureProblem(Edm())


def _noise() -> torch.Tensor:
    return 80.0 * PROBLEM.start_noise(6, seed=9)


def test_a_schedule_runs_as_through_its_table() -> None:
    schedule = points.unipc(karras_grid(Edm(), 6, 80.0, 0.002), Edm(), order=3)
    asked = []

    def model(x: torch.Tensor, sigma: torch.Tensor, *, scale: float) -> torch.Tensor:
        asked.append((tuple(sigma.shape), sigma.dtype))
        return scale * PROBLEM.denoise(x, sigma)

    answer = sample_searched(model, _noise(), schedule, {"scale": 1.0}, None, True)
    expected = run_table(compile_schedule(schedule), PROBLEM.denoise, _noise())
    assert torch.equal(answer, expected)
    assert asked == [((6,), torch.float64)] * 6


def test_plain_sigmas_run_the_second_order_multistep_solver() -> None:
    sigmas = torch.tensor([80.0, 20.0, 5.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    answer = sample_searched(PROBLEM.denoise, _noise(), sigmas)
    # DPM-Solver++(2M) written out in t = -ln sigma.
    x, old = _noise(), None
    for i in range(5):
        now, after = float(sigmas[i]), float(sigmas[i + 1])
        denoised = PROBLEM.denoise(x, torch.full((6,), now, dtype=torch.float64))
        if after == 0:
            x = denoised
            continue
        h = math.log(now / after)
        used = denoised
        if old is not None:
            r = math.log(float(sigmas[i - 1]) / now) / h
            used = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old
        x = (after / now) * x - math.expm1(-h) * used
        old = denoised
    assert float((answer - x).abs().max()) <= 1e-12


def test_callback_sees_every_call() -> None:
    schedule = Schedule(
        Edm(),
        80.0,
        (Step(10.0), Step(1.0, corrector="implicit"), Step(0.0)),
        first_evaluation="mean",
    )
    seen = []
    sample_searched(PROBLEM.denoise, _noise(), schedule, None, seen.append, mean=PROBLEM.mean)
    assert [(s["i"], float(s["sigma"]), float(s["sigma_hat"])) for s in seen] == [
        (1, 10.0, 10.0),
        (2, 1.0, 1.0),
        (3, 1.0, 1.0),
    ]
    for s in seen:
        assert set(s) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        at = torch.full((6,), float(s["sigma"]), dtype=torch.float64)
        assert torch.equal(s["denoised"], PROBLEM.denoise(s["x"], at))


def test_single_precision_stays_single() -> None:
    schedule = points.dpmpp_2m([80.0, 5.0, 0.5, 0.0], Edm())
    answer = sample_searched(PROBLEM.denoise, _noise().float(), schedule)
    exact = sample_searched(PROBLEM.denoise, _noise(), schedule)
    assert answer.dtype == torch.float32
    assert float((answer - exact).abs().max()) < 1e-4


def test_schedules_of_other_noise_are_taken_at_their_noise_levels() -> None:
    vp = VpLinear()
    schedule = points.dpmpp_3m([1.0, 0.7, 0.4, 0.1, 0.0], vp)
    image = as_edm(schedule)
    assert image.times == tuple(float(v) for v in vp.rho(schedule.times))
    x = image.start_time * PROBLEM.start_noise(6, seed=9)
    assert torch.equal(
        sample_searched(PROBLEM.denoise, x, schedule), sample_searched(PROBLEM.denoise, x, image)
    )
    assert as_edm(image) is image


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([1.0]),
        torch.ones((2, 2)),
        torch.tensor([1.0, 1.0, 0.5]),
        torch.tensor([1.0, float("nan")]),
        Schedule(Flow(), 1.0, (Step(0.5),)),
        Schedule(VpLinear(), 1.0, (Step(0.5),), interpolation="time"),
    ],
)
def test_what_has_no_sigmas_is_refused(bad) -> None:
    with pytest.raises(SpaceError) as caught:
        sample_searched(PROBLEM.denoise, _noise(), bad)
    assert "\n" not in str(caught.value)
