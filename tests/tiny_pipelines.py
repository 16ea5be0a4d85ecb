"""Pipelines of random weights for SDXL, SD3 and Flux, as small as their classes allow; built in memory."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_sd import TOKENS, tokenizer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

_WIDE = 16  # of every encoder and denoiser


def _clip(kind=CLIPTextModel) -> nn.Module:
    words = tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=_WIDE, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=TOKENS, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id, projection_dim=_WIDE,
        )
    )  # fmt: skip


def _t5(width: int) -> nn.Module:
    return T5EncoderModel(
        T5Config(
            vocab_size=200, d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=1,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def _vae(channels: int) -> nn.Module:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, mid_block_add_attention=False, sample_size=16,
        latent_channels=channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip


def sdxl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2 * _WIDE,
        addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True,
        projection_class_embeddings_input_dim=6 * 8 + _WIDE,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(4), text_encoder=_clip(), text_encoder_2=_clip(CLIPTextModelWithProjection), unet=unet,
        tokenizer=tokenizer(), tokenizer_2=tokenizer(), scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=_WIDE, joint_attention_dim=2 * _WIDE,
        pooled_projection_dim=2 * _WIDE, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        vae=_vae(4), transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=_clip(CLIPTextModelWithProjection), text_encoder_2=_clip(CLIPTextModelWithProjection),
        text_encoder_3=_t5(2 * _WIDE), tokenizer=tokenizer(), tokenizer_2=tokenizer(), tokenizer_3=tokenizer(),
    )  # fmt: skip


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=_WIDE, pooled_projection_dim=_WIDE, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        vae=_vae(4), transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=_clip(),
        text_encoder_2=_t5(_WIDE), tokenizer=tokenizer(), tokenizer_2=tokenizer(),
    )  # fmt: skip


BUILD = {"sdxl": sdxl, "sd3": sd3, "flux": flux}


def build(family: str):
    """A fresh pipeline, the same weights at every call; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = BUILD[family]()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe, **more) -> torch.Tensor:
    """Two steps of a pipeline, as a tensor; the same noise at every call."""
    size = 16 if not isinstance(pipe, FluxPipeline) else 8
    generator = torch.Generator().manual_seed(3)
    known = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "latent", "height": size, "width": size}
    return pipe(prompt="a b", generator=generator, **known, **more).images
