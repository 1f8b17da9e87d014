"""Shared trajectories: the same values, fewer calls, bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from searchlab.errors import EvaluationError
from searchlab.evaluators.gaussian_mixture import MixtureProblem
from searchlab.evaluators.trajectories import PrefixTree, prefix_digests
from searchlab.spaces.solver_schedule.execute import run_table
from searchlab.spaces.solver_schedule.families import fixed_family
from searchlab.spaces.solver_schedule.noise_schedule import Edm, VpLinear
from searchlab.spaces.solver_schedule.points import ddim, with_first_evaluation
from searchlab.spaces.solver_schedule.schedule import Schedule, Step
from searchlab.spaces.solver_schedule.space import ScheduleRange, SolverScheduleSpace
from searchlab.spaces.solver_schedule.table import compile_schedule
from searchlab.uniforms import uniforms


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mixture():
    return MixtureProblem()


@pytest.fixture(scope="module")
def tables():
    space = SolverScheduleSpace(
        VpLinear(), ScheduleRange((4, 8), (1e-3, 1e-3), endings=("stop",), first=("model", "zero"))
    )
    population = space.sample(uniforms(0, 0, 0, 60, space.sample_width))
    return [compile_schedule(schedule) for schedule in space.plans(population)]


class Dense:
    """A network of dense layers in single precision; counts calls and rows."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(5, 256),
            torch.nn.SiLU(),
            torch.nn.Linear(256, 384),
            torch.nn.SiLU(),
            torch.nn.Linear(384, 4),
        )
        self.rows: list[int] = []

    def __call__(self, x, t):
        self.rows.append(len(x))
        with torch.no_grad():
            return self.net(torch.cat([x, t[:, None]], dim=1))


def test_sharing_changes_no_bit(mixture, tables):
    x = mixture.start_noise(64, seed=3)
    shared = PrefixTree(mixture.denoise, x).run(tables)
    apart = PrefixTree(mixture.denoise, x, remember=False).run(tables)
    single = torch.stack([run_table(table, mixture.denoise, x) for table in tables])
    assert torch.equal(shared, apart)
    assert torch.equal(shared, single)


def test_order_and_company_change_no_bit(tables):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    together = PrefixTree(Dense(), x).run(tables)
    backwards = PrefixTree(Dense(), x, max_rows=100).run(tables[::-1]).flip(0)
    tree = PrefixTree(Dense(), x)
    one_by_one = torch.cat([tree.run([table]) for table in tables])
    assert torch.equal(together, backwards)
    assert torch.equal(together, one_by_one)


def test_padding_is_what_makes_few_samples_bit_equal(tables):
    """Without padding, fewer than 16 rows take other matrix kernels and differ in the last bits."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(2))
    whole = PrefixTree(Dense(), x).run(tables)
    differs = False
    for n in (1, 2, 3, 5, 7):
        padded = PrefixTree(Dense(), x[:n]).run(tables)
        assert torch.equal(padded, whole[:, :n])
        bare = torch.cat([PrefixTree(Dense(), x[:n], min_rows=1).run([t]) for t in tables])
        differs = differs or not torch.equal(bare, whole[:, :n])
    assert differs


def test_a_change_of_the_last_step_costs_one_call():
    noise = VpLinear()
    n = 8
    times = np.linspace(1.0, 0.05, n).tolist()
    parent = Schedule(noise, times[0], (*(Step(t) for t in times[1:]), Step(1e-3)))
    children = [
        Schedule(noise, times[0], (*parent.steps[:-1], Step(1e-3 * (2 + i)))) for i in range(10)
    ]
    last_call_moved = [
        Schedule(
            noise,
            times[0],
            (*parent.steps[:-2], Step(times[-1] * (1 + 0.01 * (i + 1))), parent.steps[-1]),
        )
        for i in range(10)
    ]
    x = torch.randn(16, 4, dtype=torch.float64)
    mixture = MixtureProblem()
    tree = PrefixTree(mixture.denoise, x)
    tree.run([compile_schedule(parent)])
    assert tree.work.run == n
    tree.run([compile_schedule(child) for child in children])
    assert tree.work.run == n  # the last step needs no call of its own
    tree.run([compile_schedule(child) for child in last_call_moved])
    assert tree.work.run == n + 10


def test_schedules_that_run_alike_share_however_written():
    noise = Edm()
    times = (20.0, 1.0, 0.1)
    data = Schedule(noise, 80.0, tuple(Step(t) for t in times))
    other = Schedule(noise, 80.0, tuple(Step(t, prediction="noise") for t in times))
    assert prefix_digests(compile_schedule(data)) == prefix_digests(compile_schedule(other))
    analytic = compile_schedule(with_first_evaluation(data, "zero"))
    assert prefix_digests(analytic)[0] != prefix_digests(compile_schedule(data))[0]


def test_memory_is_bounded_and_results_do_not_depend_on_it(mixture, tables):
    x = mixture.start_noise(64, seed=4)
    free = PrefixTree(mixture.denoise, x)
    expected = free.run(tables)
    node = 2 * x.numel() * x.element_size()
    for bound in (0, 5 * node, 40 * node):
        tree = PrefixTree(mixture.denoise, x, max_bytes=bound)
        for start in range(0, len(tables), 4):
            got = tree.run(tables[start : start + 4])
            assert torch.equal(got, expected[start : start + 4])
            assert tree.held_bytes <= bound
    assert free.held_bytes > 40 * node
    free.forget()
    assert free.held_bytes == 0


def test_rows_per_call_follow_from_the_sample_count(tables):
    for samples, per_call in ((64, 62), (1000, 4), (5000, 1)):
        model = Dense()
        x = torch.randn(samples, 4)
        PrefixTree(model, x, remember=False).run(tables[:8])
        assert max(model.rows) <= max(4000, samples)
        assert set(np.array(model.rows) // samples) <= set(range(1, per_call + 1))
        assert all(rows % samples == 0 for rows in model.rows)


def test_known_solvers_share_more_than_half_of_their_calls():
    noise = Edm()
    tables = [compile_schedule(schedule) for schedule in fixed_family(noise, 5).values()]
    calls = []

    def denoise(x, t):
        calls.append(len(x))
        return x * 0.1

    tree = PrefixTree(denoise, torch.randn(16, 2))
    tree.run(tables)
    assert tree.work.evaluations == 5 * len(tables)
    assert tree.work.evaluations / tree.work.run > 2.3
    assert sum(calls) == 16 * tree.work.run


def test_the_mean_is_needed_where_it_is_used():
    noise = Edm()
    table = compile_schedule(with_first_evaluation(ddim(np.array([80.0, 1.0, 0.1]), noise), "mean"))
    x = torch.randn(16, 3)
    with pytest.raises(EvaluationError, match="data mean"):
        PrefixTree(lambda x, t: x, x).run([table])
    mean = torch.tensor([1.0, 2.0, 3.0])
    got = PrefixTree(lambda x, t: x * 0.5, x, mean=mean).run([table])[0]
    assert torch.equal(got, run_table(table, lambda x, t: x * 0.5, x, mean=mean))


@pytest.mark.parametrize(
    "x", [torch.zeros(0, 3), torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)]
)
def test_start_states_must_be_a_batch_of_floats(x):
    with pytest.raises(EvaluationError, match="start states"):
        PrefixTree(lambda x, t: x, x)


def test_a_model_that_answers_with_another_shape_is_named():
    table = compile_schedule(ddim(np.array([80.0, 1.0]), Edm()))
    with pytest.raises(EvaluationError, match="answered"):
        PrefixTree(lambda x, t: x[:, :1], torch.randn(16, 3)).run([table])
