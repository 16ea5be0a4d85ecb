"""Random starts that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor


def kaiming(rank: int, n: int, generator: torch.Generator) -> Tensor:
    """(rank, n), uniform in ±1/sqrt(n): Kaiming-uniform with a = sqrt(5), the start that LoRA's code gives A."""
    return (2 * torch.rand(rank, n, generator=generator) - 1) / n**0.5
