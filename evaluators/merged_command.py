"""Scores mixes of checkpoints by a command that reads merged weights from a folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from searchlab.errors import ConfigError, EvaluationError
from searchlab.evaluators.command import PLACEHOLDERS, CommandEvaluator
from searchlab.external import Outcome
from searchlab.population import Jobs
from searchlab.spaces.checkpoint_mix.bank import CheckpointBank
from searchlab.spaces.checkpoint_mix.export import write_merged

__all__ = ["MergedCommandEvaluator"]


@dataclass
class MergedCommandEvaluator(CommandEvaluator):
    """A command per candidate, which finds the merged weights in the folder `{model}`.

    The folder holds what `write_merged` writes (weights as the newest checkpoint stores them, and
    its configuration) and is removed when the command has ended. `{plan}` may be used too.

    Args:
        bank: K checkpoints; must be given.
        groups: mixed tensor -> group number; None = one group.
    """

    bank: CheckpointBank | None = None
    groups: Mapping[str, int] | None = None
    _tables: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    placeholders: ClassVar[tuple[str, ...]] = (*PLACEHOLDERS, "model")
    required: ClassVar[tuple[str, ...]] = ("model", "out")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bank is None:
            raise ConfigError("a command on merged weights needs a bank of checkpoints")
        self._segments = self.bank.layout.segments(self.groups)

    @classmethod
    def check(cls, command: str) -> None:
        """Finds what is wrong with a command while there is no bank yet.

        Raises:
            ConfigError: unknown or missing placeholders, or it cannot be split.
            EvaluationError: its program is not found.
        """
        bare = cls.__new__(cls)
        bare.command, bare.by_shell = command, False
        bare._check_command()
        bare.setup()

    def identity(self) -> Mapping[str, Any]:
        assert self.bank is not None
        return {
            **super().identity(),
            "checkpoints": self.bank.hashes,
            "delta": self.bank.delta,
            "groups": None if self.groups is None else dict(self.groups),
        }

    def evaluate(self, jobs: Jobs) -> Any:
        table = self.space.coefficients(jobs.population)  # type: ignore[attr-defined]
        self._tables = {str(i): row for i, row in zip(jobs.ids.tolist(), table, strict=True)}
        return super().evaluate(jobs)

    def _more_marks(self, folder: Path) -> dict[str, str]:
        return {"model": str(folder / "model")}

    def _in_folder(self, row: dict[str, Any], folder: Path) -> Outcome:
        assert self.bank is not None
        target = folder / "model"
        table = np.asarray(self._tables[str(row["candidate_id"])])
        try:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        except OSError as error:
            raise EvaluationError(
                f"cannot write {str(target)!r}: {error.strerror or error}"
            ) from None
        try:
            write_merged(self.bank, table, target, segments=self._segments)
            return super()._in_folder(row, folder)
        finally:
            shutil.rmtree(target, ignore_errors=True)
