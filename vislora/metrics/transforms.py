"""How an image becomes a backbone's input, written out: filter, size, cut and normalisation, by a name for the record.

Resizing is Pillow's, which is antialiased, from the 8-bit image in one step. Sources: evaluation tables of OFT (whole
image, bilinear), DINO's hub code (256 bicubic, cut 224), OpenAI's CLIP (shortest side, bicubic, cut).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Transform:
    """`resize` None: the whole image is squashed to size x size; else the shortest side becomes `resize` pixels and the
    middle size x size is cut out. mean, std: of values in [0, 1]."""

    size: int
    filter: str = "bicubic"
    resize: int | None = None
    mean: tuple[float, ...] = HALF[0]
    std: tuple[float, ...] = HALF[1]

    @property
    def name(self) -> str:
        """For records and cache keys: everything that the tensor is a function of."""
        how = f"full{self.size}_{self.filter}"
        if self.resize is not None:
            how = f"r{self.resize}c{self.size}_{self.filter}"
        values = "/".join(",".join(f"{v:g}" for v in part) for part in (self.mean, self.std))
        return f"{how} mean/std {values}"

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """(3, h, w), float32, of an image in RGB."""
        if self.resize is not None:
            image = _shortest(image, self.resize, _FILTERS[self.filter])
            left, top = (int(round((side - self.size) / 2)) for side in image.size)
            image = image.crop((left, top, left + self.size, top + self.size))
        elif image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), _FILTERS[self.filter])
        values = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
        return ((values - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1).contiguous()


def _shortest(image: Image.Image, side: int, how: Image.Resampling) -> Image.Image:
    """The image with its shortest side at `side` pixels, the other cut to whole pixels as torchvision does."""
    short = min(image.size)
    width, height = (int(side * length / short) for length in image.size)
    return image if image.size == (width, height) else image.resize((width, height), how)
