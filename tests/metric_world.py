"""The world's networks, of random weights where none are shipped yet, and pictures of noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import alexnet

from vislora import world


def tiny_dino(folder: Path) -> Path:
    """A random ViT as timm's local-dir, as small as the world's."""
    words = dict(patch_size=16, embed_dim=48, depth=1, num_heads=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, **words)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": 48,
              "model_args": {"img_size": 64, **words},
              "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A repository whose world has a random tiny-dino."""
    place = tmp_path_factory.mktemp("root")
    (place / "assets" / "world").mkdir(parents=True)
    for part in (world.ROOT / "assets" / "world").iterdir():
        if part.name != "tiny-dino":
            (place / "assets" / "world" / part.name).symlink_to(part)
    (place / "configs").symlink_to(world.ROOT / "configs")
    tiny_dino(place / "assets" / "world" / "tiny-dino")
    return place


@pytest.fixture
def small_world(root, monkeypatch):
    monkeypatch.setattr(world, "ROOT", root)


@pytest.fixture
def noise(tmp_path):
    """noise(folder, names, seed): smooth random pictures of 64 pixels."""

    def make(folder: str, names, seed: int = 0, side: int = 64) -> Path:
        rng, place = np.random.default_rng(seed), tmp_path / folder
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            coarse = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(place / name)
        return place

    return make


@pytest.fixture
def trunk(tmp_path, monkeypatch):
    """The folder of torchvision's cache, with a random AlexNet as its file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    place = tmp_path / "torch" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in alexnet(weights=None).state_dict().items()}
    g, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():  # the classifier is unused, and large
        own = name.startswith("features")
        state[name] = 0.05 * torch.randn(shape, generator=g) if own else torch.zeros(1).expand(shape)
    torch.save(state, place / "alexnet-owt-7be5be79.pth")
    return place
