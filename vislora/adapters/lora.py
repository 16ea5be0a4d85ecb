"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv 2106.09685), equation 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..update import Update
from ._method import Method, Pair, require, require_fit, require_rank
from ._start import kaiming


@dataclass(frozen=True)
class LoRA(Method):
    """Two free factors, the outer one zero at the start.

    Equation: dW = (alpha / r) B A, for A (r, n), B (m, r).
    Parameters per layer: r (m + n).
    Export rank: r.
    Differs from the paper: A is drawn Kaiming-uniform, as the authors' code does, not Gaussian.
    """

    roles: ClassVar[Mapping[str, str]] = {"A": "down", "B": "up"}

    rank: int = 16
    alpha: float | None = None  # None: equal to rank, so that the scale is 1
    dropout: float = 0.0  # on the layer's input, before A

    def check(self) -> None:
        require_rank(self.rank)
        wrong = f"{self.alpha} is not positive"
        require(self.alpha is None or self.alpha > 0, "alpha", wrong, "take a positive number; rank gives scale 1")
        require(0 <= self.dropout < 1, "dropout", f"{self.dropout} is not a probability below 1", "take 0 to 0.99")

    @property
    def scale(self) -> float:
        """What multiplies B A."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    @property
    def input_dropout(self) -> float:
        return self.dropout

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        A = kaiming(self.rank, site.n, generator)
        return {"A": nn.Parameter(A), "B": nn.Parameter(torch.zeros(site.m, self.rank))}

    def factors(self, t: SimpleNamespace) -> Update:
        return Update(up=t.B if self.scale == 1 else self.scale * t.B, down=t.A)

    def pair(self, t: SimpleNamespace) -> Pair:
        return Pair(down=t.A, up=t.B, scale=self.scale)
