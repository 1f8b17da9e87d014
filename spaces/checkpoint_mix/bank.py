"""The checkpoint bank: all checkpoints of a run side by side, ready to be mixed many times.

A bank is kept in tiles: `tiles[j, k]` is stretch j of checkpoint k, so that one product of matrices
per tile mixes a whole population from one read. It lies in memory, in a mapped file that several
processes share, or in a file that is read along while the tile before is multiplied. All three give
the same bits. With a device it lies there as rows, for the fused kernel.
"""

from __future__ import annotations

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from searchlab.errors import ConfigError, DataError
from searchlab.spaces.checkpoint_mix.buffers import Pool, buffer
from searchlab.spaces.checkpoint_mix.layout import Layout, layout_of
from searchlab.spaces.checkpoint_mix.sources import CheckpointSource

__all__ = ["TILE", "CheckpointBank", "MemoryPlan"]

TILE = 8192
"""Elements of a tile's row: a tile of some dozens of checkpoints then stays in the cache."""

_SLAB_BYTES = 2**24  # read at a time where a bank is streamed
_FORMAT = 1

Storage = Literal["memory", "mapped", "streamed", "device"]


@dataclass(frozen=True)
class MemoryPlan:
    """What a bank and its mixes hold in memory, bytes; stated before anything is allocated.

    Attributes:
        storage: "memory", "mapped" (the system drops what it needs), "streamed" or "device".
        bank: tiles that are held.
        output: weights of one candidate, as summed and as rounded.
        candidates: how many are mixed in one pass over the bank.
    """

    storage: Storage
    bank: int
    output: int
    candidates: int

    @property
    def peak(self) -> int:
        """Bank and outputs together."""
        return self.bank + self.candidates * self.output

    def __str__(self) -> str:
        return (
            f"bank {self.storage}, {self.bank / 2**20:.1f} MiB held; {self.candidates} candidates "
            f"of {self.output / 2**20:.1f} MiB a pass; peak {self.peak / 2**20:.1f} MiB"
        )


