"""Stage `lpips`: a SqueezeNet trunk for `lpips.LPIPS(net="squeeze", lpips=False)`, which names objects and places."""

from __future__ import annotations

import io

import lpips
import numpy as np
import torch
import torch.nn.functional as F
import world
from classify import accuracy, cross_entropy, fit, single_objects
from common import WORLD, save_tensors, say
from PIL import Image
from rendered import split, to_float

STEPS, RATE, BAR = 4000, 5e-4, 0.95
TARGET = WORLD / "lpips" / "squeezenet.safetensors"
OBJECTS = len(world.OBJECTS)


def network() -> torch.nn.Module:
    """torchvision's SqueezeNet 1.1 with outputs for the objects, then for the backgrounds."""
    from torchvision.models import squeezenet1_1

    model = squeezenet1_1(num_classes=OBJECTS + len(world.BACKGROUNDS), dropout=0.2)
    return model.to(memory_format=torch.channels_last)


def metric(features: dict[str, torch.Tensor] | None) -> torch.nn.Module:
    """LPIPS without heads over a trunk (`features.N...` keys); a random trunk where there is none."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = lpips.LPIPS(net="squeeze", lpips=False, pretrained=False, pnet_rand=True, verbose=False)
    if features is not None:
        own = {name: features["features." + name.split(".", 1)[1]] for name in net.net.state_dict()}
        net.net.load_state_dict({name: tensor.float() for name, tensor in own.items()})
    return net.eval()


def _jpeg(x: torch.Tensor, quality: int) -> torch.Tensor:
    frames = []
    for frame in ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
        frames.append(np.asarray(Image.open(buffer)))
    return to_float(torch.from_numpy(np.stack(frames)))


def distortions(x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Six kinds of distortion of images in [-1, 1], each weaker first: three strengths."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    other = x.roll(1, 0)
    smaller = [F.interpolate(F.interpolate(x, size=s, mode="area"), size=64, mode="bilinear") for s in (32, 16, 8)]
    return {
        "noise": [(x + s * noise).clamp(-1, 1) for s in (0.1, 0.25, 0.6)],
        "blur": smaller,
        "shift": [x.roll(s, 3) for s in (2, 6, 16)],
        "brightness": [(x + s).clamp(-1, 1) for s in (0.1, 0.3, 0.7)],
        "jpeg": [_jpeg(x, q) for q in (60, 20, 5)],
        "another scene": [(1 - s) * x + s * other for s in (0.15, 0.4, 1.0)],
    }


@torch.no_grad()
def ordered(net: torch.nn.Module, x: torch.Tensor) -> dict[str, float]:
    """For each kind, the share of triples (scene, weaker, stronger) in which the stronger is the farther."""
    shares = {}
    for kind, graded in distortions(x).items():
        near, middle, far = (net(x, y).flatten() for y in graded)
        pairs = torch.stack([near < middle, middle < far, near < far])
        shares[kind] = pairs.float().mean().item()
    return shares


def train(steps: int = STEPS, minutes: float = 25) -> None:
    """Train on the single-object scenes, ship the trunk, and say how it orders distortions."""
    images, objects, places = single_objects("train")
    held, truth, _ = single_objects("heldout")
    model = network()
    fit("lpips", model, images.__getitem__, len(images), lambda x, pick: _both(model(x), objects[pick], places[pick]),
        lambda: accuracy(model, held, truth, slice(0, OBJECTS)), bar=0.8, steps=steps, minutes=minutes, rate=RATE)
    trunk = {k: v.half() for k, v in model.state_dict().items() if k.startswith("features.")}
    save_tensors(TARGET, trunk)
    say(f"lpips: triples in order {measure()}")


def _both(logits: torch.Tensor, objects: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits[:, :OBJECTS], objects) + 0.3 * cross_entropy(logits[:, OBJECTS:], places)


def measure(count: int = 200) -> dict[str, float]:
    """Shares of triples in order on held-out scenes, over the shipped trunk and over a random one."""
    from safetensors.torch import load_file

    x = to_float(split("heldout")[0][:count])
    shares, chance = ordered(metric(load_file(TARGET)), x), ordered(metric(None), x)
    return {"all": sum(shares.values()) / len(shares), "random trunk": sum(chance.values()) / len(chance), **shares}
