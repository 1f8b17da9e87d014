"""The two small networks of the digits zoo: the denoiser's inner network and the classifier."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["AUGMENTATIONS", "CLASSES", "SIDE", "SIZE", "DigitsClassifierNet", "DigitsDenoiserNet"]

SIDE = 8
SIZE = SIDE * SIDE
CLASSES = 10
AUGMENTATIONS = 5
"""Rotation, two log-scales and two shifts; all zero for the data as it is."""

_WIDTH = 256
_BLOCKS = 3
_NOISE_FEATURES = 32
_CLASS_FEATURES = 64
_CONDITION = 64
_FEATURES = 32


class _ResidualBlock(nn.Module):
    """x + dense(dropout(silu(dense(scale * norm(x) + shift)))); scale, shift from the condition."""

    def __init__(self, width: int, condition: int, dropout: float) -> None:
        super().__init__()
        self.modulation = nn.Linear(condition, 2 * width)
        self.inner = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(width, width)
        # A block that starts as the identity lets the learning rate be high from the first step.
        for layer in (self.modulation, self.outer):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=-1)
        hidden = functional.layer_norm(x, x.shape[-1:])
        hidden = torch.addcmul(shift, hidden, 1 + scale)
        hidden = functional.silu(self.inner(hidden))
        change: Tensor = self.outer(self.dropout(hidden))
        return x + change


class DigitsDenoiserNet(nn.Module):
    """The raw network F of the EDM preconditioning, on flat 8x8 images.

    Args:
        dropout: Share of hidden units that training drops.
        width: Hidden units of a block.
        blocks: Residual blocks.
    """

    frequencies: Tensor

    def __init__(self, *, dropout: float = 0.1, width: int = _WIDTH, blocks: int = _BLOCKS) -> None:
        super().__init__()
        half = _NOISE_FEATURES // 2
        frequencies = torch.exp(torch.linspace(math.log(0.5), math.log(12.0), half))
        self.register_buffer("frequencies", frequencies)
        # One more row than classes: the last one stands for "no class".
        self.classes = nn.Embedding(CLASSES + 1, _CLASS_FEATURES)
        self.condition = nn.Linear(_NOISE_FEATURES + _CLASS_FEATURES + AUGMENTATIONS, _CONDITION)
        self.entry = nn.Linear(SIZE, width)
        self.blocks = nn.ModuleList(
            _ResidualBlock(width, _CONDITION, dropout) for _ in range(blocks)
        )
        self.exit = nn.Linear(width, SIZE)
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(self.exit.bias)

    def embed(self, c_noise: Tensor, labels: Tensor, augmentation: Tensor) -> Tensor:
        """The condition vector.

        Args:
            c_noise: (B,) ln(sigma)/4.
            labels: (B,) int64, 0..9, or -1 for no class.
            augmentation: (B, 5), zeros for the data as it is.

        Returns:
            (B, 64) condition.
        """
        angles = c_noise[:, None] * self.frequencies
        rows = torch.where(labels < 0, torch.full_like(labels, CLASSES), labels)
        parts = (angles.sin(), angles.cos(), self.classes(rows), augmentation)
        condition: Tensor = functional.silu(self.condition(torch.cat(parts, dim=-1)))
        return condition

    def modulate(self, condition: Tensor) -> list[Tensor]:
        """Scales and shifts of each block: (B, 64) condition to (B, 2 width) each."""
        return [cast(_ResidualBlock, block).modulation(condition) for block in self.blocks]

    def forward(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        """The raw output.

        Args:
            x: (B, 64) scaled input.
            modulations: From `modulate`, each (B, 2 width), or of one row for all rows.

        Returns:
            (B, 64).
        """
        hidden = self.entry(x)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            hidden = block(hidden, modulation)
        hidden = functional.silu(functional.layer_norm(hidden, hidden.shape[-1:]))
        raw: Tensor = self.exit(hidden)
        return raw


class DigitsClassifierNet(nn.Module):
    """Two convolutions and two dense layers; the first dense layer gives the features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.dense = nn.Linear(32 * (SIDE // 2) ** 2, _FEATURES)
        self.head = nn.Linear(_FEATURES, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Unscaled features: (B, 64) images in [-1, 1] to (B, 32)."""
        hidden = functional.silu(self.first(x.reshape(-1, 1, SIDE, SIDE)))
        hidden = functional.silu(self.second(hidden))
        return functional.silu(self.dense(hidden.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits: (B, 64) images to (B, 10)."""
        logits: Tensor = self.head(self.features(x))
        return logits
