"""The bundled problems of checkpoint mixing: digits, and a flow that trains in seconds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from searchlab.errors import ConfigError
from searchlab.evaluators.distances import FrechetReference
from searchlab.evaluators.generated_samples import NoiseLevelLoss, SampleScore
from searchlab.evaluators.noise import noise_bank
from searchlab.evaluators.sampling import SampleDistance
from searchlab.evaluators.trajectories import PrefixTree
from searchlab.experiments.zoo.digits import (
    DigitsDenoiser,
    digits_images,
    load_digits_classifier,
    reference_features,
)
from searchlab.experiments.zoo.digits_networks import AUGMENTATIONS, SIZE, DigitsDenoiserNet
from searchlab.spaces.solver_schedule.grids import GRIDS
from searchlab.spaces.solver_schedule.noise_schedule import Edm
from searchlab.spaces.solver_schedule.points import dpmpp_3m
from searchlab.spaces.solver_schedule.table import compile_schedule

__all__ = [
    "DIGITS_CHECKPOINTS",
    "Ring",
    "digits_loss",
    "digits_score",
    "ring_score",
    "small_digits",
    "train_ring",
]

DIGITS_CHECKPOINTS = Path(__file__).parent / "zoo" / "digits_checkpoints"
"""Sixteen checkpoints of `train_digits_checkpoints.py`, float16."""

SIGMA_DATA = 0.75
SIGMA_MAX = 80.0


# -- digits ---------------------------------------------------------------------------------------


def _digits_net(state: Mapping[str, Tensor], held: list[DigitsDenoiserNet]) -> DigitsDenoiserNet:
    """The small network with these weights; made once, of the size that the weights have."""
    if not held:
        blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        width = len(state["entry.bias"])
        held.append(DigitsDenoiserNet(dropout=0.0, width=width, blocks=blocks))
        held[0].eval().requires_grad_(False)
    held[0].load_state_dict({name: value.float() for name, value in state.items()})
    return held[0]


def small_digits(path: Path | None = None) -> DigitsDenoiser:
    """One of the bundled checkpoints as a model of its own; None = the last one."""
    file = max(DIGITS_CHECKPOINTS.glob("*.safetensors")) if path is None else path
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    net = _digits_net(load_file(file), [])
    return DigitsDenoiser(net, digest, sigma_data=SIGMA_DATA, sigma_max=SIGMA_MAX)


class DigitsSampler:
    """Samples digits with few model calls: third-order multistep solver on Karras' grid."""

    def __init__(self, calls: int) -> None:
        if not 3 <= calls <= 100:
            raise ConfigError(f"calls {calls}; allowed: 3 to 100")
        self.calls = calls
        noise = Edm()
        times = GRIDS["karras7"](noise, calls, noise.start, noise.end)
        self._table = compile_schedule(dpmpp_3m(times, noise))
        self._held: list[DigitsDenoiserNet] = []

    def __call__(self, state: Mapping[str, Tensor], start: Tensor) -> Tensor:
        net = _digits_net(state, self._held)
        denoise = DigitsDenoiser(net, "", sigma_data=SIGMA_DATA, sigma_max=SIGMA_MAX)
        tree = PrefixTree(denoise, start * SIGMA_MAX, remember=False)
        return tree.run([self._table])[0]


def digits_score(
    *,
    calls: int = 8,
    samples: tuple[int, ...] = (1000,),
    held_out: int = 4000,
    objective: Any = "fd",
    seed: int = 0,
) -> SampleScore:
    """Fréchet (or kernel) distance of generated digits to all real ones."""
    classifier = load_digits_classifier()
    rows = reference_features(classifier)
    distance = SampleDistance(classifier, FrechetReference.from_features(rows), rows)
    described = {"model": "digits denoiser", "solver": f"3m karras7 {calls}", "label": None}
    return SampleScore(
        DigitsSampler(calls),
        (SIZE,),
        distance,
        described,
        objective=objective,
        samples=samples,
        held_out=held_out,
        seed=seed,
    )


class _DigitsLoss:
    """Error of the raw output at one noise level, with EDM's own weights."""

    def __init__(self) -> None:
        self._held: list[DigitsDenoiserNet] = []

    def __call__(
        self, state: Mapping[str, Tensor], data: Tensor, noise: Tensor, level: float
    ) -> Tensor:
        net = _digits_net(state, self._held)
        n = len(data)
        total = math.hypot(level, SIGMA_DATA)
        noisy = data + level * noise
        embedded = net.embed(
            torch.full((n,), math.log(level) / 4),
            torch.full((n,), -1),
            torch.zeros(n, AUGMENTATIONS),
        )
        raw = net(noisy / total, net.modulate(embedded))
        target = (data - SIGMA_DATA**2 / total**2 * noisy) / (level * SIGMA_DATA / total)
        out: Tensor = ((raw - target) ** 2).mean(dim=1)
        return out


