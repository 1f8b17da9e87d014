"""`dele`: experts that have learnt the order of signals, joined by a gate on the candidate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchlab.errors import ConfigError
from searchlab.predictor import Table
from searchlab.predictors.base import LEAST, BasePredictor, State
from searchlab.predictors.encoders import (
    ENCODERS,
    Batch,
    Encoder,
    batch_of,
    one_thread,
    read_together,
)
from searchlab.predictors.preprocess import Features, Inputs
from searchlab.space import Space

__all__ = ["Dele"]

Floats = NDArray[np.float64]

MARGIN = 0.1
BATCH = 512
PAIRS = 4  # per candidate of a batch
TRIAL = 4  # times fewer epochs for the error of labels left out
_BLOCK = 4096  # candidates that are predicted at once


class _Experts(nn.Module):
    """K experts with an encoder and a linear head each, and a gate with an encoder of its own."""

    def __init__(self, space: Space, *, experts: int, kind: str, width: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            Encoder(space, kind=kind, width=width) for _ in range(experts)
        )
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(experts))
        self.gate_encoder = Encoder(space, kind=kind, width=width)
        self.gate = nn.Linear(width, experts)

    def opinions(self, batch: Batch) -> Tensor:
        """What each expert says, (n, K)."""
        return self._joined(read_together(list(self._encoders()), batch))

    def forward(self, batch: Batch) -> Tensor:
        """The gate's mean of the opinions, (n,)."""
        read = read_together([*self._encoders(), self.gate_encoder], batch)
        weights = torch.softmax(self.gate(read[-1]), dim=1)
        return (weights * self._joined(read[:-1])).sum(dim=1)

    def turn(self, batch: Batch, truth: Tensor) -> None:
        """Negates experts that order a batch against the truth, by more than chance."""
        n = len(truth)
        if n < LEAST:
            return
        chance = (2 * (2 * n + 5) / (9 * n * (n - 1))) ** 0.5  # sd of tau where nothing is known
        with torch.no_grad():
            said = _in_blocks(self.opinions, batch)
            one, other = torch.triu_indices(n, n, 1)
            agree = torch.sign(truth[one] - truth[other])[:, None]
            taus = (agree * torch.sign(said[one] - said[other])).mean(dim=0)
            for head, tau in zip(self._heads(), taus, strict=True):
                if tau < -chance:
                    head.weight.neg_()
                    head.bias.neg_()

    def _heads(self) -> Iterator[nn.Linear]:
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            yield head

    def _encoders(self) -> Iterator[Encoder]:
        for encoder in self.encoders:
            assert isinstance(encoder, Encoder)
            yield encoder

    def _joined(self, read: Tensor) -> Tensor:
        """The heads' outputs (n, K) of what was read (K, n, width)."""
        said = [head(part) for head, part in zip(self.heads, read, strict=True)]
        return torch.cat(said, dim=1)


