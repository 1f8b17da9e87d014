"""Known solvers: closed-form values, equality with diffusers, observed orders, grids, families."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch

from searchlab.errors import ConfigError, SpaceError
from searchlab.evaluators.gaussian_mixture import GaussianProblem, MixtureProblem
from searchlab.spaces.solver_schedule import (
    Edm,
    Flow,
    NoiseSchedule,
    Schedule,
    VpDiscrete,
    VpLinear,
    compile_schedule,
    points,
)
from searchlab.spaces.solver_schedule.execute import run_stepwise, run_table
from searchlab.spaces.solver_schedule.families import (
    ENDINGS,
    analytic_first_family,
    fixed_family,
)
from searchlab.spaces.solver_schedule.grids import GRIDS, grid_named, karras_grid


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Thousands of small operations: more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


DISCRETE = VpDiscrete()

G_SOLVERS: dict[str, Callable[[np.ndarray], Schedule]] = {
    "ddim": lambda t: points.ddim(t, DISCRETE),
    "2m_midpoint": lambda t: points.dpmpp_2m(t, DISCRETE),
    "2m_heun": lambda t: points.dpmpp_2m(t, DISCRETE, variant="heun"),
    "2m_noise": lambda t: points.dpm_2m_noise(t, DISCRETE, variant="heun"),
    "3m_half": lambda t: points.dpmpp_3m(t, DISCRETE, second_scale=0.5),
    "3m": lambda t: points.dpmpp_3m(t, DISCRETE),
    "unipc_2": lambda t: points.unipc(t, DISCRETE, order=2),
    "unipc_3": lambda t: points.unipc(t, DISCRETE, order=3),
}
G_VALUES = {
    (0.5, 5): (
        0.50008256,
        (
            0.26925859,
            0.27819966,
            0.27974526,
            0.27609157,
            0.27895711,
            0.27908017,
            0.28149988,
            0.28152467,
        ),
    ),
    (0.5, 10): (
        0.50008256,
        (
            0.37422963,
            0.40896880,
            0.41304803,
            0.40104489,
            0.41339297,
            0.41426994,
            0.41381345,
            0.41511472,
        ),
    ),
    (0.2, 8): (
        0.20024374,
        (
            0.09037529,
            0.09197257,
            0.09217684,
            0.09162617,
            0.09211778,
            0.09214547,
            0.09239625,
            0.09239572,
        ),
    ),
}


@pytest.mark.parametrize(("s", "n"), G_VALUES)
def test_known_values_on_the_gaussian_problem(s: float, n: int) -> None:
    problem = GaussianProblem(DISCRETE, s)
    times = np.round(np.linspace(0, 999, n + 1))[::-1]
    x = torch.ones((1, 1), dtype=torch.float64)
    exact, expected = G_VALUES[s, n]
    assert float(problem.reference_solution(x, start=999.0, end=0.0)) == pytest.approx(
        exact, abs=1e-8
    )
    for (name, make), value in zip(G_SOLVERS.items(), expected, strict=True):
        schedule = make(times)
        for answer in (
            run_table(compile_schedule(schedule), problem.denoise, x),
            run_stepwise(schedule, problem.denoise, x),
        ):
            assert float(answer) == pytest.approx(value, abs=1e-6), name


# --- Equality with the schedulers of diffusers -------------------------------------------------

MID, HEUN = {"solver_type": "midpoint"}, {"solver_type": "heun"}
PP, PLAIN = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "dpmsolver"}
SINGLE = {"lower_order_final": False}


def _unipc_rows() -> list:
    rows = []
    for variant in ("bh1", "bh2"):
        for order in (1, 2, 3):
            for prediction in ("data", "noise"):
                options = {
                    "solver_order": order,
                    "solver_type": variant,
                    "predict_x0": prediction == "data",
                }
                make = partial(points.unipc, order=order, prediction=prediction, variant=variant)
                tolerance = 1e-4 if (order, prediction) == (3, "noise") else 2e-5
                rows.append(("UniPCMultistepScheduler", options, make, 10, tolerance))
    return rows


def _three_m(scale: float, prediction: str, variant: str):
    return lambda t, s: points.dpmpp_3m(
        t, s, second_scale=scale, prediction=prediction, variant=variant
    )


def _single(block: int, prediction: str, relaxation: str, taylor: bool = False):
    return lambda t, s: points.singlestep(
        t, s, block=block, prediction=prediction, relaxation=relaxation, taylor=taylor
    )


M, S = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
# scheduler, its options, our point, steps, tolerance as shipped (float32 coefficients)
DIFFUSERS_ROWS = [
    (M, {"solver_order": 1}, points.ddim, 10, 2e-5),
    (M, {"solver_order": 2, **MID, **PP}, points.dpmpp_2m, 10, 2e-5),
    (
        M,
        {"solver_order": 2, **HEUN, **PP},
        lambda t, s: points.dpmpp_2m(t, s, variant="heun"),
        10,
        2e-5,
    ),
    (M, {"solver_order": 2, **MID, **PLAIN}, points.dpm_2m_noise, 10, 2e-5),
    (
        M,
        {"solver_order": 2, **HEUN, **PLAIN},
        lambda t, s: points.dpm_2m_noise(t, s, variant="heun"),
        10,
        2e-5,
    ),
    (M, {"solver_order": 3, **MID, **PP}, _three_m(0.5, "data", "midpoint"), 10, 2e-5),
    (M, {"solver_order": 3, **HEUN, **PP}, _three_m(0.5, "data", "heun"), 10, 2e-5),
    (M, {"solver_order": 3, **MID, **PLAIN}, _three_m(0.5, "noise", "midpoint"), 10, 2e-5),
    (S, {"solver_order": 2, **MID, **PP, **SINGLE}, _single(2, "data", "bh2"), 10, 2e-5),
    (S, {"solver_order": 2, **HEUN, **PP, **SINGLE}, _single(2, "data", "none"), 10, 2e-5),
    (S, {"solver_order": 3, **MID, **PP, **SINGLE}, _single(3, "data", "bh2"), 9, 2e-5),
    # Long singlestep blocks on noise multiply the rounding of their float32 coefficients.
    (S, {"solver_order": 2, **MID, **PLAIN, **SINGLE}, _single(2, "noise", "bh2"), 10, 1e-4),
    (S, {"solver_order": 3, **MID, **PLAIN, **SINGLE}, _single(3, "noise", "bh2"), 9, 1e-3),
    (S, {"solver_order": 3, **HEUN, **PP, **SINGLE}, _single(3, "data", "none", True), 9, 2e-4),
    (S, {"solver_order": 3, **HEUN, **PLAIN, **SINGLE}, _single(3, "noise", "none", True), 9, 2e-4),
    (
        "DEISMultistepScheduler",
        {"solver_order": 2},
        lambda t, s: points.deis(t, s, order=2),
        10,
        1e-4,
    ),
    (
        "DEISMultistepScheduler",
        {"solver_order": 3},
        lambda t, s: points.deis(t, s, order=3),
        10,
        1e-4,
    ),
    *_unipc_rows(),
]


def _run_diffusers(
    name: str, options: dict, n: int, *, exact: bool
) -> tuple[torch.Tensor, list[float], MixtureProblem]:
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    final = {} if name.startswith("DEIS") else {"final_sigmas_type": "sigma_min"}
    scheduler = getattr(diffusers, name)(**betas, **final, **options)
    scheduler.set_timesteps(n)
    table = tuple(float(v) for v in scheduler.alphas_cumprod.double())
    noise = VpDiscrete("custom", alphas_cumprod=table)
    problem = MixtureProblem(noise)
    times = [*(float(t) for t in scheduler.timesteps), 0.0]
    if exact:
        scheduler.sigmas = torch.from_numpy(noise.rho(times))
    x = problem.start_noise(64, seed=5)
    if not exact:
        x = x.float()
    for t in scheduler.timesteps:
        state = x.double()
        at = torch.full((64,), float(t), dtype=torch.float64)
        alpha, sigma = float(noise.alpha(float(t))), float(noise.sigma(float(t)))
        eps = (state - alpha * problem.denoise(state, at)) / sigma
        x = scheduler.step(eps.to(x.dtype), t, x).prev_sample
    return x.double(), times, problem


def _ours(make, times: list[float], problem: MixtureProblem, single: bool) -> torch.Tensor:
    x = problem.start_noise(64, seed=5)
    start = x.float().double() if single else x
    return run_table(compile_schedule(make(times, problem.noise)), problem.denoise, start)


@pytest.mark.diffusers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options", "make", "n", "tolerance"), DIFFUSERS_ROWS)
def test_equal_to_diffusers_as_shipped(name, options, make, n, tolerance) -> None:
    theirs, times, problem = _run_diffusers(name, options, n, exact=False)
    ours = _ours(make, times, problem, single=True)
    assert float((theirs - ours).abs().max()) <= tolerance


@pytest.mark.diffusers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options", "make", "n", "tolerance"), [r for r in DIFFUSERS_ROWS if r[0] != M]
)
def test_equal_to_diffusers_in_float64(name, options, make, n, tolerance) -> None:
    # These three compute in the type of the state once their sigmas are replaced by float64 ones.
    theirs, times, problem = _run_diffusers(name, options, n, exact=True)
    ours = _ours(make, times, problem, single=False)
    assert float((theirs - ours).abs().max()) <= 1e-11


@pytest.mark.diffusers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("variant", "options"), [("midpoint", MID), ("heun", HEUN)])
def test_the_third_order_multistep_solver_of_diffusers_halves_a_derivative(
    variant: str, options: dict
) -> None:
    theirs, times, problem = _run_diffusers(
        M, {"solver_order": 3, **options, **PP}, 10, exact=False
    )
    true = _ours(_three_m(1.0, "data", variant), times, problem, single=True)
    assert float((theirs - true).abs().max()) > 0.02


# --- Observed orders ---------------------------------------------------------------------------

VP = VpLinear()
START, END = 1.0, 1e-3


@pytest.fixture(scope="module")
def exact():
    """The problem, 32 start states, and their states at the end and at early times (cached)."""
    problem = MixtureProblem()
    x = problem.start_noise(32, seed=1)
    cache: dict[float, torch.Tensor] = {START: x}

    def at(time: float) -> torch.Tensor:
        if time not in cache:
            cache[time] = problem.reference_solution(x, start=START, end=time)
        return cache[time]

    return problem, at


def _error(exact, schedule: Schedule, known: int) -> float:
    """RMSE at the end when the states at the first `known` points behind the start are exact."""
    problem, at = exact
    table = compile_schedule(schedule)
    nodes: list[torch.Tensor] = [at(START)]
    outputs: list[torch.Tensor] = []
    for r in range(2 * table.evaluations + 1):
        if 0 < r <= 2 * known + 1:
            nodes.append(at(float(table.times[r // 2])))
        elif r:
            row, out = table.states[r], table.outputs[r]
            value = torch.zeros_like(nodes[0])
            for c in np.flatnonzero(row):
                value = value + float(row[c]) * nodes[c]
            for k in np.flatnonzero(out):
                value = value + float(out[k]) * outputs[k]
            nodes.append(value)
        if r % 2 == 0 and r < 2 * table.evaluations:
            t = torch.full((32,), float(table.times[r // 2]), dtype=torch.float64)
            outputs.append(problem.denoise(nodes[r], t))
    return float(((nodes[-1] - at(END)) ** 2).mean().sqrt())


def _uniform(n: int) -> np.ndarray:
    return GRIDS["log_snr"](VP, n, START, END)


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize(
    ("order", "corrector", "scales", "expected"),
    [
        (2, "none", (), 2.0),
        (3, "none", (), 3.0),
        (4, "none", (), 4.05),
        (1, "pseudo", (), 2.0),
        (2, "pseudo", (), 2.95),
        (3, "pseudo", (), 4.1),
        (3, "none", (0.5,), 2.1),
    ],
)
def test_observed_order_of_multistep_solvers(
    exact, prediction: str, order: int, corrector: str, scales: tuple, expected: float
) -> None:
    known = order - 1 + (corrector == "pseudo")
    errors = [
        _error(
            exact,
            points.multistep(
                _uniform(n),
                VP,
                order=order,
                prediction=prediction,
                corrector=corrector,
                scales=scales,
                lower_order_final=False,
            ),
            known,
        )
        for n in (256, 512)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.1)
    if (order, corrector, scales, prediction) == (3, "none", (), "data"):
        assert errors[1] == pytest.approx(1.05e-6, rel=5e-3)


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize(
    ("make", "expected", "noise_error"),
    [
        (points.dpm_solver_2s, 2.0, 3.37e-5),
        (points.dpm_solver_3s, 2.9, 4.99e-7),
        (lambda t, s, **kind: points.dpm_solver_3s(t, s, taylor=True, **kind), 2.88, None),
    ],
    ids=["2s", "3s", "3s_taylor"],
)
def test_observed_order_of_singlestep_solvers(
    exact, make, prediction: str, expected: float, noise_error: float | None
) -> None:
    errors = [_error(exact, make(_uniform(n), VP, prediction=prediction), 0) for n in (128, 256)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.1)
    if prediction == "noise" and noise_error is not None:
        assert errors[1] == pytest.approx(noise_error, rel=5e-3)


@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_observed_order_of_order_one_on_the_gaussian(prediction: str) -> None:
    problem = GaussianProblem(VP, 0.5)
    x = torch.ones((1, 1), dtype=torch.float64)
    true = problem.reference_solution(x, start=START, end=END)
    errors = []
    for n in (256, 512):
        schedule = points.multistep(_uniform(n), VP, order=1, prediction=prediction)
        answer = run_table(compile_schedule(schedule), problem.denoise, x)
        errors.append(float((answer - true).abs()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("interpolation", ["time", "rho"])
@pytest.mark.parametrize("order", [2, 3])
def test_observed_order_of_deis_in_other_variables(exact, interpolation: str, order: int) -> None:
    errors = [
        _error(
            exact,
            points.deis(
                _uniform(n), VP, order=order, interpolation=interpolation, lower_order_final=False
            ),
            order - 1,
        )
        for n in (256, 512)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_rho_deis_is_adams_bashforth_in_rho() -> None:
    rho = np.array([10.0, 5.0, 2.0])
    table = compile_schedule(points.deis(rho, Edm(), interpolation="rho", lower_order_final=False))
    # eps_j = (node_2j - m_j) / rho_j; x_2 = x_1 + w_1 eps_1 + w_0 eps_0.
    step, back = rho[2] - rho[1], rho[0] - rho[1]
    old = step**2 / (2 * back)
    np.testing.assert_allclose(table.outputs[4, 0], -old / rho[0], rtol=1e-12)
    np.testing.assert_allclose(table.outputs[4, 1], -(step - old) / rho[1], rtol=1e-12)


# --- Grids -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("noise", [VP, Edm(), DISCRETE], ids=lambda n: n.family)
def test_grids_fall_strictly_between_their_ends(name: str, noise: NoiseSchedule) -> None:
    times = grid_named(name)(noise, 7, noise.start, noise.end)
    assert times.shape == (8,)
    assert times[0] == noise.start
    assert times[-1] == noise.end
    assert (np.diff(times) < 0).all()
    assert grid_named(name)(noise, 1, noise.start, noise.end).tolist() == [noise.start, noise.end]


@pytest.mark.parametrize("name", [n for n in GRIDS if n != "time"])
def test_grids_are_the_same_points_in_every_noise_schedule(name: str) -> None:
    edm = GRIDS[name](Edm(), 9, 80.0, 0.02)
    vp = GRIDS[name](VP, 9, float(VP.time_of_rho(80.0)), float(VP.time_of_rho(0.02)))
    np.testing.assert_allclose(VP.rho(vp), edm, rtol=1e-9)


def test_grid_values() -> None:
    np.testing.assert_allclose(GRIDS["log_snr"](Edm(), 2, 4.0, 0.25), [4.0, 1.0, 0.25], rtol=1e-14)
    roots = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 6)
    np.testing.assert_allclose(karras_grid(Edm(), 5, 80.0, 0.002), roots**7, rtol=1e-12)
    np.testing.assert_allclose(GRIDS["vp_time"](VP, 4, 1.0, 0.2), [1, 0.8, 0.6, 0.4, 0.2])
    np.testing.assert_allclose(GRIDS["vp_quadratic"](VP, 2, 1.0, 0.25), [1, 0.5625, 0.25])
    angles = np.arctan(GRIDS["arctan"](Edm(), 6, 80.0, 0.01))
    np.testing.assert_allclose(np.diff(angles), np.diff(angles).mean(), rtol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GRIDS["log_snr"](Edm(), 0, 80.0, 0.002),
        lambda: GRIDS["log_snr"](Edm(), 3, 0.002, 80.0),
        lambda: GRIDS["log_snr"](Edm(), 3, 80.0, 0.0),
        lambda: GRIDS["karras7"](Flow(), 3, 1.0, 0.1),
        lambda: GRIDS["vp_time"](Flow(), 3, 1.0, 0.1),
        lambda: GRIDS["time"](VP, 3, 2.0, 0.1),
        lambda: karras_grid(Edm(), 3, 80.0, 0.002, exponent=0.0),
        lambda: points.ddim([1.0], Edm()),
        lambda: points.dpmpp_2m([80.0, 1.0], Edm(), variant="ralston"),
        lambda: points.singlestep([80.0, 9.0, 1.0, 0.5], Edm(), block=2),
        lambda: points.singlestep([80.0, 9.0, 1.0], Edm(), block=4),
        lambda: points.dpm_solver_2s([80.0, 1.0, 0.0], Edm()),
        lambda: fixed_family(Edm(), 0),
    ],
)
def test_invalid_grids_and_points_are_refused(make) -> None:
    with pytest.raises(SpaceError) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_unknown_names_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="karras7"):
        grid_named("karras")
    with pytest.raises(ConfigError, match="faces"):
        fixed_family(Edm(), 5, family="faces")
    with pytest.raises(ConfigError, match=r"0\.1"):
        fixed_family(Edm(), 5, end=0.1)


def test_flow_grids_from_pure_noise() -> None:
    for name in ("arctan", "time"):
        times = GRIDS[name](Flow(), 5, 1.0, 0.0)
        assert (np.diff(times) < 0).all()
        schedule = points.unipc(times, Flow(), order=3)
        assert schedule.nfe == 5
        assert schedule.steps[0].corrector == "none"


# --- Families ----------------------------------------------------------------------------------


def test_mixture_family_has_its_224_points() -> None:
    for nfe in (1, 2, 5):
        family = fixed_family(VP, nfe, family="mixture")
        assert len(family) == 224
        assert all(s.nfe == nfe and s.times[0] == 1.0 for s in family.values())
        assert all(s.times[-1] == 1e-3 for s in family.values())


@pytest.mark.parametrize("noise", [Edm(), VP], ids=lambda n: n.family)
def test_digits_family_has_its_648_points(noise: NoiseSchedule) -> None:
    family = fixed_family(noise, 4)
    assert len(family) == 648
    assert all(s.nfe == 4 for s in family.values())
    assert len({name.split("/")[1] for name in family}) == len(ENDINGS)
    assert len({name.split("/")[2] for name in family}) == 15
    clean = [s for name, s in family.items() if "/clean" in name]
    assert all(float(noise.sigma(s.times[-1])) == 0 for s in clean)
    for s in clean[:5]:
        assert float(noise.rho(s.times[-2])) == pytest.approx(0.02, rel=1e-9)
    assert len(fixed_family(noise, 1)) == 324


def test_analytic_family_makes_one_more_step_for_the_same_calls() -> None:
    family = analytic_first_family(Edm(), 4)
    assert len(family) == 648
    assert all(s.nfe == 4 and len(s.steps) == 5 for s in family.values())
    assert all(s.first_evaluation == "mean" for s in family.values())
    assert not set(family) & set(fixed_family(Edm(), 4))


@pytest.mark.parametrize(
    ("nfe", "name", "expected"),
    [
        (5, "vp_quadratic/data/q3/bh2/pseudo/final", 0.1079),
        (6, "vp_quadratic/data/q3/bh2/pseudo/final", 0.0948),
        (8, "vp_quadratic/data/q3/bh2/pseudo/final", 0.0591),
        (10, "vp_quadratic/data/q3/bh2/pseudo/final", 0.0407),
    ],
)
def test_best_fixed_points_of_the_mixture(held_out, nfe: int, name: str, expected: float) -> None:
    problem, x, true = held_out
    schedule = fixed_family(VP, nfe, family="mixture")[name]
    answer = run_table(compile_schedule(schedule), problem.denoise, x)
    assert float(((answer - true) ** 2).mean().sqrt()) == pytest.approx(expected, abs=6e-5)


@pytest.fixture(scope="module")
def held_out():
    problem = MixtureProblem()
    x = problem.start_noise(256 + 2048, seed=5)[256:]
    return problem, x, problem.reference_solution(x, start=1.0, end=1e-3)
