"""Trains the digits denoiser and classifier and writes their weights and card.

    python -m searchlab.experiments.zoo.train_digits --out runs/digits

One thread, ten minutes. The same seed, machine and library versions give the same files.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import sklearn
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from searchlab.errors import ConfigError
from searchlab.experiments.zoo.digits import digits_images
from searchlab.experiments.zoo.digits_networks import (
    AUGMENTATIONS,
    SIDE,
    DigitsClassifierNet,
    DigitsDenoiserNet,
)

__all__ = [
    "TrainingSettings",
    "augment",
    "denoising_loss",
    "denoising_losses",
    "digits_split",
    "main",
    "train",
]


@dataclass(frozen=True)
class TrainingSettings:
    """Every value that shapes the weights.

    Attributes:
        steps: Optimiser steps of the denoiser.
        seed: Seed of initial weights, batches, noise, augmentation and dropout.
        split_seed: Seed of the train/test split.
        test_rows: Digits kept out of training.
        batch: Rows of one denoiser step.
        learning_rate: Peak rate: a short warm-up, constant to `constant_share`, then cosine to 1 %.
        constant_share: Share of the steps before the rate falls.
        warm_up: Steps of the linear warm-up.
        weight_decay: Of AdamW.
        ema_decay: Of the averaged weights, the only ones stored.
        sigma_data: Standard deviation that the preconditioning assumes for the data.
        log_sigma_mean: Mean of ln(sigma) in training.
        log_sigma_sd: Standard deviation of ln(sigma) in training.
        no_class_share: Share of rows trained without their class.
        augmented_share: Share of rows that are rotated, scaled and shifted.
        classifier_epochs: Passes over the training digits by the classifier.
        classifier_noise: Standard deviation of the noise on the classifier's input.
    """

    steps: int = 26000
    seed: int = 0
    split_seed: int = 123
    test_rows: int = 200
    batch: int = 256
    learning_rate: float = 2e-3
    constant_share: float = 0.3
    warm_up: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.9995
    sigma_data: float = 0.75
    log_sigma_mean: float = -0.6
    log_sigma_sd: float = 1.3
    no_class_share: float = 0.4
    augmented_share: float = 0.7
    classifier_epochs: int = 40
    classifier_noise: float = 0.15

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "test_rows", "classifier_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


def digits_split(settings: TrainingSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels; images are (n, 64) in [-1, 1]."""
    images, labels = digits_images()
    order = np.random.default_rng(settings.split_seed).permutation(len(images))
    test, train = order[: settings.test_rows], order[settings.test_rows :]
    return images[train], labels[train], images[test], labels[test]


