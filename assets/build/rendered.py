"""Pre-rendered scenes of a split, kept in the work folder as uint8 safetensors plus a JSON of captions."""

from __future__ import annotations

import json

import numpy as np
import scenes
import torch
import world
from common import WORK, load_tensors, save_tensors, say


def split(name: str) -> tuple[torch.Tensor, list[str]]:
    """Images (N, 64, 64, 3) uint8 and captions of a split of `world.SPLITS`; rendered once, then read."""
    tensors, words = WORK / f"{name}.safetensors", WORK / f"{name}.json"
    if not (tensors.exists() and words.exists()):
        info = world.SPLITS[name]
        images = np.empty((info["count"], scenes.SIZE, scenes.SIZE, 3), np.uint8)
        captions = []
        for i in range(info["count"]):
            image, text = scenes.render_scene(info["first_seed"] + i, info["pool"])
            images[i] = np.asarray(image)
            captions.append(text)
            if i % 5000 == 0:
                say(f"{name}: scene {i}")
        save_tensors(tensors, {"images": torch.from_numpy(images)})
        words.write_text(json.dumps(captions))
    return load_tensors(tensors)[0]["images"], json.loads(words.read_text())


def object_masks(name: str) -> torch.Tensor:
    """(N, 64, 64) bool: where the scenes of a split differ from their bare backgrounds; made once, then read."""
    path = WORK / f"{name}_masks.safetensors"
    if not path.exists():
        images, _ = split(name)
        info, masks = world.SPLITS[name], np.empty(images.shape[:3], bool)
        for i in range(len(images)):
            spec = scenes.spec_from_seed(info["first_seed"] + i, info["pool"])
            bare = np.asarray(scenes.background(spec.background, spec.seed), np.int16)
            masks[i] = np.abs(images[i].numpy().astype(np.int16) - bare).max(-1) > 8
        save_tensors(path, {"masks": torch.from_numpy(masks)})
    return load_tensors(path)[0]["masks"]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 NHWC -> float NCHW in [-1, 1], in channels_last memory."""
    return (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
