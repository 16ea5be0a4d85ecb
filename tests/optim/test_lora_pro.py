"""LoRA-Pro: the equivalent gradient, the adjusted gradients nearest to the given ones, and the two kinds of moments."""

from __future__ import annotations

import pytest
import torch
from lora_pairs import M, N, R, give, noise, off, onto, pair, values
from torch import nn

from vislora import attach, optim
from vislora.optim import LoRAPro
from vislora.optim._paired import spectra
from vislora.optim.lora_pro import Projection


def projection(p, damping=0.0):
    return Projection(p, *spectra([p.down.detach().mT, p.up.detach()]), damping)


def nearest(p, G):
    A, B = values(p)
    P = onto(B)
    return P @ G + (G - P @ G) @ onto(A.mT)


def test_the_equivalent_gradient_is_the_nearest_that_factors_can_make():
    p, G = give(pair(scale=5.66), noise(M, N)), noise(M, N)
    A, B = values(p)
    maps = projection(p)
    assert off(maps.equivalent(p.down.grad, p.up.grad), nearest(p, G)) < 1e-12
    a, b = maps.adjusted(p.down.grad, p.up.grad)
    assert off(p.scale * (B @ a + b @ A), nearest(p, G)) < 1e-12  # whatever X


def test_x_solves_its_equation_and_makes_the_adjusted_gradients_nearest():
    p = give(pair(scale=0.7), noise(M, N))
    A, B = values(p)
    gA, gB, maps = p.down.grad, p.up.grad, projection(p)
    C = -torch.linalg.inv(B.mT @ B) @ gA @ A.mT / p.scale**2
    X = maps.sylvester(C)
    assert off(B.mT @ B @ X + X @ A @ A.mT, C) < 1e-10
    a, b = maps.adjusted(gA, gB)
    Y = torch.zeros(R, R, dtype=torch.float64, requires_grad=True)
    distance = (a + Y @ A - gA).square().sum() + (b - B @ Y - gB).square().sum()
    (slope,) = torch.autograd.grad(distance, Y)
    assert slope.abs().max() < 1e-10 * distance.item()


def test_the_loss_falls_along_the_adjusted_gradients():
    for seed in range(20):
        p, G = pair(seed=seed), noise(M, N, seed=50 + seed)
        give(p, G)
        a, b = projection(p).adjusted(p.down.grad, p.up.grad)
        fall = (p.down.grad * a).sum() + (p.up.grad * b).sum()
        assert abs(fall / nearest(p, G).square().sum() - 1) < 1e-10


@pytest.mark.parametrize("moments", ["full", "factors"])
def test_a_zero_start_is_finite(moments):
    p = pair(dtype=torch.float32)
    with torch.no_grad():
        p.up.zero_()
    A, target = p.down.detach().clone(), noise(M, N).float()
    optimizer, losses = LoRAPro([p.down, p.up], [p], lr=0.02, weight_decay=0.0, moments=moments), []
    for step in range(60):
        error = p.scale * p.up.detach() @ p.down.detach() - target
        losses.append(error.square().sum())
        give(p, error)
        optimizer.step()
        assert (p.down - A).abs().max() < 8 and p.up.abs().max() < 8
        if step == 0:
            assert torch.equal(p.down, A) and p.up.any()
    assert max(losses) < 1.05 * losses[0] and losses[-1] < 0.8 * losses[0]


def test_the_first_step_is_adams_first_step_as_far_as_the_factors_can():
    p, G = pair(scale=2.0), noise(M, N)
    A, B = values(p)
    optimizer = LoRAPro([p.down, p.up], [p], lr=1e-7, weight_decay=0.0, damping=0.0)
    sign = nearest(p, G).sign()  # m / sqrt(v) after one step, both corrected for bias
    give(p, G)
    optimizer.step()
    moved = p.scale * (p.up @ p.down - B @ A).detach()
    assert off(moved / -1e-7, nearest(pair(scale=2.0), sign)) < 1e-5


def test_full_moments_follow_the_product():
    p, twin = pair(scale=1.3), pair(scale=1.3)
    groups = [{"params": [p.down], "lr": 0.02}, {"params": [p.up], "lr": 0.05, "weight_decay": 0.3}]
    optimizer = LoRAPro(groups, [p], betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1, damping=0.0)
    m = v = torch.zeros(M, N, dtype=torch.float64)
    for step in range(1, 5):
        G = noise(M, N, seed=step)
        give(p, G)
        optimizer.step()
        A, B = values(twin)
        m, v = 0.8 * m + 0.2 * nearest(twin, G), 0.9 * v + 0.1 * nearest(twin, G) ** 2
        full = m / (1 - 0.8**step) / ((v / (1 - 0.9**step)).sqrt() + 1e-4)
        # Of all steps of the factors with this product's change, the least squares nearest to the raw gradients.
        a0 = torch.linalg.lstsq(B, full).solution / twin.scale
        b0 = torch.linalg.lstsq(A.mT, (full - onto(B) @ full).mT).solution.mT / twin.scale
        gA, gB = twin.scale * B.mT @ full, twin.scale * full @ A.mT
        eye = torch.eye(R, dtype=torch.float64)
        system = torch.cat([torch.kron(eye, A.mT.contiguous()), -torch.kron(B.contiguous(), eye)])
        goal = torch.cat([(gA - a0).flatten(), (gB - b0).flatten()])
        X = torch.linalg.lstsq(system, goal[:, None]).solution.view(R, R)
        with torch.no_grad():
            twin.down.mul_(1 - 0.02 * 0.1).sub_(0.02 * (a0 + X @ A))
            twin.up.mul_(1 - 0.05 * 0.3).sub_(0.05 * (b0 - B @ X))
        assert off(p.down, twin.down) < 1e-9 and off(p.up, twin.up) < 1e-9
    assert optimizer.state[p.up]["exp_avg_sq"].shape == (M, N) and not optimizer.state[p.down]


def test_moments_of_factors_are_adamws_on_adjusted_gradients():
    p, twin = pair(), pair()
    optimizer = LoRAPro([p.down, p.up], [p], lr=0.1, moments="factors")
    plain = torch.optim.AdamW([twin.down, twin.up], lr=0.1)
    for step in range(3):
        for each in (p, twin):
            give(each, noise(M, N, seed=step))
        twin.down.grad, twin.up.grad = projection(twin, 1e-6).adjusted(twin.down.grad, twin.up.grad)
        optimizer.step()
        plain.step()
    assert torch.equal(p.down, twin.down) and torch.equal(p.up, twin.up)
    assert optimizer.state[p.up]["exp_avg"].shape == (M, R)


def test_the_scale_is_the_layers_and_does_not_change_the_step():
    adapter = attach(nn.Sequential(nn.Linear(12, 10)), "rslora", rank=8, alpha=16)
    assert optim.pairs_of(adapter)[0].scale == pytest.approx(16 / 8**0.5)
    moved = []
    for scale in (1.0, 5.66):
        p = pair(scale)
        A, B = values(p)
        optimizer = LoRAPro([p.down, p.up], [p], lr=1.0, damping=0.0, weight_decay=0.0)
        give(p, noise(M, N))
        optimizer.step()
        a, b = p.down.detach() - A, p.up.detach() - B
        moved.append(scale * (B @ a + b @ A))  # the first-order change
    assert off(*moved) < 1e-10


def test_unknown_moments_are_refused():
    p = pair()
    with pytest.raises(ValueError, match="moments.*half.*full or factors"):
        LoRAPro([p.down, p.up], [p], moments="half")
