"""A command that judges exported checkpoints, for example one that serves them first."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchlab.errors import DataError
from searchlab.evaluators._command_process import Commands
from searchlab.evaluators._placeholders import check_placeholders, filled, words_of
from searchlab.external import load_json

__all__ = ["Judgement", "check_command", "judge"]

_KNOWN = ("export", "out", "name")
_MOST_BYTES = 64 * 2**20
_OUTPUT = 2**16


@dataclass(frozen=True)
class Judgement:
    """What a command said of one checkpoint.

    Attributes:
        name: of the checkpoint.
        values: name -> number.
        reason: why there are none; empty = there are.
    """

    name: str
    values: Mapping[str, float]
    reason: str = ""


def check_command(command: str) -> None:
    """Raises ConfigError for a command without {export}, unknown marks, or quotes left open."""
    check_placeholders(command, _KNOWN, ("export",))
    words_of(command)


def judge(command: str, name: str, export: Path, *, timeout_s: float) -> Judgement:
    """Runs the command on a checkpoint folder and reads what it wrote.

    The command writes `{out}`: a JSON file with an object `objectives` of numbers, or a folder in
    which there is a results file of lm-evaluation-harness. It is run without a shell and ended with
    everything it started after `timeout_s` seconds. What goes wrong is a reason, not an error.

    Args:
        command: with the placeholders {export} {out} {name}.
        name: of the checkpoint.
        export: its folder.
        timeout_s: seconds it may take.
    """
    with tempfile.TemporaryDirectory(prefix="searchlab-judge-") as temporary:
        folder = Path(temporary)
        out = folder / "out"
        marks = {"export": str(export.resolve()), "out": str(out), "name": name}

        commands = Commands()
        try:
            ended = commands.run(
                [filled(part, marks) for part in words_of(command)],
                stdout=folder / "stdout.txt",
                stderr=folder / "stderr.txt",
                limit=_OUTPUT,
                timeout_s=timeout_s,
                grace_s=5.0,
                environment=dict(os.environ),
            )
        finally:
            commands.close()
        if ended.fault:
            return Judgement(name, {}, f"the command {ended.fault}")
        if ended.timed_out:
            return Judgement(name, {}, f"deadline of {timeout_s:g} s passed")
        if ended.code:
            said = (folder / "stderr.txt").read_text("utf-8", "replace").strip().splitlines()
            return Judgement(name, {}, f"exit code {ended.code}: {said[-1][:300] if said else ''}")
        if ended.code is None:
            return Judgement(name, {}, f"the command was ended by signal {ended.signal}")
        try:
            values = _values(out)
        except DataError as error:
            return Judgement(name, {}, str(error))
    return Judgement(name, values)


def _values(out: Path) -> dict[str, float]:
    """Numbers of a result file, or of the newest results file of a folder."""
    if out.is_dir():
        found = sorted(out.rglob("results*.json"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise DataError("the command wrote a folder without results*.json")
        tables = _read(found[-1]).get("results")
        if not isinstance(tables, dict):
            raise DataError(f"{found[-1].name} has no object 'results'")
        pairs = [
            (f"{task} {metric.split(',')[0]}", value)
            for task, table in tables.items()
            if isinstance(table, dict)
            for metric, value in table.items()
            if "stderr" not in metric
        ]
    elif out.is_file():
        objectives = _read(out).get("objectives")
        if not isinstance(objectives, dict):
            raise DataError("the result file has no object 'objectives'")
        pairs = list(objectives.items())
    else:
        raise DataError("exit code 0, but {out} was not written")
    values = {str(key): float(value) for key, value in pairs if _number(value)}
    if not values:
        raise DataError("the result holds no numbers")
    return values


def _number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MOST_BYTES:
        raise DataError(f"{path.name} has more than {_MOST_BYTES} bytes")
    data = load_json(path.read_bytes(), path.name)
    if not isinstance(data, dict):
        raise DataError(f"{path.name} holds {json.dumps(data)[:60]}; allowed: an object")
    return data
