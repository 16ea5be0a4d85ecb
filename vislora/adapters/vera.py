"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al. 2024, arXiv 2310.11454), equation 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..update import Update
from ._method import Method, require_rank


@dataclass(frozen=True)
class VeRA(Method):
    """Two trained vectors around one pair of frozen random matrices that all layers share.

    Equation: dW = diag(b) B diag(d) A, for shared A (r, max n), B (max m, r), of which a layer takes the leading part.
    Parameters per layer: m + r.
    Export rank: r.
    Differs from the paper: nothing known. The shared matrices are a function of the seed and are not saved; they are
    Kaiming-uniform for the largest layer's shape, as in PEFT.
    """

    rank_fits_layers: ClassVar[bool] = False  # random directions may outnumber a layer's own
    roles: ClassVar[Mapping[str, str]] = {"b": "scale", "d": "scale"}

    rank: int = 256
    d_initial: float = 0.1  # of every entry of d; b starts at zero

    def check(self) -> None:
        require_rank(self.rank)

    def shared(self, sites: Sequence, generator: torch.Generator) -> dict[str, Tensor]:
        n, m = max(site.n for site in sites), max(site.m for site in sites)
        A, B = (2 * torch.rand(shape, generator=generator) - 1 for shape in ((self.rank, n), (m, self.rank)))
        return {"A": A * (6 / n) ** 0.5, "B": B * (6 / self.rank) ** 0.5}

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        d = torch.full((self.rank,), float(self.d_initial))
        return {"b": nn.Parameter(torch.zeros(site.m)), "d": nn.Parameter(d)}

    def share_of(self, shared: Mapping[str, Tensor], site) -> dict[str, Tensor]:
        return {"A": shared["A"][:, : site.n], "B": shared["B"][: site.m]}

    def factors(self, t: SimpleNamespace) -> Update:
        return Update(up=t.b[:, None] * t.B, down=t.d[:, None] * t.A)