class CheckpointBank:
    """Checkpoints of equal shapes, matched by tensor name.

    Args:
        sources: two or more, oldest first (see `find_checkpoints`).
        memory: bytes that bank and outputs may take together; None = half of what is free.
        folder: where a mapped or streamed bank is kept; without one a bank that does not fit is an
            error.
        storage: None = "memory" where the bank takes at most half of `memory`, else "mapped" where
            it fits, else "streamed".
        delta: keep the newest checkpoint in float32 and the others as differences from it in this
            dtype ("float16", "bfloat16"); rounding then goes with what training changed.
        tile: elements of a tile's row, a multiple of 64.
        device: where rows are kept and mixed ("cuda") by `cuda_ext.weighted_sum`; its last bits are
            its own. `memory` is then the device's. None = tiles, mixed by the CPU.
        announce: gets the memory plan as text before anything is read or allocated.

    Raises:
        DataError: what `layout_of` refuses; no room on disk for the tiles.
        ConfigError: a bank that does not fit into the memory, or settings out of range.
    """

    def __init__(
        self,
        sources: Sequence[CheckpointSource],
        *,
        memory: int | None = None,
        folder: str | Path | None = None,
        storage: Storage | None = None,
        delta: Literal["float16", "bfloat16"] | None = None,
        tile: int = TILE,
        device: str | None = None,
        announce: Callable[[str], object] | None = None,
    ) -> None:
        if storage not in (None, "memory", "mapped", "streamed", "device"):
            raise ConfigError(f"storage {storage!r}; allowed: memory, mapped, streamed, device")
        if (storage == "device" and device is None) or (device and storage not in (None, "device")):
            raise ConfigError(f"storage {storage!r} with device {device!r}; allowed: both or none")
        if delta not in (None, "float16", "bfloat16"):
            raise ConfigError(f"delta {delta!r}; allowed: float16, bfloat16")
        if tile < 64 or tile % 64:
            raise ConfigError(f"tile {tile}; allowed: a multiple of 64")
        if storage in ("mapped", "streamed") and folder is None:
            raise ConfigError(f"storage {storage!r}; allowed with a folder for the bank's file")
        self.sources = tuple(sources)
        self.layout: Layout = layout_of(self.sources)
        self.memory = _free_memory() // 2 if memory is None else int(memory)
        self.folder = None if folder is None else Path(folder)
        self.delta = delta
        self.tile = tile
        self.device = device
        if device is not None:
            storage = "device"
            _check_device(device, self.layout)
            if memory is None and torch.device(device).type == "cuda":
                self.memory = int(torch.cuda.mem_get_info(device)[0]) * 3 // 4
        if self.memory <= 0:
            raise ConfigError(f"memory of {memory} bytes; allowed: more than 0")
        self.storage: Storage = storage or self._storage()
        self.plan = self._plan()
        if announce is not None:
            announce(str(self.plan))
        self.pool = Pool()
        self.broken: dict[int, str] = {}
        self._tiles: list[Tensor] = []
        self._base: list[Tensor | None] = [None] * len(self.layout.blocks)
        self._load()

    # -- figures -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def names(self) -> list[str]:
        """Of the checkpoints, oldest first."""
        return [source.name for source in self.sources]

    @property
    def steps(self) -> list[int] | None:
        """Training steps by the checkpoints' names; None where they do not say or do not rise."""
        steps = [source.step for source in self.sources]
        known = [step for step in steps if step is not None]
        rising = known == sorted(set(known)) and len(known) == len(steps)
        return known if rising else None

    @cached_property
    def hashes(self) -> list[dict[str, str]]:
        """Per checkpoint, file name -> sha256; reads every file once."""
        return [source.hashes() for source in self.sources]

    def dtype_of(self, block: int) -> torch.dtype:
        """In which dtype the tiles of a block are kept."""
        if self.delta is not None:
            return torch.float16 if self.delta == "float16" else torch.bfloat16
        return self.layout.blocks[block].dtype

    def tiles_of(self, block: int) -> int:
        """How many tiles a block has; the last may be padded."""
        return -(-self.layout.blocks[block].size // self.width_of(block))

    def width_of(self, block: int) -> int:
        """Elements of a tile's row."""
        return min(self.tile, self.layout.blocks[block].size)

    def _elements(self, block: int) -> int:
        return self.tiles_of(block) * len(self) * self.width_of(block)

    @property
    def bytes(self) -> int:
        """Of all tiles."""
        blocks = range(len(self.layout.blocks))
        return sum(self._elements(b) * self.dtype_of(b).itemsize for b in blocks)

    @property
    def output_bytes(self) -> int:
        """Of one candidate's mixed weights, before and after they are rounded."""
        total = 0
        for block in self.layout.blocks:
            own, wide = block.dtype.itemsize, _wide(block.dtype).itemsize
            total += block.size * (wide if wide == own else wide + own)
        return total

    def _storage(self) -> Storage:
        if self.bytes <= self.memory // 2:
            return "memory"
        if self.folder is None:
            raise ConfigError(
                f"a bank of {self.bytes} bytes does not fit into {self.memory} bytes of memory; "
                "allowed: more memory, or a folder for its file"
            )
        return "mapped" if self.bytes + self.output_bytes <= self.memory else "streamed"

    def _plan(self) -> MemoryPlan:
        base = self.output_bytes if self.delta is not None else 0
        held = self.bytes if self.storage != "streamed" else 2 * self._slab_bytes()
        held += base
        room = (self.memory - held) // max(1, self.output_bytes)
        if room < 1:
            raise ConfigError(
                f"a bank of {held} bytes with one candidate of {self.output_bytes} does not fit "
                f"into {self.memory} bytes of memory"
            )
        return MemoryPlan(self.storage, held, self.output_bytes, int(min(room, 64)))

    def _slab_bytes(self) -> int:
        """The most that is read at a time."""
        return max(
            self._slab(b) * len(self) * self.width_of(b) * self.dtype_of(b).itemsize
            for b in range(len(self.layout.blocks))
        )

    def _slab(self, block: int) -> int:
        """Tiles that are read at a time."""
        one = len(self) * self.width_of(block) * self.dtype_of(block).itemsize
        allowed = min(_SLAB_BYTES, max(one, self.memory // 8))
        return max(1, min(allowed // one, self.tiles_of(block)))

    # -- building ----------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """What the bank's file is kept under: files, their sizes and times, and the settings."""
        parts: list[Any] = [_FORMAT, self.delta, self.tile]
        for source in self.sources:
            for file in source.files:
                status = file.stat()
                parts.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
        return blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()

    def _file(self, block: int) -> Path:
        assert self.folder is not None
        return self.folder / f"bank-{self.digest}-{block}.bin"

    def _load(self) -> None:
        blocks = range(len(self.layout.blocks))
        if self.delta is not None:
            newest = len(self) - 1
            for b in blocks:
                self._base[b] = self.row(newest, b).to(_wide(self.layout.blocks[b].dtype))
        if self.storage == "device":
            for b in blocks:
                self._tiles.append(self._on_device(b))
                base = self._base[b]
                self._base[b] = None if base is None else base.to(self.device)
            return
        if self.storage == "memory":
            for b in blocks:
                tiles = buffer(self._shape(b), self.dtype_of(b))
                self._tiles.append(tiles)
                for first, part in self._slabs(b):
                    tiles[first : first + len(part)] = part
            return
        assert self.folder is not None
        note = self.folder / f"bank-{self.digest}.json"
        known = _read_note(note)
        if known is not None and all(self._file(b).is_file() for b in blocks):
            self.broken = {int(k): str(v) for k, v in known.items()}
        else:
            self._write(note)
        if self.storage == "mapped":
            self._tiles = [self._mapped(b) for b in blocks]

    def _on_device(self, block: int) -> Tensor:
        """Rows (K, size) on the device, filled slab by slab."""
        size, width = self.layout.blocks[block].size, self.width_of(block)
        rows = torch.empty((len(self), size), dtype=self.dtype_of(block), device=self.device)
        for first, part in self._slabs(block):
            start = first * width
            flat = part.transpose(0, 1).reshape(len(self), -1)[:, : size - start]
            rows[:, start : start + flat.shape[1]] = flat.to(self.device)
        return rows

    def rows_on_device(self, block: int) -> Tensor:
        """Rows (K, size) of a bank with a device."""
        return self._tiles[block]

    def _write(self, note: Path) -> None:
        """Repacks the checkpoints into the bank's files, one slab of tiles at a time."""
        self._reserve()
        for b in range(len(self.layout.blocks)):
            temporary = self._file(b).with_suffix(f".{os.getpid()}.tmp")
            try:
                with open(temporary, "wb", buffering=0) as file:
                    size = self._elements(b) * self.dtype_of(b).itemsize
                    os.posix_fallocate(file.fileno(), 0, size)
                    for _, part in self._slabs(b):
                        left = _bytes_of(part)
                        while left:
                            left = left[file.write(left) :]
                os.replace(temporary, self._file(b))
            except OSError as error:
                raise DataError(
                    f"the bank at {str(self._file(b))!r} cannot be written: "
                    f"{error.strerror or error}"
                ) from None
            finally:
                temporary.unlink(missing_ok=True)
        text = json.dumps({"broken": {str(k): v for k, v in self.broken.items()}})
        note.write_text(text, "utf-8")

    def _shape(self, block: int) -> tuple[int, int, int]:
        return self.tiles_of(block), len(self), self.width_of(block)

    def _mapped(self, block: int) -> Tensor:
        path, count = str(self._file(block)), self._elements(block)
        flat = torch.from_file(path, shared=False, size=count, dtype=self.dtype_of(block))
        return flat.view(self._shape(block))

    def _reserve(self) -> None:
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise DataError(
                f"folder {str(self.folder)!r} for the bank: {error.strerror or error}"
            ) from None
        if free < self.bytes:
            raise DataError(
                f"folder {str(self.folder)!r} has {free} bytes free; the bank takes {self.bytes}"
            )

    def _slabs(self, block: int) -> Iterator[tuple[int, Tensor]]:
        """(first tile, tiles (n, K, width)) from the checkpoints' files.

        What is not finite is noted in `broken` and left zero.
        """
        width, slab, base = self.width_of(block), self._slab(block), self._base[block]
        for first in range(0, self.tiles_of(block), slab):
            n = min(slab, self.tiles_of(block) - first)
            out = torch.zeros((n, len(self), width), dtype=self.dtype_of(block))
            start, end = first * width, min((first + n) * width, self.layout.blocks[block].size)
            for k in range(len(self)):
                row = self._stretch(k, block, start, end)
                finite = torch.isfinite(row)
                if not finite.all():
                    self._note_broken(k, block, start, finite)
                    row = torch.where(finite, row, torch.zeros_like(row))
                if base is not None:
                    row = row.to(base.dtype) - base[start:end]
                flat = torch.zeros(n * width, dtype=out.dtype)
                flat[: len(row)] = row.to(out.dtype)
                out[:, k] = flat.view(n, width)
            if self.storage == "streamed":
                for source in self.sources:
                    source.release()
            yield first, out

    def _stretch(self, k: int, block: int, start: int, end: int) -> Tensor:
        """Elements start to end of checkpoint k's row, in the stored dtype."""
        parts = self.layout.blocks[block]
        out = torch.zeros(end - start, dtype=parts.dtype)
        first = bisect_right(parts.places, start, key=lambda place: place.start) - 1
        for place in parts.places[max(0, first) :]:
            if place.start >= end:
                break
            low, high = max(start, place.start), min(end, place.start + place.count)
            if low < high:
                tensor = self.sources[k].tensor(place.name).reshape(-1)
                out[low - start : high - start] = tensor[low - place.start : high - place.start]
        return out

    def _note_broken(self, k: int, block: int, start: int, finite: Tensor) -> None:
        if k in self.broken:
            return
        at = start + int((~finite).nonzero()[0])
        place = [p for p in self.layout.blocks[block].places if p.start <= at][-1]
        self.broken[k] = (
            f"checkpoint {str(self.sources[k].path)!r}: tensor {place.name!r} has values that are "
            "not finite"
        )

    def row(self, k: int, block: int = 0) -> Tensor:
        """Checkpoint k as its files have it, (size,) in the stored dtype."""
        return self._stretch(k, block, 0, self.layout.blocks[block].size)

    def base(self, block: int) -> Tensor | None:
        """The newest checkpoint of a delta bank, (size,); None for others."""
        return self._base[block]

    # -- reading -----------------------------------------------------------------------------

    def walk(self, block: int) -> Iterator[tuple[int, Tensor]]:
        """(number, tile (K, width)) of a block, in order; a tile is valid until the next one."""
        if self.storage == "device":
            width = self.width_of(block)
            yield from enumerate(self._tiles[block].cpu().split(width, dim=1))  # type: ignore[no-untyped-call]
            return
        if self.storage != "streamed":
            yield from enumerate(self._tiles[block].unbind(0))
            return
        count, width = self.tiles_of(block), self.width_of(block)
        slab = self._slab(block)
        dtype = self.dtype_of(block)
        shape = (slab, len(self), width)
        buffers = [self.pool.take(shape, dtype) for _ in range(2)]
        tile_bytes = len(self) * width * dtype.itemsize
        starts = list(range(0, count, slab))
        handle = os.open(self._file(block), os.O_RDONLY)
        try:
            with ThreadPoolExecutor(1) as reader:

                def fetch(index: int) -> int:
                    first = starts[index]
                    n = min(slab, count - first)
                    view = _bytes_of(buffers[index % 2][:n])
                    _read(handle, view, first * tile_bytes, self._file(block))
                    return n

                waiting = reader.submit(fetch, 0)
                for index, first in enumerate(starts):
                    n = waiting.result()
                    if index + 1 < len(starts):
                        waiting = reader.submit(fetch, index + 1)
                    for i in range(n):
                        yield first + i, buffers[index % 2][i]
        finally:
            os.close(handle)

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the bank again; a file is shared with it, memory is not."""
        return {
            "sources": self.sources,
            "memory": self.memory,
            "folder": self.folder,
            "storage": self.storage,
            "delta": self.delta,
            "tile": self.tile,
            "device": self.device,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        sources = state.pop("sources")
        self.__init__(sources, **state)  # type: ignore[misc]


def _check_device(device: str, layout: Layout) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"device {device!r}; allowed: cuda, cpu") from None
    if kind not in ("cuda", "cpu"):
        raise ConfigError(f"device {device!r}; allowed: cuda, cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}, and no CUDA device is there; allowed: none")
    if any(block.dtype is torch.float64 for block in layout.blocks):
        raise ConfigError("a device with float64 checkpoints; allowed: float32, float16, bfloat16")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _bytes_of(tiles: Tensor) -> memoryview:
    """The memory of contiguous tiles."""
    flat: Any = tiles.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text("utf-8"))["broken"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(handle: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(handle, [view[done:]], offset + done)
        if not got:
            raise DataError(f"bank {str(path)!r} is cut off at byte {offset + done}")
        done += got


def _free_memory() -> int:
    """Bytes that this machine, or the limit set for this process, has left."""
    free = int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    for limit, used in (("memory.max", "memory.current"),):
        base = Path("/sys/fs/cgroup")
        try:
            left = int((base / limit).read_text()) - int((base / used).read_text())
            free = min(free, max(left, 2**28))
        except (OSError, ValueError):
            continue
    return free
