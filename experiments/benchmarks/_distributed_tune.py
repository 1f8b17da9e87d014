"""The sleeping candidates of the benchmark `distributed` as trials of Ray Tune."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from searchlab.experiments.benchmarks._common import Journal

__all__ = ["run_tune"]

LIMIT_S = 150  # seconds after which Ray Tune ends with the trials that are done


def run_tune(
    journal: Journal,
    length: Callable[[dict[str, Any]], float],
    steady: Callable[[Any, Any, int], float],
    trials: int,
    workers: int,
) -> None:
    """As many trials at once as there are workers, each in a process of its own, which stays.

    Args:
        journal: gets the case.
        length: seconds that a candidate takes.
        steady: share of the workers' time in evaluations, see the benchmark.
        trials: to begin, as far as the time allows.
        workers: processes.
    """
    import ray
    from ray import tune

    ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False)

    def trial(config: dict[str, Any]) -> dict[str, float]:
        kind = [config[f"k{i}"] for i in range(16)]
        started = time.time()
        time.sleep(seconds := length({"kind": kind, "x": config["x"], "n": config["n"]}))
        return {"value": seconds, "started": started, "finished": time.time()}

    parameters: dict[str, Any] = {f"k{i}": tune.choice(list(range(8))) for i in range(16)}
    parameters |= {"x": tune.uniform(0, 1), "n": tune.randint(0, 100)}
    try:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space=parameters,
            tune_config=tune.TuneConfig(
                metric="value",
                mode="min",
                num_samples=trials,
                max_concurrent_trials=workers,
                reuse_actors=True,
                time_budget_s=LIMIT_S,
            ),
            run_config=tune.RunConfig(verbose=0, storage_path=tempfile.mkdtemp()),
        )
        began = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            results = tuner.fit()
        seconds = time.perf_counter() - began
    finally:
        ray.shutdown()
    figures = [result.metrics or {} for result in results]
    done = [figure for figure in figures if "finished" in figure]
    columns = ("value", "started", "finished")
    slept, started, finished = (np.array([figure[name] for figure in done]) for name in columns)
    wall = float(finished.max() - started.min())
    journal.case(
        "ray tune, uniform times",
        {
            "workers": workers,
            "trials": len(done),
            "seconds": round(wall, 2),
            "share_of_ideal": round(float(slept.sum()) / workers / wall, 4),
            "steady": round(steady(started, finished, workers), 4),
            "evaluations_per_s": round(len(done) / wall, 2),
            "seconds_with_the_start": round(seconds, 2),
        },
    )
