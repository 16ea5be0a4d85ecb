"""What one update did to one weight: norms, changes of singular values and vectors, condition numbers, bases.

Everything is computed on the CPU in float64, as SORSA's appendix B.1 asks of the analysis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..formats.spectrum import Spectrum
from ..linalg import product_singular_values, schatten
from ..update import Update


@dataclass(frozen=True)
class Change:
    """One update of a weight (m, n): a low-rank product with, for DoRA, row norms; or a whole matrix.

    up (m, r), down (r, n); magnitude (m,); dense (m, n) in their place. rank: the method's, None where it has none.
    bound: (p, delta), what the method promises. bases: {name: tensor (k, r)} that it keeps orthonormal.
    """

    up: Tensor | None = None
    down: Tensor | None = None
    magnitude: Tensor | None = None
    dense: Tensor | None = None
    rank: int | None = None
    bound: tuple[float, float] | None = None
    bases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def is_low_rank(self) -> bool:
        """Whether the update is the product alone, so that its spectrum needs no dense matrix."""
        return self.dense is None and self.magnitude is None

    def matrix(self, weight: Tensor | None) -> Tensor:
        """W_adapted - W (m, n); DoRA's needs the base weight (m, n)."""
        if self.dense is not None:
            return self.dense.double()
        update = Update(self.up.double(), self.down.double(), magnitude=self.magnitude)
        return update.dense(weight) if self.is_low_rank else update.with_row_scale(weight).dense(weight)

    def values(self, weight: Tensor | None) -> Tensor:
        """Singular values, largest first; of DoRA's product alone where the base weight is not known."""
        if self.dense is None and (self.is_low_rank or weight is None):
            return product_singular_values(self.up.double(), self.down.double())
        return torch.linalg.svdvals(self.matrix(weight))


class Original:
    """A base weight (m, n) and its decomposition, made once and compared with at every step."""

    def __init__(self, weight: Tensor):
        self.weight = weight.detach().cpu().double()

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, k), S (k,), V^T (k, n) for k = min(m, n)."""
        return tuple(torch.linalg.svd(self.weight, full_matrices=False))


def condition(values: Tensor) -> float:
    """Largest over smallest singular value, largest first; infinite for a singular matrix (SORSA 2025, def. 3.1)."""
    return (values[0] / values[-1]).item() if values[-1] > 0 else math.inf


def moved(before: tuple[Tensor, Tensor, Tensor], after: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """(dSigma, dD): mean change of the singular values, and how far the singular vectors turned, 0 to 1.

    SORSA (arXiv 2409.00055), equations 1 to 4: dSigma is the mean of |s_t - s_0|, dD is one minus the mean of the
    |cosines| between the i-th vectors before and after, left and right ones alike; the papers' sum from i = 0 to k is
    taken over the k triplets that there are. Vectors of equal singular values may turn into each other freely.
    """
    (U, S, Vh), (U2, S2, Vh2) = before, after
    turned = (U * U2).sum(0).abs().mean() + (Vh * Vh2).sum(1).abs().mean()
    return (S2 - S).abs().mean().item(), 1 - 0.5 * turned.item()


def off_orthonormal(basis: Tensor) -> float:
    """Frobenius norm of Q^T Q - I for Q (k, r)."""
    Q = basis.double()
    return torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).item()


@torch.no_grad()
def measure(change: Change, original: Original | None, principal_rank: int | None = None) -> dict:
    """One row of plain values: what is known without the base, and with it the changes and condition numbers.

    condition: of the whole adapted weight. condition_principal: largest over r-th singular value of W_p + dW, W_p the
    base's best part of rank r; for SORSA, which trains W_p itself, that is the papers' principal part, and for others
    the matrix to compare it with. r is principal_rank, or the method's own.
    """
    weight = None if original is None else original.weight
    values = change.values(weight)
    found = Spectrum(values)
    row = {
        "spectral": found.spectral, "frobenius": found.frobenius, "nuclear": found.nuclear,
        "effective_rank": found.effective_rank,
    }  # fmt: skip
    if change.bound is not None:
        p, delta = change.bound
        row |= {"p": p, "bound": delta, "norm": found.norm(p), "share": found.norm(p) / delta if delta else math.nan}
    if change.bases:
        off = {name: off_orthonormal(basis) for name, basis in change.bases.items()}
        row |= {"off_orthonormal": sum(off.values()) / len(off), "off_orthonormal_by_basis": off}
    if original is not None:
        after = tuple(torch.linalg.svd(weight + change.matrix(weight), full_matrices=False))
        row |= _beside(original, after, found.frobenius)
        r = principal_rank or change.rank
        if r is not None:
            U, S, Vh = original.svd
            r = min(r, len(S))
            row["condition_principal"] = condition(_principal(change, U[:, :r] * S[:r], Vh[:r], weight)[:r])
    return row | {"values": values.tolist()}


def base_row(original: Original, principal_rank: int | None) -> dict:
    """The row of the weight before training."""
    row = {"spectral": 0.0, "frobenius": 0.0, "nuclear": 0.0, "effective_rank": 0.0}
    row |= _beside(original, original.svd, 0.0)
    if principal_rank is not None:
        row["condition_principal"] = condition(original.svd[1][:principal_rank])
    return row | {"values": []}


def _beside(original: Original, after: tuple[Tensor, Tensor, Tensor], size: float) -> dict:
    S = after[1]
    d_sigma, d_d = moved(original.svd, after) if after is not original.svd else (0.0, 0.0)
    whole = torch.linalg.vector_norm(original.svd[1]).item()
    return {
        "ratio": size / whole if whole else math.inf, "d_sigma": d_sigma, "d_vectors": d_d, "condition": condition(S),
        "weight_spectral": S[0].item(), "weight_frobenius": schatten(S, 2).item(), "weight_nuclear": S.sum().item(),
    }  # fmt: skip


def _principal(change: Change, up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """Singular values of up @ down + dW."""
    if change.is_low_rank:
        return product_singular_values(
            torch.cat([up, change.up.double()], dim=1), torch.cat([down, change.down.double()])
        )
    return torch.linalg.svdvals(up @ down + change.matrix(weight))
