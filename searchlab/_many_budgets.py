"""Plans for separable programs with several budgets, or few distinct labels per group.

Column generation gives prices and a lower bound. Without a limit on distinct labels, an integer
program over the labels that cost next to nothing under these prices gives a plan, and a wider one
the optimum where few labels are left. With a limit, integer programs over sets of labels look at
all plans that lose at most so much more than the bound: a plan is found that is as good as asked
for, or none is there, which raises the bound, and the next program looks twice as far.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._columns import Generation
from searchlab._exact import Found
from searchlab._label_program import NODES, Many
from searchlab._set_program import SetProgram

__all__ = ["solve_many_budgets"]

Array = NDArray[Any]

CORE = 100  # labels beyond one per element that a first integer program looks at
MOST_CORE = 1000  # and beyond this many no further one is tried for a better plan
SMALL = 1500  # binaries of a program over labels that HiGHS finishes by itself
FIRST_WINDOW = 0.5  # of the gap asked for
LEAST_GAP = 1e-3  # that windows are measured by
MOST_BINARIES = 4000  # of a program over sets
SET_NODES = 1000
SET_WORK = 300_000  # nodes times binaries; numbers and not seconds, for equal answers


def solve_many_budgets(problem: Many, gap: float) -> Found:
    """A plan with a bound; see `solve_one_budget`. `price` holds one number per budget."""
    if problem.groups is not None and np.bincount(problem.groups).max() <= problem.most:
        problem = replace(problem, groups=None)  # nothing is limited
    problem = problem.lean()
    generation = Generation(problem)
    generation.run(gap / 20)
    if generation.empty:
        return Found(None, np.inf, generation.prices)
    if generation.limited:
        best, bound, done = _in_windows(problem, generation, gap)
        if not done:
            best = _of_chosen_sets(problem, generation, best, bound, gap)
    else:
        best, bound = _near(problem, generation, gap, most=MOST_CORE), generation.bound
        done = False
    value = np.inf if best is None else problem.loss(best)
    if not done and not _within(value, bound, gap):
        found, proved = _in_full(problem, generation, value, gap)
        if found is not None:
            best, value = found, problem.loss(found)
        bound = max(bound, proved)
    return Found(best, min(bound, value), generation.prices)


def _of_chosen_sets(
    problem: Many, generation: Generation, best: Array | None, bound: float, gap: float
) -> NDArray[np.int64] | None:
    """A plan where too many are near the bound to look at them all; `best` where none is better.

    The bound is a good one then, and some plan of the sets that the linear program takes near it.
    """
    sets = generation.dive()
    free = replace(problem, losses=np.where(sets, problem.losses, np.inf), groups=None)
    inner = Generation(free)
    inner.run(gap / 20)
    found = None if inner.empty else _near(free, inner, gap, most=0)
    if found is not None and (best is None or problem.loss(found) < problem.loss(best)):
        best = found
    if best is not None and not _within(problem.loss(best), bound, gap):
        best = generation.improved(best, gap)
    return best


def _in_windows(
    problem: Many, generation: Generation, gap: float
) -> tuple[NDArray[np.int64] | None, float, bool]:
    """The best plan found, what is proved, and whether nothing is left to do."""
    assert generation.sets is not None
    priced, sums = generation.priced_sums()
    start = generation.bound
    best, value, bound = None, np.inf, start
    unit = max(start, LEAST_GAP * generation.unit)
    room = FIRST_WINDOW * max(gap, LEAST_GAP) * unit
    whole = False
    while not whole:
        room = min(room, value - start)
        program = SetProgram(
            problem, priced, generation.members, generation.sets, sums, start, room
        )
        if program.size > MOST_BINARIES:
            break
        whole = program.whole
        found, proved = program.solve(0.99 * gap, min(SET_NODES, SET_WORK // max(program.size, 1)))
        bound = max(bound, proved)
        if found is not None and problem.loss(found) < value:
            best, value = found, problem.loss(found)
        if _within(value, bound, gap):
            return best, bound, True
        if np.isinf(proved):  # no plan exists, or none better than the best one
            return best, bound, True
        if proved < start + room or room >= value - start:  # stopped early, or in rounding errors
            break
        room *= 2
    return best, bound, False


def _near(
    problem: Many, generation: Generation, gap: float, *, most: int
) -> NDArray[np.int64] | None:
    """The best plan of the labels that cost next to nothing under the best prices; no limit."""
    reduced = generation.reduced()
    order = np.sort(reduced[np.isfinite(reduced)])
    best, value, more = None, np.inf, CORE
    while True:
        last = len(reduced) + more >= len(order)
        reach = order[-1 if last else len(reduced) + more]
        found, _ = problem.program(reduced <= reach, value).solve(gap=gap / 4, nodes=NODES // 8)
        if found is not None and problem.keeps(found) and problem.loss(found) < value:
            best, value = found, problem.loss(found)
        if last or _within(value, generation.bound, gap) or (best is not None and more > most):
            return best
        more *= 2


def _in_full(
    problem: Many, generation: Generation, value: float, gap: float
) -> tuple[NDArray[np.int64] | None, float]:
    """What HiGHS finds and proves where few enough labels can be part of a better plan."""
    allowed = generation.useful(value - generation.bound)
    if allowed.sum() > SMALL:
        return None, generation.bound
    program = problem.program(allowed, value)
    found, proved = program.solve(groups=problem.groups, most=problem.most, gap=gap)
    if found is not None and not (problem.keeps(found) and problem.loss(found) < value):
        found = None
    return found, proved if np.isfinite(proved) else generation.bound


def _within(value: float, bound: float, gap: float) -> bool:
    return np.isfinite(value) and value - bound <= max(gap * value, 1e-12)
