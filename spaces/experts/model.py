"""One resident model that is evaluated with other experts, without touching its weights.

Masks keep experts (`masked`): rows of one batch may have masks of their own, so that many
candidates share a forward pass. Mixtures of experts (`merged`) are summed into buffers beside the
model. Both end as they began, bit for bit, also after an exception.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchlab.cuda_ext import merge_experts
from searchlab.errors import ConfigError, SpaceError
from searchlab.spaces.experts.families import Family, family_of, layout_of
from searchlab.spaces.experts.routing import MODES, RouterMode, Rule, choose, fits, fused

__all__ = ["ResidentExperts"]


class _Routing:
    """What stands in for one router's forward."""

    def __init__(self, router: nn.Module, rule: Rule, *, wide: bool) -> None:
        self.router = router
        self.rule = rule
        self.wide = wide
        self.k = 1
        self.mode: RouterMode = "slice"
        self.fused = False  # one kernel from logits to weights; not yet run within a model on a GPU
        self.mask: Tensor | None = None
        self.index: Tensor | None = None
        self.absent: Tensor | None = None
        self.rows: Tensor | None = None
        self.table: Tensor | None = None
        self.own: dict[str, Tensor] = {}  # the router's tensors with kept experts only
        self.renumbered = False  # experts of the answer are places, as in a model that was cut
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
        if self._fuses(logits):
            return logits, *fused(logits, self.rule, self.k, self.mask, tokens)
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
        if self.own and self.index is not None and not self.renumbered:
            experts = self.index[0][experts]
        if floored is not None:
            self.floored = floored if self.floored is None else self.floored + floored
        return logits, weights, experts

    def _fuses(self, logits: Tensor) -> bool:
        """Whether one kernel does it: a softmax router without groups, masks of its own experts."""
        plain = self.rule.score == "softmax" and self.rule.n_group == 1 and self.mode == "slice"
        if not (self.fused and plain) or self.mask is None or self.own:
            return False
        return fits(logits, self.k)


@dataclass(frozen=True)
class _Merged:
    """One block's merged experts.

    Attributes:
        table: (E', E), what they were made by.
        buffers: name of the parameter -> (E', ...).
    """

    table: NDArray[np.float64]
    buffers: dict[str, Tensor]


