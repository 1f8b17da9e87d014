"""Reads a table of candidates and makes the space whose candidates are its rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.constraints import Predicate
from searchlab.errors import ConfigError, DataError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.variables import Choice, Integer, Variable

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "KINDS",
    "Kind",
    "TableSpace",
    "file_digest",
    "make_space",
    "numbers",
    "published_folder",
    "read_table",
]

Kind = Literal["auto", "choice", "integer", "digits"]
KINDS = ("auto", "choice", "integer", "digits")
MOST_GAPS = 200  # candidates of the product for one row; sparser tables cannot be sampled
_SUFFIXES = (".csv", ".csv.gz", ".parquet")


def published_folder(
    folder: str | Path | None, name: str, title: str, files: Sequence[str]
) -> Path:
    """The folder of a published data set: the given one, or `name` in $SEARCHLAB_DATA.

    Raises:
        ConfigError: neither is set, or one of the files is not there.
    """
    if folder is None:
        base = os.environ.get("SEARCHLAB_DATA")
        if not base:
            raise ConfigError(
                f"no folder of {title}; allowed: a path, or SEARCHLAB_DATA in the environment"
            )
        folder = Path(base) / name
    for file in files:
        if not (Path(folder) / file).is_file():
            raise ConfigError(f"folder {str(folder)!r} of {title}; allowed: one with {file}")
    return Path(folder)


def file_digest(path: Path) -> str:
    """Hash of a file's bytes. Raises DataError where it cannot be read."""
    digest = blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    except OSError as error:
        raise DataError(f"table {str(path)!r}: {error.strerror or error}") from None
    return digest.hexdigest()


def read_table(path: Path, texts: Sequence[str], needed: Sequence[str]) -> pd.DataFrame:
    """A table with the columns that are needed.

    Args:
        path: a .csv, .csv.gz or .parquet file.
        texts: columns that are read as text (leading zeros count).
        needed: all columns that are used.

    Raises:
        ConfigError: another kind of file, or no pyarrow for Parquet.
        DataError: not a table, empty, or without one of the columns.
    """
    import pandas as pd

    name = path.name.lower()
    if not name.endswith(_SUFFIXES):
        raise ConfigError(f"table {str(path)!r}; allowed: {', '.join(_SUFFIXES)}")
    try:
        if name.endswith(".parquet"):
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, dtype=dict.fromkeys(texts, str))
    except ImportError:
        raise ConfigError(
            f"table {str(path)!r} needs pyarrow; allowed: pip install 'searchlab[parquet]'"
        ) from None
    except Exception as error:  # whatever a reader makes of a broken file
        line = " ".join(str(error).split())[:200]
        raise DataError(f"table {str(path)!r} cannot be read: {line}") from None
    for column in needed:
        if column not in frame.columns:
            known = ", ".join(map(str, frame.columns[:40]))
            raise DataError(f"table {str(path)!r} has no column {column!r}; it has: {known}")
    if not len(frame):
        raise DataError(f"table {str(path)!r} has no rows")
    return frame


