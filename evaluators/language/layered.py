"""A decoder run layer by layer for many candidates: what they have in common is computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchlab.errors import ConfigError
from searchlab.evaluators.language.batches import LANES, Batch
from searchlab.evaluators.language.forward import attention_of
from searchlab.evaluators.language.states import States
from searchlab.evaluators.language.steady import forwards, shared_experts, steady_experts

__all__ = ["LayerStore", "LayeredForward", "Masked", "Progress"]

Kept = NDArray[np.bool_]

_HEAD_LOGITS = 2**25  # numbers of a block of logits


class Masked(Protocol):
    """A model whose experts can be masked: `searchlab.spaces.experts` has it."""

    @property
    def model(self) -> Any: ...
    @property
    def layout(self) -> Any: ...
    @property
    def routers(self) -> Sequence[nn.Module]: ...
    def masked(
        self,
        kept: Kept,
        rows: Any = None,
        *,
        top_k: int | None = None,
        flat: bool = False,
        router_mode: Any = "slice",
        only: int | None = None,
    ) -> AbstractContextManager[Any]: ...


class LayerStore(Protocol):
    """Where weights come from; in a resident model they are simply there.

    `part` is "embed", the number of a layer, or "head".
    """

    def fetch(self, part: str | int) -> None: ...
    def release(self, part: str | int) -> None: ...


class _Resident:
    def fetch(self, part: str | int) -> None:
        pass

    def release(self, part: str | int) -> None:
        pass


def _expert_parts(layer: nn.Module) -> nn.Module | None:
    """The block of a layer that routes tokens to experts."""
    for child in layer.children():
        if hasattr(child, "experts"):
            return child
    return None


@dataclass
class Progress:
    """A batch on its way through the layers, for K candidates.

    Attributes:
        batch: what is fed.
        kept: bool (K, L, E).
        groups: (K,) which of `hidden` a candidate has; -1 = not on its way yet.
        hidden: states (B, S, d) of groups of candidates that do not differ so far.
        calls: arguments of every layer.
        waiting: layer -> candidates that start there, with the states they have.
    """

    batch: Batch
    kept: Kept
    groups: NDArray[np.int64]
    hidden: list[Tensor]
    calls: list[dict[str, Any]]
    waiting: dict[int, list[tuple[list[int], Tensor]]] = field(default_factory=dict)


class LayeredForward:
    """Logits of candidates, each a mask of experts, on batches of rows.

    All candidates go through one layer after another. Candidates whose masks are equal up to a
    layer have the same states there, which are computed once; attention of the next layer is
    computed before they part. States at the borders of layers are remembered, as far as memory is
    given, so that a candidate starts below the first block in which it differs from an earlier one.
    In the last layer only wanted columns pass the experts.

    With float32 on a CPU a candidate's logits do not depend on its neighbours, bit for bit.

    Args:
        resident: the model with masks; only its layers' modules are called if a store is given.
        store: where weights come from; None = they are resident.
        tokens: most tokens of one call.
        remember: bytes of states kept between calls; 0 with a store.
        active: experts per token; None = the model's.
        flat: routing without groups, for families that have them.
        router_mode: see `ResidentExperts.masked`.

    Attributes:
        computed: tokens times layers that were computed, for attention and for experts.
        observe: called at each block of experts with its number, router, experts, what enters
            them (B, S, d) for the first candidate, and the batch.
    """

    def __init__(
        self,
        resident: Masked,
        *,
        store: LayerStore | None = None,
        tokens: int = 8192,
        remember: int = 256 * 2**20,
        active: int | None = None,
        flat: bool = False,
        router_mode: str = "slice",
    ) -> None:
        if tokens < 1 or remember < 0:
            raise ConfigError(f"{tokens} tokens, {remember} bytes; allowed: 1 or more, 0 or more")
        self.resident = resident
        self.model: Any = resident.model
        self.store: LayerStore = store or _Resident()
        self.streams = store is not None
        self.tokens = tokens
        self.active = active
        self.flat = flat
        self.router_mode = router_mode
        self.remember = 0 if self.streams else remember
        self.computed = {"attention": 0, "experts": 0}
        self.steady = True  # equal rows have equal bits on a CPU, and are computed once
        self.observe: Callable[[int, Any, Any, Tensor, Batch], None] | None = None
        self._decoder: Any = self.model.model
        self._block_of = {layer: n for n, layer in enumerate(resident.layout.blocks)}
        self._states = States(self.remember)
        self._pairs: dict[int, bool] = {}  # layer -> whether its block returns its routing too

    @property
    def sweeps(self) -> bool:
        """Whether batches had better be given all at once."""
        return self.streams

    @property
    def layers(self) -> int:
        return len(self._decoder.layers)

    @property
    def device(self) -> torch.device:
        """Where batches are expected."""
        own: torch.device | None = getattr(self.store, "device", None)
        return next(self.model.parameters()).device if own is None else own

    def forget(self) -> None:
        """Drops remembered states."""
        self._states.clear()

    @contextmanager
    def routed(
        self, *, active: int | None = None, flat: bool = False, router_mode: str = "slice"
    ) -> Iterator[None]:
        """Inside, candidates are routed like this; without arguments as the model itself is."""
        saved = self.active, self.flat, self.router_mode
        self.active, self.flat, self.router_mode = active, flat, router_mode
        try:
            yield
        finally:
            self.active, self.flat, self.router_mode = saved

    def logits(self, batch: Batch, kept: Kept) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yields (candidates (c,), logits (c, B, w, V)) until every candidate of kept (K, L, E)
        was named once.
        """
        with self._quiet():
            state = self.begin(batch, kept)
            for layer in range(self.layers):
                self.advance(state, layer)
            yield from self.finish(state)

    def sweep(
        self, batches: Sequence[Batch], kept: Kept
    ) -> Iterator[tuple[int, NDArray[np.int64], Tensor]]:
        """All batches through one layer after another, so that weights are fetched once.

        Yields (number of the batch, candidates (c,), logits (c, B, w, V)).
        """
        with self._quiet():
            self.store.fetch("embed")
            states = [self.begin(batch, kept) for batch in batches]
            self.store.release("embed")
            for layer in range(self.layers):
                self.store.fetch(layer)
                for state in states:
                    self.advance(state, layer)
                self.store.release(layer)
            self.store.fetch("head")
            for number, state in enumerate(states):
                for candidates, logits in self.finish(state):
                    yield number, candidates, logits
            self.store.release("head")

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """No gradients; steady experts on a CPU."""
        with torch.no_grad(), ExitStack() as stack:
            if self.steady and self.device.type == "cpu":
                stack.enter_context(steady_experts(self.model))
            yield

    def begin(self, batch: Batch, kept: Kept) -> Progress:
        """A batch before the first layer, or where states of an earlier candidate go."""
        entry = self._states.get((batch.key, "calls"))
        if entry is None:
            entry = self._captured(batch)
            self._states.put((batch.key, "calls"), entry)
        hidden, calls = entry
        k = len(kept)
        state = Progress(batch, kept, np.full(k, -1, dtype=np.int64), [], calls)
        starts: dict[tuple[int, bytes], list[int]] = {}
        for candidate in range(k):
            layer, key = self._deepest(batch, kept[candidate])
            starts.setdefault((layer, key), []).append(candidate)
        for (layer, key), candidates in starts.items():
            known = hidden if layer == 0 else self._states.get((batch.key, layer, key))
            state.waiting.setdefault(layer, []).append((candidates, known))
        return state

    def _prefix(self, layer: int, kept: Kept) -> bytes:
        """What a candidate's states before a layer depend on."""
        blocks = sum(block < layer for block in self._block_of)
        routing = f"{self.active} {self.flat} {self.router_mode} ".encode()
        return routing + np.ascontiguousarray(kept[:blocks]).tobytes()

    def _deepest(self, batch: Batch, kept: Kept) -> tuple[int, bytes]:
        """The last layer before which a candidate's states are remembered, or 0."""
        for layer in range(self.layers - 1, 0, -1) if self._states else ():
            key = self._prefix(layer, kept)
            if (batch.key, layer, key) in self._states:
                return layer, key
        return 0, b""

    def _captured(self, batch: Batch) -> tuple[Tensor, list[dict[str, Any]]]:
        """States before the first layer, and the arguments the model gives each layer."""
        calls: list[dict[str, Any]] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                raise ConfigError(f"{type(self.model).__name__} calls layers by position")
            calls.append({**kwargs, "_hidden": hidden})
            return hidden

        def skip(hidden: Tensor) -> Tensor:
            return hidden

        replaced = [(layer, record) for layer in self._decoder.layers]
        with forwards([*replaced, (self._decoder.norm, skip)]):
            self._decoder(
                input_ids=batch.ids,
                attention_mask=self._attention(batch),
                position_ids=batch.positions,
                use_cache=False,
            )
        hidden: Tensor = calls[0]["_hidden"]
        for call in calls:
            del call["_hidden"]
        return hidden, calls

    def _attention(self, batch: Batch) -> Tensor:
        """A batch's mask as the model takes it."""
        return attention_of(self.model, batch)

    def advance(self, state: Progress, layer: int) -> None:
        """All candidates of a batch through one layer."""
        for candidates, hidden in state.waiting.pop(layer, ()):
            state.groups[candidates] = len(state.hidden)
            state.hidden.append(hidden)
        if not state.hidden:
            return
        last = layer == self.layers - 1
        module = self._decoder.layers[layer]
        block = self._block_of.get(layer)
        if block is None:
            state.hidden = self._each(state, layer, lambda x, call: module(x, **call))
            if last:
                state.hidden = [_columns(hidden, state.batch.wanted) for hidden in state.hidden]
        else:
            self._routed(state, layer, block, last)
        if self.remember and not last:
            for group, hidden in enumerate(state.hidden):
                first = int(np.flatnonzero(state.groups == group)[0])
                key = (state.batch.key, layer + 1, self._prefix(layer + 1, state.kept[first]))
                if key not in self._states:
                    # A copy is no part of something larger that would stay too.
                    self._states.put(key, hidden.clone())

    def _each(
        self, state: Progress, layer: int, call: Callable[[Tensor, dict[str, Any]], Any]
    ) -> list[Any]:
        """A call for all groups, as many at a time as a call may hold."""
        rows, size = state.batch.shape
        step = max(1, self.tokens // (rows * size))
        out: list[Any] = []
        for start in range(0, len(state.hidden), step):
            part = state.hidden[start : start + step]
            many = call(torch.cat(part), _repeated(state.calls[layer], rows, len(part)))
            self.computed["attention"] += len(part) * rows * size
            many = many if isinstance(many, tuple) else (many,)
            split = [tensor.split(rows) for tensor in many]
            out += split[0] if len(split) == 1 else zip(*split, strict=True)
        return out

    def _routed(self, state: Progress, layer: int, block: int, last: bool) -> None:
        """A layer with experts: attention for each group, experts for each group and mask."""
        module = self._decoder.layers[layer]
        experts = _expert_parts(module)
        assert experts is not None

        def attend(x: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
            seen: list[Tensor] = []

            def record(entering: Tensor) -> Any:
                seen.append(entering)
                nothing = torch.zeros_like(entering)
                return (nothing, None) if self._pairs[layer] else nothing

            with forwards([(experts, record)]):
                rest = module(x, **call)
            return rest, seen[0]

        if layer not in self._pairs:
            self._probe(layer, module, experts, state)
        # Before the first block all candidates have one state, in every generation.
        first = (state.batch.key, layer, "attention") if block == 0 else None
        halves = self._states.get(first)
        if halves is None or len(halves) != len(state.hidden):
            halves = self._each(state, layer, attend)
            if first is not None:
                self._states.put(first, halves)
        if self.observe is not None:
            router = self.resident.routers[block]
            self.observe(block, router, experts.experts, halves[0][1], state.batch)
        on_way = np.flatnonzero(state.groups >= 0)
        pairs: dict[tuple[int, bytes], int] = {}
        groups = np.full(len(state.groups), -1, dtype=np.int64)
        for candidate in on_way:
            key = (int(state.groups[candidate]), state.kept[candidate, block].tobytes())
            groups[candidate] = pairs.setdefault(key, len(pairs))
        members = np.array([np.flatnonzero(groups == group)[0] for group in range(len(pairs))])
        parents = [parent for parent, _ in pairs]
        if last:
            wanted = state.batch.wanted
            halves = [(_columns(rest, wanted), _columns(x, wanted)) for rest, x in halves]
        rows, size = halves[0][1].shape[:2]
        step = max(1, self.tokens // (rows * size))
        hidden: list[Any] = [None] * len(pairs)
        counts = state.kept[members, block].sum(axis=1)
        for count in np.unique(counts):  # masks of one size share a call: routing packs them
            same = np.flatnonzero(counts == count)
            for start in range(0, len(same), step):
                own = same[start : start + step]
                x = torch.cat([halves[parents[pair]][1] for pair in own])
                masks = state.kept[members[own]]
                which = torch.arange(len(own)).repeat_interleave(rows)  # read by the host
                fill = -len(x) % (LANES // math.gcd(size, LANES))
                if fill:
                    x = torch.cat([x, x[-1:].expand(fill, -1, -1)])
                    which = torch.cat([which, which[-1:].expand(fill)])
                if len(own) == 1:  # one mask alone is routed by a smaller product: other last bits
                    masks = np.repeat(masks, 2, axis=0)
                with ExitStack() as stack:
                    stack.enter_context(
                        self.resident.masked(
                            masks,
                            which,
                            top_k=self.active,
                            flat=self.flat,
                            router_mode=self.router_mode,
                            only=block,
                        )
                    )
                    once = list(dict.fromkeys(parents[pair] for pair in own))
                    if self.steady and len(once) < len(own):
                        stack.enter_context(self._once(experts, halves, once, own, parents, x))
                    out = experts(x)
                self.computed["experts"] += len(x) * size
                out = (out[0] if isinstance(out, tuple) else out)[: len(own) * rows]
                rest = torch.cat([halves[parents[pair]][0] for pair in own])
                for pair, part in zip(own, (rest + out).split(rows), strict=True):
                    hidden[pair] = part
        state.groups, state.hidden = groups, hidden

    @staticmethod
    def _once(
        experts: Any,
        halves: Sequence[tuple[Tensor, Tensor]],
        once: Sequence[int],
        own: NDArray[np.int64],
        parents: Sequence[int],
        x: Tensor,
    ) -> AbstractContextManager[None]:
        """Experts for rows `x` that are copies of what enters them in the groups `once`."""
        base = torch.cat([halves[parent][1].flatten(0, 1) for parent in once])
        count = len(base) // len(once)
        place = torch.tensor([once.index(parents[pair]) for pair in own], device=x.device)
        copies = (place[:, None] * count + torch.arange(count, device=x.device)).reshape(-1)
        fill = x.shape[0] * x.shape[1] - len(copies)
        if fill:  # copies of the last row
            copies = torch.cat([copies, copies[-x.shape[1] :].repeat(fill // x.shape[1])])
        return forwards([(experts.experts, shared_experts(experts.experts, base, copies))])

    def _probe(self, layer: int, module: nn.Module, experts: nn.Module, state: Progress) -> None:
        """Makes sure that a layer adds its experts' output to what attention gave, and no more.

        Raises:
            ConfigError: it does something else.
        """
        rows = state.batch.shape[0]
        x, call = state.hidden[0], _repeated(state.calls[layer], rows, 1)
        outs: list[Any] = []

        def record(entering: Tensor) -> Any:
            outs.append(type(experts).forward(experts, entering))
            return outs[0]

        with forwards([(experts, record)]):
            whole = module(x, **call)
        self._pairs[layer] = isinstance(outs[0], tuple)
        added = outs[0][0] if self._pairs[layer] else outs[0]

        def nothing(entering: Tensor) -> Any:
            zero = torch.zeros_like(entering)
            return (zero, None) if self._pairs[layer] else zero

        with forwards([(experts, nothing)]):
            rest = module(x, **call)
        if not torch.equal((rest + added).nan_to_num(), whole.nan_to_num()):
            raise ConfigError(
                f"layer {layer} of {type(self.model).__name__} does more than add its experts' "
                "output; allowed: layers that end with that sum"
            )

    def finish(self, state: Progress) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Logits of the wanted columns after the last layer."""
        head = self.model.get_output_embeddings()
        rows, width = state.batch.wanted.shape
        step = max(1, _HEAD_LOGITS // (rows * width * head.weight.shape[0]))
        for start in range(0, len(state.hidden), step):
            flat = torch.cat(state.hidden[start : start + step])
            flat = flat.reshape(-1, flat.shape[-1])
            count = len(flat)
            if count % LANES:
                flat = torch.cat([flat, flat[-1:].expand(-count % LANES, -1)])
            logits = head(self._decoder.norm(flat))[:count].view(
                -1, rows, width, head.weight.shape[0]
            )
            members = [np.flatnonzero(state.groups == start + g) for g in range(len(logits))]
            candidates = np.concatenate(members)
            which = np.repeat(np.arange(len(logits)), [len(own) for own in members])
            if len(which) != len(logits):
                logits = logits[torch.from_numpy(which).to(logits.device)]
            yield candidates, logits


def _columns(hidden: Tensor, wanted: Tensor) -> Tensor:
    """Wanted columns of each row: (B, S, d) and (B, w) -> (B, w, d)."""
    return hidden.gather(1, wanted[:, :, None].expand(-1, -1, hidden.shape[-1]))


def _repeated(call: dict[str, Any], rows: int, times: int) -> dict[str, Any]:
    """A layer's arguments for `times` copies of the batch's rows."""
    if times == 1:
        return call

    def many(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows and rows > 1:
            return value.repeat(times, *[1] * (value.ndim - 1))
        if isinstance(value, tuple):
            return tuple(many(part) for part in value)
        return value

    return {name: many(value) for name, value in call.items()}
