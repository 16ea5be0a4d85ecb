"""The papers' ablations, each by the equation that defines it, and that nothing of them acts by default."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import vislora
from vislora import attach, linalg
from vislora.adapters.adalora import AdaLoRA
from vislora.adapters.lora_sb import LoRASB
from vislora.adapters.od_lora import ODLoRA
from vislora.adapters.rslora import RsLoRA
from vislora.adapters.sorsa import SORSA
from vislora.errors import InputError
from vislora.prepare import weight_gradients


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16)).train()


def batches(count):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 12, generator=g), torch.randn(6, 16, generator=g)) for _ in range(count)]


def started(method, lr=0.01, total=40, initial_lr=None, **options):
    """A prepared adapter, and `step` that trains on batch after batch."""
    model = net()
    adapter = attach(model, method, **{"rank": 4, **options})
    optimizer = torch.optim.AdamW(adapter.param_groups(lr), weight_decay=0.0)
    for group in optimizer.param_groups:
        group["initial_lr"] = initial_lr or lr
    adapter.bind(optimizer, total)
    queue = iter(batches(500))

    def closure():
        x, y = next(queue)
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    def step(count=1):
        for _ in range(count):
            closure()
            optimizer.step()
            optimizer.zero_grad()

    adapter.prepare(closure)
    return model, adapter, optimizer, step


def tensors(adapter, site="0"):
    return {n.rpartition(".")[2]: t for n, t in adapter.named_tensors() if n.startswith(site + ".")}


def off(gram):
    return (gram - torch.eye(len(gram))).abs().max()


@pytest.mark.parametrize(
    "cls, defaults",
    [
        (RsLoRA, {"optimal_gradient": False}),
        (ODLoRA, {"form": "full"}),
        (LoRASB, {"init_lr_divisor": None, "init_from": "update", "init_noise": 0.0, "identity_core": False,
                  "niter": None, "bfloat16": False}),
        (SORSA, {"gamma": 4e-4}),
    ],
)  # fmt: skip
def test_ablations_are_off_by_default(cls, defaults):
    assert {k: getattr(cls(), k) for k in defaults} == defaults
    name = cls.__module__.rpartition(".")[2]
    plain, said = (started(name, **words)[1] for words in ({}, defaults))
    said = dict(said.named_tensors())
    assert all(torch.equal(tensor, said[key]) for key, tensor in plain.named_tensors())


# ---- OD-LoRA, table 4 and appendix I


def test_rslora_with_optimal_gradient_has_orthonormal_factors_on_the_schedule():
    model, adapter, _, step = started("rslora", optimal_gradient=True, alpha=4.0, total=40)
    with torch.no_grad():
        assert torch.equal(model(torch.ones(2, 12)), net()(torch.ones(2, 12)))
    for t in range(1, 41):
        held = tensors(adapter)["B"].clone()
        step()
        A, B = tensors(adapter)["A"].detach(), tensors(adapter)["B"].detach()
        moved = not torch.equal(B, held)
        renewed = max(off(A @ A.mT), off(B.mT @ B)) < 1e-5
        assert moved and renewed == (t % math.ceil(5 * t / 40) == 0), t
    assert torch.allclose(torch.linalg.svdvals(adapter.deltas()["0"])[:4], torch.full((4,), 4.0 / 2.0), atol=1e-4)


def test_rslora_with_optimal_gradient_leaves_a_layer_without_gradient_alone():
    adapter = attach(net(), "rslora", rank=4, optimal_gradient=True)
    optimizer = torch.optim.SGD(adapter.param_groups(0.1))
    adapter.bind(optimizer, 40)
    sum(p.sum() * 0 for p in adapter.parameters()).backward()
    optimizer.step()
    assert all(not d.any() for d in adapter.deltas().values())


def test_limited_capacity_trains_the_bases_themselves():
    model, adapter, optimizer, step = started("od_lora", form="limited_capacity", init_rounds=2, init_steps=3)
    _, full, *_ = started("od_lora", init_rounds=2, init_steps=3)
    s = 4 / 4**0.5
    for site in ("0", "2"):  # the same warm-up, then dW = s Qb Qa^T
        bases = tensors(full, site)
        assert torch.equal(tensors(adapter, site)["B"], bases["Qb"])
        assert torch.allclose(adapter.deltas()[site], s * bases["Qb"] @ bases["Qa"].mT, atol=1e-6)
    x, g = torch.randn(5, 12), torch.randn(5, 20)
    (model[0](x) * g).sum().backward()
    t, G = tensors(adapter), g.mT @ x
    assert torch.allclose(t["A"].grad, s * t["B"].mT @ G, rtol=1e-4, atol=1e-4)
    assert torch.allclose(t["B"].grad, s * G @ t["A"].mT, rtol=1e-4, atol=1e-4)
    optimizer.zero_grad()
    for index in range(1, 41):
        step()
        A, B = tensors(adapter)["A"].detach(), tensors(adapter)["B"].detach()
        due = index == 3 or (index > 3 and index % math.ceil(5 * index / 40) == 0)
        assert (max(off(A @ A.mT), off(B.mT @ B)) < 1e-5) == due, index
        if due:
            assert torch.allclose(torch.linalg.svdvals(adapter.deltas()["0"])[:4], torch.full((4,), s), atol=1e-4)


def test_suboptimal_gradient_goes_through_bases_scaled_by_the_diagonal_of_r(monkeypatch):
    model, adapter, optimizer, step = started("od_lora", form="suboptimal_gradient", init_rounds=2, init_steps=3)
    assert off(tensors(adapter)["Qa"].mT @ tensors(adapter)["Qa"]) < 1e-5 and not adapter.deltas()["0"].any()
    step(2)
    seen, original = {}, ODLoRA.on_step

    def watch(self, handle, index, opt):
        seen.update({k: d.clone() for k, d in handle.deltas().items()})
        original(self, handle, index, opt)

    monkeypatch.setattr(ODLoRA, "on_step", watch)
    step()
    for site, before in seen.items():  # the rebalancing keeps dW's best rank-4 part
        tail = torch.linalg.svdvals(before)[4:].norm()
        assert abs((adapter.deltas()[site] - before).norm() - tail) < 1e-5
    step()  # and the next step renews
    t, s = tensors(adapter), 4 / 4**0.5
    for basis, factor in (("Qa", t["A"].detach().mT), ("Qb", t["B"].detach())):
        Q, R = torch.linalg.qr(factor)  # Q diag(R) is free of the signs of either
        assert torch.allclose(t[basis], Q * R.diagonal(), atol=1e-6)
    x, g = torch.randn(5, 12), torch.randn(5, 20)
    (model[0](x) * g).sum().backward()
    G = g.mT @ x
    assert torch.allclose(t["A"].grad, s * t["Qb"].mT @ G, rtol=1e-4, atol=1e-5)
    assert torch.allclose(t["B"].grad, s * G @ t["Qa"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(adapter.deltas()["0"], s * (t["Qb"] @ t["A"] + t["B"] @ t["Qa"].mT), atol=1e-6)
    assert max(off(t["Qa"].mT @ t["Qa"]), off(t["Qb"].mT @ t["Qb"])) > 0.1


@pytest.mark.parametrize("method, options", [
    ("od_lora", {"form": "limited_capacity"}), ("od_lora", {"form": "suboptimal_gradient"}),
    ("rslora", {"optimal_gradient": True}),
])  # fmt: skip
def test_ablations_are_saved_and_loaded(method, options, tmp_path):
    model, adapter, _, step = started(method, **options)
    step(17)
    deltas = adapter.deltas()
    adapter.save(tmp_path)
    adapter.detach()
    again = vislora.load(model, tmp_path)
    assert again.method == dataclasses.replace(type(adapter.method)(rank=4), **options)
    assert all(torch.equal(d, deltas[k]) for k, d in again.deltas().items())


# ---- LoRA-SB, table 4, appendix D.2, and the authors' code


def first_step(size):
    adapter = attach(net(), "lora", rank=2)
    x, y = batches(1)[0]

    def closure():
        loss = (next(iter(adapter.roots.values()))(x) - y).square().mean()
        loss.backward()
        return loss

    return {site.name: -size * g.sign() for _, site, g in weight_gradients(adapter, closure, 1)}


def best(matrix, rank=4):
    U, S, V = linalg.top_svd(matrix, rank)
    return U @ torch.diag(S) @ V.mT


@pytest.mark.parametrize("lr, initial, options, size", [
    (0.01, None, {}, 0.01),
    (0.01, 0.02, {}, 0.01),
    (0.01, 0.02, {"init_lr": 0.3}, 0.3),
    (0.01, 0.02, {"init_lr_divisor": 8.0}, 0.02 / 8),
])  # fmt: skip
def test_step_size_of_the_first_step(lr, initial, options, size):
    _, adapter, *_ = started("lora_sb", lr=lr, initial_lr=initial, **options)
    for name, step in first_step(size).items():
        assert torch.allclose(adapter.deltas()[name], best(step), atol=1e-4 * size)


def test_identity_core_puts_the_values_into_the_outer_basis():
    _, adapter, *_ = started("lora_sb", identity_core=True, alpha=8.0, init_lr=0.1)
    for name, step in first_step(0.1).items():
        t = tensors(adapter, name)
        assert torch.equal(t["R"], torch.eye(4) / 2)
        assert off(t["A"] @ t["A"].mT) < 1e-5
        assert torch.allclose(t["B"].mT @ t["B"], torch.diag(torch.linalg.svdvals(step)[:4] ** 2), atol=1e-4)
        assert torch.allclose(adapter.deltas()[name], best(step), atol=1e-5)


def test_noise_is_added_to_the_first_step_before_its_svd():
    exact, noisy, again, loud = (
        started("lora_sb", init_lr=0.1, init_noise=size)[1].deltas() for size in (0.0, 0.02, 0.02, 1e3)
    )
    for name, step in first_step(0.1).items():
        assert torch.equal(noisy[name], again[name])
        # the best rank-4 part moves, by about the noise's own size in four directions of each side and not by more
        assert 0.02 < (noisy[name] - exact[name]).norm() < 0.02 * step.numel() ** 0.5 * 3
        spread = loud[name].norm() / 1e3  # of a Gaussian matrix, whose four leading values carry most of these
        assert 0.5 * step.numel() ** 0.5 < spread < step.numel() ** 0.5 * 1.2


def test_kaiming_start_is_random_and_asks_for_no_data():
    model = net()
    adapter = attach(model, "lora_sb", rank=12, init_from="kaiming", seed=3)
    state = torch.random.get_rng_state()
    adapter.prepare(lambda: pytest.fail("the closure was called"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(off(t["A"] @ t["A"].mT) < 1e-5 for t in (tensors(adapter, "0"), tensors(adapter, "2")))
    spread = adapter.deltas()["0"].square().mean()  # rank 12 holds all of a 20 x 12 matrix
    assert 0.7 < spread * 12 / 2 < 1.3
    other = attach(net(), "lora_sb", rank=12, init_from="kaiming", seed=4)
    other.prepare(lambda: pytest.fail("the closure was called"))
    assert not torch.equal(adapter.deltas()["0"], other.deltas()["0"])


def test_randomised_svd_is_of_the_bare_rank(monkeypatch):
    probes, original = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **words: probes.append(shape) or original(*shape, **words))
    adapter = started("lora_sb", niter=10, init_lr=0.1)[1]
    assert (12, 4) in probes and (20, 4) in probes  # as many directions as the rank, none to spare
    monkeypatch.undo()
    exact = started("lora_sb", init_lr=0.1)[1]
    for name, step in first_step(0.1).items():
        t, tail = tensors(adapter, name), torch.linalg.svdvals(step)[4:].norm()
        assert off(t["A"] @ t["A"].mT) < 1e-5
        assert not torch.equal(adapter.deltas()[name], exact.deltas()[name])
        assert (step - adapter.deltas()[name]).norm() <= 1.01 * tail


def test_bfloat16_storage_loses_small_steps(tmp_path):
    model, adapter, optimizer, step = started("lora_sb", bfloat16=True, init_lr=0.1)
    t, exact = tensors(adapter), tensors(started("lora_sb", init_lr=0.1)[1])
    for name, value in t.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, exact[name].bfloat16())
    error = max(off(t["A"].float() @ t["A"].float().mT), off(t["B"].float().mT @ t["B"].float()))
    assert 1e-4 < error < 1e-2
    held = t["R"].detach().clone()
    diagonal = held.diagonal().float()
    with torch.no_grad():
        t["R"].diagonal().add_((diagonal / 1000).bfloat16())
    assert torch.equal(t["R"], held)
    step(3)
    assert not torch.equal(t["R"], held) and t["R"].isfinite().all()
    deltas = adapter.deltas()
    adapter.save(tmp_path)
    adapter.detach()
    again = vislora.load(model, tmp_path)  # the numbers are held exactly; a file is always read as float32
    assert all(torch.equal(d, deltas[k]) for k, d in again.deltas().items())
    resumed = attach(net(), "lora_sb", rank=4, bfloat16=True)
    resumed.load_tensors(dict(again.named_tensors()))
    assert all(p.dtype == torch.bfloat16 for p in resumed.parameters())
    assert all(torch.equal(d, deltas[k]) for k, d in resumed.deltas().items())


def test_bad_ablations_are_refused():
    for method, options, word in (
        ("od_lora", {"form": "half"}, "half"),
        ("lora_sb", {"init_from": "zeros"}, "zeros"),
        ("lora_sb", {"init_noise": -1.0}, "-1.0"),
        ("lora_sb", {"init_noise": 0.1, "init_from": "kaiming"}, "kaiming"),
        ("lora_sb", {"init_lr": 0.1, "init_from": "kaiming"}, "kaiming"),
        ("lora_sb", {"init_lr": 0.1, "init_lr_divisor": 2.0}, "init_lr_divisor"),
        ("lora_sb", {"init_lr_divisor": 0.0}, "0.0"),
        ("lora_sb", {"niter": -1}, "-1"),
    ):
        with pytest.raises(InputError, match=word):
            attach(net(), method, rank=4, **options)
    unbound = attach(net(), "lora_sb", rank=4, init_lr_divisor=2.0)
    with pytest.raises(InputError, match="bind"):
        unbound.prepare(lambda: torch.zeros(()))


# ---- SORSA without its regularizer (paper 001, section 3), AdaLoRA without its penalty


@pytest.mark.parametrize("method, cls, options", [
    ("sorsa", SORSA, {"gamma": 0.0}), ("adalora", AdaLoRA, {"orth_reg_weight": 0.0}),
])  # fmt: skip
def test_a_penalty_of_strength_zero_is_zero_and_computes_nothing(method, cls, options, monkeypatch):
    adapter = attach(net(), method, rank=4, **options)
    monkeypatch.setattr(cls, "penalty", lambda *_: pytest.fail("the penalty was computed"))
    assert not adapter.method.has_penalty() and cls(rank=4).has_penalty()
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(math.inf)  # 0 times it would be NaN
    penalty = adapter.penalty()  # nor is bind asked for
    assert penalty.item() == 0.0 and not penalty.requires_grad
