"""Cuts: which rectangle of a photo becomes a training image, known before a pixel is read; and the cutting."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]  # height, width, in pixels


@dataclass(frozen=True)
class Cut:
    """A photo scaled to `scaled`, of which the rectangle of `size` at (top, left) is kept, then mirrored or not."""

    scaled: Size
    top: int
    left: int
    size: Size
    mirror: bool = False

    def corner(self) -> tuple[int, int]:
        """(top, left) in the photo as the image shows it: mirrored where the image is."""
        left = self.scaled[1] - self.left - self.size[1] if self.mirror else self.left
        return self.top, left


def plan(photo: Size, size: Size, center: bool, flip: bool, generator: torch.Generator | None = None) -> Cut:
    """The cut of a photo of `photo` pixels to `size`, of which it covers the larger share that a scaling allows.

    The rectangle is the middle one, or drawn from `generator`; `flip` mirrors with chance 1/2. ValueError when
    something is to be drawn without a generator.
    """
    if generator is None and (flip or not center):
        raise ValueError("a random crop or flip needs a generator")
    scale = max(want / have for want, have in zip(size, photo, strict=True))
    scaled = tuple(max(want, round(have * scale)) for want, have in zip(size, photo, strict=True))
    room = [have - want for have, want in zip(scaled, size, strict=True)]
    top, left, mirror = room[0] // 2, room[1] // 2, False
    if generator is not None:  # three draws whatever is asked, so that one option does not shift another's draws
        x, y, heads = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        mirror = flip and heads < 0.5
        if not center:
            top, left = math.floor(y * (room[0] + 1)), math.floor(x * (room[1] + 1))
    return Cut(scaled, top, left, size, mirror)


def cut(image: Image.Image, to: Cut) -> Tensor:
    """An RGB image, scaled by Lanczos and cut, as a float32 tensor (3, height, width) in [-1, 1]."""
    image = image.convert("RGB").resize(to.scaled[::-1], Image.Resampling.LANCZOS)
    image = image.crop((to.left, to.top, to.left + to.size[1], to.top + to.size[0]))
    if to.mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 127.5 - 1
