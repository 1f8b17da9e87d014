"""An algorithm that lets a predictor choose among what another algorithm would propose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms._guard import Evidence, correlation, trusts
from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told
from searchlab.config import ALGORITHMS, PREDICTORS, resolve
from searchlab.errors import ConfigError
from searchlab.evaluator import Signal
from searchlab.population import Jobs, Population
from searchlab.predictor import DRAW_WIDTH, Predictor, Table, table_of
from searchlab.space import Space
from searchlab.uniforms import BOOTSTRAP, FITS, POOL, uniforms, uniforms_of

if TYPE_CHECKING:
    from searchlab.result import Result

__all__ = ["Guided", "StaticSignals"]

GROWTH, STEP = 1.15, 4  # refits: so much more, at least so many labels more
FOLDS, FEW_FOLDS, FEW = 5, 10, 40  # where labels are few, a fit to fewer says too little
BATCHES = 3  # so many of the latest batches are what the guard looks at
STRENGTHS = ((1.0, 0.5), (4.0, 0.25), (16.0, 0.25))  # how wildly which share of a pool varies
BACKGROUND = 256  # candidates without labels that show how signals are spread
PADDED = 16  # fewer rows take other matrix kernels, whose last bits differ
_DRAWS, _BACKGROUND = POOL + 1, POOL + 2


class StaticSignals(Protocol):
    """What an evaluator has that gives signals without evaluating."""

    @property
    def signals(self) -> tuple[Signal, ...]: ...
    def static_signals(self, population: Population) -> NDArray[np.float64]:
        """float64 (n, number of signals), NaN = missing; a pure function of each candidate."""


@dataclass(frozen=True)
class _State:
    """What a refit leaves behind."""

    predictor: Predictor | None
    trusted: bool = False
    held_out: Evidence = field(default_factory=Evidence)
    online: Evidence = field(default_factory=Evidence)


class Guided(Algorithm):
    """Proposes many candidates of another algorithm, and asks for the one a predictor likes best.

    For every job `pool` candidates are drawn by the operators of the wrapped algorithm, from a
    stream of their own. The predictor draws one plausible loss function (Thompson), and the best
    candidate under it that is new becomes the job. It is fitted from scratch when `first_fit`
    labels are told and then at fixed counts, 15 % and at least 4 labels apart.

    A guard decides at every fit whether the predictor may choose until the next. It looks at
    labels held out of the fit, and at the predictions that were stored with the latest batches
    before they were learnt from. Where it does not trust, jobs are the wrapped algorithm's own,
    exactly those that it would propose alone.

    Args:
        space, seed, first_id, seeds: see `Algorithm`.
        wraps: name of an algorithm for one objective that gives all uniforms of an id their say.
        options: of that algorithm.
        predictor: name of a predictor.
        predictor_options: of that predictor.
        first_fit: labels of the first fit.
        pool: candidates that are ranked for a job.
        guard: "measured", or what it says whatever was measured: "always" or "never".
        signals: gives signals of candidates without evaluating them; None = there are none.

    Raises:
        ConfigError: numbers out of range, an unknown name, an algorithm that cannot be wrapped.
    """

    name: ClassVar[str] = "guided"
    pools = False

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        wraps: str = "evolution",
        options: Mapping[str, Any] | None = None,
        predictor: str = "ridge",
        predictor_options: Mapping[str, Any] | None = None,
        first_fit: int = 12,
        pool: int = 1000,
        guard: Literal["measured", "always", "never"] = "measured",
        signals: StaticSignals | None = None,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds)
        if first_fit < 4 or not 4 <= pool <= 10_000:
            raise ConfigError(f"first_fit {first_fit}, pool {pool}; allowed: 4 or more, 4 to 10000")
        if guard not in ("measured", "always", "never"):
            raise ConfigError(f"guard {guard!r}; allowed: measured, always, never")
        self.guard = guard
        self.inner = self._wrapped(wraps, options or {})
        self._issued = self.inner._issued
        self.quantum, self.max_lag = self.inner.quantum, self.inner.max_lag
        self.first_fit, self.pool = first_fit, pool
        self.signals = signals
        self._of = () if signals is None else _static(signals.signals)
        self._predictor = predictor
        self._predictor_options = dict(predictor_options or {})
        self._factory = resolve(PREDICTORS, predictor, "predictor")
        self._new_predictor()  # wrong options are found before anything is paid
        self._told: list[Told] = []
        self._labels = 0
        self._chosen_ids: set[int] = set()
        self._fitted = 0
        self._state = _State(None)
        self._background: Table | None = None

    def _wrapped(self, wraps: str, options: Mapping[str, Any]) -> Algorithm:
        factory = resolve(ALGORITHMS, wraps, "algorithm")
        try:
            inner: Algorithm = factory(
                self.space, seed=self.seed, first_id=self.first_id, seeds=self.seeds, **options
            )
        except TypeError as error:
            raise ConfigError(f"options of {wraps}: {error}") from None
        alone = inner.levels or inner.min_objectives > 1 or inner.repeats != "redraw"
        if alone or not inner.pools or getattr(inner, "race", False):
            raise ConfigError(
                f"guided around {wraps!r}; allowed: algorithms that draw many candidates of one "
                "objective at once and measure them in full, such as evolution, "
                "regularised_evolution, eda, cma, random"
            )
        return inner

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
            "first_fit": self.first_fit,
            "pool": self.pool,
            "guard": self.guard,
            "signals": [[signal.name, signal.direction] for signal in self._of],
        }

    def report(self) -> dict[str, Any]:
        """See `Algorithm.report`: the labels, the last fit, and what the guard says of it."""
        state = self._state
        return {
            "predictor": self._predictor,
            "labels": self._labels,
            "fitted_on": self._fitted,
            "guard": "trusted" if state.trusted else "not trusted",
            "chosen": self.chosen,
            "held_out": state.held_out.to_json(),
            "online": state.online.to_json(),
        }

    @staticmethod
    def notes(result: Result) -> list[str]:
        """See `Algorithm.notes`: whether the predictor was trusted in the end."""
        states = [note.get("state") or {} for note in (result.meta.get("proposals") or {}).values()]
        return [
            f"predictor {state['predictor']}: {state['guard']} after {state['labels']} labels "
            f"(rank correlation {state['held_out']['rho']:.2f} with those held out)."
            for state in states
            if "guard" in state
        ]

    # -- learning ---------------------------------------------------------------------------

    def tell(self, told: Told) -> None:
        """See `Algorithm.tell`; the wrapped algorithm hears the same."""
        super().tell(told)
        self.inner.tell(told)

    def _learn(self, told: Told) -> None:
        self._told.append(told)
        self._labels += int(np.isfinite(told.losses[:, 0]).sum())

    @property
    def chosen(self) -> int:
        """How many candidates the predictor has chosen in this process."""
        return len(self._chosen_ids)

    def _counts(self) -> list[int]:
        """The numbers of labels at which a fit was due, so far."""
        counts, count = [], self.first_fit
        while count <= self._labels:
            counts.append(count)
            count = max(count + STEP, int(np.ceil(count * GROWTH)))
        return counts

    def _refit(self) -> None:
        """Fits to the told prefix that the last due count ends at, unless that was done."""
        counts = self._counts()
        if not counts or counts[-1] == self._fitted:
            return
        told = _joined(self._told)
        self._told = [told]
        reached = np.cumsum(np.isfinite(told.losses[:, 0]))
        end = int(np.searchsorted(reached, counts[-1])) + 1
        population = told.population.take(np.arange(end))
        losses = _labels(told.losses[:end, 0], told.violation[:end])
        table = self._table(population)
        held_out = Evidence()
        if self.guard == "measured":
            held_out = correlation([(self._held_out(table, losses, told.ids[:end]), losses)])
        batch = np.searchsorted(counts, reached[:end])  # rows between two fits are one batch
        online = Evidence()
        if told.predicted is not None:
            mean = told.predicted[:end, 0]
            last = range(max(0, len(counts) - BATCHES), len(counts))
            online = correlation((mean[batch == b], losses[batch == b]) for b in last)
        trusted = self.guard == "always" or (self.guard == "measured" and trusts(held_out, online))
        self._state = _State(self._fit(table, losses), trusted, held_out, online)
        self._fitted = counts[-1]

    def _fit(self, table: Table, losses: NDArray[np.float64]) -> Predictor:
        predictor = self._new_predictor()
        if self._background is None:
            u = uniforms(self.seed, _BACKGROUND, 0, BACKGROUND, self.space.sample_width)
            self._background = self._table(self.space.sample(u))
        seed = int(uniforms(self.seed, FITS, len(losses), 1, 1)[0, 0] * 2**32)
        predictor.fit(table, losses, seed=seed, pool=self._background)
        return predictor

    def _held_out(
        self, table: Table, losses: NDArray[np.float64], ids: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Every label as predicted by a fit to the other folds, float64 (n,)."""
        folds = FEW_FOLDS if len(losses) < FEW else FOLDS
        chance = uniforms_of(self.seed, BOOTSTRAP, ids, 1)[:, 0]
        fold = np.argsort(np.argsort(chance, kind="stable"), kind="stable") % folds
        out = np.full(len(losses), np.nan)
        for number in range(folds):
            test = np.flatnonzero(fold == number)
            rest = np.flatnonzero(fold != number)
            if not len(test):
                continue
            predictor = self._fit(table.take(rest), losses[rest])
            # The mean of the others is the higher the lower the fold's: it has to be taken off.
            centre = float(predictor.predict(table.take(rest))[0].mean())
            out[test] = predictor.predict(table.take(test))[0] - centre
        return out

    def _table(self, population: Population) -> Table:
        columns = None
        if self.signals is not None:
            every = self.signals.static_signals(population)
            names = [signal.name for signal in self.signals.signals]
            columns = every[:, [names.index(signal.name) for signal in self._of]]
        return table_of(self.space, population, signals=columns, of=self._of)

    # -- proposing --------------------------------------------------------------------------

    def ask(self, first_id: int, n: int) -> Jobs:
        """See `Algorithm.ask`."""
        self._refit()
        if not self._state.trusted:
            return self._noted(self.inner.ask(first_id, n))
        n_seeds = int(np.clip(self.first_id + len(self.seeds.population) - first_id, 0, n))
        parts = [self._noted(self.inner.ask(first_id, n_seeds))] if n_seeds else []
        parts += [self._chosen(i) for i in range(first_id + n_seeds, first_id + n)]
        return Jobs.concat(parts) if parts else self.inner.ask(first_id, 0)

    def _chosen(self, i: int) -> Jobs:
        """The job of one id: the best new candidate of its pool under its own draw."""
        assert self._state.predictor is not None
        draw = self._drawn(i)
        if draw is not None:
            u = uniforms(self.seed, _DRAWS, i, 1, DRAW_WIDTH)
            table = self._table(draw.population)
            order = np.argsort(self._state.predictor.draw(table, u)[0], kind="stable")
            keys = self.space.keys(draw.population)
            for row in order.tolist():
                if not self.issued_before(keys[row], i):
                    return self._noted(self._job(i, draw, row, keys[row]))
        return self._noted(self.inner.ask(i, 1))

    def _job(self, i: int, draw: Draw, row: int, key: bytes) -> Jobs:
        self.issue(np.array([i]), [key])
        self._chosen_ids.add(i)
        return Jobs(
            ids=np.array([i], dtype=np.int64),
            population=draw.population.take([row]),
            keys=(key,),
            told_at_ask=self.n_told,
            origin=(f"guided:{draw.origin[row]}",),
            parents=np.asarray(draw.parents)[[row]],
        )

    def _drawn(self, i: int) -> Draw | None:
        """The pool of an id."""
        width = self.inner._cached_width
        u = uniforms(self.seed, POOL, i * self.pool, self.pool, width)
        parts: list[Draw] = []
        start, whole = 0, 0.0
        for strength, share in STRENGTHS:
            whole += share
            stop = round(self.pool * whole)
            ids = np.full(stop - start, i, dtype=np.int64)
            part = self.inner._draw(ids, u[start:stop], strength) if len(ids) else None
            if part is not None:
                parts.append(part)
            start = stop
        if not parts:
            return None
        return Draw(
            Population.concat([part.population for part in parts]),
            [text for part in parts for text in part.origin],
            np.concatenate([part.parents for part in parts]),
        )

    def _noted(self, jobs: Jobs) -> Jobs:
        """The jobs with what is predicted of them."""
        if self._state.predictor is None or not len(jobs):
            return replace(jobs, predicted=np.full((len(jobs), 2), np.nan))
        rows = np.arange(max(len(jobs), PADDED)) % len(jobs)
        mean, sd = self._state.predictor.predict(self._table(jobs.population.take(rows)))
        return replace(jobs, predicted=np.column_stack([mean, sd])[: len(jobs)])


def _static(signals: Sequence[Signal]) -> tuple[Signal, ...]:
    return tuple(signal for signal in signals if signal.when == "static")


def _labels(losses: NDArray[np.float64], violation: NDArray[np.float64]) -> NDArray[np.float64]:
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


def _joined(parts: Sequence[Told]) -> Told:
    if len(parts) == 1:
        return parts[0]
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
