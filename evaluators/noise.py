"""Common random numbers: start noise that is a pure function of a seed and a sample index.

All candidates of a comparison see the same noise, whatever the batch size, the order, the worker
or the number of samples. Search, selection of the winner and the final report use banks that no
seed can mix up (`split_seed`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from searchlab.errors import ConfigError

__all__ = ["BANKS", "Split", "noise_bank", "split_seed"]

Split = Literal["search", "selection", "report"]

BANKS: Final[Mapping[Split, int]] = MappingProxyType({"search": 1, "selection": 2, "report": 3})
"""The number of each bank: the two highest bits of its seeds. Number 0 is left to plain seeds."""

_SEED_BITS = 40
_INDEX_BITS = 22
_WORDS = 4  # 64-bit words that one step of the Philox counter gives
# Second half of the key, so that other users of the same generator never share a stream with us.
_PURPOSE = 0x6E6F6973655F3031


def split_seed(seed: int, split: Split, index: int = 0) -> int:
    """The seed of one bank of a split.

    The three arguments fill separate bits (2 for the split, 22 for the index, 40 for the seed), so
    different arguments always give different seeds, and hence different Philox keys.

    Args:
        seed: User's seed, 0 to 2**40 - 1.
        split: "search" for what the search sees, "selection" for choosing among its best,
            "report" for the figures that are published.
        index: Number of the bank within the split, 0 to 2**22 - 1.

    Returns:
        A seed for `noise_bank`, 2**62 to 2**64 - 1.

    Raises:
        ConfigError: For an unknown split, or a seed or index outside its range.
    """
    if split not in BANKS:
        raise ConfigError(f"unknown split {split!r}; known: {', '.join(BANKS)}")
    _check_range("seed", seed, 1 << _SEED_BITS)
    _check_range("index", index, 1 << _INDEX_BITS)
    return (BANKS[split] << (_SEED_BITS + _INDEX_BITS)) | (index << _SEED_BITS) | seed


def noise_bank(
    seed: int, start: int, count: int, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Standard normal noise of samples `start` to `start + count - 1`.

    Sample i depends on (seed, i, shape) and on nothing else: it owns a fixed block of the counter
    of a Philox generator, and each of its numbers takes one 64-bit word through the inverse normal
    distribution function (a rejection method would use a varying number of words). So the first n
    of N samples are the n samples, and any cut into calls gives the same numbers.

    Args:
        seed: 0 to 2**64 - 1, plain or from `split_seed`.
        start: Index of the first sample, 0 or more.
        count: Number of samples, 0 or more.
        shape: Shape of one sample; () is a single number.

    Returns:
        (count, *shape) float32, each within +-8.3.

    Raises:
        ConfigError: For a value outside its range.
    """
    _check_range("seed", seed, 1 << 64)
    _check_range("start", start, 1 << 64)
    _check_range("count", count, 1 << 48)
    for size in shape:
        _check_range("size in shape", size, 1 << 32)
    numbers = math.prod(shape)
    blocks = -(-numbers // _WORDS)
    first = start * blocks
    counter = [(first >> (64 * word)) & 0xFFFFFFFFFFFFFFFF for word in range(4)]
    generator = np.random.Philox(
        key=np.array([seed, _PURPOSE], dtype=np.uint64), counter=np.array(counter, dtype=np.uint64)
    )
    words = generator.random_raw(count * blocks * _WORDS)
    own = np.asarray(words, dtype=np.uint64).reshape(count, blocks * _WORDS)[:, :numbers]
    # 52 bits and a half: the largest value, 1 - 2**-53, is still below one in float64. With 53
    # bits it would round to one, whose normal quantile is infinite.
    uniform = ((own >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    normal = np.asarray(ndtri(uniform), dtype=np.float32)
    return normal.reshape(count, *shape)


def _check_range(name: str, value: int, end: int) -> None:
    if not 0 <= value < end:
        raise ConfigError(f"{name} is {value}; it must be 0 or more and below {end}")
