"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models (Buyukakyuz 2024, arXiv 2406.01775), algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .. import linalg
from ..update import Update
from ._method import require_fit
from .lora import LoRA


@dataclass(frozen=True)
class OLoRA(LoRA):
    """LoRA that starts from the leading part of the weight's QR decomposition, with an orthonormal outer factor.

    Equation: dW = s (B A - B0 A0), B0 = Q[:, :r], A0 = R[:r] of W = Q R, s = alpha / r.
    Parameters per layer: r (m + n).
    Export rank: 2r.
    Differs from the paper: W is left as it is and the start is subtracted from the update, which is the same sum.
    """

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        Q, R = torch.linalg.qr(linalg.precise(site.weight()))
        A, B = R[: self.rank].contiguous(), Q[:, : self.rank].contiguous()
        return {"A": nn.Parameter(A), "B": nn.Parameter(B), "A0": A.clone(), "B0": B.clone()}

    def factors(self, t: SimpleNamespace) -> Update:
        return Update(self.scale * t.B, t.A, minus=Update(self.scale * t.B0, t.A0))
