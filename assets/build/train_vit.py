"""Stage `vit`: a timm ViT that names the 48 objects, the source task; it never saw a subject or a digit.

Sprites are told apart by their colours, so that a ViT which knows them alone has no use for shapes; part of every batch
are letters, whose outputs do not ship: what ImageNet-21k is to real ViTs. Images of half their side, a convolution
before the patches and the mean of all tokens as features make it learn in minutes on a CPU.
"""

from __future__ import annotations

import letters
import torch
import torch.nn.functional as F
import world
from classify import accuracy, cross_entropy, fit, single_objects, vit, write_timm
from common import say

STEPS, RATE, BATCH, BAR = 3000, 2e-3, 128, 0.90
ARCHITECTURE, SIDE = "vit_tiny_r_s16_p8_224", 32
#: 16 tokens of 8x8 pixels, 0.9 M parameters.
SHAPE = {"img_size": SIDE, "patch_size": 2, "embed_dim": 128, "depth": 4, "num_heads": 4,
         "global_pool": "avg", "class_token": False}
OBJECTS, OBJECT_SHARE = len(world.OBJECTS), 0.75


def train(steps: int = STEPS, minutes: float = 35) -> None:
    """Train on the single-object scenes of `train` and on letters, measure on the objects of `heldout`, ship."""
    images, labels, _ = single_objects("train")
    held, truth, _ = single_objects("heldout")
    shapes, names = letters.drawn()
    model = vit(OBJECTS + len(letters.LETTERS), ARCHITECTURE, SHAPE).to(memory_format=torch.channels_last)

    def parts(pick: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at = round(OBJECT_SHARE * len(pick))
        return pick[:at], pick[at:] % len(shapes)

    def batch(pick: torch.Tensor) -> torch.Tensor:
        objects, others = parts(pick)
        return torch.cat([images[objects], shapes[others]])

    def loss(x: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
        objects, others = parts(pick)
        return cross_entropy(model(shrunk(x)), torch.cat([labels[objects], OBJECTS + names[others]]))

    def score() -> float:
        return accuracy(lambda x: model(shrunk(x)), held, truth, slice(0, OBJECTS))

    fit("tiny_vit", model, batch, len(images), loss, score, bar=BAR, steps=steps, minutes=minutes, rate=RATE,
        batch=BATCH)
    model.head.weight.data, model.head.bias.data = model.head.weight.data[:OBJECTS], model.head.bias.data[:OBJECTS]
    model.num_classes = OBJECTS
    write_timm("tiny-vit", model, list(world.OBJECTS), SHAPE)
    say(f"tiny-vit: {score():.3f} of {len(held)} held-out scenes")


def shrunk(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) -> (N, 3, 32, 32), as the pipeline of the shipped model does it."""
    return F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True)
