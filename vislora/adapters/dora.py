"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv 2402.09353), equations 5 and 11."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..update import Update, row_norm
from .lora import LoRA


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA for the direction of each row of the weight, and a trained norm for the row.

    Equation: W' = diag(c / |W + s B A|_rows) (W + s B A), c = |W|_rows at the start, s = alpha / r.
    Parameters per layer: r (m + n) + m.
    Export rank: r, with c beside it; no plain LoRA file can hold it.
    Differs from the paper: the paper writes weights (in, out) and norms columns; for torch's (out, in) these are
    rows, one norm per output, as in the authors' code. With dropout, the frozen part sees the undropped input.
    Over a quantized base every training step dequantises each W in float32, for the norms of its rows, one layer at a
    time; with detach_norm = False all of them are held until the backward.
    """

    roles: ClassVar[Mapping[str, str]] = {"A": "down", "B": "up", "c": "magnitude"}

    detach_norm: bool = True  # the norm below the fraction is held constant in the backward (section 4.3)

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        tensors = super().init(site, generator)
        # By the same expression as at every step: the fraction starts at exactly one.
        start = self.factors(SimpleNamespace(**tensors, c=None))
        c = row_norm(site.weight(), *start.factors()).detach()
        return {**tensors, "c": nn.Parameter(c)}

    def factors(self, t: SimpleNamespace) -> Update:
        return replace(super().factors(t), magnitude=t.c, detach_norm=self.detach_norm)
