"""From images to batches: what the model's own pipeline does to them, augmentation, mixing, and the order of training.

Chance is a function of seed and position. torchvision's transforms draw from torch's global generator, so each draw
happens inside a fork of it, seeded for that position: loader workers and resumed runs draw the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode, v2

from vislora.errors import VisloraError
from vislora.training.random import batch_indices, generator
from vislora.vision.data import ImageSet
from vislora.vision.models import Preprocess
from vislora.vision.options import ClassificationOptions


@contextmanager
def seeded(seed: int, stream: str, position: int) -> Iterator[None]:
    """torch's global generator as a function of its arguments inside, and as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, stream, position).initial_seed())
        yield


def evaluation(p: Preprocess) -> v2.Transform:
    """RGB image -> (3, size, size) float, normalised: the model's own pipeline, antialiased."""
    return v2.Compose([*_fit(p), *_tensor(p)])


def training(p: Preprocess, o: ClassificationOptions) -> v2.Transform:
    """The same with the options' augmentation; without any of it `evaluation`."""
    mode = InterpolationMode(p.interpolation)
    steps: list = _fit(p)
    if o.crop_scale < 1:
        steps = [v2.RandomResizedCrop(p.size, scale=(o.crop_scale, 1.0), interpolation=mode, antialias=True)]
    if o.hflip:
        steps.append(v2.RandomHorizontalFlip(o.hflip))
    if o.auto_augment == "randaugment":
        steps.append(v2.RandAugment(o.randaugment_ops, o.randaugment_magnitude, interpolation=mode))
    elif o.auto_augment == "trivialaugment":
        steps.append(v2.TrivialAugmentWide(interpolation=mode))
    steps += _tensor(p)
    if o.random_erasing:
        steps.append(v2.RandomErasing(o.random_erasing))
    return v2.Compose(steps)


def _fit(p: Preprocess) -> list:
    mode = InterpolationMode(p.interpolation)
    if p.squash:
        return [v2.Resize((p.size, p.size), interpolation=mode, antialias=True)]
    side = int(p.size / p.crop_pct)
    return [v2.Resize(side, interpolation=mode, antialias=True), v2.CenterCrop(p.size)]


def _tensor(p: Preprocess) -> list:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(p.mean, p.std)]


class Stream(Dataset):
    """What stands at each global position of training: (image (3, size, size), class)."""

    def __init__(self, images: ImageSet, transform: v2.Transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        (i,) = batch_indices(self.seed, position, 1, len(self.images))
        with seeded(self.seed, "augment", position):
            return self.transform(self.images.read(i)), self.images.labels[i]


class Plain(Dataset):
    """The images of a set in order, by the evaluation pipeline."""

    def __init__(self, images: ImageSet, transform: v2.Transform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.images.read(i)), self.images.labels[i]


class _Told(Dataset):
    """The same items; an error of ours is an item, since torch makes another error of what a loader process raises."""

    def __init__(self, data: Dataset):
        self.data = data

    def __getitem__(self, place: int):
        try:
            return self.data[place]
        except VisloraError as error:
            return error


def _collate(items: list) -> list | VisloraError:
    return next((item for item in items if isinstance(item, VisloraError)), None) or default_collate(items)


def batches(data: Dataset, places: Iterable[Sequence[int]], workers: int, device: torch.device) -> Iterator:
    """The batches of `data` at these lists of places, (images (B, 3, size, size), classes (B,)), on `device`.

    Raises what reading an image raises, whichever process reads it.
    """
    loader = DataLoader(_Told(data), batch_sampler=places, num_workers=workers, pin_memory=device.type == "cuda",
                        collate_fn=_collate)  # fmt: skip
    for batch in loader:
        if isinstance(batch, VisloraError):
            raise batch
        images, labels = batch
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def mixer(o: ClassificationOptions, classes: int):
    """(images, labels, position) -> (images, targets): mixup or cutmix by the options, targets then (B, classes).

    With both, each batch takes one of them by a fair coin.
    """
    mixes = [m(num_classes=classes, alpha=a) for m, a in ((v2.MixUp, o.mixup_alpha), (v2.CutMix, o.cutmix_alpha)) if a]
    if not mixes:
        return lambda images, labels, position: (images, labels)
    one = v2.RandomChoice(mixes)

    def mix(images: Tensor, labels: Tensor, position: int) -> tuple[Tensor, Tensor]:
        with seeded(o.seed, "mix", position):
            return one(images, labels)

    return mix


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Mean over the batch, in float32; targets are classes (B,) or shares of them (B, classes)."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
