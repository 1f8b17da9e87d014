"""The conformance suite of algorithms: inherit it, supply the fixture `build`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Seeds, Told
from searchlab.budget import LinearBudget
from searchlab.population import Jobs, Population
from searchlab.space import Space
from searchlab.uniforms import uniforms
from searchlab.variables import ActiveBelow, ActiveIf, Choice, Integer, Ordered, Real

__all__ = ["SPACES", "AlgorithmSuite", "Build", "drive", "losses_of", "proposals", "sampled_seeds"]

Build = Callable[[Space, int, int, Seeds | None], Algorithm]
"""(space, seed, first id, seeds or None) -> a new algorithm."""


def _plain() -> Space:
    return Space(kind=Choice(("a", "b", "c")), mask=Choice((0, 1), shape=(3, 3)), n=Integer(0, 9))


def _real() -> Space:
    return Space(x=Real(-1, 2, shape=(4,)), times=Ordered(4, 0, 1, 0.05))


def _conditional() -> Space:
    return Space(
        solver=Choice(("one", "many")),
        order=Choice((1, 2, 3), when=(ActiveIf("solver", ("many",)),)),
        steps=Integer(1, 5),
        family=Choice(("x", "y", "z"), shape=(5,), when=(ActiveBelow("steps"),)),
        scale=Real(0, 1, shape=(5,), when=(ActiveIf("family", ("z",)),)),
    )


def _budgeted() -> Space:
    bits = LinearBudget({"bits": [2.0, 4.0, 8.0]}, upper=40, lower=24, name="bits")
    return Space(bits=Choice((2, 4, 8), shape=(8,)), constraints=[bits])


def _small() -> Space:
    return Space(a=Choice((0, 1, 2)), b=Choice((0, 1)))


SPACES: dict[str, Callable[[], Space]] = {
    "plain": _plain,
    "real": _real,
    "conditional": _conditional,
    "budgeted": _budgeted,
}


def losses_of(space: Space, population: Population, objectives: int = 1) -> NDArray[np.float64]:
    """Some fixed losses of each candidate, float64 (n, objectives)."""
    keys = space.keys(population)
    numbers = [
        [
            int.from_bytes(hashlib.blake2b(key, digest_size=6, salt=_salt(i)).digest(), "big")
            for i in range(objectives)
        ]
        for key in keys
    ]
    return np.array(numbers, dtype=np.float64).reshape(-1, objectives) / 2**48


def _salt(objective: int) -> bytes:
    return b"" if objective == 0 else b"%d" % objective


def sampled_seeds(space: Space, n: int) -> Seeds:
    """Seeds that are no baselines."""
    rows = space.sample(uniforms(99, 0, 0, n, space.sample_width))
    return Seeds(rows, tuple(f"seed:{i}" for i in range(n)))


def told_of(space: Space, jobs: Jobs, fail_every: int = 0, objectives: int = 1) -> Told:
    """Answers to jobs; every so many candidates fail."""
    losses = losses_of(space, jobs.population, objectives)
    if fail_every:
        losses[jobs.ids % fail_every == 0] = np.inf
    fidelity = np.full(len(jobs), jobs.fidelity, dtype=np.int64)
    return Told(jobs.ids, jobs.population, losses, np.zeros(len(jobs)), jobs.predicted, fidelity)


def _told_rows(told: Told, rows: slice) -> Told:
    def part(column: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if column is None else column[rows]

    return Told(
        told.ids[rows],
        told.population.take(rows),
        told.losses[rows],
        told.violation[rows],
        part(told.predicted),
        part(told.fidelity),
    )


def drive(
    algorithm: Algorithm, n: int, *, fail_every: int = 0, most_empty: int = 300
) -> list[Jobs]:
    """Asks for n ids in groups of the quantum, telling each group before the next.

    An algorithm is told as many losses as it needs at least.
    """
    out, empty, start = [], 0, algorithm.first_id
    while start < algorithm.first_id + n and empty < most_empty:
        jobs = algorithm.ask(start, algorithm.quantum)
        algorithm.tell(told_of(algorithm.space, jobs, fail_every, algorithm.min_objectives))
        empty = 0 if len(jobs) else empty + algorithm.quantum
        start += algorithm.quantum
        out.append(jobs)
    return out


def proposals(parts: Sequence[Jobs]) -> list[tuple[int, bytes]]:
    """(id, key) of every job."""
    return [pair for jobs in parts for pair in zip(jobs.ids.tolist(), jobs.keys, strict=True)]


def distinct_jobs(parts: Sequence[Jobs]) -> list[tuple[bytes, int, int]]:
    """(key, fidelity, replicate) of every job."""
    return [(key, jobs.fidelity, jobs.replicate) for jobs in parts for key in jobs.keys]


class AlgorithmSuite:
    """What every algorithm promises; each test states one promise.

    A subclass overrides the fixture `build`. Attributes to set where they differ:

    Attributes:
        only_seeds: it proposes its seeds and nothing else.
        allows_repeats: `build` gives an algorithm whose repeats are jobs.
        enumerates: it goes on until a small space is exhausted.
    """

    only_seeds = False
    allows_repeats = False
    enumerates = True

    @pytest.fixture
    def build(self) -> Build:
        """(space, seed, first id, seeds) -> a new algorithm."""
        raise NotImplementedError("override the fixture `build`")

    @pytest.fixture(params=sorted(SPACES))
    def space(self, request: pytest.FixtureRequest) -> Space:
        """Every kind of space in turn."""
        return SPACES[request.param]()

    def new(self, build: Build, space: Space, seed: int = 3, first_id: int = 0) -> Algorithm:
        """A new algorithm with five seeds, or forty where there is nothing else."""
        return build(space, seed, first_id, sampled_seeds(space, 40 if self.only_seeds else 5))

    def generations(self, algorithm: Algorithm) -> int:
        """Ids of about three generations: enough to leave the seeds and the random start."""
        return max(40, 3 * algorithm.quantum)

    def test_declares_a_quantum_and_a_lag(self, build: Build, space: Space) -> None:
        algorithm = self.new(build, space)
        assert algorithm.quantum >= 1
        assert algorithm.max_lag is None or algorithm.max_lag >= algorithm.quantum

    def test_three_generations_are_feasible_and_canonical(self, build: Build, space: Space) -> None:
        algorithm = self.new(build, space)
        parts = drive(algorithm, self.generations(algorithm))
        assert sum(map(len, parts)) > 0
        for jobs in parts:
            assert space.is_feasible(jobs.population).all()
            assert space.canonicalise(jobs.population).equals(jobs.population)
            assert jobs.keys == space.keys(jobs.population)
            assert len(jobs.origin) == len(jobs)
            assert jobs.parents is not None
            assert jobs.parents.shape == (len(jobs), 2)
            assert (jobs.parents < jobs.ids[:, None]).all()

    def test_ids_are_those_asked_for(self, build: Build, space: Space) -> None:
        algorithm = self.new(build, space, first_id=7)
        for number, jobs in enumerate(drive(algorithm, self.generations(algorithm))):
            start = 7 + number * algorithm.quantum
            assert set(jobs.ids.tolist()) <= set(range(start, start + algorithm.quantum))
            assert (np.diff(jobs.ids) > 0).all()

    def test_seeds_come_first_in_order(self, build: Build, space: Space) -> None:
        algorithm = self.new(build, space)
        seeds = algorithm.seeds
        got = [key for _, key in proposals(drive(algorithm, len(seeds.origin)))]
        wanted = list(space.keys(seeds.population))
        if not self.allows_repeats:
            wanted = list(dict.fromkeys(wanted))
        assert got[: len(wanted)] == wanted

    def test_asking_twice_gives_the_same(self, build: Build, space: Space) -> None:
        algorithm = self.new(build, space)
        start = 0
        for _ in range(self.generations(algorithm) // algorithm.quantum + 1):
            first = algorithm.ask(start, algorithm.quantum)
            second = algorithm.ask(start, algorithm.quantum)
            assert proposals([first]) == proposals([second])
            assert first.population.equals(second.population)
            algorithm.tell(told_of(space, first, 0, algorithm.min_objectives))
            start += algorithm.quantum

    def test_rows_do_not_depend_on_the_group_they_are_asked_in(
        self, build: Build, space: Space
    ) -> None:
        one, other = self.new(build, space), self.new(build, space)
        if one.levels:
            pytest.skip("its groups are asked for as a whole")
        for algorithm in (one, other):
            drive(algorithm, self.generations(algorithm))
        quantum = one.quantum
        start = -(-self.generations(one) // quantum) * quantum
        whole = one.ask(start, 8 * quantum)
        parts = [other.ask(start + i * quantum, quantum) for i in range(8)]
        assert proposals([whole]) == proposals(parts)

    def test_bulk_and_stepwise_tells_are_equal(self, build: Build, space: Space) -> None:
        stepwise = self.new(build, space)
        parts = drive(stepwise, self.generations(stepwise))
        population = Population.concat([jobs.population for jobs in parts])
        ids = np.concatenate([jobs.ids for jobs in parts])
        keys = [key for jobs in parts for key in jobs.keys]
        losses = losses_of(space, population, stepwise.min_objectives)
        predicted = [jobs.predicted for jobs in parts if jobs.predicted is not None]
        everything = Told(
            ids,
            population,
            losses,
            np.zeros(len(ids)),
            np.concatenate(predicted) if predicted else None,
            np.concatenate([np.full(len(jobs), jobs.fidelity, np.int64) for jobs in parts]),
        )
        rebuilt = [self.new(build, space), self.new(build, space)]
        for algorithm in rebuilt:
            algorithm.issue(ids, keys)
        rebuilt[0].tell(everything)
        cut = len(ids) // 3
        for rows in (slice(0, cut), slice(cut, cut), slice(cut, None)):
            rebuilt[1].tell(_told_rows(everything, rows))
        start = len(parts) * stepwise.quantum
        n = 2 * stepwise.quantum
        wanted = proposals([stepwise.ask(start, n)])
        assert [proposals([algorithm.ask(start, n)]) for algorithm in rebuilt] == [wanted, wanted]

    def test_later_issued_keys_change_no_earlier_proposal(self, build: Build, space: Space) -> None:
        """A run is resumed with the keys of all its ids, also of those after a hole."""
        parts = drive(first := self.new(build, space), self.generations(first))
        again = self.new(build, space)
        ids = np.concatenate([jobs.ids for jobs in parts])
        again.issue(ids, [key for jobs in parts for key in jobs.keys])
        assert proposals(drive(again, self.generations(again))) == proposals(parts)

    def test_the_seed_decides(self, build: Build, space: Space) -> None:
        runs = [
            proposals(drive(algorithm := self.new(build, space, seed), self.generations(algorithm)))
            for seed in (3, 3, 4)
        ]
        assert runs[0] == runs[1]
        if not self.only_seeds:
            assert runs[0] != runs[2]

    def test_failed_results_are_survived(self, build: Build, space: Space) -> None:
        algorithm = self.new(build, space)
        parts = drive(algorithm, self.generations(algorithm), fail_every=2)
        hopeless = self.new(build, space)
        more = drive(hopeless, self.generations(hopeless), fail_every=1)
        assert len(proposals(parts)) > 0
        assert len(proposals(more)) > 0

    def test_no_candidate_is_proposed_twice(self, build: Build, space: Space) -> None:
        if self.allows_repeats:
            pytest.skip("this one is allowed to")
        algorithm = self.new(build, space)
        jobs = distinct_jobs(drive(algorithm, 120))
        assert len(set(jobs)) == len(jobs)

    def test_a_small_space_is_enumerated_and_then_exhausted(self, build: Build) -> None:
        if self.allows_repeats or not self.enumerates:
            pytest.skip("this one goes on with repeats")
        space = _small()
        every = space.population([{"a": a, "b": b} for a in range(3) for b in range(2)])
        seeds = Seeds(every, ("seed",) * 6) if self.only_seeds else None
        parts = drive(build(space, 0, 0, seeds), 2000, most_empty=256)
        jobs = distinct_jobs(parts)
        assert len(set(jobs)) == len(jobs)
        assert {key for key, *_ in jobs} == set(space.keys(every))
        assert not len(parts[-1])

    def test_settings_are_json(self, build: Build, space: Space) -> None:
        import json

        settings = self.new(build, space).settings()
        assert json.loads(json.dumps(settings)) == json.loads(json.dumps(settings))
        assert settings["name"]
