"""A Stable Diffusion of random weights, small enough for any test: 32 x 32 pixels, 0.3 M parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 77


def tokenizer() -> CLIPTokenizer:
    """One token a letter, digit or mark; the second of each pair ends a word."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [START, END, *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=TOKENS)


def tiny_sd(
    folder: str | Path, prediction_type: str = "epsilon", seed: int = 0, channels: tuple[int, int] = (16, 32),
    sample_size: int = 16,
) -> Path:  # fmt: skip
    """Write the pipeline into `folder` by `save_pretrained`. Leaves the global generator as it was.

    channels: of the UNet's blocks; sample_size: latents a side.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer()
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=TOKENS,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            mid_block_add_attention=False,
            sample_size=2 * sample_size,
        )
        unet = UNet2DConditionModel(
            sample_size=sample_size,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=channels,
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=DDPMScheduler(  # Stable Diffusion's own schedule
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)