def numbers(frame: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """A column as float64, NaN where a cell is empty. Raises DataError for texts."""
    import pandas as pd

    try:
        return np.asarray(pd.to_numeric(frame[column]), dtype=np.float64)
    except (TypeError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise DataError(f"column {column!r} holds more than numbers: {line}") from None


def _column(frame: pd.DataFrame, name: str, kind: Kind) -> tuple[Variable, NDArray[Any]]:
    """The variable of a column, and every row's value as the variable stores it."""
    cells = frame[name]
    empty = np.flatnonzero(cells.isna().to_numpy())
    if len(empty):
        raise DataError(f"column {name!r} is empty in row {int(empty[0])}; allowed: a value each")
    if kind == "digits":
        texts = cells.astype(str).tolist()
        length = len(texts[0])
        for row, text in enumerate(texts):
            if len(text) != length or not length:
                raise DataError(
                    f"column {name!r} holds {text!r} in row {row}; allowed: {length} signs each, "
                    f"as in {texts[0]!r}"
                )
        signs = np.array([list(text) for text in texts])
        labels, codes = np.unique(signs, return_inverse=True)
        digits = Choice(tuple(str(label) for label in labels), shape=(length,))
        return digits, codes.reshape(signs.shape).astype(digits.dtype)
    plain = cells.tolist()
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in plain)
    distinct = sorted(set(plain)) if whole else []
    if kind == "integer" and not whole:
        raise DataError(f"column {name!r} holds {plain[0]!r}; allowed for integers: whole numbers")
    dense = whole and len(distinct) == distinct[-1] - distinct[0] + 1 and len(distinct) > 1
    if kind == "integer" or (kind == "auto" and dense):
        steps = np.diff(distinct)
        step = int(np.gcd.reduce(steps)) if len(steps) else 1
        variable = Integer(distinct[0], distinct[-1], step=step)
        return variable, np.array(plain).astype(variable.dtype)
    try:
        values = sorted(set(plain))
    except TypeError:
        values = sorted(set(plain), key=lambda value: (type(value).__name__, str(value)))
    place = {label: code for code, label in enumerate(values)}
    choice = Choice(tuple(values))
    return choice, np.array([place[value] for value in plain]).astype(choice.dtype)


class _Rows:
    """The predicate of a table that lacks candidates: only what is a row is allowed."""

    def __init__(self, variables: Mapping[str, Variable], rows: Population) -> None:
        self._plain = Space(variables)
        self._packed = frozenset(self._plain.pack(rows))

    def __call__(self, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
        population = Population({key: columns[key] for key in self._plain.variables})
        return np.array([row in self._packed for row in self._plain.pack(population)], dtype=bool)


class TableSpace(Space):
    """The space of a table's columns; rows of one class are one candidate, the first of them.

    Args:
        variables: see `Space`.
        constraints: see `Space`.
        same: packed row -> packed row of its class' first member, where they differ.
    """

    def __init__(
        self,
        variables: Mapping[str, Variable],
        *,
        constraints: Sequence[Predicate] = (),
        same: Mapping[bytes, bytes] | None = None,
        name: str = "table",
    ) -> None:
        super().__init__(variables, constraints=constraints, name=name)
        self._same = dict(same or {})

    def canonicalise(self, population: Population) -> Population:
        """See `Space.canonicalise`; every candidate becomes the first of its class."""
        population = super().canonicalise(population)
        if not self._same or not len(population):
            return population
        packed = self.pack(population)
        if not any(row in self._same for row in packed):
            return population
        return self.unpack([self._same.get(row, row) for row in packed])

    def to_json(self) -> dict[str, Any]:
        """See `Space.to_json`; the classes are named by their hash only."""
        if not self._same:
            return super().to_json()
        digest = blake2b(digest_size=16)
        for row in sorted(self._same):
            digest.update(row + self._same[row])
        return {**super().to_json(), "classes": digest.hexdigest()}


def make_space(
    frame: pd.DataFrame,
    variables: Mapping[str, Kind],
    *,
    restrict: bool,
    classes: str | None,
    digest: str,
) -> tuple[Space, Population]:
    """The space of a table, and all its rows as candidates of it (not canonical).

    Args:
        frame: the table.
        variables: column -> kind.
        restrict: allow candidates that are rows only.
        classes: column whose equal values are one candidate; None = there is none.
        digest: hash of the table, which names the predicate.

    Raises:
        ConfigError: an unknown kind, or a table too sparse to be sampled.
        DataError: columns that cannot be read as wanted.
    """
    made: dict[str, Variable] = {}
    columns: dict[str, NDArray[Any]] = {}
    for name, kind in variables.items():
        if kind not in KINDS:
            raise ConfigError(f"kind {kind!r} of column {name!r}; allowed: {', '.join(KINDS)}")
        made[name], columns[name] = _column(frame, name, kind)
    rows = Population(columns)
    plain = Space(made)
    packed = plain.pack(rows)
    product = plain.count() or 0
    constraints = []
    if restrict and len(set(packed)) < product:
        if product > MOST_GAPS * len(packed):
            raise ConfigError(
                f"a table of {len(packed)} rows for {product} candidates; allowed: at most "
                f"{MOST_GAPS} for each row, missing='fail', or one column of names"
            )
        constraints = [Predicate(_Rows(made, rows), f"rows of the table {digest}")]
    same: dict[bytes, bytes] = {}
    if classes is not None:
        first: dict[Any, bytes] = {}
        for row, value in zip(packed, frame[classes].tolist(), strict=True):
            leader = first.setdefault(value, row)
            if leader != row:
                same[row] = leader
    return TableSpace(made, constraints=constraints, same=same), rows
