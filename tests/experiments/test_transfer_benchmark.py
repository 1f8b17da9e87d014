"""Schedules of fewer calls as starting points for more."""

from __future__ import annotations

from searchlab.experiments.benchmarks.transfer import lengthened
from searchlab.experiments.solver_schedule_problems import mixture_problem
from searchlab.spaces.solver_schedule.families import fixed_family


def test_steps_are_put_into_every_gap() -> None:
    noise = mixture_problem().noise
    short = next(iter(fixed_family(noise, 4, family="mixture").values()))
    ways = lengthened(short, 6)
    gaps = len(short.steps)
    # Two gaps of these once each, or one of them twice: in its middle, then in either half.
    assert len({way.times for way in ways}) == len(ways) == gaps * (gaps - 1) // 2 + 2 * gaps
    for way in ways:
        assert way.nfe == 6
        assert set(short.times) < set(way.times)
    assert lengthened(short, 4) == [short]
