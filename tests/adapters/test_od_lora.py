"""OD-LoRA against its algorithm: gradients, rebalancing, continuous refreshes, the schedule, the warm-up, reloading."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import vislora
from vislora import attach, linalg
from vislora.adapters.od_lora import ODLoRA
from vislora.errors import InputError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16)).train()


def started(lr=0.01, total=100, rounds=2, steps=3, **options):
    """A prepared adapter, its optimizer, and a closure over fresh batches."""
    model = net()
    adapter = attach(model, "od_lora", rank=4, init_rounds=rounds, init_steps=steps, **options)
    optimizer = torch.optim.AdamW(adapter.param_groups(lr), weight_decay=0.0)
    adapter.bind(optimizer, total)
    g = torch.Generator().manual_seed(1)
    calls = []

    def closure():
        x, y = torch.randn(8, 12, generator=g), torch.randn(8, 16, generator=g)
        loss = (model(x) - y).square().mean()
        loss.backward()
        calls.append(loss.item())
        return loss

    adapter.prepare(closure)
    return model, adapter, optimizer, closure, calls


def tensors(adapter, site="0"):
    return {n.rpartition(".")[2]: t for n, t in adapter.named_tensors() if n.startswith(site + ".")}


def step(optimizer, closure, count=1):
    for _ in range(count):
        closure()
        optimizer.step()
        optimizer.zero_grad()


def test_after_the_warm_up_only_bases_are_left():
    model, adapter, optimizer, _, calls = started(rounds=3, steps=4)
    assert len(calls) == 12 and adapter.step == 0 and not optimizer.state
    x = torch.randn(5, 12)
    with torch.no_grad():
        assert torch.equal(model(x), net()(x))
    for site in ("0", "2"):
        t = tensors(adapter, site)
        assert not t["A"].any() and not t["B"].any() and t["plain"] == 0
        for Q in (t["Qa"], t["Qb"]):
            assert (Q.mT @ Q - torch.eye(4)).abs().max() < 1e-5 and not Q.requires_grad


def test_gradients_go_through_the_bases():
    model, adapter, *_ = started()
    t, s = tensors(adapter), 4 / 4**0.5
    x, g = torch.randn(5, 12), torch.randn(5, 20)
    G = g.mT @ x
    (model[0](x) * g).sum().backward()
    assert torch.allclose(t["A"].grad, s * t["Qb"].mT @ G, rtol=1e-4, atol=1e-4)
    assert torch.allclose(t["B"].grad, s * G @ t["Qa"], rtol=1e-4, atol=1e-4)
    before = adapter.deltas()["0"]
    with torch.no_grad():
        for k in "AB":
            t[k].sub_(0.01 * t[k].grad)
    Qa, Qb = t["Qa"], t["Qb"]
    moved = -0.01 * s * s * (G @ Qa @ Qa.mT + Qb @ Qb.mT @ G)
    assert torch.allclose(adapter.deltas()["0"] - before, moved, atol=1e-4)


def test_rebalancing_keeps_the_best_rank_r_part_in_equal_halves():
    _, adapter, optimizer, closure, _ = started(lr=0.05, steps=5)
    step(optimizer, closure, 4)
    seen = {}
    original = type(adapter.method).on_step

    def watch(self, handle, index, opt):
        seen.update({k: d.clone() for k, d in handle.deltas().items()})
        original(self, handle, index, opt)

    type(adapter.method).on_step = watch
    try:
        step(optimizer, closure)
    finally:
        type(adapter.method).on_step = original
    assert adapter.step == 5 and not optimizer.state
    s = 4 / 4**0.5
    for site, before in seen.items():
        after, t = adapter.deltas()[site], tensors(adapter, site)
        tail = torch.linalg.svdvals(before)[4:].norm()
        assert tail > 1e-4 and abs((before - after).norm() - tail) < 1e-5
        assert torch.allclose(s * t["Qb"] @ t["A"], s * t["B"] @ t["Qa"].mT, atol=1e-5)


def test_refreshes_are_continuous_and_idempotent():
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        delta = torch.randn(20, 3, generator=g) @ torch.randn(3, 12, generator=g)
        delta += 0.1 * torch.randn(20, 12, generator=g)
        U, S, V = linalg.top_svd(delta, 4)
        A, B = S[:, None] * V.mT / 2, U * S / 2
        Qa, Qb = linalg.orthonormal(A.mT), linalg.orthonormal(B)
        whole = U @ torch.diag(S) @ V.mT
        assert (Qb @ A + B @ Qa.mT - whole).norm() < 1e-5 * whole.norm()
        plain_a, plain_b = torch.linalg.qr(A.mT).Q, torch.linalg.qr(B).Q
        assert (linalg.orthonormal(Qa) - Qa).norm() < 1e-5 and (linalg.orthonormal(Qb) - Qb).norm() < 1e-5
        if seed == 0:  # what the signs are for
            assert (plain_b @ A + B @ plain_a.mT - whole).norm() > 0.1 * whole.norm()


@pytest.mark.parametrize("total, count", [(1000, 447), (100, None), (103, None)])
def test_the_five_phase_schedule(total, count):
    method = ODLoRA(init_steps=10)
    found = [t for t in range(11, total + 1) if method.refreshes(t, total)]
    assert found == [t for t in range(11, total + 1) if t % math.ceil(5 * t / total) == 0]
    assert count is None or len(found) == count
    assert set(range(11, total // 5 + 1)) <= set(found)


def test_bases_follow_the_factors_in_training():
    _, adapter, optimizer, closure, _ = started(total=40, steps=3)
    for t in range(1, 41):
        held = {s: tensors(adapter, s)["Qa"].clone() for s in ("0", "2")}
        step(optimizer, closure)
        for site in ("0", "2"):
            now = tensors(adapter, site)
            if t == 3 or (t > 3 and t % math.ceil(5 * t / 40) == 0):
                assert (now["Qa"].mT @ now["Qa"] - torch.eye(4)).abs().max() < 1e-5
                inside = now["Qb"] @ (now["Qb"].mT @ now["B"])
                assert (now["B"] - inside).norm() < 1e-5 * now["B"].norm()
            else:
                assert torch.equal(now["Qa"], held[site])


def test_reload_between_refreshes_is_exact(tmp_path):
    model, adapter, optimizer, closure, _ = started(total=40, steps=3)
    step(optimizer, closure, 39)
    deltas = adapter.deltas()
    assert max(torch.linalg.matrix_rank(d, atol=1e-6) for d in deltas.values()) > 4
    adapter.save(tmp_path)
    adapter.detach()
    again = vislora.load(model, tmp_path)
    assert all(torch.equal(d, deltas[k]) for k, d in again.deltas().items())


def test_the_start_needs_an_optimizer():
    adapter = attach(net(), "od_lora", rank=4)
    with pytest.raises(InputError, match="bind"):
        adapter.prepare(lambda: torch.zeros(()))


def test_bases_that_are_made_together_are_those_made_one_by_one():
    g = torch.Generator().manual_seed(3)
    given = [torch.randn(n, 3, generator=g, dtype=kind) for n, kind in
             ((9, torch.float32), (7, torch.float32), (9, torch.float64), (9, torch.float32))]  # fmt: skip
    for one, x in zip(linalg.orthonormal_each(given), given, strict=True):
        assert one.dtype == x.dtype and torch.equal(one, linalg.orthonormal(x))
