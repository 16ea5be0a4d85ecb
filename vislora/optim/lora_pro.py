"""LoRA-Pro: Are Low-Rank Adapters Properly Optimized? (Wang et al. 2024, arXiv 2407.18242), theorems 2.1 to 2.3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..adapters import Pair
from ..errors import InputError
from ..linalg import precise
from ._paired import PairedAdamW, Spectrum, descend, spectra, unbiased


class Projection:
    """The maps of one pair A (r, n), B (m, r), scale s, between gradients of the factors and one of their product.

    In words of the gradient G (m, n) of s B A: g_A = s B^T G and g_B = s G A^T.
    """

    def __init__(self, pair: Pair, of_A: Spectrum, of_B: Spectrum, damping: float):
        self.A, self.B, self.s = precise(pair.down), precise(pair.up), pair.scale
        self.of_A, self.of_B = of_A, of_B
        self.inverse_A, self.inverse_B = of_A.inverse(damping), of_B.inverse(damping)  # of A A^T and of B^T B

    def _unbalanced(self, gA: Tensor, gB: Tensor) -> tuple[Tensor, Tensor]:
        """(B^T B)^-1 g_A / s^2 and (I - P_B) g_B (A A^T)^-1 / s^2."""
        outside = gB - self.B @ (self.inverse_B @ (self.B.mT @ gB))
        return self.inverse_B @ gA / self.s**2, outside @ self.inverse_A / self.s**2

    def equivalent(self, gA: Tensor, gB: Tensor) -> Tensor:
        """The gradient (m, n) of the product that the adjusted gradients amount to: P_B G + (I - P_B) G P_A."""
        a, b = self._unbalanced(gA, gB)
        return self.s * (self.B @ a + b @ self.A)

    def adjusted(self, gA: Tensor, gB: Tensor) -> tuple[Tensor, Tensor]:
        """Of all (a, b) with that equivalent gradient, the one nearest to (gA, gB).

        a = (B^T B)^-1 g_A / s^2 + X A, b = (I - P_B) g_B (A A^T)^-1 / s^2 - B X, where
        B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2.
        """
        a, b = self._unbalanced(gA, gB)
        X = self.sylvester(-a @ self.A.mT)
        return a + X @ self.A, b - self.B @ X

    def sylvester(self, C: Tensor) -> Tensor:
        """X (r, r) with B^T B X + X A A^T = C; 0 in directions that neither factor has."""
        U, V = self.of_B.vectors, self.of_A.vectors
        sums = self.of_B.values[:, None] + self.of_A.values
        noise = sums.max() * len(C) * torch.finfo(C.dtype).eps
        return U @ torch.where(sums > noise, (U.mT @ C @ V) / sums, 0) @ V.mT


class LoRAPro(PairedAdamW):
    """AdamW on the gradient of the product B A, as far as the factors can follow it.

    Equation: G' = P_B G + (I - P_B) G P_A, the nearest to G that steps of A and B can make, goes through Adam's
    moments; their ratio is mapped to steps of A and B as a gradient of the product would be (`Projection.adjusted`).
    d, the damping, is added to both Gram matrices where they are inverted.
    moments: "full" keeps Adam's two moments of G', m n numbers each, for every pair, and takes betas and eps of B's
    group; "factors" hands the adjusted gradients to AdamW on A and B, r (m + n) numbers each.
    Differs from the paper: the weights decay as in AdamW. From the authors' code: s is the layer's own, bias is
    corrected from the first step, moments are float32 or float64, X comes from two symmetric decompositions, and d is
    1e-6 where the code has 1e-8.
    """

    def __init__(self, params, pairs: Sequence[Pair], *, damping: float = 1e-6,
                 moments: Literal["full", "factors"] = "full", **adamw):  # fmt: skip
        super().__init__(params, pairs, damping=damping, **adamw)
        if moments not in ("full", "factors"):
            raise InputError("moments", f"{moments!r}", "take full or factors")
        self.moments = moments

    def treat(self, pairs: list[Pair]) -> None:
        of_A, of_B = spectra([pair.down.mT for pair in pairs]), spectra([pair.up for pair in pairs])
        group_of = self._group_of()
        for pair, a, b in zip(pairs, of_A, of_B, strict=True):
            projection = Projection(pair, a, b, self.damping)
            A, B, gA, gB = pair.down, pair.up, precise(pair.down.grad), precise(pair.up.grad)
            if self.moments == "full":
                self._move(pair, group_of, projection, projection.equivalent(gA, gB))
                A.grad = B.grad = None
            else:
                gA, gB = projection.adjusted(gA, gB)
                A.grad, B.grad = gA.to(A.dtype), gB.to(B.dtype)

    def _move(self, pair: Pair, group_of: dict[Tensor, dict], projection: Projection, gradient: Tensor) -> None:
        """One step by Adam on the equivalent gradient (m, n), whose moments are kept with `up`."""
        (beta1, beta2), eps = group_of[pair.up]["betas"], group_of[pair.up]["eps"]
        state = self.state[pair.up]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first, second = (unbiased(state[k], b, state["step"]) for k, b in (("exp_avg", beta1), ("exp_avg_sq", beta2)))
        G, A, B = first / (second.sqrt() + eps), projection.A, projection.B
        a, b = projection.adjusted(projection.s * (B.mT @ G), projection.s * (G @ A.mT))
        descend(pair.down, a, group_of[pair.down])
        descend(pair.up, b, group_of[pair.up])
