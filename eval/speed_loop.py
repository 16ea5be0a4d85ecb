"""A DreamBooth step as vislora makes it, against the loop that diffusers' LoRA script runs, written out beside it.

    python eval/speed_loop.py                              Stable Diffusion 1.5's shape, an eighth as wide, at 256 px
    python eval/speed_loop.py --gradient_checkpointing     activations are computed again in the backward
    python eval/speed_loop.py --size 512 --divisor 1       at full size, on a GPU where there is one, in float32
    python eval/speed_loop.py --size 512 --divisor 1 --dtype bfloat16          with every frozen network in bf16

The script's loop opens the photo, runs the VAE's encoder and the text encoder at every step, adapts by PEFT, takes
AdamW as it comes and reads the loss. vislora's keeps the posterior's mean and deviation and the text's embedding, and
takes the scripts' AdamW. Both start from the same adapter and see the same draws, so their losses must agree. Widths
are divided by 8 and the sides by 2, layers are not: attention over all pairs of tokens, which grows with the width and
not its square, would else be too large a share. The ratio of operations is printed, 1.70 at full size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy
import torch
from cost import show
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import Image
from speed import spread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from transformers import CLIPTextConfig, CLIPTextModel
from turns import IN_PLACE, in_turns_seconds

import vislora
from vislora import optim
from vislora.diffusion.latents import encode, posterior
from vislora.errors import InputError, run_script

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


class Models:
    """Stable Diffusion 1.5's three networks, random, their widths divided by `divisor`."""

    def __init__(self, divisor: int, layers: int, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        with torch.device(device):
            self._build(divisor, layers)
        for part in (self.text_encoder, self.vae, self.unet):
            part.to(dtype).requires_grad_(False)
        for part in (self.vae, self.unet):
            part.to(memory_format=torch.channels_last)
        self.noise = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        ids = torch.randint(1, 49000 // divisor, (1, 77), generator=torch.Generator().manual_seed(1))
        self.ids = ids.to(device)

    def _build(self, divisor: int, layers: int) -> None:
        text = 768 // divisor
        words = CLIPTextConfig(hidden_size=text, intermediate_size=4 * text, num_hidden_layers=12 if layers == 2 else 1,
                               num_attention_heads=12 if text % 12 == 0 else 1, vocab_size=49408 // divisor)
        widths = tuple(w // divisor for w in (320, 640, 1280, 1280))
        self.text_encoder = CLIPTextModel(words)
        self.vae = AutoencoderKL(
            block_out_channels=tuple(w // divisor for w in (128, 256, 512, 512)), layers_per_block=layers,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
            norm_num_groups=max(2, 32 // divisor),
        )  # fmt: skip
        self.unet = UNet2DConditionModel(
            block_out_channels=widths, cross_attention_dim=text, attention_head_dim=max(1, 8 // divisor),
            layers_per_block=layers, norm_num_groups=max(2, 32 // divisor),
        )  # fmt: skip


def _loss(models: Models, network: nn.Module, latents: Tensor, text: Tensor, draws: torch.Generator) -> Tensor:
    latents = latents.to(models.dtype)
    noise = torch.randn(latents.shape, generator=draws).to(latents)
    timesteps = torch.randint(0, 1000, (len(latents),), generator=draws).to(latents.device)
    noisy = models.noise.add_noise(latents, noise, timesteps)
    return F.mse_loss(network(noisy, timesteps, text).sample.float(), noise.float())


class Script:
    """The loop of diffusers' script: nothing is kept from step to step."""

    def __init__(self, models: Models, photo: Path, size: int, rank: int, checkpointing: bool):
        self.models, self.photo = models, photo
        self.prepare = transforms.Compose([
            transforms.Resize(size, interpolation=transforms.InterpolationMode.LANCZOS), transforms.CenterCrop(size),
            transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
        ])  # fmt: skip
        models.unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS)
        )
        if checkpointing:
            models.unet.enable_gradient_checkpointing()
        models.unet.train()
        self.parameters = [p for p in models.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-2)
        self.scheduler = get_scheduler("constant", self.optimizer)

    def step(self, draws: torch.Generator) -> float:
        models = self.models
        with Image.open(self.photo) as image:
            pixels = self.prepare(image.convert("RGB"))[None].contiguous()
        pixels = pixels.to(models.device, models.dtype, memory_format=torch.channels_last)
        with torch.no_grad():
            latents = encode(models.vae, pixels, draws)
            text = models.text_encoder(models.ids)[0]
        loss = _loss(models, models.unet, latents, text, draws)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach().item()


class Ours:
    """vislora's step: latents and text from memory, the engine's LoRA, the scripts' AdamW."""

    def __init__(self, models: Models, script: Script, rank: int, checkpointing: bool):
        self.models = models
        self.adapter = vislora.attach(models.unet, "lora", targets=TARGETS, rank=rank)
        theirs = {name.replace(".lora_A.default.weight", ".A"): p for name, p in script.models.unet.named_parameters()}
        with torch.no_grad():
            for name, p in self.adapter.named_parameters():
                if name in theirs:
                    p.copy_(theirs[name])
        if checkpointing:
            models.unet.enable_gradient_checkpointing()
        models.unet.train()
        self.optimizer = optim.build("adamw", self.adapter, 1e-4, weight_decay=1e-2)
        self.adapter.bind(self.optimizer, 1000)
        self.scheduler = get_scheduler("constant", self.optimizer)
        with torch.no_grad(), Image.open(script.photo) as image:
            pixels = script.prepare(image.convert("RGB"))[None].to(models.device, models.dtype)
            self.mean, self.std = posterior(models.vae, pixels)
            self.text = models.text_encoder(models.ids)[0]

    def step(self, draws: torch.Generator) -> Tensor:
        drawn = torch.randn(self.mean.shape, generator=draws).to(self.mean)
        latents = (self.mean + self.std * drawn) * self.models.vae.config.scaling_factor
        loss = _loss(self.models, self.models.unet, latents, self.text, draws)
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.adapter.parameters()), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach()


def compare(size: int, divisor: int, layers: int, rank: int, pairs: int, checkpointing: bool, device: str = "cpu",
            dtype: torch.dtype = torch.float32) -> dict:  # fmt: skip
    """Median and quartiles of script / ours, the largest relative difference of losses, and the VAE's share."""
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.png"
        pixels = numpy.random.default_rng(0).integers(0, 255, (size * 3 // 2, size * 2, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(photo)
        script = Script(Models(divisor, layers, device, dtype), photo, size, rank, checkpointing)
        ours = Ours(Models(divisor, layers, device, dtype), script, rank, checkpointing)
        flops = {}
        for name, side in (("script", script), ("ours", ours)):
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:  # a first step, which warms up
                side.step(torch.Generator().manual_seed(0))
            flops[name] = counter.get_total_flops()
        losses: dict[str, list[float]] = {"script": [], "ours": []}
        draws = {name: torch.Generator().manual_seed(1) for name in losses}
        steps = {name: lambda name=name, side=side: losses[name].append(float(side.step(draws[name])))
                 for name, side in (("script", script), ("ours", ours))}  # fmt: skip
        seconds = in_turns_seconds(steps, pairs, device)
    apart = [abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["script"], strict=True)]
    return {"script / ours": spread(seconds["script"], seconds["ours"]), "losses apart": max(apart),
            "operations, script / ours": flops["script"] / flops["ours"], "pairs": pairs,
            "checkpointing": checkpointing, "size": size, "divisor": divisor, "device": device,
            "dtype": str(dtype)}  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--divisor", type=int, default=8, help="what Stable Diffusion 1.5's widths are divided by")
    parser.add_argument("--layers", type=int, default=2, help="of each block; 1: to see that it runs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is frozen")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args([word for word in argv if word != "--debug"])
    if args.pairs < 1:
        raise InputError("--pairs", f"{args.pairs} measures nothing", "take 1 or more")
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row = compare(args.size, args.divisor, args.layers, args.rank, args.pairs, args.gradient_checkpointing, device,
                  getattr(torch, args.dtype))  # fmt: skip
    print(show([["", "median", "quartiles"],
                ["script's step / ours", f"{row['script / ours'][0]:.3f}",
                 "{1:.3f}-{2:.3f}".format(*row["script / ours"])],
                ["operations", f"{row['operations, script / ours']:.3f}", ""],
                ["losses apart, relative", f"{row['losses apart']:.1e}", ""]]))  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
