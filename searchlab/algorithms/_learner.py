"""Labels of one fidelity, the predictor fitted to them at fixed counts, and the guard's verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms._blas import one_thread, rescan
from searchlab.algorithms._guard import Evidence, Gain, convinces, correlation, gain, trusts
from searchlab.algorithms._prior import Prior
from searchlab.algorithms.base import Told
from searchlab.population import Jobs, Population
from searchlab.predictor import DRAW_WIDTH, HoldsOut, Predictor, Table
from searchlab.uniforms import BOOTSTRAP, FITS, uniforms, uniforms_of

__all__ = ["Final", "Guard", "Learner", "rows_of"]

Floats = NDArray[np.float64]
Guard = Literal["measured", "always", "never"]

GROWTH, STEP = 1.15, 4  # refits: so much more, at least so many labels more
FOLDS, FEW_FOLDS, FEW = 5, 10, 40  # where labels are few, a fit to fewer says too little
BATCHES = 3  # so many of the latest batches are what the guard looks at
BOLDNESS = 0.5  # share of a draw's departure from the mean: of many draws the wildest wins
BOLDER = 1.0  # of it, where a search is easily caught in one valley
PADDED = 16  # fewer rows take other matrix kernels, whose last bits differ


@dataclass(frozen=True)
class _State:
    """What a refit leaves behind."""

    predictor: Predictor | None
    trusted: bool = False
    convinced: bool = False
    held_out: Evidence = field(default_factory=Evidence)
    online: Evidence = field(default_factory=Evidence)
    gain: Gain = field(default_factory=Gain)


@dataclass(frozen=True)
class Final:
    """What a search leaves: a fit, what it learnt from, and what it says of labels left out."""

    predictor: Predictor
    table: Table
    losses: Floats
    held_out: Floats
    pool: Table


class Learner:
    """What is known of the losses at one fidelity.

    A fit is a pure function of the told prefix that ends with the count at which it was due, and of
    the seed; so one bulk tell leaves the same state as many.

    Args:
        make: a new predictor.
        table: the table of some candidates.
        background: candidates without labels at an id, which show how signals are spread.
        seed: the run's seed.
        level: number of the fidelity; every one has its own random numbers.
        first_fit: labels of the first fit.
        guard: what decides on trust.
        own: the first id that is not a seed's.
        prior: an earlier predictor that chooses before the first fit; None = there is none.
        boldness: share of a draw's departure from the mean that counts.
    """

    def __init__(
        self,
        make: Callable[[], Predictor],
        table: Callable[[Population], Table],
        background: Callable[[int], Table],
        *,
        seed: int,
        level: int,
        first_fit: int,
        guard: Guard,
        own: int,
        prior: Prior | None = None,
        boldness: float = BOLDNESS,
    ) -> None:
        self._boldness = boldness
        self._make, self._table, self._background = make, table, background
        self._seed, self._level, self._first_fit = seed, level, first_fit
        self._guard, self._own = guard, own
        self._told: list[Told] = []
        self.labels = 0
        self.fitted = 0
        self.state = _State(None)
        self._prior = prior if guard != "never" else None
        self._halves = False  # whether only every other candidate is chosen until the first fit
        if self._prior is not None:
            self.state = _State(self._prior.start(), trusted=True, convinced=True)
            self._halves = not self._prior.trusted and guard == "measured"

    def chooses(self, i: int) -> bool:
        """Whether the candidate of an id is chosen by the predictor."""
        return self.trusted and not (self._halves and not self.fitted and i % 2)

    def _begun(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which ids before the first fit an earlier predictor chose the candidates of."""
        if self._prior is None:
            return np.zeros(len(ids), dtype=bool)
        return np.asarray((ids % 2 == 0) | (not self._halves), dtype=bool)

    def final(self) -> Final | None:
        """A fit to all labels, and what it says of those left out; None = there are none."""
        told = self.told()
        if told is None or not self.labels:
            return None
        losses = _labels(told.losses[:, 0], told.violation)
        table, pool = self._table(told.population), self._background(int(told.ids[-1]))
        with one_thread():
            predictor = self._fit(table, losses, pool)
            held = self._held_out(predictor, table, losses, told.ids, pool)
        return Final(predictor, table, losses, held, pool)

    @property
    def trusted(self) -> bool:
        """Whether the predictor of the last fit may choose."""
        return self.state.trusted

    @property
    def convinced(self) -> bool:
        """Whether it may choose among as many as there are, however wild."""
        return self.state.convinced

    def learn(self, told: Told) -> None:
        """Takes answers in."""
        self._told.append(told)
        self.labels += int(np.isfinite(told.losses[:, 0]).sum())

    def told(self) -> Told | None:
        """All answers; None = there are none."""
        if not self._told:
            return None
        if len(self._told) > 1:
            self._told = [_joined(self._told)]
        return self._told[0]

    def to_json(self) -> dict[str, Any]:
        state = self.state
        return {
            "labels": self.labels,
            "fitted_on": self.fitted,
            "guard": "trusted" if state.trusted else "not trusted",
            "held_out": state.held_out.to_json(),
            "online": state.online.to_json(),
            "gain": state.gain.to_json(),
        }

    # -- fitting ----------------------------------------------------------------------------

    def _counts(self) -> list[int]:
        """The numbers of labels at which a fit was due, so far."""
        counts, count = [], self._first_fit
        while count <= self.labels:
            counts.append(count)
            count = max(count + STEP, int(np.ceil(count * GROWTH)))
        return counts

    def refit(self) -> None:
        """Fits to the told prefix that the last due count ends at, unless that was done."""
        counts = self._counts()
        if not counts or counts[-1] == self.fitted:
            return
        told = self.told()
        assert told is not None
        reached = np.cumsum(np.isfinite(told.losses[:, 0]))
        end = int(np.searchsorted(reached, counts[-1])) + 1
        told = rows_of(told, np.arange(end))
        losses = _labels(told.losses[:, 0], told.violation)
        table = self._table(told.population)
        pool = self._background(int(told.ids[-1]))
        said = np.empty(0)
        rescan()
        with one_thread():
            predictor = self._fit(table, losses, pool)
            if self._guard == "measured":
                said = self._held_out(predictor, table, losses, told.ids, pool)
        if self._guard == "measured":
            held_out = correlation([(said, losses)], values=True)
            batch = np.searchsorted(counts, reached[:end])  # rows between two fits are one batch
            latest = (batch > 0) & (batch >= len(counts) - BATCHES)
            online = self._online(told, losses, np.where(latest, batch, 0))
            early = (batch == 0) & (told.ids >= self._own) & ~self._begun(told.ids)
            found = gain(losses[early], losses[latest])
            trusted = trusts(held_out, online, found)
            sure = trusted and convinces(held_out)
            self.state = _State(predictor, trusted, sure, held_out, online, found)
        else:
            always = self._guard == "always"
            self.state = _State(predictor, always, always)
        self.fitted = counts[-1]

    @staticmethod
    def _online(told: Told, losses: Floats, batch: NDArray[np.int64]) -> Evidence:
        """The predictions that were stored with the batches numbered from 1 on."""
        if told.predicted is None:
            return Evidence()
        mean = told.predicted[:, 0]
        numbers = np.unique(batch[batch > 0]).tolist()
        return correlation((mean[batch == b], losses[batch == b]) for b in numbers)

    def _fit(self, table: Table, losses: Floats, pool: Table) -> Predictor:
        predictor = self._make()
        seed = uniforms(self._seed, FITS + self._level, len(losses), 1, 1)[0, 0]
        predictor.fit(table, losses, seed=int(seed * 2**32), pool=pool)
        return predictor

    def _held_out(
        self,
        predictor: Predictor,
        table: Table,
        losses: Floats,
        ids: NDArray[np.int64],
        pool: Table,
    ) -> Floats:
        """Every label as predicted by a fit to the other folds, float64 (n,)."""
        if isinstance(predictor, HoldsOut) and (said := predictor.held_out()) is not None:
            return said
        folds = FEW_FOLDS if len(losses) < FEW else FOLDS
        chance = uniforms_of(self._seed, BOOTSTRAP + self._level, ids, 1)[:, 0]
        fold = np.argsort(np.argsort(chance, kind="stable"), kind="stable") % folds
        out = np.full(len(losses), np.nan)
        for number in range(folds):
            test = np.flatnonzero(fold == number)
            rest = np.flatnonzero(fold != number)
            if not len(test):
                continue
            other = self._fit(table.take(rest), losses[rest], pool)
            # The mean of the others is the higher the lower the fold's: it has to be taken off.
            centre = float(other.predict(table.take(rest))[0].mean())
            out[test] = other.predict(table.take(test))[0] - centre
        return out

    # -- asking -----------------------------------------------------------------------------

    def order(self, population: Population, u: Floats) -> NDArray[np.int64]:
        """Rows by one Thompson draw, the best first; `u` is (1, DRAW_WIDTH)."""
        return self.orders([population], [u])[0]

    def orders(self, pools: Sequence[Population], u: Sequence[Floats]) -> list[NDArray[np.int64]]:
        """`order` of several populations. One table is made of all, and predictions are made pool
        by pool, so that what comes with a pool changes nothing.
        """
        predictor = self.state.predictor
        assert predictor is not None
        if not pools:
            return []
        whole = self._table(Population.concat(pools) if len(pools) > 1 else pools[0])
        out, start = [], 0
        for population, own in zip(pools, u, strict=True):
            assert own.shape == (1, DRAW_WIDTH)
            n = len(population)
            table = whole.take(start + np.arange(max(n, PADDED)) % n)
            with one_thread():
                drawn, mean = predictor.draw(table, own)[0], predictor.predict(table)[0]
            chosen = (mean + self._boldness * (drawn - mean))[:n]
            out.append(np.argsort(chosen, kind="stable"))
            start += n
        return out

    def noted(self, jobs: Jobs) -> Jobs:
        """The jobs with what is predicted of them."""
        if self.state.predictor is None or not len(jobs):
            return replace(jobs, predicted=np.full((len(jobs), 2), np.nan))
        rows = np.arange(max(len(jobs), PADDED)) % len(jobs)
        table = self._table(jobs.population.take(rows))
        with one_thread():
            mean, sd = self.state.predictor.predict(table)
        return replace(jobs, predicted=np.column_stack([mean, sd])[: len(jobs)])