def augment(x: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rotates, scales and shifts a share of the rows; also returns the (B, 5) parameters used."""
    count = len(x)
    spread = torch.tensor([0.12, 0.08, 0.08, 0.15, 0.15])
    parameters = torch.randn(count, AUGMENTATIONS, generator=generator) * spread
    parameters *= torch.rand(count, 1, generator=generator) < share
    angle, log_x, log_y, shift_x, shift_y = parameters.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack((cos * log_x.exp(), -sin * log_y.exp(), shift_x), dim=1),
        torch.stack((sin * log_x.exp(), cos * log_y.exp(), shift_y), dim=1),
    )
    grid = functional.affine_grid(
        torch.stack(rows, dim=1), [count, 1, SIDE, SIDE], align_corners=False
    )
    # The background is -1: moved to 0 first, so that what enters from outside is background too.
    moved = functional.grid_sample((x + 1).reshape(count, 1, SIDE, SIDE), grid, align_corners=False)
    return moved.flatten(1) - 1, parameters / spread


def denoising_loss(
    net: DigitsDenoiserNet,
    x: Tensor,
    labels: Tensor,
    augmentation: Tensor,
    *,
    sigma: Tensor,
    noise: Tensor,
    sigma_data: float,
) -> Tensor:
    """Mean squared error of the raw network output, the EDM loss with its own weights.

    Source: arXiv 2206.00364, eq. 7 and 8.
    """
    total = (sigma**2 + sigma_data**2).sqrt()[:, None]
    wide = sigma[:, None]
    noisy = x + wide * noise
    c_skip = sigma_data**2 / total**2
    c_out = wide * sigma_data / total
    condition = net.embed(sigma.log() / 4, labels, augmentation)
    raw = net(noisy / total, net.modulate(condition))
    target = (x - c_skip * noisy) / c_out
    return functional.mse_loss(raw, target)


def _rate(step: int, settings: TrainingSettings) -> float:
    """Learning rate at a step, as a share of the peak."""
    warm = min(1.0, (step + 1) / settings.warm_up)
    start = settings.constant_share * settings.steps
    position = max(0.0, (step - start) / max(1.0, settings.steps - start))
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * position)))


@torch.no_grad()
def denoising_losses(
    net: DigitsDenoiserNet, x: Tensor, labels: Tensor, settings: TrainingSettings
) -> dict[str, float]:
    """Loss without and with the class, on fixed noise and without augmentation."""
    net.eval()
    generator = torch.Generator().manual_seed(20240)
    draws = max(1, 12800 // len(x))
    x, labels = x.repeat(draws, 1), labels.repeat(draws)
    sigma = torch.randn(len(x), generator=generator) * settings.log_sigma_sd
    sigma = (sigma + settings.log_sigma_mean).exp()
    noise = torch.randn(x.shape, generator=generator)
    losses = {}
    for name, given in (("no_class", torch.full_like(labels, -1)), ("with_class", labels)):
        loss = denoising_loss(
            net,
            x,
            given,
            torch.zeros(len(x), AUGMENTATIONS),
            sigma=sigma,
            noise=noise,
            sigma_data=settings.sigma_data,
        )
        losses[name] = round(float(loss), 5)
    return losses


def train_denoiser(settings: TrainingSettings) -> tuple[DigitsDenoiserNet, dict[str, Any]]:
    """Trains the denoiser; returns the averaged weights and the figures for the card."""
    train_x, train_y, test_x, test_y = digits_split(settings)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    net = DigitsDenoiserNet()
    average = copy.deepcopy(net).requires_grad_(False)
    averaged: list[Tensor] = list(average.parameters())
    trained: list[Tensor] = list(net.parameters())
    optimiser = torch.optim.AdamW(
        net.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=settings.weight_decay,
        foreach=True,
    )
    started, running = time.perf_counter(), 0.0
    for step in range(settings.steps):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * _rate(step, settings)
        rows = torch.randint(len(train_x), (settings.batch,), generator=generator)
        x, augmentation = augment(train_x[rows], settings.augmented_share, generator)
        dropped = torch.rand(settings.batch, generator=generator) < settings.no_class_share
        labels = train_y[rows].masked_fill(dropped, -1)
        sigma = torch.randn(settings.batch, generator=generator) * settings.log_sigma_sd
        loss = denoising_loss(
            net,
            x,
            labels,
            augmentation,
            sigma=(sigma + settings.log_sigma_mean).exp(),
            noise=torch.randn(x.shape, generator=generator),
            sigma_data=settings.sigma_data,
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        # A ramp of the decay keeps the average of a short run from being its initial weights.
        decay = min(settings.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, trained, 1 - decay)
        running += float(loss.detach())
        if (step + 1) % 500 == 0 or step + 1 == settings.steps:
            since = (step % 500) + 1
            seconds = time.perf_counter() - started
            print(f"step {step + 1} loss {running / since:.4f} {seconds:.0f} s", flush=True)
            last, running = running / since, 0.0
    figures = {
        "training_loss_last_steps": round(last, 5),
        "train_loss": denoising_losses(average, train_x, train_y, settings),
        "test_loss": denoising_losses(average, test_x, test_y, settings),
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": sum(p.numel() for p in average.parameters()),
    }
    return average.eval(), figures


def train_classifier(
    settings: TrainingSettings,
) -> tuple[DigitsClassifierNet, float, dict[str, Any]]:
    """Trains the classifier; returns it, its feature scale and the figures for the card.

    The scale makes the trace of the reference covariance, over all digits, equal to the number of
    features, so that distances of different classifiers have the same unit.
    """
    train_x, train_y, test_x, test_y = digits_split(settings)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed + 2)
    net = DigitsClassifierNet()
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=settings.weight_decay)
    batch = 64
    steps = settings.classifier_epochs * (len(train_x) // batch)
    step = 0
    for _ in range(settings.classifier_epochs):
        order = torch.randperm(len(train_x), generator=generator)
        for rows in order[: len(order) // batch * batch].reshape(-1, batch):
            optimiser.param_groups[0]["lr"] = 2e-3 * (0.01 + 0.99 * (1 - step / steps))
            x, _ = augment(train_x[rows], settings.augmented_share, generator)
            noisy = x + settings.classifier_noise * torch.randn(x.shape, generator=generator)
            loss = functional.cross_entropy(net(noisy), train_y[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            step += 1
    net.eval().requires_grad_(False)
    features = net.features(torch.cat((train_x, test_x))).double()
    scale = math.sqrt(features.shape[1] / float(torch.cov(features.T).trace()))
    figures = {
        "train_accuracy": round(float((net(train_x).argmax(1) == train_y).double().mean()), 5),
        "test_accuracy": round(float((net(test_x).argmax(1) == test_y).double().mean()), 5),
        "parameters": sum(p.numel() for p in net.parameters()),
    }
    return net, scale, figures


def _write(net: nn.Module, path: Path) -> str:
    """Stores the weights as float32 safetensors; returns the sha256 of the file."""
    tensors = {name: value.contiguous() for name, value in net.state_dict().items()}
    data = save(tensors)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def train(settings: TrainingSettings, out: Path) -> dict[str, Any]:
    """Trains both models and writes two weights files and their card into a folder.

    Args:
        settings: Every value that shapes the weights.
        out: Folder, made if it is missing; files there are replaced.

    Returns:
        The card.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        classifier, scale, classifier_figures = train_classifier(settings)
        print(f"classifier {classifier_figures}", flush=True)
        denoiser, denoiser_figures = train_denoiser(settings)
        print(f"denoiser {denoiser_figures}", flush=True)
    finally:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    mean = digits_images()[0].double().mean(0)
    card: dict[str, Any] = {
        "format": 1,
        "data": "scikit-learn load_digits, x = images / 8 - 1",
        "data_mean": [round(float(value), 9) for value in mean],
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
            "safetensors": safetensors.__version__,
        },
        "denoiser": {
            "file": "digits_edm.safetensors",
            "sha256": _write(denoiser, out / "digits_edm.safetensors"),
            "sigma_data": settings.sigma_data,
            "sigma_max": 80.0,
            "figures": denoiser_figures,
        },
        "classifier": {
            "file": "digits_classifier.safetensors",
            "sha256": _write(classifier, out / "digits_classifier.safetensors"),
            "feature_scale": scale,
            "figures": classifier_figures,
        },
    }
    (out / "digits.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def main(arguments: list[str] | None = None) -> None:
    """Command line: trains both models and writes three files into `--out`."""
    defaults = TrainingSettings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and card")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="denoiser steps")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = parser.parse_args(arguments)
    train(TrainingSettings(steps=options.steps, seed=options.seed), options.out)


if __name__ == "__main__":
    main()
