"""Evolution that climbs first; guided search that chooses among few while skill is not plain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from searchlab.algorithms import _guard as guard_module
from searchlab.algorithms import guided as guided_module
from searchlab.algorithms._guard import Evidence, convinces, correlation
from searchlab.algorithms.base import Algorithm, Told
from searchlab.algorithms.evolution import Evolution, ParentRule
from searchlab.algorithms.guided import Guided
from searchlab.algorithms.variation import UniformVariation
from searchlab.errors import ConfigError
from searchlab.evaluator import Signal
from searchlab.population import Jobs, Population
from searchlab.space import Space
from searchlab.variables import Choice, Real

WIDE = Space(x=Choice(range(8), shape=(32,)))
MIXED = Space(x=Choice(range(4), shape=(4,)), y=Real(0, 1, shape=(4,)))
TARGET = np.random.default_rng(5).integers(8, size=32)


def losses(jobs: Jobs) -> Any:
    return (jobs.population["x"] != TARGET[: jobs.population["x"].shape[1]]).sum(axis=1) * 1.0


def driven(algorithm: Algorithm, count: int) -> tuple[list[Jobs], list[float]]:
    """Asks and tells one by one."""
    asked, values = [], []
    for i in range(count):
        jobs = algorithm.ask(i, 1)
        loss = losses(jobs)
        algorithm.tell(Told(jobs.ids, jobs.population, loss[:, None], np.zeros(1), jobs.predicted))
        asked.append(jobs)
        values.append(float(loss[0]))
    return asked, values


def test_while_it_climbs_every_child_is_a_mutant_of_the_best() -> None:
    asked, values = driven(Evolution(WIDE, seed=3, climb=20), 60)
    for i in range(8, 28):
        best = int(max(np.flatnonzero(np.array(values[:i]) == min(values[:i]))))  # the latest
        assert asked[i].parents.tolist() == [[best, best]]
        changed = (asked[i].population["x"] != asked[best].population["x"]).sum()
        assert 1 <= changed <= 4
    later = [jobs.parents[0] for jobs in asked[28:]]
    assert any(a != b for a, b in later)  # then it mixes


def test_climbing_finds_more_in_few_evaluations() -> None:
    ends: dict[int, list[float]] = {0: [], 40: []}
    for seed in range(6):
        for climb, found in ends.items():
            found.append(min(driven(Evolution(WIDE, seed=seed, climb=climb), 50)[1]))
    assert np.mean(ends[40]) < np.mean(ends[0]) - 1


@pytest.mark.parametrize(
    "options",
    [
        {"climb": -1},
        {"climb": 5, "mating": 0.5},
        {"climb": 5, "early": UniformVariation(crossover=0.5), "early_until": 4},
    ],
)
def test_what_does_not_go_with_climbing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="climb"):
        Evolution(WIDE, **options)


def test_climbing_is_a_setting_and_its_absence_none() -> None:
    assert Evolution(WIDE, climb=7).settings()["climb"] == 7
    assert "climb" not in Evolution(WIDE, parents=ParentRule()).settings()


def test_plain_skill_takes_more_than_trust() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=24)
    clear = correlation([(a, a + 0.3 * rng.normal(size=24))])
    assert clear.errors > guard_module.SURE
    assert convinces(clear)
    assert not convinces(Evidence())
    assert not convinces(Evidence(0.4, 0.05, 0.7, 24, 2.2))
    assert guard_module.DOUBT < guard_module.SURE
    # The interval and the number of standard errors say the same.
    low = np.arctanh(clear.rho) * (1 - 1.645 / clear.errors)
    assert np.isclose(np.arctanh(clear.low), low)


def test_until_skill_is_plain_few_usual_candidates_are_chosen_among(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, Any]] = []
    near = Guided._near

    def noted(self: Guided, ids: Any, size: int, strengths: Any = guided_module.USUAL) -> Any:
        if len(ids):
            seen.append((size, strengths))
        return near(self, ids, size, strengths)

    monkeypatch.setattr(Guided, "_near", noted)
    monkeypatch.setattr(guard_module, "DOUBT", -np.inf)
    monkeypatch.setattr(guard_module, "SURE", np.inf)
    driven(Guided(WIDE, seed=1, pool=300, guard="measured"), 24)
    assert seen
    assert set(seen) == {(guided_module.TAME, guided_module.USUAL)}
    seen.clear()
    driven(Guided(WIDE, seed=1, pool=300, guard="always"), 24)
    assert set(seen) == {(300, guided_module.STRENGTHS)}


def test_climbing_pools_are_small_without_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Signals:
        signals = (Signal("sum", when="static"),)

        def static_signals(self, population: Population) -> Any:
            return population["x"].sum(axis=1, keepdims=True) * 1.0

    original = Guided._near
    sizes: list[int] = []

    def near(self: Guided, ids: Any, size: int, *more: Any) -> Any:
        sizes.extend([size] * len(ids))
        return original(self, ids, size, *more)

    monkeypatch.setattr(Guided, "_near", near)
    for signals, wanted in ((None, {guided_module.STEPS, 200}), (Signals(), {200})):
        sizes.clear()
        options = {"pool": 200, "guard": "always", "options": {"climb": 10}}
        driven(Guided(WIDE, seed=1, signals=signals, **options), 24)  # type: ignore[arg-type]
        assert set(sizes) == wanted


def test_pools_of_choices_vary_as_usual_while_evolution_climbs() -> None:
    for space, tame in ((WIDE, True), (MIXED, False)):
        algorithm = Guided(space, seed=1, pool=200, guard="always", options={"climb": 10})
        asked, _ = driven(algorithm, 24)
        chosen = [i for i in range(12, 24) if asked[i].origin[0].startswith("guided")]
        assert chosen
        changed = [
            int(
                (
                    asked[i].population["x"] != asked[int(asked[i].parents[0, 0])].population["x"]
                ).sum()
            )
            for i in chosen
            if asked[i].parents[0, 0] >= 0
        ]
        climbing = [c for i, c in zip(chosen, changed, strict=False) if i < 18]
        assert (max(climbing, default=0) <= 4) or not tame


def test_spread_starts_hit_every_part_of_every_number_once() -> None:
    space = Space(x=Real(0, 1, shape=(6,)), y=Choice(range(10)))
    algorithm = Evolution(space, seed=2, first_id=5, n_random=10, spread=True)
    whole = algorithm.ask(5, 10).population
    parts = np.floor(whole["x"] * 10).astype(int)
    assert (np.sort(parts, axis=0) == np.arange(10)[:, None]).all()
    assert sorted(whole["y"].tolist()) == list(range(10))
    for i in range(5, 15):  # a start depends on its id only
        again = Evolution(space, seed=2, first_id=5, n_random=10, spread=True)
        np.testing.assert_array_equal(again.ask(i, 1).population["x"][0], whole["x"][i - 5])
    plain = Evolution(space, seed=2, first_id=5, n_random=10).ask(5, 10).population
    assert (np.sort(np.floor(plain["x"] * 10), axis=0) != np.arange(10)[:, None]).any()
    assert "spread" in algorithm.settings()


def test_spread_starts_in_a_space_of_few_candidates_are_all_of_them() -> None:
    space = Space(x=Choice(range(3)), y=Choice(range(2)))
    algorithm = Evolution(space, n_random=8, spread=True)
    keys: set[bytes | None] = set()
    for i in range(8):
        jobs = algorithm.ask(i, 1)
        keys |= set(jobs.keys)
        if len(jobs):
            losses = np.zeros((1, 1))
            algorithm.tell(Told(jobs.ids, jobs.population, losses, np.zeros(1), jobs.predicted))
    assert len(keys) == 6
