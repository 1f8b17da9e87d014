"""Counter-based uniforms: every job id owns a fixed block, so a row never depends on its batch."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError

__all__ = [
    "BOOTSTRAP",
    "FITS",
    "PARENTS",
    "POOL",
    "SPREAD",
    "SURVIVAL",
    "derived",
    "uniforms",
    "uniforms_of",
]

# Purposes 0-99 are proposals: the number is the redraw attempt.
PARENTS = 100
POOL = 200
FITS = 300
BOOTSTRAP = 400
SURVIVAL = 500
SPREAD = 600

_ODD = np.uint64(0x9E3779B97F4A7C15)
_OTHER = np.uint64(0xD1342543DE82EF95)
_JUMP = 512  # uniforms that are drawn in the time that a jump over ids takes
_WORDS_PER_BLOCK = 4  # Philox4x64 makes four 64-bit words per counter step
_WORD = 2**64 - 1


class _Stream(threading.local):
    """One generator per thread, which is put in its place for each use.

    A new one costs more than a thousand uniforms: numpy asks the system for a seed that nobody
    needs here.
    """

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.generator = np.random.Generator(self.philox)

    def at(self, seed: int, purpose: int, block: int) -> np.random.Generator:
        """The generator with this key before the first word of a block (a counter step)."""
        counter = [block & _WORD, block >> 64 & _WORD, block >> 128 & _WORD, block >> 192]
        state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": counter, "key": [seed, purpose]},
            "buffer": (0, 0, 0, 0),
            "buffer_pos": _WORDS_PER_BLOCK,  # used up
            "has_uint32": 0,
            "uinteger": 0,
        }
        self.philox.state = state
        return self.generator


_stream = _Stream()


def uniforms(seed: int, purpose: int, first_id: int, n: int, width: int) -> NDArray[np.float64]:
    """Uniforms of the ids `first_id .. first_id + n - 1`.

    Args:
        seed: the run's seed, 0 <= seed < 2**64.
        purpose: which stream of the run (see the constants of this module), 0 <= purpose < 2**64.
        first_id: the first job id, >= 0.
        n: how many consecutive ids.
        width: uniforms per id. A different width is a different stream.

    Returns:
        float64 (n, width) in [0, 1). Row i is a pure function of (seed, purpose, id, width).

    Raises:
        ConfigError: a seed, purpose or id out of range.
    """
    if not (0 <= seed < 2**64 and 0 <= purpose < 2**64 and first_id >= 0):
        raise ConfigError(
            f"seed {seed}, purpose {purpose}, first id {first_id}; allowed: seed and purpose in "
            "[0, 2**64), first id >= 0"
        )
    if width == 0 or n == 0:
        return np.empty((n, width))
    blocks = -(-width // _WORDS_PER_BLOCK)
    words = _stream.at(seed, purpose, first_id * blocks).random(n * blocks * _WORDS_PER_BLOCK)
    return words.reshape(n, blocks * _WORDS_PER_BLOCK)[:, :width]


def uniforms_of(seed: int, purpose: int, ids: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    """Uniforms of increasing ids that need not be neighbours; rows are those of `uniforms`."""
    n = len(ids)
    if n == 0 or width == 0 or int(ids[-1]) - int(ids[0]) + 1 == n:
        return uniforms(seed, purpose, int(ids[0]) if n else 0, n, width)
    blocks = -(-width // _WORDS_PER_BLOCK)
    wide = blocks * _WORDS_PER_BLOCK
    words = np.empty((n, wide))
    # Short gaps are drawn too and left out.
    breaks = [0, *(np.flatnonzero(np.diff(ids) > 1 + _JUMP // wide) + 1).tolist(), n]
    for start, stop in itertools.pairwise(breaks):
        first, last = int(ids[start]), int(ids[stop - 1])
        generator = _stream.at(seed, purpose, first * blocks)
        if last - first == stop - start - 1:
            generator.random(out=words[start:stop])
        else:
            every = generator.random((last - first + 1) * wide).reshape(-1, wide)
            every.take(ids[start:stop] - first, axis=0, out=words[start:stop])
    return words[:, :width]


def derived(rows: NDArray[Any], attempt: int, width: int) -> NDArray[np.float64]:
    """More uniforms for rows that have used up theirs, by hashing what they had.

    Args:
        rows: float64 in [0, 1) or integers, (n, w), w >= 1.
        attempt: which set, 0 <= attempt < 2**32.
        width: uniforms per row.

    Returns:
        float64 (n, width) in [0, 1). Row i is a pure function of (rows[i], attempt, width).
    """
    if rows.dtype.kind == "f":
        words = np.rint(rows * 2.0**53).astype(np.uint64)
    else:
        words = rows.astype(np.uint64)
    with np.errstate(over="ignore"):
        places = (np.arange(1, words.shape[1] + 1, dtype=np.uint64)) * _ODD
        state = np.bitwise_xor.reduce(_mixed(words + places), axis=1)
        state = _mixed(state + np.uint64(attempt + 1) * _OTHER)
        columns = np.arange(1, width + 1, dtype=np.uint64) * _ODD
        drawn = _mixed(state[:, None] + columns)
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every bit of the input changes half of the output."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
