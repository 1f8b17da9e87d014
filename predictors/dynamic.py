"""`dynamic`: signals as experts, a gate over those that are there, and what they leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import ConfigError
from searchlab.predictors.base import LEAST, BasePredictor, Folds, State, folds_of, normals_of
from searchlab.predictors.encoders import one_thread
from searchlab.predictors.preprocess import Features, Inputs

__all__ = ["Dynamic"]

Floats = NDArray[np.float64]
Weights = dict[str, Tensor]

MEMBERS = 5
WIDTH, HIDDEN = 64, 32
EVERY = 20  # epochs after which labels that were left out are looked at
FREE = 50  # labels from which on the trunk is trained with the rest
RATE, DECAY = 5e-3, 1e-2
MARGIN, ENTROPY, DENSITY = 0.1, 0.01, 0.5
PAIRS = 4  # per label
ROWS, BATCH = 2000, 256  # of the trunk's own training
_TRUNK = ("inner", "inner_bias", "signals", "signals_bias")


@dataclass(frozen=True)
class _Seen:
    """Candidates as the networks read them: codes (n, p), scores (n, k), there (n, k)."""

    x: Tensor
    scores: Tensor
    there: Tensor

    @staticmethod
    def of(features: Features) -> _Seen:
        k = features.scores.shape[1]
        there = np.ones((len(features), k)) if features.there is None else features.there
        # Without signals a constant is the only expert.
        columns = (features.scores, there) if k else (np.zeros((len(features), 1)),) * 2
        scores, known = (torch.from_numpy(np.asarray(c, dtype=np.float32)) for c in columns)
        return _Seen(torch.from_numpy(features.x.astype(np.float32)), scores, known)


def _trunk_of(seen: _Seen, steps: int) -> Weights:
    """Learns the signals' scores from codes: "inner" (p, WIDTH) and "signals" (WIDTH, k)."""
    p, k = seen.x.shape[1], seen.scores.shape[1]
    weights = {
        "inner": torch.randn(p, WIDTH) / p**0.5,
        "inner_bias": torch.zeros(WIDTH),
        "signals": torch.randn(WIDTH, k) / WIDTH**0.5,
        "signals_bias": torch.zeros(k),
    }
    some = torch.randperm(len(seen.x))[:ROWS]
    x, wanted, there = seen.x[some], seen.scores[some], seen.there[some]
    for weight in weights.values():
        weight.requires_grad_()
    adam = torch.optim.Adam(weights.values(), lr=RATE)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        hidden = torch.relu(x[rows] @ weights["inner"] + weights["inner_bias"])
        said = hidden @ weights["signals"] + weights["signals_bias"]
        _step(adam, ((said - wanted[rows]) ** 2 * there[rows]).mean())
    return {name: weight.detach() for name, weight in weights.items()}


def _members(trunk: Weights, correlations: Tensor) -> Weights:
    """Networks to begin with: a copy of the trunk for each row of correlations (m, k)."""
    m, k = correlations.shape
    p = len(trunk["inner"])
    copies = {name: trunk[name].expand(m, *trunk[name].shape).clone() for name in _TRUNK}
    return copies | {
        "gate": torch.zeros(m, p, k),
        "gate_bias": torch.zeros(m, 1, k),
        "scales": correlations.clone(),
        "left": torch.randn(m, WIDTH + k, HIDDEN) / (WIDTH + k) ** 0.5,
        "left_bias": torch.zeros(m, 1, HIDDEN),
        "out": torch.zeros(m, HIDDEN, 1),
        "offset": torch.zeros(m, 1),
        "log_sd": torch.full((m, 1), -0.5),
    }


def _forward(net: Weights, seen: _Seen) -> tuple[Tensor, Tensor]:
    """What each member says (m, n), and how even its gate is, a scalar."""
    hidden = torch.relu(seen.x @ net["inner"] + net["inner_bias"][:, None])
    foreseen = hidden @ net["signals"] + net["signals_bias"][:, None]
    scores = torch.where(seen.there > 0, seen.scores, foreseen)
    closed = (seen.there <= 0) & (seen.there > 0).any(dim=1, keepdim=True)
    logits = (seen.x @ net["gate"] + net["gate_bias"]).masked_fill(closed, -1e9)
    gate = torch.softmax(logits, dim=2)
    experts = (gate * net["scales"][:, None] * scores).sum(dim=2)
    read = torch.relu(torch.cat([hidden, scores], dim=2) @ net["left"] + net["left_bias"])
    even = -(gate * torch.log(gate + 1e-9)).sum(dim=2).mean()
    return experts + (read @ net["out"])[:, :, 0] + net["offset"], even


