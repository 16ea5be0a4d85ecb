"""OD-LoRA: Overcoming the Dilemma between Weight Representation and Gradient Approximation in Low-Rank Adaptation
(anonymous, under review), algorithm 1 and equation 5. No public code is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import linalg
from ..prepare import assign, at_largest_rate
from ..update import Update
from ._method import Method, require, require_fit, require_rank
from ._start import kaiming


@dataclass(frozen=True)
class ODLoRA(Method):
    """Factors that each learn against an orthonormal basis of the other's space, so that gradients keep their size.

    Equation: dW = s (Qb A + B Qa^T), Qa (n, r) and Qb (m, r) orthonormal bases of A^T and B, s = alpha / sqrt(r).
    Parameters per layer: r (m + n).
    Export rank: 2r, or r right after a refresh.
    Differs from the paper: refreshes run where t mod ceil(phases t / T) = 0, which is what its schedule must mean, and
    their QR has diag(R) >= 0: without that a basis may flip by a column's sign and dW with it. The warm-up runs at the
    largest learning rate with the schedule standing still. Bases are saved, so that a reload between two refreshes is
    exact.
    """

    needs_prepare: ClassVar[bool] = True
    drops_tail: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, str]] = {"A": "down", "B": "up"}
    quick: ClassVar[Mapping[str, Any]] = {"init_rounds": 2, "init_steps": 2}

    rank: int = 16
    alpha: float = 4.0
    init_rounds: int = 5  # N: rounds of the warm-up, each of which ends with new bases
    init_steps: int = 10  # T: optimizer steps a round, and before the rebalancing of the main run
    refresh_phases: int = 5  # the interval between refreshes grows from 1 step to this many

    def check(self) -> None:
        require_rank(self.rank)
        for option in ("alpha", "init_rounds", "init_steps", "refresh_phases"):
            value = getattr(self, option)
            require(value > 0, option, f"{value} is not positive", "take a positive number")

    @property
    def scale(self) -> float:
        """What multiplies the two products."""
        return self.alpha / self.rank**0.5

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        A, B = kaiming(self.rank, site.n, generator), torch.zeros(site.m, self.rank)
        bases = {"Qa": torch.zeros(site.n, self.rank), "Qb": torch.zeros(site.m, self.rank)}
        return {"A": nn.Parameter(A), "B": nn.Parameter(B), **bases, "plain": torch.ones(())}

    def factors(self, t: SimpleNamespace) -> Update:
        # plain is 1 in the warm-up's first round, which is LoRA's B A, and 0 ever after.
        outer = torch.cat([torch.lerp(t.Qb, t.B, t.plain), (1 - t.plain) * t.B], dim=-1)
        return Update(up=self.scale * outer, down=torch.cat([t.A, t.Qa.mT], dim=-2))

    def prepare(self, adapter, closure: Callable[[], Tensor]) -> None:
        """N rounds of T steps: only the bases of what each round learned are kept."""
        with at_largest_rate(adapter) as optimizer:
            for _ in range(self.init_rounds):
                for _ in range(self.init_steps):
                    closure()
                    optimizer.step()
                    optimizer.zero_grad()
                for part, site, U, _, V in self._decompose(adapter):
                    zero = {"A": torch.zeros_like(V.mT), "B": torch.zeros_like(U), "plain": torch.zeros(())}
                    assign(part, site, {**zero, "Qa": V, "Qb": U})
                self._forget(adapter, optimizer)

    def on_step(self, adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step == self.init_steps:  # equation 5: both halves carry the same, and the tail above rank r is dropped
            for part, site, U, S, V in self._decompose(adapter):
                half = S / (2 * self.scale)
                assign(part, site, {"A": half[:, None] * V.mT, "B": U * half, "Qa": V, "Qb": U})
            self._forget(adapter, optimizer)
        elif step > self.init_steps and self.refreshes(step, adapter.total_steps):
            for part in adapter.parts.values():
                for site in part.sites:
                    t = part.tensors_of(site)
                    bases = {"Qa": linalg.orthonormal(t.A.detach().mT), "Qb": linalg.orthonormal(t.B.detach())}
                    assign(part, site, bases)

    def refreshes(self, step: int, total: int) -> bool:
        """Whether the bases are renewed after `step` of `total` steps."""
        return step % math.ceil(self.refresh_phases * step / total) == 0

    def _decompose(self, adapter):
        """(part, site, U, S, V) of every site's update at rank r."""
        for part in adapter.parts.values():
            for site in part.sites:
                with torch.no_grad():
                    update = self.factors(part.tensors_of(site))
                    yield part, site, *linalg.product_svd(update.up, update.down, self.rank)

    def _forget(self, adapter, optimizer: torch.optim.Optimizer) -> None:
        for parameter in adapter.parameters():
            optimizer.state.pop(parameter, None)
