"""Plans of the room of experts, applied to a model's files."""

from __future__ import annotations

from pathlib import Path

from searchlab.experiments.experts_export import source_folder
from searchlab.spaces.experts.export import export_checkpoint
from searchlab.spaces.experts.families import read_family
from searchlab.spaces.experts.files import ExpertFiles
from searchlab.spaces.experts.plan import ExpertPlan, read_plan

__all__ = ["apply"]


def apply(
    plan: str | Path,
    model: str | Path,
    directory: Path,
    *,
    dequantize: str | None = None,
    family: str | None = None,
) -> list[Path]:
    """Writes the checkpoint that a plan makes of a model.

    Args:
        plan: genotype.json, a folder with one, a plan file of a run, or a published `.pth`.
        model: folder or id of a model of the shape that the plan was found for.
        directory: where to.
        dequantize: "bf16" writes plain weights of quantised experts.
        family: a family's table of one's own.

    Raises:
        DataError, SpaceError, ConfigError: as `read_plan` and `export_checkpoint`.
    """
    found = _read(Path(plan))
    own = None if family is None else read_family(family)
    folder = source_folder(str(model))
    base = str(model) if not Path(model).is_dir() else folder.name
    if dequantize is None:
        return export_checkpoint(ExpertFiles(folder, own), found, directory, base=base)
    from searchlab.spaces.experts.dequantise import dequantised

    with dequantised(ExpertFiles(folder, own), dequantize, directory) as plain:
        return export_checkpoint(ExpertFiles(plain, own), found, directory, base=base)


def _read(plan: Path) -> ExpertPlan:
    if plan.suffix == ".pth":
        from searchlab.spaces.experts.published import read_published

        return read_published(plan)
    return read_plan(plan)