def _labels(losses: Floats, violation: Floats) -> Floats:
    """Losses to learn: candidates that break constraints come after all others, by how much."""
    broken = (violation > 0) & np.isfinite(losses)
    if not broken.any():
        return losses
    fine = losses[~broken & np.isfinite(losses)]
    low, high = (fine.min(), fine.max()) if len(fine) else (0.0, 0.0)
    beyond = 1.0 + violation[broken] / violation[broken].max()
    out = losses.copy()
    out[broken] = high + beyond * (high - low if high > low else 1.0)
    return out


def rows_of(told: Told, rows: Any) -> Told:
    """The answers that an index array or a boolean mask selects."""
    return Told(
        told.ids[rows],
        told.population.take(rows),
        told.losses[rows],
        told.violation[rows],
        None if told.predicted is None else told.predicted[rows],
        None if told.fidelity is None else told.fidelity[rows],
    )


def _joined(parts: Sequence[Told]) -> Told:
    return Told(
        np.concatenate([part.ids for part in parts]),
        Population.concat([part.population for part in parts]),
        np.concatenate([part.losses for part in parts]),
        np.concatenate([part.violation for part in parts]),
        np.concatenate(
            [
                np.full((len(part.ids), 2), np.nan) if part.predicted is None else part.predicted
                for part in parts
            ]
        ),
    )
