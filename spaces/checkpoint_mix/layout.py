"""Which tensors are mixed and where each lies in a flat row; matched by name, tied ones once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from searchlab.errors import DataError, SpaceError
from searchlab.spaces.checkpoint_mix.sources import CheckpointSource
from searchlab.spaces.checkpoint_mix.tensor_file import DTYPES

__all__ = ["Block", "Layout", "Place", "Segment", "layout_of"]

ROW_ALIGNMENT = 64  # elements
MIXED = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Place:
    """Where a mixed tensor lies in the row of its block."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int


@dataclass
class Block:
    """All mixed tensors of one dtype, one after another by name.

    Attributes:
        dtype: as stored.
        places: of the tensors, ascending.
        size: elements of a row, padded to a multiple of 64.
    """

    dtype: torch.dtype
    places: list[Place] = field(default_factory=list)
    size: int = 0


@dataclass(frozen=True)
class Segment:
    """A stretch of a block's row that one group's coefficients mix."""

    start: int
    end: int
    group: int


@dataclass(frozen=True)
class Layout:
    """How the tensors of checkpoints are kept.

    Attributes:
        blocks: mixed tensors, by dtype.
        tied: name -> the name whose values it shares in every checkpoint; stored once.
        constant: names whose values are equal in all checkpoints; copied, not mixed.
        counted: names of integer tensors that differ; taken from the newest checkpoint that has a
            coefficient other than zero.
        order: all names, as the newest checkpoint has them.
    """

    blocks: tuple[Block, ...]
    tied: Mapping[str, str]
    constant: tuple[str, ...]
    counted: tuple[str, ...]
    order: tuple[str, ...]

    @property
    def size(self) -> int:
        """Mixed elements of a checkpoint, padding included."""
        return sum(block.size for block in self.blocks)

    @property
    def row_bytes(self) -> int:
        """Bytes of one checkpoint's row."""
        return sum(block.size * block.dtype.itemsize for block in self.blocks)

    @property
    def mixed(self) -> list[str]:
        """Names of the mixed tensors."""
        return [place.name for block in self.blocks for place in block.places]

    def segments(self, groups: Mapping[str, int] | None) -> list[list[Segment]]:
        """Per block, the stretches that belong to one group each.

        Args:
            groups: name of every mixed tensor -> number of its group; None = one group.

        Raises:
            SpaceError: a mixed tensor without a group.
        """
        out: list[list[Segment]] = []
        for block in self.blocks:
            parts: list[Segment] = []
            for place in block.places:
                if groups is not None and place.name not in groups:
                    raise SpaceError(f"tensor {place.name!r} is in no group; allowed: one for each")
                group = 0 if groups is None else groups[place.name]
                end = place.start + place.count
                if parts and parts[-1].group == group and parts[-1].end == place.start:
                    parts[-1] = Segment(parts[-1].start, end, group)
                else:
                    parts.append(Segment(place.start, end, group))
            if parts:  # the padding goes with the last
                parts[-1] = Segment(parts[-1].start, block.size, parts[-1].group)
            out.append(parts)
        return out


def layout_of(sources: Sequence[CheckpointSource]) -> Layout:
    """The common layout of checkpoints; the order of keys in the files does not matter.

    Raises:
        DataError: fewer than two; a missing or further tensor, another shape or dtype: names the
            tensor and the file.
    """
    if len(sources) < 2:
        raise DataError(f"{len(sources)} checkpoints; allowed: two or more")
    newest = sources[-1]
    names = sorted(newest.entries)
    for source in sources[:-1]:
        _compare(source, newest)
    tied = _tied(sources, names)
    constant, counted = [], []
    blocks: dict[str, Block] = {}
    for name in names:
        if name in tied:
            continue
        entry = newest.entries[name]
        if all(_equal(source, newest, name) for source in sources[:-1]):
            constant.append(name)
        elif entry.dtype not in MIXED:
            counted.append(name)
        else:
            block = blocks.setdefault(entry.dtype, Block(DTYPES[entry.dtype]))
            block.places.append(Place(name, entry.shape, block.size, entry.count))
            block.size += entry.count
    if not blocks:
        raise DataError(
            f"the {len(sources)} checkpoints up to {str(newest.path)!r} are equal; allowed: "
            "checkpoints that differ"
        )
    for source in sources:
        source.release()
    for block in blocks.values():
        block.size += -block.size % ROW_ALIGNMENT
    return Layout(
        tuple(blocks[key] for key in sorted(blocks)),
        tied,
        tuple(constant),
        tuple(counted),
        tuple(newest.entries),
    )


def _compare(source: CheckpointSource, newest: CheckpointSource) -> None:
    where = f"checkpoint {str(source.path)!r}"
    missing = sorted(newest.entries.keys() - source.entries.keys())
    more = sorted(source.entries.keys() - newest.entries.keys())
    for names, word in ((missing, "lacks"), (more, "has one more")):
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DataError(f"{where} {word} tensor {names[0]!r}{rest}; see {str(newest.path)!r}")
    for name, entry in newest.entries.items():
        own = source.entries[name]
        if own.shape != entry.shape:
            raise DataError(
                f"{where}: tensor {name!r} has shape {list(own.shape)}; {str(newest.path)!r} has "
                f"{list(entry.shape)}"
            )
        if own.dtype != entry.dtype:
            raise DataError(
                f"{where}: tensor {name!r} is {own.dtype}; {str(newest.path)!r} has {entry.dtype}"
            )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _equal(source: CheckpointSource, other: CheckpointSource, name: str) -> bool:
    """Whether a tensor has the same bytes in two checkpoints."""
    same = torch.equal(_bits(source.tensor(name)), _bits(other.tensor(name)))
    source.release()
    return same


def _tied(sources: Sequence[CheckpointSource], names: Sequence[str]) -> dict[str, str]:
    """Tensors with the same bytes as an earlier one in every checkpoint, such as tied embeddings.

    Only matrices: biases and norms are often equal by chance, and cost little.
    """
    newest = sources[-1]
    first: dict[tuple[object, ...], list[str]] = {}
    out: dict[str, str] = {}
    for name in names:
        entry = newest.entries[name]
        if len(entry.shape) < 2 or not entry.count:
            continue
        alike = first.setdefault((entry.dtype, entry.shape), [])
        for other in alike:
            if all(
                torch.equal(_bits(source.tensor(name)), _bits(source.tensor(other)))
                for source in reversed(sources)
            ):
                out[name] = other
                break
        else:
            alike.append(name)
    return out
