"""Loading a user's diffusion pipeline, and saying in one line and at once why that fails."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from searchlab.errors import ConfigError, DataError

__all__ = ["PipelineSource", "denoisers_of", "load_pipeline", "parse_dtype", "pipeline_digest"]

_HUB_SECONDS = 4.0
_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
_DENOISERS = ("unet", "transformer", "transformer_2")
_EDGE_BYTES = 64 * 1024


@dataclass(frozen=True)
class PipelineSource:
    """Where a pipeline comes from, so that every worker can load its own.

    Attributes:
        location: directory or hub id.
        dtype: see `parse_dtype`.
        device: torch device.
    """

    location: str
    dtype: str = "fp32"
    device: str = "cpu"

    def load(self) -> Any:
        """The pipeline."""
        return load_pipeline(self.location, dtype=self.dtype, device=self.device)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """fp32, bf16 or fp16 (or their long names) as a torch type.

    Raises:
        ConfigError: another name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; allowed: fp32, bf16, fp16")
    return _DTYPES[dtype]


def load_pipeline(
    location: str | Path, *, dtype: str | torch.dtype = "fp32", device: str = "cpu"
) -> Any:
    """A diffusers pipeline from a directory or from the hub, ready to be called.

    Weights are read from safetensors only, and no code of the repository is run. A hub id is
    checked with one request of at most some seconds before anything is downloaded; without a
    connection, or with HF_HUB_OFFLINE set, the local cache is used. Pipelines that were saved with
    a `SearchedScheduler` load as they are.

    Args:
        location: directory with a model_index.json, or hub id such as "owner/name".
        dtype: of the weights.
        device: where they go.

    Raises:
        DataError: absent, gated, not a pipeline, of an unknown class, or without safetensors.
        ConfigError: diffusers is not installed, or an unknown dtype or device.
    """
    chosen = parse_dtype(dtype)
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}; allowed: cpu, cuda, cuda:N") from None
    path = Path(location)
    local = path.is_dir()
    if local:
        index = path / "model_index.json"
        if not index.is_file():
            raise DataError(f"{str(location)!r} has no model_index.json, so it is no pipeline")
    else:
        index, local = _hub_index(str(location))
    # Diffusers finds the class of a saved scheduler only in modules that are imported already. It
    # comes after the checks above because importing diffusers takes seconds.
    import searchlab.spaces.solver_schedule.scheduler  # noqa: F401

    _check_class(str(location), index)

    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(location),
            use_safetensors=True,
            local_files_only=local,
            **{_dtype_argument(): chosen},
        )
        pipeline.to(place)
    except Exception as error:
        raise DataError(f"cannot load pipeline {str(location)!r}: {_first_line(error)}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _dtype_argument() -> str:
    """What `from_pretrained` calls the type of the weights in the installed version."""
    import diffusers

    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (0, 42) else "torch_dtype"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else 'no message'}"


def _hub_index(name: str) -> tuple[Path, bool]:
    """model_index.json of a hub repository, and whether only local files may be used."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise DataError(f"no such directory: {name!r}; a hub id has the form owner/name")
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise ConfigError(
            f'this needs diffusers; install it with: pip install "searchlab[diffusers]" ({error})'
        ) from None
    try:
        cached = try_to_load_from_cache(name, "model_index.json")
    except HFValidationError as error:
        raise DataError(f"{name!r} is no hub id: {_first_line(error)}") from None
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    problem: BaseException | None = None
    if not offline:
        problem = _within_seconds(name)
        if isinstance(problem, GatedRepoError):
            raise DataError(
                f"{name!r} is gated: accept its licence on its page and log in (hf auth login)"
            ) from None
        if isinstance(problem, EntryNotFoundError):
            raise DataError(f"{name!r} has no model_index.json, so it is no pipeline") from None
        if isinstance(problem, RepositoryNotFoundError):
            raise DataError(
                f"no pipeline {name!r} on the hub, or no access to it; no such directory either"
            ) from None
        if problem is None:
            return Path(hf_hub_download(name, "model_index.json")), False
    if isinstance(cached, str):
        return Path(cached), True
    why = "HF_HUB_OFFLINE is set" if problem is None else _first_line(problem)
    raise DataError(f"{name!r} is no directory, not in the cache, and the hub is not asked: {why}")


def _within_seconds(name: str) -> BaseException | None:
    """Asks the hub for one file's headers; the answer is None or what went wrong."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    answer: list[BaseException | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, "model_index.json"), timeout=_HUB_SECONDS)
            answer.append(None)
        except Exception as error:  # what it is decides what the user is told
            answer.append(error)

    # Name resolution has no time limit of its own, hence the thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return answer[0] if answer else TimeoutError(f"no answer from the hub in {_HUB_SECONDS:g} s")


def _check_class(location: str, index: Path) -> None:
    import diffusers

    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        name = content["_class_name"]
        libraries = {v[0] for v in content.values() if isinstance(v, list) and v}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"model_index.json of {location!r} names no _class_name") from None
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise DataError(
            f"{location!r} is a {name!r}, which diffusers {diffusers.__version__} does not have"
        )
    # Diffusers imports whatever module a part names; a folder is data.
    known = {None, "diffusers", "transformers"}
    for library in libraries - known:
        text = isinstance(library, str)
        ours = text and library.split(".")[0] == "searchlab"
        if not ours and not (text and hasattr(diffusers.pipelines, library)):
            raise DataError(
                f"a part of {location!r} comes from module {library!r}; allowed: those of "
                "diffusers and transformers"
            )


def denoisers_of(pipeline: Any) -> list[torch.nn.Module]:
    """The networks that sampling calls: unet, transformer and transformer_2, where they are.

    Raises:
        DataError: none of them.
    """
    found = [getattr(pipeline, name, None) for name in _DENOISERS]
    networks = [network for network in found if isinstance(network, torch.nn.Module)]
    if not networks:
        raise DataError(
            f"{type(pipeline).__name__} has no denoiser; allowed: {', '.join(_DENOISERS)}"
        )
    return networks


def pipeline_digest(pipeline: Any) -> str:
    """Hex digest of all networks of a pipeline.

    Names, shapes, types and the first and last 64 KiB of each tensor, so that it costs little for
    large models and still tells fine-tuned ones apart.
    """
    digest = blake2b(type(pipeline).__name__.encode(), digest_size=16)
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module):
            digest.update(f"{name} {type(part).__name__}".encode())
            _update(digest, part.state_dict().items())
    return digest.hexdigest()


def _update(digest: blake2b, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() == 0:
            continue
        flat = tensor.detach().reshape(-1)
        count = max(1, _EDGE_BYTES // tensor.element_size())
        for edge in (flat[:count], flat[-count:]):
            digest.update(edge.cpu().contiguous().view(torch.uint8).numpy().tobytes())
