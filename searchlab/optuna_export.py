"""A run's records as Optuna studies in a journal file, for Optuna's own tools and its dashboard."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from searchlab._study_table import decoded, replace_file
from searchlab.errors import StudyError
from searchlab.evaluator import REPORT_REPLICATE, SELECTION_REPLICATE
from searchlab.population import OK, PRUNED
from searchlab.records import RECORD_STATES, VOID, Records
from searchlab.variables import Choice, Integer, Variable

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from searchlab._run_layout import Layout, StageLayout
    from searchlab.space import Space

__all__ = ["write_optuna"]

Distributions = dict[str, "BaseDistribution"]
_PLAIN = (type(None), bool, int, float, str)


def write_optuna(path: Path, name: str, records: Records, layout: Layout) -> list[str]:
    """Writes all records into a journal file; the file appears whole or not at all.

    A study holds values that can be compared. The search at the true fidelity is the study NAME;
    other stages and fidelities are NAME/STAGE, and the final's splits NAME/selection and
    NAME/report, with one trial per candidate and replicate. A variable with a shape is one
    parameter per element, `x[0]`, `x[1,2]`; elements that are not active are left out. What a
    record has beyond values and parameters is in the trial's user attributes.

    Args:
        path: target; replaced if it exists.
        name: of the study.
        records: of the run.
        layout: what their columns mean.

    Returns:
        The names of the studies.

    Raises:
        StudyError: the target cannot be written, or records do not fit their layout.
        SpaceError: stored candidates are not of the layout's space.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
    from optuna.study import StudyDirection

    directed = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}

    class Lines(BaseJournalBackend):
        """Keeps the journal in memory: a file would wait for the disk at every trial."""

        def __init__(self) -> None:
            self.logs: list[dict[str, Any]] = []

        def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
            return iter(self.logs[log_number_from:])

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            # Through JSON, as a file would give them back.
            self.logs += [json.loads(json.dumps(log)) for log in logs]

    lines = Lines()
    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # metric names are an experimental method there
            storage = JournalStorage(lines)
            for title, stage, rows in _parts(name, records, layout):
                directions = [directed[o.direction] for o in stage.objectives]
                study = optuna.create_study(
                    storage=storage, study_name=title, directions=directions
                )
                study.set_metric_names([objective.name for objective in stage.objectives])
                study.add_trials(_trials(records.take(rows), stage))
                names.append(title)
    finally:
        optuna.logging.set_verbosity(loud)

    with tempfile.TemporaryDirectory(prefix="searchlab-optuna-") as folder:
        journal = Path(folder) / "journal"
        JournalFileBackend(str(journal)).append_logs(lines.logs)
        with open(journal, "rb") as whole:
            replace_file(path, lambda file: shutil.copyfileobj(whole, file))
    return names


def _parts(
    name: str, records: Records, layout: Layout
) -> Iterator[tuple[str, StageLayout, list[int]]]:
    """(study, stage, rows) of everything that can be compared; the search itself comes first."""
    last = layout.stages[-1]
    truth = len(last.fidelities) - 1
    parts: dict[str, tuple[StageLayout, list[int]]] = {name: (last, [])}
    for row in np.flatnonzero(records.state != VOID).tolist():
        stage = layout.of(int(records.stage[row]))
        replicate, fidelity = int(records.replicate[row]), int(records.fidelity[row])
        if replicate >= REPORT_REPLICATE:
            title = f"{name}/report"
        elif replicate >= SELECTION_REPLICATE:
            title = f"{name}/selection"
        elif stage.digest == last.digest and fidelity in (truth, -1):
            title = name
        else:
            names = stage.fidelities
            title = f"{name}/{stage.name}"
            if 0 <= fidelity < len(names) - 1:
                title += f" ({names[fidelity]})"
        parts.setdefault(title, (stage, []))[1].append(row)
    for title, (stage, rows) in parts.items():
        yield title, stage, rows


def _trials(records: Records, stage: StageLayout) -> Iterator[FrozenTrial]:
    from optuna.trial import TrialState, create_trial

    m = len(stage.objectives)
    if records.widths[:, 0].max(initial=0) > m:
        raise StudyError(
            f"records of stage {stage.name!r} have {int(records.widths[:, 0].max())} values; "
            f"allowed: {m}"
        )
    codec = _Codec(stage.space)
    population, plans = decoded(stage.space, records.genotypes)
    active = stage.space.active(population)
    for row, plan in enumerate(plans):
        params, distributions, other = codec.parameters(
            plan, {key: mask[row] for key, mask in active.items()}
        )
        values = records.values[row, :m].tolist()
        state = int(records.state[row])
        usable = int(records.widths[row, 0]) == m and all(map(math.isfinite, values))
        kind = TrialState.FAIL
        if state == OK and usable:
            kind = TrialState.COMPLETE
        elif state == PRUNED:
            kind = TrialState.PRUNED
        try:
            trial = create_trial(
                state=kind,
                values=values if kind == TrialState.COMPLETE else None,
                params=params,
                distributions=distributions,
                user_attrs={**_attributes(records, row, stage, values), **other},
                system_attrs=_constraints(records, row, stage),
            )
        except (TypeError, ValueError) as error:
            raise StudyError(f"record {records.ids[row]} has no trial: {error}") from None
        trial.datetime_start = _time(records.started[row])
        trial.datetime_complete = _time(records.finished[row])
        yield trial


