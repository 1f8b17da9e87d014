"""Scores candidates with a command: a plan goes out as a file, a result comes back as one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from searchlab.errors import ConfigError, DataError, EvaluationError
from searchlab.evaluator import Fidelity, Objective, Signal
from searchlab.evaluators._command_process import Commands, Ended
from searchlab.evaluators._placeholders import (
    check_placeholders,
    filled,
    has_placeholder,
    words_of,
)
from searchlab.external import Outcome, load_json, plan_rows, read_result, to_evaluations
from searchlab.outcomes import Constraint
from searchlab.population import Evaluations, Jobs
from searchlab.space import Space

__all__ = ["AGAIN", "PLACEHOLDERS", "CommandEvaluator"]

AGAIN = 75  # the exit code that asks for another attempt (EX_TEMPFAIL)
PLACEHOLDERS = ("plan", "out", "fidelity", "seed", "id")
MAX_RESULT_BYTES = 64 * 2**20


@dataclass
class CommandEvaluator:
    """Runs a command per candidate, one at a time.

    The command finds the candidate in `{plan}` (JSON: schema, candidate_id, fidelity, seed, values,
    plan) and writes `{out}` (JSON: objectives and, if it likes, constraints, standard_errors,
    items, cost, state, reason). Whatever goes wrong is the candidate's result with a reason:
    an exit code other than 0, a deadline, no file, half a file, a value that is missing or not
    finite. Exit code 75 asks for another attempt. Nothing that the command starts outlives it.

    Args:
        space: how candidates are decoded.
        command: with the placeholders {plan} {out} {fidelity} {seed} {id}, each of which is one
            argument or part of one; `{{word}}` stands for a literal {word}. {plan} and {out} must
            occur.
        objectives: what it reports; several are traded off unless the stage names one that steers.
        constraints: bounds on what it reports.
        fidelities: handed to it by name; the last is the truth.
        by_shell: run by /bin/sh instead of directly; placeholders are quoted.
        timeout_s: deadline of one attempt, seconds.
        grace_s: seconds between SIGTERM and SIGKILL.
        retries: further attempts after exit code 75.
        output_limit: bytes that are kept of standard output and of standard error each.
        devices: CUDA_VISIBLE_DEVICES of the command; None = as this process has it.
        seed: from which the seed of every replicate is made.
        version: raised by hand when the command's values change.
        folder: of the run; candidates/ID/ in it keeps plan.json, result.json, stdout.txt and
            stderr.txt. None = nothing is kept.

    Raises:
        ConfigError: a command that cannot be split or names unknown placeholders, no objective,
            numbers out of range.
    """

    space: Space
    command: str
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()
    fidelities: tuple[Fidelity, ...] = (Fidelity("full"),)
    signals: tuple[Signal, ...] = ()
    reproducibility: Literal["noisy"] = "noisy"
    by_shell: bool = False
    timeout_s: float = 3600.0
    grace_s: float = 5.0
    retries: int = 2
    output_limit: int = 2**20
    devices: str | None = None
    seed: int = 0
    version: int = 1
    folder: Path | None = None
    probe: bool = field(default=False, init=False)
    placeholders: ClassVar[tuple[str, ...]] = PLACEHOLDERS
    required: ClassVar[tuple[str, ...]] = ("plan", "out")
    _commands: Commands | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ConfigError("a command without objectives; allowed: one or more")
        names = [o.name for o in self.objectives]
        for kind, listed in (
            ("objective", names),
            ("constraint", [c.name for c in self.constraints]),
            ("fidelity", [f.name for f in self.fidelities]),
        ):
            for name in listed:
                if listed.count(name) > 1:
                    raise ConfigError(f"{kind} {name!r} is given twice; allowed: once")
        if not self.fidelities:
            raise ConfigError("a command without fidelities; allowed: one or more")
        for what, number, least in (
            ("timeout_s", self.timeout_s, 1e-3),
            ("grace_s", self.grace_s, 0.0),
            ("retries", self.retries, 0),
            ("output_limit", self.output_limit, 0),
        ):
            if not least <= number < 1e12:
                raise ConfigError(f"{what} {number}; allowed: {least:g} or more")
        self._check_command()

    def _check_command(self) -> None:
        if "\0" in self.command:
            raise ConfigError("the command holds a NUL character")
        check_placeholders(self.command, self.placeholders, self.required)
        if not self.by_shell:
            words_of(self.command)

    # -- the protocol ----------------------------------------------------------------------

    def setup(self) -> None:
        """Checks that the program is there.

        Raises:
            EvaluationError: it is not, or this system cannot run commands.
        """
        if sys.platform == "win32":
            raise EvaluationError("the command evaluator needs a POSIX system")
        if self.by_shell:
            return
        program = words_of(self.command)[0]
        if not has_placeholder(program) and shutil.which(program) is None:
            raise EvaluationError(
                f"command {program!r} is not found; allowed: a program of the PATH or a path to an "
                "executable file (with --shell: what /bin/sh knows)"
            )

    def place(self, folder: Path) -> None:
        """Keeps the candidates' files under this folder from now on."""
        self.folder = folder

    def identity(self) -> Mapping[str, Any]:
        return {
            "version": self.version,
            "command": self.command,
            "shell": self.by_shell,
            "seed": self.seed,
            "constraints": [c.name for c in self.constraints],
        }

    def evaluate(self, jobs: Jobs) -> Evaluations:
        rows = plan_rows(self.space, jobs, self.fidelities, seed=self.seed)
        return to_evaluations([self._evaluate_one(row) for row in rows])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_commands": None}

    def close(self) -> None:
        """Ends what helps to run commands; another `evaluate` starts it again."""
        if self._commands is not None:
            self._commands.close()
            self._commands = None

    # -- one candidate ---------------------------------------------------------------------

    def _evaluate_one(self, row: dict[str, Any]) -> Outcome:
        if self.folder is not None:
            folder = self.folder.resolve() / "candidates" / str(row["candidate_id"])
            return self._in_folder(row, folder)
        with tempfile.TemporaryDirectory(prefix="searchlab-") as temporary:
            return self._in_folder(row, Path(temporary))

    def _in_folder(self, row: dict[str, Any], folder: Path) -> Outcome:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            plan, out = folder / "plan.json", folder / "result.json"
            plan.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise EvaluationError(
                f"cannot write {str(folder)!r}: {error.strerror or error}"
            ) from None
        started = time.monotonic()
        outcome = self._attempts(row, folder, plan, out)
        if outcome.cost_s == outcome.cost_s:  # it said what it cost
            return outcome
        return replace(outcome, cost_s=time.monotonic() - started)

    def _attempts(self, row: dict[str, Any], folder: Path, plan: Path, out: Path) -> Outcome:
        marks = {
            "plan": str(plan),
            "out": str(out),
            "fidelity": row["fidelity"],
            "seed": str(row["seed"]),
            "id": str(row["candidate_id"]),
            **self._more_marks(folder),
        }
        environment = dict(os.environ)
        if self.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        for _ in range(self.retries + 1):
            _remove(out)  # of an earlier attempt
            if self._commands is None:
                self._commands = Commands()
            ended = self._commands.run(
                self._filled(marks),
                stdout=folder / "stdout.txt",
                stderr=folder / "stderr.txt",
                limit=self.output_limit,
                timeout_s=self.timeout_s,
                grace_s=self.grace_s,
                environment=environment,
            )
            if ended.code != AGAIN:
                return self._outcome(ended, out, folder / "stderr.txt")
        tries = self.retries + 1
        return self._failed(f"exit code {AGAIN} (try again) in each of {tries} attempts")

    def _more_marks(self, folder: Path) -> dict[str, str]:
        """Values of further placeholders, for commands that are given more than a plan."""
        return {}

    def _filled(self, marks: Mapping[str, str]) -> list[str] | str:
        """The command with its placeholders filled in."""
        if self.by_shell:
            return filled(self.command, marks, shlex.quote)
        return [filled(part, marks) for part in words_of(self.command)]

    def _outcome(self, ended: Ended, out: Path, stderr: Path) -> Outcome:
        if ended.fault:
            return self._failed(f"the command {ended.fault}")
        if ended.timed_out:
            return self._failed(f"deadline of {self.timeout_s:g} s passed; the command was ended")
        said = _last_line(stderr)
        if ended.code is None:
            return self._failed(f"the command was ended by signal {ended.signal}{said}")
        try:
            raw = _read(out)
            if raw is None:
                if ended.code:
                    return self._failed(f"exit code {ended.code}{said}")
                return self._failed(f"exit code 0, but no result file was written{said}")
            outcome = read_result(load_json(raw, "result.json"), self.objectives, self.constraints)
        except DataError as error:
            code = f"exit code {ended.code}; " if ended.code else ""
            return self._failed(f"{code}{error}")
        if ended.code:
            # A result beside a failure is not trusted; its own reason is worth more than stderr.
            why = f": {outcome.reason}" if outcome.reason else said
            return self._failed(f"exit code {ended.code}{why}")
        return outcome

    def _failed(self, reason: str) -> Outcome:
        return Outcome.failed(reason, self.objectives, self.constraints)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise EvaluationError(f"cannot remove {str(path)!r}: {error.strerror or error}") from None


def _read(path: Path) -> bytes | None:
    """The content of a file from outside; None where there is none.

    Raises:
        DataError: no ordinary file, or one that is too large or cannot be read.
    """
    try:
        # A pipe of that name must not make this process wait for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"result.json cannot be read: {error.strerror or error}") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise DataError("result.json is not an ordinary file")
    with os.fdopen(handle, "rb") as file:
        if status.st_size > MAX_RESULT_BYTES:
            raise DataError(
                f"result.json has {status.st_size} bytes; allowed: at most {MAX_RESULT_BYTES}"
            )
        try:
            raw = file.read(MAX_RESULT_BYTES)
        except OSError as error:
            raise DataError(f"result.json cannot be read: {error.strerror or error}") from None
    if not raw.strip():
        raise DataError("result.json is empty")
    return raw


def _last_line(path: Path) -> str:
    """What the command said last on its standard error, for a reason."""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().decode("utf-8", "replace").split("\n")
        for line in reversed(lines):
            printable = "".join(c if c.isprintable() else " " for c in line).strip()
            if printable:
                return f": {printable[:300]}"
    return ""
