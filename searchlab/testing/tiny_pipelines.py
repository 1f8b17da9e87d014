"""Tiny diffusion pipelines of the real classes with random weights, for tests without downloads.

Every function imports diffusers itself; weights depend only on the seed. `embeddings` gives what a
pipeline without text encoders needs instead of prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = [
    "TINY_PIPELINES",
    "embeddings",
    "tiny_ddpm",
    "tiny_flux",
    "tiny_stable_diffusion",
    "tiny_stable_diffusion_3",
    "tiny_stable_diffusion_xl",
    "tiny_wan",
]


def _seeded(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_ddpm(*, seed: int = 0) -> Any:
    """`DDPMPipeline` of 3 x 8 x 8 pixels with an unclipped DDIM scheduler."""
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    _seeded(seed)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    return _quiet(DDPMPipeline(unet, DDIMScheduler(clip_sample=False)))


def _vae(channels: int, *, scale: float = 0.18215) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        scaling_factor=scale,
        shift_factor=0.0,
    ).eval()


def _condition_unet(width: int, **extra: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=extra.pop("attention_head_dim", 8),
        cross_attention_dim=width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **extra,
    ).eval()


def _clip_files(directory: Path) -> tuple[str, str]:
    """A vocabulary of letters and a few merges."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>"]
    tokens = [*letters, *(x + "</w>" for x in letters), *("".join(m.split()) for m in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    return str(directory / "vocab.json"), str(directory / "merges.txt")


def tiny_stable_diffusion(directory: Path, *, seed: int = 0) -> Any:
    """`StableDiffusionPipeline` for 16 x 16 pixels with a real tokenizer and text encoder.

    Args:
        directory: where the tokenizer's files are written.
        seed: of the weights.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    _seeded(seed)
    _clip_files(directory)
    tokenizer = CLIPTokenizer.from_pretrained(str(directory), model_max_length=16)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return _quiet(
        StableDiffusionPipeline(
            _vae(4),
            text,
            tokenizer,
            _condition_unet(16),
            scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def tiny_stable_diffusion_xl(*, seed: int = 0) -> Any:
    """`StableDiffusionXLPipeline` for 16 x 16 pixels without text encoders."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    _seeded(seed)
    unet = _condition_unet(
        16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        transformer_layers_per_block=1,
        use_linear_projection=True,
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="leading",
        steps_offset=1,
    )
    return _quiet(
        StableDiffusionXLPipeline(
            vae=_vae(4),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=scheduler,
            add_watermarker=False,
        )
    )


def tiny_stable_diffusion_3(*, seed: int = 0) -> Any:
    """`StableDiffusion3Pipeline` for 32 x 32 pixels without text encoders, shift 3."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    _seeded(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
    ).eval()
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(4),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def tiny_flux(*, seed: int = 0) -> Any:
    """`FluxPipeline` for 32 x 32 pixels without text encoders, with dynamic shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    _seeded(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0
            ),
            vae=_vae(4),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer,
        )
    )


def tiny_wan(*, seed: int = 0) -> Any:
    """`WanPipeline` for 32 x 32 pixels and 5 frames without text encoder, UniPC with shift 3."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    _seeded(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()
    return _quiet(
        WanPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            text_encoder=None,
            tokenizer=None,
        )
    )


def embeddings(name: str, rows: int, *, seed: int = 0) -> dict[str, Any]:
    """Random conditioning for `rows` samples, as keyword arguments of the pipeline's call.

    Args:
        name: a key of `TINY_PIPELINES`; empty for those that need none.
        rows: samples.
        seed: of the values.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(rows, *shape, generator=generator)

    words = {"sdxl": 6, "sd3": 6, "flux": 6, "wan": 6}.get(name)
    if words is None:
        return {}
    answer = {"prompt_embeds": normal(words, 16)}
    if name != "flux":
        answer["negative_prompt_embeds"] = normal(words, 16)
    if name != "wan":
        answer["pooled_prompt_embeds"] = normal(8)
    if name in ("sdxl", "sd3"):
        answer["negative_pooled_prompt_embeds"] = normal(8)
    return answer


TINY_PIPELINES = {
    "ddpm": tiny_ddpm,
    "sdxl": tiny_stable_diffusion_xl,
    "sd3": tiny_stable_diffusion_3,
    "flux": tiny_flux,
    "wan": tiny_wan,
}
"""Those that need no directory; Stable Diffusion has its own function."""
