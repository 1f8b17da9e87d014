"""Random schedules of every decision kind, for the tests of the solver core."""

from __future__ import annotations

import numpy as np

from searchlab.spaces.solver_schedule import Edm, Flow, NoiseSchedule, Schedule, Step, VpLinear

FAMILIES: tuple[NoiseSchedule, ...] = (VpLinear(), Edm(), Flow(start_time=0.98, end_time=0.02))
RELAXATIONS = ("none", "bh1", "bh2", "linear", "plus_half_exp", "minus_half_exp")


def random_step(rng: np.random.Generator, i: int, time: float, *, last: bool, clean: bool) -> Step:
    """Step i (history of i + 1 entries) with every decision drawn at random."""
    prediction = str(rng.choice(["data", "noise"]))
    if clean:
        return Step(time, prediction)
    start = -int(rng.integers(1, min(i + 1, 3) + 1)) if rng.random() < 0.3 else -1
    order = int(rng.integers(1, 5))
    points: tuple[int, ...] = ()
    others = [-j for j in range(1, i + 2) if -j != start]
    if order > 1 and len(others) >= order - 1 and rng.random() < 0.5:
        points = tuple(int(v) for v in rng.permutation(others[:4])[: order - 1])
        if len(points) < order - 1:
            points = ()
    relaxation = str(rng.choice(RELAXATIONS))
    correctors = ["none", "pseudo", "implicit"]
    corrector = str(rng.choice(correctors, p=[0.4, 0.4, 0.2]))
    if last and rng.random() < 0.5:
        corrector = "none"
    return Step(
        time,
        prediction=prediction,
        order=order,
        start=start,
        points=points,
        estimate_order=[None, 1, 2, 3][int(rng.integers(4))],
        relaxation=relaxation,
        coefficient=float(rng.normal(0, 0.2)),
        scales=tuple(float(v) for v in rng.uniform(0.5, 1.2, int(rng.integers(0, 3)))),
        corrector=corrector,
    )


def random_schedule(
    rng: np.random.Generator,
    noise: NoiseSchedule,
    *,
    first: tuple[str, ...] = ("model", "zero", "mean"),
    interpolations: tuple[str, ...] = ("log_snr", "time", "rho"),
) -> Schedule:
    """2 to 10 steps between the ends of `noise`; a third of them go on to sigma = 0."""
    n = int(rng.integers(2, 11))
    low, high = noise.log_snr(noise.start), noise.log_snr(noise.end)
    gaps = rng.uniform(0.3, 1.0, n)
    lam = low + (high - low) * np.concatenate([[0.0], np.cumsum(gaps) / gaps.sum()])
    times = [float(t) for t in noise.time_of_log_snr(lam)]
    clean = rng.random() < 0.33
    if clean:
        times.append(noise.clean)
    total = len(times) - 1
    steps = tuple(
        random_step(rng, i, times[i + 1], last=i == total - 1, clean=clean and i == total - 1)
        for i in range(total)
    )
    return Schedule(
        noise,
        times[0],
        steps,
        first_evaluation=str(rng.choice(first)),
        interpolation=str(rng.choice(interpolations)),
    )
