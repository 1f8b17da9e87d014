"""A checkpoint with fewer experts, written from files to files.

No model is loaded: kept tensors are copied as bytes, whatever numbers they hold, experts are
renumbered, and config.json says how many are left. What comes out is an ordinary checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from searchlab.errors import ConfigError, DataError
from searchlab.spaces.experts.cut import cut_config
from searchlab.spaces.experts.files import ExpertFiles, StoredTensor
from searchlab.spaces.experts.plan import ExpertPlan

__all__ = ["Written", "export_checkpoint"]

_CHUNK = 2**24  # bytes copied at a time
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
_OWN = ("config.json", "README.md", "genotype.json", "kept_experts.json", "kept_experts.jsonl")
_TEMPLATES = "additional_chat_templates"
_NUMBERED = re.compile(r"(.*\blayers\.)(\d+)(\..*\bexperts\.)(\d+)(\..*|$)")
DEAD = -1e9
"""What switches a padded expert off: added to its logit or score before the choice."""


@dataclass(frozen=True)
class Written:
    """One tensor that is going to be written.

    Attributes:
        name, dtype, shape: as in the new file.
        size: bytes.
        parts: gives the bytes, piece by piece.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    parts: Callable[[], Iterator[bytes | memoryview]]


def export_checkpoint(
    source: str | Path | ExpertFiles,
    plan: ExpertPlan,
    directory: str | Path,
    *,
    base: str | None = None,
) -> list[Path]:
    """Writes the checkpoint of a plan, with tokenizer, templates, licence and sidecars.

    Blocks with different numbers of experts: where the router has a term that can switch experts
    off (GPT-OSS, DeepSeek-V3), the smaller ones are filled up with experts that are never chosen;
    elsewhere a small model class is written beside the weights (`trust_remote_code=True`).

    Args:
        source: folder of the model, or its files.
        plan: what stays; for merged experts see `export_merged`.
        directory: where to; created.
        base: name of the model for the card; None = the folder's name.

    Returns:
        The files written.

    Raises:
        SpaceError: a plan that is not for this model.
        ConfigError: a plan that no checkpoint can carry; says what can.
        DataError: files that cannot be read.
    """
    files = source if isinstance(source, ExpertFiles) else ExpertFiles(source)
    check_target(files, plan)
    target = Path(directory)
    if target.resolve() == files.directory.resolve():
        raise ConfigError(f"export into {str(target)!r}, the model itself; allowed: another folder")
    own = (target / "genotype.json").exists()  # an earlier export is written over
    if not own and any(target.glob("*.safetensors")):
        raise ConfigError(f"folder {str(target)!r} holds another model; allowed: an empty one")
    target.mkdir(parents=True, exist_ok=True)
    config, slots = new_config(files, plan)
    if plan.merge:
        from searchlab.spaces.experts.export_merged import merged_tensors

        tensors = merged_tensors(files, plan)
    else:
        tensors = cut_tensors(files, plan, slots)
    paths = write_shards(tensors, target, limit=files.largest_shard)
    if config.get("auto_map", {}).get("AutoModelForCausalLM", "").startswith("searchlab_experts."):
        from searchlab.spaces.experts.shipped import module_text

        paths.append(_text(target / "searchlab_experts.py", module_text(files.family, config)))
    paths.append(_text(target / "config.json", json.dumps(config, indent=2) + "\n"))
    paths += copy_beside(files.directory, target)
    paths += sidecars(files, plan, target, base=base or files.directory.name)
    return paths


def check_target(files: ExpertFiles, plan: ExpertPlan) -> None:
    """Raises before anything is written where a plan cannot become a checkpoint of these files."""
    plan.check(files.shape)
    if plan.router_mode == "prob":
        rule = files.family.renormalise
        renormalised = files.config.get(rule) if isinstance(rule, str) else rule
        if plan.merge or not renormalised:
            raise ConfigError(
                "router mode 'prob' cannot be stored in a stock checkpoint; allowed: a search with "
                "'slice' or 'logit'"
            )
    if plan.merge and files.shape.quantised:
        raise ConfigError(
            f"merging experts that are quantised ({files.shape.quantised}); allowed: pruning, or "
            "--dequantize bf16 first"
        )
    if plan.merge and not plan.uniform:
        raise ConfigError("merged experts with different counts per block; allowed: one count")


Slots = dict[int, list[tuple[int, bool]]]
"""Layer -> the experts that are written, in order, and whether each is alive."""


