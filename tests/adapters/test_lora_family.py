"""What is special about LoRA+, OLoRA, LoRA-XS and rsLoRA: their starts, scales, rates and gradients."""

from __future__ import annotations

import torch
from torch import nn

from vislora import attach


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8))


def test_lora_starts_kaiming_uniform_and_moves_only_its_outer_factor():
    model = nn.Sequential(nn.Linear(4000, 30))
    adapter = attach(model, "lora", rank=16)
    A = dict(adapter.named_parameters())["0.A"]
    assert abs(A.var().item() * 3 * 4000 - 1) < 0.02 and A.abs().max() <= 1 / 4000**0.5
    x, g = torch.randn(5, 4000), torch.randn(5, 30)
    (model(x) * g).sum().backward()
    p = dict(adapter.named_parameters())
    assert not p["0.A"].grad.any() and torch.allclose(p["0.B"].grad, g.mT @ x @ A.mT, rtol=1e-3, atol=1e-4)


def test_rank_stabilised_scale():
    out = {}
    for method in ("lora", "rslora"):
        model = net()
        adapter = attach(model, method, rank=4, alpha=4, seed=3)
        with torch.no_grad():
            for n, p in adapter.named_parameters():
                p.fill_(0.1) if n.endswith("B") else None
        out[method] = adapter.deltas()
    for name, delta in out["lora"].items():
        assert torch.allclose(out["rslora"][name], 2.0 * delta)


def test_loraplus_moves_the_outer_factor_faster():
    model = net()
    adapter = attach(model, "lora_plus", rank=4, loraplus_lr_ratio=8.0)
    groups = adapter.param_groups(lr=0.01)
    assert sorted(group["lr"] for group in groups) == [0.01, 0.08]
    optimizer = torch.optim.SGD(groups)
    start = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    with torch.no_grad():
        for n, p in adapter.named_parameters():
            p.add_(0.1)
            start[n] = p.clone()
    model(torch.randn(6, 12)).square().sum().backward()
    optimizer.step()
    for n, p in adapter.named_parameters():
        rate = 0.08 if n.endswith("B") else 0.01
        assert torch.allclose(p, start[n] - rate * p.grad, atol=1e-7)


def test_olora_starts_from_the_qr_decomposition():
    model = net()
    adapter = attach(model, "olora", rank=4)
    t = dict(adapter.named_parameters())
    for name in ("0", "2"):
        Q, R = torch.linalg.qr(model.get_submodule(name).weight)
        A, B = t[f"{name}.A"], t[f"{name}.B"]
        assert torch.equal(B, Q[:, :4]) and torch.equal(A, R[:4])
        assert (B.mT @ B - torch.eye(4)).norm() < 1e-5 and not A.tril(-1).any()


def test_lora_xs_trains_a_square_between_frozen_principal_vectors():
    model = net()
    adapter = attach(model, "lora_xs", rank=4, alpha=8)
    t = dict(adapter.named_tensors())
    x, g = torch.randn(5, 12), torch.randn(5, 20)
    (model[0](x) * g).sum().backward()
    A, B, R, weight = t["0.A"], t["0.B"], t["0.R"], model[0].weight
    values = torch.linalg.svdvals(weight)
    assert torch.allclose(A @ A.mT, torch.diag(values[:4] ** 2), atol=1e-4)
    assert (B.mT @ B - torch.eye(4)).norm() < 1e-5
    assert torch.allclose(R.grad, 2.0 * B.mT @ (g.mT @ x) @ A.mT, rtol=1e-4, atol=1e-5)
    delta = adapter.deltas()["0"]
    assert 0 < torch.linalg.matrix_norm(delta, 2) < 1e-4 * values[0]
    with torch.no_grad():
        R.copy_(torch.eye(4) / 2)
    U, S, Vh = torch.linalg.svd(weight)
    assert torch.allclose(adapter.deltas()["0"], U[:, :4] @ torch.diag(S[:4]) @ Vh[:4], atol=1e-5)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 16


def test_randomised_svd_finds_the_principal_subspace():
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(60, 60)).Q, torch.linalg.qr(torch.randn(60, 60)).Q
    model = nn.Sequential(nn.Linear(60, 60, bias=False))
    model[0].weight.data = U @ torch.diag(0.8 ** torch.arange(60.0)) @ V.mT
    state = torch.random.get_rng_state()
    t = dict(attach(model, "pissa", rank=4, niter=4).named_tensors())
    assert torch.equal(state, torch.random.get_rng_state())
    cosines = torch.linalg.svdvals(torch.linalg.qr(t["0.A"].mT).Q.mT @ V[:, :4])
    assert (1 - cosines).max() < 1e-4
    assert torch.allclose(torch.linalg.svdvals(t["0.B"] @ t["0.A"])[:4], 0.8 ** torch.arange(4.0), rtol=1e-3)
