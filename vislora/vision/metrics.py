"""What logits say: top-1, top-5, each class, who is taken for whom, and whether confidence can be believed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Scores:
    """Of n labelled images: shares in [0, 1]; per_class (classes,) is nan where a class has no image.

    confusion[i, j]: how many images of class i were taken for class j. ece: the expected calibration error over BINS
    equal bins of confidence (Guo et al. 2017, eq. 3). loss: mean cross-entropy, nats. Both tensors are on the CPU.
    """

    n: int
    top1: float
    top5: float
    ece: float
    loss: float
    per_class: Tensor
    confusion: Tensor


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """logits (n, classes) and labels (n,), on any device. top5 counts the best five, or all where there are fewer
    classes."""
    logits, classes = logits.double(), logits.shape[-1]
    guess = logits.argmax(-1)
    best = logits.topk(min(5, classes), dim=-1).indices
    confusion = torch.bincount(labels * classes + guess, minlength=classes**2).reshape(classes, classes)
    return Scores(
        n=len(labels),
        top1=(guess == labels).double().mean().item(),
        top5=(best == labels[:, None]).any(-1).double().mean().item(),
        ece=calibration_error(logits.softmax(-1).amax(-1), guess == labels),
        loss=torch.nn.functional.cross_entropy(logits, labels).item(),
        per_class=(confusion.diagonal() / confusion.sum(-1)).cpu(),
        confusion=confusion.cpu(),
    )


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Mean over all images of |accuracy - confidence| of their bin; bins are (k / bins, (k + 1) / bins]."""
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, place, right.double() - confidence.double())
    return (gap.abs().sum() / len(confidence)).item()


def write_per_class(file: Path, classes: Sequence[str], columns: dict[str, Tensor], counts: Tensor) -> None:
    """A CSV with a row a class: its name, its number of images, and a column of `columns` each."""
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(["class", "images", *columns])
        for i, name in enumerate(classes):
            table.writerow([name, int(counts[i]), *(f"{float(values[i]):.6f}" for values in columns.values())])


def write_confusion(file: Path, classes: Sequence[str], confusion: Tensor) -> None:
    """A CSV with a row for each true class and a column for what it was taken for."""
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(["true \\ taken for", *classes])
        for name, row in zip(classes, confusion.tolist(), strict=True):
            table.writerow([name, *row])
