"""Schedules as files: a bundle {model calls: schedule} with what it is valid for, in plain JSON."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from searchlab.errors import DataError, SearchlabWarning, SpaceError
from searchlab.spaces.solver_schedule.schedule import Schedule

__all__ = [
    "ScheduleBundle",
    "brief",
    "bundle_of",
    "load_bundle",
    "validity_differences",
    "warn_elsewhere",
]

_FORMAT = "searchlab.schedule_bundle"
_VERSION = 1
_COMPARED = {
    "model_class": "denoiser",
    "prediction_type": "prediction_type",
    "noise": "noise schedule",
    "shift": "shift",
    "mu": "mu",
    "width": "width",
    "height": "height",
    "guidance_scale": "guidance_scale",
}


@dataclass(frozen=True)
class ScheduleBundle:
    """Schedules by their number of model calls, with what they were searched for.

    Attributes:
        schedules: model calls -> schedule; at least one, all of one noise schedule.
        prediction_type: what the network predicts.
        sigma_data: EDM's standard deviation of the data.
        mean: the data mean as nested lists, for schedules that begin with it.
        validity: JSON entries as `installed.describe` gives them; may be empty.
    """

    schedules: Mapping[int, Schedule]
    prediction_type: str
    sigma_data: float = 0.5
    mean: Any = None
    validity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_bundle(self.schedules)

    def save(self, path: str | Path) -> None:
        """Write the bundle as JSON; the same bundle gives the same bytes."""
        text = json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "prediction_type": self.prediction_type,
                "sigma_data": self.sigma_data,
                "mean": self.mean,
                "validity": dict(self.validity),
                "schedules": {str(n): s.to_json() for n, s in sorted(self.schedules.items())},
            },
            indent=1,
            sort_keys=True,
            allow_nan=False,
        )
        Path(path).write_text(text + "\n", encoding="utf-8")


def _check_bundle(schedules: Mapping[int, Schedule]) -> None:
    if not schedules:
        raise SpaceError("a bundle needs at least one schedule, got none")
    for n, schedule in schedules.items():
        if schedule.nfe != n:
            raise SpaceError(f"the schedule under {n} has {schedule.nfe} model calls; allowed: {n}")
        if n < 1:
            raise SpaceError("a schedule without model calls cannot be run by a pipeline")
    first = next(iter(schedules.values())).noise
    for n, schedule in schedules.items():
        if schedule.noise != first:
            raise SpaceError(f"the schedule under {n} has another noise schedule than the first")


def bundle_of(schedules: Schedule | Mapping[int, Schedule] | list[Schedule]) -> dict[int, Schedule]:
    """One schedule, a list or a mapping as {model calls: schedule}, ascending.

    Raises:
        SpaceError: two schedules with equal numbers of calls, none at all, or keys that are wrong.
    """
    if isinstance(schedules, Schedule):
        schedules = [schedules]
    if isinstance(schedules, list):
        found = {s.nfe: s for s in schedules}
        if len(found) < len(schedules):
            calls = sorted(s.nfe for s in schedules)
            raise SpaceError(f"schedules of a bundle must differ in model calls, got {calls}")
        schedules = found
    answer = dict(sorted(schedules.items()))
    _check_bundle(answer)
    return answer


def load_bundle(path: str | Path) -> ScheduleBundle:
    """Read what `ScheduleBundle.save` wrote.

    Raises:
        DataError: no such file, not such a file, written by a newer version, or invalid entries.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise DataError(f"{str(path)!r} is not a schedule bundle: format must be {_FORMAT!r}")
    version = data.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise DataError(f"version of {str(path)!r} must be a whole number, got {version!r}")
    if version > _VERSION:
        raise DataError(
            f"{str(path)!r} has format version {version}; this searchlab reads up to {_VERSION}"
        )
    stored, validity = data.get("schedules"), data.get("validity", {})
    prediction_type, sigma_data = data.get("prediction_type"), data.get("sigma_data", 0.5)
    if not isinstance(stored, dict) or not isinstance(validity, dict):
        raise DataError(f"{str(path)!r}: schedules and validity must be JSON objects")
    if not isinstance(prediction_type, str) or not isinstance(sigma_data, int | float):
        raise DataError(f"{str(path)!r}: prediction_type must be a string, sigma_data a number")
    try:
        schedules = {int(n): Schedule.from_json(s) for n, s in stored.items()}
        return ScheduleBundle(
            schedules, prediction_type, float(sigma_data), data.get("mean"), validity
        )
    except (DataError, SpaceError, ValueError) as error:
        raise DataError(f"{str(path)!r}: {error}") from None


def brief(value: Any) -> str:
    """A setting in a few characters, for messages."""
    if isinstance(value, Mapping):
        shown = {k: v for k, v in value.items() if k != "version"}
        return "/".join("..." if isinstance(v, list) and v else str(v) for v in shown.values())
    return str(value)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float | int) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def validity_differences(stored: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between where a schedule was searched and where it is used.

    Entries that either side does not know (None or absent) are not compared.

    Returns:
        One phrase per difference, such as "guidance_scale 7.5 -> 5.0".
    """
    return [
        f"{name} {brief(stored[key])} -> {brief(here[key])}"
        for key, name in _COMPARED.items()
        if stored.get(key) is not None
        and here.get(key) is not None
        and not _same(stored[key], here[key])
    ]


def warn_elsewhere(
    stored: Mapping[str, Any], here: Mapping[str, Any], *, stacklevel: int = 3
) -> list[str]:
    """Warn, in one `SearchlabWarning`, of all `validity_differences`; returns them."""
    found = validity_differences(stored, here)
    if found:
        warnings.warn(
            "this solver schedule was searched for another setting, its quality here is not known:"
            f" {'; '.join(found)}",
            SearchlabWarning,
            stacklevel=stacklevel,
        )
    return found
