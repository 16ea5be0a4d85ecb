"""Projections onto l_p balls against what defines them: a dense grid, and the dual norm."""

from __future__ import annotations

import math

import pytest
import torch

from vislora.linalg import schatten
from vislora.projection import project

PS = [1, 1.001, 1.2, 1.5, 2, 2.5, 3, 8, 40, math.inf]


def spectra(count=5, r=6):
    g = torch.Generator().manual_seed(0)
    for i in range(count):
        values = torch.rand(r, generator=g, dtype=torch.float64) * 10.0 ** (3 * (i % 3) - 3)
        yield (values * torch.logspace(0, -(i % 4), r, dtype=torch.float64)).sort(descending=True).values
    yield torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    yield torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("p", PS)
def test_a_grid_finds_nothing_nearer(p):
    v = torch.tensor([1.7, 0.6], dtype=torch.float64)
    x = project(v, p, 1.0)
    axis = torch.linspace(0, 1, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    inside = grid[schatten(grid, p) <= 1.0]
    nearest = (inside - v).norm(dim=-1).min()
    assert nearest - 6e-3 < (x - v).norm() <= nearest + 1e-12


@pytest.mark.parametrize("p", PS)
def test_the_rest_is_normal_to_the_ball(p):
    """x is the projection exactly if <v - x, x> is the most that <v - x, y> reaches in the ball: delta |v - x|_q."""
    q = math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)
    for v in spectra():
        for share in (0.01, 0.5, 1 - 1e-6):
            delta = share * schatten(v, p).item()
            x = project(v, p, delta)
            rest = v - x
            most = delta * schatten(rest, q) if rest.any() else 0.0
            assert abs(rest @ x - most) <= 1e-6 * most + 1e-9 * v.max() ** 2, (v, share)
            assert schatten(x, p) <= delta * (1 + 1e-15) and (x >= 0).all() and (x <= v).all()


@pytest.mark.parametrize("p", PS)
def test_twice_is_once_and_inside_nothing_moves(p):
    for v in spectra():
        delta = 0.4 * schatten(v, p).item()
        x = project(v, p, delta)
        assert torch.equal(project(x, p, delta * (1 + 1e-15)), x)
        assert torch.equal(project(v, p, 1.0001 * schatten(v, p).item()), v)
        assert schatten(x, p) >= delta * (1 - 1e-9), "farther in than asked"


def test_points_come_no_farther_apart():
    g = torch.Generator().manual_seed(1)
    for p in PS:
        for _ in range(3):
            a, b = 3 * torch.rand(2, 5, generator=g, dtype=torch.float64)
            assert (project(a, p, 1.0) - project(b, p, 1.0)).norm() <= (a - b).norm() * (1 + 1e-9)


@pytest.mark.parametrize("p, delta", [(0.5, 1.0), (math.nan, 1.0), (1, 0.0), (2, -1.0), (2, math.inf)])
def test_no_such_ball(p, delta):
    with pytest.raises(ValueError, match="no ball"):
        project(torch.ones(2), p, delta)
