"""Plans of the room of experts, applied to a model's files."""

from __future__ import annotations

from pathlib import Path

from searchlab.spaces.experts.export import export_checkpoint
from searchlab.spaces.experts.files import ExpertFiles
from searchlab.spaces.experts.plan import ExpertPlan, read_plan

__all__ = ["apply"]


def apply(plan: Path, model: Path, directory: Path, dequantize: str | None = None) -> list[Path]:
    """Writes the checkpoint that a plan makes of a model.

    Args:
        plan: genotype.json, a folder with one, a plan file of a run, or a published `.pth`.
        model: folder of a model of the shape that the plan was found for.
        directory: where to.
        dequantize: "bf16" writes plain weights of quantised experts.

    Raises:
        DataError, SpaceError, ConfigError: as `read_plan` and `export_checkpoint`.
    """
    found = _read(plan)
    if dequantize is None:
        return export_checkpoint(ExpertFiles(model), found, directory)
    from searchlab.spaces.experts.dequantise import dequantised

    with dequantised(model, dequantize, directory) as plain:
        return export_checkpoint(ExpertFiles(plain), found, directory, base=model.name)


def _read(plan: Path) -> ExpertPlan:
    if plan.suffix == ".pth":
        from searchlab.spaces.experts.published import read_published

        return read_published(plan)
    return read_plan(plan)
