"""Procedural scenes: one integer seed -> one 64x64 RGB image and its caption.

`spec_from_seed` decides everything about a scene (what, where, how large, which words); `render` draws a spec.
Both use only numpy Generators made from the seed, never a global one, so a scene is the same everywhere.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import world
from PIL import Image, ImageFilter

#: Where sprites lie: the shipped ones first; a stage that draws others adds its folder.
SPRITE_DIRS = [Path(__file__).resolve().parent.parent / "world" / "sprites"]
SIZE = world.IMAGE_SIZE


@dataclass(frozen=True)
class SceneSpec:
    """What a scene shows.  Positions are the centre of the object as a share of the frame."""

    object: str
    background: str
    size: float = 0.6
    x: float = 0.5
    y: float = 0.5
    flip: bool = False
    prop: str | None = None
    second: str | None = None
    accessory: str | None = None
    seed: int = 0
    caption: str = ""


# ---------------------------------------------------------------------------------------------- backgrounds
def _noise(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Smooth noise in [-1, 1]: a coarse random grid enlarged to the frame."""
    grid = rng.uniform(-1, 1, (rows, cols)).astype(np.float32)
    return np.asarray(Image.fromarray(grid, mode="F").resize((SIZE, SIZE), Image.BICUBIC))


def _fill(colour, shade: np.ndarray) -> np.ndarray:
    """A colour made lighter or darker by a shade map (0 leaves it as it is)."""
    return np.asarray(colour, np.float32) * (1 + shade[..., None])


def _mix(a, b, weight: np.ndarray) -> np.ndarray:
    w = np.clip(weight, 0, 1)[..., None]
    return np.asarray(a, np.float32) * (1 - w) + np.asarray(b, np.float32) * w


def _grid() -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.mgrid[0:SIZE, 0:SIZE].astype(np.float32))


def _grass(rng):
    return _fill((88, 160, 58), 0.22 * _noise(rng, 12, 40) + 0.10 * _noise(rng, 5, 5))


def _sand(rng):
    y, _ = _grid()
    ripple = np.sin((y + 4 * _noise(rng, 4, 6)) * (2 * np.pi / 9) + rng.uniform(0, 6.28))
    return _fill((226, 198, 142), 0.06 * ripple + 0.04 * _noise(rng, 40, 40))


def _snow(rng):
    img = _mix((236, 242, 250), (190, 208, 232), 0.5 + 0.6 * _noise(rng, 5, 5))
    for _ in range(14):
        cy, cx = rng.integers(0, SIZE - 2, 2)
        img[cy:cy + 2, cx:cx + 2] = 255
    return img


def _night(rng):
    y, _ = _grid()
    img = _mix((10, 12, 44), (38, 34, 92), y / SIZE + 0.15 * _noise(rng, 4, 4))
    for _ in range(26):
        cy, cx = rng.integers(0, SIZE - 2, 2)
        side = 1 + int(rng.random() < 0.35)
        img[cy:cy + side, cx:cx + side] = (255, 250, 215)
    return img


def _brick(rng):
    y, x = _grid()
    oy, ox = rng.integers(0, 10), rng.integers(0, 18)
    row = (y + oy) // 10
    across = (x + ox + 9 * (row % 2)) % 18
    mortar = ((y + oy) % 10 < 1.5) | (across < 1.5)
    brick = _fill((176, 76, 58), 0.14 * _noise(rng, 8, 8))
    return np.where(mortar[..., None], np.float32((208, 196, 184)), brick)


