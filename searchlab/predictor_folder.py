"""A predictor's folder as the engine sees it: which task it learnt, its hash, a copy of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from searchlab._tau import Tau
from searchlab.errors import DataError
from searchlab.space import Space

__all__ = [
    "SETTINGS",
    "WEIGHTS",
    "PredictorTask",
    "SignalSchema",
    "copy_folder",
    "describe_task",
    "folder_digest",
    "space_kind",
]

SETTINGS = "predictor.json"
WEIGHTS = "weights.safetensors"


def space_kind(space: Space) -> str:
    """What candidates are made of, without how many of it: class, names and kinds of variables.

    Spaces of one kind differ in shapes, labels, ranges and constraints only.
    """
    parts = (f"{name}:{variable.kind}" for name, variable in space.variables.items())
    return f"{type(space).__name__}({', '.join(parts)})"


@dataclass(frozen=True)
class SignalSchema:
    """A signal that a predictor reads.

    Attributes:
        name, direction, unit, cost_s: as the evaluator declares them.
        quantiles: of its values among random candidates, increasing; empty = it was never there.
    """

    name: str
    direction: str
    unit: str = ""
    cost_s: float = 0.0
    quantiles: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "direction": self.direction,
            "unit": self.unit,
            "cost_s": self.cost_s,
            "quantiles": list(self.quantiles),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SignalSchema:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError."""
        return SignalSchema(
            str(data["name"]),
            str(data["direction"]),
            str(data["unit"]),
            float(data["cost_s"]),
            tuple(float(value) for value in data["quantiles"]),
        )


@dataclass(frozen=True)
class PredictorTask:
    """What a predictor learnt: of which evaluator, from how many labels, and how well.

    Attributes:
        evaluator: hash of the evaluator's identity and of the space: equal = the same values.
        identity: the evaluator's identity: model, data set, metric, settings.
        objective: name of the objective that it orders candidates by.
        direction: "min" or "max".
        fidelity: name of the fidelity of the labels.
        labels: statistics of the labels in the user's sign: n, best, median, worst, mean, sd.
        held_out: Kendall's tau of predictions of labels that the fit had not seen.
        guard: what the guard of the search said in the end.
        signals: those it reads, in order.
        seed: of the run that left it.
        run: name of that run.
    """

    evaluator: str
    identity: Mapping[str, Any]
    objective: str
    direction: str
    fidelity: str
    labels: Mapping[str, float]
    held_out: Tau = field(default_factory=Tau)
    guard: Mapping[str, Any] = field(default_factory=dict)
    signals: tuple[SignalSchema, ...] = ()
    seed: int = 0
    run: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "evaluator": self.evaluator,
            "identity": dict(self.identity),
            "objective": self.objective,
            "direction": self.direction,
            "fidelity": self.fidelity,
            "labels": dict(self.labels),
            "held_out": self.held_out.to_json(),
            "guard": dict(self.guard),
            "signals": [signal.to_json() for signal in self.signals],
            "seed": self.seed,
            "run": self.run,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PredictorTask:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError."""
        return PredictorTask(
            str(data["evaluator"]),
            dict(data["identity"]),
            str(data["objective"]),
            str(data["direction"]),
            str(data["fidelity"]),
            dict(data["labels"]),
            Tau.from_json(data["held_out"]),
            dict(data["guard"]),
            tuple(SignalSchema.from_json(part) for part in data["signals"]),
            int(data["seed"]),
            str(data["run"]),
        )


def describe_task(folder: Path, task: PredictorTask) -> None:
    """Adds the task to a predictor's folder that was just written.

    Raises:
        DataError: there is no predictor, or the folder cannot be written to.
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text("utf-8"))
        settings["task"] = task.to_json()
        text = json.dumps(settings, indent=1, allow_nan=False)
        path.write_text(text + "\n", "utf-8")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot describe predictor in {str(folder)!r}: {error}") from error


def folder_digest(folder: Path) -> str:
    """Hash of a predictor's two files.

    Raises:
        DataError: one of them is missing.
    """
    digest = blake2b(digest_size=16)
    for name in (SETTINGS, WEIGHTS):
        try:
            blob = (folder / name).read_bytes()
        except OSError:
            raise DataError(f"no predictor in {str(folder)!r}: {name} is missing") from None
        digest.update(len(blob).to_bytes(8, "little") + blob)
    return digest.hexdigest()


def copy_folder(source: Path, target: Path) -> None:
    """Puts a predictor's two files into another folder, wholly or not at all.

    Raises:
        DataError: it cannot be read or written.
    """
    if source.resolve() == target.resolve():
        return
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for name in (SETTINGS, WEIGHTS):
            shutil.copyfile(source / name, fresh / name)
        put_in_place(fresh, target)
    except OSError as error:
        raise DataError(f"cannot copy predictor {str(source)!r}: {error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def put_in_place(fresh: Path, target: Path) -> None:
    """Exchanges a folder for one that was written beside it."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
