"""Build the embedded world:  python assets/build/build.py STAGE [--option value]

Stages, in order: sprites, vae, latents, unet, decoder, clip, export, measure, llama; `all` runs every one.  `adopt`
takes the shipped tiny-sd into an empty work folder, so that `vae` and `unet` go on from it.  Each stage keeps its state
in ~/.cache/vislora/world (or $VISLORA_WORLD_WORK) as safetensors and JSON, and goes on from there when it is run again.
"""

from __future__ import annotations

import argparse

from common import setup


def main() -> None:
    """Run one stage, or all of them in order."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    stages = ["sprites", "vae", "latents", "unet", "decoder", "clip", "export", "measure", "llama"]
    parser.add_argument("stage", choices=[*stages, "adopt", "all"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=100, help="stop a training stage after this long")
    parser.add_argument("--steps", type=int, help="planned steps of a training stage (its decay ends there)")
    args = parser.parse_args()
    setup(args.threads)
    for stage in stages if args.stage == "all" else [args.stage]:
        run(stage, args)


def run(stage: str, args: argparse.Namespace) -> None:
    """Run one stage; imports stay local so that drawing scenes needs no model library."""
    plan = {"minutes": args.minutes, **({"steps": args.steps} if args.steps else {})}
    if stage == "sprites":
        import sprites
        sprites.run()
    elif stage == "vae":
        import train_vae
        train_vae.train(**plan)
    elif stage == "adopt":
        import adopt
        adopt.run()
    elif stage == "latents":
        import train_vae
        train_vae.cache_latents()
    elif stage == "decoder":
        import train_vae
        train_vae.refine_decoder(**plan)
    elif stage == "unet":
        import train_unet
        train_unet.train(**plan)
    elif stage == "clip":
        import train_clip
        train_clip.train(**plan)
    elif stage == "export":
        import export
        export.run()
    elif stage == "measure":
        import measure
        measure.run()
    elif stage == "llama":
        import train_llama
        train_llama.train(**plan)


if __name__ == "__main__":
    main()
