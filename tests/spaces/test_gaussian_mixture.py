"""The closed-form problems: denoisers, reference solutions, invariance under rescaling."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from searchlab.errors import SpaceError
from searchlab.evaluators.gaussian_mixture import GaussianProblem, MixtureProblem
from searchlab.spaces.solver_schedule import Edm, Flow, VpLinear, compile_schedule, points
from searchlab.spaces.solver_schedule.execute import run_table
from searchlab.spaces.solver_schedule.grids import log_snr_grid
from searchlab.spaces.solver_schedule.kdiffusion import as_edm


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Thousands of small operations: more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_problem_m_is_the_published_draw() -> None:
    problem = MixtureProblem()
    rng = np.random.default_rng(0)
    assert problem.means.tobytes() == rng.normal(size=(5, 4)).tobytes()
    assert problem.deviations.tobytes() == rng.uniform(0.05, 0.3, 5).tobytes()
    assert problem.weights.sum() == pytest.approx(1.0, abs=1e-15)
    assert problem.dimension == 4
    np.testing.assert_allclose(problem.mean, problem.weights @ problem.means)
    short, long = problem.start_noise(3, seed=1), problem.start_noise(9, seed=1)
    assert torch.equal(short, long[:3])


@pytest.mark.parametrize("noise", [VpLinear(), Edm(), Flow()], ids=lambda n: n.family)
def test_mixture_denoiser_obeys_tweedie(noise) -> None:
    # E[x_0 | x] = (x + sigma^2 grad log p(x)) / alpha, with the density written out apart.
    problem = MixtureProblem(noise)
    t = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
    x = problem.start_noise(3, seed=2).requires_grad_()
    alpha = torch.from_numpy(noise.alpha(t.numpy()))[:, None]
    sigma = torch.from_numpy(noise.sigma(t.numpy()))[:, None]
    variance = alpha**2 * torch.tensor(problem.deviations) ** 2 + sigma**2
    away = ((x[:, None] - alpha[:, :, None] * torch.tensor(problem.means)) ** 2).sum(-1)
    density = torch.tensor(problem.weights) * (-0.5 * away / variance).exp() / variance**2
    (score,) = torch.autograd.grad(density.sum(1).log().sum(), x)
    expected = (x + sigma**2 * score) / alpha
    answer = problem.denoise(x.detach(), t)
    np.testing.assert_allclose(answer, expected.detach(), rtol=1e-9, atol=1e-11)


def test_gaussian_denoiser_and_path() -> None:
    problem = GaussianProblem(VpLinear(), 0.5, mean=0.3)
    one = MixtureProblem(
        VpLinear(), means=np.full((1, 2), 0.3), deviations=np.array([0.5]), weights=np.ones(1)
    )
    x = torch.tensor([[0.4, -2.0], [1.5, 0.1]], dtype=torch.float64)
    t = torch.tensor([0.9, 0.2], dtype=torch.float64)
    np.testing.assert_allclose(problem.denoise(x, t), one.denoise(x, t), rtol=1e-13)
    exact = problem.reference_solution(x, start=1.0, end=1e-3)
    np.testing.assert_allclose(one.reference_solution(x, start=1.0, end=1e-3), exact, rtol=1e-9)


def test_gaussian_takes_images_and_single_precision() -> None:
    problem = GaussianProblem(Edm(), 0.5)
    x = torch.ones((2, 3, 4, 4))
    answer = problem.denoise(x, torch.tensor([0.5, 1.0]))
    assert answer.dtype == torch.float32
    assert answer.shape == x.shape
    assert answer[0, 0, 0, 0] == 0.5
    assert float(answer[1, 0, 0, 0]) == pytest.approx(0.2)


def test_mixture_reference_agrees_with_a_fine_solver() -> None:
    problem = MixtureProblem()
    x = problem.start_noise(16, seed=5)
    times = log_snr_grid(problem.noise, 300, 1.0, 1e-3)
    schedule = points.unipc(times, problem.noise, order=3)
    fine = run_table(compile_schedule(schedule), problem.denoise, x)
    exact = problem.reference_solution(x, start=1.0, end=1e-3)
    assert float((fine - exact).abs().max()) < 1e-3


def test_reference_takes_an_empty_batch_and_refuses_infinite_ends() -> None:
    problem = MixtureProblem(Edm())
    empty = torch.empty((0, 4), dtype=torch.float64)
    assert problem.reference_solution(empty, start=80.0, end=1.0).shape == (0, 4)
    with pytest.raises(SpaceError, match="finite log-SNR"):
        problem.reference_solution(empty, start=80.0, end=0.0)
    with pytest.raises(SpaceError, match="variance 0"):
        GaussianProblem(Edm(), 0.0).reference_solution(empty, start=0.0, end=0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianProblem(VpLinear(), -1.0),
        lambda: GaussianProblem(VpLinear(), 1.0, mean=float("nan")),
        lambda: MixtureProblem(means=np.zeros((2, 3))),
        lambda: MixtureProblem(means=np.full((5, 4), np.nan)),
        lambda: MixtureProblem(deviations=np.zeros(5)),
        lambda: MixtureProblem(weights=np.ones(5)),
    ],
)
def test_invalid_problems_are_refused(make) -> None:
    with pytest.raises(SpaceError):
        make()


@pytest.mark.parametrize("kind", ["ddim", "2m", "3m", "unipc_data", "unipc_noise", "2s", "3s"])
def test_vp_run_and_its_ve_image_agree(kind: str) -> None:
    vp = VpLinear()
    times = log_snr_grid(vp, 8, 1.0, 1e-3)
    schedule = {
        "ddim": lambda: points.ddim(times, vp),
        "2m": lambda: points.dpmpp_2m(times, vp),
        "3m": lambda: points.dpmpp_3m(times, vp),
        "unipc_data": lambda: points.unipc(times, vp, order=3),
        "unipc_noise": lambda: points.unipc(times, vp, order=2, prediction="noise"),
        "2s": lambda: points.dpm_solver_2s(times, vp),
        "3s": lambda: points.dpm_solver_3s(times, vp),
    }[kind]()
    image = as_edm(schedule)
    problem = MixtureProblem(vp)
    x = problem.start_noise(32, seed=6)
    a = run_table(compile_schedule(schedule), problem.denoise, x)
    y = x / float(vp.alpha(1.0))
    b = run_table(compile_schedule(image), MixtureProblem(image.noise).denoise, y)
    assert float((a - float(vp.alpha(1e-3)) * b).abs().max()) <= 1e-9
