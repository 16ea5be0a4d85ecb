"""Stage `vit`: a timm ViT that names the 48 objects, the source task of classification; it never saw a subject."""

from __future__ import annotations

import world
from classify import accuracy, cross_entropy, fit, single_objects, vit, write_timm
from common import say

STEPS, RATE, BAR = 3000, 1e-3, 0.90


def train(steps: int = STEPS, minutes: float = 60) -> None:
    """Train on the single-object scenes of `train`, measure on those of `heldout`, ship."""
    images, labels, _ = single_objects("train")
    held, truth, _ = single_objects("heldout")
    model = vit(len(world.OBJECTS))
    fit("vit", model, images.__getitem__, len(images), lambda x, pick: cross_entropy(model(x), labels[pick]),
        lambda: accuracy(model, held, truth), bar=BAR, steps=steps, minutes=minutes, rate=RATE)
    write_timm("tiny-vit", model, list(world.OBJECTS))
    say(f"tiny-vit: {accuracy(model, held, truth):.3f} of {len(held)} held-out scenes")
