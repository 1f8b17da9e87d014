"""The space of solver schedules and its operators."""

from __future__ import annotations

import numpy as np
import pytest

from searchlab.algorithms import Evolution
from searchlab.errors import SpaceError
from searchlab.spaces.solver_schedule.families import analytic_first_family, fixed_family
from searchlab.spaces.solver_schedule.noise_schedule import Edm, Flow, VpDiscrete, VpLinear
from searchlab.spaces.solver_schedule.points import dpm_solver_2s, dpm_solver_3s
from searchlab.spaces.solver_schedule.schedule import Schedule, Step
from searchlab.spaces.solver_schedule.space import ScheduleRange, SolverScheduleSpace
from searchlab.spaces.solver_schedule.table import compile_schedule
from searchlab.spaces.solver_schedule.variation import ReleasedVariation, ScheduleVariation
from searchlab.testing.space import SpaceSuite
from searchlab.uniforms import uniforms


def edm() -> SolverScheduleSpace:
    within = ScheduleRange((3, 8), (0.002, 0.1), first=("model", "zero", "mean"))
    return SolverScheduleSpace(Edm(), within)


def vp() -> SolverScheduleSpace:
    return SolverScheduleSpace(VpLinear(), ScheduleRange((5, 9), (1e-3, 1e-3), endings=("stop",)))


def vp_discrete() -> SolverScheduleSpace:
    return SolverScheduleSpace(VpDiscrete(), ScheduleRange((4, 6), (0.0, 60.0)))


def flow() -> SolverScheduleSpace:
    return SolverScheduleSpace(Flow(), ScheduleRange((4, 7), (0.01, 0.3), endings=("clean",)))


SPACES = {"edm": edm, "vp": vp, "vp_discrete": vp_discrete, "flow": flow}


class TestEdm(SpaceSuite):
    @pytest.fixture
    def space(self):
        return edm()


class TestVp(SpaceSuite):
    @pytest.fixture
    def space(self):
        return vp()


class TestFlow(SpaceSuite):
    @pytest.fixture
    def space(self):
        return flow()


def sampled(space: SolverScheduleSpace, n: int = 120, seed: int = 0):
    return space.sample(uniforms(seed, 0, 0, n, space.sample_width))


@pytest.mark.parametrize("name", SPACES)
def test_every_candidate_is_a_schedule_with_the_calls_it_says(name):
    space = SPACES[name]()
    population = sampled(space)
    schedules = space.plans(population)
    calls = space.cost(population)["nfe"]
    assert [schedule.nfe for schedule in schedules] == calls.astype(int).tolist()
    assert set(calls) == set(range(space.within.nfe[0], space.within.nfe[1] + 1))
    assert all(np.isfinite(compile_schedule(schedule).outputs).all() for schedule in schedules)


def test_a_change_that_the_spelling_undoes_does_not_end_a_repair():
    """A corrector of the last step looks like a call and is none: it was drawn without end."""
    within = ScheduleRange((5, 6), (1e-3, 1e-3), endings=("stop",), first=("model",))
    space = SolverScheduleSpace(VpLinear(), within)
    for seed in (13, 14):
        assert set(space.cost(sampled(space, 500, seed))["nfe"]) == {5, 6}


@pytest.mark.parametrize("name", SPACES)
def test_a_schedule_and_its_candidate_have_one_key(name):
    space = SPACES[name]()
    population = sampled(space)
    schedules = space.plans(population)
    assert space.keys(space.of_schedules(schedules)) == space.keys(population)
    assert all(schedule.canonical() == schedule for schedule in schedules)


@pytest.mark.parametrize("operator", [ScheduleVariation(), ReleasedVariation()])
@pytest.mark.parametrize("name", SPACES)
def test_children_are_valid_and_depend_on_their_own_row(name, operator):
    space = SPACES[name]()
    parents = sampled(space, 64)
    others = parents.take(np.arange(64)[::-1])
    width = operator.width(space)
    for strength in (1.0, 16.0):
        u = uniforms(1, 0, 0, 64, width)
        children = operator.vary(space, parents, others, u, strength=strength)
        assert space.is_feasible(children).all()
        assert space.canonicalise(children).equals(children)
        assert len(space.plans(children)) == 64
        alone = operator.vary(space, parents.take([7]), others.take([7]), u[7:8], strength=strength)
        assert alone.equals(children.take([7]))
    assert len(set(space.keys(children)) - set(space.keys(parents))) > 50