class _Codec:
    """Parameters and distributions of one space's candidates."""

    def __init__(self, space: Space) -> None:
        from optuna.distributions import CategoricalDistribution

        self._space = space
        self._elements: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        self._distributions: dict[str, Any] = {}
        self._texts: set[str] = set()
        for key, variable in space.variables.items():
            indices = list(np.ndindex(*variable.shape)) if variable.shape else [()]
            self._elements[key] = [
                (f"{key}[{','.join(map(str, index))}]" if index else key, index)
                for index in indices
            ]
            if isinstance(variable, Choice):
                labels = variable.labels
                if not all(isinstance(label, _PLAIN) for label in labels):
                    self._texts.add(key)
                    labels = tuple(json.dumps(label) for label in labels)
                self._distributions[key] = CategoricalDistribution(labels)
            else:
                self._distributions[key] = _numeric(variable)

    def parameters(
        self, plan: dict[str, Any], active: dict[str, Any]
    ) -> tuple[dict[str, Any], Distributions, dict[str, Any]]:
        """Parameters, their distributions, and what no distribution can express."""
        params: dict[str, Any] = {}
        distributions: Distributions = {}
        other: dict[str, Any] = {}
        for key, value in plan.items():
            distribution = self._distributions[key]
            if distribution is None:
                other[key] = value
                continue
            for name, index in self._elements[key]:
                if not active[key][index]:
                    continue
                part = value
                for place in index:
                    part = part[place]
                params[name] = json.dumps(part) if key in self._texts else part
                distributions[name] = distribution
        return params, distributions, other


def _numeric(variable: Variable) -> BaseDistribution | None:
    """The range of a variable of numbers; None for one that has no range of its own."""
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high = getattr(variable, "low", None), getattr(variable, "high", None)
    if low is None or high is None:
        return None
    if isinstance(variable, Integer):
        return IntDistribution(int(low), int(high), log=_log(variable))
    # Steps are left out: a grid's last point may lie beside high by a rounding error.
    return FloatDistribution(float(low), float(high), log=_log(variable))


def _log(variable: Variable) -> bool:
    return bool(getattr(variable, "log", False))


def _attributes(
    records: Records, row: int, stage: StageLayout, values: list[float]
) -> dict[str, Any]:
    key = records.keys[row]
    out: dict[str, Any] = {
        "id": int(records.ids[row]),
        "state": RECORD_STATES[int(records.state[row])],
        "stage": stage.name,
        "origin": records.origin[row],
        "replicate": int(records.replicate[row]),
        "key": key.hex() if key else "",
        "cached": bool(records.cached[row]),
        "cost_s": _number(records.cost_s[row]),
        "worker": records.worker[row],
    }
    if records.reason[row]:
        out["reason"] = records.reason[row]
    if records.state[row] == PRUNED:
        out["bound"] = [_number(value) for value in values]
    parents = [int(parent) for parent in records.parents[row] if parent >= 0]
    if parents:
        out["parents"] = parents
    for index, value in enumerate(records.std_error[row, : len(stage.objectives)].tolist()):
        if math.isfinite(value):
            out[f"std_error of {stage.objectives[index].name}"] = value
    for index in range(int(records.widths[row, 3])):
        name = stage.signals[index] if index < len(stage.signals) else f"signal_{index}"
        out[name] = _number(records.signals[row, index])
    return out


def _constraints(records: Records, row: int, stage: StageLayout) -> dict[str, Any]:
    """Violations in Optuna's sense: more than zero is not allowed."""
    width = int(records.widths[row, 2])
    if not width:
        return {}
    column = records.constraints[row, :width].tolist()
    if stage.bounds:
        pairs = zip(stage.bounds, column, strict=False)
        column = [bound.violation(value) for bound, value in pairs]
    if not all(map(math.isfinite, column)):
        return {}
    return {"constraints": column}


def _time(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(float(seconds), UTC)
    except (ValueError, OverflowError, OSError):  # NaN, or a year that no calendar has
        return datetime.fromtimestamp(0.0, UTC)


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
