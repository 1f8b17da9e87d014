"""Networks that read a candidate's tokens: `mlp`, `lstm` and `transformer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from searchlab.errors import ConfigError
from searchlab.predictors.preprocess import Features
from searchlab.space import Space

__all__ = ["ENCODERS", "Batch", "Encoder", "batch_of", "one_thread", "read_together"]

ENCODERS = ("lstm", "mlp", "transformer")


class Batch(NamedTuple):
    """Candidates for networks: x (n, p), codes (n, e), values (n, e), active (n, e)."""

    x: Tensor
    codes: Tensor
    values: Tensor
    active: Tensor

    def take(self, rows: Tensor) -> Batch:
        """The rows that an index tensor names."""
        return Batch(*(part[rows] for part in self))


def batch_of(features: Features) -> Batch:
    """The features of `Inputs`, which keep the tokens."""
    assert features.tokens is not None
    codes, values, active = features.tokens
    return Batch(
        torch.from_numpy(features.x.astype(np.float32)),
        torch.from_numpy(codes.astype(np.int64)),
        torch.from_numpy(np.array(values)),
        torch.from_numpy(np.array(active)),
    )


@contextmanager
def one_thread(seed: int) -> Iterator[None]:
    """One thread and a seed of its own for torch; both are put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            yield
    finally:
        torch.set_num_threads(threads)


class Encoder(nn.Module):
    """A vector of `width` numbers for each candidate.

    A token is the sum of an embedding of its code (a table for each variable), its number times a
    vector of its variable, and, where the network has no order of its own, an embedding of its
    place. What is inactive is zero.

    Args:
        space: what candidates are of.
        kind: "lstm" (one layer, its last state), "transformer" (two layers of four heads, mean over
            active tokens) or "mlp" (two hidden layers on the flat codes).
        width: size of the vector.

    Raises:
        ConfigError: another kind, or a width that four heads cannot share.
    """

    def __init__(self, space: Space, *, kind: str, width: int) -> None:
        super().__init__()
        if kind not in ENCODERS or width < 4 or width % 4:
            raise ConfigError(
                f"encoder {kind!r} of width {width}; allowed: {', '.join(ENCODERS)}, "
                "a multiple of 4"
            )
        self.kind, self.width = kind, width
        if kind == "mlp":
            self.net: nn.Module = nn.Sequential(
                nn.Linear(space.code_width, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
            )
            return
        owners, offsets, total = [], [], 0
        for at, variable in enumerate(space.variables.values()):
            labels = max(2, variable.code_width // max(1, variable.size))
            owners += [at] * variable.size
            offsets += [total] * variable.size
            total += labels
        self.register_buffer("owners", torch.tensor(owners), persistent=False)
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        self.codes = nn.Embedding(total, width)
        self.numbers = nn.Embedding(len(space.variables), width)
        if kind == "lstm":
            self.net = nn.LSTM(width, width, batch_first=True)
        else:
            self.places = nn.Embedding(space.size, width)
            layer = nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            self.net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, batch: Batch) -> Tensor:
        if self.kind == "mlp":
            flat: Tensor = self.net(batch.x)
            return flat
        if self.kind == "lstm":
            return read_together([self], batch)[0]
        offsets, owners = self.get_buffer("offsets"), self.get_buffer("owners")
        tokens = self.codes(batch.codes + offsets)
        tokens = tokens + batch.values[..., None] * self.numbers(owners)
        active = batch.active[..., None].to(tokens.dtype)
        read = self.net((tokens + self.places.weight) * active) * active
        mean: Tensor = read.sum(dim=1) / active.sum(dim=1).clamp(min=1)
        return mean


def read_together(encoders: Sequence[Encoder], batch: Batch) -> Tensor:
    """What several encoders of one kind and space say, (K, n, width).

    LSTMs are run as one, and only once for candidates that begin alike: a sequence's state follows
    from its prefix, and a batch of candidates of few choices has few prefixes.
    """
    if encoders[0].kind != "lstm":
        return torch.stack([encoder(batch) for encoder in encoders])
    nets = [encoder.net for encoder in encoders]
    offsets, owners = encoders[0].get_buffer("offsets"), encoders[0].get_buffer("owners")
    numbers_seen, number = torch.unique(batch.values, return_inverse=True)
    parts = (batch.codes + offsets, owners.expand_as(batch.codes), batch.active.long(), number)
    sizes = [len(encoders[0].codes.weight), len(encoders[0].numbers.weight), 2, len(numbers_seen)]
    key = torch.zeros_like(number)
    for part, size in zip(parts, sizes, strict=True):
        key = key * size + part
    kinds, which = torch.unique(key, return_inverse=True)
    fields: list[Tensor] = []
    for size in reversed(sizes):
        fields.insert(0, kinds % size)
        kinds = kinds // size
    code, owner, active, number = fields
    codes = torch.stack([encoder.codes.weight for encoder in encoders])
    numbers = torch.stack([encoder.numbers.weight for encoder in encoders])
    tokens = codes[:, code] + numbers_seen[number, None] * numbers[:, owner]
    tokens = tokens * active[:, None].to(tokens.dtype)
    inner = _stacked(nets, "weight_hh_l0").transpose(1, 2)
    bias = _stacked(nets, "bias_ih_l0") + _stacked(nets, "bias_hh_l0")
    given = tokens @ _stacked(nets, "weight_ih_l0").transpose(1, 2) + bias[:, None]
    width = encoders[0].width
    hidden = cell = given.new_zeros((len(encoders), 1, width))
    place = torch.zeros(len(which), dtype=torch.int64)
    for column in which.T:
        prefixes, place = torch.unique(place * len(code) + column, return_inverse=True)
        before, last = prefixes // len(code), prefixes % len(code)
        gates = given[:, last] + (hidden @ inner)[:, before]
        enter, keep, new, show = gates.split(width, dim=2)
        cell = torch.sigmoid(keep) * cell[:, before] + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(show) * torch.tanh(cell)
    read: Tensor = hidden[:, place]
    return read


def _stacked(nets: Sequence[nn.Module], name: str) -> Tensor:
    return torch.stack([net.get_parameter(name) for net in nets])
