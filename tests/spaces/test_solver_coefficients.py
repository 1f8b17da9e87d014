"""Noise schedules, phi functions, derivative weights, relaxation, and the plan's validation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest
from solver_random import FAMILIES, random_schedule

from searchlab.errors import DataError, SpaceError
from searchlab.spaces.solver_schedule import (
    Edm,
    Flow,
    Schedule,
    Step,
    VpDiscrete,
    VpLinear,
    noise_schedule_from_json,
    shifted,
)
from searchlab.spaces.solver_schedule.coefficients import (
    derivative_weights,
    phi_functions,
    relaxation_factor,
)

ALL_NOISE = [
    VpLinear(),
    VpDiscrete(),
    VpDiscrete("scaled_linear", 0.00085, 0.012),
    VpDiscrete("squaredcos_cap_v2"),
    VpDiscrete.from_betas(np.linspace(1e-3, 0.1, 50)),
    Edm(),
    Flow(),
]


def _exact_phi(z: float, n: int) -> list[float]:
    with localcontext() as context:
        context.prec = 80
        at = Decimal(z)
        if at == 0:
            return [1.0 / math.factorial(k) for k in range(1, n + 1)]
        value = at.exp()
        answer = []
        for k in range(n):
            value = (value - 1 / Decimal(math.factorial(k))) / at
            answer.append(float(value))
        return answer


@pytest.mark.parametrize("z", [0.0, 1e-12, -1e-5, 0.01, -0.2999, 0.3, -0.99, 1.0, -2.5, 7.0, -11.0])
def test_phi_functions_are_exact_to_rounding(z: float) -> None:
    np.testing.assert_allclose(phi_functions(z, 5), _exact_phi(z, 5), rtol=1e-12)


@pytest.mark.parametrize("d", [[-0.7], [-0.5, -1.3], [0.8, -0.4, -1.1], [1.0, -0.3, -0.9, -2.0]])
def test_derivative_weights_solve_the_system(d: list[float]) -> None:
    p = len(d)
    system = np.array([[v**r / math.factorial(r) for v in d] for r in range(1, p + 1)])
    np.testing.assert_allclose(system @ np.array(derivative_weights(d)).T, np.eye(p), atol=1e-12)


@pytest.mark.parametrize("z", [-3.0, -0.4, 0.02, 1.7])
def test_relaxation_factors_match_their_definitions(z: float) -> None:
    h = abs(z)
    e = math.expm1(z)
    assert relaxation_factor("none", z, h, 0.3) == 1.0
    assert relaxation_factor("bh2", z, h, 0) == pytest.approx(0.5 * z * e / (e - z), rel=1e-9)
    assert relaxation_factor("bh1", z, h, 0) == pytest.approx(0.5 * z * z / (e - z), rel=1e-9)
    assert relaxation_factor("linear", z, h, -0.25) == 1.0 - 0.25 * h
    assert relaxation_factor("plus_half_exp", z, h, 0) == 1.0 + 0.5 * e
    assert relaxation_factor("minus_half_exp", z, h, 0) == 1.0 - 0.5 * e


@pytest.mark.parametrize("kind", ["bh1", "bh2", "plus_half_exp", "minus_half_exp"])
def test_relaxation_tends_to_one(kind: str) -> None:
    assert relaxation_factor(kind, 1e-9, 1e-9, 0.0) == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("noise", ALL_NOISE, ids=lambda n: n.family)
def test_noise_schedule_maps_agree(noise) -> None:
    times = np.linspace(noise.start, max(noise.end, 1e-3), 41)[1:]
    lam = noise.log_snr(times)
    assert (np.diff(lam) > 0).all()
    # The discrete table counts times up to 999, so 1e-11 is its rounding.
    np.testing.assert_allclose(noise.time_of_log_snr(lam), times, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(noise.time_of_rho(noise.rho(times)), times, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(np.exp(lam), noise.alpha(times) / noise.sigma(times), rtol=1e-12)
    if noise.family.startswith("vp"):
        norm = noise.alpha(times) ** 2 + noise.sigma(times) ** 2
        np.testing.assert_allclose(norm, 1.0, rtol=1e-14)
    assert float(noise.alpha(noise.clean)) == 1.0
    assert float(noise.sigma(noise.clean)) == 0.0
    assert float(noise.log_snr(noise.clean)) == math.inf
    assert float(noise.time_of_rho(0.0)) == pytest.approx(noise.clean, abs=1e-12)


def test_known_values_of_the_noise_schedules() -> None:
    vp = VpLinear()
    assert float(vp.log_snr(1.0)) == pytest.approx(-5.024978, abs=1e-6)
    assert float(vp.log_snr(1e-3)) == pytest.approx(4.557715, abs=1e-6)
    assert float(Edm().log_snr(80.0)) == -math.log(80.0)
    assert float(Flow().log_snr(1.0)) == -math.inf
    np.testing.assert_allclose(shifted([0.0, 0.5, 1.0], 3.0), [0.0, 0.75, 1.0], rtol=1e-15)


@pytest.mark.parametrize("noise", ALL_NOISE, ids=lambda n: n.family)
def test_noise_schedule_json_round_trip(noise) -> None:
    again = noise_schedule_from_json(json.loads(json.dumps(noise.to_json())))
    assert again == noise
    times = np.linspace(noise.start, noise.end, 7)
    assert again.alpha(times).tobytes() == noise.alpha(times).tobytes()


def test_discrete_schedule_gives_table_values_exactly_at_whole_times() -> None:
    table = tuple(float(v) for v in np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    noise = VpDiscrete("custom", alphas_cumprod=table)
    whole = np.arange(1000.0)
    assert noise.alpha(whole).tobytes() == np.sqrt(table).tobytes()
    assert noise.sigma(whole).tobytes() == np.sqrt(1 - np.array(table)).tobytes()
    half = float(np.log(noise.alpha(500.5)))
    between = 0.5 * (np.log(noise.alpha(500.0)) + np.log(noise.alpha(501.0)))
    assert half == pytest.approx(between, rel=1e-13)


@pytest.mark.diffusers
@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("linear", 1e-4, 0.02),
        ("scaled_linear", 0.00085, 0.012),
        ("squaredcos_cap_v2", 1e-4, 0.02),
    ],
)
def test_discrete_schedule_matches_diffusers(name: str, start: float, end: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(beta_start=start, beta_end=end, beta_schedule=name)
    table = theirs.alphas_cumprod.double().numpy()
    whole = np.arange(1000.0)
    mine = VpDiscrete("custom", alphas_cumprod=tuple(float(v) for v in table))
    assert (mine.alpha(whole) == np.sqrt(table)).all()
    named = VpDiscrete(name, start, end)
    # Their cumulative product runs in float32.
    np.testing.assert_allclose(named.alpha(whole) ** 2, table, rtol=2e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VpLinear(beta_0=0.0),
        lambda: VpLinear(beta_0=2.0, beta_1=1.0),
        lambda: VpLinear(start_time=1.5),
        lambda: VpLinear(end_time=1.0),
        lambda: VpDiscrete("cosine"),
        lambda: VpDiscrete("linear", beta_end=1.5),
        lambda: VpDiscrete("linear", num_train_timesteps=1),
        lambda: VpDiscrete("linear", alphas_cumprod=(0.9, 0.5)),
        lambda: VpDiscrete("custom"),
        lambda: VpDiscrete("custom", alphas_cumprod=(0.5, 0.9)),
        lambda: VpDiscrete("custom", alphas_cumprod=(0.5, math.nan)),
        lambda: Edm(start_time=-1.0),
        lambda: Edm(end_time=math.nan),
        lambda: Flow(start_time=1.1),
        lambda: Flow(end_time=-0.1),
        lambda: shifted(0.5, 0.0),
    ],
)
def test_invalid_noise_schedules_are_refused(make) -> None:
    with pytest.raises(SpaceError):
        make()


@pytest.mark.parametrize(
    "data",
    [
        "edm",
        {"family": "cosine", "version": 1},
        {"family": ["edm"], "version": 1},
        {"family": "edm"},
        {"family": "edm", "version": 2},
        {"family": "edm", "version": 1, "sigma_max": 80.0},
        {"family": "edm", "version": 1, "start_time": "80"},
        {"family": "edm", "version": 1, "start_time": -80.0},
        {"family": "vp_discrete", "version": 1, "num_train_timesteps": 10.5},
        {
            "family": "vp_discrete",
            "version": 1,
            "beta_schedule": "custom",
            "alphas_cumprod": ["a"],
        },
    ],
)
def test_unreadable_noise_schedules_are_data_errors(data) -> None:
    with pytest.raises(DataError) as caught:
        noise_schedule_from_json(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"time": math.nan}, "time"),
        ({"time": "1"}, "time"),
        ({"prediction": "v3"}, "v3"),
        ({"order": 0}, "order"),
        ({"order": 5}, "5"),
        ({"order": 2.0}, "order"),
        ({"order": True}, "order"),
        ({"start": 0}, "start"),
        ({"points": (-2,)}, "points"),
        ({"order": 2, "points": (-1,)}, "points"),
        ({"order": 3, "points": (-2, -2)}, "points"),
        ({"order": 2, "points": (1,)}, "points"),
        ({"estimate_order": 0}, "estimate_order"),
        ({"estimate_order": 4}, "estimate_order"),
        ({"relaxation": "bh3"}, "bh3"),
        ({"coefficient": math.inf}, "coefficient"),
        ({"scales": (math.nan,)}, "scales"),
        ({"scales": (1.0, 1.0, 1.0)}, "scales"),
        ({"corrector": "both"}, "both"),
    ],
)
def test_invalid_steps_are_refused(fields, word: str) -> None:
    with pytest.raises(SpaceError, match=word) as caught:
        Step(**{"time": 1.0, **fields})
    assert "\n" not in str(caught.value)


VP = VpLinear()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Schedule("edm", 80.0, (Step(1.0),)), "NoiseSchedule"),
        (lambda: Schedule(Edm(), 80.0, ()), "at least one"),
        (lambda: Schedule(Edm(), 80.0, (1.0,)), "Step"),
        (lambda: Schedule(Edm(), math.nan, (Step(1.0),)), "start_time"),
        (lambda: Schedule(Edm(), 80.0, (Step(80.0),)), "80.0"),
        (lambda: Schedule(Edm(), 80.0, (Step(1.0), Step(2.0))), "fall"),
        (lambda: Schedule(Edm(), 80.0, (Step(1.0), Step(0.99999))), "log-SNR"),
        (lambda: Schedule(Edm(), 80.0, (Step(-1.0),)), "-1"),
        (lambda: Schedule(VP, 1.2, (Step(0.5),)), "1.2"),
        (lambda: Schedule(Edm(), 80.0, (Step(1.0),), first_evaluation="none"), "none"),
        (lambda: Schedule(Edm(), 80.0, (Step(1.0),), interpolation="sigma"), "sigma"),
        (lambda: Schedule(Edm(), 80.0, (Step(1.0, start=-2),)), "start -2"),
        (lambda: Schedule(Edm(), 80.0, (Step(1.0, order=2, points=(-2,)),)), "points"),
        (lambda: Schedule(Edm(), 80.0, (Step(1.0), Step(0.0, order=2))), "sigma = 0"),
        (lambda: Schedule(Edm(), 80.0, (Step(1.0), Step(0.0, corrector="pseudo"))), "sigma = 0"),
        (lambda: Schedule(Flow(), 1.0, (Step(0.5, corrector="pseudo"),)), "alpha = 0"),
        (
            lambda: Schedule(Flow(), 1.0, (Step(0.5), Step(0.3, order=2, points=(-2,)))),
            "alpha = 0",
        ),
        (
            lambda: Schedule(Flow(), 1.0, (Step(0.5), Step(0.3, order=2, start=-2, points=(-1,)))),
            "alpha = 0",
        ),
    ],
)
def test_invalid_schedules_are_refused(make, word: str) -> None:
    with pytest.raises(SpaceError, match=word) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_schedule_json_round_trip() -> None:
    rng = np.random.default_rng(1)
    for i in range(60):
        schedule = random_schedule(rng, FAMILIES[i % 3])
        assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def _damaged(**changes: object) -> dict:
    data = Schedule(Edm(), 80.0, (Step(1.0), Step(0.0))).to_json()
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    return data


@pytest.mark.parametrize(
    "data",
    [
        [],
        _damaged(format="other"),
        _damaged(version=2),
        _damaged(version="1"),
        _damaged(start_time=None),
        _damaged(extra=1),
        _damaged(steps="none"),
        _damaged(steps=[1.0]),
        _damaged(steps=[{"time": 1.0, "skip": [1.0]}]),
        _damaged(steps=[{"order": 1}]),
        _damaged(steps=[{"time": 1.0, "points": 3}]),
        _damaged(steps=[{"time": 100.0}]),
        _damaged(start_time="80"),
        _damaged(noise={"family": "edm", "version": 9}),
    ],
)
def test_unreadable_schedules_are_data_errors(data) -> None:
    with pytest.raises(DataError) as caught:
        Schedule.from_json(data)
    assert "\n" not in str(caught.value)


def _edm(*steps: Step, **fields) -> Schedule:
    return Schedule(Edm(), 80.0, steps, **fields)


def test_canonical_merges_dead_decisions() -> None:
    written = _edm(
        Step(20.0, "noise", order=3, relaxation="bh2", coefficient=0.5, scales=(0.3,)),
        Step(5.0, order=2, points=(-2,), relaxation="linear", coefficient=0.0),
        Step(1.0, order=4, estimate_order=2, scales=(1.0, 0.5)),
        Step(0.3, order=3, estimate_order=2, scales=(1.0,), relaxation="bh1", coefficient=1.0),
        Step(0.1, "noise", order=2, corrector="implicit"),
    )
    assert written.canonical() == _edm(
        Step(20.0),
        Step(5.0, order=2),
        Step(1.0, order=3),
        Step(0.3, order=3, relaxation="bh1"),
        Step(0.1, "noise", order=2, corrector="pseudo"),
    )
    assert written.nfe == written.canonical().nfe == 6


def test_canonical_keeps_what_is_alive() -> None:
    # Behind a pseudo corrector the state is not the one the model was called at, so an order-1
    # noise step is another map than the data step; and an order-1 step with a corrector has one
    # derivative, which the relaxation and the type act on.
    alive = _edm(
        Step(20.0, "noise", corrector="pseudo", relaxation="bh2"),
        Step(5.0, "noise"),
        Step(1.0, order=3, estimate_order=1, scales=(0.5,)),
        Step(0.1, order=2, points=(-3,)),
        interpolation="rho",
    )
    assert alive.canonical() == alive
    implicit = replace(
        alive, steps=(replace(alive.steps[0], corrector="implicit"), *alive.steps[1:])
    )
    assert implicit.canonical().steps[1] == Step(5.0)


def test_canonical_drops_the_interpolation_of_order_one() -> None:
    assert _edm(Step(1.0), interpolation="rho").canonical() == _edm(Step(1.0))


def test_canonical_is_idempotent_and_keeps_the_calls() -> None:
    rng = np.random.default_rng(2)
    for i in range(100):
        once = random_schedule(rng, FAMILIES[i % 3]).canonical()
        assert once.canonical() == once


def test_text_has_one_line_per_step() -> None:
    text = str(_edm(Step(5.0), Step(1.0, order=2, relaxation="linear", coefficient=0.25)))
    lines = text.splitlines()
    assert len(lines) == 4
    assert "2 model calls" in lines[0]
    assert "1+0.25h" in lines[3]
