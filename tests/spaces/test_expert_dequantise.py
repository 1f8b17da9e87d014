"""Plain weights of quantised experts, and plans applied to other models' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from searchlab.errors import ConfigError, DataError, SpaceError
from searchlab.experiments.experts_apply import apply
from searchlab.spaces.experts import ExpertPlan, ResidentExperts
from searchlab.spaces.experts.cut import cut_model
from searchlab.spaces.experts.dequantise import dequantise
from searchlab.spaces.experts.files import ExpertFiles
from searchlab.testing.tiny_moe import tiny_moe


def raw(rng: torch.Generator, *shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=rng)


def mxfp4(folder: Path) -> Path:
    rng = torch.Generator().manual_seed(0)
    config = tiny_moe("gpt_oss", hidden_size=32, intermediate_size=64).config.to_dict()
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(32).bfloat16()}
    for layer in range(2):
        head = f"model.layers.{layer}.mlp."
        for part, rows, groups in (("gate_up_proj", 128, 1), ("down_proj", 32, 2)):
            tensors[f"{head}experts.{part}_blocks"] = raw(rng, 8, rows, groups, 16)
            tensors[f"{head}experts.{part}_scales"] = raw(rng, 8, rows, groups, low=118, high=130)
            tensors[f"{head}experts.{part}_bias"] = torch.randn(8, rows, generator=rng).bfloat16()
        tensors[f"{head}router.weight"] = torch.randn(8, 32, generator=rng).bfloat16()
        tensors[f"{head}router.bias"] = torch.randn(8, generator=rng).bfloat16()
    config["quantization_config"] = {"quant_method": "mxfp4"}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    (tmp_path / "base").mkdir()
    files = ExpertFiles(mxfp4(tmp_path / "base"))
    dequantise(files, tmp_path)
    base, plain = {}, {}
    for found, folder in ((base, tmp_path / "base"), (plain, tmp_path)):
        for path in folder.glob("*.safetensors"):
            found.update(load_file(path))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    for layer in range(2):
        for part in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            wanted = convert_moe_packed_tensors(base[name + "_blocks"], base[name + "_scales"])
            assert plain[name].dtype == torch.bfloat16
            assert torch.equal(plain[name], wanted)
            assert torch.equal(plain[name + "_bias"], base[name + "_bias"])


def test_fp8_is_a_number_times_the_scale_of_its_block(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model = tiny_moe("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors, wanted = load_file(path), {}
    rng = torch.Generator().manual_seed(0)
    for name in [key for key in tensors if ".experts." in key]:
        weight = tensors[name]
        scale = torch.rand(-(-weight.shape[0] // 12), -(-weight.shape[1] // 20), generator=rng)
        whole = scale.repeat_interleave(12, 0).repeat_interleave(20, 1)
        whole = whole[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / whole).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
        wanted[name] = (tensors[name].float() * whole).bfloat16()
    save_file(tensors, path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [12, 20]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    dequantise(ExpertFiles(tmp_path / "base"), tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    assert not any("scale" in name for name in plain)
    assert all(torch.equal(plain[name], value) for name, value in wanted.items())
    # Merging needs it, and says so.
    table = tuple(tuple(map(tuple, m.tolist())) for m in np.eye(8)[[0, 1, 2]][None].repeat(2, 0))
    plan = ExpertPlan("qwen3_moe", (0, 1), 8, 2, ((0, 1, 2),) * 2, merge=table)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    with pytest.raises(ConfigError, match="--dequantize bf16"):
        apply(tmp_path / "plan.json", tmp_path / "base", tmp_path / "cut")
    apply(tmp_path / "plan.json", tmp_path / "base", tmp_path / "cut", dequantize="bf16")
    cut = load_file(tmp_path / "cut" / "model.safetensors")
    kept = [name for name in wanted if int(name.split(".")[5]) < 3]
    assert all(torch.equal(cut[name], wanted[name]) for name in kept)
    assert not any(".experts.3." in name for name in cut)
    assert not list(tmp_path.glob(".plain-*"))


def test_other_quantisations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    tiny_moe("olmoe").save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="'plain weights'; allowed: fp8, mxfp4"):
        dequantise(ExpertFiles(tmp_path / "base"), tmp_path)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ConfigError, match="of 'awq'; allowed"):
        dequantise(ExpertFiles(tmp_path / "base"), tmp_path)


def test_a_plan_is_applied_to_another_model(tmp_path: Path) -> None:
    plan = ExpertPlan("mixtral", (0, 1), 8, 2, ((0, 3, 5), (1, 2, 7)))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    other = tiny_moe("mixtral", seed=9)
    other.save_pretrained(tmp_path / "other")
    apply(tmp_path / "plan.json", tmp_path / "other", tmp_path / "cut")
    cut_model(ResidentExperts(other), plan.mask).save_pretrained(tmp_path / "wanted")
    ours, wanted = (load_file(tmp_path / f / "model.safetensors") for f in ("cut", "wanted"))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    tiny_moe("mixtral", num_local_experts=6).save_pretrained(tmp_path / "smaller")
    with pytest.raises(SpaceError, match="the model is mixtral with 6 in layers"):
        apply(tmp_path / "plan.json", tmp_path / "smaller", tmp_path / "no")
    with pytest.raises(DataError, match="cannot be read"):
        apply(tmp_path / "missing.json", tmp_path / "other", tmp_path / "no")


def test_the_command_writes_a_checkpoint(tmp_path: Path, capsys: Any) -> None:
    from searchlab.cli import main

    plan = ExpertPlan("mixtral", (0, 1, 2), 8, 2, ((0, 3, 5), (1, 2, 7), (0, 1, 2)))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    command = ["apply", str(tmp_path / "plan.json"), str(tmp_path / "out"), "--model"]
    assert main([*command, "zoo"]) == 0
    assert str(tmp_path / "out" / "config.json") in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 3
    assert main([*command, "zoo", "--recipe", "flasheval"]) == 2
    assert "not applied to files" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
