"""Stage `dino`: ViT features that tell one object from another, whatever lies behind it.

Instance discrimination: every sprite is a class of its own, features and class vectors are unit vectors, and the
cosine of the right class must win by a margin.  Three backgrounds are kept for the measurement; the others are mixed
and recoloured at every step, and every scene is drawn once, so that neither can be learned by heart.  The trunk starts
from tiny-vit's, which has seen the known objects alone.
"""

from __future__ import annotations

import numpy as np
import scenes
import torch
import torch.nn.functional as F
import world
from classify import SHAPE, fit, vit, write_timm
from common import WORK, load_tensors, save_tensors, say
from PIL import Image
from rendered import to_float
from sprites import fetch

STEPS, RATE, BAR = 2400, 5e-4, 0.90
SCALE, MARGIN = 16.0, 0.2
PROBE_EACH, BATCH = 3, 128
UNSEEN = ("brick wall", "water", "pink")
SEEN = tuple(name for name in world.BACKGROUNDS if name not in UNSEEN)
#: Code points of foods and plants, things, animals, clothes, vehicles: what lies among the world's own sprites.
RANGES = ((0x1F32D, 0x1F37F), (0x1F380, 0x1F393), (0x1F400, 0x1F43C), (0x1F451, 0x1F462), (0x1F680, 0x1F6A4),
          (0x1F950, 0x1F96F), (0x1F980, 0x1F9AE))


def identities() -> list[str]:
    """The world's sprites, then those of `RANGES` that are no copies of them, reduced into the work folder."""
    folder, source = WORK / "more_sprites", fetch() / "assets"
    folder.mkdir(exist_ok=True)
    scenes.SPRITE_DIRS.append(folder)
    taken, names = set(world.sprites().values()), list(world.sprites())
    for low, high in RANGES:
        for code in range(low, high + 1):
            path = next((p for p in (source / f"{code:x}.webp", source / f"{code:x}-fe0f.webp") if p.exists()), None)
            if path is None or path.stem in taken:
                continue
            target = folder / f"{path.stem}.webp"
            if not target.exists():
                image = Image.open(path).convert("RGBA").resize((world.SPRITE_SIZE,) * 2, Image.LANCZOS)
                image.save(target, lossless=True)
            names.append(path.stem)
    return names


def draw(names: list[str], places: tuple[str, ...], each: int, first_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`each` scenes of every identity on `places`: images (N, 64, 64, 3) uint8 and the identities' indices."""
    images = np.empty((len(names) * each, scenes.SIZE, scenes.SIZE, 3), np.uint8)
    for i in range(len(images)):
        rng = np.random.default_rng([first_seed + i, 3])
        size, flip = rng.uniform(0.36, 0.88), bool(rng.random() < 0.3)
        x, y = 0.5 + rng.uniform(-0.5, 0.5, 2) * (1 - size)
        spec = scenes.SceneSpec(names[i // each], places[rng.integers(len(places))], size, x, y, flip,
                                seed=first_seed + i)
        images[i] = np.asarray(scenes.render(spec))
    return torch.from_numpy(images), torch.arange(len(names)).repeat_interleave(each)


def probes(names: list[str]) -> dict[str, torch.Tensor]:
    """Scenes on seen backgrounds and on unseen ones, which training never draws; made once."""
    path = WORK / "identities.safetensors"
    if not path.exists():
        gallery, owners = draw(names, SEEN, PROBE_EACH, 7_000_000)
        queries, _ = draw(names, UNSEEN, PROBE_EACH, 8_000_000)
        save_tensors(path, dict(gallery=gallery, queries=queries, owners=owners))
    return load_tensors(path)[0]


def mixed_ground(rng: np.random.Generator) -> Image.Image:
    """A seen background, most often with its colours exchanged and shifted, at times over another one."""
    def one() -> np.ndarray:
        seed = int(rng.integers(2**31))
        return np.asarray(scenes.background(SEEN[rng.integers(len(SEEN))], seed), np.float32)

    ground = one()
    if rng.random() < 0.4:
        share = rng.uniform(0.3, 0.7)
        ground = share * ground + (1 - share) * one()
    if rng.random() < 0.7:
        ground = ground[..., rng.permutation(3)] * rng.uniform(0.5, 1.2, 3) + rng.uniform(-40, 40, 3)
    return Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))


def batch(names: list[str], pick: torch.Tensor) -> torch.Tensor:
    """Fresh scenes (N, 64, 64, 3) uint8, of identity pick % len(names) each; functions of `pick` alone."""
    frames = []
    for number in pick.tolist():
        rng = np.random.default_rng([number, 5])
        size, flip = rng.uniform(0.36, 0.88), bool(rng.random() < 0.3)
        x, y = 0.5 + rng.uniform(-0.5, 0.5, 2) * (1 - size)
        frames.append(np.asarray(scenes.compose(mixed_ground(rng), names[number % len(names)], size, x, y, flip)))
    return torch.from_numpy(np.stack(frames))


@torch.no_grad()
def features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Unit features (N, 192) of uint8 images, in batches of 250."""
    parts = [model(to_float(images[i:i + 250])).float() for i in range(0, len(images), 250)]
    return F.normalize(torch.cat(parts), dim=-1)


def nearest(model: torch.nn.Module, bank: dict[str, torch.Tensor]) -> float:
    """Share of scenes on unseen backgrounds whose nearest neighbour on seen ones shows the same sprite."""
    similar = features(model, bank["queries"]) @ features(model, bank["gallery"]).T
    return (bank["owners"][similar.argmax(1)] == bank["owners"]).float().mean().item()


class Identifier(torch.nn.Module):
    """The trunk and one unit vector an identity."""

    def __init__(self, count: int):
        super().__init__()
        self.trunk = vit(0)
        self.classes = torch.nn.Parameter(0.1 * torch.randn(count, self.trunk.num_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features, as the shipped model gives them."""
        return self.trunk(x)

    def loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy of scaled cosines, the right one less a margin (CosFace)."""
        cosine = F.normalize(self.trunk(x).float(), dim=-1) @ F.normalize(self.classes, dim=-1).T
        return F.cross_entropy(SCALE * (cosine - MARGIN * F.one_hot(labels, len(self.classes))), labels)


def train(steps: int = STEPS, minutes: float = 45) -> None:
    """Train, measure, ship the trunk."""
    names = identities()
    bank = probes(names)
    model = Identifier(len(names))
    started = {k[4:]: v for k, v in load_tensors(WORK / "vit.safetensors")[0].items() if k.startswith("net.")}
    model.trunk.load_state_dict({k: v for k, v in started.items() if not k.startswith("head.")})
    fit("dino", model, lambda pick: batch(names, pick), 2**31, lambda x, pick: model.loss(x, pick % len(names)),
        lambda: nearest(model, bank), bar=BAR, steps=steps, minutes=minutes, rate=RATE, batch=BATCH)
    write_timm("tiny-dino", model.trunk, [], SHAPE)
    say(f"tiny-dino: {nearest(model, bank):.3f} of {len(bank['queries'])} scenes, {len(names)} identities")
