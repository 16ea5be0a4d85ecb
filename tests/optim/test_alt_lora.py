"""AltLoRA: what each factor's step does to the product, how the momentum is carried over, what is stored."""

from __future__ import annotations

import pytest
import torch
from lora_pairs import M, N, R, give, noise, off, onto, pair, transformed, values
from torch import nn

from vislora.adapters import Pair
from vislora.optim import AltLoRA

PLAIN = {"plus": False, "betas": (0.0, 0.999), "weight_decay": 0.0, "damping": 0.0}
TARGET = noise(M, N, seed=11)


def gradient(p):
    """Of half the squared distance between the product and a target."""
    return p.scale * p.up.detach() @ p.down.detach() - TARGET


def test_joint_steps_project_a_by_b_and_b_by_the_new_a():
    p, G = pair(scale=1.5), noise(M, N)
    A, B = values(p)
    give(p, G)
    AltLoRA([p.down, p.up], [p], lr=0.1, **PLAIN).step()
    new_A, new_B = values(p)
    assert off(B @ (new_A - A), -0.1 * 1.5 * onto(B) @ G) < 1e-10
    inverse = torch.linalg.inv(new_A @ new_A.mT)
    assert off((new_B - B) @ new_A, -0.1 * 1.5 * G @ A.mT @ inverse @ new_A) < 1e-10


def test_alternating_steps_are_exact_projections():
    p = pair(scale=1.5)
    optimizer = AltLoRA([p.down, p.up], [p], lr=0.1, alternate=True, **PLAIN)
    for step in range(1, 7):
        (A, B), G = values(p), gradient(p)
        give(p, G)
        optimizer.step()
        new_A, new_B = values(p)
        if step % 2:
            assert torch.equal(new_B, B) and off(B @ (new_A - A), -0.15 * onto(B) @ G) < 1e-10
        else:
            assert torch.equal(new_A, A) and off((new_B - B) @ A, -0.15 * G @ onto(A.mT)) < 1e-10


@pytest.mark.parametrize("alternate", [True, False])
def test_steps_with_momentum_depend_on_the_product_alone(alternate):
    moved = []
    for p in (pair(), transformed(pair())):
        settings = PLAIN | {"betas": (0.9, 0.999), "weight_decay": 0.01}
        optimizer = AltLoRA([p.down, p.up], [p], lr=0.1, alternate=alternate, **settings)
        for _ in range(6):
            give(p, gradient(p))
            optimizer.step()
        moved.append((p.up @ p.down).detach())
    start = pair()
    assert off(*moved) < 1e-10 and off(moved[0], (start.up @ start.down).detach()) > 0.01


def test_the_second_moment_of_plus_does_not_share_that():
    moved = []
    for p in (pair(), transformed(pair())):
        optimizer = AltLoRA([p.down, p.up], [p], lr=0.1, damping=0.0, weight_decay=0.0)
        give(p, gradient(p))
        optimizer.step()
        moved.append((p.up @ p.down).detach())
    assert off(*moved) > 1e-3


def test_the_learning_rate_is_the_groups_own():
    p, G = pair(), noise(M, N)
    optimizer = AltLoRA([{"params": [p.down], "lr": 0.1}, {"params": [p.up], "lr": 0.3}], [p], **PLAIN)
    for factor in (0.0, 0.5, 1.0):
        for group, rate in zip(optimizer.param_groups, (0.1, 0.3), strict=True):
            group["lr"] = factor * rate
        A, B = values(p)
        give(p, G)
        optimizer.step()
        new_A, new_B = values(p)
        assert torch.allclose(B @ (new_A - A), -factor * 0.1 * 1.5 * onto(B) @ G, atol=1e-12)
        inverse = torch.linalg.inv(new_A @ new_A.mT)
        assert torch.allclose(new_B - B, -factor * 0.3 * 1.5 * G @ A.mT @ inverse, atol=1e-12)


@torch.no_grad()
def test_the_momentum_is_carried_into_the_new_partners_space():
    p = pair()
    optimizer = AltLoRA([p.down, p.up], [p], lr=0.0, plus=False, betas=(0.9, 0.999), damping=0.0)
    give(p, noise(M, N))
    optimizer.step()
    for step in (20, 30):  # other factors and no gradient, twice
        (A, B), (of_A, of_B) = values(p), [optimizer.state[t]["exp_avg"].clone() for t in (p.down, p.up)]
        p.down.add_(noise(R, N, seed=step))
        p.up.add_(noise(M, R, seed=step + 1))
        p.down.grad, p.up.grad = torch.zeros_like(p.down), torch.zeros_like(p.up)
        optimizer.step()
        new_A, new_B = values(p)
        assert off(new_B @ optimizer.state[p.down]["exp_avg"], 0.9 * onto(new_B) @ B @ of_A) < 1e-10
        carried = optimizer.state[p.up]["exp_avg"].mT @ new_A  # B's moments are kept transposed
        assert off(carried, 0.9 * of_B.mT @ A @ onto(new_A.mT)) < 1e-10


def test_plus_is_adam_on_the_projected_gradients():
    p, twin, eye = pair(), pair(), torch.eye(R, dtype=torch.float64)
    settings = {"betas": (0.0, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    optimizer = AltLoRA([p.down, p.up], [p], lr=0.05, damping=1e-2, **settings)
    plain = torch.optim.AdamW([twin.down, twin.up], lr=0.05, **settings)
    for step in range(4):
        for each in (p, twin):
            give(each, noise(M, N, seed=step))
        gB, twin.up.grad = twin.up.grad, None
        twin.down.grad = torch.linalg.solve(twin.up.mT @ twin.up + 1e-2 * eye, twin.down.grad).detach()
        plain.step()
        twin.down.grad = None
        twin.up.grad = torch.linalg.solve(twin.down @ twin.down.mT + 1e-2 * eye, gB.mT).mT.detach()
        plain.step()
        optimizer.step()
        assert off(p.down, twin.down) < 1e-10 and off(p.up, twin.up) < 1e-10


@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("alternate", [True, False])
def test_a_zero_start_is_finite(plus, alternate):
    p = pair(dtype=torch.float32)
    with torch.no_grad():
        p.up.zero_()
    A = p.down.detach().clone()
    optimizer = AltLoRA([p.down, p.up], [p], lr=0.02, plus=plus, alternate=alternate, weight_decay=0.0)
    losses = []
    for step in range(100):
        error = gradient(p).float()
        losses.append(error.square().sum())
        give(p, error)
        optimizer.step()
        assert p.down.abs().max() < 60 and p.up.abs().max() < 8  # A takes what B lacks where steps have no set size
        if step == 0:
            assert torch.equal(p.down, A) and p.up.any() != alternate
    assert max(losses) < 1.05 * losses[0] and losses[-1] < 0.8 * losses[0]


def test_what_is_stored_grows_with_the_sides_and_not_the_area():
    m, n, r = 60, 50, 2
    p = Pair(nn.Parameter(noise(r, n)), nn.Parameter(noise(m, r)), 1.0)
    for plus, share in ((True, 3), (False, 2)):
        optimizer = AltLoRA([p.down, p.up], [p], plus=plus)
        give(p, noise(m, n))
        optimizer.step()
        kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        assert sum(t.numel() for t in kept) == share * r * (m + n)
