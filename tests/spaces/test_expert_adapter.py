"""A family outside the seven: one table, no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from searchlab.errors import ConfigError
from searchlab.spaces.experts import ExpertPlan, ResidentExperts, family_of, read_family
from searchlab.spaces.experts.cut import cut_model
from searchlab.spaces.experts.export import export_checkpoint
from searchlab.spaces.experts.files import ExpertFiles
from searchlab.testing.tiny_moe import tiny_moe

GLM = """
name: glm4_moe
model_types: [glm4_moe]
count_keys: [n_routed_experts]
top_k_key: num_experts_per_tok
width_key: moe_intermediate_size
router: gate
router_tensors: [weight, e_score_correction_bias]
score: sigmoid
renormalise: norm_topk_prob
wide: true
cast: false
scale: routed_scaling_factor
groups: {count: n_group, kept: topk_group, best: 2}
dense: {first: first_k_dense_replace}
padding: {tensor: e_score_correction_bias}
"""


def tiny_glm() -> Any:
    return tiny_moe(
        "glm4_moe",
        num_hidden_layers=3,
        intermediate_size=48,
        moe_intermediate_size=16,
        head_dim=8,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
    )


def test_a_table_is_all_that_another_family_needs(tmp_path: Path) -> None:
    table = tmp_path / "glm.yaml"
    table.write_text(GLM)
    model = tiny_glm()
    with pytest.raises(ConfigError, match="no table for model type 'glm4_moe'"):
        ResidentExperts(model)
    family = family_of(model.config, table)
    resident = ResidentExperts(model, family)
    assert resident.layout.blocks == (1, 2)
    ids = torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(0))
    kept = np.zeros((2, 8), bool)
    kept[0, [0, 1, 4, 7]] = kept[1, [2, 3, 5, 6]] = True
    with torch.no_grad(), resident.masked(kept):
        masked = model(ids).logits
    with torch.no_grad():
        assert torch.equal(masked, cut_model(resident, kept)(ids).logits)
    model.save_pretrained(tmp_path / "base")
    rows = tuple(tuple(np.flatnonzero(row).tolist()) for row in kept)
    plan = ExpertPlan(family.name, (1, 2), 8, 2, rows)
    export_checkpoint(ExpertFiles(tmp_path / "base", family), plan, tmp_path / "cut")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", attn_implementation="eager", experts_implementation="eager"
    )
    assert again.config.n_routed_experts == 4
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, masked, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("score: sigmoid", "lacks score"),
        ("colour: red", "has colour; known: block"),
        ("score: tanh", "score 'tanh'; allowed: softmax, sigmoid"),
        ("model_types: glm", "model_types 'glm'; allowed: a list"),
        ("dense: {last: x}", "dense {'last': 'x'}; allowed: first, only, step"),
        ("groups: {number: 3}", "allowed: count, kept, best, only_if"),
        ("- a\n- b", "holds"),
        ("a: [", "cannot be read"),
    ],
)
def test_wrong_tables_are_named(change: str, message: str, tmp_path: Path) -> None:
    key = change.split(":")[0]
    lines = [line for line in GLM.strip().splitlines() if line.split(":")[0] != key]
    text = "\n".join(lines + ([] if message.startswith("lacks") else [change]))
    (tmp_path / "a.yaml").write_text(change if change[0] in "-a" else text)
    with pytest.raises(ConfigError, match=message):
        read_family(tmp_path / "a.yaml")


def test_a_table_that_does_not_fit_the_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GLM.replace("router: gate", "router: chooser"))
    with pytest.raises(ConfigError, match=r"looks for model\.layers\.1\.mlp\.chooser"):
        ResidentExperts(tiny_glm(), read_family(tmp_path / "a.yaml"))