def digits_loss(
    *, samples: tuple[int, ...] = (256,), held_out: int = 512, seed: int = 0
) -> NoiseLevelLoss:
    """Denoising loss on real digits at eight noise levels."""
    levels = tuple(float(v) for v in torch.logspace(-1.7, 0.6, 8).tolist())
    return NoiseLevelLoss(
        _DigitsLoss(),
        digits_images()[0],
        levels,
        {"model": "digits denoiser", "data": "scikit-learn digits"},
        samples=samples,
        held_out=held_out,
        seed=seed,
    )


# -- a ring of Gaussians --------------------------------------------------------------------------

_MODES, _RADIUS, _SPREAD = 8, 1.5, 0.12
_HIDDEN = 64
_FEATURES = 32


class Ring(nn.Module):
    """Velocity of a flow from noise to Gaussians on a ring: (x, t) -> (B, 2); 4,994 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(10, _HIDDEN),
            nn.SiLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.SiLU(),
            nn.Linear(_HIDDEN, 2),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * (math.pi * torch.tensor([1.0, 2.0, 4.0, 8.0]))
        out: Tensor = self.net(torch.cat([x, angles.sin(), angles.cos()], dim=1))
        return out


def _ring_data(n: int, generator: torch.Generator) -> Tensor:
    modes = torch.randint(_MODES, (n,), generator=generator) * (2 * math.pi / _MODES)
    centres = _RADIUS * torch.stack([modes.cos(), modes.sin()], dim=1)
    return centres + _SPREAD * torch.randn(n, 2, generator=generator)


def train_ring(
    folder: Path, *, seed: int = 0, steps: int = 3000, after: int = 1000, every: int = 50
) -> list[Path]:
    """Trains the flow and saves a checkpoint every so often once `after` steps are done.

    Args:
        folder: exists; gets `step_NNNNN.safetensors`.
        seed: of weights, data and noise.
        steps, after, every: the defaults give 40 checkpoints in a few seconds.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Ring()
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    paths = []
    for step in range(1, steps + 1):
        x = _ring_data(64, generator)
        z = torch.randn(64, 2, generator=generator)
        t = torch.rand(64, generator=generator)
        loss = functional.mse_loss(net((1 - t)[:, None] * z + t[:, None] * x, t), x - z)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step > after and (step - after) % every == 0:
            paths.append(folder / f"step_{step:05d}.safetensors")
            save_file({k: v.detach().clone() for k, v in net.state_dict().items()}, paths[-1])
    return paths


class _RingSampler:
    """Six Euler steps from noise to data."""

    def __init__(self, steps: int = 6) -> None:
        self.steps = steps
        self._net = Ring().requires_grad_(False)

    def __call__(self, state: Mapping[str, Tensor], start: Tensor) -> Tensor:
        self._net.load_state_dict(dict(state))
        x = start
        for step in range(self.steps):
            t = torch.full((len(x),), step / self.steps)
            x = x + self._net(x, t) / self.steps
        return x


@dataclass(frozen=True)
class _RandomFeatures:
    """cos(x F + b) with fixed random F (2, 32) and b: enough to tell point clouds apart."""

    model_hash: str = "random Fourier features 32, scale 2, Philox 77"

    def __call__(self, x: Tensor) -> Tensor:
        table = torch.from_numpy(noise_bank(77, 0, 3, (_FEATURES,)))
        phase = 2 * math.pi * (0.5 + 0.5 * torch.erf(table[2] / math.sqrt(2)))
        return torch.cos(x @ (2 * table[:2]) + phase)


def ring_score(
    *, samples: tuple[int, ...] = (2000,), held_out: int = 20000, seed: int = 0
) -> SampleScore:
    """Fréchet distance of samples of the ring flow, by random Fourier features."""
    features = _RandomFeatures()
    rows = features(_ring_data(50000, torch.Generator().manual_seed(5)))
    distance = SampleDistance(features, FrechetReference.from_features(rows))
    described = {"model": "ring flow", "solver": "euler 6"}
    return SampleScore(
        _RingSampler(),
        (2,),
        distance,
        described,
        samples=samples,
        held_out=held_out,
        seed=seed,
    )
