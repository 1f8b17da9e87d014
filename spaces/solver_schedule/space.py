"""The search space of solver schedules: columns for every decision, and the way to a plan and back.

A candidate is: how many noisy points it visits, their log-SNR, how it ends, what stands in for the
first evaluation, and per step the prediction type, order, start point, active points, derivative
estimation with its scaling, and corrector. One space holds all numbers of model calls between two
limits; unused steps are inactive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._adopt import Adopted
from searchlab.budget import LinearBudget
from searchlab.errors import SpaceError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.spaces.solver_schedule.noise_schedule import NoiseSchedule
from searchlab.spaces.solver_schedule.schedule import MAX_ORDER, Schedule, Step
from searchlab.variables import ActiveBelow, ActiveIf, Choice, Integer, Ordered, Real

__all__ = ["ScheduleRange", "SolverScheduleSpace"]

Array = NDArray[Any]

ORDERS = (1, 2, 3, 4)
PREDICTIONS = ("data", "noise")
RELAXATIONS = ("none", "bh1", "bh2", "linear", "plus_half_exp", "minus_half_exp")
CORRECTORS = ("none", "pseudo", "implicit")
STARTS = (-1, -2, -3)
ACTIVE = ("newest", "skip_first", "skip_second")
ESTIMATES = ("full", 1, 2)
FIRST = ("model", "zero", "mean")
ENDINGS = ("stop", "clean")
INTERPOLATIONS = ("log_snr", "time", "rho")

# Log-SNR is kept to this many decimals, so that a schedule and its candidate have one key.
_DECIMALS = 9


@dataclass(frozen=True)
class ScheduleRange:
    """What the search may do.

    Attributes:
        nfe: (lowest, highest) number of model calls.
        last: (lowest, highest) native time of the last noisy point, the point a schedule stops at
            or, with the "clean" ending, steps to sigma = 0 from.
        endings: subset of "stop", "clean".
        first: subset of "model", "zero", "mean": what stands in for the first evaluation.
        start_time: native time of pure noise; None = the noise schedule's own.
        earliest: native time that no inner point exceeds where the start has no finite log-SNR.
        gap: least distance of neighbouring points in log-SNR.
        coefficient: limits of c in the linear scaling 1 + c h.
        orders: largest Taylor order.
    """

    nfe: tuple[int, int]
    last: tuple[float, float]
    endings: tuple[str, ...] = ENDINGS
    first: tuple[str, ...] = ("model",)
    start_time: float | None = None
    earliest: float = 0.9975
    gap: float = 0.02
    coefficient: float = 2.0
    orders: int = MAX_ORDER

    def __post_init__(self) -> None:
        low, high = self.nfe
        if not 1 <= low <= high:
            raise SpaceError(f"nfe {low}..{high}; allowed: 1 <= lowest <= highest")
        if not 0 <= self.last[0] <= self.last[1]:
            raise SpaceError(f"last {self.last}; allowed: 0 <= lowest <= highest")
        for name, chosen, known in (
            ("endings", self.endings, ENDINGS),
            ("first", self.first, FIRST),
        ):
            if not chosen or set(chosen) - set(known):
                raise SpaceError(f"{name} {chosen}; allowed: some of {known}")
        if not 1 <= self.orders <= MAX_ORDER:
            raise SpaceError(f"orders {self.orders}; allowed: 1..{MAX_ORDER}")


class SolverScheduleSpace(Space):
    """All solver schedules within a range, as a space.

    Columns, with M the largest number of noisy points after the start:

    - `points` Integer: m, noisy points after the start; the steps are m, one more where `ending`
      is "clean";
    - `ending`, `first`, `interpolation` Choice: one each;
    - `log_snr` Ordered (M,): rising; the first m count;
    - `prediction`, `order`, `start`, `active`, `estimate`, `relaxation`, `corrector` Choice (M,);
    - `coefficient` Real (M,): c of the linear scaling; `scale_2`, `scale_3` Real (M,): factors of
      the second and third derivative.

    The constraint `nfe` is linear: m + [clean] - [first is no model call] + implicit correctors.
    Correctors of the last step are dead here: one there would cost a call like another step.

    Args:
        noise: the noise schedule that gives times their meaning.
        within: what the search may do.
    """

    def __init__(self, noise: NoiseSchedule, within: ScheduleRange) -> None:
        if not float(noise.sigma(within.last[0])) > 0:
            raise SpaceError(f"last {within.last} of a noisy point; allowed: sigma above 0")
        self.noise = noise
        self.within = within
        self.start_time = noise.start if within.start_time is None else within.start_time
        self.barred = int(float(noise.alpha(self.start_time)) == 0.0)
        self.most = within.nfe[1] + int(set(within.first) != {"model"})
        m = self.most
        begin = self.start_time if not self.barred else within.earliest
        low = round(float(noise.log_snr(begin)) + within.gap, _DECIMALS)
        high = round(float(noise.log_snr(within.last[0])), _DECIMALS)
        self.last_low = round(float(noise.log_snr(within.last[1])), _DECIMALS)
        step = (ActiveBelow("points"),)
        orders = ORDERS[: within.orders]
        variables: dict[str, Any] = {
            "points": Integer(max(1, within.nfe[0] - 1 - m), m),
            "ending": Choice(within.endings),
            "first": Choice(within.first),
            "interpolation": Choice(INTERPOLATIONS),
            "log_snr": Ordered(m, low, high, within.gap, when=step),
            "prediction": Choice(PREDICTIONS, shape=(m,), when=step),
            "order": Choice(orders, shape=(m,), when=step),
            "start": Choice(STARTS, shape=(m,), when=step),
            "active": Choice(ACTIVE, shape=(m,), when=step),
            "estimate": Choice(
                ESTIMATES, shape=(m,), when=(*step, ActiveIf("order", orders[2:] or (orders[-1],)))
            ),
            "relaxation": Choice(RELAXATIONS, shape=(m,), when=step),
            "corrector": Choice(CORRECTORS, shape=(m,), when=step),
            "coefficient": Real(
                -within.coefficient,
                within.coefficient,
                shape=(m,),
                when=(*step, ActiveIf("relaxation", ("linear",))),
                default=0.0,
                sigma=0.05,
            ),
            "scale_2": Real(
                0.0,
                2.0,
                shape=(m,),
                when=(*step, ActiveIf("order", orders[2:] or (orders[-1],))),
                default=1.0,
            ),
            "scale_3": Real(
                0.0,
                2.0,
                shape=(m,),
                when=(*step, ActiveIf("order", orders[3:] or (orders[-1],))),
                default=1.0,
            ),
        }
        analytic = [0.0 if label == "model" else -1.0 for label in within.first]
        nfe = LinearBudget(
            {
                "points": 1.0,
                "ending": [float(label == "clean") for label in within.endings],
                "first": analytic,
                "corrector": np.tile([0.0, 0.0, 1.0], (m, 1)),
            },
            lower=within.nfe[0],
            upper=within.nfe[1],
            name="nfe",
        )
        super().__init__(variables, constraints=[nfe], name="solver_schedule")

    # -- one spelling per candidate ---------------------------------------------------------

    def canonicalise(self, population: Population) -> Population:
        """Dead decisions get their default, so that equal schedules have equal keys.

        Source: card of arXiv 2312.07243: order-1 steps of both predictions are one map unless a
        corrector moved their start; scaling without a derivative, a corrector after the last
        evaluation, and orders beyond the history are dead.
        """
        population = super().canonicalise(population)
        columns = {name: np.array(column) for name, column in population.columns.items()}
        n, m = len(population), self.most
        if n == 0:
            return population
        count = columns["points"]
        index = np.arange(m)
        inside = index < count[:, None]
        last = index == count[:, None] - 1
        clean = self._code("ending", "clean")
        stops = np.ones(n, dtype=bool) if clean is None else columns["ending"] != clean

        log_snr = np.round(columns["log_snr"], _DECIMALS)
        np.copyto(log_snr, np.maximum(log_snr, self.last_low), where=last)

        history = np.maximum(index + 1 - self.barred, 1)
        start = columns["start"].astype(np.int64)
        start = np.where(start < history, start, 0)
        order = np.minimum(columns["order"].astype(np.int64) + 1, history)
        corrector = np.where(last & stops[:, None], 0, columns["corrector"])
        if self.barred:
            corrector[:, 0] = 0
        plain = (order == 1) & (corrector == 0)
        relaxation = np.where(plain, 0, columns["relaxation"])
        linear = RELAXATIONS.index("linear")
        coefficient = np.where(relaxation == linear, columns["coefficient"], 0.0)
        relaxation = np.where((relaxation == linear) & (coefficient == 0.0), 0, relaxation)
        # Each order uses order - 1 of the candidates for active points; a pattern that runs out of
        # history, or that has nothing to choose, is the default one.
        room = history - 1
        skipped = np.array([0, 1, 1])[columns["active"]]
        needed = order - 1 + skipped
        alone = (columns["active"] == 2) & (order < 3)  # the newest alone: nothing is skipped
        active = np.where((order == 1) | (needed > room) | alone, 0, columns["active"])
        estimate = columns["estimate"].astype(np.int64)
        estimate = np.where((estimate == 0) | (estimate >= order - 1), 0, estimate)
        prediction = columns["prediction"]
        moved = np.zeros((n, m + 1), dtype=bool)
        moved[:, 1:] = corrector == CORRECTORS.index("pseudo")
        rows = np.arange(n)[:, None]
        start_moved = moved[rows, np.maximum(index - start, 0)]
        prediction = np.where(plain & ~start_moved, 0, prediction)
        lively = (inside & ~plain).any(axis=1)
        put = {
            "start": np.where(inside, start, 0),
            "order": np.where(inside, order - 1, 0),
            "corrector": np.where(inside, corrector, 0),
            "relaxation": np.where(inside, relaxation, 0),
            "coefficient": np.where(inside, coefficient, 0.0),
            "active": np.where(inside, active, 0),
            "estimate": np.where(inside, estimate, 0),
            "prediction": np.where(inside, prediction, 0),
            "scale_2": np.where(inside & (order >= 3), columns["scale_2"], 1.0),
            "scale_3": np.where(inside & (order >= 4), columns["scale_3"], 1.0),
            "interpolation": np.where(lively, columns["interpolation"], 0),
        }
        for name, value in put.items():
            columns[name] = value.astype(self.variables[name].dtype)
        columns["log_snr"] = log_snr
        return Population(columns)

    def _code(self, variable: str, label: str) -> int | None:
        choice = self.variables[variable]
        assert isinstance(choice, Choice)
        return choice.labels.index(label) if label in choice.labels else None

    def adopted(self, earlier: Space, population: Population, k: int) -> Adopted:
        """Schedules of another search, with steps put in or taken out where calls are others.

        See `searchlab.spaces.solver_schedule.resize.adopted`.
        """
        from searchlab.spaces.solver_schedule.resize import adopted

        return adopted(self, earlier, population, k)

    # -- plans ------------------------------------------------------------------------------

    def plans(self, population: Population) -> list[Any]:
        """The schedules, one per candidate."""
        return [self._plan(population, row) for row in range(len(population))]

    def _plan(self, population: Population, row: int) -> Schedule:
        value = {
            name: self.variables[name].decode(population[name][row]) for name in self.variables
        }
        m = value["points"]
        times = self.noise.time_of_log_snr(np.asarray(value["log_snr"][:m])).tolist()
        # The end of the range comes back as it was given, not through exp and log.
        for i, time in enumerate(times):
            for exact in (self.within.last[0], self.within.last[1]):
                if abs(time - exact) <= 1e-7 * max(abs(exact), 1e-3):
                    times[i] = exact
        steps = [self._step(value, i, times[i]) for i in range(m)]
        if value["ending"] == "clean":
            steps.append(Step(self.noise.clean))
        return Schedule(
            self.noise,
            self.start_time,
            tuple(steps),
            first_evaluation=value["first"],
            interpolation=value["interpolation"],
        )

    def _step(self, value: Mapping[str, Any], i: int, time: float) -> Step:
        order, start = value["order"][i], value["start"][i]
        points: tuple[int, ...] = ()
        if value["active"][i] != "newest":
            others = [-j for j in range(1, i + 2 - self.barred) if -j != start]
            del others[0 if value["active"][i] == "skip_first" else 1]
            points = tuple(others[: order - 1])
        scales = (value["scale_2"][i], value["scale_3"][i])[: max(0, order - 2)]
        estimate = value["estimate"][i]
        return Step(
            time,
            prediction=value["prediction"][i],
            order=order,
            start=start,
            points=points,
            estimate_order=None if estimate == "full" else estimate,
            relaxation=value["relaxation"][i],
            coefficient=value["coefficient"][i],
            scales=scales if any(scale != 1.0 for scale in scales) else (),
            corrector=value["corrector"][i],
        )

    def of_schedules(self, schedules: Sequence[Schedule]) -> Population:
        """Schedules as candidates; the inverse of `plans`.

        Raises:
            SpaceError: a schedule that this space does not hold; says why.
        """
        return self.population([self._values(schedule) for schedule in schedules])

    def _values(self, schedule: Schedule) -> dict[str, Any]:
        schedule = schedule.canonical()
        if schedule.start_time != self.start_time:
            raise SpaceError(
                f"schedule starts at {schedule.start_time:g}; allowed here: {self.start_time:g}"
            )
        clean = float(self.noise.sigma(schedule.times[-1])) == 0.0
        steps = schedule.steps[:-1] if clean else schedule.steps
        m = len(steps)
        if not 1 <= m <= self.most:
            raise SpaceError(f"schedule has {m} noisy points; allowed here: 1..{self.most}")
        low, high = self.within.last
        if not low * (1 - 1e-9) <= steps[-1].time <= high * (1 + 1e-9):
            raise SpaceError(
                f"schedule's last noisy time is {steps[-1].time:g}; allowed here: {low:g}..{high:g}"
            )
        pad = self.most - m
        per_step: dict[str, list[Any]] = {
            "prediction": [s.prediction for s in steps] + ["data"] * pad,
            "order": [s.order for s in steps] + [1] * pad,
            "start": [s.start for s in steps] + [-1] * pad,
            "active": [self._pattern(i, s) for i, s in enumerate(steps)] + ["newest"] * pad,
            "estimate": [s.estimate_order or "full" for s in steps] + ["full"] * pad,
            "relaxation": [s.relaxation for s in steps] + ["none"] * pad,
            "corrector": [s.corrector for s in steps] + ["none"] * pad,
            "coefficient": [s.coefficient for s in steps] + [0.0] * pad,
            "scale_2": [(*s.scales, 1.0, 1.0)[0] for s in steps] + [1.0] * pad,
            "scale_3": [(*s.scales, 1.0, 1.0)[1] for s in steps] + [1.0] * pad,
        }
        ordered = self.variables["log_snr"]
        assert isinstance(ordered, Ordered)
        log_snr = np.clip(
            self.noise.log_snr(np.array([s.time for s in steps])), ordered.low, ordered.high
        )
        return {
            "points": m,
            "ending": "clean" if clean else "stop",
            "first": schedule.first_evaluation,
            "interpolation": schedule.interpolation,
            "log_snr": [*log_snr.tolist(), *[ordered.high] * pad],
            **per_step,
        }

    def _pattern(self, i: int, step: Step) -> str:
        if not step.points:
            return "newest"
        others = [-j for j in range(1, i + 2 - self.barred) if -j != step.start]
        for name, skip in (("newest", None), ("skip_first", 0), ("skip_second", 1)):
            left = [offset for at, offset in enumerate(others) if at != skip]
            if tuple(left[: step.order - 1]) == step.points:
                return name
        raise SpaceError(f"active points {step.points} of step {i} are not one of {ACTIVE}")

    def to_json(self) -> dict[str, Any]:
        """The generic form, with the noise schedule that gives times their meaning."""
        return {**super().to_json(), "noise": self.noise.to_json()}
