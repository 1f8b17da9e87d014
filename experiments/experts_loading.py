"""Opens language models for the recipe: configuration and tokenizer first, weights at the end."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchlab.errors import ConfigError, DataError
from searchlab.experiments.zoo.characters import CHARACTERS

__all__ = ["SPREAD", "ModelSource", "check_device", "load_model", "open_model", "weight_bytes"]


@dataclass(frozen=True)
class ModelSource:
    """A model without its weights.

    Attributes:
        location: folder or hub id, as it was given.
        config: of transformers.
        tokenizer: of transformers.
        folder: None for a hub id.
        generation_config: of transformers; None where the model has none.
    """

    location: str
    config: Any
    tokenizer: Any
    folder: Path | None
    generation_config: Any = None

    @property
    def context(self) -> int | None:
        """Most tokens that the model reads."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def stops(self) -> tuple[int, ...]:
        """Numbers of the tokens that end an answer, as the model's own configuration says."""
        from searchlab.evaluators.language.experts import stops_of

        return stops_of(self)


def open_model(location: str) -> ModelSource:
    """Configuration and tokenizer of a folder, a hub id, or "zoo".

    Raises:
        ConfigError: transformers is missing, or the folder is.
        DataError: what is there cannot be read.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("experts need transformers: pip install 'searchlab[transformers]'")
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    location = str(CHARACTERS) if location == "zoo" else location
    path = Path(location)
    folder = path if path.is_dir() else None
    if folder is None and (path.exists() or location.count("/") != 1 or location[:1] in "./~"):
        raise ConfigError(f"model {location!r} is no folder; allowed: a folder or a hub id")
    if folder is not None and not (folder / "config.json").is_file():
        raise DataError(f"folder {location!r} has no config.json")
    try:
        config = AutoConfig.from_pretrained(location)
        tokenizer = AutoTokenizer.from_pretrained(location)
        tokenizer.model_max_length = 2**62  # too long prompts are named here, by their items
    except Exception as error:  # whatever transformers raises for what lies there
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"model {location!r} cannot be opened: {reason}") from None
    try:
        generation = GenerationConfig.from_pretrained(location)
    except Exception:  # most tiny models have none; their configuration then says how answers end
        generation = None
    return ModelSource(location, config, tokenizer, folder, generation)


SPREAD = "spread"


def check_device(device: str | None) -> None:
    """Raises ConfigError for a device that is not here."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu", *(f"cuda:{n}" for n in range(count))]
    here += ["cuda"] if count else []
    if device == SPREAD:
        if count < 2 or importlib.util.find_spec("accelerate") is None:
            raise ConfigError(
                f"device {device!r} with {count} GPUs; allowed: two or more, and accelerate "
                "(pip install accelerate)"
            )
    elif device is not None and device not in here:
        raise ConfigError(f"device {device!r} is not here; allowed: {', '.join(here)}")


def load_model(source: ModelSource, *, dtype: str = "auto", device: str | None = None) -> Any:
    """The model with its weights, ready to be asked.

    Args:
        source: see `open_model`.
        dtype: "auto" = float32 on the CPU, as stored elsewhere.
        device: "cuda", "cuda:1", "cpu"; "spread" divides the layers among all GPUs; None = cuda
            where there is one.

    Raises:
        ConfigError: no such device.
        DataError: the weights cannot be loaded, or some are missing.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    spread = device == SPREAD
    if not spread and dtype == "auto" and torch.device(device).type == "cpu":
        dtype = "float32"
    try:
        model, said = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=dtype,
            output_loading_info=True,
            **({"device_map": "balanced"} if spread else {}),
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"model {source.location!r} cannot be loaded: {reason}") from None
    lacking = sorted(said["missing_keys"]) + sorted(map(str, said["mismatched_keys"]))
    if lacking:
        raise DataError(
            f"model {source.location!r} lacks {len(lacking)} tensors, such as {lacking[0]}; they "
            "would be random"
        )
    if spread:
        return model.eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        model.set_experts_implementation("eager")
    return model.to(device).eval().requires_grad_(False)


def weight_bytes(source: ModelSource) -> int:
    """Bytes of all weight files of a folder; 0 for a hub id."""
    if source.folder is None:
        return 0
    return sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
