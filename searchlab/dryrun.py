"""What a run would do and cost, measured on two candidates, before anything is recorded."""

from __future__ import annotations

import time

import numpy as np

from searchlab.auto import settled
from searchlab.config import SearchConfig, Stage
from searchlab.population import Jobs, Population
from searchlab.uniforms import uniforms

__all__ = ["estimate"]

BYTES_PER_RECORD = 700  # measured order of magnitude of a row with its indexes; items come on top


def estimate(config: SearchConfig) -> list[str]:
    """Lines that say what each stage proposes, and roughly how long and how large it will be."""
    config = settled(config)
    lines, total, records = [], 0.0, 0
    for stage in config.stages:
        stage.evaluator.setup()
        seeds = len(stage.seeds.origin) if stage.seeds is not None else 0
        seconds = _seconds(stage, config.seed)
        jobs = seeds + (stage.budget.evaluations or 0)
        total += seconds * jobs
        records += jobs
        budget, price = stage.budget.evaluations, stage.budget.gpu_price
        fidelity = stage.evaluator.fidelities[stage.fidelity_index].name
        lines.append(
            f"stage {stage.name!r}: {seeds} given candidates, "
            f"{'no further' if budget is None else budget} evaluations, fidelity {fidelity}, "
            f"{stage.algorithm.name} on {stage.space.size} elements, "
            f"{seconds * 1e3:.1f} ms each"
        )
        if stage.chosen:
            lines.append(f"stage {stage.name!r}: {stage.chosen}")
        if price is not None:
            hours = seconds / 3600 * int(getattr(stage.evaluator, "devices", 1))
            lines.append(f"stage {stage.name!r}: {hours * price:.3g} usd per evaluation")
    lines.append(
        f"about {records} evaluations, {total:.0f} s in this process before sharing and the final, "
        f"{records * BYTES_PER_RECORD / 2**20:.1f} MiB in the database"
    )
    return lines


def _seconds(stage: Stage, seed: int) -> float:
    """Seconds per candidate, the smaller of two calls (the first one loads things)."""
    if stage.seeds is not None and len(stage.seeds.population) >= 2:
        population: Population = stage.seeds.population.take(np.arange(2))
    else:
        population = stage.space.sample(uniforms(seed, 0, 0, 2, stage.space.sample_width))
    times = []
    for row in range(2):
        single = population.take([row])
        jobs = Jobs(
            np.array([row]), single, stage.space.keys(single), fidelity=stage.fidelity_index
        )
        start = time.perf_counter()
        stage.evaluator.evaluate(jobs)
        times.append(time.perf_counter() - start)
    return min(times)