def new_config(files: ExpertFiles, plan: ExpertPlan) -> tuple[dict[str, Any], Slots]:
    """config.json of the export, and what stands in which place."""
    config = json.loads(json.dumps(files.config))
    family = files.family
    slots: Slots = {
        layer: [(expert, True) for expert in row]
        for layer, row in zip(plan.blocks, plan.kept, strict=True)
    }
    count = max(plan.counts)
    if not plan.uniform:
        if family.padding:
            groups = 1 if plan.flat else files.shape.n_group
            slots = {layer: _padded(row, plan, groups, count) for layer, row in slots.items()}
        else:
            config["expert_counts"] = dict(zip(map(str, plan.blocks), plan.counts, strict=True))
            config["auto_map"] = {
                **config.get("auto_map", {}),
                "AutoModelForCausalLM": "searchlab_experts.PrunedForCausalLM",
            }
    cut_config(config, family, count, top_k=plan.top_k, flat=plan.flat)
    if family.extra_layers_key and config.get(family.extra_layers_key):
        config[family.extra_layers_key] = 0  # layers for other uses would have other experts
    new = {layer: [number for number, _ in row] for layer, row in slots.items()}
    for key in ("quantization_config", "compression_config"):
        if key in config:
            config[key] = _renumbered(config[key], new)
    return config, slots


