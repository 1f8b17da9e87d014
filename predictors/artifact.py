"""Predictors on disk: a folder of predictor.json and weights.safetensors, read with care."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from searchlab.config import PREDICTORS, resolve
from searchlab.errors import ConfigError, DataError
from searchlab.predictor import Predictor
from searchlab.space import Space

__all__ = ["FORMAT", "Artifact", "load_predictor", "read_artifact", "write_artifact"]

FORMAT = 1
SETTINGS = "predictor.json"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Artifact:
    """A predictor's folder in memory.

    Attributes:
        predictor: its name in the registry.
        fingerprint: of the space it learnt from.
        state: JSON of the predictor's own.
        arrays: its arrays by name.
        with_data: whether the candidates it learnt from are in it.
    """

    predictor: str
    fingerprint: str
    state: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    with_data: bool


def write_artifact(
    folder: Path,
    *,
    predictor: str,
    space: Space,
    state: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    with_data: bool = False,
) -> None:
    """Writes both files; predictor.json comes last and holds the other one's hash.

    Raises:
        DataError: the folder cannot be written to.
    """
    blob = save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    text = json.dumps(
        {
            "format": FORMAT,
            "predictor": predictor,
            "space": {"fingerprint": space.fingerprint, "name": space.name},
            "with_data": with_data,
            "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(blob).hexdigest()},
            "state": state,
        },
        indent=1,
        allow_nan=False,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(blob)
        (folder / SETTINGS).write_text(text + "\n", "utf-8")
    except OSError as error:
        raise DataError(f"cannot write predictor to {str(folder)!r}: {error}") from error


def read_artifact(folder: Path, space: Space | None = None) -> Artifact:
    """Reads and checks a predictor's folder.

    Args:
        folder: holds predictor.json and the weights.
        space: what it has to be of; None = any.

    Raises:
        DataError: a missing or broken file, weights with another hash, a newer format, or a
            predictor of another space.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    except OSError as error:
        raise DataError(f"no predictor in {str(folder)!r}: {SETTINGS} is missing") from error
    except ValueError as error:
        raise DataError(f"{SETTINGS} in {str(folder)!r} is not JSON: {error}") from error
    version = settings.get("format") if isinstance(settings, dict) else None
    if not isinstance(version, int):
        raise DataError(f"{SETTINGS} in {str(folder)!r} has no format number; allowed: {FORMAT}")
    if version > FORMAT or version < 1:
        raise DataError(
            f"predictor in {str(folder)!r} has format {version}; allowed: 1 to {FORMAT}"
            ", or a newer searchlab"
        )
    try:
        name, sha = settings["predictor"], settings["weights"]["sha256"]
        fingerprint, label = settings["space"]["fingerprint"], settings["space"]["name"]
        state, with_data = dict(settings["state"]), bool(settings["with_data"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{SETTINGS} in {str(folder)!r} lacks {error}") from error
    if space is not None and fingerprint != space.fingerprint:
        raise DataError(
            f"predictor in {str(folder)!r} is of space {label!r} ({str(fingerprint)[:8]}); "
            f"allowed: {space.name!r} ({space.fingerprint[:8]})"
        )
    try:
        blob = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise DataError(f"predictor in {str(folder)!r}: {WEIGHTS} is missing") from error
    if hashlib.sha256(blob).hexdigest() != sha:
        raise DataError(
            f"{WEIGHTS} in {str(folder)!r} has another hash than {SETTINGS} says; "
            "allowed: the files that were saved together"
        )
    try:
        arrays = load_arrays(blob)
    except SafetensorError as error:
        raise DataError(f"{WEIGHTS} in {str(folder)!r} is broken: {error}") from error
    return Artifact(str(name), str(fingerprint), state, arrays, with_data)


def load_predictor(folder: str | Path, space: Space) -> Predictor:
    """The predictor in a folder, whichever it is.

    Raises:
        DataError: see `read_artifact`; or a predictor that is not known here.
    """
    artifact = read_artifact(Path(folder), space)
    try:
        kind = resolve(PREDICTORS, artifact.predictor, "predictor")
    except ConfigError as error:
        raise DataError(f"predictor in {str(folder)!r}: {error}") from error
    predictor: Predictor = kind.load(Path(folder), space)
    return predictor
