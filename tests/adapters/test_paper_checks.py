"""Claims that several methods make alike, and those of single papers that need more than one method's file to say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vislora import attach, linalg, methods
from vislora.adapters import get
from vislora.adapters.od_lora import ODLoRA
from vislora.prepare import weight_gradients
from vislora.testing import Subject, hosts
from vislora.testing.subject import close


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16)).train()


def batch(seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, 12, generator=g), torch.randn(6, 16, generator=g)


def loss_of(model, seed=1):
    x, y = batch(seed)
    kind = next(model.parameters()).dtype
    return (model(x.to(kind)) - y.to(kind)).square().mean()


def started(method, model=None, total=20, lr=1e-2, **options):
    model = model or net()
    adapter = attach(model, method, **{"rank": 4, **options})
    optimizer = torch.optim.SGD(adapter.param_groups(lr))
    adapter.bind(optimizer, total)

    def closure():
        loss = loss_of(model)
        loss.backward()
        return loss

    adapter.prepare(closure)
    return model, adapter, optimizer, closure


def tensors(adapter, site="0"):
    return {n.rpartition(".")[2]: t for n, t in adapter.named_tensors() if n.startswith(site + ".")}


def dense_gradients(model, data=(1,)):
    """dL/dW of the mean loss over batches, of a bare model."""
    for p in model.parameters():
        p.requires_grad_(True)
    (sum(loss_of(model, seed) for seed in data) / len(data)).backward()
    return {name: model.get_submodule(name).weight.grad for name in ("0", "2")}


def shake(adapter, size=0.1, seed=5):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=g).to(p.dtype))


# ---- every method


@pytest.mark.parametrize("method", methods())
def test_hook_merged_weight_and_plain_factors_agree_to_1e_5(method):
    s = Subject(get(method)(rank=4, **get(method).quick), hosts()[0])
    adapter = s.attach()
    s.train(adapter)
    hooked = s.run()
    with adapter.merged():
        close(hooked, s.run(), 1e-5)
    if "magnitude" in get(method).roles.values():
        return
    plain = s.host.build(0).eval()
    for name, _, _, update in adapter.site_updates():  # of rank r or 2 r, on the original weight
        up, down = update.factors()
        declared = 2 if update.minus is not None or method == "od_lora" else 1
        assert method in ("adalora", "vera") or up.shape[1] == declared * s.method.rank
        layer = plain.get_submodule(name)
        layer.register_forward_hook(lambda _, args, out, up=up, down=down: out + args[0] @ down.mT @ up.mT)
    close(hooked, s.run(model=plain), 1e-5)


@pytest.mark.parametrize("method", ["lora_ga", "od_lora", "pissa", "olora", "sorsa"])
def test_the_start_on_a_bf16_base_is_the_base_bit_for_bit(method):
    model = net().to(torch.bfloat16)
    x = batch()[0].to(torch.bfloat16)
    before = model(x)
    adapter = started(method, model)[1]
    assert torch.equal(model(x), before)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


# ---- NB-LoRA


@pytest.mark.parametrize("p", [1, 2, 4, math.inf])
def test_nb_lora_stays_in_its_ball_over_a_hundred_wild_steps(p):
    model = net()
    adapter = attach(model, "nb_lora", rank=4, p=p, delta=2.0)
    optimizer = torch.optim.AdamW(adapter.param_groups(1.0), weight_decay=0.0)
    adapter.bind(optimizer, 100)
    g = torch.Generator().manual_seed(2)
    largest = 0.0
    for _ in range(100):
        for parameter in adapter.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=g)
        optimizer.step()
        for delta in adapter.deltas().values():
            norm = linalg.schatten(torch.linalg.svdvals(delta), p).item()
            assert norm <= 2.0 * (1 + 1e-5)
            largest = max(largest, norm)
    assert largest > 0.1


# ---- OD-LoRA


def test_od_lora_gradients_and_step_to_1e_6():
    model, adapter, *_ = started("od_lora", net().double(), init_rounds=2, init_steps=2)
    shake(adapter)
    t, s = tensors(adapter), 4 / 4**0.5
    g = torch.Generator().manual_seed(3)
    x = torch.randn(5, 12, generator=g, dtype=torch.float64)
    out = torch.randn(5, 20, generator=g, dtype=torch.float64)
    (model[0](x) * out).sum().backward()
    G, Qa, Qb = out.mT @ x, t["Qa"], t["Qb"]
    close(t["A"].grad, s * Qb.mT @ G, 1e-6)
    close(t["B"].grad, s * G @ Qa, 1e-6)

    def dense():
        return s * (Qb @ t["A"] + t["B"] @ Qa.mT).detach()

    before = dense()
    with torch.no_grad():
        t["A"].sub_(0.01 * t["A"].grad)
        t["B"].sub_(0.01 * t["B"].grad)
    close(dense() - before, -0.01 * s * s * (G @ Qa @ Qa.mT + Qb @ Qb.mT @ G), 1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_od_lora_renewal_right_after_the_rebalancing_changes_nothing(seed):
    _, adapter, optimizer, closure = started("od_lora", init_rounds=2, init_steps=3, total=100)
    shake(adapter, 0.3, seed)
    adapter.method.on_step(adapter, 3, optimizer)
    before, bases = adapter.deltas(), tensors(adapter)["Qa"].clone()
    for _ in range(2):
        adapter.method.on_step(adapter, 4, optimizer)
        for name, delta in adapter.deltas().items():
            assert (delta - before[name]).norm() < 1e-5 * before[name].norm()
        assert (tensors(adapter)["Qa"] - bases).abs().max() < 1e-5


def test_od_lora_decomposes_and_forgets_once_a_round_and_once_more(monkeypatch):
    seen = {"svd": 0, "forget": 0, "qr": 0}

    def counted(owner, name, key):
        original = getattr(owner, name)

        def call(*args, **words):
            seen[key] += 1
            return original(*args, **words)

        monkeypatch.setattr(owner, name, call)

    counted(linalg, "product_svd", "svd")
    counted(linalg, "orthonormal", "qr")
    counted(ODLoRA, "_forget", "forget")
    _, adapter, optimizer, closure = started("od_lora", init_rounds=5, init_steps=10, total=100)
    for _ in range(100):
        closure()
        optimizer.step()
        optimizer.zero_grad()
    renewals = sum(t % math.ceil(5 * t / 100) == 0 for t in range(11, 101))
    layers, shapes = 2, 3  # of factors; those of one shape are renewed in one call
    assert seen == {"svd": 6 * layers, "forget": 6, "qr": shapes * renewals}


# ---- LoRA-SB


@pytest.mark.parametrize("identity_core", [False, True])
def test_lora_sb_gradient_is_the_projected_one_where_bases_are_orthonormal(identity_core):
    model, adapter, *_ = started("lora_sb", net().double(), init_lr=0.1, identity_core=identity_core)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(5, 12, generator=g, dtype=torch.float64)
    out = torch.randn(5, 20, generator=g, dtype=torch.float64)
    (model[0](x) * out).sum().backward()
    t, G = tensors(adapter), out.mT @ x
    B, R, A = t["B"], t["R"], t["A"]
    close(R.grad, B.mT @ G @ A.mT, 1e-6)
    inner, outer = (torch.linalg.inv(gram) for gram in (B.mT @ B, A @ A.mT))
    projected = B @ inner @ B.mT @ G @ A.mT @ outer @ A
    close(B @ (inner @ R.grad @ outer) @ A, projected, 1e-10)  # theorem 2's gradient
    off = (B @ R.grad @ A - projected).norm() / projected.norm()
    assert off > 0.1 if identity_core else off < 1e-5  # bases come from float32 gradients


def test_lora_sb_first_step_is_adamws_and_lowers_the_loss():
    gradients, dense = dense_gradients(net()), net()
    optimizer = torch.optim.AdamW([dense[0].weight, dense[2].weight], lr=1e-3, weight_decay=0.0, eps=1e-30)
    loss_of(dense).backward()
    optimizer.step()
    for name, gradient in gradients.items():
        moved = dense.get_submodule(name).weight - net().get_submodule(name).weight
        assert (moved + 1e-3 * gradient.sign()).abs().max() < 3e-6
    model, adapter, *_ = started("lora_sb", init_lr=1e-3, rank=12)
    with torch.no_grad():
        base, ahead = loss_of(net()).item(), loss_of(model).item()
        for p in adapter.parameters():
            p.neg_()
        behind = loss_of(model).item()
    assert ahead < base < behind


def test_lora_sb_trains_r_squared_numbers_a_layer_and_nothing_else():
    model, adapter, optimizer, closure = started("lora_sb")
    fixed = {n: t.clone() for n, t in adapter.named_tensors() if not n.endswith("R")}
    weights = {k: v.clone() for k, v in model.state_dict().items() if "vislora" not in k}
    for _ in range(10):
        closure()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 4**2
    now = dict(adapter.named_tensors())
    assert all(torch.equal(t, now[n]) for n, t in fixed.items())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in weights.items())


def test_gathering_holds_one_layers_gradient_at_a_time():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(6))).train()
    adapter = attach(model, "lora", rank=2)
    held = []
    for layer in model:
        layer.register_full_backward_hook(lambda *_: held.append(sum(x.weight.grad is not None for x in model)))

    def closure():
        loss = model(torch.ones(2, 12, requires_grad=True)).square().mean()
        loss.backward()
        return loss

    assert len(list(weight_gradients(adapter, closure, 2))) == 6
    assert len(held) == 12 and max(held) <= 1


# ---- LoRA-GA


def test_lora_ga_bases_and_how_near_its_first_step_comes_to_the_gradient():
    _, adapter, *_ = started("lora_ga")
    _, plain, *_ = started("lora")
    for name, gradient in dense_gradients(net()).items():
        U, _, V = linalg.top_svd(gradient, 8)
        t, lora = tensors(adapter, name), tensors(plain, name)
        size = len(gradient) ** 0.25 / 4
        assert torch.allclose(t["A"].mT @ t["A"] / size**2, V[:, :4] @ V[:, :4].mT, atol=1e-4)
        assert (t["B"].mT @ U[:, :4]).abs().max() < 1e-4 * size

        def cosine(t, gradient=gradient):
            move = t["B"] @ t["B"].mT @ gradient + gradient @ t["A"].mT @ t["A"]
            return (move * gradient).sum() / move.norm() / gradient.norm()

        assert cosine(t) > cosine(lora) + 0.1


# ---- DoRA


def test_dora_rows_have_the_trained_norms_whatever_the_factors_scale():
    model, adapter, *_ = started("dora")
    shake(adapter)
    with adapter.merged():
        for name in ("0", "2"):
            rows = model.get_submodule(name).weight.norm(dim=1)
            assert torch.allclose(rows, tensors(adapter, name)["c"].abs(), rtol=1e-5)
    before = model(batch()[0]).detach()
    with torch.no_grad():
        for n, p in adapter.named_parameters():
            p.mul_({"A": 5.0, "B": 0.2}.get(n[-1], 1.0))
    close(model(batch()[0]).detach(), before, 1e-5)


def test_dora_gradients_with_and_without_the_norm_held_constant():
    found = {}
    g = torch.Generator().manual_seed(3)
    x = torch.randn(5, 12, generator=g, dtype=torch.float64)
    out = torch.randn(5, 20, generator=g, dtype=torch.float64)
    for detach in (True, False):
        model, adapter, *_ = started("dora", net().double(), detach_norm=detach)
        shake(adapter, 0.3)
        (model[0](x) * out).sum().backward()
        found[detach] = t = tensors(adapter)
    A, B, c = (t[k].detach().requires_grad_() for k in "ABc")
    V = model[0].weight.detach() + B @ A
    norm = V.norm(dim=1)
    for detach, held in ((True, norm.detach()), (False, norm)):
        value = ((c / held)[:, None] * V * (out.mT @ x)).sum()
        expected = torch.autograd.grad(value, (A, B, c), retain_graph=True)
        for key, gradient in zip("ABc", expected, strict=True):
            close(found[detach][key].grad, gradient, 1e-6)
    directions = ((x @ V.mT) * out).sum(dim=0) / norm
    close(found[True]["c"].grad, directions.detach(), 1e-6)
    assert (found[True]["A"].grad - found[False]["A"].grad).norm() > 0.01 * found[False]["A"].grad.norm()


# ---- PiSSA


@pytest.mark.parametrize("alpha", [4, 10])
def test_pissa_halves_share_the_values_and_leave_the_rest(alpha):
    model, adapter, *_ = started("pissa", alpha=alpha)
    for name in ("0", "2"):
        t, weight, s = tensors(adapter, name), model.get_submodule(name).weight.detach(), alpha / 4
        values = torch.linalg.svdvals(weight)
        for gram in (t["A"] @ t["A"].mT, t["B"].mT @ t["B"]):
            assert torch.allclose(gram, torch.diag(values[:4] / s), atol=1e-5)
        rest = weight - s * t["B"] @ t["A"]
        assert torch.isclose(torch.linalg.matrix_norm(rest, 2), values[4], rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(batch()[0]), net()(batch()[0]))
