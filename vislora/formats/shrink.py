"""Layers brought inside a norm ball or down to a rank, so that the stored numbers themselves keep the bound."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..linalg import product_svd, schatten
from ..projection import project
from .lora import Layer
from .spectrum import spectrum

How = Literal["nearest", "shrink"]


@torch.no_grad()
def svd(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,), V (n, k), float64, of the layer's update; k = min(r, m, n), largest first."""
    up, down = layer.factors()
    return product_svd(up, down, min(layer.rank, *layer.shape))


def bounded(layer: Layer, p: float, delta: float, how: How) -> Layer:
    """The layer itself where its Schatten p-norm is at most delta, else with factors of the same rank, scale and type
    that keep it.

    Factors rounded to a half precision may pass the ball by a little; the ball aimed at is then made smaller until
    what is stored, measured in float64, lies inside.
    """
    if spectrum(layer).norm(p) <= delta:
        return layer
    triplets, margin = svd(layer), 0.0
    while margin < 1:
        new = _aimed(layer, triplets, p, delta * (1 - margin), how)
        if spectrum(new).norm(p) <= delta:
            return new
        margin = max(2 * margin, torch.finfo(layer.up.dtype).eps / 16)
    return with_product(layer, triplets[0], triplets[1] * 0, triplets[2])  # a type too coarse for any such update


def _aimed(layer: Layer, triplets: tuple[Tensor, Tensor, Tensor], p: float, delta: float, how: How) -> Layer:
    U, S, V = triplets
    if how == "nearest":
        return with_product(layer, U, project(S, p, delta), V)
    factor = min(1.0, delta / schatten(S, p).item())
    return replace(layer, up=(layer.up.double() * factor).to(layer.up.dtype))


def with_product(layer: Layer, U: Tensor, S: Tensor, V: Tensor) -> Layer:
    """The layer with U diag(S) V^T as its update: rank, scale and types kept, both factors of equal norms."""
    root = (S / abs(layer.scale)).sqrt()
    up, down = U * root * math.copysign(1, layer.scale), (V * root).mT
    lacking = layer.rank - len(S)
    up = torch.nn.functional.pad(up, (0, lacking)).to(layer.up.dtype)
    return layer.with_factors(up, torch.nn.functional.pad(down, (0, 0, 0, lacking)).to(layer.down.dtype))


def squeezed(layer: Layer, rank: int) -> tuple[Layer, float]:
    """The layer at no more than a rank, scale 1, and the Frobenius norm that is lost; itself where it has no more."""
    if layer.rank <= rank:
        return layer, 0.0
    U, S, V = svd(layer)
    slim = replace(layer, scale=1.0, down=layer.down[:rank], up=layer.up[:, :rank], keys=None)
    kept = min(rank, len(S))
    return with_product(slim, U[:, :kept], S[:kept], V[:, :kept]), torch.linalg.vector_norm(S[kept:]).item()
