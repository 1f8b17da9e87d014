"""The plan of a sampling run: one frozen `Step` per solver step, and the `Schedule` of all of them.

Symbols: step i goes from the current time t_i to t_{i+1}; lambda = log-SNR; h > 0 is the step in
lambda. The history holds one entry per visited point (time, state, model evaluation); offset -1 is
the newest entry. Source: arXiv 2312.07243, section 3 and appendix. What differs from it:

- `scales` weights the derivatives of order >= 2 and `points` chooses the active points freely;
- the interpolation variable of a schedule may be time or sigma/alpha in place of lambda;
- an implicit corrector on the last step costs one call like a pseudo one, and both are counted;
- the v3 prediction type and skip coefficients are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from searchlab.errors import DataError, SpaceError
from searchlab.spaces.solver_schedule.noise_schedule import (
    FloatArray,
    NoiseSchedule,
    noise_schedule_from_json,
)

__all__ = [
    "MAX_ORDER",
    "MIN_LOG_SNR_GAP",
    "Corrector",
    "FirstEvaluation",
    "Interpolation",
    "Prediction",
    "Relaxation",
    "Schedule",
    "Step",
]

Prediction = Literal["data", "noise"]
Relaxation = Literal["none", "bh1", "bh2", "linear", "plus_half_exp", "minus_half_exp"]
Corrector = Literal["none", "pseudo", "implicit"]
FirstEvaluation = Literal["model", "zero", "mean"]
Interpolation = Literal["log_snr", "time", "rho"]

MAX_ORDER = 4
"""Largest Taylor order of a step."""

MIN_LOG_SNR_GAP = 1e-3
"""Smallest allowed step in lambda; closer points make the derivative estimates blow up."""

_FORMAT = "searchlab.solver_schedule"
_VERSION = 1


def _one_of(name: str, value: object, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise SpaceError(f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}")


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise SpaceError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise SpaceError(f"{name} must be a number, got {value!r}")
    answer = float(value)
    if not math.isfinite(answer):
        raise SpaceError(f"{name} must be finite, got {value!r}")
    return answer


@dataclass(frozen=True)
class Step:
    """One solver step.

    Attributes:
        time: native time the step arrives at.
        prediction: which model output is expanded: the clean data or the noise.
        order: Taylor order q in 1..4; with default `points` it is capped by the history there is.
        start: history offset of the point the step starts from: -1 newest (multistep), -k for a
            singlestep solver that goes back over its inner points.
        points: history offsets of the q - 1 active points (the start is never one); empty means the
            q - 1 newest entries other than the start.
        estimate_order: p, how many active points (nearest to the start in lambda first) estimate
            the FIRST derivative; `None` or p >= q - 1 means all of them. A corrector adds the
            new point to those p.
        relaxation: factor R = 1 + O(h) on the first derivative. The corrector drops it, except for
            an order-1 step, whose predictor has no derivative: there R belongs to the corrector.
        coefficient: c of the linear relaxation R = 1 + c h.
        scales: factors of the second, third, ... derivative, in the predictor only; missing ones
            are 1.
        corrector: "pseudo": evaluate at the arrival, redo the step from the old start with that
            evaluation as one more active point and order q + 1, keep the evaluation (no extra
            call). "implicit": evaluate once more at the corrected state (one extra call). On the
            last step either costs the one call at the arrival.

    Raises:
        SpaceError: a field out of range.
    """

    time: float
    prediction: Prediction = "data"
    order: int = 1
    start: int = -1
    points: tuple[int, ...] = ()
    estimate_order: int | None = None
    relaxation: Relaxation = "none"
    coefficient: float = 0.0
    scales: tuple[float, ...] = ()
    corrector: Corrector = "none"

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "time", _real("time", self.time))
        _one_of("prediction", self.prediction, Prediction)
        _one_of("relaxation", self.relaxation, Relaxation)
        _one_of("corrector", self.corrector, Corrector)
        put(self, "order", _whole("order", self.order))
        if not 1 <= self.order <= MAX_ORDER:
            raise SpaceError(f"order must lie in 1..{MAX_ORDER}, got {self.order}")
        put(self, "start", _whole("start", self.start))
        if self.start > -1:
            raise SpaceError(f"start must be a negative history offset, got {self.start}")
        if self.points:
            self._check_points()
        if self.estimate_order is not None:
            put(self, "estimate_order", _whole("estimate_order", self.estimate_order))
            if not 1 <= self.estimate_order < MAX_ORDER:
                raise SpaceError(
                    f"estimate_order must lie in 1..{MAX_ORDER - 1}, got {self.estimate_order}"
                )
        put(self, "coefficient", _real("coefficient", self.coefficient))
        if self.scales:
            put(self, "scales", tuple(_real("scales", v) for v in self.scales))
            if len(self.scales) > MAX_ORDER - 2:
                raise SpaceError(f"scales holds at most {MAX_ORDER - 2} values, got {self.scales}")

    def _check_points(self) -> None:
        points = tuple(_whole("points", v) for v in self.points)
        object.__setattr__(self, "points", points)
        if len(points) != self.order - 1:
            raise SpaceError(
                f"points must be empty or hold order - 1 = {self.order - 1} offsets, got {points}"
            )
        if len(set(points)) != len(points) or max(points) > -1 or self.start in points:
            raise SpaceError(
                f"points must be distinct negative offsets other than start {self.start},"
                f" got {points}"
            )


@dataclass(frozen=True)
class Schedule:
    """A whole sampling run: where it starts, and its steps.

    Attributes:
        noise: the noise schedule that gives times their meaning.
        start_time: native time of the initial state.
        steps: at least one step; times fall strictly from `start_time`.
        first_evaluation: "model" calls the model at the start; "zero" and "mean" put the data
            prediction 0, or the mean of the data, in its place and save one call.
        interpolation: variable the active points are interpolated in.

    Raises:
        SpaceError: times not finite, not falling, out of the noise schedule's range or closer than
            `MIN_LOG_SNR_GAP` in lambda; a history offset that does not exist yet; more than order
            1, or a corrector, on a step to sigma = 0; active points or a corrector from alpha = 0.
    """

    noise: NoiseSchedule
    start_time: float
    steps: tuple[Step, ...]
    first_evaluation: FirstEvaluation = "model"
    interpolation: Interpolation = "log_snr"
    _alpha: FloatArray = field(init=False, repr=False, compare=False)
    _sigma: FloatArray = field(init=False, repr=False, compare=False)
    _log_snr: FloatArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if not isinstance(self.noise, NoiseSchedule):
            raise SpaceError(f"noise must be a NoiseSchedule, got {self.noise!r:.80}")
        put(self, "start_time", _real("start_time", self.start_time))
        put(self, "steps", tuple(self.steps))
        if not self.steps:
            raise SpaceError("a schedule needs at least one step, got none")
        for step in self.steps:
            if not isinstance(step, Step):
                raise SpaceError(f"steps must hold Step objects, got {step!r:.80}")
        _one_of("first_evaluation", self.first_evaluation, FirstEvaluation)
        _one_of("interpolation", self.interpolation, Interpolation)
        self._check_times()
        for i, step in enumerate(self.steps):
            self._check_step(i, step)

    def _check_times(self) -> None:
        times = self.times
        low, high = self.noise.clean, self.noise.latest
        if times[0] > high or times[-1] < low:
            bad = times[0] if times[0] > high else times[-1]
            raise SpaceError(f"times must lie in [{low:g}, {high:g}], got {bad!r}")
        for a, b in pairwise(times):
            if not b < a:
                raise SpaceError(f"times must fall strictly, got {b!r} after {a!r}")
        at = np.array(times)
        alpha, sigma = self.noise.alpha(at), self.noise.sigma(at)
        with np.errstate(divide="ignore"):
            log_snr = np.log(alpha) - np.log(sigma)
        gaps = log_snr[1:] - log_snr[:-1]
        if not gaps.min() >= MIN_LOG_SNR_GAP:
            i = int(np.argmin(gaps))
            raise SpaceError(
                f"times {times[i]!r} and {times[i + 1]!r} are {gaps[i]:.3g} apart in log-SNR;"
                f" at least {MIN_LOG_SNR_GAP:g} is needed"
            )
        for name, array in (("_alpha", alpha), ("_sigma", sigma), ("_log_snr", log_snr)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def _check_step(self, i: int, step: Step) -> None:
        if -step.start > i + 1:
            raise SpaceError(f"step {i}: start {step.start} is not in a history of {i + 1} entries")
        if step.points and -min(step.points) > i + 1:
            raise SpaceError(f"step {i}: points {step.points} exceed a history of {i + 1} entries")
        if self._alpha[0] == 0:
            if step.points and -min(step.points) == i + 1:
                raise SpaceError(f"step {i}: a point at alpha = 0 cannot be active")
            if i + 1 + step.start == 0 and (step.points or step.corrector != "none"):
                raise SpaceError(f"step {i}: only order 1 without corrector starts from alpha = 0")
        to_clean = i + 1 == len(self.steps) and self._sigma[-1] == 0
        if to_clean and (step.order > 1 or step.corrector != "none"):
            raise SpaceError(
                f"step {i}: only order 1 without corrector may arrive at sigma = 0,"
                f" got order {step.order}, corrector {step.corrector!r}"
            )

    @property
    def times(self) -> tuple[float, ...]:
        """Native times of all points, (n + 1,), falling."""
        return (self.start_time, *(s.time for s in self.steps))

    @property
    def nfe(self) -> int:
        """Model calls of a run: steps, less an analytic first one, plus what correctors cost."""
        extra = sum(s.corrector == "implicit" for s in self.steps)
        last = self.steps[-1].corrector == "pseudo"
        return len(self.steps) - (self.first_evaluation != "model") + extra + last

    def canonical(self) -> Schedule:
        """The schedule with every dead decision set to its default.

        Two schedules with equal canonical forms run alike. Merged: orders above what the history
        allows; noise to data prediction on an order-1 step without corrector whose start was not
        moved by a pseudo corrector (the two differ otherwise); relaxation without a derivative to
        act on, and a linear one with c = 0; c without a linear relaxation; scales that are 1 or act
        on nothing; points equal to the default; an estimate order that means all points; an
        implicit corrector on the last step (its second evaluation would be unused) to pseudo; and
        the interpolation variable when no step has a derivative.
        """
        from searchlab.spaces.solver_schedule._resolve import canonical

        return canonical(self)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_json` reads; default fields of steps are left out."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "noise": self.noise.to_json(),
            "start_time": self.start_time,
            "first_evaluation": self.first_evaluation,
            "interpolation": self.interpolation,
            "steps": [_step_to_json(s) for s in self.steps],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """The schedule that `to_json` wrote.

        Raises:
            DataError: not such a dictionary, a newer version, an unknown or a missing entry, or
                values that no schedule can have.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise DataError(f"not a solver schedule: format must be {_FORMAT!r}")
        version = data.get("version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise DataError(f"solver schedule version must be a whole number, got {version!r}")
        if version > _VERSION:
            raise DataError(f"solver schedule version {version} is newer than {_VERSION}")
        names = ("noise", "start_time", "first_evaluation", "interpolation", "steps")
        _check_names("solver schedule", data, {*names, "format", "version"}, set(names))
        noise = noise_schedule_from_json(data["noise"])
        steps = data["steps"]
        if not isinstance(steps, list):
            raise DataError(f"steps must be a list, got {type(steps).__name__}")
        try:
            return cls(
                noise,
                data["start_time"],
                tuple(_step_from_json(s) for s in steps),
                data["first_evaluation"],
                data["interpolation"],
            )
        except (SpaceError, TypeError) as error:
            raise DataError(f"invalid solver schedule: {error}") from None

    def __str__(self) -> str:
        head = (
            "step",
            "to time",
            "log-SNR",
            "type",
            "order",
            "start",
            "points",
            "relax",
            "correct",
        )
        rows = [head]
        for i, s in enumerate(self.steps):
            order = str(s.order) if s.estimate_order is None else f"{s.order}/{s.estimate_order}"
            relax = f"1{s.coefficient:+.3g}h" if s.relaxation == "linear" else s.relaxation
            if s.scales:
                relax += " x" + ",".join(f"{v:g}" for v in s.scales)
            points = ",".join(map(str, s.points)) or "-"
            lam = f"{self._log_snr[i + 1]:.4f}"
            row = (str(i), f"{s.time:.6g}", lam, s.prediction, order, str(s.start), points, relax)
            rows.append((*row, s.corrector))
        widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
        lines = [
            "  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        title = (
            f"solver schedule: {self.nfe} model calls, {self.noise.family} from"
            f" {self.start_time:.6g}, first evaluation {self.first_evaluation},"
            f" interpolation in {self.interpolation}"
        )
        return "\n".join([title, *lines])


def _step_to_json(step: Step) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for f in fields(Step):
        value = getattr(step, f.name)
        if f.default is MISSING or value != f.default:
            answer[f.name] = list(value) if isinstance(value, tuple) else value
    return answer


def _step_from_json(data: object) -> Step:
    if not isinstance(data, Mapping):
        raise DataError(f"a step must be a JSON object, got {type(data).__name__}")
    _check_names("step", data, {f.name for f in fields(Step)}, {"time"})
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return Step(**values)


def _check_names(kind: str, data: Mapping[str, Any], known: set[str], needed: set[str]) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise DataError(f"unknown entry {unknown[0]!r} in a {kind}; known: {sorted(known)}")
    missing = sorted(needed - set(data))
    if missing:
        raise DataError(f"a {kind} lacks the entry {missing[0]!r}")
