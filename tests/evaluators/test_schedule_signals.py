"""Cheap figures of schedules: few hard samples, known paths, and errors of single steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from searchlab.errors import ConfigError
from searchlab.evaluators.gaussian_mixture import GaussianProblem
from searchlab.evaluators.sampling import SamplingEvaluator, SamplingProblem
from searchlab.evaluators.schedule_signals import (
    CheapSignals,
    ScheduleSignals,
    final_states,
    hard_samples,
    known_paths,
    truncation,
)
from searchlab.evaluators.trajectories import PrefixTree, Work
from searchlab.experiments.solver_schedule_problems import mixture_problem
from searchlab.population import Jobs
from searchlab.spaces.solver_schedule.families import analytic_first_family, fixed_family
from searchlab.spaces.solver_schedule.noise_schedule import VpLinear
from searchlab.spaces.solver_schedule.space import ScheduleRange, SolverScheduleSpace
from searchlab.spaces.solver_schedule.table import compile_schedule

PROBLEM = mixture_problem()
NOISE = PROBLEM.noise
FAMILY = list(fixed_family(NOISE, 6, family="mixture").values())
PANEL = tuple(FAMILY[::12])


def space_of(nfe: tuple[int, int] = (5, 6)) -> SolverScheduleSpace:
    return SolverScheduleSpace(NOISE, ScheduleRange(nfe, (NOISE.end, NOISE.end), endings=("stop",)))


def evaluator(space: SolverScheduleSpace, **options) -> SamplingEvaluator:
    cheap = CheapSignals(PANEL, **{"samples": 32, **options})
    return SamplingEvaluator(space, PROBLEM, samples=(64, 512), held_out=64, cheap=cheap)


@pytest.fixture(scope="module")
def setting():
    torch.set_num_threads(1)
    space = space_of()
    return space, evaluator(space, names=("few", "typical", "path", "truncation"))


def truth(space: SolverScheduleSpace, own: SamplingEvaluator, population) -> np.ndarray:
    n = len(population)
    jobs = Jobs(
        ids=np.arange(n),
        population=population,
        keys=space.keys(population),
        fidelity=1,
        told_at_ask=0,
        origin=("x",) * n,
        parents=np.full((n, 2), -1),
    )
    return own.evaluate(jobs).values[:, 0]


def test_many_schedules_together_are_what_each_is_alone() -> None:
    schedules = [
        *FAMILY[::40],
        *list(analytic_first_family(NOISE, 5, family="mixture", first_evaluation="zero").values())[
            ::60
        ],
        *list(analytic_first_family(NOISE, 5, family="mixture", first_evaluation="mean").values())[
            ::60
        ],
    ]
    tables = [compile_schedule(schedule) for schedule in schedules]
    start = PROBLEM.start(3, 24)
    work = Work()
    found = final_states(PROBLEM.denoise, start, tables, mean=PROBLEM.mean, work=work)
    tree = PrefixTree(PROBLEM.denoise, start, mean=PROBLEM.mean)
    assert torch.allclose(found, tree.run(tables), rtol=1e-12, atol=1e-12)
    assert work.run == sum(table.nfe for table in tables)
    assert work.rows == 24 * work.run
    for row, table in enumerate(tables):
        alone = final_states(PROBLEM.denoise, start, [table], mean=PROBLEM.mean)
        assert torch.equal(alone[0], found[row])


def test_the_hardest_samples_are_taken_for_sure_and_the_rest_is_stood_for() -> None:
    generator = np.random.default_rng(0)
    errors = generator.exponential(size=(3, 400)) ** 3
    errors[:, [7, 90]] = 500.0
    rows, weights = hard_samples(errors, 40)
    assert len(rows) == len(set(rows.tolist())) == 40
    assert {7, 90} <= set(rows.tolist())
    assert weights[list(rows).index(7)] == pytest.approx(1 / 400)
    other = errors.mean(axis=0) * generator.uniform(0.5, 1.5, 400)
    first = other[:40].mean()
    ours = weights @ other[rows]
    assert abs(ours - other.mean()) < 0.1 * other.mean()
    assert abs(first - other.mean()) > 5 * abs(ours - other.mean())


@pytest.mark.parametrize("errors", [np.zeros((2, 30)), np.full((1, 30), np.nan), np.ones((1, 30))])
def test_a_panel_that_says_nothing_gives_an_even_choice(errors: np.ndarray) -> None:
    rows, weights = hard_samples(errors, 10)
    assert len(rows) == 10
    assert np.allclose(weights, 0.1)
    assert np.array_equal(hard_samples(errors, 50)[0], np.arange(30))


def test_paths_end_where_the_solution_does() -> None:
    start = PROBLEM.start(1, 32)
    paths = known_paths(PROBLEM.denoise, start, NOISE)
    states, data, _ = paths.at(np.array([NOISE.start, NOISE.end]))
    assert torch.allclose(states[0], start.reshape(32, -1))
    far = (states[1] - PROBLEM.reference(start)).square().mean(dim=1).sqrt()
    assert float(far.median()) < 1e-3
    between = paths.at(np.array([0.5 * (NOISE.start + NOISE.end)]))
    time = torch.full((32,), 0.5 * (NOISE.start + NOISE.end), dtype=torch.float64)
    again = PROBLEM.denoise(between[0][0], time)
    assert float((between[1][0] - again).square().mean().sqrt()) < 1e-2
    assert data.shape == (2, 32, PROBLEM.shape[0])


def test_on_a_linear_problem_truncation_is_the_error_itself() -> None:
    gaussian = GaussianProblem(VpLinear(), 0.5)
    noise = gaussian.noise
    start = torch.from_numpy(np.random.default_rng(1).normal(size=(16, 3)))
    reference = gaussian.reference_solution(start, start=noise.start, end=noise.end)
    paths = known_paths(gaussian.denoise, start, noise)
    alpha, sigma = float(noise.alpha(0.3)), float(noise.sigma(0.3))
    slope = paths.at(np.array([0.3]))[2][0]
    assert slope == pytest.approx(alpha * 0.25 / (alpha**2 * 0.25 + sigma**2), rel=0.01)
    tables = [
        compile_schedule(schedule)
        for schedule in list(fixed_family(noise, 6, family="mixture").values())[::9]
    ]
    finals = final_states(gaussian.denoise, start, tables)
    real = ((finals - reference) ** 2).mean(dim=(1, 2)).sqrt().numpy()
    weights = torch.full((16,), 1 / 16, dtype=torch.float64)
    said = truncation(paths, tables, weights, mean=None)
    assert np.allclose(said, real, rtol=0.05, atol=2e-3)
    assert kendalltau(said, real)[0] > 0.9


def test_few_samples_order_known_schedules(setting) -> None:
    space, own = setting
    population = space.of_schedules(FAMILY[1::5])
    real = truth(space, own, population)
    figures = own.static_signals(population)
    few = figures[:, 0]
    assert kendalltau(few, real)[0] > 0.8
    first = SamplingEvaluator(space, PROBLEM, samples=(32, 512))
    jobs_few = truth(space, replace(first, samples=(16, 32)), population)
    assert kendalltau(few, real)[0] > kendalltau(jobs_few, real)[0]
    assert np.median(np.abs(few / real - 1)) < 0.15
    for column, least in ((1, 0.1), (2, 0.1)):
        assert kendalltau(figures[:, column], real)[0] > least
    assert (figures > 0).all()


def test_static_signals_are_paid_once_and_depend_on_the_candidate_only(setting) -> None:
    space, own = setting
    population = space.sample(np.random.default_rng(4).random((12, space.sample_width)))
    whole = own.static_signals(population)
    before = own.signal_work.rows
    assert np.array_equal(own.static_signals(population), whole)
    assert own.signal_work.rows == before
    fresh = evaluator(space, names=("few", "typical", "path", "truncation"))
    alone = np.concatenate([fresh.static_signals(population.take([row])) for row in range(12)])
    assert np.array_equal(alone, whole, equal_nan=True)
    assert own.static_signals(space.empty()).shape == (0, 4)


def test_evaluations_and_signals_stand_beside_each_other(setting) -> None:
    space, own = setting
    assert [(signal.name, signal.when) for signal in own.signals] == [
        ("few", "static"),
        ("typical", "static"),
        ("path", "static"),
        ("truncation", "static"),
    ]
    assert own.identity()["signals"] == ["few", "typical", "path", "truncation"]
    plain = SamplingEvaluator(space, PROBLEM, samples=(64, 512), held_out=64)
    assert "signals" not in plain.identity()
    assert plain.static_signals(space.of_schedules(FAMILY[:2])).shape == (2, 0)
    assert plain.signal_work.rows == 0


def test_what_is_not_finite_is_the_worst() -> None:
    calls = 0

    def breaks(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return PROBLEM.denoise(x, t) if calls <= 12 else torch.full_like(x, float("nan"))

    start = PROBLEM.start(2, 32)
    made = ScheduleSignals(
        CheapSignals(PANEL[:1], 16), breaks, start, PROBLEM.reference(start), noise=NOISE
    )
    assert np.isinf(made(FAMILY[:2])).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": 8}, "signals of 8 samples"),
        ({"names": ("few", "fast")}, "fast"),
        ({"names": ()}, "signals"),
        ({"names": ("few", "few")}, "few"),
        ({"panel": ()}, "panel"),
    ],
)
def test_options_that_cannot_be_are_named(options, text) -> None:
    with pytest.raises(ConfigError, match=text):
        CheapSignals(**{"panel": PANEL, **options})


def test_a_problem_of_another_kind_has_signals_too() -> None:
    gaussian = GaussianProblem(VpLinear(), 0.5)
    noise = gaussian.noise
    problem = SamplingProblem(
        "gaussian",
        noise,
        gaussian.denoise,
        (2, 3),
        1.0,
        lambda x: gaussian.reference_solution(x, start=noise.start, end=noise.end),
        {"problem": "G"},
        dtype=torch.float64,
    )
    space = SolverScheduleSpace(
        noise, ScheduleRange((6, 6), (noise.end, noise.end), endings=("stop",))
    )
    family = list(fixed_family(noise, 6, family="mixture").values())
    own = SamplingEvaluator(
        space, problem, samples=(64,), cheap=CheapSignals(tuple(family[:3]), 16)
    )
    figures = own.static_signals(space.of_schedules(family[::30]))
    # Every sample's error is in proportion to its state, so that few of them say everything.
    real = truth(space, replace(own, samples=(16, 64)), space.of_schedules(family[::30]))
    assert kendalltau(figures[:, 0], real)[0] > 0.99
