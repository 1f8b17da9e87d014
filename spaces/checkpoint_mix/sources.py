"""Where checkpoints lie: files, folders of files, and the folders that trainers write."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from searchlab.errors import ConfigError, DataError
from searchlab.spaces.checkpoint_mix.tensor_file import TensorEntry, TensorFile

__all__ = ["CheckpointSource", "find_checkpoints"]

_NUMBER = re.compile(r"\d+")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PARTS = ("unet", "transformer", "unet_ema", "transformer_ema", "unet_lora", "model", "ema")
_CONVERT = (
    "convert it once where you trust it: safetensors.torch.save_file(torch.load(FILE, "
    "weights_only=True), 'FILE.safetensors')"
)


@dataclass(frozen=True)
class CheckpointSource:
    """One checkpoint: one safetensors file or the shards of one.

    Attributes:
        path: what the user would call it: the file, or the folder of the shards.
        files: the safetensors files, one or more.
        step: the number that its name ends in; None = there is none.
    """

    path: Path
    files: tuple[Path, ...]
    step: int | None = None

    @property
    def name(self) -> str:
        """For tables: the file's or folder's name without its ending."""
        return self.path.stem if self.path.suffix == ".safetensors" else self.path.name

    @cached_property
    def opened(self) -> tuple[TensorFile, ...]:
        """The files, mapped."""
        return tuple(TensorFile(path) for path in self.files)

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """Tensor name -> entry over all files."""
        out: dict[str, TensorEntry] = {}
        for file in self.opened:
            for name, entry in file.entries.items():
                if name in out:
                    raise DataError(f"checkpoint {str(self.path)!r} holds {name!r} twice")
                out[name] = entry
        return out

    def file_of(self, name: str) -> TensorFile:
        """The file that holds a tensor."""
        return next(file for file in self.opened if name in file.entries)

    def tensor(self, name: str) -> Tensor:
        """A tensor as a view of its file."""
        return self.file_of(name).tensor(name)

    def hashes(self) -> dict[str, str]:
        """File name -> sha256."""
        return {file.path.name: file.sha256() for file in self.opened}

    def release(self) -> None:
        """Lets go of the pages that reading has brought into this process."""
        for file in self.opened:
            file.release()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "files": self.files, "step": self.step}


def find_checkpoints(
    patterns: Sequence[str | Path], *, part: str | None = None
) -> tuple[CheckpointSource, ...]:
    """The checkpoints that paths and patterns name, oldest first.

    A pattern may match safetensors files (each is a checkpoint) and folders. A folder is one
    checkpoint if it holds the weights of one model (`model.safetensors`, an adapter, shards with
    their index, or a subfolder such as `unet/` of diffusers); otherwise every safetensors file and
    every checkpoint folder in it is one. They are sorted by the number that their names end in
    where all have one, else by name.

    Args:
        patterns: files, folders or glob patterns.
        part: subfolder of every checkpoint folder that holds the weights ("unet", for example).

    Raises:
        ConfigError: nothing found, fewer than two, several parts to choose from, or not that part.
        DataError: weights that are pickles only.
    """
    found: dict[Path, CheckpointSource] = {}
    for pattern in patterns:
        text = str(pattern)
        matches = [text] if Path(text).exists() else sorted(glob.glob(text, recursive=True))
        if not matches:
            raise ConfigError(f"no checkpoint at {text!r}; allowed: files, folders, or a pattern")
        for match in matches:
            for source in _sources(Path(match), part, alone=len(matches) == 1):
                found.setdefault(source.path.resolve(), source)
    if len(found) < 2:
        many = "1 checkpoint" if len(found) == 1 else f"{len(found)} checkpoints"
        raise ConfigError(
            f"{many} at {', '.join(map(str, patterns))}; allowed: two or more "
            "(safetensors files, or folders that hold them)"
        )
    if part is not None and all(s.files[0].parent.name != part for s in found.values()):
        raise ConfigError(
            f"part {part!r} is in none of the checkpoints at {', '.join(map(str, patterns))}; "
            "allowed: a subfolder of each that holds weights"
        )
    steps = [source.step for source in found.values()]
    if None not in steps and len(set(steps)) == len(steps):
        return tuple(sorted(found.values(), key=lambda s: s.step or 0))
    return tuple(sorted(found.values(), key=lambda s: _natural(str(s.path))))


def _natural(text: str) -> list[tuple[int, int | str]]:
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", text) if p]


def _step(path: Path) -> int | None:
    name = path.stem if path.suffix == ".safetensors" else path.name
    numbers = _NUMBER.findall(name)
    return int(numbers[-1]) if numbers else None


def _sources(path: Path, part: str | None, *, alone: bool) -> list[CheckpointSource]:
    if path.is_file():
        if path.suffix in _PICKLES:
            raise DataError(f"checkpoint {str(path)!r} is a pickle, which is not read; {_CONVERT}")
        if path.suffix != ".safetensors":
            return [] if not alone else [CheckpointSource(path, (path,), _step(path))]
        return [CheckpointSource(path, (path,), _step(path))]
    files = _weights(path, part)
    if files:
        return [CheckpointSource(path, tuple(files), _step(path))]
    inside = sorted(path.glob("*.safetensors"))
    out = [CheckpointSource(file, (file,), _step(file)) for file in inside]
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        files = _weights(folder, part)
        if files:
            out.append(CheckpointSource(folder, tuple(files), _step(folder)))
    if not out:
        pickles = sorted(p for p in path.rglob("*") if p.suffix in _PICKLES and p.is_file())
        weights = [p for p in pickles if "model" in p.name or p.parent == path]
        if weights:
            raise DataError(
                f"checkpoint {str(weights[0])!r} is a pickle, which is not read; {_CONVERT}"
            )
    return out


def _weights(folder: Path, part: str | None) -> list[Path]:
    """The files of the one model that a folder holds; none where it holds no single one."""
    if part is not None and (folder / part).is_dir():
        return _weights(folder / part, None)
    here = sorted(folder.glob("*.safetensors"))
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        return _shards(index[0])
    if here and all(_SHARD.search(file.name) for file in here):
        return here
    named = [f for f in here if f.stem in ("model", "adapter_model", "diffusion_pytorch_model")]
    if len(named) == 1:
        return named
    if here:
        lora = [f for f in here if f.stem == "pytorch_lora_weights"]
        return lora if len(lora) == 1 else []
    parts = [
        sub
        for sub in sorted(folder.iterdir())
        if sub.is_dir() and sub.name in _PARTS and _weights(sub, None)
    ]
    if len(parts) > 1:
        names = ", ".join(sub.name for sub in parts)
        raise ConfigError(
            f"checkpoint {str(folder)!r} has several parts; allowed: part = one of {names}"
        )
    return _weights(parts[0], None) if parts else []


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [index.parent / str(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"index {str(index)!r} is not readable; allowed: weight_map") from None
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise DataError(f"index {str(index)!r} names {file.name!r}, which is not there")
    return files
