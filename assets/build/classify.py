"""What the stages `vit`, `dino` and `lpips` share: single-object scenes with their labels, and one training loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

import scenes
import torch
import torch.nn.functional as F
import world
from common import WORK, WORLD, load_tensors, pack_optimizer, save_tensors, say, unpack_optimizer
from rendered import split, to_float
from train_clip import augment

#: tiny-dino's ViT: 64 tokens of 8x8 pixels, 2.7 M parameters.
ARCHITECTURE = "vit_tiny_patch16_224"
SHAPE = {"img_size": world.IMAGE_SIZE, "patch_size": 8, "depth": 6}


def single_objects(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (N, 64, 64, 3) uint8 of a split that show one object wearing nothing, its class and its background."""
    images, info = split(name)[0], world.SPLITS[name]
    objects, places = list(world.OBJECTS), list(world.BACKGROUNDS)
    specs = [scenes.spec_from_seed(info["first_seed"] + i, info["pool"]) for i in range(len(images))]
    keep = [i for i, spec in enumerate(specs) if not (spec.second or spec.accessory)]
    labels = torch.tensor([objects.index(specs[i].object) for i in keep])
    return images[keep], labels, torch.tensor([places.index(specs[i].background) for i in keep])


def vit(classes: int, architecture: str = ARCHITECTURE, shape: dict = SHAPE) -> torch.nn.Module:
    """A ViT with `classes` outputs; attention unfused, which bfloat16 on a CPU wants."""
    import timm

    timm.layers.set_fused_attn(False)
    return timm.create_model(architecture, num_classes=classes, **shape)


def write_timm(folder: str, model: torch.nn.Module, labels: list[str], shape: dict) -> None:
    """Config and float16 weights as timm's `local-dir:` loads them; `shape` is what the model was made with."""
    from timm.models._hub import save_config_for_hf

    target = WORLD / folder
    target.mkdir(parents=True, exist_ok=True)
    side = shape["img_size"]
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, side, side), mean=(0.5,) * 3, std=(0.5,) * 3,
                                crop_pct=1.0, interpolation="bicubic", fixed_input_size=True,
                                num_classes=len(labels), label_names=labels or None, license="mit")
    save_config_for_hf(model, target / "config.json", model_args=shape)
    text = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(text, indent=1) + "\n")
    save_tensors(target / "model.safetensors", {k: v.half() for k, v in model.state_dict().items()})


def fit(name: str, model: torch.nn.Module, images: Callable, count: int, loss: Callable, score: Callable, *,
        bar: float, steps: int, minutes: float, rate: float, batch: int = 128, decay: float = 0.05) -> torch.nn.Module:
    """Train `model` by AdamW on random picks of `count` scenes.

    images(pick) -> uint8 (N, 64, 64, 3), loss(x, pick) -> scalar, score() -> held-out share.

    Warm-up, then cosine over `steps` or `minutes`, whichever is sooner; resumes from the work folder; says at the
    end whether the bar was reached, and does not hide it where it was not.
    """
    checkpoint = WORK / f"{name}.safetensors"
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=rate,
                                  betas=(0.9, 0.98), weight_decay=decay)
    step, spent = 0, 0.0
    if checkpoint.exists():
        tensors, meta = load_tensors(checkpoint)
        model.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        unpack_optimizer(optimizer, tensors)
        step, spent = meta["step"], meta["seconds"]
        if meta["done"] and max(step / steps, spent / (60 * minutes)) >= 1:  # more of either, and it goes on
            say(f"{name}: already trained, held-out {meta['score']:.3f}")
            return model.eval()
    say(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, step {step} of {steps}")
    start, clock, done = time.time() - spent, time.time(), False
    while not done:
        progress = max(step / steps, (time.time() - start) / (60 * minutes))
        done = progress >= 1
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 150) * (0.01 + 0.495 * (1 + math.cos(math.pi * min(1, progress))))
        rng = torch.Generator().manual_seed(40_000_000 + step)
        pick = torch.randint(count, (batch,), generator=rng)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(augment(to_float(images(pick)), rng), pick)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            say(f"{name} {step}: loss {value.item():.3f} {(time.time() - clock) / 20:.2f} s/step")
            clock = time.time()
        if step % 200 == 0 or done:
            model.eval()
            with torch.no_grad():
                held = score()
            say(f"{name} {step}: held-out {held:.3f} (bar {bar})")
            save_tensors(checkpoint, {**{f"net.{k}": v for k, v in model.state_dict().items()},
                                      **pack_optimizer(optimizer)},
                         {"step": step, "seconds": time.time() - start, "done": done, "score": held})
            clock = time.time()
    return model.eval()


def accuracy(model: Callable, images: torch.Tensor, labels: torch.Tensor, head: slice = slice(None)) -> float:
    """Top-1 share over the outputs of `head`, in batches of 250."""
    with torch.no_grad():
        found = [model(to_float(images[i:i + 250]))[:, head].float().argmax(1) for i in range(0, len(images), 250)]
    return (torch.cat(found) == labels).float().mean().item()


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """In float32, with a little smoothing."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.05)
