"""LoRA-SB: Initialization using Update Approximation (Ponkshe et al. 2024, arXiv 2411.19557), sec. 3, algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import linalg
from ..prepare import assign, largest_rate, start_generator, weight_gradients
from ..update import Update
from ._bases import each_site
from ._method import Method, require, require_fit, require_rank


@dataclass(frozen=True)
class LoRASB(Method):
    """A trained r x r matrix between frozen bases that span the best rank-r part of the first full step.

    Equation: dW = s B R A, from B diag(S) A = the top r triplets of -h sign(dL/dW), R = diag(S) / s, s = alpha / r.
    Parameters per layer: r^2.
    Export rank: r.
    Differs from the paper: the paper gives no step size h for the first step; here it is the schedule's first non-zero
    learning rate, or init_lr. Bases and R are float32 and the SVD is exact; the authors' code is niter = 10, bfloat16,
    init_lr_divisor = its warm-up's number of gradient batches, and AdamW's default weight decay of 0.01. By design the
    base weight is not compensated: after `prepare` the model stands one step ahead. The noise of table 4 is written
    with a mean and no deviation; it is read as the deviation.
    """

    needs_prepare: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, str]] = {"R": "core"}

    rank: int = 16
    alpha: float | None = None  # None: equal to rank, so that s = 1
    init_batches: int = 1  # optimizer steps' batches that the first gradient is the mean over
    init_lr: float | None = None  # h; None: the schedule's first non-zero rate
    init_lr_divisor: float | None = None  # h = largest rate / this; authors: warm-up ratio x batches x epochs
    init_from: Literal["update", "kaiming"] = "update"  # what is decomposed; kaiming: a random matrix, table 4
    init_noise: float = 0.0  # deviation of Gaussian noise on the first step before its SVD, table 4: 1e-2 to 1e-5
    identity_core: bool = False  # B = U diag(S), R = I / s: bases that are not orthonormal, appendix D.2
    niter: int | None = None  # None: exact SVD; a number: rounds of a randomised one of width r (the authors' code: 10)
    bfloat16: bool = False  # A, B and R are stored so, as in the authors' code: R loses steps below 1/256 of itself

    def check(self) -> None:
        require_rank(self.rank)
        for option in ("alpha", "init_lr", "init_lr_divisor", "init_batches"):
            value = getattr(self, option)
            require(value is None or value > 0, option, f"{value} is not positive", "take a positive number")
        both = self.init_lr is not None and self.init_lr_divisor is not None
        require(not both, "init_lr", f"{self.init_lr} given beside init_lr_divisor", "give one of the two")
        known = ("update", "kaiming")
        require(self.init_from in known, "init_from", f"{self.init_from!r} is unknown", "take update or kaiming")
        good = 0 <= self.init_noise < float("inf")
        require(good, "init_noise", f"{self.init_noise} is no deviation", "take 0 or a positive number")
        for option in ("init_lr", "init_lr_divisor", "init_noise"):
            idle = self.init_from == "kaiming" and getattr(self, option)
            wrong = f"{getattr(self, option)} beside init_from kaiming"
            require(not idle, option, wrong, "that start knows no first step; leave it out")
        require(self.niter is None or self.niter >= 0, "niter", f"{self.niter} is negative", "take 0 or more")

    @property
    def scale(self) -> float:
        """What multiplies B R A."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        r, kind = self.rank, torch.bfloat16 if self.bfloat16 else torch.float32
        shapes = {"R": (r, r), "A": (r, site.n), "B": (site.m, r)}
        tensors = {name: torch.zeros(shape, dtype=kind) for name, shape in shapes.items()}
        return {**tensors, "R": nn.Parameter(tensors["R"])}

    def bases(self, t: SimpleNamespace) -> dict[str, Tensor]:
        return {"A": t.A.mT, "B": t.B}

    def prepare(self, adapter, closure: Callable[[], Tensor]) -> None:
        for part, site, start in self._starts(adapter, closure):
            generator = start_generator(adapter, part, site)
            if self.init_noise:
                noise = torch.randn(start.shape, generator=generator, dtype=start.dtype)
                start = start + self.init_noise * noise.to(start.device)
            U, S, V = linalg.top_svd(start, self.rank, self.niter, generator, oversample=0)
            if self.identity_core:
                assign(part, site, {"B": U * S, "A": V.mT, "R": torch.eye(self.rank) / self.scale})
            else:
                assign(part, site, {"B": U, "A": V.mT, "R": torch.diag(S) / self.scale})

    def _starts(self, adapter, closure: Callable[[], Tensor]) -> Iterator[tuple]:
        """(part, site, the matrix (m, n) whose triplets are taken) of every site."""
        if self.init_from == "kaiming":  # He et al. 2015; no data is asked for
            for part, site, _ in each_site(adapter):
                normal = torch.randn(site.m, site.n, generator=start_generator(adapter, part, site))
                yield part, site, (2 / site.n) ** 0.5 * normal
            return
        if self.init_lr_divisor is not None:
            step = largest_rate(adapter) / self.init_lr_divisor
        else:
            step = adapter.first_lr() if self.init_lr is None else self.init_lr
        for part, site, gradient in weight_gradients(adapter, closure, self.init_batches):
            yield part, site, -step * gradient.sign()

    def factors(self, t: SimpleNamespace) -> Update:
        R, A, B = (linalg.precise(x) for x in (t.R, t.A, t.B))
        return Update(up=self.scale * (B @ R), down=A)
