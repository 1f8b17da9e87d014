"""What a schedule's steps mean once defaults, history limits and dead decisions are worked out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from searchlab.spaces.solver_schedule.schedule import Corrector, Relaxation, Schedule, Step

__all__ = ["ResolvedStep", "canonical", "resolve"]


@dataclass(frozen=True)
class ResolvedStep:
    """One step with every decision that matters spelled out.

    Attributes:
        data: whether the data prediction is expanded (else the noise prediction).
        order: Taylor order after capping by the history.
        start: index of the start point (0 is the initial one).
        points: indices of the order - 1 active points, newest first.
        estimate_order: how many nearest points estimate the first derivative, or None for all.
        relaxation, coefficient: of the predictor, or of the corrector of an order-1 step.
        scales: factors of the derivatives 2..order - 1.
        corrector: as in `Step`; never "implicit" on the last step.
    """

    data: bool
    order: int
    start: int
    points: tuple[int, ...]
    estimate_order: int | None
    relaxation: Relaxation
    coefficient: float
    scales: tuple[float, ...]
    corrector: Corrector


def _default_points(i: int, start: int, barred: int) -> list[int]:
    """Indices that may be active at step i, newest first."""
    return [j for j in range(i, barred - 1, -1) if j != start]


def resolve(schedule: Schedule) -> list[ResolvedStep]:
    """The resolved steps, one per step of `schedule`."""
    # A point at alpha = 0 has no finite log-SNR, so it is never active.
    barred = 1 if schedule._alpha[0] == 0 else 0
    last = len(schedule.steps) - 1
    answer = []
    moved = False  # whether a pseudo corrector moved the newest state off its evaluation
    moved_at = []
    for i, step in enumerate(schedule.steps):
        moved_at.append(moved)
        start = i + 1 + step.start
        if step.points:
            points = tuple(sorted((i + 1 + p for p in step.points), reverse=True))
        elif step.order == 1 or start < barred:
            points = ()
        else:
            points = tuple(_default_points(i, start, barred)[: step.order - 1])
        order = len(points) + 1
        corrector = step.corrector
        if corrector == "implicit" and i == last:
            corrector = "pseudo"
        plain = order == 1 and corrector == "none"
        relaxation, coefficient = step.relaxation, step.coefficient
        if relaxation != "linear" or plain:
            coefficient = 0.0
        if plain or (relaxation == "linear" and coefficient == 0.0):
            relaxation = "none"
        estimate = step.estimate_order
        if estimate is not None and estimate >= order - 1:
            estimate = None
        scales = step.scales[: max(order - 2, 0)]
        while scales and scales[-1] == 1.0:
            scales = scales[:-1]
        data = step.prediction == "data" or (plain and not moved_at[start])
        answer.append(
            ResolvedStep(
                data, order, start, points, estimate, relaxation, coefficient, scales, corrector
            )
        )
        moved = corrector == "pseudo"
    return answer


def canonical(schedule: Schedule) -> Schedule:
    """See `Schedule.canonical`."""
    barred = 1 if schedule._alpha[0] == 0 else 0
    steps = []
    alive = False
    for i, (step, r) in enumerate(zip(schedule.steps, resolve(schedule), strict=True)):
        alive = alive or r.order > 1 or r.corrector != "none"
        default = tuple(_default_points(i, r.start, barred)[: r.order - 1])
        steps.append(
            Step(
                step.time,
                prediction="data" if r.data else "noise",
                order=r.order,
                start=step.start,
                points=() if r.points == default else tuple(p - i - 1 for p in r.points),
                estimate_order=r.estimate_order,
                relaxation=r.relaxation,
                coefficient=r.coefficient,
                scales=r.scales,
                corrector=r.corrector,
            )
        )
    interpolation = schedule.interpolation if alive else "log_snr"
    return replace(schedule, steps=tuple(steps), interpolation=interpolation)
