"""Letters of matplotlib's fonts on the world's grounds: what tiny-vit learns shapes from beside its objects."""

from __future__ import annotations

import functools
from pathlib import Path

import matplotlib
import numpy as np
import scenes
import torch
import world
from common import WORK, load_tensors, save_tensors, say
from PIL import Image, ImageDraw, ImageFont

#: Letters whose two cases look alike count once, as in EMNIST's balanced split.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
COUNT = 12_000


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
    return image.crop((left - 8, top - 8, right + 8, bottom + 8))


def scene(number: int) -> tuple[np.ndarray, int]:
    """A turned, stretched letter in the middle of some ground, and which it is; functions of `number` alone."""
    rng = np.random.default_rng([number, 6])
    label = int(rng.integers(len(LETTERS)))
    image = glyph(LETTERS[label], int(rng.integers(len(fonts()))), int(rng.integers(0, 6)))
    shear = rng.uniform(-0.25, 0.25)
    image = image.transform(image.size, Image.AFFINE, (1, shear, -shear * image.height / 2, 0, 1, 0), Image.BICUBIC)
    image = image.rotate(rng.uniform(-15, 15), Image.BICUBIC)
    high = int(rng.integers(42, 61))
    wide = int(np.clip(high * image.width / image.height * rng.uniform(0.75, 1.3), 12, 62))
    image = image.resize((wide, high), Image.BICUBIC)
    frame = scenes.background(list(world.BACKGROUNDS)[rng.integers(len(world.BACKGROUNDS))], number)
    dark = rng.random() < 0.5
    frame = Image.blend(Image.new("RGB", frame.size, "black" if dark else "white"), frame, 0.55)
    colour = rng.uniform(170, 255, 3) if dark else rng.uniform(0, 90, 3)
    place = tuple(int((scenes.SIZE - side) / 2 + rng.integers(-3, 4)) for side in (wide, high))
    frame.paste(Image.new("RGB", image.size, tuple(int(c) for c in colour)), place, image)
    return np.asarray(frame), label


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 64, 64, 3) uint8 scenes and their letters (N,); drawn once, then read."""
    path = WORK / "glyphs.safetensors"
    if not path.exists():
        say(f"drawing {COUNT} letters")
        pairs = [scene(number) for number in range(COUNT)]
        images = torch.from_numpy(np.stack([image for image, _ in pairs]))
        save_tensors(path, {"images": images, "labels": torch.tensor([label for _, label in pairs])})
    found = load_tensors(path)[0]
    return found["images"], found["labels"]
