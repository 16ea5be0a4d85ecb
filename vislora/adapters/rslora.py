"""rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""

from __future__ import annotations

from dataclasses import dataclass

from .lora import LoRA


@dataclass(frozen=True)
class RsLoRA(LoRA):
    """LoRA with a scale that keeps the learning of every rank alike.

    Equation: dW = (alpha / sqrt(r)) B A, for A (r, n), B (m, r).
    Parameters per layer: r (m + n).
    Export rank: r.
    Differs from the paper: nothing known.
    """

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank**0.5
