"""The nearest point of a Schatten ball: what bounds an update that was trained without a bound.

The Frobenius norm and the ball do not change under rotations of either side, so the nearest matrix keeps the singular
vectors and takes the Euclidean projection of the singular values onto the l_p ball (von Neumann's trace inequality).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .linalg import schatten

_ROUNDS, _POINTS = 12, 33  # each round narrows the multiplier's bracket by the number of points
_HALVINGS = 60


def project(values: Tensor, p: float, delta: float) -> Tensor:
    """The Euclidean projection of values (r,) >= 0 onto {x: |x|_p <= delta}, in float64; values inside come back as is.

    p = 1 by the threshold of the sorted values (Duchi et al. 2008), 2 by scaling, inf by clipping, any other p > 1 by
    the root of its one multiplier. ValueError for p < 1 or a delta that is not positive.
    """
    if not p >= 1 or not 0 < delta < math.inf:
        raise ValueError(f"there is no ball of p = {p} and delta = {delta}")
    x = values.double()
    norm = schatten(x, p).item()
    if norm <= delta:
        return x
    if p == math.inf:
        return x.clamp_max(delta)
    if p == 2:
        return x * (delta / norm)
    inside = _simplex(x, delta) if p == 1 else _by_multiplier(x / delta, p) * delta
    inside = torch.minimum(inside, x)
    return inside * min(1.0, delta / schatten(inside, p).item())  # off rounding


def _simplex(x: Tensor, delta: float) -> Tensor:
    """max(x - t, 0) with the one t that makes it sum to delta."""
    ordered = x.sort(descending=True).values
    thresholds = (ordered.cumsum(0) - delta) / torch.arange(1, len(x) + 1, dtype=x.dtype)
    t = thresholds[(ordered > thresholds).nonzero().max()]
    return (x - t).clamp_min(0)


def _by_multiplier(v: Tensor, p: float) -> Tensor:
    """The projection onto the unit ball, 1 < p < inf: x + l x^(p-1) = v for every entry, and |x|_p = 1.

    x falls in l and its norm with it; l is sought on a grid of its logarithm that narrows, since it spans many decades.
    """
    low, high = -80.0, 80.0
    for _ in range(_ROUNDS):
        grid = torch.linspace(low, high, _POINTS, dtype=v.dtype)
        norms = torch.linalg.vector_norm(_entries(v, grid.exp()[:, None], p), ord=p, dim=-1)
        outside = int((norms > 1).sum())  # norms fall along the grid
        low, high = grid[max(outside - 1, 0)].item(), grid[min(outside, _POINTS - 1)].item()
    return _entries(v, torch.tensor([[high]], dtype=v.dtype).exp(), p)[0]


def _entries(v: Tensor, multiplier: Tensor, p: float) -> Tensor:
    """x (L, r) in [0, v] with x + l x^(p-1) = v, by halving; v (r,), multiplier l (L, 1)."""
    low = torch.zeros(len(multiplier), len(v), dtype=v.dtype)
    high = v.expand_as(low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = middle + multiplier * middle.pow(p - 1) > v
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2