def _padded(
    row: list[tuple[int, bool]], plan: ExpertPlan, groups: int, count: int
) -> list[tuple[int, bool]]:
    """Each group of experts filled up to its share of `count`."""
    each, out = plan.experts // groups, []
    for group in range(groups):
        own = [slot for slot in row if slot[0] // each == group]
        out += own + [(row[0][0], False)] * (count // groups - len(own))
    return out


def _renumbered(value: Any, new: dict[int, list[int]]) -> Any:
    """Module names in lists and keys with experts' new numbers; those of dropped ones are left out.

    A pattern or a list without expert numbers stays as it is.
    """
    if isinstance(value, list):
        parts = [_renumbered(item, new) for item in value]
        return [part for part in parts if part is not _GONE]
    if isinstance(value, dict):
        out = {}
        for key, item in value.items():
            name = _renumbered(key, new)
            if name is not _GONE:
                out[name] = _renumbered(item, new)
        return out
    match = _NUMBERED.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[2]) not in new:
        return value
    kept = new[int(match[2])]
    if int(match[4]) not in kept:
        return _GONE
    return f"{match[1]}{match[2]}{match[3]}{kept.index(int(match[4]))}{match[5]}"


_GONE = object()


def cut_tensors(files: ExpertFiles, plan: ExpertPlan, slots: Slots) -> list[Written]:
    """The tensors of a pruned checkpoint, in the order of the old one."""
    out: list[Written] = []
    places: dict[int, dict[int, list[int]]] = {}
    for layer, row in slots.items():
        for place, (expert, _) in enumerate(row):
            places.setdefault(layer, {}).setdefault(expert, []).append(place)
    for tensor in files.tensors.values():
        if tensor.kind == "extra":
            continue
        if tensor.kind == "other":
            out.append(_copied(tensor, tensor.name, tensor.shape, [(tensor.start, tensor.end)]))
        elif tensor.kind == "expert":
            for place in places[tensor.layer].get(tensor.expert, []):
                name = f"{tensor.prefix}{place}.{tensor.part}"
                out.append(_copied(tensor, name, tensor.shape, [(tensor.start, tensor.end)]))
        else:
            row = slots[tensor.layer]
            alive = [a for _, a in row]
            ranges = [_slice(tensor, expert) for expert, _ in row]
            shape = (len(row), *tensor.shape[1:])
            switch = tensor.kind == "router" and tensor.part == files.family.padding.get("tensor")
            dead = _encoded(DEAD, tensor.dtype) if switch and not all(alive) else b""
            out.append(_copied(tensor, tensor.name, shape, ranges, alive, dead))
    return out


def _slice(tensor: StoredTensor, expert: int) -> tuple[int, int]:
    step = tensor.size // tensor.shape[0]
    return tensor.start + expert * step, tensor.start + (expert + 1) * step


def _copied(
    tensor: StoredTensor,
    name: str,
    shape: tuple[int, ...],
    ranges: Sequence[tuple[int, int]],
    alive: Sequence[bool] = (),
    dead: bytes = b"",
) -> Written:
    def parts() -> Iterator[bytes]:
        with open(tensor.file, "rb") as stream:
            for number, (start, end) in enumerate(ranges):
                if dead and not alive[number]:
                    yield dead
                    continue
                stream.seek(start)
                left = end - start
                while left:
                    piece = stream.read(min(left, _CHUNK))
                    if not piece:
                        raise DataError(f"{str(tensor.file)!r} was cut off while it was read")
                    left -= len(piece)
                    yield piece

    size = sum(end - start for start, end in ranges)
    return Written(name, tensor.dtype, shape, size, parts)


def _encoded(value: float, dtype: str) -> bytes:
    if dtype == "BF16":
        return np.float32(value).tobytes()[2:]
    kinds: dict[str, Any] = {"F32": np.float32, "F64": np.float64, "F16": np.float16}
    if dtype not in kinds:
        raise ConfigError(f"a router's term of {dtype} cannot switch experts off; allowed: floats")
    limit = float(np.finfo(kinds[dtype]).max)
    return bytes(kinds[dtype](max(value, -limit)).tobytes())


def write_shards(tensors: Sequence[Written], directory: Path, *, limit: int) -> list[Path]:
    """Safetensors files of at most `limit` bytes each (or one tensor), and their index."""
    shards: list[list[Written]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    count, paths, where = len(shards), [], {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else ""
        path = directory / (name or "model.safetensors")
        _write(shard, path)
        paths.append(path)
        where.update({tensor.name: path.name for tensor in shard})
    stale = set(directory.glob("model*.safetensors")) - set(paths)
    for old in stale:  # of an earlier export into this folder
        old.unlink()
    index = directory / "model.safetensors.index.json"
    if count > 1:
        total = sum(tensor.size for tensor in tensors)
        content = {"metadata": {"total_size": total}, "weight_map": where}
        paths.append(_text(index, json.dumps(content, indent=2) + "\n"))
    elif index.exists():
        index.unlink()
    return paths


def _write(tensors: Sequence[Written], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.size],
        }
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                written = 0
                for piece in tensor.parts():
                    stream.write(piece)
                    written += len(piece)
                if written != tensor.size:
                    raise DataError(f"tensor {tensor.name!r}: {written} of {tensor.size} bytes")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def copy_beside(source: Path, target: Path) -> list[Path]:
    """Tokenizer, templates, licence and code: every file that is no weight."""
    paths = []
    for path in sorted(source.iterdir()):
        name = path.name
        skip = name in _OWN or name.endswith(_WEIGHTS) or name.endswith(".index.json")
        if path.is_file() and not skip and not name.startswith("."):
            paths.append(Path(shutil.copyfile(path, target / name)))
        elif path.is_dir() and name == _TEMPLATES:
            shutil.copytree(path, target / name, dirs_exist_ok=True)
            paths.append(target / name)
    return paths


def sidecars(files: ExpertFiles, plan: ExpertPlan, target: Path, *, base: str) -> list[Path]:
    """genotype.json, kept experts for runtimes that prune at load, and the model card."""
    plan = plan.with_about(**{"base": base, **dict(plan.about)})
    kept = dict(zip(map(str, plan.blocks), map(list, plan.kept), strict=True))
    whole = {"experts": plan.experts, "top_k": plan.top_k, "layers": kept}
    lines = [
        json.dumps({"layer": int(layer), "kept_experts": row}) + "\n" for layer, row in kept.items()
    ]
    return [
        _text(target / "genotype.json", json.dumps(plan.to_json(), indent=1) + "\n"),
        _text(target / "kept_experts.json", json.dumps(whole, indent=1) + "\n"),
        _text(target / "kept_experts.jsonl", "".join(lines)),
        _text(target / "README.md", _card(files, plan, base)),
    ]


def _card(files: ExpertFiles, plan: ExpertPlan, base: str) -> str:
    licence = ""
    try:
        front = (files.directory / "README.md").read_text("utf-8").split("---")[1]
        found = re.search(r"^license(_name|_link)?:.*$", front, re.MULTILINE)
        licence = found[0] + "\n" if found else ""
    except (OSError, UnicodeDecodeError, IndexError):
        pass
    before, after = files.layout.total_bytes, files.layout.other_bytes
    after += sum(plan.counts) * files.layout.expert_bytes
    counts = plan.counts
    how = f"{counts[0]}" if plan.uniform else f"{min(counts)} to {max(counts)}"
    what = "merged into" if plan.merge else "cut to"
    text = [
        f"---\n{licence}base_model: {base}\ntags: [mixture-of-experts, pruned, searchlab]\n---\n",
        f"# {base}, {how} of {plan.experts} experts per layer\n",
        f"The experts of {base} were {what} {how} per layer by a gradient-free search (searchlab); "
        f"{plan.top_k} of them are active per token. All other weights are those of the base.\n",
        f"Weights: {before / 2**30:.4g} GiB before, {after / 2**30:.4g} GiB now. Which experts "
        "are left stands in `genotype.json`, and per layer in `kept_experts.json`.\n",
    ]
    if plan.flat:
        text.append("Routing: experts are chosen without groups, which the base has.\n")
    if not plan.uniform and files.family.padding:
        text.append(
            "Layers with fewer experts are filled up with ones that are never chosen, since the "
            "format has one count for all.\n"
        )
    elif not plan.uniform:
        text.append(
            "Layers have different numbers of experts: load with `trust_remote_code=True`.\n"
        )
    for name, value in plan.about:
        text.append(f"- {name}: {value}")
    return "\n".join(text).rstrip() + "\n"


def _text(path: Path, text: str) -> Path:
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    os.replace(part, path)
    return path
