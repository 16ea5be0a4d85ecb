"""LoRA+: Efficient Low Rank Adaptation of Large Models (Hayou et al. 2024, arXiv 2402.12354), section 4."""

from __future__ import annotations

from dataclasses import dataclass

from ._method import require
from .lora import LoRA


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA whose outer factor learns faster.

    Equation: dW = (alpha / r) B A, for A (r, n), B (m, r), the learning rate of B a multiple of that of A.
    Parameters per layer: r (m + n).
    Export rank: r.
    Differs from the paper: nothing known. The ratio takes effect through `Adapter.param_groups`.
    """

    loraplus_lr_ratio: float = 16.0  # learning rate of B over that of A

    def check(self) -> None:
        super().check()
        wrong = f"{self.loraplus_lr_ratio} is not positive"
        require(0 < self.loraplus_lr_ratio < float("inf"), "loraplus_lr_ratio", wrong, "16 is the paper's advice")

    def lr_ratio(self, role: str) -> float:
        return self.loraplus_lr_ratio if role == "up" else 1.0
