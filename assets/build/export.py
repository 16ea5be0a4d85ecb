"""Stage `export`: write tiny-sd in the layout that StableDiffusionPipeline loads, float16 safetensors."""

from __future__ import annotations

import json
import shutil

import torch
import train_unet
import train_vae
import words
from common import WORLD, load_tensors, say
from diffusers import DDIMScheduler, StableDiffusionPipeline

TARGET = WORLD / "tiny-sd"


def run() -> None:
    """Assemble the pipeline from the averaged weights and save it; the old folder goes only at the end."""
    nets = train_unet.load_ema()
    meta = load_tensors(train_unet.WEIGHTS)[1]
    pipe = StableDiffusionPipeline(
        vae=train_vae.load_vae(), text_encoder=nets["text_encoder"], tokenizer=words.tokenizer(), unet=nets["unet"],
        scheduler=DDIMScheduler(**train_unet.SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16)
    fresh = TARGET.with_name("tiny-sd.new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(words.FOLDER / name, fresh / "tokenizer" / name)
    # transformers would load its part in float16 by itself, and diffusers the others in float32: they could not meet.
    config = fresh / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for path in fresh.rglob("*.*"):
        path.chmod(0o644)
    shutil.rmtree(TARGET, ignore_errors=True)
    fresh.rename(TARGET)
    size = sum(f.stat().st_size for f in TARGET.rglob("*") if f.is_file())
    say(f"tiny-sd: step {meta['step']}, {size / 1e6:.1f} MB in {TARGET.name}")
