"""An Update: what a method adds to one weight matrix, always in factors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from . import linalg
from .layer import MATRIX, Matrix


@dataclass(frozen=True)
class Update:
    """delta(W) = up @ down - minus.up @ minus.down, for W (m, n); with a magnitude, the rows of W + that are rescaled.

    up: (..., m, r), down: (..., r, n); leading dimensions stack layers of equal shape.
    minus: a second product taken off, so that a method may start from a part of W and leave W unwritten (PiSSA).
    magnitude: (..., m), the norm that each row of the adapted weight has (DoRA, equation 5 there).
    row_scale: (m,), magnitude over the row norms of W + delta; set by `with_row_scale`, which knows W.
    """

    up: Tensor
    down: Tensor
    minus: Update | None = None
    magnitude: Tensor | None = None
    detach_norm: bool = True
    row_scale: Tensor | None = None

    def unbind(self) -> list[Update]:
        """One Update for each layer of a stack (L, ...)."""
        rests = self.minus.unbind() if self.minus is not None else [None] * len(self.up)
        magnitudes = self.magnitude if self.magnitude is not None else [None] * len(self.up)
        return [
            replace(self, up=up, down=down, minus=rest, magnitude=magnitude)
            for up, down, rest, magnitude in zip(self.up, self.down, rests, magnitudes, strict=True)
        ]

    def factors(self) -> tuple[Tensor, Tensor]:
        """up (m, r') and down (r', n) of the low-rank part alone; r' counts `minus` too."""
        if self.minus is None:
            return self.up, self.down
        up = torch.cat([self.up, -self.minus.up.to(self.up.dtype)], dim=-1)
        return up, torch.cat([self.down, self.minus.down.to(self.down.dtype)], dim=-2)

    def product(self) -> Tensor:
        """The low-rank part as a matrix (m, n), float32 or float64. Exactly 0 where both products are equal."""
        dense = linalg.precise(self.up) @ linalg.precise(self.down)
        return dense if self.minus is None else dense - self.minus.product()

    def dense(self, weight: Tensor) -> Tensor:
        """W_adapted - W as a matrix (m, n), for the base weight (m, n), float32 or float64."""
        product = self.product()
        if self.row_scale is None:
            return product
        weight = weight.to(product)
        return (self.row_scale[:, None].to(product.dtype) - 1) * weight + self.row_scale[:, None] * product

    def with_row_scale(self, weight: Tensor) -> Update:
        """The same Update with `row_scale` from the base weight (m, n), if it has a magnitude."""
        if self.magnitude is None:
            return self
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            norm = row_norm(weight, *self.factors()).to(self.magnitude.device)  # an offloaded weight stays where it is
        return replace(self, row_scale=self.magnitude / norm)

    def detach(self) -> Update:
        """The same values, cut from the graph."""
        cut = {
            name: getattr(self, name).detach()
            for name in ("up", "down", "minus", "magnitude", "row_scale")
            if getattr(self, name) is not None
        }
        return replace(self, **cut)

    def apply(
        self,
        x: Tensor,
        base: Tensor,
        bias: Tensor | None,
        strength: float,
        dropout: float = 0.0,
        layer: Matrix | None = None,
    ) -> Tensor:
        """What `layer` would make of x with the weight strength * dW and no bias, x @ dW^T for a linear one.

        x: its inputs; base: what the frozen layer made of x; dropout: on the inputs of the low-rank part; layer: None
        for a linear one.

        Factors are cast to x's dtype (r * (m + n) numbers), never the activations to the factors'.
        The two products of a residual start are subtracted before anything is added to `base`, so that
        the sum is exactly zero at the start in every precision.
        """
        layer = MATRIX if layer is None else layer
        inner = F.dropout(x, dropout) if dropout else x
        delta = self._product(layer.inputs(inner), layer)
        if self.row_scale is not None:
            frozen = base if bias is None else base - layer.rows(bias)
            scale = layer.rows(self.row_scale).to(base.dtype)
            delta = (scale - 1) * frozen + scale * delta
        return delta if strength == 1.0 else delta * strength

    def _product(self, x: Tensor, layer: Matrix) -> Tensor:
        out = layer.product(x, self.down.to(x.dtype), self.up.to(x.dtype))
        return out if self.minus is None else out - self.minus._product(x, layer)


def row_norm(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Euclidean norm (m,) of every row of weight + up @ down, without that matrix.

    weight (m, n), up (m, r), down (r, n). |w + u D|^2 = |w|^2 + 2 u.(D w) + u (D D^T) u^T, row by row.
    """
    weight = linalg.precise(weight)
    up, down = up.to(weight), down.to(weight)
    square = torch.linalg.vector_norm(weight, dim=-1).square()  # reads the weight once, and makes nothing of its size
    square = square + 2 * ((weight @ down.mT) * up).sum(-1)
    square = square + ((up @ (down @ down.mT)) * up).sum(-1)
    # Rounding may leave a zero row slightly negative; a zero row is scaled by magnitude / tiny = 0 / tiny = 0.
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
