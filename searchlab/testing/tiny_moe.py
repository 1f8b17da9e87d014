"""Tiny mixture-of-experts language models of the real classes with random weights, for tests.

Every function imports transformers itself; weights depend only on the seed. Routers are spread
enough that different experts really differ, biases are not zero, and families with dense layers,
shared experts or groups have them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["TINY_MOE", "tiny_config", "tiny_moe"]

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
_LATENT: dict[str, Any] = {  # attention of the DeepSeek models
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
}
_OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 2, "intermediate_size": 24, "num_local_experts": 8},
    "olmoe": {"num_hidden_layers": 2, "intermediate_size": 24, "num_experts": 8},
    "qwen2_moe": {
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1],
        "num_experts": 8,
    },
    "qwen3_moe": {
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "num_experts": 8,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_LATENT, "num_nextn_predict_layers": 0},
    "gpt_oss": {
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "head_dim": 8,
        "num_local_experts": 8,
        "sliding_window": 16,
    },
}

TINY_MOE: tuple[str, ...] = tuple(_OWN)
"""The seven families, as their `model_type` in config.json."""


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of a tiny model of a family, with some keys changed."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**_COMMON, **_OWN.get(name, {}), **changes})


def tiny_moe(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A tiny causal language model of a family: float32, eager experts and attention, `eval`."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
        with torch.no_grad():
            tensors = [*model.named_parameters(), *model.named_buffers()]
            for key, tensor in tensors:
                if "bias" in key and ("router" in key or "gate" in key or "experts" in key):
                    tensor.copy_(torch.randn(tensor.shape) * 0.1)
    return model.eval()
