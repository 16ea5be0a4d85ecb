"""Stage `adopt`: the shipped tiny-sd as the state that `vae` and `unet` go on from.

For a machine whose work folder is gone: the weights are kept, in float16's precision; the optimizers begin anew.
"""

from __future__ import annotations

import shutil

import train_unet
import train_vae
import words
from common import WORLD, save_tensors, say
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

SOURCE = WORLD / "tiny-sd"


def run() -> None:
    """Fill an empty work folder; a stage that has state of its own is left alone."""
    if train_vae.CHECKPOINT.exists() or train_unet.CHECKPOINT.exists():
        return say("adopt: the work folder has states of its own")
    shutil.copytree(SOURCE / "tokenizer", words.FOLDER, dirs_exist_ok=True)
    vae = AutoencoderKL.from_pretrained(SOURCE / "vae").float()
    start = {"step": 0, "seconds": 0.0, "done": False}
    save_tensors(train_vae.CHECKPOINT, vae.state_dict(), start)
    nets = train_unet.models()
    nets["unet"].load_state_dict(UNet2DConditionModel.from_pretrained(SOURCE / "unet").state_dict())
    nets["text_encoder"].load_state_dict(CLIPTextModel.from_pretrained(SOURCE / "text_encoder").state_dict())
    save_tensors(train_unet.WEIGHTS, nets.state_dict(), start)
    save_tensors(train_unet.CHECKPOINT, {f"net.{k}": v for k, v in nets.state_dict().items()}, start)
    say("adopt: autoencoder, UNet and text encoder")
