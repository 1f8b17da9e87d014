"""`steps`: a network that reads a candidate step by step, as solver schedules are made."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchlab.errors import ConfigError
from searchlab.predictors.base import BasePredictor, State
from searchlab.predictors.encoders import one_thread
from searchlab.predictors.preprocess import Features, Inputs
from searchlab.space import Space

__all__ = ["Steps"]

Floats = NDArray[np.float64]

PAIRS = 2  # per candidate of a batch
BATCH = 512
APART = 0.05  # standard deviations of the targets; closer pairs are no pairs
_BLOCK = 2048  # candidates that are predicted at once


class _Net(nn.Module):
    """Tokens of one step joined, an LSTM over the steps, the mean of its states, a head.

    A step is what all variables of the commonest length have at one place; variables of other
    lengths belong to every step. A token is the sum of an embedding of its code and of its number
    times a vector of its variable; a step sums its tokens and an embedding of its place.
    """

    def __init__(self, space: Space, *, width: int) -> None:
        super().__init__()
        sizes = [variable.size for variable in space.variables.values()]
        long = [size for size in sizes if size > 1]
        self.steps = max(sorted(set(long)), key=long.count) if long else 1
        owners, offsets, homes, total = [], [], [], 0
        for at, variable in enumerate(space.variables.values()):
            owners += [at] * variable.size
            offsets += [total] * variable.size
            own = variable.size == self.steps
            homes += list(range(self.steps)) if own else [-1] * variable.size
            total += max(2, variable.code_width // max(1, variable.size))
        home = torch.tensor(homes)
        # (steps, elements): which tokens a step reads; those of no step are read by all, shared.
        reads = (home[None, :] == torch.arange(self.steps)[:, None]) | (home[None, :] < 0)
        self.register_buffer("owners", torch.tensor(owners), persistent=False)
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        self.register_buffer("reads", reads.float(), persistent=False)
        self.register_buffer("own", (home >= 0).float(), persistent=False)
        self.codes = nn.Embedding(total, width)
        self.numbers = nn.Embedding(len(sizes), width)
        self.places = nn.Embedding(self.steps, width)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, codes: Tensor, values: Tensor, active: Tensor) -> Tensor:
        """Tokens (n, e) -> scores (n,)."""
        owners, offsets = self.get_buffer("owners"), self.get_buffer("offsets")
        reads, own = self.get_buffer("reads"), self.get_buffer("own")
        tokens = self.codes(codes + offsets) + values[..., None] * self.numbers(owners)
        there = active.to(tokens.dtype)
        joined = torch.einsum("se,new->nsw", reads, tokens * there[..., None])
        joined = joined + self.places.weight
        # A step without any active token of its own is none.
        alive = (torch.einsum("se,ne->ns", reads * own, there) > 0).to(tokens.dtype)
        alive = torch.where(alive.sum(dim=1, keepdim=True) > 0, alive, torch.ones_like(alive))
        read = self.lstm(self.mix(joined) * alive[..., None])[0] * alive[..., None]
        mean = read.sum(dim=1) / alive.sum(dim=1, keepdim=True)
        score: Tensor = self.head(mean)[:, 0]
        return score


class Steps(BasePredictor):
    """The order of candidates by what they do at each step; signals are not read.

    Trained by the hinge of pairs, margin 1, two pairs per candidate and epoch, those nearer than
    `APART` left out. Scale and error of predictions come from an affine map to the labels and from
    a fifth of them left out.

    Source: the predictors of arXiv 2312.07243 and 2306.08860 (pairs, LSTM, mean over steps). Where
    we differ: numbers, times among them, enter as numbers and not as sinusoids, and steps know
    their place.

    Args:
        width: of all layers.
        epochs: of Adam.
        rate: of Adam.

    Raises:
        ConfigError: epochs, a width or a rate that are not above 0.
    """

    name: ClassVar[str] = "steps"

    def __init__(self, *, width: int = 64, epochs: int = 150, rate: float = 2e-3) -> None:
        super().__init__()
        if min(width, epochs) < 1 or not 0 < rate < 1:
            raise ConfigError(
                f"width {width}, epochs {epochs}, rate {rate}; "
                "allowed: whole numbers above 0, a rate between 0 and 1"
            )
        self.width, self.epochs, self.rate = width, epochs, rate
        self._space: Space | None = None
        self._net: _Net | None = None
        self._slope, self._offset, self._error = 1.0, 0.0, 1.0

    def _prepare(self, inputs: Inputs, pool: Features | None) -> None:
        self._space = inputs.space

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        assert self._space is not None
        n = len(targets)
        with one_thread(seed):
            net = _Net(self._space, width=self.width)
            self._error = 1.0
            if n >= 10:
                order = torch.randperm(n).numpy()
                rows, rest = order[: n // 5], order[n // 5 :]
                trial = copy.deepcopy(net)
                self._train(trial, features.take(rest), targets[rest])
                said = self._offset + self._slope * _said(trial, features.take(rows))
                squares = float(((said - targets[rows]) ** 2).sum())
                self._error = float(np.sqrt((squares + 2.0) / (len(rows) + 2.0)))
            self._train(net, features, targets)
        self._net = net

    def _train(self, net: _Net, features: Features, targets: Floats) -> None:
        inputs, truth = _inputs(features), torch.from_numpy(targets.astype(np.float32))
        adam = torch.optim.Adam(net.parameters(), lr=self.rate)
        for _ in range(self.epochs):
            for rows in torch.split(torch.randperm(len(truth)), BATCH):
                loss = _hinge(net(*(part[rows] for part in inputs)), truth[rows])
                adam.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                adam.step()
        said = _said(net, features)
        spread = float(said.var())
        slope = float(((said - said.mean()) * targets).mean()) / spread if spread > 0 else 1.0
        self._slope = max(slope, 1e-3)
        self._offset = float(targets.mean() - self._slope * said.mean())

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        assert self._net is not None
        with one_thread(0):
            said = _said(self._net, features)
        return self._offset + self._slope * said, np.full(len(said), self._error)

    def _state(self) -> State:
        assert self._net is not None
        config = {
            "width": self.width,
            "epochs": self.epochs,
            "rate": self.rate,
            "slope": self._slope,
            "offset": self._offset,
            "error": self._error,
        }
        return config, {name: part.numpy() for name, part in self._net.state_dict().items()}

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        assert self._inputs is not None
        self.width, self.epochs = int(config["width"]), int(config["epochs"])
        self.rate = float(config["rate"])
        self._slope, self._offset = float(config["slope"]), float(config["offset"])
        self._error = float(config["error"])
        self._space = self._inputs.space
        with one_thread(0):
            net = _Net(self._space, width=self.width)
        try:
            net.load_state_dict({k: torch.from_numpy(array) for k, array in arrays.items()})
        except RuntimeError as error:
            raise ValueError(" ".join(str(error).split())[:200]) from error
        self._net = net


def _inputs(features: Features) -> tuple[Tensor, Tensor, Tensor]:
    assert features.tokens is not None
    codes, values, active = features.tokens
    return (
        torch.from_numpy(codes.astype(np.int64)),
        torch.from_numpy(np.array(values)),
        torch.from_numpy(np.array(active)),
    )


def _said(net: _Net, features: Features) -> Floats:
    """The net's outputs, float64 (n,), in blocks."""
    inputs = _inputs(features)
    blocks = torch.split(torch.arange(len(features)), _BLOCK)
    with torch.no_grad():
        parts = [net(*(part[rows] for part in inputs)) for rows in blocks]
    return torch.cat(parts).numpy().astype(np.float64)


def _hinge(said: Tensor, truth: Tensor) -> Tensor:
    """Mean hinge of random pairs whose truths are apart; 0 where there is none."""
    n = len(truth)
    one, other = torch.randint(n, (PAIRS * n,)), torch.randint(n, (PAIRS * n,))
    gaps = truth[one] - truth[other]
    apart = gaps.abs() > APART
    if not bool(apart.any()):
        return 0.0 * said.sum()
    signs = torch.sign(gaps[apart])
    return torch.relu(1.0 - signs * (said[one[apart]] - said[other[apart]])).mean()
