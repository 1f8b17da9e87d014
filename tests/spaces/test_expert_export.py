"""Checkpoints written from files: equal to models that were cut, bit for bit, in any format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from searchlab.errors import ConfigError, DataError, SpaceError
from searchlab.spaces.experts import ExpertPlan, ResidentExperts, read_plan
from searchlab.spaces.experts.cut import cut_model
from searchlab.spaces.experts.export import export_checkpoint
from searchlab.spaces.experts.files import ExpertFiles, layout_of_files
from searchlab.testing.tiny_moe import TINY_MOE, tiny_moe


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ResidentExperts, Path]]:
    out = {}
    for name in TINY_MOE:
        model, folder = tiny_moe(name), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, max_shard_size="60KB")
        (folder / "tokenizer.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "LICENSE").write_text("terms")
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
        (folder / "pytorch_model.bin").write_bytes(b"weights of another format")
        out[name] = (ResidentExperts(model), folder)
    return out


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(seed))


def plan_of(resident: ResidentExperts, kept: list[list[int]], **more: Any) -> ExpertPlan:
    layout = resident.layout
    return ExpertPlan(
        family=layout.family,
        blocks=layout.blocks,
        experts=layout.experts,
        top_k=more.pop("top_k", layout.top_k),
        kept=tuple(map(tuple, kept)),
        **more,
    )


def loaded(folder: Path, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        **more,
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for tensor in (*model.parameters(), *model.buffers()):
        # Mapped weights lie at any address, and products of unaligned ones round differently.
        tensor.data = tensor.data.clone()
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        out.update(load_file(path))
    return out


@pytest.mark.parametrize("name", TINY_MOE)
def test_the_export_is_the_saved_cut_model(name: str, bases: Any, tmp_path: Path) -> None:
    resident, folder = bases[name]
    plan = plan_of(resident, [[0, 3, 5, 6], [1, 2, 4, 7]])
    paths = export_checkpoint(folder, plan, tmp_path / "ours")
    cut = cut_model(resident, plan.mask)
    cut.save_pretrained(tmp_path / "theirs")
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert torch.equal(ours[key], value)
    again = loaded(tmp_path / "ours")
    with resident.masked(plan.mask):
        assert torch.equal(logits(again), logits(resident.model))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert all(config[key] == 4 for key in resident.family.count_keys)
    assert {path.name for path in paths} >= {"tokenizer.json", "chat_template.jinja", "LICENSE"}
    assert not (tmp_path / "ours" / "pytorch_model.bin").exists()
    assert "license: apache-2.0" in (tmp_path / "ours" / "README.md").read_text()
    assert read_plan(tmp_path / "ours").kept == plan.kept
    kept = json.loads((tmp_path / "ours" / "kept_experts.json").read_text())["layers"]
    assert [kept[str(layer)] for layer in plan.blocks] == [list(row) for row in plan.kept]
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(ours)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_fewer_active_experts_and_no_groups_are_stored(
    name: str, bases: Any, tmp_path: Path
) -> None:
    resident, folder = bases[name]
    grouped = resident.layout.n_group > 1
    plan = plan_of(resident, [[0, 1, 2], [1, 2, 7]], top_k=1, flat=grouped)
    export_checkpoint(folder, plan, tmp_path)
    again = loaded(tmp_path)
    assert again.config.num_experts_per_tok == 1
    with resident.masked(plan.mask, top_k=1, flat=grouped):
        assert torch.equal(logits(again), logits(resident.model))
    assert grouped == ("without groups" in (tmp_path / "README.md").read_text())


def test_layers_after_the_last_are_left_out(bases: Any, tmp_path: Path) -> None:
    resident, folder = bases["deepseek_v3"]
    (tmp_path / "base").mkdir()
    tensors = weights(folder)
    for name, value in list(tensors.items()):
        if name.startswith("model.layers.2."):
            tensors[name.replace("layers.2.", "layers.3.")] = value.clone()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert layout_of_files(tmp_path / "base").total_bytes == layout_of_files(folder).total_bytes
    export_checkpoint(tmp_path / "base", plan_of(resident, [[0, 1, 4, 5]] * 2), tmp_path / "cut")
    assert not any(".layers.3." in name for name in weights(tmp_path / "cut"))
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0


def test_layouts_of_files_have_the_bytes_that_are_there(bases: Any) -> None:
    resident, folder = bases["olmoe"]
    layout = layout_of_files(folder)
    total = sum(p.numel() * 4 for p in resident.model.parameters())
    assert layout.total_bytes == total
    assert layout.expert_bytes == 4 * (3 * 32 * 24 + 32)
    assert layout.blocks == resident.layout.blocks


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_smaller_blocks_are_filled_up_with_dead_experts(
    name: str, bases: Any, tmp_path: Path
) -> None:
    resident, folder = bases[name]
    plan = plan_of(resident, [[0, 1, 2, 4, 5, 7], [1, 2, 4, 7]])
    export_checkpoint(folder, plan, tmp_path)
    again = loaded(tmp_path)
    assert again.config.num_local_experts == 6
    with torch.no_grad():
        wanted = cut_model(resident, plan.mask)(tokens()).logits
    torch.testing.assert_close(logits(again), wanted, rtol=1e-6, atol=5e-7)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(again))
    assert "never chosen" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2"])
def test_different_counts_are_shipped_with_a_model_class(
    name: str, bases: Any, tmp_path: Path
) -> None:
    resident, folder = bases[name]
    plan = plan_of(resident, [[0, 1, 2, 4, 5, 7], [1, 2, 4, 7]])
    export_checkpoint(folder, plan, tmp_path)
    again = loaded(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        wanted = cut_model(resident, plan.mask)(tokens()).logits
    assert torch.equal(logits(again), wanted)
    counts = {str(layer): len(row) for layer, row in zip(plan.blocks, plan.kept, strict=True)}
    assert json.loads((tmp_path / "config.json").read_text())["expert_counts"] == counts
    # The stock class must refuse the files, not make up the experts that are missing.
    with pytest.raises(RuntimeError, match="mismatch"):
        loaded(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("name", TINY_MOE)
@pytest.mark.parametrize("mode", ["slice", "logit"])
def test_merged_experts_are_written(name: str, mode: Any, bases: Any, tmp_path: Path) -> None:
    resident, folder = bases[name]
    rng = np.random.default_rng(0)
    merge = np.eye(8)[[0, 3, 5, 6]] + 0.1 * rng.normal(size=(2, 4, 8))
    route = np.eye(8)[[0, 3, 5, 6]] + 0.1 * rng.normal(size=(2, 4, 8))
    nested = {"merge": merge, **({} if mode == "slice" else {"route": route})}
    plan = plan_of(
        resident,
        [[0, 3, 5, 6]] * 2,
        router_mode=mode,
        **{key: tuple(tuple(map(tuple, m)) for m in v.tolist()) for key, v in nested.items()},
    )
    export_checkpoint(folder, plan, tmp_path)
    with resident.merged(
        list(merge), route=None if mode == "slice" else list(route), router_mode=mode
    ):
        wanted = logits(resident.model)
    torch.testing.assert_close(logits(loaded(tmp_path)), wanted, rtol=1e-5, atol=1e-5)
    assert read_plan(tmp_path).merge == plan.merge


# -- formats ------------------------------------------------------------------------------------


def _quantised(kind: str, folder: Path) -> Path:
    """A folder whose experts are stored as a quantiser would; the numbers mean nothing."""
    rng = torch.Generator().manual_seed(0)

    def raw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        size = torch.empty(shape, dtype=dtype).nbytes
        return (
            torch.randint(0, 256, (size,), dtype=torch.uint8, generator=rng)
            .view(dtype)
            .reshape(shape)
        )

    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": raw(64, 32, dtype=torch.int16)}
    config: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_experts_per_tok": 2, "vocab_size": 64, "num_attention_heads": 4}
    ignore = []
    for layer in range(2):
        head = f"model.layers.{layer}.mlp."
        if kind == "mxfp4":
            for part, width in (("gate_up_proj", 128), ("down_proj", 32)):
                tensors[f"{head}experts.{part}_blocks"] = raw(8, width, 2, 16, dtype=torch.uint8)
                tensors[f"{head}experts.{part}_scales"] = raw(8, width, 2, dtype=torch.uint8)
                tensors[f"{head}experts.{part}_bias"] = raw(8, width, dtype=torch.bfloat16)
            tensors[f"{head}router.weight"] = raw(8, 32, dtype=torch.bfloat16)
            tensors[f"{head}router.bias"] = raw(8, dtype=torch.bfloat16)
            ignore.append(f"model.layers.{layer}.mlp.router")
            continue
        tensors[f"{head}gate.weight"] = raw(8, 32, dtype=torch.bfloat16)
        ignore.append(f"{head}gate")
        for expert in range(8):
            own = f"{head}experts.{expert}."
            for part in ("gate_proj", "up_proj", "down_proj"):
                if kind == "fp8":
                    tensors[f"{own}{part}.weight"] = raw(64, 32, dtype=torch.float8_e4m3fn)
                    tensors[f"{own}{part}.weight_scale_inv"] = raw(1, 1, dtype=torch.float32)
                else:
                    tensors[f"{own}{part}.qweight"] = raw(32, 8, dtype=torch.int32)
                    tensors[f"{own}{part}.qzeros"] = raw(1, 8, dtype=torch.int32)
                    tensors[f"{own}{part}.scales"] = raw(1, 64, dtype=torch.float16)
                    if kind == "gptq":
                        tensors[f"{own}{part}.g_idx"] = raw(32, dtype=torch.int32)
        ignore += [f"{head}experts.{expert}.down_proj" for expert in (1, 6)]
    kinds = {"mxfp4": ("gpt_oss", "num_local_experts"), "fp8": ("qwen3_moe", "num_experts")}
    model_type, count = kinds.get(kind, ("olmoe", "num_experts"))
    config |= {"model_type": model_type, count: 8, "moe_intermediate_size": 64, "head_dim": 8}
    config["num_key_value_heads"] = 4
    config["quantization_config"] = {"quant_method": kind, "modules_to_not_convert": ignore}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "awq", "gptq"])
def test_quantised_experts_are_kept_bit_for_bit(kind: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    files = ExpertFiles(_quantised(kind, tmp_path / "base"))
    kept = ((0, 1, 4), (2, 6, 7))
    plan = ExpertPlan(files.family.name, (0, 1), 8, 2, kept)
    export_checkpoint(files, plan, tmp_path / "cut")

    def all_bytes(folder: str) -> dict[str, bytes]:
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            return {
                key: file.get_tensor(key).contiguous().view(torch.uint8).numpy().tobytes()
                if file.get_tensor(key).ndim
                else bytes(file.get_tensor(key).numpy())
                for key in file.keys()  # noqa: SIM118
            }

    base, cut = all_bytes("base"), all_bytes("cut")
    seen = set()
    for name, value in cut.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer is None:
            assert value == base[name]
            continue
        parts = name.split(".")
        if "experts" in parts and parts[5].isdigit():
            parts[5] = str(kept[layer][int(parts[5])])
            old = ".".join(parts)
            assert value == base[old]
        else:
            step = len(base[name]) // 8
            assert value == b"".join(base[name][e * step : (e + 1) * step] for e in kept[layer])
            old = name
        seen.add(old)
    of_experts = [name for name in base if ".experts." in name]
    kept_of_each = len(of_experts) if kind == "mxfp4" else len(of_experts) * 3 // 8
    assert len([name for name in seen if ".experts." in name]) == kept_of_each
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    names = config["quantization_config"]["modules_to_not_convert"]
    if kind == "mxfp4":
        assert names == [f"model.layers.{layer}.mlp.router" for layer in range(2)]
    else:
        assert names == [
            "model.layers.0.mlp.gate",
            "model.layers.0.mlp.experts.1.down_proj",
            "model.layers.1.mlp.gate",
            "model.layers.1.mlp.experts.1.down_proj",
        ]


def test_memory_is_that_of_a_piece(tmp_path: Path) -> None:
    import subprocess
    import sys

    tensors = {}
    for layer in range(2):
        head = f"model.layers.{layer}.mlp."
        tensors[head + "experts.gate_up_proj"] = torch.zeros(32, 256, 512)
        tensors[head + "experts.down_proj"] = torch.zeros(32, 256, 256)
        tensors[head + "router.weight"] = torch.zeros(32, 256)
        tensors[head + "router.bias"] = torch.zeros(32)
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 32}
    config |= {"hidden_size": 256, "intermediate_size": 256, "num_experts_per_tok": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    code = (
        "import resource, sys\n"
        "from searchlab.spaces.experts.export import export_checkpoint\n"
        "from searchlab.spaces.experts.files import ExpertFiles\n"
        "from searchlab.spaces.experts.plan import ExpertPlan\n"
        "files = ExpertFiles(sys.argv[1])\n"
        "plan = ExpertPlan('gpt_oss', (0, 1), 32, 4, (tuple(range(0, 32, 2)),) * 2)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "export_checkpoint(files, plan, sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "base"), str(tmp_path / "cut")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "cut" / "model.safetensors").stat().st_size > 25e6
    assert int(run.stdout) * 1024 < 6e6  # the largest tensor has 16.8e6 bytes


# -- refusals -----------------------------------------------------------------------------------


def test_plans_and_files_that_do_not_fit_are_refused(bases: Any, tmp_path: Path) -> None:
    resident, folder = bases["olmoe"]
    with pytest.raises(SpaceError, match="a plan for mixtral"):
        export_checkpoint(folder, ExpertPlan("mixtral", (0, 1), 8, 2, ((0, 1),) * 2), tmp_path)
    plan = plan_of(resident, [[0, 1, 2]] * 2, router_mode="prob")
    with pytest.raises(ConfigError, match="'prob' cannot be stored in a stock checkpoint"):
        export_checkpoint(folder, plan, tmp_path)
    with pytest.raises(ConfigError, match="the model itself"):
        export_checkpoint(folder, plan_of(resident, [[0, 1, 2]] * 2), folder)
    kept = plan_of(resident, [[0, 1, 2]] * 2)
    with pytest.raises(ConfigError, match="holds another model"):
        export_checkpoint(folder, kept, bases["mixtral"][1])
    for _ in range(2):  # an earlier export may be written over
        export_checkpoint(folder, kept, tmp_path / "twice")
    with pytest.raises(DataError, match=r"no readable config\.json"):
        ExpertFiles(tmp_path)
    table = tuple(tuple(map(tuple, np.eye(8)[:3].tolist())) for _ in range(2))
    merged = plan_of(resident, [[0, 1, 2]] * 2, merge=table, route=table, router_mode="prob")
    with pytest.raises(ConfigError, match="'prob' cannot be stored"):
        export_checkpoint(folder, merged, tmp_path)
    (tmp_path / "quantised").mkdir()
    quantised = ExpertFiles(_quantised("fp8", tmp_path / "quantised"))
    merged = ExpertPlan("qwen3_moe", (0, 1), 8, 2, ((0, 1, 2),) * 2, merge=table)
    with pytest.raises(ConfigError, match="--dequantize bf16"):
        export_checkpoint(quantised, merged, tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(DataError, match="no safetensors files"):
        ExpertFiles(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(DataError, match="cut off"):
        ExpertFiles(tmp_path)
    tensors = weights(folder)
    gone = "model.layers.1.mlp.experts.3.down_proj.weight"
    short = {key: value for key, value in tensors.items() if ".1.mlp.experts.3." not in key}
    assert gone in tensors
    save_file(short, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"layer 1 stores experts .*config\.json says 8"):
        ExpertFiles(tmp_path)
