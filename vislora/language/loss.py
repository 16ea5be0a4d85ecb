"""The loss of next tokens, and what a batch's share of an optimizer step's is divided by."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vislora.language.batches import IGNORED

Normalization = Literal["tokens", "means"]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of cross-entropies, in nats, of the labels (b, t) that are not -100; logits (b, t, vocabulary)."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def share(total: Tensor, own: int, window: int, normalization: Normalization, micros: int, processes: int) -> Tensor:
    """What one batch adds to an optimizer step's loss, for a sum `total` over its `own` targets.

    "tokens": every target of the window, all batches and processes, counts alike: total / window. Gradients are
    averaged over processes, so it is scaled by their number. "means": the mean of the batches' means, as transformers
    up to 4.45 accumulated, and the papers of 2024 with it.
    """
    if normalization == "tokens":
        return total * (processes / window)
    return total / (max(own, 1) * micros)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; inf where that is out of range."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())
