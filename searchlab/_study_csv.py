"""Records as a table in a CSV file."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import StudyError
from searchlab.records import RECORD_STATES, VOID, Records

if TYPE_CHECKING:
    from searchlab.evaluator import Objective
    from searchlab.space import Space

__all__ = ["write_csv"]


def write_csv(
    path: Path,
    records: Records,
    space: Space | Sequence[Space],
    objectives: Sequence[Objective],
) -> None:
    """One line per record; see `Run.export_csv`.

    Raises:
        StudyError: more objectives in the records than names, no space, or a target that
            cannot be written.
        SpaceError: stored candidates are not of the given space.
    """
    m = records.values.shape[1]
    if m > len(objectives):
        raise StudyError(f"{len(objectives)} objectives; allowed: {m}, as many as values")
    columns: dict[str, list[Any]] = {
        "id": records.ids.tolist(),
        "stage": records.stage.tolist(),
        "state": [RECORD_STATES[state] for state in records.state.tolist()],
        "reason": records.reason,
        "key": [key.hex() if key else "" for key in records.keys],
        "fidelity": records.fidelity.tolist(),
        "replicate": records.replicate.tolist(),
    }
    for index, objective in enumerate(objectives[:m]):
        columns[objective.name] = _cells(records.values[:, index])
    if records.widths[:, 1].any():
        for index, objective in enumerate(objectives[:m]):
            columns[f"{objective.name}_std_error"] = _cells(records.std_error[:, index])
    for name, part in (("constraint", records.constraints), ("signal", records.signals)):
        for index in range(part.shape[1]):
            columns[f"{name}_{index}"] = _cells(part[:, index])
    columns |= {
        "cost_s": _cells(records.cost_s),
        "cached": records.cached.astype(int).tolist(),
        "told_at_ask": records.told_at_ask.tolist(),
        "predicted_mean": _cells(records.predicted_mean),
        "predicted_sd": _cells(records.predicted_sd),
        "origin": records.origin,
        "parent_a": records.parents[:, 0].tolist(),
        "parent_b": records.parents[:, 1].tolist(),
        "attempts": records.attempts.tolist(),
        "worker": records.worker,
        "started": _cells(records.started),
        "finished": _cells(records.finished),
    }
    for name, cells in _candidates(records, space).items():
        # A variable may bear the name of a column.
        columns[f"variable.{name}" if name in columns else name] = cells
    _replace(path, list(columns), list(columns.values()))


def _candidates(records: Records, space: Space | Sequence[Space]) -> dict[str, list[Any]]:
    real = records.state != VOID
    stages = np.unique(records.stage[real]).tolist()
    if isinstance(space, Sequence):
        if not space:
            raise StudyError("no spaces; allowed: one per stage")
        of_stage = {stage: space[min(stage, len(space) - 1)] for stage in stages}
    else:
        of_stage = dict.fromkeys(stages, space)
    out: dict[str, list[Any]] = {}
    for stage, own in of_stage.items():
        for name in own.variables:
            out.setdefault(name, [""] * len(records))
        rows = np.flatnonzero(real & (records.stage == stage)).tolist()
        plans = own.decode(own.unpack([records.genotypes[row] for row in rows]))
        for row, plan in zip(rows, plans, strict=True):
            for name, value in plan.items():
                plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
                nested = isinstance(plain, list | tuple | dict)
                out[name][row] = json.dumps(plain) if nested else plain
    return out


def _cells(column: NDArray[np.float64]) -> list[Any]:
    """Numbers that read back exactly; empty cells for NaN."""
    return ["" if value != value else repr(value) for value in column.tolist()]


def _replace(path: Path, names: list[str], columns: list[list[Any]]) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, as a rename is atomic within one file system only.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(handle, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(zip(*columns, strict=True))
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise StudyError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            os.unlink(temporary)
