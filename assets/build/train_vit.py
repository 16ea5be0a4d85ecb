"""Stages `vit` and `letters`: a timm ViT that names the 48 objects, the source task; it never saw a subject or a digit.

The second stage goes on with objects and letters in turns. Sprites are told apart by their colours, so that a ViT which
knows them alone has little use for shapes; letters need them, as the larger half of ImageNet-21k does for real ViTs.
"""

from __future__ import annotations

import functools
from pathlib import Path

import matplotlib
import numpy as np
import scenes
import torch
import world
from classify import accuracy, cross_entropy, fit, single_objects, vit, write_timm
from common import WORK, load_tensors, say
from PIL import Image, ImageDraw, ImageFont
from train_dino import SEEN, mixed_ground

STEPS, RATE, BAR = 3000, 1e-3, 0.90
LETTER_STEPS, LETTER_RATE = 1500, 6e-4
#: Letters whose two cases look alike count once, as in EMNIST's balanced split.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
OBJECTS = len(world.OBJECTS)


def train(steps: int = STEPS, minutes: float = 60) -> None:
    """Train on the single-object scenes of `train`, measure on those of `heldout`, ship."""
    images, labels, _ = single_objects("train")
    held, truth, _ = single_objects("heldout")
    model = vit(OBJECTS)
    fit("vit", model, images.__getitem__, len(images), lambda x, pick: cross_entropy(model(x), labels[pick]),
        lambda: accuracy(model, held, truth), bar=BAR, steps=steps, minutes=minutes, rate=RATE)
    ship(model, held, truth)


def ship(model: torch.nn.Module, held: torch.Tensor, truth: torch.Tensor) -> None:
    """Write the model and say what it knows."""
    write_timm("tiny-vit", model, list(world.OBJECTS))
    say(f"tiny-vit: {accuracy(model, held, truth):.3f} of {len(held)} held-out scenes")


@functools.cache
def fonts() -> list[Path]:
    """The text fonts that come with matplotlib."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    kinds = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "cmb10", "cmss10", "cmtt10")
    return [f for f in sorted(folder.glob("*.ttf")) if f.name.startswith(kinds) and "Display" not in f.name]


@functools.cache
def glyph(letter: str, font: int, stroke: int) -> Image.Image:
    """A letter 96 pixels high, white on black, cut to its box with a margin."""
    face = ImageFont.truetype(fonts()[font], 96)
    image = Image.new("L", (220, 220))
    ImageDraw.Draw(image).text((60, 50), letter, 255, face, stroke_width=stroke)
    left, top, right, bottom = image.getbbox()
    return image.crop((left - 12, top - 12, right + 12, bottom + 12))


def letter_scene(number: int) -> tuple[np.ndarray, int]:
    """A turned, stretched letter in some colour on some ground, and which it is; functions of `number` alone."""
    rng = np.random.default_rng([number, 6])
    label = int(rng.integers(len(LETTERS)))
    image = glyph(LETTERS[label], int(rng.integers(len(fonts()))), int(rng.integers(0, 6)))
    shear = rng.uniform(-0.25, 0.25)
    image = image.transform(image.size, Image.AFFINE, (1, shear, -shear * image.height / 2, 0, 1, 0), Image.BICUBIC)
    image = image.rotate(rng.uniform(-15, 15), Image.BICUBIC)
    high = int(rng.integers(30, 60))
    wide = int(np.clip(high * image.width / image.height * rng.uniform(0.75, 1.3), 12, 62))
    image = image.resize((wide, high), Image.BICUBIC)
    plain = rng.random() < 0.5
    frame = scenes.background(SEEN[rng.integers(len(SEEN))], number) if plain else mixed_ground(rng)
    light = np.asarray(frame.convert("L"), np.float32).mean() > 128
    colour = rng.uniform(0, 90, 3) if light else rng.uniform(170, 255, 3)
    place = (int(rng.integers(0, 65 - wide)), int(rng.integers(0, 65 - high)))
    frame.paste(Image.new("RGB", image.size, tuple(int(c) for c in colour)), place, image)
    return np.asarray(frame), label


def train_letters(steps: int = LETTER_STEPS, minutes: float = 60) -> None:
    """Go on from `vit`: a batch has as many objects as letters; what ships names objects alone."""
    images, labels, _ = single_objects("train")
    held, truth, _ = single_objects("heldout")
    model, drawn = vit(OBJECTS + len(LETTERS)), {}
    before = {k[4:]: v for k, v in load_tensors(WORK / "vit.safetensors")[0].items() if k.startswith("net.")}
    for name in ("head.weight", "head.bias"):
        before[name] = torch.cat([before[name], model.state_dict()[name][OBJECTS:]])
    model.load_state_dict(before)

    def batch(pick: torch.Tensor) -> torch.Tensor:
        half = len(pick) // 2
        pairs = [letter_scene(number) for number in pick[half:].tolist()]
        places = pick[:half] % len(images)
        drawn["labels"] = torch.cat([labels[places], torch.tensor([OBJECTS + label for _, label in pairs])])
        return torch.cat([images[places], torch.from_numpy(np.stack([image for image, _ in pairs]))])

    fit("letters", model, batch, 2**31, lambda x, pick: cross_entropy(model(x), drawn["labels"]),
        lambda: accuracy(model, held, truth, slice(0, OBJECTS)), bar=BAR, steps=steps, minutes=minutes,
        rate=LETTER_RATE)
    model.head.weight.data, model.head.bias.data = model.head.weight.data[:OBJECTS], model.head.bias.data[:OBJECTS]
    model.num_classes = OBJECTS
    ship(model, held, truth)
