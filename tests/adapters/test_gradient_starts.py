"""LoRA-SB and LoRA-GA: the gathered gradient, the bases made of it, and what the start leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vislora
from vislora import attach
from vislora.errors import InputError
from vislora.prepare import weight_gradients


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16)).train()


def batches(count=3):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 12, generator=g), torch.randn(6, 16, generator=g)) for _ in range(count)]


def loss_of(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def closure_over(model, data):
    queue = iter(data)

    def closure():
        loss = loss_of(model, next(queue))
        loss.backward()
        return loss

    return closure


def gradients(data):
    model = net()
    sum(loss_of(model, batch) for batch in data).div(len(data)).backward()
    return {name: model.get_submodule(name).weight.grad for name in ("0", "2")}


def prepared(method, data, lr=1e-3, **options):
    model = net()
    adapter = attach(model, method, rank=4, init_batches=len(data), **options)
    adapter.bind(torch.optim.AdamW(adapter.param_groups(lr)), 10)
    adapter.prepare(closure_over(model, data))
    return model, adapter


def test_gathered_gradient_is_that_of_the_mean_loss_and_nothing_else_changes():
    model, data = net(), batches()
    adapter = attach(model, "lora", rank=2)
    state, before = torch.random.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}

    inner = closure_over(model, data)

    def noisy():
        torch.rand(3)
        return inner()

    found = {site.name: gradient for _, site, gradient in weight_gradients(adapter, noisy, 3)}
    for name, expected in gradients(data).items():
        assert torch.allclose(found[name], expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(state, torch.random.get_rng_state()) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    assert not any(m.weight._post_accumulate_grad_hooks for m in (model[0], model[2]))


def test_lora_sb_spans_the_first_sign_step():
    data = batches()
    model, adapter = prepared("lora_sb", data, lr=2e-3)
    tensors = dict(adapter.named_tensors())
    for name, gradient in gradients(data).items():
        A, B, R = (tensors[f"{name}.{k}"] for k in "ABR")
        step = -2e-3 * gradient.sign()
        assert (A @ A.mT - torch.eye(4)).norm() < 1e-5 and (B.mT @ B - torch.eye(4)).norm() < 1e-5
        tail = torch.linalg.svdvals(step)[4:].norm()
        delta = adapter.deltas()[name]
        assert (step - delta).norm() <= 1.001 * tail
        assert (gradient * delta).sum() < 0
    with torch.no_grad():
        start = sum(loss_of(net(), batch) for batch in data)
        assert sum(loss_of(model, batch) for batch in data) < start
    assert {n for n, _ in adapter.named_parameters()} == {"0.R", "2.R"}


def test_lora_sb_start_is_free_of_alpha_and_gradients_follow_the_dense_one():
    data = batches()
    one, two = (prepared("lora_sb", data, alpha=alpha, init_lr=1e-3) for alpha in (4, 12))
    for name, delta in one[1].deltas().items():
        assert torch.allclose(delta, two[1].deltas()[name], atol=1e-7)
    model, adapter = two
    x, g = torch.randn(5, 12), torch.randn(5, 20)
    (model[0](x) * g).sum().backward()
    t = dict(adapter.named_tensors())
    expected = 3.0 * t["0.B"].mT @ (g.mT @ x) @ t["0.A"].mT
    assert torch.allclose(t["0.R"].grad, expected, rtol=1e-4, atol=1e-5)


def test_lora_ga_takes_neighbouring_blocks_of_singular_vectors():
    data = batches()
    model, adapter = prepared("lora_ga", data)
    base = net()
    with torch.no_grad():
        assert torch.equal(model(data[0][0]), base(data[0][0]))
    tensors = dict(adapter.named_tensors())
    for name, gradient in gradients(data).items():
        A, B = tensors[f"{name}.A"], tensors[f"{name}.B"]
        square = (gradient.shape[0] ** 0.25 / 4) ** 2
        assert torch.allclose(A @ A.mT, square * torch.eye(4), atol=1e-5)
        assert torch.allclose(B.mT @ B, square * torch.eye(4), atol=1e-5)
        U, S, Vh = torch.linalg.svd(gradient)
        moved = B @ B.mT @ gradient + gradient @ A.mT @ A
        best = U[:, :8] @ torch.diag(S[:8]) @ Vh[:8]
        assert torch.allclose(moved, square * best, atol=1e-4 * square * S[0].item())


def test_prepared_adapters_are_saved_and_go_on(tmp_path):
    model, adapter = prepared("lora_sb", batches())
    deltas = adapter.deltas()
    adapter.save(tmp_path)
    adapter.detach()
    again = vislora.load(model, tmp_path)
    assert all(torch.equal(d, deltas[k]) for k, d in again.deltas().items())
    loss_of(model, batches()[0]).backward()
    assert all(p.grad.any() for p in again.parameters())


def test_training_without_the_start_is_refused():
    model = net()
    adapter = attach(model, "lora_sb", rank=4)
    with pytest.raises(InputError, match="adapter.prepare"):
        model(batches()[0][0])
    optimizer = torch.optim.AdamW(adapter.param_groups(0.0))
    adapter.bind(optimizer, 10)
    with pytest.raises(InputError, match="first non-zero rate"):
        adapter.prepare(closure_over(model, batches()))
    with pytest.raises(InputError, match="rank: 9"):
        attach(net(), "lora_ga", rank=9)
    adapter.detach()
    unreached = attach(nn.ModuleList([net(), nn.Linear(16, 16)]), "lora_sb", rank=4, init_lr=1.0)
    inner = next(iter(unreached.roots.values()))[0]
    with pytest.raises(InputError, match="no gradient from the closure"):
        unreached.prepare(closure_over(inner, batches()))


def test_a_layer_without_gradient_gets_orthonormal_bases():
    model, data = net(), [(torch.zeros(6, 12), torch.zeros(6, 16))]
    adapter = attach(model, "lora_sb", rank=4, init_lr=1e-3)
    adapter.prepare(closure_over(model, data))
    A = dict(adapter.named_tensors())["0.A"]
    assert (A @ A.mT - torch.eye(4)).norm() < 1e-5 and not adapter.deltas()["0"].any()
