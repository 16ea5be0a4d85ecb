"""LoRA-SB: Initialization using Update Approximation (Ponkshe et al. 2024, arXiv 2411.19557), sec. 3, algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import linalg
from ..prepare import assign, weight_gradients
from ..update import Update
from ._method import Method, require, require_fit, require_rank


@dataclass(frozen=True)
class LoRASB(Method):
    """A trained r x r matrix between frozen bases that span the best rank-r part of the first full step.

    Equation: dW = s B R A, from B diag(S) A = the top r triplets of -h sign(dL/dW), R = diag(S) / s, s = alpha / r.
    Parameters per layer: r^2.
    Export rank: r.
    Differs from the paper: the paper gives no step size h for the first step; here it is the schedule's first non-zero
    learning rate, or init_lr. Bases and R are float32 and the SVD is exact, where the authors' code has bfloat16 and a
    randomised one. By design the base weight is not compensated: after `prepare` the model stands one step ahead.
    """

    needs_prepare: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, str]] = {"R": "core"}

    rank: int = 16
    alpha: float | None = None  # None: equal to rank, so that s = 1
    init_batches: int = 1  # optimizer steps' batches that the first gradient is the mean over
    init_lr: float | None = None  # h; None: the schedule's first non-zero rate

    def check(self) -> None:
        require_rank(self.rank)
        for option in ("alpha", "init_lr", "init_batches"):
            value = getattr(self, option)
            require(value is None or value > 0, option, f"{value} is not positive", "take a positive number")

    @property
    def scale(self) -> float:
        """What multiplies B R A."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        r = self.rank
        return {"R": nn.Parameter(torch.zeros(r, r)), "A": torch.zeros(r, site.n), "B": torch.zeros(site.m, r)}

    def prepare(self, adapter, closure: Callable[[], Tensor]) -> None:
        step = adapter.first_lr() if self.init_lr is None else self.init_lr
        for part, site, gradient in weight_gradients(adapter, closure, self.init_batches):
            U, S, V = linalg.top_svd(-step * gradient.sign(), self.rank)
            assign(part, site, {"B": U, "A": V.mT, "R": torch.diag(S) / self.scale})

    def factors(self, t: SimpleNamespace) -> Update:
        return Update(up=self.scale * (t.B @ t.R), down=t.A)
