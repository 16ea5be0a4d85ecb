"""SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation (Cao 2024, arXiv 2409.00055)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import linalg
from ..update import Update
from ._method import Method, require, require_fit, require_rank

_REGULARIZERS = ("mean", "sum", "squared", "squared_mean")


@dataclass(frozen=True)
class SORSA(Method):
    """The principal singular triplets of the weight are trained, and their vectors pulled back to orthonormality.

    Equation: dW = s (B diag(S) A - B0 diag(S0) A0), from the top r triplets of W; penalty gamma / max lr times the norm
    of B^T B - I and of A A^T - I.
    Parameters per layer: r (m + n) + r.
    Export rank: 2r.
    Differs from the paper: W is left as it is and the start is subtracted (the same sum, exact in bf16). Definition 4.1
    writes identities of sizes m and n; the Gram matrices are r x r. The penalty's gradient joins the loss's before
    clipping and AdamW, where the authors' code adds it after clipping. S is not kept positive, as there.
    """

    roles: ClassVar[Mapping[str, str]] = {"A": "down", "B": "up", "S": "core"}

    rank: int = 16
    alpha: float | None = None  # None: equal to rank, so that the scale is 1, as the authors' default
    gamma: float = 4e-4  # strength of the regularizer in units of the largest learning rate; 0: the ablation without
    regularizer: Literal["mean", "sum", "squared", "squared_mean"] = "mean"  # of norms, over the 2 L matrices

    def check(self) -> None:
        require_rank(self.rank)
        wrong = f"{self.alpha} is not positive"
        require(self.alpha is None or self.alpha > 0, "alpha", wrong, "take a positive number; rank gives scale 1")
        require(0 <= self.gamma < float("inf"), "gamma", f"{self.gamma} is negative or not finite", "take 0 or more")
        known = ", ".join(_REGULARIZERS)
        require(self.regularizer in _REGULARIZERS, "regularizer", f"{self.regularizer!r} is unknown", f"take {known}")

    @property
    def scale(self) -> float:
        """What multiplies B diag(S) A, and the start that is subtracted."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        U, S, V = linalg.top_svd(site.weight(), self.rank)
        start = {"A": V.mT.contiguous(), "B": U, "S": S}
        return {k: nn.Parameter(t) for k, t in start.items()} | {f"{k}0": t.clone() for k, t in start.items()}

    def factors(self, t: SimpleNamespace) -> Update:
        return Update(self.scale * t.B * t.S, t.A, minus=Update(self.scale * t.B0 * t.S0, t.A0))

    def bases(self, t: SimpleNamespace) -> dict[str, Tensor]:
        return {"A": t.A.mT, "B": t.B}

    def has_penalty(self) -> bool:
        return self.gamma > 0

    def penalty(self, sites: Sequence[SimpleNamespace], max_lr: float) -> Tensor:
        with linalg.without_autocast(sites[0].A.device):
            grams = [gram for t in sites for gram in (t.A @ t.A.mT, t.B.mT @ t.B)]
            eye = torch.eye(self.rank, dtype=grams[0].dtype, device=grams[0].device)
            # matrix_norm's gradient is 0 at exact orthonormality; the root of a sum of squares would give NaN there
            off = torch.linalg.matrix_norm(torch.stack(grams) - eye)  # in a stack: a handful of operators, not 2 L
        off = off.square() if self.regularizer.startswith("squared") else off
        total = off.mean() if self.regularizer.endswith("mean") else off.sum()
        return self.gamma / max_lr * total
