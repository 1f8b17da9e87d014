"""A model that lies on several devices: its parts work at once, on candidates that follow each
other, and the host waits for none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import ConfigError
from searchlab.evaluators.language.batches import Batch
from searchlab.evaluators.language.forward import attention_of
from searchlab.evaluators.language.layered import Kept, LayeredForward, Masked, Progress

__all__ = ["SpreadForward", "devices_of"]


def devices_of(model: Any) -> list[torch.device]:
    """The device of each layer of a decoder, by where its weights are."""
    return [next(layer.parameters()).device for layer in model.model.layers]


class SpreadForward(LayeredForward):
    """Logits of candidates through a model whose layers are on several devices.

    Layers in a row on one device are a stage. Batches, and parts of their candidates, are pieces
    that go through the stages one behind the other: as soon as a piece has left a stage the next
    one is queued there, so that with two stages or more two pieces or more are on their way. Within
    the stages nothing is read back, so that the host runs ahead of the devices; it waits when
    logits are looked at, while later pieces are being computed.

    What experts do has to be computed without reading back, too: implementations `grouped_mm` and
    `batched_mm` of transformers are, `eager` is not.

    Args:
        resident: the model with masks.
        stages: numbers of layers, in order, in stages; None = by their devices.
        pieces: into how many parts the candidates of a batch are divided; None = twice as many as
            there are stages.
        tokens, active, flat, router_mode: see `LayeredForward`.

    Attributes:
        most: most pieces that were queued, each in another stage, before any was looked at.

    Raises:
        ConfigError: stages that are not all layers in order, or no pieces.
    """

    def __init__(
        self,
        resident: Masked,
        *,
        stages: Sequence[Sequence[int]] | None = None,
        pieces: int | None = None,
        tokens: int = 8192,
        active: int | None = None,
        flat: bool = False,
        router_mode: str = "slice",
    ) -> None:
        super().__init__(
            resident,
            tokens=tokens,
            remember=0,
            active=active,
            flat=flat,
            router_mode=router_mode,
        )
        self._devices = devices_of(self.model)
        if stages is None:
            cuts = [n for n in range(1, self.layers) if self._devices[n] != self._devices[n - 1]]
            stages = [part.tolist() for part in np.split(np.arange(self.layers), cuts)]
        self.stages = [[int(layer) for layer in stage] for stage in stages]
        if [n for stage in self.stages for n in stage] != list(range(self.layers)):
            raise ConfigError(
                f"stages {self.stages}; allowed: layers 0 to {self.layers - 1}, each once, in order"
            )
        self.pieces = 2 * len(self.stages) if pieces is None else pieces
        if self.pieces < 1:
            raise ConfigError(f"{self.pieces} pieces; allowed: 1 or more")
        self.steady = False
        self.most = 0

    @property
    def sweeps(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        """Where batches are expected: with the words' vectors."""
        found: torch.device = next(self.model.get_input_embeddings().parameters()).device
        return found

    def logits(self, batch: Batch, kept: Kept) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        for _, candidates, logits in self.sweep([batch], kept):
            yield candidates, logits

    def sweep(
        self, batches: Sequence[Batch], kept: Kept
    ) -> Iterator[tuple[int, NDArray[np.int64], Tensor]]:
        """See `LayeredForward.sweep`."""
        parts = np.array_split(np.arange(len(kept)), min(self.pieces, len(kept)))
        pieces = [(number, part) for number in range(len(batches)) for part in parts]
        on_way: dict[int, Progress] = {}
        with self._quiet():
            for tick in range(len(pieces) + len(self.stages) - 1):
                out: list[tuple[int, NDArray[np.int64], Tensor]] = []
                queued = 0
                # What is furthest goes first: its stage is free for the next one then.
                for stage in reversed(range(len(self.stages))):
                    at = tick - stage
                    if not 0 <= at < len(pieces):
                        continue
                    number, part = pieces[at]
                    if not stage:
                        on_way[at] = self.begin(batches[number], kept[part])
                    queued += 1
                    for layer in self.stages[stage]:
                        self.advance(on_way[at], layer)
                    if stage == len(self.stages) - 1:
                        for who, logits in self.finish(on_way.pop(at)):
                            home = _moved(logits, batches[number].ids.device)
                            out.append((number, part[who], home))
                self.most = max(self.most, queued)
                yield from out

    def advance(self, state: Progress, layer: int) -> None:
        """See `LayeredForward.advance`."""
        device = self._devices[layer]
        state.waiting = {
            at: [(who, _moved(hidden, device)) for who, hidden in entries]
            if at == layer
            else entries
            for at, entries in state.waiting.items()
        }
        state.hidden = [_moved(hidden, device) for hidden in state.hidden]
        if state.batch.wanted.device != device and layer == self.layers - 1:
            state.batch = state.batch.to(device)
        super().advance(state, layer)

    def finish(self, state: Progress) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """See `LayeredForward.finish`."""
        device = next(self.model.get_output_embeddings().parameters()).device
        state.hidden = [_moved(hidden, device) for hidden in state.hidden]
        yield from super().finish(state)

    def _captured(self, batch: Batch) -> tuple[Tensor, list[dict[str, Any]]]:
        hidden, calls = super()._captured(batch)
        known: dict[tuple[int, torch.device], Any] = {}
        moved = [
            {name: _moved(value, device, known) for name, value in call.items()}
            for call, device in zip(calls, self._devices, strict=True)
        ]
        return _moved(hidden, self._devices[0]), moved

    def _attention(self, batch: Batch) -> Tensor:
        """Whom each token sees, written out: transformers would read a plain mask back to see
        whether it says anything at all. Windows need the plain one.
        """
        config = self.model.config
        windows = any(
            getattr(config, name, None) is not None
            for name in ("sliding_window", "attention_chunk_size")
        )
        if batch.tree or windows or config._attn_implementation not in ("sdpa", "eager"):
            return attention_of(self.model, batch)
        size = batch.ids.shape[1]
        before = torch.ones(size, size, dtype=torch.bool, device=batch.ids.device).tril()
        seen = before & (batch.mask[:, None, None, :] > 0)
        seen |= torch.eye(size, dtype=torch.bool, device=batch.ids.device)  # padding sees itself
        kind = next(self.model.parameters()).dtype
        blocked = torch.zeros(seen.shape, dtype=kind, device=batch.ids.device)
        return blocked.masked_fill(~seen, torch.finfo(kind).min)


def _moved(value: Any, device: torch.device, known: dict[Any, Any] | None = None) -> Any:
    """Tensors inside a value on a device; nobody waits for them."""
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        if known is None:
            return value.to(device, non_blocking=True)
        key = (id(value), device)
        if key not in known:
            known[key] = value.to(device, non_blocking=True)
        return known[key]
    if isinstance(value, tuple):
        return tuple(_moved(part, device, known) for part in value)
    return value
