"""Build the embedded world:  python assets/build/build.py STAGE [--option value]

Stages, in order: sprites, vae, latents, unet, decoder, clip, export, vit, dino, lpips, tasks, llama,
measure; `all` runs every one.  `adopt` takes the shipped tiny-sd into an empty work folder, so that `vae` and `unet`
go on from it.
Each stage keeps its state in ~/.cache/vislora/world (or $VISLORA_WORLD_WORK) as safetensors and JSON, and goes on
from there when it is run again.
"""

from __future__ import annotations

import argparse
import importlib

from common import setup

#: Stage -> module and function, in the order of `all`.
STAGES = {
    "sprites": ("sprites", "run"), "adopt": ("adopt", "run"), "vae": ("train_vae", "train"),
    "latents": ("train_vae", "cache_latents"), "unet": ("train_unet", "train"),
    "decoder": ("train_vae", "refine_decoder"), "clip": ("train_clip", "train"), "export": ("export", "run"),
    "vit": ("train_vit", "train"), "dino": ("train_dino", "train"),
    "lpips": ("train_lpips", "train"), "tasks": ("tasks", "run"), "llama": ("train_llama", "train"),
    "measure": ("measure", "run"),
}
#: Those that take --minutes and --steps.
TRAINING = {"vae", "unet", "decoder", "clip", "vit", "dino", "lpips", "llama"}


def main() -> None:
    """Run one stage, or all of them in order."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=100, help="stop a training stage after this long")
    parser.add_argument("--steps", type=int, help="planned steps of a training stage (its decay ends there)")
    args = parser.parse_args()
    setup(args.threads)
    for stage in [name for name in STAGES if name != "adopt"] if args.stage == "all" else [args.stage]:
        run(stage, args)


def run(stage: str, args: argparse.Namespace) -> None:
    """Run one stage; its module is imported only now, so that drawing scenes needs no model library."""
    module, function = STAGES[stage]
    plan = {"minutes": args.minutes, **({"steps": args.steps} if args.steps else {})} if stage in TRAINING else {}
    getattr(importlib.import_module(module), function)(**plan)


if __name__ == "__main__":
    main()
