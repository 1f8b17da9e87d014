"""A small trained diffusion model of scikit-learn's 8x8 digits, and a classifier to judge it.

The weights lie beside this file with a card (`digits.json`) that holds their hashes, how they were
trained and how well they do; `train_digits.py` writes all three. Everything runs in float32 on the
CPU. With one thread a row of a result does not depend on the other rows of the call.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor, nn

from searchlab.errors import DataError, EvaluationError
from searchlab.experiments.zoo.digits_networks import (
    AUGMENTATIONS,
    CLASSES,
    SIZE,
    DigitsClassifierNet,
    DigitsDenoiserNet,
)

__all__ = [
    "DigitsClassifier",
    "DigitsDenoiser",
    "data_mean",
    "digits_images",
    "load_digits_classifier",
    "load_digits_denoiser",
    "reference_features",
]

_CARD = "digits.json"
_FORMAT = 1
# Matrix products of a few rows take other kernels, with other rounding, than those of many (seen
# below 4 rows here). Shorter calls are padded, so that a row never depends on how many came along.
_LEAST_ROWS = 16
# Rows per pass: more would leave the cache and are slower.
_MOST_ROWS = 4096
# Conditions of more rows than this on average are run one per pass: one scale and shift for all
# rows of a pass costs less than the larger pass saves.
_OWN_PASS_ROWS = 250


class DigitsDenoiser:
    """Data prediction D(x, sigma) of the digits model, for x = x_0 + sigma * noise.

    Attributes:
        shape: Shape of one sample, (64,): 8x8 pixels in [-1, 1], row by row.
        sigma_data: Standard deviation of the data that the preconditioning assumes.
        sigma_max: Noise level at which sampling starts.
        label: Class 0..9 used when a call gives none, or None for the unconditional model.
        model_hash: sha256 of the weights, followed by the label if there is one.
    """

    shape: tuple[int, ...] = (SIZE,)

    def __init__(
        self,
        network: DigitsDenoiserNet,
        weights_hash: str,
        *,
        sigma_data: float,
        sigma_max: float,
        label: int | None = None,
    ) -> None:
        if label is not None and not 0 <= label < CLASSES:
            raise EvaluationError(f"label is {label}; it must be 0 to {CLASSES - 1} or None")
        self._network = network.eval().requires_grad_(False)
        self.sigma_data = sigma_data
        self.sigma_max = sigma_max
        self.label = label
        self.model_hash = weights_hash if label is None else f"{weights_hash}-{label}"

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, *, labels: Tensor | None = None) -> Tensor:
        """Predicts the clean samples.

        Args:
            x: (B, 64) noisy samples, floating point, CPU.
            sigma: (B,) noise levels, 0 or more; 0 returns the sample.
            labels: (B,) int64 classes 0..9, or -1 for no class; None takes `label` for all rows.

        Returns:
            (B, 64) of the type of x; computed in float32.

        Raises:
            EvaluationError: For shapes that do not fit, or a label or noise level out of range.

        Source: arXiv 2206.00364, eq. 7 and table 1 (EDM preconditioning).
        """
        count = len(x)
        if x.shape != (count, SIZE) or sigma.shape != (count,):
            raise EvaluationError(
                f"x {tuple(x.shape)} and sigma {tuple(sigma.shape)} do not fit; "
                f"(B, {SIZE}) and (B,) are needed"
            )
        if not bool((sigma >= 0).all()):
            raise EvaluationError("a noise level is negative or NaN; it must be 0 or more")
        if labels is None:
            labels = torch.full((count,), -1 if self.label is None else self.label)
        elif labels.shape != (count,) or bool(((labels < -1) | (labels >= CLASSES)).any()):
            raise EvaluationError(
                f"labels {tuple(labels.shape)} do not fit; ({count},) of -1 to {CLASSES - 1}"
            )
        firsts = _firsts(sigma, labels)
        cuts = firsts if count >= _OWN_PASS_ROWS * len(firsts) else [0]
        parts = [
            self._rows(x[start:end], sigma[start:end], labels[start:end])
            for first, after in zip(cuts, [*cuts[1:], count], strict=True)
            for start, end in _passes(first, after)
        ]
        return torch.cat(parts).to(x.dtype) if parts else x.clone()

    def _rows(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        count = len(x)
        x, sigma, labels = (_padded(value) for value in (x.float(), sigma.double(), labels))
        # Factors of a row in float64: cheap, and their rounding cannot depend on its neighbours.
        total = (sigma**2 + self.sigma_data**2).sqrt()
        c_skip = (self.sigma_data**2 / total**2).float()[:, None]
        c_out = (sigma * self.sigma_data / total).float()[:, None]
        c_in = (1 / total).float()[:, None]
        # Samplers call with few conditions, each for many rows in a row: embed every one once.
        firsts = _firsts(sigma, labels)
        noise, label = _padded(sigma[firsts]), _padded(labels[firsts])
        c_noise = (noise.clamp(min=1e-4).log() / 4).float()
        condition = self._network.embed(c_noise, label, torch.zeros(len(c_noise), AUGMENTATIONS))
        modulations = self._network.modulate(condition)
        if len(firsts) == 1:
            modulations = [modulation[:1] for modulation in modulations]
        else:
            lengths = torch.tensor([*firsts[1:], len(x)]) - torch.tensor(firsts)
            rows = torch.arange(len(firsts)).repeat_interleave(lengths)
            modulations = [modulation[rows] for modulation in modulations]
        raw = self._network(x * c_in, modulations)
        prediction: Tensor = c_skip * x + c_out * raw
        return prediction[:count]


class DigitsClassifier:
    """Features for distances, and class logits, of 8x8 digits.

    Attributes:
        model_hash: sha256 of the weights.
        feature_scale: Factor on the features that makes the trace of their covariance over all
            digits equal to their number, 32.
    """

    def __init__(
        self, network: DigitsClassifierNet, weights_hash: str, *, feature_scale: float
    ) -> None:
        # Channels last halves the time of convolutions with so few channels.
        self._network = network.eval().requires_grad_(False)
        self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model_hash = weights_hash
        self.feature_scale = feature_scale

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Scaled features: (B, 64) samples to (B, 32) float32.

        Raises:
            EvaluationError: For another shape.
        """
        return self._apply(x) * self.feature_scale

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Class logits: (B, 64) samples to (B, 10) float32.

        Raises:
            EvaluationError: For another shape.
        """
        features = self._apply(x)
        logits: Tensor = self._network.head(_padded(features))[: len(x)]
        return logits

    def _apply(self, x: Tensor) -> Tensor:
        if x.shape != (len(x), SIZE):
            raise EvaluationError(f"x has shape {tuple(x.shape)}; (B, {SIZE}) is needed")
        parts = [
            self._network.features(_padded(x[start:end].float()))[: end - start]
            for start, end in _passes(0, len(x))
        ]
        return torch.cat(parts) if parts else self._network.features(x.float())


def load_digits_denoiser(path: Path | None = None, *, label: int | None = None) -> DigitsDenoiser:
    """The trained denoiser; one file serves the unconditional and the conditional model.

    Args:
        path: Weights file with its card in the same folder; None takes the shipped one.
        label: Class 0..9 of all samples unless a call gives its own; None for unconditional.

    Raises:
        DataError: If the file or its card is missing, or the file is not the one of the card.
        EvaluationError: For a label out of range.
    """
    entry, weights, digest = _read("denoiser", path)
    network = DigitsDenoiserNet(dropout=0.0)
    _fill(network, weights, path or entry["file"])
    return DigitsDenoiser(
        network,
        digest,
        sigma_data=float(entry["sigma_data"]),
        sigma_max=float(entry["sigma_max"]),
        label=label,
    )


def load_digits_classifier(path: Path | None = None) -> DigitsClassifier:
    """The trained classifier.

    Args:
        path: Weights file with its card in the same folder; None takes the shipped one.

    Raises:
        DataError: If the file or its card is missing, or the file is not the one of the card.
    """
    entry, weights, digest = _read("classifier", path)
    network = DigitsClassifierNet()
    _fill(network, weights, path or entry["file"])
    return DigitsClassifier(network, digest, feature_scale=float(entry["feature_scale"]))


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.data / 8 - 1, dtype=torch.float32)
    return images, torch.tensor(bunch.target, dtype=torch.int64)


def digits_images() -> tuple[Tensor, Tensor]:
    """All digits: (1797, 64) float32 images in [-1, 1] and (1797,) int64 classes."""
    images, classes = _digits()
    return images.clone(), classes.clone()


def reference_features(classifier: DigitsClassifier | None = None) -> Tensor:
    """(1797, 32) float32 features of all digits, by the given or the shipped classifier."""
    return (classifier or load_digits_classifier())(_digits()[0])


def data_mean() -> Tensor:
    """(64,) float32 mean of all digits, the best guess at infinite noise."""
    return torch.tensor(_card(Path(__file__).parent / _CARD)["data_mean"], dtype=torch.float32)


def _card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"card {path} cannot be read: {type(error).__name__}") from error
    if not isinstance(card, dict) or card.get("format") != _FORMAT:
        raise DataError(f"card {path} is not of format {_FORMAT}")
    return card


def _read(kind: str, path: Path | None) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Card entry, tensors and sha256 of a weights file that is the one of its card."""
    folder = Path(__file__).parent if path is None else path.parent
    card = _card(folder / _CARD)
    try:
        entry = card[kind]
        path = folder / entry["file"] if path is None else path
        expected = str(entry["sha256"])
    except (KeyError, TypeError) as error:
        raise DataError(f"card {folder / _CARD} has no complete entry {kind!r}") from error
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"weights {path} cannot be read ({type(error).__name__}); sha256 {expected[:12]} needed"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected:
        raise DataError(f"weights {path} have sha256 {digest[:12]}; the card says {expected[:12]}")
    try:
        return entry, load(data), digest
    except safetensors.SafetensorError as error:
        raise DataError(f"weights {path} are not a safetensors file") from error


def _fill(network: nn.Module, weights: dict[str, Tensor], path: object) -> None:
    try:
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except RuntimeError as error:
        raise DataError(f"weights {path} are not those of {type(network).__name__}") from error


def _passes(first: int, after: int) -> list[tuple[int, int]]:
    return [(start, min(start + _MOST_ROWS, after)) for start in range(first, after, _MOST_ROWS)]


def _firsts(sigma: Tensor, labels: Tensor) -> list[int]:
    """The first row of every stretch of rows with one condition; at least row 0."""
    other = (sigma[1:] != sigma[:-1]) | (labels[1:] != labels[:-1])
    return [0, *(1 + other.nonzero()[:, 0]).tolist()]


def _padded(rows: Tensor) -> Tensor:
    """At least `_LEAST_ROWS` rows, repeating the first."""
    missing = _LEAST_ROWS - len(rows)
    if missing <= 0:
        return rows
    return torch.cat((rows, rows[:1].expand(missing, *rows.shape[1:])))
