"""Algorithms: the conformance suite over the registry; other processes propose the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from searchlab.algorithms import Evolution, Listed, ParentRule, Race, Random, Seeds, Told
from searchlab.algorithms.base import Algorithm
from searchlab.config import ALGORITHMS, resolve
from searchlab.errors import ConfigError
from searchlab.space import Space
from searchlab.testing.algorithm import SPACES, AlgorithmSuite, Build, drive, proposals
from searchlab.variables import Choice, Integer
from tests.engine.loop_tools import digest_elsewhere


class TestRandom(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Random(
            space, seed=seed, first_id=first_id, seeds=seeds
        )


class TestRandomWithRepeats(AlgorithmSuite):
    allows_repeats = True

    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Random(
            space, seed=seed, first_id=first_id, seeds=seeds, repeats="allow"
        )


class TestListed(AlgorithmSuite):
    only_seeds = True

    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Listed(
            space, seed=seed, first_id=first_id, seeds=seeds, quantum=4
        )


class TestEvolution(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Evolution(
            space, seed=seed, first_id=first_id, seeds=seeds, n_random=6
        )


class TestEvolutionInGroups(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Evolution(
            space,
            seed=seed,
            first_id=first_id,
            seeds=seeds,
            n_random=3,
            quantum=8,
            parents=ParentRule("rank", mu=6),
        )


class TestEvolutionAsReleased(AlgorithmSuite):
    allows_repeats = True

    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Evolution(
            space,
            seed=seed,
            first_id=first_id,
            seeds=seeds,
            n_random=3,
            repeats="allow",
            parents=ParentRule("threshold", margin=0.1),
        )


class TestRace(AlgorithmSuite):
    only_seeds = True

    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Race(
            space, seed=seed, first_id=first_id, seeds=seeds, quantum=4, keep=3
        )


class TestRacedEvolution(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: Evolution(
            space, seed=seed, first_id=first_id, seeds=seeds, n_random=6, race=True
        )


SUITES: dict[type[Algorithm], type[AlgorithmSuite]] = {
    Race: TestRace,
    Random: TestRandom,
    Listed: TestListed,
    Evolution: TestEvolution,
}


def test_algorithms_are_registered_by_their_names() -> None:
    """That each of them has a suite is shown in tests/repo, as the suites are in several files."""
    own = {name for name, target in ALGORITHMS.items() if target.startswith("searchlab.")}
    registered = {name: resolve(ALGORITHMS, name, "algorithm") for name in own}
    assert {name: cls.name for name, cls in registered.items()} == {name: name for name in own}
    assert set(SUITES) <= set(registered.values())


def trace_digest() -> str:
    """All proposals of every algorithm on every space, as one digest."""
    out = hashlib.blake2b(digest_size=16)
    for name in sorted(SPACES):
        space = SPACES[name]()
        for algorithm in (Random(space, seed=5), Evolution(space, seed=5, quantum=4)):
            for i, key in proposals(drive(algorithm, 60)):
                out.update(i.to_bytes(8, "big") + key)
    return out.hexdigest()


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_another_process_proposes_the_same(hash_seed: str) -> None:
    assert digest_elsewhere(Path(__file__), hash_seed) == trace_digest()


def _told(space: Space, values: list[int], losses: list[float]) -> Told:
    population = space.population([{"a": value} for value in values])
    ids = np.arange(len(values))
    return Told(ids, population, np.array(losses)[:, None], np.zeros(len(values)))


def test_evolution_takes_parents_from_the_best_told_only() -> None:
    space = Space(a=Integer(0, 1000))
    algorithm = Evolution(space, seed=1, n_random=0, parents=ParentRule("rank", mu=2))
    algorithm.tell(_told(space, [0, 1, 2, 3, 4], [5.0, 1.0, np.inf, 0.0, 2.0]))
    jobs = algorithm.ask(5, 50)
    assert jobs.parents is not None
    assert set(jobs.parents.ravel().tolist()) == {1, 3}


def test_ties_go_to_the_newest() -> None:
    space = Space(a=Integer(0, 1000))
    algorithm = Evolution(space, seed=1, n_random=0, parents=ParentRule("rank", mu=1))
    algorithm.tell(_told(space, [0, 1, 2], [1.0, 1.0, 1.0]))
    jobs = algorithm.ask(3, 20)
    assert jobs.parents is not None
    assert set(jobs.parents.ravel().tolist()) == {2}


def test_evolution_beats_random_on_a_separable_problem() -> None:
    space = Space(x=Choice(range(8), shape=(12,)))

    def best_of(algorithm: Algorithm) -> float:
        best = np.inf
        for start in range(0, 300):
            jobs = algorithm.ask(start, 1)
            loss = (jobs.population["x"].astype(float)).sum(axis=1)
            best = min(best, float(loss.min(initial=np.inf)))
            algorithm.tell(Told(jobs.ids, jobs.population, loss[:, None], np.zeros(len(jobs))))
        return best

    pairs = [(best_of(Evolution(space, seed=s)), best_of(Random(space, seed=s))) for s in range(3)]
    assert all(evolution < random / 2 for evolution, random in pairs)


def test_repeated_seeds_are_void() -> None:
    space = Space(a=Integer(0, 5))
    seeds = Seeds(space.population([{"a": 1}, {"a": 1}, {"a": 2}]), ("seed",) * 3)
    assert Listed(space, seeds=seeds).ask(0, 3).ids.tolist() == [0, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda space: Evolution(space, n_random=-1),
        lambda space: Evolution(space, quantum=0),
        lambda space: Evolution(space, niche="cost"),
        lambda space: Listed(space, quantum=0),
        lambda space: Random(space, repeats="maybe"),
        lambda space: ParentRule("best"),  # type: ignore[arg-type]
        lambda space: ParentRule(mu=0),
        lambda space: Seeds(space.empty(), ("seed",)),
    ],
)
def test_wrong_settings_are_refused(make: object) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        make(Space(a=Integer(0, 5)))  # type: ignore[operator]


def test_settings_name_what_was_chosen() -> None:
    settings = Evolution(Space(a=Integer(0, 5)), parents=ParentRule("rank", mu=3)).settings()
    assert json.loads(json.dumps(settings))["parents"]["mu"] == 3
