"""One resident model that is evaluated with other experts, without touching its weights.

Masks keep experts (`masked`): rows of one batch may have masks of their own, so that many
candidates share a forward pass. Mixtures of experts (`merged`) are summed into buffers beside the
model. Both end as they began, bit for bit, also after an exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchlab.errors import ConfigError, SpaceError
from searchlab.spaces.experts.families import Family, family_of, layout_of
from searchlab.spaces.experts.routing import MODES, RouterMode, Rule, choose

__all__ = ["ResidentExperts"]


class _Routing:
    """What stands in for one router's forward."""

    def __init__(self, router: nn.Module, rule: Rule, *, wide: bool) -> None:
        self.router = router
        self.rule = rule
        self.wide = wide
        self.k = 1
        self.mode: RouterMode = "slice"
        self.index: Tensor | None = None
        self.absent: Tensor | None = None
        self.rows: Tensor | None = None
        self.table: Tensor | None = None
        self.own: dict[str, Tensor] = {}  # the router's tensors with kept experts only
        self.floored: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the router is."""
        weight: Tensor = self.router.weight  # type: ignore[assignment]
        return weight.device

    def tensor(self, name: str) -> Tensor | None:
        """A tensor of the router, cut where one mask is served."""
        found: Tensor | None = self.own.get(name, getattr(self.router, name, None))
        return found

    def cut(self) -> None:
        """Only the kept experts' logits are computed: the same product as in a model cut so.

        A product with more columns may differ from it in the last bit.
        """
        self.own = {}
        alone = self.index is not None and len(self.index) == 1 and self.absent is None
        if alone and self.mode == "slice":
            assert self.index is not None
            for name in ("weight", "bias", "e_score_correction_bias"):
                tensor = getattr(self.router, name, None)
                if tensor is not None:
                    self.own[name] = tensor.detach()[self.index[0]]

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, E) of all experts, or of the kept ones, by the router's own weights."""
        weight, bias = self.tensor("weight"), self.tensor("bias")
        assert weight is not None
        if self.wide:
            hidden, weight = hidden.float(), weight.float()
        return nn.functional.linear(hidden, weight, bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights (T, k), experts (T, k); logits as `logits` says."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        logits = self.logits(hidden)
        tokens = None
        if self.rows is not None:
            if len(hidden) % len(self.rows):
                raise ConfigError(
                    f"{len(hidden)} tokens for {len(self.rows)} rows with masks; "
                    "allowed: a batch with one row per entry of `rows`"
                )
            tokens = self.rows.repeat_interleave(len(hidden) // len(self.rows))
        weights, experts, floored = choose(
            logits,
            self.rule,
            self.k,
            mode=self.mode,
            index=None if self.own else self.index,
            absent=self.absent,
            tokens=tokens,
            table=self.table,
            correction=self.tensor("e_score_correction_bias"),
        )
        if self.own and self.index is not None:
            experts = self.index[0][experts]
        if floored is not None:
            self.floored = floored if self.floored is None else self.floored + floored
        return logits, weights, experts


class ResidentExperts:
    """A mixture-of-experts model whose experts can be masked or merged for a while.

    Args:
        model: a causal language model of transformers; its weights are only read.
        family: where its experts are; None = by its configuration.

    Attributes:
        layout: blocks, experts and what they weigh.
        blocks: the mixtures, as modules.
        routers: their routers, as modules.

    Raises:
        ConfigError: a dense model, a family without a table, or one that does not fit the model.
    """

    def __init__(self, model: nn.Module, family: Family | None = None) -> None:
        config: Any = model.config
        self.model = model
        self.family = family_of(config) if family is None else family
        self.layout = layout_of(config, self.family)
        self.blocks: list[nn.Module] = []
        self.routers: list[nn.Module] = []
        self.experts: list[nn.Module] = []
        for layer in self.layout.blocks:
            path = f"{self.family.layers}.{layer}.{self.family.block}"
            try:
                block = model.get_submodule(path)
                self.blocks.append(block)
                self.routers.append(block.get_submodule(self.family.router))
                self.experts.append(block.get_submodule(self.family.experts))
            except AttributeError:
                raise ConfigError(
                    f"family {self.family.name!r} looks for {path}.{self.family.router} and "
                    f"{path}.{self.family.experts}; {type(model).__name__} has no such modules"
                ) from None
        self._rule = rule_of(config, self.family)
        self._flat_rule = Rule(
            self._rule.score, self._rule.renormalise, self._rule.cast, self._rule.scale
        )
        self._routing = [
            _Routing(router, self._rule, wide=self.family.wide) for router in self.routers
        ]
        self._active = False

    @property
    def floored(self) -> int:
        """How many tokens had no positive score left in a "prob" pass, since the start."""
        return sum(int(r.floored) for r in self._routing if r.floored is not None)

    @contextmanager
    def masked(
        self,
        kept: NDArray[np.bool_] | Tensor,
        rows: Tensor | None = None,
        *,
        top_k: int | None = None,
        router_mode: RouterMode = "slice",
        flat: bool = False,
    ) -> Iterator[None]:
        """Every forward inside routes to kept experts only.

        With "slice", the outputs are those of the model with the others cut out.

        Args:
            kept: bool (K, L, E), or (L, E) for one mask.
            rows: int64 (batch,), which mask a row of the batch takes; None = all the only one.
                A forward inside must have that many rows, of any length.
            top_k: experts per token; None = the model's.
            router_mode: "slice", or "prob": all experts are scored before the others are dropped.
            flat: routing without groups, for families that have them.

        Raises:
            SpaceError: masks of another shape, too few experts, or kept groups that are not equal.
            ConfigError: another mode, rows that name no mask, or one pass inside another.
        """
        masks = np.asarray(kept.cpu() if isinstance(kept, Tensor) else kept)
        masks = masks[None] if masks.ndim == 2 else masks
        shape = (len(self.blocks), self.layout.experts)
        if masks.dtype != np.bool_ or masks.ndim != 3 or masks.shape[1:] != shape or not len(masks):
            raise SpaceError(
                f"masks of shape {masks.shape}, {masks.dtype}; allowed: "
                f"(K, {shape[0]}, {shape[1]}) bool, K from 1"
            )
        if router_mode not in ("slice", "prob"):
            raise ConfigError(f"router mode {router_mode!r} of masks; allowed: slice, prob")
        if rows is None and len(masks) > 1:
            raise ConfigError(f"{len(masks)} masks without rows; allowed: rows, or one mask")
        if rows is not None:
            ends = (int(rows.min()), int(rows.max())) if rows.numel() else (0, 0)
            if rows.ndim != 1 or rows.dtype != torch.int64 or ends[0] < 0 or ends[1] >= len(masks):
                raise ConfigError(
                    f"rows of shape {tuple(rows.shape)}, {rows.dtype}, from {ends[0]} to {ends[1]};"
                    f" allowed: (batch,) int64 from 0 to {len(masks) - 1}"
                )
        self.check(masks, top_k=top_k, flat=flat)
        k = self.layout.top_k if top_k is None else top_k
        grouped = self._rule.n_group > 1 and not flat
        for number, routing in enumerate(self._routing):
            device = routing.device
            index, absent = _packed(masks[:, number], grouped=grouped)
            _hold(routing, "index", index, device)
            _hold(routing, "absent", absent, device)
            routing.rows = None if rows is None or len(masks) == 1 else rows.to(device)
            routing.table = None
            routing.rule = self._rule if grouped else self._flat_rule
            routing.mode = router_mode
            routing.k = k
            routing.cut()
        with self._in_place(k):
            yield

    def check(
        self, kept: NDArray[np.bool_], *, top_k: int | None = None, flat: bool = False
    ) -> None:
        """Raises SpaceError for masks (K, L, E) that the model cannot be cut to."""
        counts = kept.sum(axis=2)
        for count in np.unique(counts):
            try:
                self.layout.check_count(int(count), top_k=top_k, flat=flat)
            except SpaceError as error:
                block = int(np.argwhere(counts == count)[0][1])
                raise SpaceError(f"layer {self.layout.blocks[block]}: {error}") from None
        if self._rule.n_group > 1 and not flat:
            parts = kept.reshape(*kept.shape[:2], self._rule.n_group, -1).sum(axis=3)
            uneven = (parts != parts[..., :1]).any(axis=2)
            if uneven.any():
                row, block = np.argwhere(uneven)[0]
                raise SpaceError(
                    f"layer {self.layout.blocks[block]} keeps {parts[row, block].tolist()} experts "
                    "of its groups; allowed: equal numbers, or routing without groups (flat)"
                )

    @contextmanager
    def _in_place(self, k: int) -> Iterator[None]:
        """Routers answer by `_routing`; what they were stands again afterwards."""
        if self._active:
            raise ConfigError("experts are masked or merged already; allowed: one pass at a time")
        self._active = True
        saved: list[tuple[nn.Module, str, bool, Any]] = []

        def put(module: nn.Module, name: str, value: Any) -> None:
            saved.append((module, name, name in module.__dict__, module.__dict__.get(name)))
            module.__dict__[name] = value

        try:
            for block, routing in zip(self.blocks, self._routing, strict=True):
                put(routing.router, "forward", routing.forward)
                for module in (block, routing.router):
                    if hasattr(module, "top_k"):
                        put(module, "top_k", k)
            yield
        finally:
            for module, name, there, value in reversed(saved):
                if there:
                    module.__dict__[name] = value
                else:
                    module.__dict__.pop(name, None)
            self._active = False


def rule_of(config: Any, family: Family) -> Rule:
    """A family's rule with the numbers of one configuration."""
    layout = layout_of(config, family)
    renormalise = family.renormalise
    if isinstance(renormalise, str):
        renormalise = bool(getattr(config, renormalise))
    return Rule(
        score=family.score,
        renormalise=renormalise,
        cast=family.cast,
        scale=None if family.scale is None else float(getattr(config, family.scale)),
        n_group=layout.n_group,
        topk_group=layout.topk_group,
        group_best=layout.group_best,
    )


def _packed(
    kept: NDArray[np.bool_], *, grouped: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """Kept experts of (K, E) masks side by side, and which places are empty."""
    counts = kept.sum(axis=1)
    if (counts == counts[0]).all():
        return np.nonzero(kept)[1].reshape(len(kept), -1).astype(np.int64), None
    if grouped:  # places must stay in their groups
        index = np.broadcast_to(np.arange(kept.shape[1]), kept.shape)
        return np.ascontiguousarray(index, dtype=np.int64), ~kept
    width = int(counts.max())
    index = np.argsort(~kept, axis=1, kind="stable")[:, :width].astype(np.int64)
    return index, np.arange(width) >= counts[:, None]


def _hold(routing: _Routing, name: str, value: NDArray[Any] | None, device: torch.device) -> None:
    """Sets a tensor; one that fits is written again, so that compiled code stays valid."""
    if value is None:
        setattr(routing, name, None)
        return
    new = torch.from_numpy(np.ascontiguousarray(value))
    old: Tensor | None = getattr(routing, name)
    if old is not None and old.shape == new.shape and old.device == device:
        old.copy_(new)
    else:
        setattr(routing, name, new.to(device))


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ConfigError(f"router mode {mode!r}; allowed: {', '.join(MODES)}")
