"""Counter-based uniforms: every job id owns a fixed block, so a row never depends on its batch."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError

__all__ = ["FITS", "PARENTS", "POOL", "BOOTSTRAP", "uniforms", "uniforms_of"]

# Purposes 0-99 are proposals: the number is the redraw attempt.
PARENTS = 100
POOL = 200
FITS = 300
BOOTSTRAP = 400

_WORDS_PER_BLOCK = 4  # Philox4x64 makes four 64-bit words per counter step


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
    generator = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64))
    generator.advance(first_id * blocks)
    words = np.random.Generator(generator).random(n * blocks * _WORDS_PER_BLOCK)
    return words.reshape(n, blocks * _WORDS_PER_BLOCK)[:, :width]


def uniforms_of(seed: int, purpose: int, ids: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    """Uniforms of increasing ids that need not be neighbours; rows are those of `uniforms`."""
    n = len(ids)
    if n == 0 or int(ids[-1]) - int(ids[0]) + 1 == n:
        return uniforms(seed, purpose, int(ids[0]) if n else 0, n, width)
    blocks = -(-width // _WORDS_PER_BLOCK)
    philox = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64))
    generator = np.random.Generator(philox)
    words = np.empty((n, blocks * _WORDS_PER_BLOCK))
    breaks = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), n]
    place = 0  # the id that the generator stands at
    for start, stop in itertools.pairwise(breaks):
        first = int(ids[start])
        philox.advance((first - place) * blocks)
        generator.random(out=words[start:stop])
        place = first + stop - start
    return words[:, :width]
