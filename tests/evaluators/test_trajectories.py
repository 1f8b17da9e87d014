"""The prefix tree: equal results however schedules are batched and remembered, fewer calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from searchlab.errors import EvaluationError
from searchlab.evaluators.gaussian_mixture import MixtureProblem
from searchlab.evaluators.trajectories import MIN_ROWS, PrefixTree, prefix_digests
from searchlab.spaces.solver_schedule import Schedule, compile_schedule
from searchlab.spaces.solver_schedule.execute import CountingDenoiser, run_table
from searchlab.spaces.solver_schedule.families import fixed_family
from searchlab.spaces.solver_schedule.space import ScheduleRange, SolverScheduleSpace
from searchlab.spaces.solver_schedule.table import CoefficientTable

PROBLEM = MixtureProblem()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tables() -> list[CoefficientTable]:
    """40 random schedules of 3 to 6 calls, twelve of them in two spellings or beginning alike."""
    end = PROBLEM.noise.end
    within = ScheduleRange((3, 6), (end, end), endings=("stop",), first=("model", "zero", "mean"))
    space = SolverScheduleSpace(PROBLEM.noise, within)
    u = np.random.default_rng(0).random((28, space.sample_width))
    schedules: list[Schedule] = space.plans(space.sample(u))
    for schedule in schedules[:12]:
        *head, last = schedule.steps
        other = "noise" if last.prediction == "data" else "data"
        schedules.append(replace(schedule, steps=(*head, replace(last, prediction=other))))
    return [compile_schedule(schedule) for schedule in schedules]


def tree(n: int = 20, **changed: object) -> PrefixTree:
    settings = {"mean": PROBLEM.mean, **changed}
    denoise = settings.pop("denoise", PROBLEM.denoise)
    return PrefixTree(denoise, PROBLEM.start_noise(n, seed=3), **settings)  # type: ignore[arg-type]


def chunks(tables: Sequence[CoefficientTable], size: int) -> list[Sequence[CoefficientTable]]:
    return [tables[at : at + size] for at in range(0, len(tables), size)]


def test_a_population_gives_what_every_table_gives_alone(tables: list[CoefficientTable]) -> None:
    x = PROBLEM.start_noise(20, seed=3)
    together = tree().run(tables)
    for table, state in zip(tables, together, strict=True):
        alone = run_table(table, PROBLEM.denoise, x, mean=PROBLEM.mean)
        assert torch.allclose(state, alone, rtol=0, atol=1e-9 * float(alone.abs().max()))


@pytest.mark.parametrize(
    "changed",
    [
        {"remember": False},
        {"max_rows": 20},
        {"max_rows": 100},
        {"max_bytes": 0},
        {"max_bytes": 30_000},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 7, 40])
def test_bits_depend_on_neither_batches_nor_memory(
    tables: list[CoefficientTable], changed: dict[str, object], size: int
) -> None:
    expected = tree().run(tables)
    other = tree(**changed)
    found = torch.cat([other.run(part) for part in chunks(tables, size)])
    assert torch.equal(found, expected)


def test_children_that_differ_in_their_last_step_cost_one_call_at_most() -> None:
    parent = next(iter(fixed_family(PROBLEM.noise, 6, family="mixture").values()))
    *head, before, last = parent.steps
    moved = [
        replace(parent, steps=(*head, replace(before, time=before.time * (1 + 0.01 * i)), last))
        for i in range(1, 11)
    ]
    counting = CountingDenoiser(PROBLEM.denoise)
    shared = tree(denoise=counting, max_rows=20)
    for schedule in (parent, *moved):
        shared.run([compile_schedule(schedule)])
    assert counting.calls == shared.work.run == 6 + 10
    assert shared.work.evaluations == 6 * 11


def test_a_schedule_seen_before_needs_no_call(tables: list[CoefficientTable]) -> None:
    shared = tree()
    first = shared.run(tables)
    run = shared.work.run
    assert torch.equal(shared.run(tables), first)
    assert shared.work.run == run
    shared.forget()
    shared.run(tables)
    assert shared.work.run == 2 * run


@pytest.mark.parametrize("bound", [0, 50_000, 200_000])
@pytest.mark.parametrize("max_rows", [20, 4000])
def test_what_is_remembered_keeps_within_its_bound_in_truth(
    tables: list[CoefficientTable], bound: int, max_rows: int
) -> None:
    shared = tree(max_bytes=bound, max_rows=max_rows)
    for part in chunks(tables, 8):
        shared.run(part)
        assert shared.held_bytes <= bound
        # Tensors that are parts of larger ones hold all of them.
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for node in shared._nodes.values()
            for tensor in (node.state, node.restart, node.output)
            if tensor is not None and tensor is not shared._x
        }
        assert sum(held.values()) <= bound


def test_calls_have_at_most_the_rows_that_are_allowed(tables: list[CoefficientTable]) -> None:
    rows: list[int] = []

    def listening(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return PROBLEM.denoise(x, t)

    shared = tree(denoise=listening, max_rows=100)
    shared.run(tables)
    assert 20 < max(rows) <= 100
    assert sum(rows) == shared.work.rows == 20 * shared.work.run
    assert len(rows) == shared.work.calls


def test_few_samples_are_padded_and_cut_again(tables: list[CoefficientTable]) -> None:
    rows: list[int] = []

    def listening(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return PROBLEM.denoise(x, t)

    few = tree(3, denoise=listening, max_rows=1)
    found = few.run(tables[:4])
    assert found.shape == (4, 3, PROBLEM.dimension)
    assert set(rows) == {MIN_ROWS}
    assert torch.equal(found, tree(20).run(tables[:4])[:, :3])


def test_equal_digests_are_equal_beginnings(tables: list[CoefficientTable]) -> None:
    for at in range(12):
        one, other = prefix_digests(tables[at]), prefix_digests(tables[28 + at])
        assert one[: tables[at].evaluations] == other[: tables[at].evaluations]
    assert len({prefix_digests(table)[-1] for table in tables[:28]}) == 28


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros((0, 2)), torch.zeros((2, 2)).int()])
def test_start_states_that_are_none_are_refused(x: Tensor) -> None:
    with pytest.raises(EvaluationError, match="start states of shape"):
        PrefixTree(PROBLEM.denoise, x)


def test_an_answer_of_another_shape_is_refused(tables: list[CoefficientTable]) -> None:
    with pytest.raises(EvaluationError, match=r"answered \(20, 1\); allowed: \(20, 4\)"):
        tree(denoise=lambda x, t: x[:, :1]).run(tables[:1])


def test_a_missing_mean_is_named(tables: list[CoefficientTable]) -> None:
    wanting = next(table for table in tables if table.first_evaluation == "mean")
    with pytest.raises(EvaluationError, match="data mean"):
        tree(mean=None).run([wanting])
