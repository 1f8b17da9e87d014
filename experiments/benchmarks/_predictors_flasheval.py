"""Predictors on FlashEval's table: 78 settings of text-to-image models, few of them labelled."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.evaluators.flasheval import CONFIGS, METRICS, VARIABLES, FlashEval
from searchlab.experiments.benchmarks._common import Aim, Journal, data_folder, spread
from searchlab.experiments.benchmarks._predictors_cells import bare, fitted, kendall
from searchlab.predictor import Table, table_of

__all__ = ["run"]

Floats = NDArray[np.float64]

PILOT = 30  # prompts that the other metrics are known on
_SIGNALS = "stack with other metrics on 30 prompts"
_MORE = "stack with these and the other dataset"


def _settings(metric: Any, *, elsewhere: bool) -> tuple[Table, Floats]:
    """All settings with signals, and their losses.

    Signals are the cost and the other metrics on a few prompts, and the metric's mean on the other
    dataset if asked for.
    """
    evaluator = FlashEval(metric=metric, pilot=PILOT, elsewhere=elsewhere)
    with open(evaluator.path.parent / CONFIGS, newline="") as file:
        known = {int(row["config_id"]): row for row in csv.DictReader(file)}
    variables = evaluator.space.variables
    rows = []
    for config in evaluator.config_ids.tolist():
        labels = {name: known[config][name] for name in VARIABLES}
        choices = {name: {str(c): c for c in _choices(variables[name])} for name in VARIABLES}
        rows.append({name: choices[name][text] for name, text in labels.items()})
    population = evaluator.space.population(rows)
    signals = evaluator.static_signals(population)
    table = table_of(evaluator.space, population, signals=signals, of=evaluator.signals)
    return table, -evaluator.truth()


def _choices(variable: Any) -> tuple[Any, ...]:
    return tuple(variable.labels)


def _baselines(table: Table, losses: Floats, rows: NDArray[np.int64], seed: int) -> dict[str, Any]:
    """Scores of all settings by ridge regression and a forest of scikit-learn.

    They read the codes, and the log of the number of steps beside them.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.linear_model import Ridge

    x = np.column_stack([table.x.astype(np.float64), _log_steps(table)])
    models = {
        "scikit-learn ridge": Ridge(),
        "scikit-learn forest": RandomForestRegressor(200, random_state=seed),
    }
    return {name: m.fit(x[rows], losses[rows]).predict(x) for name, m in models.items()}


def _log_steps(table: Table) -> Floats:
    """Log of the number of steps of each candidate, (n,)."""
    start = 0
    for name, variable in table.space.variables.items():
        if name == "steps":
            codes = table.x[:, start : start + variable.code_width].astype(np.float64)
            values = np.log(np.array([float(label) for label in _choices(variable)]))
            out: Floats = codes @ values
            return out
        start += variable.code_width
    raise AssertionError("settings have steps")


def run(journal: Journal, quick: bool) -> None:
    """Tau of the settings without a label, mean of the four metrics."""
    if data_folder("flasheval") is None:
        journal.skip("flasheval", "no flasheval below $SEARCHLAB_DATA")
        return
    seeds = range(2 if quick else 10)
    tables = [
        [_settings(metric, elsewhere=elsewhere) for elsewhere in (False, True)]
        for metric in METRICS
    ]
    for n in (10, 20):
        taus: dict[str, list[float]] = {}
        for (table, losses), (wide, _) in tables:
            found: dict[str, list[float]] = {}
            for seed in seeds:
                order = np.random.default_rng(seed).permutation(len(table))
                rows, test = order[:n], order[n:]
                scores = _baselines(table, losses, rows, seed)
                for name, shown in (("stack", bare(table)), (_SIGNALS, table), (_MORE, wide)):
                    scores[name] = fitted("stack", shown, losses, rows, seed, shown).rank(shown)
                for name, said in scores.items():
                    found.setdefault(name, []).append(kendall(said[test], losses[test]))
            for name, values in found.items():
                taus.setdefault(name, []).append(float(np.mean(values)))
        means = {name: float(np.mean(values)) for name, values in taus.items()}
        best = max(means["scikit-learn ridge"], means["scikit-learn forest"])
        journal.case(
            f"FlashEval, {n} labels",
            {"metrics": METRICS, "labels": n, "tau": {k: spread(v) for k, v in taus.items()}},
            seeds=seeds,
            aims=[
                Aim("lead", means["stack"] - best, "at least", 0.03),
                Aim("lead with other metrics", means[_SIGNALS] - best, "at least", 0.15, False),
                Aim("lead with all signals", means[_MORE] - best, "at least", 0.15),
            ],
        )
