"""Predictors on FlashEval's table: 78 settings of text-to-image models, few of them labelled."""

from __future__ import annotations

import csv
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.evaluators.flasheval import CONFIGS, METRICS, VARIABLES, FlashEval
from searchlab.experiments.benchmarks._common import Aim, Journal, data_folder, spread
from searchlab.experiments.benchmarks._predictors_cells import bare, fitted, kendall
from searchlab.predictor import Table, table_of
from searchlab.predictors.additive import Additive
from searchlab.predictors.gp import GaussianProcess
from searchlab.predictors.preprocess import Features, Inputs, Labels

__all__ = ["ceiling", "run"]

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


class _FixedAdditive(Additive):
    """With given numbers instead of fitted ones."""

    def __init__(self, log: Floats) -> None:
        super().__init__()
        self._given = log

    def _fitted(self, features: Features, targets: Floats, some: NDArray[np.int64]) -> Floats:
        return self._given


class _FixedProcess(GaussianProcess):
    """With given numbers instead of fitted ones."""

    def __init__(self, log: Floats) -> None:
        super().__init__()
        self._given = log

    def _fitted(self, features: Features, targets: Floats, some: NDArray[np.int64]) -> Floats:
        return self._given


def _hindsight(table: Table, losses: Floats) -> Table:
    """The table with one signal: the line in all of its own that is nearest to all losses."""
    from sklearn.linear_model import LinearRegression

    signals = Inputs(table)(table).signals
    line = LinearRegression().fit(signals, Labels(losses, "ranks").targets).predict(signals)
    return replace(table, signals=line[:, None], signal_names=("line",), directions=("min",))


class _Known:
    """`additive` and `gp`, joined evenly, whose numbers are those of a fit to all losses."""

    def __init__(self, table: Table, losses: Floats) -> None:
        self.inputs = Inputs(table)
        self.features, self.losses = self.inputs(table), losses
        targets = Labels(losses, "ranks").targets
        logs = []
        for member in (Additive(), GaussianProcess()):
            member._prepare(self.inputs, None)
            member._learn(self.features, targets, 0)
            logs.append(member._log)
        self.logs = logs

    def scores(self, rows: NDArray[np.int64]) -> Floats:
        """Of all settings, from the losses of some."""
        targets = Labels(self.losses[rows], "ranks").targets
        out = np.zeros(len(self.losses))
        for member in (_FixedAdditive(self.logs[0]), _FixedProcess(self.logs[1])):
            member._prepare(self.inputs, None)
            member._learn(self.features.take(rows), targets, 0)
            out += member._scores(self.features)[0] / 2
        return out

    def others_known(self) -> Floats:
        """Of each setting from the losses of all others."""
        targets = Labels(self.losses, "ranks").targets
        folds = [np.array([row]) for row in range(len(targets))]
        out = np.zeros(len(targets))
        for member in (_FixedAdditive(self.logs[0]), _FixedProcess(self.logs[1])):
            member._prepare(self.inputs, None)
            member._learn(self.features, targets, 0)
            out += member.left_out(self.features, targets, folds, 0) / 2
        return out


def ceiling(journal: Journal, quick: bool) -> None:
    """What the signals could bring at most: what no search knows is used, so these are bounds.

    The signals are replaced by the one line in them that is nearest to the losses of all settings;
    `stack` reads it, and so do `additive` and `gp` with numbers fitted to the losses of all
    settings. Beside it, each setting is told from the losses of all others.
    """
    if data_folder("flasheval") is None:
        journal.skip("ceiling", "no flasheval below $SEARCHLAB_DATA")
        return
    seeds = range(2 if quick else 10)
    taus: dict[int, dict[str, list[float]]] = {10: {}, 20: {}}
    others: dict[str, list[float]] = {}
    for metric in METRICS:
        shown = {}
        for name, elsewhere in (("other metrics", False), ("all signals", True)):
            table, losses = _settings(metric, elsewhere=elsewhere)
            known = _Known(table, losses)
            others.setdefault(name, []).append(kendall(known.others_known(), losses))
            line = _hindsight(table, losses)
            shown[name] = line, _Known(line, losses)
        others.setdefault("no signals", []).append(
            kendall(_Known(bare(table), losses).others_known(), losses)
        )
        for n, by_name in taus.items():
            found: dict[str, list[float]] = {}
            for seed in seeds:
                order = np.random.default_rng(seed).permutation(len(table))
                rows, test = order[:n], order[n:]
                scores = _baselines(table, losses, rows, seed)
                for name, (line, known) in shown.items():
                    best = fitted("stack", line, losses, rows, seed, line).rank(line)
                    scores[f"{name}, best line"] = best
                    scores[f"{name}, best line and numbers"] = known.scores(rows)
                    scores[f"{name}, best line alone"] = line.signals[:, 0]
                for name, said in scores.items():
                    found.setdefault(name, []).append(kendall(said[test], losses[test]))
            for name, values in found.items():
                by_name.setdefault(name, []).append(float(np.mean(values)))
    for n, by_name in taus.items():
        means = {name: float(np.mean(values)) for name, values in by_name.items()}
        base = max(mean for name, mean in means.items() if name.startswith("scikit-learn"))
        leads = {
            name: max(mean for case, mean in means.items() if case.startswith(name)) - base
            for name in ("other metrics", "all signals")
        }
        figures = {
            "labels": n,
            "tau": {name: spread(values) for name, values in by_name.items()},
            "highest lead": leads,
        }
        journal.case(f"FlashEval, ceiling, {n} labels", figures, seeds=seeds)
    journal.case(
        "FlashEval, ceiling, all other labels",
        {"tau": {name: spread(values) for name, values in others.items()}},
    )
