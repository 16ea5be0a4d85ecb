"""The DreamBooth script on Stable Diffusion 1.5's architecture with random weights: slow, `pytest -m slow -n 0 -s`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tiny_sd import tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

REPOSITORY = Path(__file__).resolve().parents[2]


def sd15(folder: Path) -> Path:
    """Write a pipeline of SD 1.5's shapes: 860 M UNet, 84 M VAE, 123 M text encoder; 2.1 GB in half precision."""
    torch.manual_seed(0)
    words = tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=77, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id, hidden_act="quick_gelu",
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    assert 855e6 < sum(p.numel() for p in unet.parameters()) < 865e6
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=words, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_two_steps_on_the_cpu(tmp_path):
    model = sd15(tmp_path / "sd15")
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(noise.integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1",
        str(REPOSITORY / "train_scripts/dreambooth.py"), "--adapter", "nb_lora", "--p", "1", "--delta", "6",
        "--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(tmp_path / "photos"),
        "--instance_prompt", "a b", "--resolution", "256", "--gradient_checkpointing", "--max_train_steps", "2",
        "--train_batch_size", "1", "--logging_steps", "1", "--center_crop", "--report_to", "none",
        "--learning_rate", "2e-4", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=tmp_path)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    logged = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    seconds = [round(entry["seconds_per_step"], 1) for entry in logged]
    print(f"\nSD 1.5, 256 px, batch 1, checkpointing: {seconds} s a step, peak {metrics['peak_memory_mib']:.0f} MiB")
    assert len(logged) == 2 and len(logged[0]["layers"]) == 128
    assert all(np.isfinite(entry["loss"]) for entry in logged)
    assert 0 < metrics["largest_share"] <= 1 and metrics["diffusers_export_error"] < 1e-3
    # r (m + n) + r over the 16 attention blocks' 128 projections, r = 16
    assert metrics["trainable_parameters"] == 3_188_736 + 128 * 16
