"""Records as a table: for CSV and Parquet files, and as a data frame."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from searchlab.errors import ConfigError, SpaceError, StudyError
from searchlab.records import RECORD_STATES, VOID, Records

if TYPE_CHECKING:
    import pandas as pd

    from searchlab.evaluator import Objective
    from searchlab.population import Population
    from searchlab.space import Space

__all__ = ["decoded", "replace_file", "to_pandas", "write_csv", "write_parquet"]

Columns = dict[str, Any]


def table_of(
    records: Records,
    space: Space | Sequence[Space] | None,
    objectives: Sequence[Objective] | None,
) -> Columns:
    """Columns by name; see `Recorder.to_pandas`.

    Numbers are arrays with NaN where there is none; decoded candidates are lists with None where
    a record has no such variable.

    Raises:
        StudyError: more objectives in the records than names, or no space.
        SpaceError: stored candidates are not of the given space.
    """
    m = records.values.shape[1]
    names = [f"value_{i}" for i in range(m)] if objectives is None else [o.name for o in objectives]
    if m > len(names):
        raise StudyError(f"{len(names)} objectives; allowed: {m}, as many as values")
    columns: Columns = {
        "id": records.ids,
        "stage": records.stage,
        "state": [RECORD_STATES[state] for state in records.state.tolist()],
        "reason": records.reason,
        "key": [key.hex() if key else "" for key in records.keys],
        "fidelity": records.fidelity,
        "replicate": records.replicate,
    }
    for index, name in enumerate(names[:m]):
        columns[name] = records.values[:, index]
    if records.widths[:, 1].any():
        for index, name in enumerate(names[:m]):
            columns[f"{name}_std_error"] = records.std_error[:, index]
    for name, part in (("constraint", records.constraints), ("signal", records.signals)):
        for index in range(part.shape[1]):
            columns[f"{name}_{index}"] = part[:, index]
    columns |= {
        "cost_s": records.cost_s,
        "cached": records.cached,
        "told_at_ask": records.told_at_ask,
        "predicted_mean": records.predicted_mean,
        "predicted_sd": records.predicted_sd,
        "origin": records.origin,
        "parent_a": records.parents[:, 0],
        "parent_b": records.parents[:, 1],
        "attempts": records.attempts,
        "worker": records.worker,
        "started": records.started,
        "finished": records.finished,
    }
    if space is not None:
        for name, cells in _candidates(records, space).items():
            # A variable may bear the name of a column.
            columns[f"variable.{name}" if name in columns else name] = cells
    return columns


def to_pandas(
    records: Records,
    space: Space | Sequence[Space] | None,
    objectives: Sequence[Objective] | None,
) -> pd.DataFrame:
    """The table as a data frame; see `Recorder.to_pandas`."""
    import pandas as pd

    return pd.DataFrame(table_of(records, space, objectives))


def write_csv(
    path: Path,
    records: Records,
    space: Space | Sequence[Space] | None,
    objectives: Sequence[Objective] | None,
) -> None:
    """One line per record; see `Recorder.export_csv`.

    Without a space, packed candidates are written as hex digits.

    Raises:
        StudyError: more objectives in the records than names, no space, or a target that
            cannot be written.
        SpaceError: stored candidates are not of the given space.
    """
    table = table_of(records, space, objectives)
    if space is None:
        table["genotype"] = [raw.hex() for raw in records.genotypes]
    columns = {name: _cells(column) for name, column in table.items()}

    def write(file: IO[bytes]) -> None:
        import io

        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(list(columns))
        writer.writerows(zip(*columns.values(), strict=True))
        text.flush()
        text.detach()

    replace_file(path, write)


def write_parquet(
    path: Path,
    records: Records,
    space: Space | Sequence[Space],
    objectives: Sequence[Objective],
) -> None:
    """The table as a Parquet file.

    A column has one type there: lists, and values of several types, are kept as JSON text.

    Raises:
        ConfigError: no package that writes Parquet is installed.
        StudyError, SpaceError: see `write_csv`.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            "Parquet needs the package 'pyarrow', which is not installed; "
            'pip install "searchlab[parquet]", or use --csv'
        )
    import pandas as pd

    columns = table_of(records, space, objectives)
    frame = pd.DataFrame({name: _one_type(column) for name, column in columns.items()})
    replace_file(path, lambda file: frame.to_parquet(file, index=False, engine="pyarrow"))


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
            out.setdefault(name, [None] * len(records))
        rows = np.flatnonzero(real & (records.stage == stage)).tolist()
        _, plans = decoded(own, [records.genotypes[row] for row in rows])
        for row, plan in zip(rows, plans, strict=True):
            for name, value in plan.items():
                plain = isinstance(value, np.ndarray | np.generic)
                out[name][row] = value.tolist() if plain else value
    return out


def decoded(space: Space, genotypes: Sequence[bytes]) -> tuple[Population, list[dict[str, Any]]]:
    """Stored candidates and their values.

    Raises:
        SpaceError: they are not of this space.
    """
    try:
        population = space.unpack(genotypes) if len(genotypes) else space.empty()
        return population, space.decode(population)
    except (IndexError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, SpaceError):
            raise
        raise SpaceError(f"stored candidates are not of this space ({error})") from None


def _cells(column: Any) -> list[Any]:
    """Cells of a CSV file: numbers that read back exactly, lists as JSON, nothing for NaN."""
    if isinstance(column, np.ndarray):
        if column.dtype.kind == "f":
            return ["" if value != value else repr(value) for value in column.tolist()]
        return list((column.astype(int) if column.dtype.kind == "b" else column).tolist())
    return [
        "" if value is None else _json(value) if isinstance(value, list | tuple | dict) else value
        for value in column
    ]


def _one_type(column: Any) -> Any:
    if isinstance(column, np.ndarray):
        return column
    kinds = {type(value) for value in column if value is not None}
    # A whole number beyond 64 bits has no type there.
    small = all(abs(value) < 2**63 for value in column if type(value) is int)
    if len(kinds) <= 1 and kinds <= {bool, int, float, str} and small:
        return column
    return [None if value is None else _json(value) for value in column]


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a whole file or nothing.

    Raises:
        StudyError: the target cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, as a rename is atomic within one file system only.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(handle, "wb") as file:
            write(file)
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