def one_hot(table: NDArray[Any]) -> NDArray[np.float64]:
    """A single 1 per row of (E', E), at the greatest coefficient."""
    out = np.zeros(table.shape)
    out[np.arange(len(table)), table.argmax(axis=1)] = 1.0
    return out


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
        self._merged: dict[int, _Merged] = {}

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
        only: int | None = None,
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
            only: number of the one block that forwards inside will pass; None = all.

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
            host = rows.cpu().numpy()  # nobody waits for rows that the host has
            ends = (int(host.min()), int(host.max())) if host.size else (0, 0)
            if rows.ndim != 1 or rows.dtype != torch.int64 or ends[0] < 0 or ends[1] >= len(masks):
                raise ConfigError(
                    f"rows of shape {tuple(rows.shape)}, {rows.dtype}, from {ends[0]} to {ends[1]};"
                    f" allowed: (batch,) int64 from 0 to {len(masks) - 1}"
                )
        self.check(masks, top_k=top_k, flat=flat)
        k = self.layout.top_k if top_k is None else top_k
        grouped = self._rule.n_group > 1 and not flat
        for number, routing in enumerate(self._routing):
            if only not in (None, number):
                continue
            device = routing.device
            index, absent = _packed(masks[:, number], grouped=grouped)
            _hold(routing, "index", index, device)
            _hold(routing, "absent", absent, device)
            several = len(masks) > 1 and router_mode == "slice"
            _hold(routing, "mask", masks[:, number] if several else None, device)
            routing.rows = None if rows is None or len(masks) == 1 else _sent(rows, device)
            routing.table = None
            routing.rule = self._rule if grouped else self._flat_rule
            routing.mode = router_mode
            routing.k = k
            routing.renumbered = False
            routing.cut()
        with self._in_place(k):
            yield

    @contextmanager
    def merged(
        self,
        merge: Sequence[NDArray[Any] | Tensor],
        *,
        route: Sequence[NDArray[Any] | Tensor] | None = None,
        router_mode: RouterMode = "slice",
        top_k: int | None = None,
        flat: bool = False,
    ) -> Iterator[None]:
        """Every forward inside has weighted sums of the experts in their places.

        The sums stand in buffers beside the model, which are kept for the next call; a block whose
        matrix is the same as there is not summed again (see `release`).

        Args:
            merge: per block (E', E): row j makes expert j. A row with a single 1 copies.
            route: per block (E', E), what the router does. "slice": row j names the expert whose
                logit expert j gets, by a single 1. "prob": scores of all experts are mapped after
                the softmax (negative results count as 0) and before the choice. "logit": logits
                are mapped. None = "slice" by the greatest coefficient of each row of `merge`.
            router_mode: see `route`.
            top_k: experts per token; None = the model's.
            flat: routing without groups. With groups, rows 0 .. E'/n - 1 are the first group.

        Raises:
            SpaceError: matrices of another shape, or with what is not finite; counts as in
                `masked`.
            ConfigError: a mode without its matrices; experts that are no plain floating numbers.

        Source: arXiv 2407.00945, section 3.2 ("prob"). The other modes are additions: their results
        are models that stock runtimes load.
        """
        tables = self._tables("merge", merge)
        if router_mode not in MODES:
            raise ConfigError(f"router mode {router_mode!r}; allowed: {', '.join(MODES)}")
        if route is None and router_mode != "slice":
            raise ConfigError(f"router mode {router_mode!r} without route; allowed: slice")
        if route is None:
            routes = [one_hot(table) for table in tables]
        else:
            routes = self._tables("route", route)
        for layer, table, other in zip(self.layout.blocks, tables, routes, strict=True):
            if table.shape != other.shape:
                raise SpaceError(
                    f"layer {layer}: merge {table.shape} and route {other.shape}; allowed: equal"
                )
            self.layout.check_count(len(table), top_k=top_k, flat=flat)
            if router_mode == "slice" and not np.array_equal(other, one_hot(other)):
                raise SpaceError(
                    f"layer {layer}: route of mode 'slice' has rows that are not one-hot; allowed: "
                    "prob and logit, which map"
                )
        k = self.layout.top_k if top_k is None else top_k
        for routing, other in zip(self._routing, routes, strict=True):
            sliced = router_mode == "slice"
            chosen = other.argmax(axis=1)[None].astype(np.int64)
            _hold(routing, "index", chosen if sliced else None, routing.device)
            mapped = None if sliced else other.astype(np.float32)
            _hold(routing, "table", mapped, routing.device)
            routing.absent = routing.rows = routing.mask = None
            routing.rule = self._flat_rule if flat else self._rule
            routing.mode = router_mode
            routing.k = k
            routing.renumbered = True
            routing.cut()
        self._sum(tables)
        with self._in_place(k, [len(table) for table in tables]):
            yield

    def _tables(
        self, name: str, tables: Sequence[NDArray[Any] | Tensor]
    ) -> list[NDArray[np.float64]]:
        if len(tables) != len(self.blocks):
            raise SpaceError(f"{name}: {len(tables)} matrices for {len(self.blocks)} blocks")
        out = []
        for layer, given in zip(self.layout.blocks, tables, strict=True):
            table = np.asarray(given.cpu() if isinstance(given, Tensor) else given, np.float64)
            if table.ndim != 2 or table.shape[1] != self.layout.experts:
                raise SpaceError(
                    f"layer {layer}: {name} of shape {table.shape}; allowed: "
                    f"(E', {self.layout.experts})"
                )
            if not np.isfinite(table).all():
                raise SpaceError(f"layer {layer}: {name} has coefficients that are not finite")
            out.append(table)
        return out

    def _sum(self, tables: Sequence[NDArray[np.float64]]) -> None:
        """Fills the buffers of blocks whose matrix is another one than there."""
        for number, (experts, table) in enumerate(zip(self.experts, tables, strict=True)):
            held = self._merged.get(number)
            if held is not None and np.array_equal(held.table, table):
                continue
            self._merged.pop(number, None)  # what an interruption leaves half-written is not valid
            buffers = held.buffers if held is not None and held.table.shape == table.shape else {}
            matrix = torch.from_numpy(table)
            made: dict[str, Tensor] = {}
            for name, weight in experts.named_parameters(recurse=False):
                if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    raise ConfigError(
                        f"experts of layer {self.layout.blocks[number]} are {weight.dtype}; "
                        "merging needs plain weights (--dequantize bf16), pruning does not"
                    )
                made[name] = merge_experts(matrix, weight.detach(), buffers.get(name))
            self._merged[number] = _Merged(table, made)

    def release(self) -> None:
        """Lets go of the buffers of merged experts."""
        self._merged.clear()

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
    def _in_place(self, k: int, merged: Sequence[int] = ()) -> Iterator[None]:
        """Routers answer by `_routing`; what they were stands again afterwards."""
        if self._active:
            raise ConfigError("experts are masked or merged already; allowed: one pass at a time")
        self._active = True
        saved: list[tuple[nn.Module, str, bool, Any]] = []
        weights: list[tuple[nn.Module, str, nn.Parameter | None]] = []

        def put(module: nn.Module, name: str, value: Any) -> None:
            saved.append((module, name, name in module.__dict__, module.__dict__.get(name)))
            module.__dict__[name] = value

        try:
            for block, routing in zip(self.blocks, self._routing, strict=True):
                put(routing.router, "forward", routing.forward)
                for module in (block, routing.router):
                    if hasattr(module, "top_k"):
                        put(module, "top_k", k)
            for number, count in enumerate(merged):
                for module in (self.routers[number], self.experts[number]):
                    put(module, "num_experts", count)
                experts = self.experts[number]
                for name, buffer in self._merged[number].buffers.items():
                    weights.append((experts, name, experts._parameters[name]))
                    experts._parameters[name] = nn.Parameter(buffer, requires_grad=False)
            yield
        finally:
            for module, name, weight in weights:
                module._parameters[name] = weight
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
        old.copy_(_pinned(new, device), non_blocking=True)
    else:
        setattr(routing, name, _sent(new, device))


def _pinned(value: Tensor, device: torch.device) -> Tensor:
    """The same in memory that a GPU reads while the host goes on."""
    return value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """The same on a device; nobody waits for it."""
    return _pinned(value, device).to(device, non_blocking=True)
