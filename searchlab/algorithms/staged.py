"""Stages of predictor search and true evaluation, as published searches with predictors run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Seeds, Told, no_parents
from searchlab.algorithms.evolution import Evolution
from searchlab.config import PREDICTORS, resolve
from searchlab.errors import ConfigError
from searchlab.population import Jobs, Population
from searchlab.predictor import Predictor, table_of
from searchlab.space import Space
from searchlab.uniforms import FITS, POOL, uniforms

__all__ = ["Staged"]

_STAGES = POOL + 10
BLOCK = 10_000  # told candidates whose predictions start a predictor search, the latest


class Staged(Algorithm):
    """Evolution for a first sample, then stages: fit, evolve on predictions, measure the best.

    Until `first` labels are told candidates are those of an evolution. From then on every group of
    `batch` jobs is one stage: a predictor is fitted to all that is told, a second evolution with
    the same options runs for `generations` of `children` with predictions as its losses, starting
    at what is told, and the best new candidates become the jobs; of several niches equally many.

    There is no guard and no uncertainty: `guided` is the algorithm with both.

    Source: the search of arXiv 2312.07243 and 2306.08860. Where we differ: predictor search is
    repeated, and begins at the best of what was measured.

    Args:
        space, seed, first_id, seeds: see `Algorithm`.
        options: of the evolution.
        predictor: name of a predictor.
        predictor_options: of that predictor.
        first: labels of the first fit.
        batch: true evaluations per stage.
        generations, children: of a predictor search.

    Raises:
        ConfigError: numbers out of range, unknown names or options.
    """

    name: ClassVar[str] = "staged"
    pools = False

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        options: Mapping[str, Any] | None = None,
        predictor: str = "steps",
        predictor_options: Mapping[str, Any] | None = None,
        first: int = 64,
        batch: int = 32,
        generations: int = 20,
        children: int = 50,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds)
        if min(first, batch) < 4 or min(generations, children) < 1:
            raise ConfigError(
                f"first {first}, batch {batch}, generations {generations}, children {children}; "
                "allowed: 4 or more, 4 or more, 1 or more, 1 or more"
            )
        self.first, self.generations, self.children = first, generations, children
        self.quantum = batch
        self.max_lag = batch
        self._options = {**(options or {}), "quantum": children}
        self._predictor, self._predictor_options = predictor, dict(predictor_options or {})
        self._factory = resolve(PREDICTORS, predictor, "predictor")
        self._new_predictor()  # wrong options are found before anything is paid
        self.inner = self._evolution(seed, first_id, self.seeds)
        if self.inner.repeats != "redraw" or self.inner.race:
            raise ConfigError("staged around repeats 'allow' or race; allowed: redraw, no race")
        self._issued = self.inner._issued
        self._told: list[Told] = []
        self._labels = 0
        self._stages = 0

    def _evolution(self, seed: int, first_id: int, seeds: Seeds | None) -> Evolution:
        try:
            return Evolution(self.space, seed=seed, first_id=first_id, seeds=seeds, **self._options)
        except TypeError as error:
            raise ConfigError(f"options of evolution: {error}") from None

    def _new_predictor(self) -> Predictor:
        try:
            made: Predictor = self._factory(**self._predictor_options)
        except TypeError as error:
            raise ConfigError(f"options of {self._predictor}: {error}") from None
        return made

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "wraps": self.inner.settings(),
            "predictor": self._predictor,
            "predictor_options": self._predictor_options,
            "first": self.first,
            "generations": self.generations,
            "children": self.children,
        }

    def report(self) -> dict[str, Any]:
        """See `Algorithm.report`: labels, and stages of this process."""
        return {"predictor": self._predictor, "labels": self._labels, "stages": self._stages}

    def tell(self, told: Told) -> None:
        """See `Algorithm.tell`; the evolution hears the same."""
        super().tell(told)
        self.inner.tell(told)

    def _learn(self, told: Told) -> None:
        self._told.append(told)
        self._labels += int(np.isfinite(told.losses[:, 0]).sum())

    def ask(self, first_id: int, n: int) -> Jobs:
        """See `Algorithm.ask`."""
        own = self.first_id + len(self.seeds.population)
        if not n or first_id < own or self._labels < self.first:
            return self.inner.ask(first_id, n)
        ends = [*range(first_id, first_id + n, self.quantum), first_id + n]
        return Jobs.concat([self._stage(i, j - i) for i, j in itertools.pairwise(ends)])

    def _stage(self, first_id: int, n: int) -> Jobs:
        """One group: what a predictor search found, and children where it found too little."""
        found = self._found(first_id, n)
        if not len(found):
            return self.inner.ask(first_id, n)
        ids = np.arange(first_id, first_id + len(found), dtype=np.int64)
        keys = self.space.keys(found)
        self.issue(ids, keys)
        jobs = Jobs(
            ids=ids,
            population=found,
            keys=keys,
            told_at_ask=self.n_told,
            origin=("staged",) * len(found),
            parents=no_parents(len(found)),
        )
        if len(found) == n:
            return jobs
        return Jobs.concat([jobs, self.inner.ask(first_id + len(found), n - len(found))])

    # -- a stage ----------------------------------------------------------------------------

    def _found(self, first_id: int, n: int) -> Population:
        """The n best new candidates of a predictor search, best first within a niche."""
        self._stages += 1
        told = self._all()
        fine = np.flatnonzero(np.isfinite(told.losses[:, 0]))
        known = told.population.take(fine)
        chance = uniforms(self.seed, FITS, first_id, 1, 2)[0]
        predictor = self._new_predictor()
        losses = np.where(told.violation > 0, np.inf, told.losses[:, 0])[fine]
        predictor.fit(table_of(self.space, known), losses, seed=int(chance[0] * 2**32))
        search = self._evolution(int(chance[1] * 2**32), 0, None)
        latest = known.take(np.arange(max(0, len(known) - BLOCK), len(known)))
        start = predictor.predict(table_of(self.space, latest))[0]
        self._hear(search, 0, latest, start)
        parts: list[Population] = []
        scores: list[NDArray[np.float64]] = []
        at = len(latest)
        for _ in range(self.generations):
            jobs = search.ask(at, self.children)
            at += self.children
            if len(jobs):
                said = predictor.predict(table_of(self.space, jobs.population))[0]
                search.tell(_told(jobs.ids, jobs.population, said))
                parts.append(jobs.population)
                scores.append(said)
        if not parts:
            return self.space.empty()
        return self._best(first_id, n, Population.concat(parts), np.concatenate(scores))

    def _hear(
        self, search: Evolution, first: int, population: Population, said: NDArray[np.float64]
    ) -> None:
        ids = np.arange(first, first + len(population), dtype=np.int64)
        search.issue(ids, self.space.keys(population))
        search.tell(_told(ids, population, said))

    def _best(
        self, first_id: int, n: int, population: Population, said: NDArray[np.float64]
    ) -> Population:
        """The first n in the order of predictions, of every niche in turn."""
        keys = self.space.keys(population)
        seen: set[bytes] = set()
        niche = self.inner._niches_of(population)
        wanted = (
            np.isin(niche, self.inner.niches) if self.inner.niches else np.full(len(keys), True)
        )
        place: dict[int, int] = {}
        ranked: list[tuple[int, int, int]] = []
        for row in np.argsort(said, kind="stable").tolist():
            key, home = keys[row], int(niche[row])
            if not wanted[row] or key in seen or self.issued_before(key, first_id):
                continue
            seen.add(key)
            turn = place.get(home, 0)
            place[home] = turn + 1
            ranked.append((turn, home, row))
        return population.take(np.array([row for *_, row in sorted(ranked)[:n]], dtype=np.int64))

    def _all(self) -> Told:
        if len(self._told) > 1:
            parts = self._told
            self._told = [
                Told(
                    np.concatenate([part.ids for part in parts]),
                    Population.concat([part.population for part in parts]),
                    np.concatenate([part.losses for part in parts]),
                    np.concatenate([part.violation for part in parts]),
                )
            ]
        return self._told[0]


def _told(ids: NDArray[np.int64], population: Population, said: NDArray[np.float64]) -> Told:
    """Predictions as answers."""
    return Told(ids, population, said[:, None], np.zeros(len(ids)))
