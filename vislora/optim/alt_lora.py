"""AltLoRA: Towards Better Gradient Approximation in Low-Rank Adaptation with Alternating Projections (Yu et al. 2025,
arXiv 2505.12455), section 3; with `plus`, AltLoRA+ there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import Pair
from ..linalg import precise
from ._paired import PairedAdamW, descend, spectra, unbiased


class AltLoRA(PairedAdamW):
    """Projected gradients, one factor after the other, with a momentum that follows the partner.

    Equation: g <- (B^T B + d I)^-1 g_A, M <- b1 (B^T B + d I)^-1 B^T B_old M + (1 - b1) g, A <- A - lr M, for A (r, n),
    B (m, r), d the damping, B_old the partner at A's last step; then the same for B with the new A.
    plus: steps are divided by the root of a second moment of g, as in Adam.
    alternate: A moves at a pair's odd steps and B at its even ones, each by the gradient at the present point: the
    paper's alternation. Otherwise both move at every step by one backward, B by the gradient at the old A, as the
    authors' code does.
    Differs from the paper: the projection's factor 1 / s^2 is left to the learning rate, as in the authors' code; both
    moments are corrected for bias. From that code: the learning rate is the group's own and so follows schedules, the
    transported momentum is the one kept, weights decay as in AdamW, inverses are float32 or float64, and d is 1e-6, not
    1e-5. Without `plus` steps have the gradient's size, so that rates are far above Adam's.
    """

    def __init__(self, params, pairs: Sequence[Pair], *, damping: float = 1e-6, plus: bool = True,
                 alternate: bool = False, **adamw):  # fmt: skip
        super().__init__(params, pairs, damping=damping, **adamw)
        self.plus, self.alternate = plus, alternate

    def treat(self, pairs: list[Pair]) -> None:
        steps = [[self.state[t].get("step", 0) for t in (pair.down, pair.up)] for pair in pairs]
        first = [pair for pair, (down, up) in zip(pairs, steps, strict=True) if not self.alternate or down <= up]
        then = [pair for pair, (down, up) in zip(pairs, steps, strict=True) if not self.alternate or down > up]
        self._move([(pair.down, pair.up) for pair in first], transposed=False)
        self._move([(pair.up, pair.down) for pair in then], transposed=True)
        for pair in pairs:
            pair.down.grad = pair.up.grad = None

    def _move(self, moves: list[tuple[Tensor, Tensor]], transposed: bool) -> None:
        """Move the first of each two by its gradient. transposed: B (m, r) is treated as A is, as B^T beside A^T."""
        turn = (lambda x: x.mT) if transposed else (lambda x: x)
        group_of = self._group_of()
        for (tensor, other), spectrum in zip(moves, spectra([turn(other) for _, other in moves]), strict=True):
            group, state, partner = group_of[tensor], self.state[tensor], precise(other)
            (beta1, beta2), inverse = group["betas"], spectrum.inverse(self.damping)
            gradient = inverse @ turn(precise(tensor.grad))  # (r, n) or (r, m), as is the momentum
            if not state:
                state |= {"step": 0, "exp_avg": torch.zeros_like(gradient), "partner": partner.clone()}
                state |= {"exp_avg_sq": torch.zeros_like(gradient)} if self.plus else {}
            state["step"] += 1
            overlap = turn(partner).mT @ turn(state["partner"])  # (r, r)
            state["exp_avg"] = beta1 * (inverse @ overlap @ state["exp_avg"]) + (1 - beta1) * gradient
            state["partner"].copy_(partner)
            direction = unbiased(state["exp_avg"], beta1, state["step"])
            if self.plus:
                state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                direction /= unbiased(state["exp_avg_sq"], beta2, state["step"]).sqrt() + group["eps"]
            descend(tensor, turn(direction), group)
