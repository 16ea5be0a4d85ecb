"""rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import linalg
from ..prepare import assign
from ._bases import each_site, renewal_due
from .lora import LoRA


@dataclass(frozen=True)
class RsLoRA(LoRA):
    """LoRA with a scale that keeps the learning of every rank alike.

    Equation: dW = (alpha / sqrt(r)) B A, for A (r, n), B (m, r).
    Parameters per layer: r (m + n).
    Export rank: r.
    Differs from the paper: nothing known. optimal_gradient is the ablation of OD-LoRA's table 4: A^T and B become
    orthonormal bases of what they span, as often as OD-LoRA renews its own. That paper does not say how it starts; here
    it starts as rsLoRA, on the base model, and a layer that got no gradient yet stays there.
    """

    optimal_gradient: bool = False  # factors held orthonormal, all singular values of dW equal: OD-LoRA's appendix I

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank**0.5

    def acts_on_steps(self) -> bool:
        return self.optimal_gradient

    def on_step(self, adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        if self.optimal_gradient and renewal_due(step, adapter.total_steps):
            for part, site, t in each_site(adapter):
                if t.B.any():  # QR makes a basis of zeros too, which would move the layer at random
                    A, B = linalg.orthonormal(t.A.detach().mT).mT, linalg.orthonormal(t.B.detach())
                    assign(part, site, {"A": A, "B": B})
