"""The compiled table: equality with the step-by-step run, prefix keys, call counts, exactness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from solver_random import FAMILIES, random_schedule

from searchlab.errors import SpaceError
from searchlab.evaluators.gaussian_mixture import GaussianProblem, MixtureProblem
from searchlab.spaces.solver_schedule import (
    CoefficientTable,
    Edm,
    Flow,
    Schedule,
    Step,
    VpDiscrete,
    compile_schedule,
)
from searchlab.spaces.solver_schedule.execute import CountingDenoiser, run_stepwise, run_table


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Thousands of small operations: more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _start(problem: MixtureProblem, schedule: Schedule, n: int = 8) -> torch.Tensor:
    scale = float(schedule.noise.sigma(schedule.start_time))
    return scale * problem.start_noise(n, seed=3)


@pytest.mark.parametrize("noise", FAMILIES, ids=lambda n: n.family)
def test_table_equals_the_stepwise_run_on_random_schedules(noise) -> None:
    rng = np.random.default_rng(4)
    problem = MixtureProblem(noise)
    for _ in range(120):
        schedule = random_schedule(rng, noise)
        x = _start(problem, schedule)
        table = compile_schedule(schedule)
        fast, slow = CountingDenoiser(problem.denoise), CountingDenoiser(problem.denoise)
        a = run_table(table, fast, x, mean=problem.mean)
        b = run_stepwise(schedule, slow, x, mean=problem.mean)
        assert fast.calls == slow.calls == table.nfe == schedule.nfe, str(schedule)
        assert fast.times == slow.times
        scale = float(b.abs().max())
        assert float((a - b).abs().max()) <= 1e-9 * scale, str(schedule)


@pytest.mark.parametrize("noise", FAMILIES, ids=lambda n: n.family)
def test_canonical_schedules_compile_to_the_same_bytes(noise) -> None:
    rng = np.random.default_rng(5)
    for _ in range(80):
        schedule = random_schedule(rng, noise)
        a, b = compile_schedule(schedule), compile_schedule(schedule.canonical())
        assert a.row_bytes(a.evaluations) == b.row_bytes(b.evaluations), str(schedule)
        assert a.nfe == b.nfe == schedule.nfe == schedule.canonical().nfe


@pytest.mark.parametrize("noise", FAMILIES, ids=lambda n: n.family)
def test_a_single_data_point_is_reached_exactly_by_every_schedule(noise) -> None:
    rng = np.random.default_rng(6)
    problem = GaussianProblem(noise, s=0.0, mean=0.7)
    mean = torch.tensor(0.7, dtype=torch.float64)
    x_noise = torch.from_numpy(rng.normal(size=(6, 3)))
    counted = 0
    for _ in range(100):
        schedule = random_schedule(rng, noise, first=("model", "mean"))
        x = float(noise.sigma(schedule.start_time)) * x_noise
        end = schedule.times[-1]
        exact = problem.reference_solution(x, start=schedule.start_time, end=end)
        table = compile_schedule(schedule)
        answer = run_table(table, problem.denoise, x, mean=mean)
        # Relative to the largest value: single entries may lie near 0.
        error = float((answer - exact).abs().max() / exact.abs().max())
        plain = schedule.interpolation == "log_snr" and all(s.start == -1 for s in schedule.steps)
        assert error <= (1e-10 if plain else _rounding(table, noise)), str(schedule)
        counted += plain
    assert counted > 10


def _rounding(table: CoefficientTable, noise) -> float:
    """What rounding may cost, by carrying |weights| through the table (some draws have huge ones).

    The states lie on the path, so their size is about |alpha| + 3 sigma.
    """
    times = [*np.repeat(table.times, 2), table.end_time]
    size = noise.alpha(times) + 3 * noise.sigma(times)
    states, outputs = np.abs(table.states), np.abs(table.outputs)
    error = np.zeros(len(size))
    for r in range(1, len(size)):
        error[r] = states[r] @ error + 1e-15 * (states[r] @ size + outputs[r].sum())
    return 10 * float(error[-1])


def _edm(*steps: Step, **fields) -> Schedule:
    return Schedule(Edm(), 80.0, steps, **fields)


@pytest.mark.parametrize(
    ("schedule", "calls"),
    [
        (_edm(Step(10.0), Step(1.0), Step(0.1)), 3),
        (_edm(Step(10.0), Step(1.0), Step(0.0)), 3),
        (_edm(Step(10.0), Step(1.0), first_evaluation="zero"), 1),
        (_edm(Step(10.0), Step(1.0), first_evaluation="mean"), 1),
        (_edm(Step(10.0, corrector="pseudo"), Step(1.0, corrector="pseudo"), Step(0.1)), 3),
        (_edm(Step(10.0, corrector="implicit"), Step(1.0, corrector="implicit"), Step(0.1)), 5),
        (_edm(Step(10.0), Step(1.0, corrector="pseudo")), 3),
        (_edm(Step(10.0), Step(1.0, corrector="implicit")), 3),
        (_edm(Step(10.0, corrector="implicit"), first_evaluation="zero"), 1),
        (_edm(Step(10.0), Step(5.0, order=2, start=-2), Step(1.0)), 3),
    ],
)
def test_calls_are_counted(schedule: Schedule, calls: int) -> None:
    problem = MixtureProblem(schedule.noise)
    counter = CountingDenoiser(problem.denoise)
    table = compile_schedule(schedule)
    run_table(table, counter, _start(problem, schedule), mean=problem.mean)
    assert counter.calls == schedule.nfe == table.nfe == calls
    analytic = schedule.first_evaluation != "model"
    assert counter.times == table.times.tolist()[analytic:]


def test_order_one_noise_and_data_steps_have_equal_bits() -> None:
    times = (20.0, 5.0, 1.0, 0.1)
    data = compile_schedule(_edm(*(Step(t) for t in times)))
    noise = compile_schedule(_edm(*(Step(t, "noise") for t in times)))
    assert data.row_bytes(4) == noise.row_bytes(4)
    moved = (Step(20.0, corrector="pseudo"), Step(5.0), Step(1.0))
    other = (*moved[:1], Step(5.0, "noise"), Step(1.0))
    a, b = compile_schedule(_edm(*moved)), compile_schedule(_edm(*other))
    assert a.row_bytes(1) == b.row_bytes(1)
    assert a.row_bytes(2) != b.row_bytes(2)


def test_prefix_keys_agree_exactly_as_far_as_the_schedules_do() -> None:
    head = (Step(20.0), Step(5.0, "noise", order=2), Step(1.0, order=3, corrector="pseudo"))
    a = compile_schedule(_edm(*head, Step(0.3), Step(0.1)))
    # Another length, other decisions later, and the same head in another spelling.
    spelt = (
        Step(20.0, "noise", order=3, relaxation="bh1"),
        Step(5.0, "noise", order=2, points=(-2,), estimate_order=1),
        Step(1.0, order=3, corrector="pseudo", scales=(1.0,)),
    )
    b = compile_schedule(_edm(*spelt, Step(0.2, order=2), Step(0.05), Step(0.0)))
    assert [a.row_bytes(k) == b.row_bytes(k) for k in range(6)] == [True] * 4 + [False] * 2
    # The corrector of step 2 acts behind evaluation 3, so its key first differs at 4.
    plain = (*head[:2], replace(head[2], corrector="none"))
    c = compile_schedule(_edm(*plain, Step(0.3), Step(0.1)))
    assert [a.row_bytes(k) == c.row_bytes(k) for k in range(6)] == [True] * 4 + [False] * 2
    # The first evaluation is part of every key but that of the initial state.
    d = compile_schedule(_edm(*head, Step(0.3), Step(0.1), first_evaluation="mean"))
    assert [a.row_bytes(k) == d.row_bytes(k) for k in range(6)] == [True] + [False] * 5
    # A result is not an intermediate state, even at the same time.
    e = compile_schedule(_edm(*head))
    assert e.row_bytes(2) == a.row_bytes(2)
    assert not a.row_bytes(4).startswith(e.row_bytes(e.evaluations))


def test_equal_prefix_keys_give_equal_bits() -> None:
    rng = np.random.default_rng(7)
    problem = MixtureProblem(Edm())
    for _ in range(40):
        schedule = random_schedule(rng, Edm(), interpolations=("log_snr",))
        times = schedule.times
        changed = replace(
            schedule,
            steps=(*schedule.steps[:-1], Step(0.5 * (times[-1] + times[-2]), "noise")),
        )
        a, b = compile_schedule(schedule), compile_schedule(changed)
        shared = 0
        while shared < min(a.evaluations, b.evaluations) and (
            a.row_bytes(shared) == b.row_bytes(shared)
        ):
            shared += 1
        assert shared >= len(schedule.steps)
        inputs: list[list[torch.Tensor]] = [[], []]
        for kept, table in zip(inputs, (a, b), strict=True):

            def denoise(x: torch.Tensor, t: torch.Tensor, kept=kept) -> torch.Tensor:
                kept.append(x.clone())
                return problem.denoise(x, t)

            run_table(table, denoise, _start(problem, schedule), mean=problem.mean)
        calls = shared - (schedule.first_evaluation != "model")
        for x, y in zip(inputs[0][:calls], inputs[1][:calls], strict=True):
            assert torch.equal(x, y)


def test_table_structure() -> None:
    table = compile_schedule(
        _edm(Step(20.0, corrector="pseudo"), Step(5.0, corrector="implicit"), Step(1.0, order=2))
    )
    assert table.evaluations == table.nfe == 4
    assert table.times.tolist() == [80.0, 20.0, 5.0, 5.0]
    assert table.states.shape == (9, 9)
    assert table.outputs.shape == (9, 4)
    assert [table.is_copy(r) for r in range(9)] == [r in (1, 6, 7) for r in range(9)]
    copies = [r for r in range(1, 9, 2) if table.is_copy(r)]
    assert not table.states[:, copies].any(), "copies are never read"
    assert table.last_use()[8] == 8
    with pytest.raises(ValueError, match="read-only"):
        table.states[2, 0] = 1.0
    with pytest.raises(SpaceError, match=r"0\.\.4"):
        table.row_bytes(5)


def test_default_points_are_the_newest_ones_other_than_the_start() -> None:
    head = (Step(40.0), Step(20.0), Step(10.0))
    for start, order, points in [
        (-1, 3, (-2, -3)),
        (-2, 2, (-1,)),
        (-2, 3, (-1, -3)),
        (-3, 3, (-1, -2)),
    ]:
        a = compile_schedule(_edm(*head, Step(5.0, order=order, start=start)))
        b = compile_schedule(_edm(*head, Step(5.0, order=order, start=start, points=points)))
        assert a.row_bytes(4) == b.row_bytes(4)


def test_estimate_order_uses_the_nearest_points_for_the_first_derivative() -> None:
    head = (Step(40.0), Step(20.0), Step(10.0))
    low = compile_schedule(_edm(*head, Step(5.0, order=3, estimate_order=1)))
    h = math.log(2.0)
    phi_2 = (-math.expm1(-h) - h) / -h / h
    phi_3 = (phi_2 - 0.5) / -h
    d1, d2 = -math.log(2.0), -math.log(4.0)
    second = [2 / (d1 * (d1 - d2)), 2 / (d2 * (d2 - d1))]
    expected = [h**2 * phi_2 / d1 + h**3 * phi_3 * second[0], h**3 * phi_3 * second[1]]
    np.testing.assert_allclose(low.outputs[8, [2, 1]], expected, rtol=1e-12)


def test_polished_tables_are_checked() -> None:
    good = compile_schedule(_edm(Step(10.0), Step(1.0)))

    def make(**changes: object) -> CoefficientTable:
        fields = {"states": good.states, "outputs": good.outputs, "times": good.times}
        return CoefficientTable(**{**fields, "end_time": 1.0, **changes})

    assert make().row_bytes(2) == good.row_bytes(2)
    above = good.states.copy()
    above[1, 3] = 0.5
    early = good.outputs.copy()
    early[2, 1] = 0.5
    broken = good.outputs.copy()
    broken[4, 0] = math.nan
    for changes in (
        {"states": above},
        {"outputs": early},
        {"outputs": broken},
        {"outputs": good.outputs[:, :1]},
        {"times": np.zeros(0)},
        {"first_evaluation": "half"},
    ):
        with pytest.raises(SpaceError):
            make(**changes)


def test_executor_skips_zeros_and_keeps_types() -> None:
    schedule = _edm(Step(10.0), Step(1.0), Step(0.0))
    x = 80.0 * torch.ones((2, 3, 1, 2), dtype=torch.float16)
    seen = []

    def denoise(state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((state.dtype, t.dtype, tuple(t.shape)))
        # Everything the last step does not use would spread through 0 * NaN.
        return torch.full_like(state, math.nan if len(seen) < 3 else 0.25)

    answer = run_table(compile_schedule(schedule), denoise, x, dtype=torch.float32)
    assert answer.dtype == torch.float16
    assert torch.equal(answer, torch.full_like(x, 0.25))
    assert seen == [(torch.float32, torch.float32, (2,))] * 3


def test_executor_takes_any_trailing_shape_and_an_empty_batch() -> None:
    schedule = _edm(Step(10.0), Step(1.0, order=2), Step(0.1, order=2, corrector="pseudo"))
    table = compile_schedule(schedule)
    problem = GaussianProblem(schedule.noise, s=0.5)
    x = 80.0 * torch.from_numpy(np.random.default_rng(0).normal(size=(4, 2, 3)))
    whole = run_table(table, problem.denoise, x)
    assert torch.equal(whole[1:2], run_table(table, problem.denoise, x[1:2]))
    assert torch.equal(whole.reshape(-1), run_table(table, problem.denoise, x.reshape(-1)))
    assert run_table(table, problem.denoise, x[:0]).shape == (0, 2, 3)


@pytest.mark.parametrize("run", ["table", "stepwise"])
def test_executor_errors(run: str) -> None:
    schedule = _edm(Step(10.0), first_evaluation="mean")
    problem = GaussianProblem(schedule.noise, s=0.5)

    def go(x: torch.Tensor) -> torch.Tensor:
        if run == "table":
            return run_table(compile_schedule(schedule), problem.denoise, x)
        return run_stepwise(schedule, problem.denoise, x)

    for x, word in [
        (torch.ones(2), "mean"),
        (torch.ones(2, dtype=torch.int64), "floating"),
        (torch.tensor(1.0), "floating"),
    ]:
        with pytest.raises(SpaceError, match=word):
            go(x)


@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_flow_order_one_is_euler_from_pure_noise_to_data(prediction: str) -> None:
    noise = Flow()
    problem = MixtureProblem(noise)
    times = np.linspace(1.0, 0.0, 9)
    schedule = Schedule(noise, 1.0, tuple(Step(float(t), prediction) for t in times[1:]))
    x = problem.start_noise(16, seed=8)
    answer = run_table(compile_schedule(schedule), problem.denoise, x)
    for now, after in pairwise(times):
        t = torch.full((16,), now, dtype=torch.float64)
        velocity = (x - problem.denoise(x, t)) / now
        x = x + (after - now) * velocity
    assert float((answer - x).abs().max()) <= 1e-12


def test_flow_from_alpha_zero_ramps_up_without_that_point() -> None:
    noise = Flow()
    steps = tuple(Step(t, order=3) for t in (0.8, 0.6, 0.4, 0.2))
    schedule = Schedule(noise, 1.0, steps)
    assert [s.order for s in schedule.canonical().steps] == [1, 1, 2, 3]
    table = compile_schedule(schedule)
    assert not table.outputs[4:, 0].any()
    problem = MixtureProblem(noise)
    x = problem.start_noise(4, seed=8)
    a, b = run_table(table, problem.denoise, x), run_stepwise(schedule, problem.denoise, x)
    assert float((a - b).abs().max()) <= 1e-12


def test_discrete_schedule_runs_to_the_clean_time() -> None:
    noise = VpDiscrete()
    problem = MixtureProblem(noise)
    steps = (*(Step(t, "noise", order=2) for t in (750.5, 500.0, 200.25, 20.0)), Step(-1.0))
    schedule = Schedule(noise, 999.0, steps)
    x = problem.start_noise(4, seed=8)
    a = run_table(compile_schedule(schedule), problem.denoise, x)
    b = run_stepwise(schedule, problem.denoise, x)
    assert float((a - b).abs().max()) <= 1e-11


def test_noise_steps_reach_sigma_zero_behind_a_corrector() -> None:
    problem = MixtureProblem(Edm())
    schedule = _edm(
        Step(10.0, "noise"), Step(1.0, "noise", 2, corrector="pseudo"), Step(0, "noise")
    )
    x = 80.0 * problem.start_noise(4, seed=8)
    a = run_table(compile_schedule(schedule), problem.denoise, x)
    b = run_stepwise(schedule, problem.denoise, x)
    near = replace(schedule, steps=(*schedule.steps[:-1], Step(1e-9, "noise")))
    c = run_table(compile_schedule(near), problem.denoise, x)
    assert float((a - b).abs().max()) <= 1e-12
    assert float((a - c).abs().max()) <= 1e-7