def _train(
    net: Weights,
    seen: _Seen,
    targets: Floats,
    weights: Tensor,
    epochs: int,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Trains the members in place, each with its weights (m, n) of the labels.

    `watch` is called with the number of epochs after every `EVERY`.
    """
    n = len(targets)
    truth = torch.from_numpy(targets.astype(np.float32))
    frozen = _TRUNK if n < FREE else ()
    free = [weight.requires_grad_() for name, weight in net.items() if name not in frozen]
    adam = torch.optim.AdamW(free, lr=RATE, weight_decay=DECAY)
    total = weights.sum(dim=1, keepdim=True)
    for epoch in range(1, epochs + 1):
        said, even = _forward(net, seen)
        one, other = torch.randint(n, (2, PAIRS * n))
        signs = torch.sign(truth[one] - truth[other])
        both = weights[:, one] * weights[:, other] * signs.abs()
        hinge = torch.relu(MARGIN - signs * (said[:, one] - said[:, other]))
        order = (both * hinge).sum() / both.sum().clamp(min=1.0) * len(weights)
        away = (said - truth) * torch.exp(-net["log_sd"])
        density = (weights / total * (0.5 * away**2 + net["log_sd"])).sum()
        _step(adam, order + DENSITY * density - ENTROPY * even)
        if watch is not None and epoch % EVERY == 0:
            watch(epoch)
    for weight in free:
        weight.requires_grad_(False)


def _step(adam: torch.optim.Optimizer, loss: Tensor) -> None:
    adam.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    adam.step()


class Dynamic(BasePredictor):
    """Signals as experts, weighed for each candidate, and a correction; an ensemble of networks.

    An expert says its signal's normal score where that is there, else what a trunk that learnt
    signals from codes on the pool says. A gate on the codes spreads weight over the experts that
    are there (over all where none is); each has a signed scale that begins at its correlation with
    the labels. A residual head reads trunk and scores. The members see bootstraps of the labels.
    The loss is the hinge of pairs, and half of a normal density's for the scale, with a small bonus
    for even gates. Epochs are those that were best for labels left out in folds; below `FREE`
    labels the trunk stays as it is. Every candidate is read once, not once per pair.

    Source: arXiv 2302.00932 for experts and gate. Where we differ: standardised experts, values
    where they are known, signs, the correction, the ensemble, and stopping.

    Args:
        most: epochs at most.
        pretrain: steps of the trunk's own training.

    Raises:
        ConfigError: fewer epochs than the labels left out are looked at after, or no step.
    """

    name: ClassVar[str] = "dynamic"
    folds_cheaply: ClassVar[bool] = True

    def __init__(self, *, most: int = 200, pretrain: int = 200) -> None:
        super().__init__()
        if most < EVERY or pretrain < 1:
            raise ConfigError(f"most {most}, pretrain {pretrain}; allowed: {EVERY} and 1 or more")
        self.most, self.pretrain = most, pretrain
        self._pool: Features | None = None
        self._net: Weights = {}
        self.epochs = EVERY
        self._scale = 1.0
        self._unseen: Floats | None = None

    def _prepare(self, inputs: Inputs, pool: Features | None) -> None:
        self._pool = pool

    def _learn(self, features: Features, targets: Floats, seed: int) -> None:
        n, seen = len(targets), _Seen.of(features)
        with one_thread(seed):
            shown = seen if self._pool is None else _Seen.of(self._pool)
            trunk = _trunk_of(shown, self.pretrain)
            self.epochs, self._scale, self._unseen = EVERY, 1.0, None
            if n >= LEAST and np.ptp(targets):
                self._judge(trunk, seen, targets, folds_of(n, seed))
            counts = torch.zeros(MEMBERS, n)
            counts.scatter_add_(1, torch.randint(n, (MEMBERS, n)), torch.ones(MEMBERS, n))
            self._net = _members(trunk, _correlations(seen, targets, counts))
            _train(self._net, seen, targets, counts, self.epochs)
        self._pool = None

    def _judge(self, trunk: Weights, seen: _Seen, targets: Floats, folds: Folds) -> None:
        """Finds the number of epochs, and what is said of labels that were left out."""
        weights = torch.ones(len(folds), len(targets))
        for at, rows in enumerate(folds):
            weights[at, torch.from_numpy(rows)] = 0.0
        net = _members(trunk, _correlations(seen, targets, weights))
        best = np.inf

        def watch(epochs: int) -> None:
            nonlocal best
            mean, sd = _said(net, seen)
            said, spread = np.empty(len(targets)), np.empty(len(targets))
            for at, rows in enumerate(folds):
                rest = np.setdiff1d(np.arange(len(targets)), rows)
                said[rows] = mean[at, rows] - mean[at, rest].mean()
                spread[rows] = sd[at]
            error = float(((said - targets) ** 2).mean())
            if error < best:
                best, self.epochs, self._unseen = error, epochs, said
                ratio = float((((said - targets) / spread) ** 2).sum())
                self._scale = float(np.sqrt((ratio + 5.0) / (len(targets) + 5.0)))

        _train(net, seen, targets, weights, self.most, watch)

    def left_out(self, features: Features, targets: Floats, folds: Folds, seed: int) -> Floats:
        """See the base class; the folds are those of the fit."""
        return np.zeros(len(targets)) if self._unseen is None else self._unseen

    def _held_out(self, features: Features, targets: Floats, seed: int) -> Floats | None:
        return self._unseen

    def _scores(self, features: Features) -> tuple[Floats, Floats]:
        mean, sd = self._opinions(features)
        spread = np.sqrt((sd**2).mean() + mean.var(axis=0))
        return mean.mean(axis=0), self._scale * spread

    def _draw(self, features: Features, u: Floats) -> Floats:
        """One member's function for each draw, with the error that the labels left open."""
        mean, sd = self._opinions(features)
        which = (np.asarray(u)[:, 0] * MEMBERS).astype(np.int64)
        middle = mean.mean(axis=0)
        noise = self._scale * float(np.sqrt((sd**2).mean())) * normals_of(u, len(features))
        out: Floats = middle + self._scale * (mean[which] - middle) + noise
        return out

    def _opinions(self, features: Features) -> tuple[Floats, Floats]:
        with one_thread(0):
            return _said(self._net, _Seen.of(features))

    def _state(self) -> State:
        config = {
            "most": self.most,
            "pretrain": self.pretrain,
            "epochs": self.epochs,
            "scale": self._scale,
        }
        return config, {name: weight.numpy() for name, weight in self._net.items()}

    def _restore(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self.most, self.pretrain = int(config["most"]), int(config["pretrain"])
        self.epochs, self._scale = int(config["epochs"]), float(config["scale"])
        self._net = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        self._unseen = None


def _said(net: Weights, seen: _Seen) -> tuple[Floats, Floats]:
    """Means (m, n) and standard deviations (m, 1) of all members."""
    with torch.no_grad():
        mean, sd = _forward(net, seen)[0], torch.exp(net["log_sd"])
    return mean.double().numpy(), sd.double().numpy()


def _correlations(seen: _Seen, targets: Floats, weights: Tensor) -> Tensor:
    """Of each expert's scores with the labels, by each member's weights, (m, k)."""
    truth = torch.from_numpy(targets.astype(np.float32))
    share = weights / weights.sum(dim=1, keepdim=True)
    scores = seen.scores - (share @ seen.scores)[:, None]
    wanted = truth - (share @ truth)[:, None]
    both = (share[:, :, None] * scores * wanted[:, :, None]).sum(dim=1)
    own = (share[:, :, None] * scores**2).sum(dim=1) * (share * wanted**2).sum(dim=1)[:, None]
    return both / torch.sqrt(own + 1e-6)
