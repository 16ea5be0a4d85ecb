"""Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models (Zhang and Pilanci 2024, arXiv 2402.02347): scaled
AdamW."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters import Pair
from ..linalg import precise
from ._paired import PairedAdamW, spectra


class ScaledAdamW(PairedAdamW):
    """AdamW on gradients that are divided by the partner's Gram matrix.

    Equation: g_A <- (B^T B + d I)^-1 g_A, g_B <- g_B (A A^T + d I)^-1, for A (r, n), B (m, r), d the damping; both
    moments of AdamW are made of these.
    Differs from the paper: nothing known. From the authors' code: both preconditioners come from the old factors, as
    the paper's equation has it, where the code takes the new A for B's; bias is corrected; inverses are float32 or
    float64, so that bf16 factors are preconditioned too.

    From B = 0 the first gradients of A grow by 1 / B, and a beta2 of 0.999 remembers them for a thousand steps; the
    authors take 0.8 for GPT-2.
    """

    def __init__(self, params, pairs: Sequence[Pair], *, damping: float = 1e-6, **adamw):
        super().__init__(params, pairs, damping=damping, **adamw)

    def treat(self, pairs: list[Pair]) -> None:
        of_A, of_B = spectra([pair.down.mT for pair in pairs]), spectra([pair.up for pair in pairs])
        for pair, a, b in zip(pairs, of_A, of_B, strict=True):
            A, B = pair.down, pair.up
            A.grad = (b.inverse(self.damping) @ precise(A.grad)).to(A.dtype)
            B.grad = (precise(B.grad) @ a.inverse(self.damping)).to(B.dtype)
