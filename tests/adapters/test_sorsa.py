"""SORSA against its papers: the start, both regularizers and their gradients, the scale of gamma, export."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vislora import attach
from vislora.adapters.sorsa import SORSA
from vislora.errors import InputError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8))


def off(matrix):
    return matrix - torch.eye(matrix.shape[0])


def test_start_is_the_principal_part():
    model = net()
    adapter = attach(model, "sorsa", rank=4)
    t = dict(adapter.named_tensors())
    for name in ("0", "2"):
        A, B, S, weight = t[f"{name}.A"], t[f"{name}.B"], t[f"{name}.S"], model.get_submodule(name).weight
        assert off(A @ A.mT).norm() < 1e-5 and off(B.mT @ B).norm() < 1e-5
        values = torch.linalg.svdvals(weight)
        assert torch.allclose(S, values[:4], rtol=1e-5) and (S.diff() <= 0).all()
        rest = weight - B @ torch.diag(S) @ A
        assert (rest @ A.mT).norm() < 1e-5 * weight.norm() and (B.mT @ rest).norm() < 1e-5 * weight.norm()
        assert torch.isclose(torch.linalg.matrix_norm(rest, 2), values[4], rtol=1e-4)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-3, 0.1])
def test_regularizers_and_their_gradients(size):
    g = torch.Generator().manual_seed(1)
    A = torch.linalg.qr(torch.randn(12, 4, generator=g, dtype=torch.float64)).Q.mT.contiguous()
    B = torch.linalg.qr(torch.randn(20, 4, generator=g, dtype=torch.float64)).Q.contiguous()
    A, B = (x + size * torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (A, B))
    sites = [SimpleNamespace(A=A.requires_grad_(), B=B.requires_grad_())]
    gram = off(B.mT @ B)
    for word, value, gradient in (
        ("squared", off(A @ A.mT).norm() ** 2 + gram.norm() ** 2, 4 * B @ gram),
        ("sum", off(A @ A.mT).norm() + gram.norm(), 2 * B @ gram / gram.norm()),
        ("mean", (off(A @ A.mT).norm() + gram.norm()) / 2, B @ gram / gram.norm()),
        ("squared_mean", (off(A @ A.mT).norm() ** 2 + gram.norm() ** 2) / 2, 2 * B @ gram),
    ):
        penalty = SORSA(rank=4, gamma=1.0, regularizer=word).penalty(sites, 1.0)
        assert torch.isclose(penalty, value, rtol=1e-9)
        (got,) = torch.autograd.grad(penalty, B)
        assert torch.allclose(got, gradient, rtol=1e-6, atol=1e-12)
        if word == "sum" and size <= 1e-3:  # however small the deviation
            assert 1.9 < got.norm() < 2.1


def test_gradient_is_zero_and_finite_at_exact_orthonormality():
    A, B = torch.eye(4, 12).requires_grad_(), torch.eye(20, 4).requires_grad_()
    for word in ("mean", "squared"):
        penalty = SORSA(rank=4, gamma=1.0, regularizer=word).penalty([SimpleNamespace(A=A, B=B)], 1.0)
        assert all(not grad.any() for grad in torch.autograd.grad(penalty, (A, B)))


@pytest.mark.parametrize("accumulation", [1, 8])
def test_gamma_is_per_optimizer_step_in_units_of_the_largest_rate(accumulation):
    model = net()
    adapter = attach(model, "sorsa", rank=4, gamma=0.02)
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(1.1)
    start = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.param_groups(0.5))
    optimizer.param_groups[0]["initial_lr"], optimizer.param_groups[0]["lr"] = 0.5, 0.1  # later in a schedule
    adapter.bind(optimizer, 10)
    for _ in range(accumulation):
        (0 * model(torch.randn(2, 12)).sum() / accumulation).backward()
    adapter.penalty().backward()
    optimizer.step()
    for name, p in adapter.named_parameters():
        old = start[name]
        if name.endswith("S"):
            assert torch.equal(p, old)
            continue
        gram = off(old @ old.mT if name.endswith("A") else old.mT @ old)
        gradient = 2 * (gram @ old if name.endswith("A") else old @ gram) / gram.norm() / 4  # mean over 4 matrices
        assert torch.allclose(p, old - 0.1 * (0.02 / 0.5) * gradient, atol=1e-7)


def test_the_regularizer_keeps_bases_orthonormal_in_training():
    drift = {}
    for gamma in (0.0, 0.05):
        model = net()
        adapter = attach(model, "sorsa", rank=4, gamma=gamma, regularizer="squared")
        optimizer = torch.optim.SGD(adapter.param_groups(0.05))
        adapter.bind(optimizer, 100)
        x = torch.randn(32, 12, generator=torch.Generator().manual_seed(2))
        for _ in range(100):
            ((model(x) - x[:, :8] * 3).square().mean() + adapter.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
        drift[gamma] = max(off(p @ p.mT).norm() for n, p in adapter.named_parameters() if n.endswith("A"))
    assert drift[0.05] < 0.5 * drift[0.0]


def test_negative_values_merge_and_scale_cancels_at_the_start():
    model, x = net(), torch.randn(3, 12)
    before = model(x)
    adapter = attach(model, "sorsa", rank=4, alpha=8)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for n, p in adapter.named_parameters():
            if n.endswith("S"):
                p.neg_()
        free = model(x)
        with adapter.merged():
            assert torch.allclose(model(x), free, atol=1e-5)


def test_bad_options_are_refused():
    for options, word in (({"gamma": -1.0}, "gamma"), ({"regularizer": "l1"}, "l1"), ({"dropout": 0.1}, "dropout")):
        with pytest.raises(InputError, match=word):
            attach(net(), "sorsa", rank=4, **options)
