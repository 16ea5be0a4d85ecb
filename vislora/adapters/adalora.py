"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al. 2023, arXiv 2303.10512)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import linalg
from ..distributed import as_sharded, whole
from ..update import Update
from ._method import Method, require, require_fit, require_rank

_TRAINED = ("A", "E", "B")


@dataclass(frozen=True)
class AdaLoRA(Method):
    """Singular triplets compete over all layers for a shrinking budget; the least important lose their value.

    Equation: dW = (alpha / r0) B diag(E) A, for A (r0, n), B (m, r0), r0 = init_r; penalty orth_reg_weight times the
    mean norm of A A^T - I and B^T B - I.
    Parameters per layer: 1.5 r (m + n + 1), or init_r in the place of 1.5 r.
    Export rank: init_r.
    Differs from the paper: the penalty is a mean over matrices and r0 stays the divisor after pruning, as in the
    authors' code. Where the budget keeps everything nothing is pruned, which fails in PEFT.
    """

    roles: ClassVar[Mapping[str, str]] = {"A": "down", "B": "up", "E": "core"}
    drops_tail: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {"tinit": 1, "tfinal": 1}

    rank: int = 16  # the mean number of triplets a layer has in the end
    init_r: int | None = None  # and at the start; None: 1.5 rank
    alpha: float | None = None  # None: equal to init_r, so that the scale is 1
    tinit: int = 0  # steps before the first pruning
    tfinal: int = 0  # steps at the end with the final choice
    deltaT: int = 1  # steps between prunings
    beta1: float = 0.85  # smoothing of the importance
    beta2: float = 0.85  # and of its variation
    orth_reg_weight: float = 0.5  # strength of the penalty

    def check(self) -> None:
        require_rank(self.rank)
        wrong = f"{self.init_r} is below rank {self.rank}"
        require(self.init_r is None or self.init_r >= self.rank, "init_r", wrong, "the budget can only shrink")
        for option in ("alpha", "deltaT"):
            value = getattr(self, option)
            require(value is None or value > 0, option, f"{value} is not positive", "take a positive number")
        for option in ("tinit", "tfinal", "orth_reg_weight"):
            value = getattr(self, option)
            require(value >= 0, option, f"{value} is negative", "take 0 or more")
        for option in ("beta1", "beta2"):
            value = getattr(self, option)
            require(0 <= value < 1, option, f"{value} is not in [0, 1)", "0.85 is the paper's")

    @property
    def start_rank(self) -> int:
        """Triplets a layer starts with."""
        return self.init_r if self.init_r is not None else math.ceil(1.5 * self.rank)

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        require_fit(self.start_rank, site)
        shapes = {"A": (self.start_rank, site.n), "E": (self.start_rank,), "B": (site.m, self.start_rank)}
        tensors: dict[str, Tensor] = {"kept": torch.ones(self.start_rank)}
        for name, shape in shapes.items():
            value = torch.zeros(shape) if name == "E" else 0.02 * torch.randn(shape, generator=generator)
            tensors[name] = nn.Parameter(value)
            tensors[f"{name}_importance"], tensors[f"{name}_variation"] = torch.zeros(shape), torch.zeros(shape)
        return tensors

    def factors(self, t: SimpleNamespace) -> Update:
        scale = 1.0 if self.alpha is None else self.alpha / self.start_rank
        return Update(up=scale * t.B * t.E, down=t.A)

    def bases(self, t: SimpleNamespace) -> dict[str, Tensor]:
        return {"A": t.A.mT, "B": t.B}

    def has_penalty(self) -> bool:
        return self.orth_reg_weight > 0

    def penalty(self, sites: Sequence[SimpleNamespace], max_lr: float) -> Tensor:
        with linalg.without_autocast(sites[0].A.device):
            grams = [gram for t in sites for gram in (t.A @ t.A.mT, t.B.mT @ t.B)]
            eye = torch.eye(self.start_rank, dtype=grams[0].dtype, device=grams[0].device)
            return self.orth_reg_weight * torch.stack([torch.linalg.matrix_norm(g - eye) for g in grams]).mean()

    def budget(self, step: int, total: int, layers: int) -> int:
        """How many triplets all `layers` may have after `step` of `total` steps: the paper's cubic schedule."""
        start, end = self.start_rank * layers, self.rank * layers
        if step <= self.tinit:
            return start
        if step >= total - self.tfinal:
            return end
        left = 1 - (step - self.tinit) / (total - self.tfinal - self.tinit)
        return int(end + (start - end) * left**3)

    @torch.no_grad()
    def on_step(self, adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        sites = [SimpleNamespace(**part.own_tensors(site)) for part in adapter.parts.values() for site in part.sites]
        scores = torch.stack([self._score(t) for t in sites])  # (layers, start_rank)
        last = adapter.total_steps - self.tfinal
        keep = self.budget(step, adapter.total_steps, len(sites))
        if self.tinit < step <= last and keep < scores.numel() and (step == last or step % self.deltaT == 0):
            threshold = scores.flatten().kthvalue(scores.numel() - keep).values
            for t, score in zip(sites, scores, strict=True):
                t.kept.copy_(score > threshold)
                t.E.mul_(as_sharded(t.kept, t.E))  # until the last phase it may grow back and be chosen again
        elif step > last:
            for t in sites:
                t.E.mul_(as_sharded(t.kept, t.E))

    def _score(self, t: SimpleNamespace) -> Tensor:
        """Importance of each triplet (start_rank,), equations 7 to 10, with this step's gradients in the averages."""
        smooth = {}
        for name in _TRAINED:
            value, importance, variation = (getattr(t, f"{name}{tail}") for tail in ("", "_importance", "_variation"))
            if value.grad is not None:  # a step that was not finite says nothing of importance
                now = whole(value * value.grad).abs()
                now = torch.where(now.isfinite(), now, importance)
            else:
                now = importance
            importance.lerp_(now, 1 - self.beta1)
            variation.lerp_((now - importance).abs(), 1 - self.beta2)
            smooth[name] = importance * variation
        return smooth["E"] + smooth["A"].mean(dim=1) + smooth["B"].mean(dim=0)
