"""Models larger than the device: weights come layer by layer, the next one while one computes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from searchlab.errors import ConfigError, DataError

__all__ = ["FolderWeights", "MemoryWeights", "WeightStream", "Weights", "streamed"]

Part = str | int

_ENDS = 2**16
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_HALF = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}


class Weights(Protocol):
    """Stored tensors under names of their own."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor:
        """A tensor on the CPU; whoever reads it owns it."""


class FolderWeights:
    """The safetensors files of a checkpoint.

    Raises:
        DataError: none there, or an index that names other files.
    """

    def __init__(self, folder: str | Path) -> None:
        import safetensors

        safe_open: Any = safetensors.safe_open
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            listed = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            missing = sorted(name for name in listed if not (self.folder / name).is_file())
            if missing:
                raise DataError(f"{index} names {missing[0]}, which is not there")
            files = [self.folder / name for name in sorted(listed)]
        if not files:
            raise DataError(f"{self.folder} has no safetensors files")
        self._open = [safe_open(str(file), framework="pt") for file in files]
        self._file: dict[str, Any] = {name: file for file in self._open for name in file.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        return list(self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        out: Tensor = self._file[name].get_tensor(name)
        return out


class MemoryWeights:
    """The weights of a model in the host's memory."""

    def __init__(self, model: nn.Module) -> None:
        self._state = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def read(self, name: str) -> Tensor:
        out: Tensor = self._state[name].clone()
        return out


class WeightStream:
    """Gives a model without weights those of one part after another.

    Parts are "embed", each layer, and "head", in this order; a part's weights are dropped when it
    is released. While a part computes, a thread reads the next one, if both fit. Experts that are
    stored one by one are joined as the model holds them. Where input and output embeddings are
    tied they stay from "embed" to "head".

    Args:
        model: of transformers, on the device "meta".
        weights: where tensors are read.
        device: where they compute.
        limit: bytes that weights may take there; None = any.
        renamed: how the name of the experts' block is stored -> what it is in the model.

    Attributes:
        bytes_read: in all; a sweep reads every weight once.
        reads: how often each part was read.
        peak: most bytes of weights held, the part that is being read included.

    Raises:
        DataError: tensors that the model has and the files have not, or the other way round.
        ConfigError: a quantised model, or a part above the limit.
    """

    def __init__(
        self,
        model: Any,
        weights: Weights,
        *,
        device: str | torch.device = "cpu",
        limit: int | None = None,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        if getattr(model.config, "quantization_config", None):
            raise ConfigError("weights are quantised; streaming needs them as bfloat16 or float32")
        self.model = model
        self.device = torch.device(device)
        self.limit = limit
        self.bytes_read, self.peak = 0, 0
        self.reads: Counter[Part] = Counter()
        self._weights = weights
        self._renamed = dict(renamed or {})
        self._decoder = model.model
        self.parts: list[Part] = ["embed", *range(len(self._decoder.layers)), "head"]
        self._tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        self._stored = self._sorted()
        self._size = {part: self._bytes(part) for part in self.parts}
        self._held: dict[Part, int] = {}
        self._coming: dict[Part, Future[dict[str, Tensor]]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
        fixed = self._size["embed"] if self._tied else 0
        for part, size in self._size.items():
            whole = size + (0 if part == "embed" else fixed)
            if limit is not None and whole > limit:
                raise ConfigError(f"part {part!r} has {whole} bytes; the limit is {limit}")

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return sum(self._size.values())

    def _modules(self, part: Part) -> dict[str, nn.Module]:
        """Prefix of names -> module."""
        if part == "embed":
            return {"model.embed_tokens": self._decoder.embed_tokens}
        if part == "head":
            head = {} if self._tied else {"lm_head": self.model.get_output_embeddings()}
            return {"model.norm": self._decoder.norm, **head}
        assert isinstance(part, int)
        return {f"model.layers.{part}": self._decoder.layers[part]}

    def _wanted(self, part: Part) -> dict[str, Tensor]:
        return {
            f"{prefix}.{name}": tensor
            for prefix, module in self._modules(part).items()
            for name, tensor in module.state_dict().items()
        }

    def _bytes(self, part: Part) -> int:
        return sum(t.numel() * t.element_size() for t in self._wanted(part).values())

    def _in_model(self, stored: str) -> str:
        for old, new in self._renamed.items():
            stored = stored.replace(f".{old}.", f".{new}.")
        return stored

    def _sorted(self) -> dict[Part, dict[str, list[tuple[str, int, int]]]]:
        """Part -> name in the model -> stored tensors as (name, expert, half); -1 = the whole."""
        places = {name: part for part in self.parts for name in self._wanted(part)}
        out: dict[Part, dict[str, list[tuple[str, int, int]]]] = {p: {} for p in self.parts}
        layers = len(self._decoder.layers)
        for stored in self._weights.names():
            name, expert, half = self._in_model(stored), -1, -1
            found = _EXPERT.fullmatch(name)
            if found and name not in places:
                kind = found.group(3)
                half = _HALF.get(kind, -1)
                name = f"{found.group(1)}.experts.{'down_proj' if half < 0 else 'gate_up_proj'}"
                expert = int(found.group(2))
            if name in places:
                out[places[name]].setdefault(name, []).append((stored, expert, half))
            elif not (self._tied and name == "lm_head.weight") and not _extra(name, layers):
                raise DataError(f"tensor {stored!r} has no place in {type(self.model).__name__}")
        for part in self.parts:
            for name, tensor in self._wanted(part).items():
                parts = out[part].get(name, [])
                whole = len(parts) == 1 and parts[0][1] < 0
                each = tensor.shape[0] * (2 if name.endswith("gate_up_proj") else 1)
                if not whole and len(parts) != each:
                    raise DataError(f"the weights lack {name!r}, or parts of it")
        return out

    def digest(self) -> str:
        """Hash of names, shapes and both ends of all tensors, in hex; reads every tensor once."""
        digest = blake2b(digest_size=16)
        for name in sorted(self._weights.names()):
            tensor = self._weights.read(name).contiguous()
            flat = tensor.view(-1).view(torch.uint8)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(flat[:_ENDS].numpy().tobytes() + flat[-_ENDS:].numpy().tobytes())
        return digest.hexdigest()

    def _read(self, part: Part) -> dict[str, Tensor]:
        """Tensors of a part on the device, by their names in the model."""
        out = {}
        for name, wanted in self._wanted(part).items():
            stored = self._stored[part][name]
            if stored[0][1] < 0:
                out[name] = self._weights.read(stored[0][0]).to(self.device, wanted.dtype)
                self._fits(name, out[name], wanted)
                continue
            joined = torch.empty(wanted.shape, dtype=wanted.dtype, device=self.device)
            for source, expert, half in stored:
                place = joined[expert] if half < 0 else joined[expert].chunk(2)[half]
                tensor = self._weights.read(source)
                self._fits(source, tensor, place)
                place.copy_(tensor)
            out[name] = joined
        return out

    @staticmethod
    def _fits(name: str, tensor: Tensor, wanted: Tensor) -> None:
        if tensor.shape != wanted.shape:
            raise DataError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}; "
                f"the model wants {tuple(wanted.shape)}"
            )

    def _start(self, part: Part) -> None:
        self._held[part] = self._size[part]
        self.peak = max(self.peak, sum(self._held.values()))
        self._coming[part] = self._pool.submit(self._read, part)

    def fetch(self, part: Part) -> None:
        """Makes a part's weights usable, and starts to read the next part."""
        if part == "embed":
            self._drop()
        if part not in self._coming:
            self._start(part)
        tensors = self._coming.pop(part).result()
        self.bytes_read += sum(t.numel() * t.element_size() for t in tensors.values())
        self.reads[part] += 1
        for prefix, module in self._modules(part).items():
            own = {
                n[len(prefix) + 1 :]: t for n, t in tensors.items() if n.startswith(prefix + ".")
            }
            module.load_state_dict(own, strict=True, assign=True)
            module.requires_grad_(False)
        if part == "embed" and self._tied:
            self.model.get_output_embeddings().weight = self._decoder.embed_tokens.weight
        following = self.parts.index(part) + 1
        if following < len(self.parts):
            after = self.parts[following]
            if self.limit is None or sum(self._held.values()) + self._size[after] <= self.limit:
                self._start(after)

    def release(self, part: Part) -> None:
        """Drops a part's weights."""
        if part == "embed" and self._tied:
            return
        for module in self._modules(part).values():
            module.to("meta")
        self._held.pop(part, None)
        if part == "head" and self._tied:
            self._decoder.embed_tokens.to("meta")
            self.model.get_output_embeddings().weight = self._decoder.embed_tokens.weight
            self._held.pop("embed", None)

    def _drop(self) -> None:
        """Ends a sweep that was broken off."""
        for part, coming in list(self._coming.items()):
            coming.cancel()
            if not coming.cancelled():
                coming.exception()
            del self._coming[part]
        for part in list(self._held):
            for module in self._modules(part).values():
                module.to("meta")
        self._held.clear()

    def close(self) -> None:
        """Ends the reading thread."""
        self._drop()
        self._pool.shutdown()


def _extra(name: str, layers: int) -> bool:
    """Whether a tensor is of a layer behind the last one, which has other uses."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found.group(1)) >= layers


def streamed(
    source: str | Path | nn.Module,
    *,
    family: Any = None,
    device: str | torch.device = "cpu",
    limit: int | None = None,
    attention: str | None = None,
    experts: str | None = None,
) -> tuple[Any, WeightStream]:
    """A model whose weights are streamed, and the stream: for `LayeredForward(..., store=...)`.

    Args:
        source: folder of a checkpoint, or a model in the host's memory.
        family: of `ResidentExperts`; None = by the configuration.
        device: where layers compute.
        limit: bytes that weights may take there.
        attention, experts: names of implementations; None = the model's, or transformers' choice.

    Raises:
        DataError, ConfigError: see `WeightStream` and `ResidentExperts`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from searchlab.spaces.experts.model import ResidentExperts

    weights: Weights
    dtype: Any
    if isinstance(source, nn.Module):
        config: Any = source.config
        weights, dtype = MemoryWeights(source), source.dtype
        attention = attention or config._attn_implementation
        experts = experts or getattr(config, "_experts_implementation", None)
    else:
        config = AutoConfig.from_pretrained(str(source))
        weights, dtype = FolderWeights(source), config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, experts_implementation=experts, dtype=dtype
        )
    model.eval().requires_grad_(False)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    resident = ResidentExperts(model, family)
    renamed = {old: resident.family.block for old in resident.family.file_blocks}
    store = WeightStream(model, weights, device=device, limit=limit, renamed=renamed)
    return resident, store
