"""SDXL, SD3 and Flux of random weights, as small as `tiny_sd`: 32 x 32 pixels, written as diffusers writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_sd import TOKENS, tiny_sd, tokenizer
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

FAMILIES = ("sdxl", "sd3", "flux")


def build(kind: str, folder: Path, **changes) -> Path:
    """Write the tiny pipeline called "sd", "sd2" (v-prediction), "sdxl", "sd3" or "flux" into `folder`."""
    if kind in ("sd", "sd2"):
        return tiny_sd(folder, "epsilon" if kind == "sd" else "v_prediction")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        {"sdxl": _sdxl, "sd3": _sd3, "flux": _flux}[kind](**changes).save_pretrained(folder)
    return Path(folder)


def _clip(width: int, projected: bool):
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, projection_dim=width,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (" ", -1.0), *((c, -2.0) for c in letters)]
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(Unigram(vocabulary, unk_id=2)), pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>", model_max_length=64,
    )  # fmt: skip
    config = T5Config(
        vocab_size=len(vocabulary), d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config), words


def _vae(channels: int, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, mid_block_add_attention=False, sample_size=32,
        latent_channels=channels, shift_factor=shift, use_quant_conv=shift is None, use_post_quant_conv=shift is None,
    )  # fmt: skip


def _sdxl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn", up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=64, attention_head_dim=4,
        norm_num_groups=8, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32, use_linear_projection=True,
    )  # fmt: skip
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    return StableDiffusionXLPipeline(
        vae=_vae(4), text_encoder=_clip(32, False), text_encoder_2=_clip(32, True), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), unet=unet, scheduler=schedule, add_watermarker=False,
    )  # fmt: skip


def _sd3(with_t5: bool = True) -> StableDiffusion3Pipeline:
    t5, words = _t5() if with_t5 else (None, None)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=24,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(4, 0.06),
        text_encoder=_clip(16, True), tokenizer=tokenizer(), text_encoder_2=_clip(16, True), tokenizer_2=tokenizer(),
        text_encoder_3=t5, tokenizer_3=words,
    )  # fmt: skip


def _flux(guidance: bool = True) -> FluxPipeline:
    t5, words = _t5()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=guidance,
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, vae=_vae(4, 0.1), text_encoder=_clip(32, False), tokenizer=tokenizer(),
        text_encoder_2=t5, tokenizer_2=words,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )  # fmt: skip