def _checker(rng):
    y, x = _grid()
    oy, ox = rng.integers(0, 16, 2)
    dark = ((y + oy) // 16 + (x + ox) // 16) % 2 == 0
    return np.where(dark[..., None], np.float32((44, 44, 48)), np.float32((232, 232, 228)))


def _water(rng):
    y, _ = _grid()
    wave = np.sin((y + 5 * _noise(rng, 5, 5)) * (2 * np.pi / 11) + rng.uniform(0, 6.28))
    return _mix((26, 112, 168), (120, 204, 226), 0.38 + 0.34 * wave + 0.15 * _noise(rng, 16, 16))


def _wood(rng):
    y, x = _grid()
    offset = rng.integers(0, 16)
    plank = ((x + offset) // 16).astype(int)
    tone = rng.uniform(-0.12, 0.12, 8)[plank]
    img = _fill((158, 104, 60), tone + 0.08 * _noise(rng, 6, 48))
    return np.where(((x + offset) % 16 < 1.2)[..., None], np.float32((92, 56, 30)), img)


def _sunset(rng):
    y, x = _grid()
    t = y / SIZE + 0.06 * _noise(rng, 6, 3)
    img = _mix((94, 58, 138), (255, 128, 70), t * 1.5)
    img = img * (t < 0.72)[..., None] + _mix((60, 34, 66), (104, 52, 70), t)[:, :] * (t >= 0.72)[..., None]
    cx, cy = rng.uniform(12, 52), rng.uniform(34, 42)
    disc = ((x - cx) ** 2 + (y - cy) ** 2 < 8 ** 2) & (t < 0.72)
    return np.where(disc[..., None], np.float32((255, 224, 120)), img)


def _plain(colour):
    def draw(rng):
        y, x = _grid()
        angle = rng.uniform(0, 2 * np.pi)
        return _fill(colour, 0.08 * (np.cos(angle) * (x / SIZE - 0.5) + np.sin(angle) * (y / SIZE - 0.5)) * 2)
    return draw


_DRAW = {
    "grass": _grass, "sand": _sand, "snow": _snow, "night sky": _night, "brick wall": _brick,
    "checkerboard": _checker, "water": _water, "wooden floor": _wood, "sunset": _sunset,
    "blue": _plain((92, 150, 232)), "pink": _plain((244, 168, 200)), "yellow": _plain((246, 218, 92)),
}


def background(name: str, seed: int) -> Image.Image:
    """One background, 64x64 RGB."""
    return Image.fromarray(np.clip(_DRAW[name](np.random.default_rng([seed, 7])), 0, 255).astype(np.uint8))


# -------------------------------------------------------------------------------------------------- sprites
@functools.cache
def sprite(name: str) -> Image.Image:
    """A sprite cut to its opaque box, RGBA."""
    path = next(folder / f"{name}.webp" for folder in SPRITE_DIRS if (folder / f"{name}.webp").exists())
    image = Image.open(path).convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox())


def _tint(image: Image.Image, prop: str) -> Image.Image:
    """The sprite in shades of one colour (or of gray), its shading kept."""
    rgba = np.asarray(image, np.float32)
    lum = rgba[..., :3] @ np.float32((0.299, 0.587, 0.114)) / 255
    colour = world.TINTS[prop]
    if colour is None:
        rgb, keep = np.repeat(lum[..., None] * 255, 3, -1), 0.0
    else:
        rgb, keep = (0.35 + 0.75 * lum[..., None]) * np.float32(colour), 0.2
    out = np.concatenate([np.clip(keep * rgba[..., :3] + (1 - keep) * rgb, 0, 255), rgba[..., 3:]], -1)
    return Image.fromarray(out.astype(np.uint8))


def _sized(name: str, side: float, flip: bool) -> Image.Image:
    """A sprite whose longer side is `side` of the frame."""
    image = sprite(name)
    scale = side * SIZE / max(image.size)
    image = image.resize([max(4, round(n * scale)) for n in image.size], Image.LANCZOS)
    return image.transpose(Image.FLIP_LEFT_RIGHT) if flip else image


def _paste(frame: Image.Image, image: Image.Image, x: float, y: float, shadow: bool = True) -> tuple[int, int]:
    """Paste centred at (x, y) of the frame, over a soft shadow; returns the top left corner."""
    left, top = round(x * SIZE - image.width / 2), round(y * SIZE - image.height / 2)
    if shadow:
        mask = Image.new("L", frame.size)
        mask.paste(image.getchannel("A").point(lambda a: a * 0.35), (left + 1, top + 2))
        frame.paste((0, 0, 0), mask=mask.filter(ImageFilter.GaussianBlur(1.5)))
    frame.paste(image, (left, top), image)
    return left, top


def compose(frame: Image.Image, name: str, size: float, x: float, y: float, flip: bool) -> Image.Image:
    """Set a sprite on a frame of one's own, as `render` sets it on a background."""
    _paste(frame, _sized(name, size, flip), x, y)
    return frame


def render(spec: SceneSpec) -> Image.Image:
    """Draw a spec: 64x64 RGB."""
    frame = background(spec.background, spec.seed)
    image = _sized(spec.object, spec.size, spec.flip)
    if spec.prop in world.TINTS:
        image = _tint(image, spec.prop)
    if spec.second:
        _paste(frame, _sized(spec.second, spec.size, False), 0.75, 1 - spec.y)
    left, top = _paste(frame, image, spec.x, spec.y)
    if spec.accessory:
        worn = _sized(spec.accessory, 0.62 * spec.size, False)
        centre = (left + image.width / 2) / SIZE, (top - 0.12 * worn.height) / SIZE
        _paste(frame, worn, *centre, shadow=False)
    return frame


# ------------------------------------------------------------------------------------------------- captions
def _pick(rng: np.random.Generator, weighted):
    names, weights = zip(*weighted, strict=True)
    return names[rng.choice(len(names), p=np.asarray(weights) / sum(weights))]


def caption(spec: SceneSpec, rng: np.random.Generator | None = None) -> str:
    """The words for a spec; without a generator the plain form, e.g. "a big apple on a brick wall"."""
    noun = world.noun(spec.object)
    phrase = world.article(f"{spec.prop} {noun}" if spec.prop else noun)
    if rng is not None and rng.random() < 0.1:
        phrase = "the " + phrase.split(" ", 1)[1]
    if spec.second:
        joint = "next to" if rng is not None and rng.random() < 0.4 else "and"
        phrase = f"{phrase} {joint} {world.article(world.noun(spec.second))}"
    if spec.accessory:
        phrase = f"{phrase} wearing {world.article(spec.accessory)}"
    phrases = world.BACKGROUNDS[spec.background]
    if rng is None:
        return f"{phrase} {phrases[0]}"
    place = phrases[0] if rng.random() < 0.5 else phrases[rng.integers(len(phrases))]
    return _pick(rng, world.TEMPLATES).format(x=phrase, bg=place)


def spec_from_seed(seed: int, pool: str = "known", **fixed) -> SceneSpec:
    """Decide a scene from one seed.  `fixed` overrides fields (object=..., background=..., kind=...)."""
    rng = np.random.default_rng([seed, 1])
    names = world.pool(pool)
    drawn_kind = _pick(rng, world.KINDS)
    obj, second = (names[i] for i in rng.choice(len(names), 2, replace=False))
    back = list(world.BACKGROUNDS)[rng.integers(len(world.BACKGROUNDS))]
    prop = world.PROPERTIES[rng.integers(len(world.PROPERTIES))]
    worn = world.ACCESSORIES[rng.integers(len(world.ACCESSORIES))]
    u, ux, uy = rng.random(3)
    flip = bool(rng.random() < 0.3)
    kind = fixed.pop("kind", drawn_kind)
    obj, back = fixed.pop("object", obj), fixed.pop("background", back)
    low, high = 0.52, 0.74
    spec = SceneSpec(object=obj, background=back, flip=flip, seed=seed)
    if kind == "property":
        low, high = world.SIZES.get(prop, (low, high))
        spec = replace(spec, prop=prop)
    elif kind == "pair":
        low, high = 0.42, 0.50
    elif kind == "accessory" and world.noun(obj) not in world.ACCESSORIES:
        low, high = 0.50, 0.60
        spec = replace(spec, accessory=worn)
    size = low + (high - low) * u
    slack = max(0.0, 0.96 - size) / 2
    spec = replace(spec, size=size, x=0.5 + (ux - 0.5) * 2 * slack * 0.8, y=0.5 + (uy - 0.5) * 2 * slack * 0.8)
    if kind == "pair":
        spec = replace(spec, second=second if second != obj else names[0 if obj != names[0] else 1], x=0.26)
    elif spec.accessory:
        spec = replace(spec, y=0.58 + 0.06 * uy)
    spec = replace(spec, **fixed)
    return spec if spec.caption else replace(spec, caption=caption(spec, np.random.default_rng([seed, 2])))


def render_scene(scene: int | SceneSpec, pool: str = "known") -> tuple[Image.Image, str]:
    """A scene from a seed or an explicit spec: the image and its caption."""
    spec = spec_from_seed(scene, pool) if isinstance(scene, int) else scene
    return render(spec), spec.caption or caption(spec)
