"""A mix as files: merged safetensors in the checkpoints' own form, and a YAML for mergekit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from searchlab.errors import DataError, SpaceError
from searchlab.spaces.checkpoint_mix.bank import CheckpointBank
from searchlab.spaces.checkpoint_mix.layout import Segment
from searchlab.spaces.checkpoint_mix.merge import states

__all__ = ["mergekit_yaml", "write_merged", "write_state"]

_LEFT_OUT = ("trainer_state.json", "optimizer", "scheduler", "random_states", "rng_state")
_COPIED = (".json", ".txt", ".model", ".jinja", ".py")
_COPY_LIMIT = 64 * 2**20  # bytes of one file that goes with the weights


def write_merged(
    bank: CheckpointBank,
    coefficients: NDArray[Any],
    directory: Path,
    *,
    segments: Sequence[Sequence[Segment]] | None = None,
) -> list[Path]:
    """Writes the weights of one candidate as the newest checkpoint writes its own.

    The tensors have the names, shapes and dtypes of the checkpoints, so the files load wherever
    those do; shards keep their names. A checkpoint folder's configuration and tokenizer go along.

    Args:
        bank: K checkpoints.
        coefficients: (K,) or (G, K).
        directory: exists.
        segments: see `merge`.

    Returns:
        The written files, weights first.

    Raises:
        DataError: no room, or no right, to write there.
    """
    (state,) = states(bank, np.asarray(coefficients)[None], segments=segments)
    return write_state(bank, state, directory)


def write_state(bank: CheckpointBank, state: Mapping[str, Tensor], directory: Path) -> list[Path]:
    """As `write_merged`, of weights that are merged already."""
    newest = bank.sources[-1]
    paths = []
    single = newest.path.suffix == ".safetensors" and newest.path.is_file()
    for file in newest.opened:
        target = directory / ("merged.safetensors" if single else file.path.name)
        # Tied tensors and views of one row would be refused as shared: each becomes its own.
        own = {name: state[name].clone().contiguous() for name in file.entries}
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            save_file(own, temporary, metadata={"format": "pt", **file.metadata})
            os.replace(temporary, target)
        except Exception as error:
            temporary.unlink(missing_ok=True)
            raise DataError(
                f"merged weights cannot be written to {str(target)!r}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from None
        paths.append(target)
    if not single:
        paths += _copied(newest.files[0].parent, directory)
        if newest.path != newest.files[0].parent:
            paths += _copied(newest.path, directory)
    return paths


def _copied(folder: Path, directory: Path) -> list[Path]:
    out = []
    for file in sorted(folder.iterdir()):
        wanted = file.suffix in _COPIED and not file.name.startswith(_LEFT_OUT)
        if wanted and file.is_file() and file.stat().st_size <= _COPY_LIMIT:
            target = directory / file.name
            shutil.copyfile(file, target)
            out.append(target)
    return out


def mergekit_yaml(
    bank: CheckpointBank, coefficients: NDArray[Any], *, groups: Sequence[str] = ()
) -> str:
    """The mix as a `linear` merge of mergekit, which has its own rounding: use float32 there.

    Args:
        bank: K checkpoints; mergekit reads folders of Hugging Face models.
        coefficients: (K,) or (G, K).
        groups: G prefixes of tensor names, as filters.
    """
    table = np.atleast_2d(np.asarray(coefficients, dtype=np.float64))
    if table.shape[1] != len(bank) or len(table) != (len(groups) or 1):
        raise SpaceError(f"coefficients of shape {table.shape}; allowed: (G, {len(bank)})")
    models = []
    for k, source in enumerate(bank.sources):
        column = table[:, k]
        if not column.any():
            continue
        weight: Any = float(column[0])
        if groups:
            # The first filter that occurs in a tensor's name wins: longer prefixes go first.
            order = sorted(range(len(groups)), key=lambda g: -len(groups[g]))
            weight = [{"filter": f"{groups[g]}.", "value": float(column[g])} for g in order]
        folder = source.files[0].parent if source.path.is_dir() else source.path
        models.append({"model": str(folder.resolve()), "parameters": {"weight": weight}})
    plan = {
        "merge_method": "linear",
        "models": models,
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": {"torch.float16": "float16", "torch.bfloat16": "bfloat16"}.get(
            str(bank.layout.blocks[0].dtype), "float32"
        ),
    }
    return str(yaml.safe_dump(plan, sort_keys=False))
