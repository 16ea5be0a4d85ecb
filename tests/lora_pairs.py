"""Pairs of factors with the gradients that a dense gradient gives them, for tests of the paired optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vislora.adapters import Pair

M, N, R = 9, 7, 3


def pair(scale: float = 1.5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Pair:
    """A (3, 7) and B (9, 3), drawn from a normal distribution."""
    A, B = noise(R, N, seed=seed), noise(M, R, seed=seed + 1)
    return Pair(nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype)), scale)


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def give(p: Pair, G: Tensor) -> Pair:
    """Set the factors' gradients to those of a loss whose gradient for the whole update s B A is G (m, n)."""
    G = G.to(p.up.dtype)
    p.down.grad, p.up.grad = p.scale * p.up.mT @ G, p.scale * G @ p.down.mT
    return p


def values(p: Pair) -> tuple[Tensor, Tensor]:
    """Copies of A and B."""
    return p.down.detach().clone(), p.up.detach().clone()


def onto(columns: Tensor) -> Tensor:
    """The orthogonal projection onto the span of the columns, by QR, for an independent answer."""
    Q = torch.linalg.qr(columns).Q
    return Q @ Q.mT


def transformed(p: Pair, seed: int = 3) -> Pair:
    """Other factors of the same product: T^-1 A and B T."""
    T = noise(R, R, seed=seed)
    return Pair(nn.Parameter(torch.linalg.inv(T) @ p.down.detach()), nn.Parameter(p.up.detach() @ T), p.scale)


def off(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()