def test_children_meet_their_number_of_calls():
    space = edm()
    parents = sampled(space, 200)
    calls = np.rint(space.cost(parents)["nfe"]).astype(int)
    targets = np.clip(calls + np.tile([-1, 0, 1, 0], 50), 3, 8)
    operator = ScheduleVariation()
    u = uniforms(2, 0, 0, 200, operator.width(space))
    children = operator.vary(space, parents, parents, u, targets=targets)
    met = np.rint(space.cost(children)["nfe"]).astype(int) == targets
    assert met.mean() > 0.9


def test_a_kept_head_is_the_parents():
    space = vp()
    parents = sampled(space, 100)
    operator = ScheduleVariation(head=1.0)
    u = uniforms(3, 0, 0, 100, operator.width(space))
    children = operator.vary(space, parents, parents, u)
    same = children["points"] == parents["points"]
    first = children["log_snr"][:, 0] == parents["log_snr"][:, 0]
    # The head is empty for one cut in `points`; all others keep at least the first step.
    assert (first & same).sum() > 0.6 * same.sum()


def test_known_families_are_inside():
    space = edm()
    for nfe in (3, 8):
        plain = fixed_family(space.noise, nfe)
        population = space.of_schedules(list(plain.values()))
        assert space.is_feasible(population).all()
        assert (space.cost(population)["nfe"] == nfe).all()
        analytic = analytic_first_family(space.noise, nfe, first_evaluation="mean")
        assert (space.cost(space.of_schedules(list(analytic.values())))["nfe"] == nfe).all()


def test_singlestep_solvers_are_inside():
    space = vp()
    noise = space.noise
    times = noise.time_of_log_snr(
        np.linspace(float(noise.log_snr(1.0)), float(noise.log_snr(1e-3)), 4)
    )
    times[0], times[-1] = 1.0, 1e-3
    for schedule in (dpm_solver_2s(times, noise), dpm_solver_3s(times[[0, 1, 3]], noise)):
        back = space.plans(space.of_schedules([schedule]))[0]
        table, original = compile_schedule(back), compile_schedule(schedule)
        assert np.allclose(table.outputs, original.outputs, rtol=1e-6, atol=1e-9)


def test_what_the_space_does_not_hold_is_named():
    space = edm()
    noise = space.noise
    cases = {
        "starts at 40": Schedule(noise, 40.0, (Step(1.0), Step(0.01))),
        "last noisy time is 0.5": Schedule(noise, 80.0, (Step(5.0), Step(0.5))),
        "noisy points": Schedule(
            noise, 80.0, tuple(Step(float(t)) for t in np.geomspace(60, 0.01, 20))
        ),
    }
    for text, schedule in cases.items():
        with pytest.raises(SpaceError, match=text):
            space.of_schedules([schedule])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"nfe": (0, 3)}, "nfe"),
        ({"nfe": (5, 3)}, "nfe"),
        ({"last": (0.1, 0.01)}, "last"),
        ({"last": (-1.0, 0.01)}, "last"),
        ({"endings": ()}, "endings"),
        ({"endings": ("never",)}, "endings"),
        ({"first": ("guess",)}, "first"),
        ({"orders": 5}, "orders"),
    ],
)
def test_ranges_that_make_no_sense_are_named(settings, text):
    with pytest.raises(SpaceError, match=text):
        ScheduleRange(**{"nfe": (3, 5), "last": (0.01, 0.1), **settings})


def test_a_noisy_point_needs_noise():
    with pytest.raises(SpaceError, match="sigma above 0"):
        SolverScheduleSpace(Flow(), ScheduleRange((3, 5), (0.0, 0.3)))


def test_evolution_keeps_a_pool_per_number_of_calls():
    space = edm()
    evolution = Evolution(
        space,
        seed=1,
        n_random=24,
        variation=ScheduleVariation(),
        niche="nfe",
        niches=(3, 4, 5, 6, 7, 8),
        quantum=8,
    )
    from searchlab.algorithms import Told

    targets = []
    for first in range(0, 240, 8):
        jobs = evolution.ask(first, 8)
        calls = space.cost(jobs.population)["nfe"]
        evolution.tell(Told(jobs.ids, jobs.population, calls[:, None], np.zeros(len(jobs))))
        if first >= 48:
            targets += calls.astype(int).tolist()
    counts = np.bincount(targets, minlength=9)[3:]
    assert (counts > 15).all()
