"""Schedules of an earlier search with more or fewer model calls: steps put in and taken out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._adopt import Adopted, recoded
from searchlab.population import Population
from searchlab.space import Space
from searchlab.spaces.solver_schedule.space import SolverScheduleSpace
from searchlab.spaces.solver_schedule.variation import delete_step, insert_step
from searchlab.uniforms import uniforms

__all__ = ["adopted"]

Array = NDArray[Any]

WAYS = 64  # of one schedule that are kept while it grows or shrinks
ROUNDS = 4  # of k schedules each: some have no way, as a step with a corrector is two calls


def adopted(space: SolverScheduleSpace, earlier: Space, population: Population, k: int) -> Adopted:
    """The k best schedules, or some more, for every number of model calls, from the nearest number.

    A schedule of as many calls stays as it is, but for ranges. Else a step at a time is put in,
    halfway of a gap in log-SNR, with the decisions of the step whose gap it divides, or taken out.
    Two rules say what is likely, as each fails for some models: of every other schedule the ways
    come first whose points lie most like its own, of the rest those whose gaps are most even.

    Args:
        space, earlier, population, k: see `searchlab._adopt.Adopts`.
    """
    wide, rows, schedules = _widened(space, earlier, population)
    calls = _calls(wide, schedules)
    found: list[Population] = []
    sources: list[NDArray[np.int64]] = []
    low, high = space.within.nfe
    known = np.unique(calls)
    for target in range(low, high + 1) if len(known) else ():
        nearest = int(known[np.argmin(np.abs(known - target))])
        same = np.flatnonzero(calls == nearest)
        met = 0
        for start in range(0, min(len(same), ROUNDS * k), k):
            best = same[start : start + k]
            ways, of = _resized(wide, schedules.take(best), target)
            inside, kept = _narrowed(space, wide, ways)
            found.append(inside)
            sources.append(rows[best[of[kept]]])
            met += len(np.unique(of[kept]))
            if met >= k:
                break
    if not found:
        return Adopted(space.empty(), np.zeros(0, dtype=np.int64))
    return Adopted(Population.concat(found), np.concatenate(sources))


def _calls(space: SolverScheduleSpace, population: Population) -> NDArray[np.int64]:
    return np.rint(space.cost(population)["nfe"]).astype(np.int64)


def _widened(
    space: SolverScheduleSpace, earlier: Space, population: Population
) -> tuple[SolverScheduleSpace, NDArray[np.int64], Population]:
    """A space with places for both, which rows it can hold, and these rows in it."""
    most = max(int(earlier.variables["order"].size), space.most)
    wide = SolverScheduleSpace(space.noise, replace(space.within, nfe=(1, most)))
    columns: dict[str, Array] = {}
    fits = np.ones(len(population), dtype=bool)
    for name, variable in wide.variables.items():
        columns[name], known = recoded(variable, earlier, population, name)
        fits &= known
    rows = np.flatnonzero(fits)
    own = {name: column[rows] for name, column in columns.items()}
    return wide, rows, _with_places(wide, own)


def _with_places(space: SolverScheduleSpace, columns: dict[str, Array]) -> Population:
    """Schedules of another number of places in a space, within its ranges."""
    out = {}
    for name, variable in space.variables.items():
        column = columns[name]
        if variable.shape:
            column = column[:, : space.most]
            more = np.repeat(column[:, -1:], space.most - column.shape[1], axis=1)
            column = np.concatenate([column, more], axis=1)
        out[name] = column
    return _canonical(space, out)


def _narrowed(
    space: SolverScheduleSpace, wide: SolverScheduleSpace, ways: Population
) -> tuple[Population, NDArray[np.int64]]:
    """What the space has places for and allows, and its rows."""
    fits = np.flatnonzero(ways["points"] <= space.most)
    columns = {name: column[fits] for name, column in ways.columns.items()}
    inside = _with_places(space, columns)
    same = space.is_feasible(inside) & (_calls(space, inside) == _calls(wide, ways.take(fits)))
    return inside.take(np.flatnonzero(same)), fits[same]


def _resized(
    space: SolverScheduleSpace, population: Population, target: int
) -> tuple[Population, NDArray[np.int64]]:
    """Ways to make schedules of `target` model calls, and the row that each comes from."""
    shapes = population
    ways, of = population, np.arange(len(population))
    done: list[Population] = []
    rows: list[NDArray[np.int64]] = []
    while len(ways):
        missing = target - _calls(space, ways)
        there = np.flatnonzero(missing == 0)
        done.append(ways.take(there))
        rows.append(of[there])
        longer, from_longer = _one_more(space, ways.take(missing > 0))
        shorter, from_shorter = _one_less(space, ways.take(missing < 0))
        sign = np.concatenate([np.ones(len(longer)), -np.ones(len(shorter))])
        of = np.concatenate([of[missing > 0][from_longer], of[missing < 0][from_shorter]])
        ways = Population.concat([longer, shorter])
        # An implicit corrector that comes or goes with a step is a call too: the target may be
        # passed, and there is no way back.
        kept = np.flatnonzero(sign * (target - _calls(space, ways)) >= 0)
        ways, of = _likeliest(space, ways.take(kept), of[kept], shapes)
    return Population.concat(done), np.concatenate(rows)


def _one_more(
    space: SolverScheduleSpace, population: Population
) -> tuple[Population, NDArray[np.int64]]:
    """Every gap of every schedule divided; the row that each comes from."""
    ways, of, where = _each(population, population["points"] * (population["points"] < space.most))
    insert_step(ways, np.ones(len(of), dtype=bool), where, np.full(len(of), 0.5))
    return _canonical(space, ways), of


def _one_less(
    space: SolverScheduleSpace, population: Population
) -> tuple[Population, NDArray[np.int64]]:
    """Every point but the last left out; the row that each comes from."""
    ways, of, where = _each(population, population["points"].astype(np.int64) - 1)
    delete_step(ways, np.ones(len(of), dtype=bool), where)
    return _canonical(space, ways), of


def _each(
    population: Population, places: Array
) -> tuple[dict[str, Array], NDArray[np.int64], NDArray[np.int64]]:
    """Columns with a row for each place of each candidate, their rows and the places."""
    of = np.repeat(np.arange(len(population)), places)
    start = np.cumsum(places) - places
    where = np.arange(len(of)) - start[of]
    columns = {name: np.array(column[of]) for name, column in population.columns.items()}
    return columns, of, where.astype(np.int64)


def _canonical(space: SolverScheduleSpace, columns: dict[str, Array]) -> Population:
    n = len(columns["points"])
    return space.repair(Population(columns), uniforms(0, 0, 0, n, space.repair_width))


def _likeliest(
    space: SolverScheduleSpace, ways: Population, of: NDArray[np.int64], shapes: Population
) -> tuple[Population, NDArray[np.int64]]:
    """At most `WAYS` different ones of each row, the likeliest first."""
    if not len(ways):
        return ways, of
    doubt = np.where(of % 2 == 0, _departure(ways, shapes.take(of)), _widest_gap(ways))
    keys, seen, kept = space.keys(ways), set(), []
    left = np.full(int(of.max()) + 1, WAYS)
    for way in np.lexsort((doubt, of)).tolist():
        name = (int(of[way]), keys[way])
        if name not in seen and left[of[way]] > 0:
            seen.add(name)
            left[of[way]] -= 1
            kept.append(way)
    return ways.take(np.array(kept)), of[np.array(kept)]


def _departure(ways: Population, shapes: Population) -> NDArray[np.float64]:
    """Mean square distance in log-SNR from the line through another schedule's points."""
    out = np.empty(len(ways))
    for i in range(len(ways)):
        own = ways["log_snr"][i, : ways["points"][i]]
        line = shapes["log_snr"][i, : shapes["points"][i]]
        at = np.linspace(0.0, 1.0, len(line))
        out[i] = np.mean((own - np.interp(np.linspace(0.0, 1.0, len(own)), at, line)) ** 2)
    return out


def _widest_gap(ways: Population) -> NDArray[np.float64]:
    gaps = np.diff(ways["log_snr"], axis=1)
    inside = np.arange(gaps.shape[1]) < ways["points"].astype(np.int64)[:, None] - 1
    widest: NDArray[np.float64] = np.where(inside, gaps, 0.0).max(axis=1, initial=0.0)
    return widest
