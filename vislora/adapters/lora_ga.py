"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al. 2024, arXiv 2407.05000), section 3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import InputError
from ..prepare import assign, weight_gradients
from ..update import Update
from ._method import require, require_fit
from .lora import LoRA


@dataclass(frozen=True)
class LoRAGA(LoRA):
    """LoRA whose first step points where full fine-tuning's first step does.

    Equation: dW = s (B A - B0 A0), A0 = c V[:, :r]^T, B0 = c U[:, r:2r] from the SVD of dL/dW, s = alpha / r.
    Parameters per layer: r (m + n).
    Export rank: 2r.
    Differs from the paper: W is left as it is and the start is subtracted from the update; the SVD is exact where the
    authors' code has a randomised one. c = m^(1/4) / sqrt(stable_gamma) as in their code, with no singular values in
    the factors; PEFT 0.21 multiplies B by them and is another method.
    """

    needs_prepare: ClassVar[bool] = True

    init_batches: int = 1  # optimizer steps' batches that the gradient is the mean over
    init_scale: Literal["stable", "unit"] = "stable"  # unit: c = 1
    stable_gamma: float = 16.0

    def check(self) -> None:
        super().check()
        for option in ("init_batches", "stable_gamma"):
            value = getattr(self, option)
            require(value > 0, option, f"{value} is not positive", "take a positive number")
        require(self.init_scale in ("stable", "unit"), "init_scale", f"{self.init_scale!r}", "take stable or unit")

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        if 2 * self.rank > min(site.m, site.n):
            wrong = f"{self.rank} needs 2 x {self.rank} directions of {site.name} ({site.m} x {site.n})"
            raise InputError("rank", wrong, f"take {min(site.m, site.n) // 2} or less")
        A, B = torch.zeros(self.rank, site.n), torch.zeros(site.m, self.rank)
        return {"A": nn.Parameter(A), "B": nn.Parameter(B), "A0": A.clone(), "B0": B.clone()}

    def prepare(self, adapter, closure: Callable[[], Tensor]) -> None:
        r = self.rank
        for part, site, gradient in weight_gradients(adapter, closure, self.init_batches):
            U, _, V = linalg.top_svd(gradient, 2 * r)
            c = site.m**0.25 / self.stable_gamma**0.5 if self.init_scale == "stable" else 1.0
            A, B = c * V[:, :r].mT, c * U[:, r:]
            assign(part, site, {"A": A, "B": B, "A0": A, "B0": B})

    def factors(self, t: SimpleNamespace) -> Update:
        return Update(self.scale * t.B, t.A, minus=Update(self.scale * t.B0, t.A0))
