"""OD-LoRA: Overcoming the Dilemma between Weight Representation and Gradient Approximation in Low-Rank Adaptation
(anonymous, under review), algorithm 1 and equation 5. No public code is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import linalg
from ..prepare import assign, at_largest_rate
from ..update import Update
from ._bases import each_site, renewal_due
from ._method import Method, require, require_fit, require_rank
from ._start import kaiming

_FORMS = ("full", "limited_capacity", "suboptimal_gradient")


@dataclass(frozen=True)
class ODLoRA(Method):
    """Factors that each learn against an orthonormal basis of the other's space, so that gradients keep their size.

    Equation: dW = s (Qb A + B Qa^T), Qa (n, r) and Qb (m, r) orthonormal bases of A^T and B, s = alpha / sqrt(r).
    Parameters per layer: r (m + n).
    Export rank: 2r, or r right after a refresh.
    Differs from the paper: refreshes run where t mod ceil(phases t / T) = 0, which is what its schedule must mean, and
    their QR has diag(R) >= 0: without that a basis may flip by a column's sign and dW with it. The warm-up runs at the
    largest learning rate with the schedule standing still. Bases are saved, so that a reload between two refreshes is
    exact. The ablations of table 4: form limited_capacity trains the bases themselves, dW = s Qb Qa^T, which is never
    zero after the warm-up; suboptimal_gradient scales each basis by the diagonal of its R, and is rebalanced so that
    dW is kept, where equation 5 would change it.
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
    form: Literal["full", "limited_capacity", "suboptimal_gradient"] = "full"  # the others: table 4 and appendix I

    def check(self) -> None:
        require_rank(self.rank)
        for option in ("alpha", "init_rounds", "init_steps", "refresh_phases"):
            value = getattr(self, option)
            require(value > 0, option, f"{value} is not positive", "take a positive number")
        require(self.form in _FORMS, "form", f"{self.form!r} is unknown", f"take {', '.join(_FORMS)}")

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
        # plain is 1 where dW is LoRA's B A: in the warm-up's first round, and for limited_capacity after the warm-up.
        outer = torch.cat([torch.lerp(t.Qb, t.B, t.plain), (1 - t.plain) * t.B], dim=-1)
        return Update(up=self.scale * outer, down=torch.cat([t.A, t.Qa.mT], dim=-2))

    def bases(self, t: SimpleNamespace) -> dict[str, Tensor]:
        return {"A": t.A.mT, "B": t.B} if self.form == "limited_capacity" else {"Qa": t.Qa, "Qb": t.Qb}

    def prepare(self, adapter, closure: Callable[[], Tensor]) -> None:
        """N rounds of T steps: only the bases of what each round learned are kept.

        It runs before step 0 and leaves no checkpoint: a run that is cut inside it begins it anew, and comes to the
        same bases, for a closure that goes by its own calls. From step 0 on a checkpoint of the adapter's tensors, the
        optimizer and the step holds everything, in every phase.
        """
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
        if self.form == "limited_capacity":
            for part, site, t in each_site(adapter):
                assign(part, site, {"A": t.Qa.mT, "B": t.Qb, "plain": torch.ones(())})

    def on_step(self, adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step == self.init_steps:
            for part, site, U, S, V in self._decompose(adapter):
                assign(part, site, self._rebalanced(U, S, V))
            self._forget(adapter, optimizer)
        elif step > self.init_steps and self.refreshes(step, adapter.total_steps):
            sites = list(each_site(adapter))
            factors = [factor.detach() for *_, t in sites for factor in (t.A.mT, t.B)]
            bases = linalg.orthonormal_each(factors)
            for i, (part, site, _) in zip(range(0, len(factors), 2), sites, strict=True):
                assign(part, site, self._renewed(*factors[i : i + 2], *bases[i : i + 2]))

    def refreshes(self, step: int, total: int) -> bool:
        """Whether the bases are renewed after `step` of `total` steps."""
        return renewal_due(step, total, self.refresh_phases)

    def _rebalanced(self, U: Tensor, S: Tensor, V: Tensor) -> dict[str, Tensor]:
        """Equation 5: both halves carry the same, and the tail of dW above rank r is dropped."""
        if self.form == "limited_capacity":
            return {"A": V.mT, "B": U}
        half = S / (2 * self.scale)
        if self.form == "full":
            return {"A": half[:, None] * V.mT, "B": U * half, "Qa": V, "Qb": U}
        root = half.sqrt()
        return {"A": root[:, None] * V.mT, "B": U * root, "Qa": V * root, "Qb": U * root}

    def _renewed(self, At: Tensor, B: Tensor, Qa: Tensor, Qb: Tensor) -> dict[str, Tensor]:
        """What bases Qa (n, r) and Qb (m, r) of the present At (n, r) and B (m, r) make."""
        if self.form == "limited_capacity":
            return {"A": Qa.mT, "B": Qb}
        if self.form == "suboptimal_gradient":  # the column sums are diag(R)
            Qa, Qb = Qa * (Qa * At).sum(dim=0), Qb * (Qb * B).sum(dim=0)
        return {"Qa": Qa, "Qb": Qb}

    def _decompose(self, adapter):
        """(part, site, U, S, V) of every site's update at rank r."""
        for part, site, t in each_site(adapter):
            with torch.no_grad():
                update = self.factors(t)
                yield part, site, *linalg.product_svd(update.up, update.down, self.rank)

    def _forget(self, adapter, optimizer: torch.optim.Optimizer) -> None:
        for parameter in adapter.parameters():
            optimizer.state.pop(parameter, None)
