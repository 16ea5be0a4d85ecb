"""LPIPS and CLIP-T against torchmetrics' own code, on one trunk and on equal features."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchmetrics.multimodal import CLIPScore

from vislora.data.images import read
from vislora.metrics.cache import Cache
from vislora.metrics.cells import Cells
from vislora.metrics.features import compare
from vislora.metrics.perceptual import perceptual
from vislora.metrics.pictures import examine, listing
from vislora.metrics.protocols import PROTOCOLS
from vislora.metrics.score import Group, Scored, Scorer

WIDTH = 16


def test_lpips_is_torchmetrics(trunk, noise):
    """Both with the heads that they ship, on the same (random) AlexNet, at 512 pixels; its eps lies elsewhere."""
    network = perceptual("papers")
    pictures = examine(listing(noise("a", [f"{i}.png" for i in range(4)])))
    ours = compare([(pictures[:2], pictures[2:])], network, Cache(None))[0]
    first, second = torch.stack([network.transform(read(p.path)) for p in pictures]).split(2)
    for i, row in enumerate(ours):
        whole = first[i : i + 1].expand_as(second).contiguous()
        theirs = learned_perceptual_image_patch_similarity(whole, second, "alex", reduction="none")
        assert row == pytest.approx(theirs.numpy().astype(np.float64), rel=1e-3) and row.min() > 1e-3


class Features(torch.nn.Module):
    """In the place of transformers' CLIP, whose outputs torchmetrics 1.9 cannot read: features by number."""

    config = SimpleNamespace()

    def __init__(self, images: torch.Tensor, texts: torch.Tensor):
        super().__init__()
        self.image_rows, self.text_rows = images, texts

    def get_image_features(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.image_rows[numbers.flatten().long()]

    def get_text_features(self, numbers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.text_rows[numbers.flatten().long()]


def read_numbers(images=None, text=None, **more) -> dict:
    if images is not None:
        return {"pixel_values": torch.stack(images)}
    numbers = torch.tensor([[int(word)] for word in text])
    return {"input_ids": numbers, "attention_mask": torch.ones_like(numbers)}


def test_clip_t_is_torchmetrics_score(noise):
    g = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(6, WIDTH, generator=g) + 0.5 for _ in range(2))
    pictures = examine(listing(noise("a", [f"{i}.png" for i in range(6)])))
    eyes = SimpleNamespace(
        identifier="eyes", view="eyes", activations="none", transform=SimpleNamespace(name="none"),
        texts=lambda own: torch.nn.functional.normalize(texts[[int(text) for text in own]], dim=-1),
    )  # fmt: skip
    cache = Cache(None)
    for picture, row in zip(pictures, images, strict=True):
        cache.put("eyes", picture.sha256, row)
    groups = [Group(f"prompt {i}", str(i), [picture]) for i, picture in enumerate(pictures)]
    scorer = Scorer([Scored("s", pictures[:1], groups)], None, cache)
    ours = Cells()
    scorer._add_texts(ours, scorer.scored[0], eyes, PROTOCOLS["dreambench_pp"])  # whose scale is 100, as theirs

    theirs = CLIPScore(lambda: (Features(images, texts), read_numbers))
    for i in range(6):
        theirs.update(torch.full((1, 1, 1, 1), float(i)), [str(i)])
    assert ours.mean() == pytest.approx(theirs.compute().item(), abs=1e-4) and ours.mean() > 1
