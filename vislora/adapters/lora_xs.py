"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (Balazy et al. 2024, arXiv 2405.17604)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import linalg
from ..update import Update
from ._method import Method, require, require_fit, require_rank


@dataclass(frozen=True)
class LoRAXS(Method):
    """A trained r x r matrix between the frozen principal singular vectors of the weight.

    Equation: dW = (alpha / r) B R A, B = U, A = diag(S) V^T from the top r triplets of W.
    Parameters per layer: r^2.
    Export rank: r.
    Differs from the paper: exact SVD where the authors' code takes a randomised one of 10 rounds. As there, R starts at
    1e-5 times normal noise, so the model starts that near to the base and not on it.
    """

    identity_at_init: ClassVar[bool] = False
    roles: ClassVar[Mapping[str, str]] = {"R": "core"}

    rank: int = 16
    alpha: float | None = None  # None: equal to rank, so that the scale is 1
    niter: int | None = None  # None: exact SVD; a number: rounds of a randomised one

    def check(self) -> None:
        require_rank(self.rank)
        wrong = f"{self.alpha} is not positive"
        require(self.alpha is None or self.alpha > 0, "alpha", wrong, "take a positive number; rank gives scale 1")
        require(self.niter is None or self.niter >= 0, "niter", f"{self.niter} is negative", "take 0 or more")

    @property
    def scale(self) -> float:
        """What multiplies B R A."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        U, S, V = linalg.top_svd(site.weight(), self.rank, self.niter, generator)
        R = 1e-5 * torch.randn(self.rank, self.rank, generator=generator)
        return {"R": nn.Parameter(R), "A": (S[:, None] * V.mT).contiguous(), "B": U}

    def bases(self, t: SimpleNamespace) -> dict[str, Tensor]:
        return {"B": t.B}

    def factors(self, t: SimpleNamespace) -> Update:
        return Update(up=self.scale * (t.B @ t.R), down=t.A)
