"""An algorithm that lets a predictor choose among what another algorithm would propose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from searchlab._tau import Tau, tau_of
from searchlab.algorithms._ladder import Ladder
from searchlab.algorithms._learner import BOLDER, BOLDNESS, Final, Guard, Learner
from searchlab.algorithms._prior import Prior
from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told, no_parents
from searchlab.algorithms.evolution import Evolution
from searchlab.config import ALGORITHMS, PREDICTORS, resolve
from searchlab.errors import ConfigError, SpaceError
from searchlab.evaluator import Signal
from searchlab.population import Jobs, Population
from searchlab.predictor import DRAW_WIDTH, Predictor, Table, table_of
from searchlab.space import Space
from searchlab.uniforms import POOL, uniforms
from searchlab.variables import Choice

if TYPE_CHECKING:
    from searchlab.result import Result

__all__ = ["Guided", "StaticSignals"]

STRENGTHS = ((1.0, 0.5), (4.0, 0.25), (16.0, 0.25))  # how wildly which share of a pool varies
USUAL = ((1.0, 1.0),)
SMALL = 64  # pools below it have no candidates to spare for wild variation, of which few are good
AFAR = ((64, 3), (2**62, 16))  # below an id, one in so many candidates is chosen from random ones
# Candidates that are chosen among while skill is not plain. The best of many by an order that means
# nothing is a rare one, and rare ones are worse than what the wrapped algorithm proposes by itself.
TAME = 8
STEPS = 40  # mutants of the best that are chosen among without signals: labels are few, see `TAME`
_PROCESSES = ("gp", "additive")
MANY = 24  # elements that a linear function of the codes says most of
BACKGROUND = 256  # candidates without labels that show how signals are spread
_DRAWS, _BACKGROUND = POOL + 1, POOL + 2


class StaticSignals(Protocol):
    """What an evaluator has that gives signals without evaluating."""

    @property
    def signals(self) -> tuple[Signal, ...]: ...
    def static_signals(self, population: Population) -> NDArray[np.float64]:
        """float64 (n, number of signals), NaN = missing; a pure function of each candidate."""


class Guided(Algorithm):
    """Proposes many candidates of another algorithm, and asks for the one a predictor likes best.

    For every job `pool` candidates are drawn by the operators of the wrapped algorithm, from a
    stream of their own; pools of `SMALL` and more have some that vary more wildly. The predictor
    draws one plausible loss function (Thompson), and the best candidate under it that is new
    becomes the job. It is fitted from scratch when `first_fit` labels are told and then at fixed
    counts, 15 % and at least 4 labels apart.

    Of `MANY` elements and more the operators change few at a time. Where a process (`gp` or
    `additive`) without signals chooses among those, draws count in full, and one job in three,
    later one in 16, has random candidates instead: the best may be far from what is known. A linear
    function has no other valley, and signals tell more than distance.

    A guard decides at every fit whether the predictor may choose until the next. It looks at
    labels held out of the fit, at the predictions that were stored with the latest batches before
    these were learnt from, and at what the latest batches came to. Where it does not trust, jobs
    are the wrapped algorithm's own, exactly those that it would propose alone. Where it trusts and
    chance may still be behind what it saw, the predictor chooses among `TAME` candidates varied as
    usual, not among `pool`. Pools of choices vary as usual too while the wrapped evolution climbs,
    and hold at most `STEPS` where there are no signals.

    With several fidelities candidates are measured at the cheapest one first. The best of those go
    on, and what they cost so far are inputs of the predictor that chooses them: see `Ladder`.

    Args:
        space, seed, first_id, seeds: see `Algorithm`.
        wraps: name of an algorithm for one objective that gives all uniforms of an id their say.
        options: of that algorithm.
        predictor: name of a predictor; None = `stack` where there are signals or cheap fidelities,
            which come with costly evaluations, `ridge` for choices of `MANY` elements and more,
            whose parts mostly add up, and `additive` for the rest.
        predictor_options: of that predictor.
        first_fit: labels of the first fit.
        pool: candidates that are ranked for a job.
        guard: "measured", or what it says whatever was measured: "always" or "never".
        signals: gives signals of candidates without evaluating them; None = there are none.
        fidelities: relative costs, cheapest first, the truth last; one or none = all candidates
            are measured in full. With a guard that never trusts they are left alone.
        prior: an earlier search's predictor to begin with, see `Prior`; None = there is none.

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
        predictor: str | None = None,
        predictor_options: Mapping[str, Any] | None = None,
        first_fit: int = 12,
        pool: int = 1000,
        guard: Guard = "measured",
        signals: StaticSignals | None = None,
        fidelities: Sequence[float] = (),
        prior: Mapping[str, Any] | None = None,
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
        self._chosen_ids: set[int] = set()
        own = first_id + len(self.seeds.population)
        alone = guard == "never" or self.quantum > 1 or self.max_lag is not None
        self.ladder = Ladder.of(fidelities, own=own) if not alone else None
        self.levels = self.ladder is not None
        self._predictor = predictor or self._fitting_predictor()
        self._predictor_options = dict(predictor_options or {})
        self._factory = resolve(PREDICTORS, self._predictor, "predictor")
        self._new_predictor()  # wrong options are found before anything is paid
        self.prior: Prior | None = None
        if prior is not None:
            self.prior = Prior(prior, space, self._new_predictor, lambda: self._unseen)
        self._plain = not self._of and self.ladder is None
        self.broad = self._predictor in _PROCESSES and self._plain and space.size >= MANY
        self.top = self._learner(0)
        self.cheap = self._learner(1) if self.ladder is not None else None

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

    def _fitting_predictor(self) -> str:
        if self._of or self.ladder is not None:
            return "stack"
        return "ridge" if self._choices and self.space.size >= MANY else "additive"

    @cached_property
    def _choices(self) -> bool:
        return all(isinstance(variable, Choice) for variable in self.space.variables.values())

    def _new_predictor(self) -> Predictor:
        try:
            made: Predictor = self._factory(**self._predictor_options)
        except TypeError as error:
            raise ConfigError(f"options of {self._predictor}: {error}") from None
        return made

    def _learner(self, level: int) -> Learner:
        """Of the truth (0), or of the cheapest fidelity (1)."""
        return Learner(
            self._new_predictor if self.prior is None else self.prior.make,
            self._table if level == 0 else self._plain_table,
            self._unproven if level == 0 else lambda before: self._unseen,
            seed=self.seed,
            level=level,
            first_fit=self.first_fit,
            guard=self.guard,
            own=self.first_id + len(self.seeds.population),
            prior=self.prior,
            boldness=BOLDER if self.broad else BOLDNESS,
        )

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
            **({"fidelities": list(self.ladder.costs)} if self.ladder is not None else {}),
            **({"prior": self.prior.settings()} if self.prior is not None else {}),
        }

    def report(self) -> dict[str, Any]:
        """See `Algorithm.report`: the labels, the last fit, and what the guard says of it."""
        out = {"predictor": self._predictor, **self.top.to_json(), "chosen": self.chosen}
        if self.prior is not None:
            out["prior"] = {"line": self.prior.line, **self._prior_tau().to_json()}
        if self.ladder is not None and self.cheap is not None:
            out["cheapest"] = self.cheap.to_json()
            out["fidelities"] = self.ladder.to_json()
        return out

    def final(self) -> Final | None:
        """What this search leaves: a fit to all labels; None = there are none."""
        return self.top.final()

    def _prior_tau(self) -> Tau:
        """How the earlier predictor orders the labels of this search, none of which it has seen."""
        told = self.top.told()
        if self.prior is None or told is None:
            return Tau()
        said = self.prior.start().rank(self._plain_table(told.population))
        return tau_of(said, told.losses[:, 0])

    @staticmethod
    def notes(result: Result) -> list[str]:
        """See `Algorithm.notes`: whether the predictor was trusted in the end."""
        states = [note.get("state") or {} for note in (result.meta.get("proposals") or {}).values()]
        return [
            f"predictor {state['predictor']}: {state['guard']} after {state['labels']} labels "
            f"(correlation {state['held_out']['rho']:.2f} with those held out)."
            for state in states
            if "guard" in state
        ] + [
            f"{state['prior']['line']}; {Tau.from_json(state['prior'])}."
            for state in states
            if "prior" in state
        ]

    @property
    def chosen(self) -> int:
        """How many candidates the predictor has chosen in this process."""
        return len(self._chosen_ids)

    # -- learning ---------------------------------------------------------------------------

    def tell(self, told: Told) -> None:
        """See `Algorithm.tell`; the wrapped algorithm hears what was measured in full."""
        super().tell(told)
        if self.ladder is None:
            self.inner.tell(told)
            return
        for part in self.ladder.split(told):
            if part.level == len(self.ladder.costs) - 1:
                self.inner.tell(part.told)

    def _learn(self, told: Told) -> None:
        if self.ladder is None:
            self.top.learn(told)
            return
        assert self.cheap is not None
        self.ladder.learn(told, self.space)
        for part in self.ladder.split(told):
            if part.level == len(self.ladder.costs) - 1:
                self.top.learn(part.told)
            elif part.level == 0:
                self.cheap.learn(part.told)

    def issue(self, ids: NDArray[np.int64], keys: Sequence[bytes | None]) -> None:
        """See `Algorithm.issue`."""
        super().issue(ids, keys)
        if self.ladder is not None:
            self.ladder.issue(ids, keys)

    # -- tables -----------------------------------------------------------------------------

    def _plain_table(self, population: Population) -> Table:
        columns = None
        if self.signals is not None:
            every = self.signals.static_signals(population)
            names = [signal.name for signal in self.signals.signals]
            columns = every[:, [names.index(signal.name) for signal in self._of]]
        return table_of(self.space, population, signals=columns, of=self._of)

    def table_of(self, population: Population) -> Table:
        """Candidates as a predictor reads them that nothing was measured of."""
        return self._plain_table(population)

    def _table(self, population: Population) -> Table:
        """The table that the truth is learnt from: signals, and what cheaper fidelities gave."""
        table = self._plain_table(population)
        if self.ladder is None:
            return table
        columns, names = self.ladder.columns(self.space.keys(population)), self.ladder.names
        losses: list[Literal["min"]] = ["min"] * len(names)
        return replace(
            table,
            signals=np.concatenate([table.signals, columns], axis=1),
            signal_names=(*table.signal_names, *names),
            directions=(*table.directions, *losses),
        )

    @cached_property
    def _random(self) -> Population:
        n = min(BACKGROUND, 8 * self.pool)  # where pools are small, signals cost something
        u = uniforms(self.seed, _BACKGROUND, 0, n, self.space.sample_width)
        return _sampled(self.space, u)

    @cached_property
    def _unseen(self) -> Table:
        """Candidates that nothing was measured of."""
        return self._plain_table(self._random)

    def _unproven(self, before: int) -> Table:
        """Candidates as they wait for the truth at an id: measured cheaply where that is done."""
        if self.ladder is None:
            return self._unseen
        cheap = self.ladder.measured(0, before, BACKGROUND)
        return self._table(self._random if cheap is None else cheap)

    # -- proposing --------------------------------------------------------------------------

    def ask(self, first_id: int, n: int) -> Jobs:
        """See `Algorithm.ask`."""
        self.top.refit()
        if self.ladder is not None:
            return self._ask_level(first_id, min(n, 1))
        if not self.top.trusted:
            return self.top.noted(self.inner.ask(first_id, n))
        n_seeds = int(np.clip(self.first_id + len(self.seeds.population) - first_id, 0, n))
        parts = [self.inner.ask(first_id, n_seeds)] if n_seeds else []
        ids = range(first_id + n_seeds, first_id + n)
        chosen = [i for i in ids if self.top.chooses(i)]
        draws = dict(zip(chosen, self._drawn(chosen, whole=self.top.convinced), strict=True))
        self._look_ahead(list(draws.values()))
        orders = self._orders(draws)
        parts += [self._fresh(i, self.top, draws.get(i), orders.get(i)) for i in ids]
        jobs = Jobs.concat(parts) if parts else self.inner.ask(first_id, 0)
        return self.top.noted(jobs)

    def _look_ahead(self, draws: Sequence[Draw | None]) -> None:
        """Lets an evaluator that remembers its signals see the pools of a group at once."""
        if self.signals is not None and len(draws) > 1:
            pools = [draw.population for draw in draws if draw is not None]
            if pools and getattr(self.signals, "remembers", False):
                self.signals.static_signals(Population.concat(pools))

    def _orders(self, draws: Mapping[int, Draw | None]) -> dict[int, NDArray[np.int64]]:
        """The order of each pool of a group, whose tables are made at once."""
        pools = {i: draw.population for i, draw in draws.items() if draw is not None}
        u = [uniforms(self.seed, _DRAWS, i, 1, DRAW_WIDTH) for i in pools]
        return dict(zip(pools, self.top.orders(list(pools.values()), u), strict=True))

    def _fresh(
        self,
        i: int,
        learner: Learner,
        draw: Draw | None,
        order: NDArray[np.int64] | None = None,
    ) -> Jobs:
        """A candidate that was never measured: the wrapped algorithm's, or the best of its pool."""
        if draw is not None:
            if order is None:
                u = uniforms(self.seed, _DRAWS, i, 1, DRAW_WIDTH)
                order = learner.order(draw.population, u)
            keys = self.space.keys(draw.population)
            for row in order.tolist():
                if not self.issued_before(keys[row], i):
                    word = f"guided:{draw.origin[row]}"
                    parents = np.asarray(draw.parents)[[row]]
                    return self._job(i, draw.population.take([row]), keys[row], word, parents)
        return self.inner.ask(i, 1)

    def _alone(self, i: int, learner: Learner) -> Jobs:
        """`_fresh` of one id, with what is predicted of it."""
        draw = self._drawn([i], whole=learner.convinced)[0] if learner.chooses(i) else None
        return learner.noted(self._fresh(i, learner, draw))

    def _ask_level(self, i: int, n: int) -> Jobs:
        """The job of one id where there are several fidelities."""
        ladder, cheap = self.ladder, self.cheap
        assert ladder is not None
        assert cheap is not None
        level = ladder.level_of(i)
        if n == 0 or i < ladder.own:
            return replace(self.top.noted(self.inner.ask(i, n)), fidelity=ladder.at[-1])
        cheap.refit()
        idle = self.top.fitted and not self.top.trusted and not ladder.pays()
        if idle or ladder.misleads():
            return replace(self._alone(i, self.top), fidelity=ladder.at[-1])
        if level and (jobs := self._promoted(i, level)) is not None:
            return jobs
        jobs = replace(self._alone(i, cheap), fidelity=ladder.at[0])
        others = range(ladder.top, 0, -1) if not len(jobs) else ()
        for other in others:  # nothing is new any more
            if (late := self._promoted(i, other)) is not None:
                return late
        return jobs

    def _promoted(self, i: int, level: int) -> Jobs | None:
        """A candidate of the level below; None while none waits there."""
        ladder = self.ladder
        assert ladder is not None
        waiting = ladder.waiting(level - 1, i)
        if waiting is None:
            return None
        if self.top.trusted:
            u = uniforms(self.seed, _DRAWS, i, 1, DRAW_WIDTH)
            row = int(self.top.order(waiting.population, u)[0])
        elif not self.top.fitted and (i - ladder.own) // len(ladder.cycle) % 2:
            row = 0  # by turn, so that it is seen what the cheap order is worth
        else:
            row = int(np.argmin(waiting.losses))
        ladder.issue(np.array([i]), [waiting.keys[row]])
        first = int(waiting.ids[row])
        candidate = waiting.population.take([row])
        jobs = self._job(i, candidate, waiting.keys[row], "promoted", np.array([[first, first]]))
        if level == ladder.top:
            jobs = self.top.noted(jobs)
        else:
            jobs = replace(jobs, predicted=np.full((1, 2), np.nan))
        return replace(jobs, fidelity=ladder.at[level])

    def _job(
        self, i: int, candidate: Population, key: bytes, word: str, parents: NDArray[np.int64]
    ) -> Jobs:
        super().issue(np.array([i]), [key])
        if self.top.trusted or word != "promoted":
            self._chosen_ids.add(i)
        return Jobs(
            ids=np.array([i], dtype=np.int64),
            population=candidate,
            keys=(key,),
            told_at_ask=self.n_told,
            origin=(word,),
            parents=parents,
        )

    def _part(
        self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float
    ) -> list[tuple[NDArray[np.int64], Draw]]:
        """The wrapped algorithm's candidates of ids, without those beyond repair."""
        if not len(u):
            return []
        try:
            part = self.inner._draw(ids, u, strength)
        except SpaceError:
            if len(u) == 1:
                return []
            half = len(u) // 2
            one = self._part(ids[:half], u[:half], strength)
            return [*one, *self._part(ids[half:], u[half:], strength)]
        return [] if part is None else [(ids, part)]

    def _drawn(self, ids: Sequence[int], *, whole: bool = True) -> list[Draw | None]:
        """The pool of each id, or its beginning; a row depends on its id and uniforms only."""
        if not whole:
            return self._near(ids, min(TAME, self.pool))
        pools: dict[int, Draw | None] = {}
        near = [i for i in ids if not (self.broad and self._looks_afar(i))]
        close = [i for i in near if self._climbs(i)]
        far = [i for i in near if not self._climbs(i)]
        steps = min(STEPS, self.pool) if self._plain else self.pool
        for some, size, strengths in ((close, steps, USUAL), (far, self.pool, STRENGTHS)):
            pools |= dict(zip(some, self._near(some, size, strengths), strict=True))
        return [pools[i] if i in pools else self._afar() for i in ids]

    def _climbs(self, i: int) -> bool:
        """Whether candidates of an id are to be one choice away from the best."""
        return self._choices and isinstance(self.inner, Evolution) and self.inner.climbs(i)

    def _looks_afar(self, i: int) -> bool:
        place = i - self.first_id
        return place % next(every for below, every in AFAR if place < below) == 0

    def _afar(self) -> Draw | None:
        """The same random candidates each time; those that were asked for are not new any more."""
        n = len(self._random)
        return Draw(self._random, ["random"] * n, no_parents(n)) if n else None

    def _near(
        self, ids: Sequence[int], size: int, strengths: Sequence[tuple[float, float]] = USUAL
    ) -> list[Draw | None]:
        """So many of the wrapped algorithm's candidates for each id, varied as strengths say."""
        width, shared = self.inner._cached_width, self.inner.shared
        blocks = [uniforms(self.seed, POOL, i * self.pool, size, width) for i in ids]
        parts: list[tuple[NDArray[np.int64], Draw]] = []
        start, whole = 0, 0.0
        for strength, share in strengths if size >= SMALL else USUAL:
            whole += share
            stop = round(size * whole)
            if not blocks:
                break
            for u in blocks:
                u[:, :shared] = u[0, :shared]
            u = np.concatenate([block[start:stop] for block in blocks])
            repeated = np.repeat(np.asarray(ids, dtype=np.int64), stop - start)
            parts += self._part(repeated, u, strength)
            start = stop
        return [_pool_of(i, parts) for i in ids]


def _pool_of(i: int, parts: Sequence[tuple[NDArray[np.int64], Draw]]) -> Draw | None:
    """What parts drawn for many ids hold of one; None = nothing."""
    found = [(np.flatnonzero(ids == i), draw) for ids, draw in parts]
    found = [(rows, draw) for rows, draw in found if len(rows)]
    if not found:
        return None
    return Draw(
        Population.concat([draw.population.take(rows) for rows, draw in found]),
        [draw.origin[row] for rows, draw in found for row in rows.tolist()],
        np.concatenate([np.asarray(draw.parents)[rows] for rows, draw in found]),
    )


def _sampled(space: Space, u: NDArray[np.float64]) -> Population:
    """Candidates of the space; rows whose repair fails are left out."""
    try:
        return space.sample(u)
    except SpaceError:
        if len(u) == 1:
            return space.empty()
        half = len(u) // 2
        return Population.concat([_sampled(space, u[:half]), _sampled(space, u[half:])])


def _static(signals: Sequence[Signal]) -> tuple[Signal, ...]:
    return tuple(signal for signal in signals if signal.when == "static")
