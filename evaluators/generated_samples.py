"""Scores of generative models by their weights: distance of samples to data, and denoising loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import ConfigError, EvaluationError
from searchlab.evaluator import Fidelity, Objective, Reproducibility
from searchlab.evaluators.distances import frechet_distances, kid
from searchlab.evaluators.noise import noise_bank, split_seed
from searchlab.evaluators.sampling import KID_BLOCK, SampleDistance, split_of

__all__ = ["NoiseLevelLoss", "SampleScore"]


@dataclass
class SampleScore:
    """Distance between what mixed weights generate and the data, on noise shared by all.

    Start noise is a pure function of (seed, split, replicate, sample), so a candidate's value does
    not depend on what is scored along with it, and the first n samples of more are the n samples.
    Distances of different sample counts are not comparable: the search uses one count per fidelity,
    the other splits `held_out`.

    Args:
        generate: (state, start noise (n, *shape)) -> samples (n, ...), with few model calls.
        shape: of one start state.
        distance: feature extractor and the data's features.
        identity: JSON that determines `generate`.
        objective: "fd" (Fréchet) or "kid" (unbiased kernel distance).
        samples: per fidelity, ascending; the last is the truth of the search.
        held_out: on the selection and report splits.
        seed: of the noise.
    """

    generate: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    shape: tuple[int, ...]
    distance: SampleDistance
    described: Mapping[str, Any]
    objective: Literal["fd", "kid"] = "fd"
    samples: tuple[int, ...] = (2000,)
    held_out: int = 10000
    seed: int = 0
    reproducibility: Reproducibility = "exact"

    def __post_init__(self) -> None:
        if self.objective not in ("fd", "kid"):
            raise ConfigError(f"objective {self.objective!r}; allowed: fd, kid")
        if self.objective == "kid" and self.distance.rows is None:
            raise ConfigError("objective 'kid' needs the data's features")
        if not self.samples or list(self.samples) != sorted(set(self.samples)):
            raise ConfigError(f"samples {self.samples}; allowed: rising numbers")
        if min(self.samples[0], self.held_out) < 2:
            raise ConfigError("samples and held_out are 2 or more")
        self._start: tuple[tuple[int, int], Tensor] | None = None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return (Objective(self.objective, "min"),)

    @property
    def fidelities(self) -> tuple[Fidelity, ...]:
        return tuple(Fidelity(f"{n} samples", n / self.samples[-1]) for n in self.samples)

    def identity(self) -> Mapping[str, Any]:
        return {
            "generate": dict(self.described),
            "objective": self.objective,
            "samples": list(self.samples),
            "held_out": self.held_out,
            "seed": self.seed,
            "features": self.distance.features.model_hash,
            "reference": self.distance.reference.digest,
        }

    def start(self, replicate: int, n: int) -> Tensor:
        """The first n start states of a replicate, (n, *shape) float32."""
        # Kept for the candidates that follow: drawing costs more than sampling a small network.
        if self._start is None or self._start[0] != (replicate, n):
            split, number = split_of(replicate)
            noise = noise_bank(split_seed(self.seed, split, number), 0, n, self.shape)
            self._start = (replicate, n), torch.from_numpy(noise)
        return self._start[1]

    def score(
        self, state: dict[str, Tensor], fidelity: int, replicate: int
    ) -> tuple[Sequence[float], None]:
        n = self.samples[fidelity] if split_of(replicate)[0] == "search" else self.held_out
        with torch.no_grad():
            made = self.generate(state, self.start(replicate, n))
            if not torch.isfinite(made).all():
                raise EvaluationError("the samples are not finite")
            features = self.distance.features(made)
        if self.objective == "fd":
            return [float(frechet_distances(features[None], self.distance.reference)[0])], None
        rows = self.distance.rows
        assert rows is not None
        return [kid(features, rows, block=min(KID_BLOCK, n, len(rows)))[0]], None


@dataclass
class NoiseLevelLoss:
    """Weighted squared error of a denoiser at fixed noise levels, on fixed noise.

    Every replicate takes the next rows of its split's data, with noise of their own; the splits
    share no rows. Items are the rows' losses, so that paired tests are possible.

    Args:
        loss: (state, data (n, *shape), noise (n, *shape), level) -> losses (n,).
        data: (N, *shape) float32; dealt out evenly to search, selection and report.
        levels: noise levels; the score is the mean over them.
        described: JSON that determines `loss` and `data`.
        samples: rows per level and fidelity, ascending.
        seed: of the noise.
    """

    loss: Callable[[Mapping[str, Tensor], Tensor, Tensor, float], Tensor]
    data: Tensor
    levels: tuple[float, ...]
    described: Mapping[str, Any]
    samples: tuple[int, ...] = (256,)
    held_out: int = 1024
    seed: int = 0
    reproducibility: Reproducibility = "exact"

    objectives = (Objective("loss", "min"),)

    def __post_init__(self) -> None:
        if not self.levels or not all(np.isfinite(self.levels)):
            raise ConfigError(f"levels {self.levels}; allowed: one or more finite numbers")
        if not self.samples or list(self.samples) != sorted(set(self.samples)):
            raise ConfigError(f"samples {self.samples}; allowed: rising numbers")
        if min(self.samples[0], self.held_out) < 1 or len(self.data) < 3:
            raise ConfigError("samples and held_out are 1 or more, data rows 3 or more")

    @property
    def fidelities(self) -> tuple[Fidelity, ...]:
        return tuple(Fidelity(f"{n} rows", n / self.samples[-1]) for n in self.samples)

    def identity(self) -> Mapping[str, Any]:
        return {
            "loss": dict(self.described),
            "levels": list(self.levels),
            "samples": list(self.samples),
            "held_out": self.held_out,
            "seed": self.seed,
        }

    def score(
        self, state: dict[str, Tensor], fidelity: int, replicate: int
    ) -> tuple[Sequence[float], NDArray[np.floating[Any]]]:
        split, number = split_of(replicate)
        n = self.samples[fidelity] if split == "search" else self.held_out
        own = self.data[("search", "selection", "report").index(split) :: 3]
        rows = own[(torch.arange(n) + number * n) % len(own)]
        total = torch.zeros(n, dtype=torch.float64)
        with torch.no_grad():
            for place, level in enumerate(self.levels):
                seed = split_seed(self.seed, split, number * len(self.levels) + place)
                noise = torch.from_numpy(noise_bank(seed, 0, n, tuple(self.data.shape[1:])))
                total += self.loss(state, rows, noise, level).double()
        items = (total / len(self.levels)).numpy()
        return [float(items.mean())], items.astype(np.float32)
