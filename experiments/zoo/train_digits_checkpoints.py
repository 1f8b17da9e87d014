"""Trains a smaller digits denoiser and keeps what a run leaves behind: raw weights, every so often.

    python -m searchlab.experiments.zoo.train_digits_checkpoints --out runs/digits_checkpoints

One thread, two minutes. The rate stays constant to the end, as in the method's setting (a run that
goes on and saves), so that single checkpoints are noisy. The files hold float16; the same seed,
machine and library versions give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from searchlab.errors import ConfigError
from searchlab.experiments.zoo.digits_networks import DigitsDenoiserNet
from searchlab.experiments.zoo.train_digits import (
    TrainingSettings,
    augment,
    denoising_loss,
    denoising_losses,
    digits_split,
)

__all__ = ["CheckpointSettings", "main", "train"]


@dataclass(frozen=True)
class CheckpointSettings:
    """Every value that shapes the checkpoints.

    Attributes:
        width: Hidden units of a block.
        blocks: Residual blocks.
        steps: Optimiser steps.
        every: Steps between two saved checkpoints.
        count: How many are saved, the last one at the last step.
        seed: Of initial weights, batches, noise, augmentation and dropout.
        batch: Rows of one step.
        learning_rate: After a warm-up of 200 steps, to the end.
        dropout: Share of hidden units that training drops.
    """

    width: int = 96
    blocks: int = 3
    steps: int = 16000
    every: int = 500
    count: int = 16
    seed: int = 0
    batch: int = 128
    learning_rate: float = 2e-3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "steps", "every", "count", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.steps < self.every * self.count:
            raise ConfigError(
                f"{self.count} checkpoints every {self.every} steps do not fit into {self.steps}"
            )

    @property
    def saved(self) -> list[int]:
        """The steps after which a checkpoint is saved, ascending."""
        return [self.steps - self.every * back for back in reversed(range(self.count))]


def train(settings: CheckpointSettings, out: Path) -> dict[str, Any]:
    """Trains the denoiser and writes its checkpoints and their card into a folder.

    Args:
        settings: Every value that shapes the weights.
        out: Folder, made if it is missing; files of the same names are replaced.

    Returns:
        The card.
    """
    shared = TrainingSettings()
    train_x, train_y, test_x, test_y = digits_split(shared)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    net = DigitsDenoiserNet(dropout=settings.dropout, width=settings.width, blocks=settings.blocks)
    optimiser = torch.optim.AdamW(
        net.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=shared.weight_decay,
        foreach=True,
    )
    saved: dict[str, dict[str, Any]] = {}
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for step in range(settings.steps):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * min(1.0, (step + 1) / 200)
        rows = torch.randint(len(train_x), (settings.batch,), generator=generator)
        x, augmentation = augment(train_x[rows], shared.augmented_share, generator)
        dropped = torch.rand(settings.batch, generator=generator) < shared.no_class_share
        labels = train_y[rows].masked_fill(dropped, -1)
        sigma = torch.randn(settings.batch, generator=generator) * shared.log_sigma_sd
        loss = denoising_loss(
            net,
            x,
            labels,
            augmentation,
            sigma=(sigma + shared.log_sigma_mean).exp(),
            noise=torch.randn(x.shape, generator=generator),
            sigma_data=shared.sigma_data,
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        if step + 1 in settings.saved:
            losses = denoising_losses(net, test_x, test_y, shared)
            net.train()
            name = f"step_{step + 1:06d}.safetensors"
            saved[name] = {
                "step": step + 1,
                "sha256": _write(net.state_dict(), step + 1, out / name),
                "test_loss": losses,
            }
            print(f"{name} {losses} {time.perf_counter() - started:.0f} s", flush=True)
    card = {
        "format": 1,
        "data": "scikit-learn load_digits, x = images / 8 - 1",
        "settings": asdict(settings),
        "training": asdict(shared),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
        "checkpoints": saved,
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return card


def _write(state: Mapping[str, Tensor], step: int, path: Path) -> str:
    """Stores the weights as float16 safetensors; returns the sha256 of the file."""
    tensors = {name: value.half().contiguous() for name, value in state.items()}
    data = save(tensors, metadata={"format": "pt", "step": str(step)})
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Command line: trains the denoiser and writes its checkpoints into `--out`."""
    defaults = CheckpointSettings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and card")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--every", type=int, default=defaults.every)
    parser.add_argument("--count", type=int, default=defaults.count)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = CheckpointSettings(
        steps=options.steps, every=options.every, count=options.count, seed=options.seed
    )
    train(settings, options.out)


if __name__ == "__main__":
    main()
