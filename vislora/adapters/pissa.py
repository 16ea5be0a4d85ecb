"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al. 2024, arXiv 2404.02948), eq. 2 to 4."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .. import linalg
from ..update import Update
from ._method import require, require_fit
from .lora import LoRA


@dataclass(frozen=True)
class PiSSA(LoRA):
    """LoRA that starts from the principal part of the weight and trains that.

    Equation: dW = s (B A - B0 A0), A0 = sqrt(S/s) V^T, B0 = U sqrt(S/s) from the top r triplets of W, s = alpha / r.
    Parameters per layer: r (m + n).
    Export rank: 2r.
    Differs from the paper: W is left as it is and the start is subtracted from the update, which is the same sum
    without rounding a residual weight; so the model starts as the base bit for bit, and adapters can be stacked.
    """

    niter: int | None = None  # None: exact SVD; a number: rounds of the randomised one (the authors use 16)

    def check(self) -> None:
        super().check()
        require(self.niter is None or self.niter >= 0, "niter", f"{self.niter} is negative", "take 0 or more")

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        U, S, V = linalg.top_svd(site.weight(), self.rank, self.niter, generator)
        root = (S / self.scale).sqrt()
        A, B = (root[:, None] * V.mT).contiguous(), U * root
        return {"A": nn.Parameter(A), "B": nn.Parameter(B), "A0": A.clone(), "B0": B.clone()}

    def factors(self, t: SimpleNamespace) -> Update:
        return Update(self.scale * t.B, t.A, minus=Update(self.scale * t.B0, t.A0))