class Dele(BasePredictor):
    """Dynamic ensemble of low-fidelity experts.

    Step 1: one expert per signal learns to order candidates as the signal does, on the pool where
    one is shown, else on the labelled candidates. Step 2: experts and gate learn the order of the
    true losses. Both minimise the hinge of pairs, margin 0.1, four pairs per candidate, by Adam at
    a rate of 1e-3. Signals are needed for the labelled candidates and the pool only.

    Source: arXiv 2302.00932. Where we differ: candidates are encoded once and not once per pair;
    step 2 begins with a new Adam, and an expert that orders the labels backwards is negated before
    it, so that a wrong direction of a signal does no harm. The scale of predictions is that of an
    affine map to the labels, their error that of a fifth of the labels left out of a step 2 of a
    quarter of the epochs.

    Args:
        encoder: "lstm", "transformer" or "mlp".
        width: of the encoders.
        pretrain: epochs of step 1.
        epochs: of step 2.
        rate: of Adam.

    Raises:
        ConfigError: another encoder, or epochs, a width or a rate that are not above 0.
    """

    name: ClassVar[str] = "dele"

    def __init__(
        self,
        *,
        encoder: str = "lstm",
        width: int = 100,
        pretrain: int = 200,
        epochs: int = 200,
        rate: float = 1e-3,
    ) -> None:
        super().__init__()
        if encoder not in ENCODERS:
            raise ConfigError(f"encoder {encoder!r}; allowed: {', '.join(ENCODERS)}")
        if min(pretrain, epochs, width) < 1 or not 0 < rate < 1:
            raise ConfigError(
                f"width {width}, pretrain {pretrain}, epochs {epochs}, rate {rate}; "
                "allowed: whole numbers above 0, a rate between 0 and 1"
            )
        self.encoder, self.width = encoder, width
        self.pretrain, self.epochs, self.rate = pretrain, epochs, rate
        self._space: Space | None = None
        self._pool: Features | None = None
        self._signs: Floats = np.empty(0)
        self._kept: tuple[int, ...] = ()
        self._begun: tuple[str, tuple[int, ...], _Experts] | None = None
        self._net: _Experts | None = None
        self._slope, self._offset, self._error = 1.0, 0.0, 1.0

    def imitate(self, pool: Table, *, seed: int) -> None:
        """Step 1 alone: later fits in this space to the same signals begin with its experts.

        It depends on the pool and the seed only, so one serves fits to any number of labels.
        """
        inputs = Inputs(pool)
        features = inputs(pool)
        self._prepare(inputs, features)
        self._begun = inputs.fingerprint, self._kept, self._imitated(features, seed)
        self._pool = None

    def _prepare(self, inputs: Inputs, pool: Features | None) -> None:
        self._space, self._pool = inputs.space, pool
        self._kept = tuple(inputs.rulers)
        kept = [inputs.directions[at] for at in self._kept]
        self._signs = np.array([1.0 if direction == "min" else -1.0 for direction in kept])

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        assert self._space is not None
        n = len(targets)
        if self._begun is not None and self._begun[:2] == (self._space.fingerprint, self._kept):
            net = copy.deepcopy(self._begun[2])
        else:
            net = self._imitated(features if self._pool is None else self._pool, seed)
        with one_thread(2 * seed + 1):
            batch, truth = batch_of(features), torch.from_numpy(targets.astype(np.float32))
            if n >= 10:
                order = torch.randperm(n)
                rows, rest = order[: n // 5], order[n // 5 :]
                trial = copy.deepcopy(net)
                self._order(trial, batch.take(rest), truth[rest], -(-self.epochs // TRIAL))
                self._map(trial, batch.take(rest), targets[rest.numpy()])
                said = self._offset + self._slope * _said(trial, batch.take(rows))
                squares = float(((said - targets[rows.numpy()]) ** 2).sum())
                self._error = float(np.sqrt((squares + 2.0) / (len(rows) + 2.0)))
            else:
                self._error = 1.0
            self._order(net, batch, truth, self.epochs)
            self._map(net, batch, targets)
        self._net, self._pool = net, None

    def _imitated(self, features: Features, seed: int) -> _Experts:
        """Step 1: every expert learns the order of its own signal."""
        assert self._space is not None
        k = features.scores.shape[1]
        with one_thread(2 * seed):
            net = _Experts(self._space, experts=max(1, k), kind=self.encoder, width=self.width)
            if not k:
                return net
            batch = batch_of(features)
            wanted = torch.from_numpy((features.scores * self._signs).astype(np.float32))
            own = [*net.encoders.parameters(), *net.heads.parameters()]
            adam = torch.optim.Adam(own, lr=self.rate)
            for _ in range(self.pretrain):
                for rows in torch.split(torch.randperm(len(wanted)), BATCH):
                    said = net.opinions(batch.take(rows))
                    parts = [
                        _hinge(column, truth)
                        for column, truth in zip(said.T, wanted[rows].T, strict=True)
                    ]
                    _step(adam, torch.stack(parts).sum())
        return net

    def _order(self, net: _Experts, batch: Batch, truth: Tensor, epochs: int) -> None:
        """Step 2: experts and gate learn the order of the losses."""
        net.turn(batch, truth)
        adam = torch.optim.Adam(net.parameters(), lr=self.rate)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(truth)), BATCH):
                _step(adam, _hinge(net(batch.take(rows)), truth[rows]))

    def _map(self, net: _Experts, batch: Batch, targets: Floats) -> None:
        """Least squares from the net's outputs to the targets; the order is kept."""
        said = _said(net, batch)
        spread = float(said.var())
        slope = float(((said - said.mean()) * targets).mean()) / spread if spread > 0 else 1.0
        self._slope = max(slope, 1e-3)
        self._offset = float(targets.mean() - self._slope * said.mean())

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        assert self._net is not None
        with one_thread(0):
            said = _said(self._net, batch_of(features))
        return self._offset + self._slope * said, np.full(len(said), self._error)

    def _state(self) -> State:
        assert self._net is not None
        config = {
            "encoder": self.encoder,
            "width": self.width,
            "pretrain": self.pretrain,
            "epochs": self.epochs,
            "rate": self.rate,
            "experts": len(self._net.heads),
            "slope": self._slope,
            "offset": self._offset,
            "error": self._error,
        }
        return config, {name: part.numpy() for name, part in self._net.state_dict().items()}

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        assert self._inputs is not None
        self.encoder, self.width = str(config["encoder"]), int(config["width"])
        self.pretrain, self.epochs = int(config["pretrain"]), int(config["epochs"])
        self.rate = float(config["rate"])
        self._slope, self._offset = float(config["slope"]), float(config["offset"])
        self._error = float(config["error"])
        self._space = self._inputs.space
        with one_thread(0):
            net = _Experts(
                self._space, experts=int(config["experts"]), kind=self.encoder, width=self.width
            )
        try:
            net.load_state_dict({k: torch.from_numpy(array) for k, array in arrays.items()})
        except RuntimeError as error:
            raise ValueError(" ".join(str(error).split())[:200]) from error
        self._net = net


def _said(net: _Experts, batch: Batch) -> Floats:
    """The net's outputs, float64 (n,), in blocks."""
    with torch.no_grad():
        return _in_blocks(net, batch).numpy().astype(np.float64)


def _in_blocks(read: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """What is said of a batch, (n, ...), a block of it at a time."""
    return torch.cat(
        [read(batch.take(rows)) for rows in torch.split(torch.arange(len(batch.x)), _BLOCK)]
    )


def _hinge(said: Tensor, truth: Tensor) -> Tensor:
    """Mean hinge of pairs with different truths, at most four per candidate; 0 = no such pair."""
    n = len(truth)
    one, other = torch.triu_indices(n, n, 1)
    if len(one) > 2 * PAIRS * n:
        # Drawn twice as often as needed, so that enough are left when equal ones are gone.
        some = torch.randint(len(one), (2 * PAIRS * n,))
        one, other = one[some], other[some]
    signs = torch.sign(truth[one] - truth[other])
    unlike = signs.nonzero()[:, 0]
    if len(unlike) > PAIRS * n:
        unlike = unlike[torch.randperm(len(unlike))[: PAIRS * n]]
    if not len(unlike):
        return 0.0 * said.sum()
    gaps = said[one[unlike]] - said[other[unlike]]
    return torch.relu(MARGIN - signs[unlike] * gaps).mean()


def _step(adam: torch.optim.Adam, loss: Tensor) -> None:
    adam.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    adam.step()
