"""Predictors on disk: a folder of predictor.json and weights.safetensors, read with care.

predictor.json holds `format`, `searchlab` (the version that wrote it), `predictor` (its name),
`space` (fingerprint, name, kind, variables), `with_data`, `weights` (file and hash), `state` (of
the predictor's own), and `task` (see `PredictorTask`) where a search left it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from searchlab import __version__
from searchlab.config import PREDICTORS, resolve
from searchlab.errors import ConfigError, DataError, SpaceError
from searchlab.predictor import Predictor
from searchlab.predictor_folder import SETTINGS, WEIGHTS, PredictorTask, space_kind
from searchlab.space import Space, space_from_json

__all__ = [
    "FORMAT",
    "Artifact",
    "described_space",
    "kept_space",
    "load_predictor",
    "load_state",
    "read_artifact",
    "save_state",
    "write_artifact",
]

FORMAT = 1


@dataclass(frozen=True)
class Artifact:
    """A predictor's folder in memory.

    Attributes:
        predictor: its name in the registry.
        fingerprint: of the space it learnt from.
        state: JSON of the predictor's own.
        arrays: its arrays by name.
        with_data: whether the candidates it learnt from are in it.
        space_name: what that space is called.
        kind: of that space, see `space_kind`.
        variables: of that space, as JSON.
        task: what it learnt; None = no search left it.
        version: of the searchlab that wrote it.
    """

    predictor: str
    fingerprint: str
    state: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    with_data: bool
    space_name: str
    kind: str
    variables: dict[str, Any]
    task: PredictorTask | None
    version: str

    @cached_property
    def space(self) -> Space:
        """What it learnt from, see `kept_space`."""
        described = {"fingerprint": self.fingerprint, "name": self.space_name}
        return kept_space({**described, "variables": self.variables}, self.predictor)

    @cached_property
    def left_out(self) -> list[str]:
        """Members of a stack that are their data, which was not saved."""
        out: list[str] = []
        parts: list[Any] = [self.state]
        while parts:
            part = parts.pop()
            if isinstance(part, dict):
                out += part["left_out"] if isinstance(part.get("left_out"), list) else []
                parts += part.values()
        return sorted({str(name) for name in out})


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
            "searchlab": __version__,
            "predictor": predictor,
            "space": described_space(space),
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
        of = settings["space"]
        fingerprint, label = str(of["fingerprint"]), str(of["name"])
        kind, variables = str(of["kind"]), dict(of["variables"])
        state, with_data = dict(settings["state"]), bool(settings["with_data"])
        given = settings.get("task")
        task = None if given is None else PredictorTask.from_json(given)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
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
    version = str(settings.get("searchlab", ""))
    return Artifact(
        str(name), fingerprint, state, arrays, with_data, label, kind, variables, task, version
    )


def described_space(space: Space) -> dict[str, Any]:
    """What a folder says of the space that was learnt from."""
    return {
        "fingerprint": space.fingerprint,
        "name": space.name,
        "kind": space_kind(space),
        "variables": space.to_json()["variables"],
    }


def kept_space(described: Mapping[str, Any], where: str) -> Space:
    """The space of a predictor as far as its folder tells: variables without constraints.

    Encodings are those of the space that was learnt from; its fingerprint is that one's too.

    Raises:
        DataError: variables that cannot be read.
    """
    try:
        space = space_from_json({"variables": described["variables"]})
        space.__dict__["fingerprint"] = str(described["fingerprint"])
        space.name = str(described["name"])
    except (SpaceError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the space of predictor {where!r} cannot be read: {error}") from error
    return space


State = tuple[dict[str, Any], dict[str, NDArray[Any]]]


class Stateful(Protocol):
    """A predictor that can say all that it has learnt, and be made again from that."""

    name: ClassVar[str]

    def state(self, *, with_data: bool = False) -> State:
        """Everything that was learnt, as JSON and arrays named "part/name"."""

    @classmethod
    def of_state(
        cls, space: Space, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The inverse of `state`."""


Kind = TypeVar("Kind", bound=Stateful)


def save_state(predictor: Stateful, space: Space | None, path: Path, *, with_data: bool) -> None:
    """Writes what a predictor over `space` has learnt into a folder; see `Predictor.save`.

    Raises:
        ConfigError: nothing was learnt, which is what no space means.
    """
    if space is None:
        raise ConfigError(f"predictor {predictor.name!r} has learnt nothing; allowed: after fit")
    config, arrays = predictor.state(with_data=with_data)
    write_artifact(
        Path(path),
        predictor=predictor.name,
        space=space,
        state=config,
        arrays=arrays,
        with_data=with_data,
    )


def load_state(kind: type[Kind], path: Path, space: Space) -> Kind:
    """The predictor of this kind in a folder; see `Predictor.load`.

    Raises:
        DataError: see `read_artifact`; or the folder holds another kind, or not all of it.
    """
    artifact = read_artifact(Path(path), space)
    if artifact.predictor != kind.name:
        raise DataError(
            f"{str(path)!r} holds predictor {artifact.predictor!r}; allowed: {kind.name!r}"
        )
    try:
        return kind.of_state(space, artifact.state, artifact.arrays)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{str(path)!r} is no predictor {kind.name!r}: {type(error).__name__} {error}"
        ) from error


def load_predictor(folder: str | Path, space: Space | None = None) -> Predictor:
    """The predictor in a folder, whichever it is.

    Args:
        folder: holds predictor.json and the weights.
        space: what it has to be of; None = the one that the folder describes.

    Raises:
        DataError: see `read_artifact`; or a predictor that is not known here.
    """
    artifact = read_artifact(Path(folder), space)
    try:
        kind = resolve(PREDICTORS, artifact.predictor, "predictor")
    except ConfigError as error:
        raise DataError(f"predictor in {str(folder)!r}: {error}") from error
    predictor: Predictor = kind.load(Path(folder), space or artifact.space)
    return predictor
