"""Pools of guided search: many ids at once, and one purpose for all candidates of an id."""

from __future__ import annotations

import numpy as np

from searchlab.algorithms.guided import SMALL, Guided
from searchlab.population import Population
from searchlab.space import Space
from searchlab.testing.algorithm import drive
from searchlab.uniforms import POOL, uniforms
from searchlab.variables import Choice, Integer


class Niches(Space):
    """Candidates of three kinds that are never compared."""

    def cost(self, population: Population):
        return {"n": population["n"].astype(np.float64)}


def guided() -> tuple[Guided, np.ndarray]:
    space = Niches(n=Integer(1, 3), x=Choice(range(5), shape=(6,)))
    options = {"niche": "n", "niches": (1, 2, 3), "quantum": 4}
    made = Guided(space, options=options, pool=20, first_fit=12, guard="always")
    parts = drive(made, 40)
    return made, Population.concat([jobs.population for jobs in parts])["n"]


def test_pools_drawn_together_are_those_drawn_alone() -> None:
    made, _ = guided()
    together = made._drawn(range(60, 66))
    for i, draw in zip(range(60, 66), together, strict=True):
        (alone,) = made._drawn([i])
        assert alone is not None
        assert draw is not None
        assert len(draw.population) == 20
        assert draw.population.equals(alone.population)
        assert np.array_equal(draw.parents, alone.parents)
    assert made._drawn([]) == []


def test_candidates_of_one_pool_are_meant_for_one_niche() -> None:
    made, niche = guided()
    assert made.inner.shared == 1
    homes = []
    for draw in made._drawn(range(60, 90)):
        assert draw is not None
        (home,) = np.unique(niche[draw.parents])
        homes.append(int(home))
    assert set(homes) == {1, 2, 3}


def test_a_small_pool_is_varied_as_usual() -> None:
    made, _ = guided()
    i, width = 60, made.inner._cached_width
    u = uniforms(made.seed, POOL, i * made.pool, made.pool, width)
    u[:, :1] = u[0, :1]
    usual = made.inner._draw(np.full(made.pool, i), u, 1.0)
    (draw,) = made._drawn([i])
    assert usual is not None
    assert draw is not None
    assert draw.population.equals(usual.population)
    made.pool = SMALL  # candidates to spare: half of them vary more wildly
    (large,) = made._drawn([i])
    u = uniforms(made.seed, POOL, i * made.pool, made.pool, width)
    u[:, :1] = u[0, :1]
    usual = made.inner._draw(np.full(made.pool, i), u, 1.0)
    assert large is not None
    assert usual is not None
    same = large.population["x"] == usual.population["x"]
    assert same[: SMALL // 2].all()
    assert not same[SMALL // 2 :].all()


def test_pools_ordered_together_are_ordered_as_alone() -> None:
    made, _ = guided()
    draws = dict(zip(range(60, 66), made._drawn(range(60, 66)), strict=True))
    together = made._orders({**draws, 70: None})
    assert list(together) == list(draws)
    for i, draw in draws.items():
        (alone,) = made._orders({i: draw}).values()
        assert np.array_equal(together[i], alone)
    assert made._orders({70: None}) == {}
