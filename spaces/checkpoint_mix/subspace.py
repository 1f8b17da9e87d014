"""The Gram matrix of a bank's checkpoints, from which their main directions follow."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from searchlab.spaces.checkpoint_mix.bank import CheckpointBank

__all__ = ["gram_matrix"]


def gram_matrix(bank: CheckpointBank) -> NDArray[np.float64]:
    """Products of the checkpoints' differences from the newest, (K, K) float64; one read.

    Checkpoints that are not finite count as zero where they are not.
    """
    k = len(bank)
    total = torch.zeros((k, k), dtype=torch.float64)
    for block in range(len(bank.layout.blocks)):
        for _, tile in bank.walk(block):
            rows = tile.to(torch.float64 if tile.dtype is torch.float64 else torch.float32)
            if bank.delta is None:
                rows = rows - rows[-1]
            total += (rows @ rows.T).double()
    out: NDArray[np.float64] = total.numpy()
    return out
