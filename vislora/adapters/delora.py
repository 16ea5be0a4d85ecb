"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (Bini et al. 2025, arXiv 2503.18225), section 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import linalg
from ..update import Update
from ._method import Bound, Method, require, require_fit, require_rank
from ._start import kaiming

_FORMS = ("residual", "zero", "bounded")
_SMALLEST = 1e-4  # norms of factor rows and columns are held above it, as PEFT does


@dataclass(frozen=True)
class DeLoRA(Method):
    """Rank-one terms of unit norm, so that a trained strength alone says how large the update is.

    Equation: dW = (l / r) (B X A - B0 X0 A0) diag(|W|_columns), X = diag(1 / (|a_i| |b_i|)), for A (r, n), B (m, r).
    Parameters per layer: r (m + n) + 1, or r (m + n) for form = bounded.
    Export rank: 2r, or r for form = zero.
    Differs from the paper: nothing known for form = residual, where l scales both terms as in the authors' code. Form
    zero is PEFT's: B starts at zero and nothing is subtracted; its first step jumps to strength l. Form bounded is
    the one that NB-LoRA's equation 12 compares with: no column norms, l fixed at delta / 2, so |dW|_S1 <= delta.
    """

    roles: ClassVar[Mapping[str, str]] = {"A": "down", "B": "up", "strength": "scale"}

    rank: int = 16
    delora_lambda: float = 15.0  # the strength l at the start
    form: Literal["residual", "zero", "bounded"] = "residual"
    delta: float | None = None  # the bound of form = bounded

    def check(self) -> None:
        require_rank(self.rank)
        require(self.form in _FORMS, "form", f"{self.form!r} is unknown", f"take {', '.join(_FORMS)}")
        for option in ("delora_lambda", "delta"):
            value = getattr(self, option)
            good = value is None or (value > 0 and math.isfinite(value))
            require(good, option, f"{value} is not a positive number", "take a positive one, such as 6")
        wrong = f"{self.delta} beside form {self.form!r}"
        require((self.delta is not None) == (self.form == "bounded"), "delta", wrong, "delta goes with form bounded")

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        A, B = kaiming(self.rank, site.n, generator), kaiming(site.m, self.rank, generator)
        if self.form == "zero":
            B = torch.zeros_like(B)
        tensors = {"A": nn.Parameter(A), "B": nn.Parameter(B)}
        if self.form != "zero":
            tensors |= {"A0": A.clone(), "B0": B.clone()}
        if self.form == "bounded":
            return {**tensors, "delta": torch.tensor(self.delta)}
        columns = torch.linalg.vector_norm(site.weight(), dim=0)
        return {**tensors, "strength": nn.Parameter(torch.tensor(self.delora_lambda)), "columns": columns}

    def factors(self, t: SimpleNamespace) -> Update:
        strength = t.delta / 2 if self.form == "bounded" else t.strength
        columns = None if self.form == "bounded" else t.columns
        update = self._normalised(t.A, t.B, strength, columns)
        if self.form == "zero":
            return update
        return Update(update.up, update.down, minus=self._normalised(t.A0, t.B0, strength, columns))

    def _normalised(self, A: Tensor, B: Tensor, strength: Tensor, columns: Tensor | None) -> Update:
        A, B = linalg.precise(A), linalg.precise(B)
        sizes = A.norm(dim=-1).clamp_min(_SMALLEST) * B.norm(dim=-2).clamp_min(_SMALLEST)
        return Update(B * (strength / self.rank / sizes), A if columns is None else A * columns)

    def bound(self, t: SimpleNamespace) -> Bound | None:
        return Bound(p=1.0, delta=t.delta) if self.form == "bounded" else None
