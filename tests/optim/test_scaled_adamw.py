"""ScaledAdamW: what its preconditioned gradients are, and that AdamW sees them."""

from __future__ import annotations

import pytest
import torch
from lora_pairs import M, N, R, give, noise, off, onto, pair, transformed, values
from torch import nn

from vislora import attach, optim
from vislora.optim import ScaledAdamW


def treated(p, **settings):
    """The gradients that AdamW is given, and the change of the product under a gradient step by them."""
    ScaledAdamW([p.down, p.up], [p], **settings).treat([p])
    return p.scale * (p.up @ p.down.grad + p.up.grad @ p.down)


def test_a_gradient_step_moves_the_product_by_both_projections():
    p, G = pair(scale=1.5), noise(M, N)
    A, B = values(p)
    expected = 1.5**2 * (onto(B) @ G + G @ onto(A.mT))
    assert off(treated(give(p, G), damping=0.0), expected) < 1e-12


def test_a_gradient_step_depends_on_the_product_alone():
    p, G = pair(), noise(M, N)
    other = transformed(p)
    assert off(other.down, p.down) > 0.1
    assert off(treated(give(other, G), damping=0.0), treated(give(p, G), damping=0.0)) < 1e-10


def test_adamw_runs_on_gradients_preconditioned_by_the_old_factors():
    p, twin, d = pair(), pair(), 1e-3
    settings = {"lr": 0.3, "betas": (0.8, 0.9), "weight_decay": 0.1}
    optimizer = ScaledAdamW([p.down, p.up], [p], damping=d, **settings)
    plain = torch.optim.AdamW([twin.down, twin.up], **settings)
    eye = torch.eye(R, dtype=torch.float64)
    for step in range(4):
        for each in (p, twin):
            give(each, noise(M, N, seed=step))
        A, B = values(twin)
        twin.down.grad = torch.linalg.solve(B.mT @ B + d * eye, twin.down.grad)
        twin.up.grad = torch.linalg.solve(A @ A.mT + d * eye, twin.up.grad.mT).mT
        optimizer.step()
        plain.step()
        assert off(p.down, twin.down) < 1e-10 and off(p.up, twin.up) < 1e-10


def test_bf16_factors_get_the_float32_answer_rounded():
    low, high = pair(dtype=torch.bfloat16), pair(dtype=torch.bfloat16)
    give(low, noise(M, N))
    A, B = (t.float() for t in values(high))
    gA, gB = low.down.grad.float(), low.up.grad.float()
    treated(low, damping=1e-6)
    eye = 1e-6 * torch.eye(R)
    for found, raw, expected in (
        (low.down.grad, gA, torch.linalg.solve(B.mT @ B + eye, gA)),
        (low.up.grad, gB, torch.linalg.solve(A @ A.mT + eye, gB.mT).mT),
    ):
        assert found.dtype == torch.bfloat16
        assert off(found.float(), expected) < 2**-8  # half a unit in bf16's last place
        assert off(found.float(), raw) > 0.5  # which is what plain AdamW would see


def test_a_zero_start_is_finite():
    p = pair(dtype=torch.float32)
    with torch.no_grad():
        p.up.zero_()
    optimizer = ScaledAdamW([p.down, p.up], [p], lr=1e-2, weight_decay=0.0)
    A = p.down.detach().clone()
    give(p, noise(M, N))
    assert not p.down.grad.any()
    optimizer.step()
    assert torch.equal(p.down, A) and torch.allclose(p.up.abs(), torch.full_like(p.up, 1e-2), rtol=1e-4)
    for step in range(20):
        give(p, noise(M, N, seed=step))
        optimizer.step()
        assert (p.down - A).abs().max() < 0.5 and p.up.abs().max() < 0.5


def test_a_huge_damping_leaves_adamw_with_a_larger_epsilon():
    p, twin, d, eps = pair(), pair(), 1e8, 1e-6
    optimizer = ScaledAdamW([p.down, p.up], [p], damping=d, eps=eps)
    plain = torch.optim.AdamW([twin.down, twin.up], eps=eps * d)
    before = values(p)
    for step in range(3):
        for each, one in ((p, optimizer), (twin, plain)):
            give(each, noise(M, N, seed=step))
            one.step()
    for now, other, start in zip(values(p), values(twin), before, strict=True):
        assert off(now - start, other - start) < 1e-6


@pytest.mark.parametrize("name", ["scaled_adamw", "lora_pro", "alt_lora"])
def test_other_parameters_get_adamw_to_the_bit(name):
    found = {}
    for each in (name, "adamw"):
        torch.manual_seed(0)
        adapter = attach(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)), "dora", rank=2)
        optimizer = optim.build(each, adapter, lr=0.1, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.2, fused=False)
        for step in range(5):
            for i, p in enumerate(adapter.parameters()):
                p.grad = noise(*p.shape, seed=100 * step + i).float()
            optimizer.step()
        found[each] = {k: p.detach() for k, p in adapter.named_parameters()}
    for key, value in found["adamw"].items():
        assert torch.equal(value, found[name][key]) == key.endswith(".c"), key
