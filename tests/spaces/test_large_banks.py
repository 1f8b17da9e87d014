"""More elements than 32 bits count: offsets and strides of banks, from sparse files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from searchlab.spaces.checkpoint_mix import CheckpointBank, find_checkpoints, merge
from searchlab.spaces.checkpoint_mix.layout import Block, Layout, Place
from searchlab.spaces.checkpoint_mix.sources import CheckpointSource
from searchlab.spaces.checkpoint_mix.tensor_file import TensorFile

MANY = 2**31 + 4096 + 17
LARGE = os.environ.get("SEARCHLAB_LARGE") == "1"


def sparse(path: Path, tail: Tensor, count: int = MANY) -> Path:
    """A float16 tensor of zeros that ends with `tail`; only the tail takes room on the disk."""
    entry = {"dtype": "F16", "shape": [count], "data_offsets": [0, 2 * count]}
    head = json.dumps({"w": entry}).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.seek(2 * (count - len(tail)), os.SEEK_CUR)
        file.write(tail.half().numpy().tobytes())
    return path


def test_a_tensor_is_read_beyond_two_to_the_31(tmp_path: Path) -> None:
    tail = torch.arange(100) / 8
    file = TensorFile(sparse(tmp_path / "step_1.safetensors", tail))
    tensor = file.tensor("w")
    assert tensor.numel() == MANY
    assert torch.equal(tensor[-100:], tail.half())
    assert not tensor[2**31 : 2**31 + 50].any()


def test_a_stretch_and_a_tile_of_a_bank_lie_beyond_two_to_the_31(tmp_path: Path) -> None:
    """The bank's own arithmetic; nothing but the end of its files is read."""
    tails = [torch.full((100,), float(k)) for k in (1, 2)]
    paths = [sparse(tmp_path / f"step_{k}.safetensors", t) for k, t in enumerate(tails, start=1)]
    size = MANY + -MANY % 64
    bank = object.__new__(CheckpointBank)
    bank.sources = tuple(CheckpointSource(path, (path,), 1) for path in paths)
    bank.layout = Layout(
        (Block(torch.float16, [Place("w", (MANY,), 0, MANY)], size),), {}, (), (), ("w",)
    )
    bank.tile, bank.delta, bank.folder, bank.storage = 8192, None, tmp_path, "mapped"
    found = bank._stretch(1, 0, size - 200, size)
    assert found.tolist() == [0.0] * (100 - (size - MANY)) + [2.0] * 100 + [0.0] * (size - MANY)
    # Two rows in tiles of 8192: the mapped file holds more than 2**32 elements.
    elements = bank._elements(0)
    assert elements > 2**32
    bank.__dict__["digest"] = "large"
    with bank._file(0).open("wb") as file:
        file.truncate(2 * elements)
        file.seek(2 * (elements - 8192))
        file.write(torch.ones(8192).half().numpy().tobytes())
    tiles = bank._mapped(0)
    assert tiles.shape == (bank.tiles_of(0), 2, 8192)
    assert tiles[-1, 1].sum(dtype=torch.float64) == 8192
    assert not tiles[-1, 0].any()


def test_rows_too_far_apart_for_the_matrix_library_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 5):
        generator = torch.Generator().manual_seed(step)
        save_file(
            {"w": torch.randn(20_011, generator=generator)},
            tmp_path / f"step_{step}.safetensors",
        )
    bank = CheckpointBank(find_checkpoints([tmp_path]))
    rows = np.random.default_rng(0).normal(size=(6, 4))
    (near,) = merge(bank, rows)
    monkeypatch.setattr(sys.modules[merge.__module__], "FARTHEST", 1000)
    (far,) = merge(bank, rows)
    assert torch.equal(near, far)


def zeros_that_end_with(tails: list[Tensor], folder: Path) -> None:
    """The bank file of the sparse checkpoints, itself sparse: what `_write` would make of it."""
    sources = find_checkpoints([folder])
    bank = object.__new__(CheckpointBank)
    bank.sources, bank.tile, bank.delta, bank.folder = sources, 8192, None, folder / "bank"
    bank.folder.mkdir()
    size = MANY + -MANY % 64
    count, last = -(-size // 8192), 8192 * (size // 8192 - 1)
    end = torch.zeros(2, 8192 * count - last, dtype=torch.float16)
    for row, tail in zip(end, tails, strict=True):
        row[MANY - last - len(tail) : MANY - last] = tail.half()
    tiles = end.view(2, -1, 8192).transpose(0, 1).contiguous()
    with bank._file(0).open("wb") as file:
        file.truncate(2 * 2 * 8192 * count)
        file.seek(2 * 2 * 8192 * (count - len(tiles)))
        file.write(tiles.numpy().tobytes())
    (bank.folder / f"bank-{bank.digest}.json").write_text('{"broken": {}}')


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not LARGE, reason="takes 10 GB of memory: SEARCHLAB_LARGE=1 runs it")
def test_mixing_more_elements_than_32_bits_count(tmp_path: Path) -> None:
    tails = [torch.arange(5000) % 7 + float(k) for k in (1, 2)]
    for k, tail in enumerate(tails, start=1):
        sparse(tmp_path / f"step_{k}.safetensors", tail)
    zeros_that_end_with(tails, tmp_path)
    bank = CheckpointBank(
        find_checkpoints([tmp_path]), folder=tmp_path / "bank", storage="streamed", memory=2**40
    )
    (found,) = merge(bank, np.array([[-0.5, 1.5]]))
    assert found.shape == (1, MANY + -MANY % 64)
    mixed = -0.5 * tails[0] + 1.5 * tails[1]
    assert torch.equal(found[0, MANY - 5000 : MANY], mixed)
    assert not found[0, 2**31 - 3000 : MANY - 5000].any()
