"""What leaves the room of checkpoint mixing: merged weights, coefficients, a YAML for mergekit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from searchlab.config import SearchConfig
from searchlab.errors import ConfigError, DataError
from searchlab.evaluator import identity_digest
from searchlab.result import Result
from searchlab.spaces.checkpoint_mix.export import mergekit_yaml, write_merged

__all__ = ["FORMS", "export"]

FORMS = ("safetensors", "mergekit", "json")


def export(config: SearchConfig, result: Result, directory: Path, form: str) -> list[Path]:
    """Writes the winner.

    Args:
        config: of the run; its last evaluator holds the bank.
        result: of the run.
        directory: exists.
        form: "" for everything, "safetensors" (merged weights and coefficients.json), "mergekit"
            (mergekit.yaml and coefficients.json), "json" (coefficients.json).
    """
    if form not in ("", *FORMS):
        raise ConfigError(f"--to {form!r}; allowed: {', '.join(FORMS)}")
    winners = [group.winner for group in result.groups if group.winner is not None]
    if not winners:
        raise DataError(f"run {result.name!r} has no searched mix yet")
    winner = winners[-1]
    stage = config.stages[-1]
    evaluator: Any = stage.evaluator
    space: Any = stage.space
    bank = evaluator.bank
    table = space.coefficients(winner.population)[0]
    paths = [directory / "coefficients.json"]
    steps = bank.steps
    text = {
        "schema": 1,
        "checkpoints": [
            {
                "name": source.name,
                "path": str(source.path),
                "step": None if steps is None else steps[k],
                "sha256": bank.hashes[k],
                "coefficients": table[:, k].tolist(),
            }
            for k, source in enumerate(bank.sources)
        ],
        "groups": list(space.groups),
        "sum_of_magnitudes": float(np.abs(table).sum(axis=1).mean()),
        "objective": {"name": result.objective.name, "direction": result.objective.direction},
        "search": winner.search,
        "selection": winner.selection if np.isfinite(winner.selection) else None,
        "report": list(winner.report),
        "seed": config.seed,
        "options": dict(config.options),
        "evaluator": evaluator.identity(),
        "evaluator_digest": identity_digest(evaluator),
        "dtype": [str(block.dtype).removeprefix("torch.") for block in bank.layout.blocks],
        "accumulated_in": "float32 (float64 for float64 checkpoints)",
    }
    paths[0].write_text(json.dumps(text, indent=1, default=str) + "\n", "utf-8")
    if form in ("", "mergekit"):
        paths.append(directory / "mergekit.yaml")
        paths[-1].write_text(mergekit_yaml(bank, table, groups=space.groups), "utf-8")
    if form in ("", "safetensors"):
        segments = bank.layout.segments(evaluator.groups)
        paths += write_merged(bank, table, directory, segments=segments)
    return paths
