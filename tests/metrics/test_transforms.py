"""Transforms against torchvision's and open_clip's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from vislora.metrics.transforms import IMAGENET, OPENAI, Transform

BICUBIC, BILINEAR = tv.InterpolationMode.BICUBIC, tv.InterpolationMode.BILINEAR


@pytest.mark.parametrize("size", [(300, 300), (301, 417), (640, 230), (100, 90)])
@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (Transform(224, "bilinear", None, *IMAGENET), [tv.Resize((224, 224), BILINEAR)]),
        (Transform(224, "bicubic", 256, *IMAGENET), [tv.Resize(256, BICUBIC), tv.CenterCrop(224)]),
        (Transform(224, "bicubic", 224, *OPENAI), [tv.Resize(224, BICUBIC), tv.CenterCrop(224)]),
    ],
)
def test_equal_to_torchvision(size, own, theirs):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    whole = tv.Compose([*theirs, tv.ToTensor(), tv.Normalize(own.mean, own.std)])
    assert torch.equal(own(image), whole(image)) or (own(image) - whole(image)).abs().max() < 1e-6


def test_the_name_says_everything():
    names = {t.name for t in (Transform(64), Transform(64, "bilinear"), Transform(64, "bicubic", 72),
                              Transform(64, "bicubic", None, *IMAGENET), Transform(224))}
    assert len(names) == 5
    assert Transform(224, "bicubic", 256).name.startswith("r256c224_bicubic")
