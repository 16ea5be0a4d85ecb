"""The quick way of linear layers against the plain one: equal values and gradients, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from vislora import attach, methods, tap
from vislora.adapters import get
from vislora.lowrank import LowRank
from vislora.testing.subject import close

WORDS = {"od_lora": {"init_rounds": 1, "init_steps": 1}}


class Net(nn.Module):
    """Two layers and a fused projection."""

    def __init__(self):
        super().__init__()
        self.first, self.qkv, self.last = nn.Linear(24, 32), nn.Linear(32, 48), nn.Linear(48, 20, bias=False)

    def forward(self, x):
        return self.last(self.qkv(self.first(x).tanh()).tanh())


def adapted(method: str, targets=("first", "qkv[q]", "qkv[v]", "last"), dtype=torch.float64, rank=4, **options):
    torch.manual_seed(0)
    model = Net().to(dtype)
    options = {"rank": rank, **get(method).quick, **WORDS.get(method, {}), **options}
    adapter = attach(model, method, targets=list(targets), **options)
    adapter.bind(torch.optim.SGD(adapter.param_groups(0.1)), 100)
    model.train()
    x = torch.randn(2, 50, 24, dtype=dtype, requires_grad=True)

    def closure():
        loss = model(x).square().mean() + adapter.penalty()
        loss.backward()
        return loss

    adapter.prepare(closure)
    with torch.no_grad():  # off its start, where half of the gradients are zero
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
            p.grad = None
    x.grad = None
    return model, adapter, x, closure


def found(monkeypatch, plain: bool, method: str, **words):
    """Loss and every gradient, by the plain way or the quick one."""
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(tap, "takes", lambda module, x: False)
        model, adapter, x, closure = adapted(method, **words)
        loss = closure()
        return [loss.detach(), x.grad, *(p.grad for p in adapter.parameters() if p.grad is not None)], model(x).grad_fn


@pytest.mark.parametrize("rank", [2, 8])  # thin products, and the adapted weight with dense gradients
@pytest.mark.parametrize("method", methods())
def test_values_and_gradients_are_those_of_the_plain_way(monkeypatch, method, rank):
    (ours, node), (plain, other) = (found(monkeypatch, way, method, rank=rank) for way in (False, True))
    assert "LowRank" in type(node).__name__ and "LowRank" not in type(other).__name__
    assert len(ours) == len(plain) > 2
    for a, b in zip(ours, plain, strict=True):
        close(a, b, 1e-11)


@pytest.mark.parametrize(("tokens", "rank", "weights"), [(2, 4, 0), (500, 4, 1), (500, 20, 1)])
def test_the_adapted_weight_is_made_where_it_is_cheaper(monkeypatch, tokens, rank, weights):
    made = []
    monkeypatch.setattr(tap, "adapted_weight", lambda *a: made.append(1) or _adapted_weight(*a))
    model, adapter, _, _ = adapted("lora", targets=["first"], rank=rank)
    x = torch.randn(tokens, 24, dtype=torch.float64)
    out = model(x)
    assert len(made) == weights
    assert "weight" not in vars(model.first) and "vislora_ready" not in vars(model.first)
    with adapter.merged():
        close(out, model(x), 1e-12)


_adapted_weight = tap.adapted_weight


@pytest.mark.parametrize("tokens", [10, 40])  # fewer and more than the layers are wide
@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
def test_second_derivatives(method, tokens):
    model, adapter, _, _ = adapted(method, rank=8)
    parameters = list(adapter.parameters())

    x = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(model(x).square().sum(), [x, *parameters], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), x)[0]
    step = torch.zeros_like(x)
    step[3, 5] = 1e-6

    def squares(at):
        grads = torch.autograd.grad(model(at).square().sum(), [at, *parameters])
        return sum(g.square().sum() for g in grads)

    slope = (squares(x + step) - squares(x - step)) / 2e-6
    assert second[3, 5].item() == pytest.approx(slope.item(), rel=1e-5)


def test_only_the_input_is_kept():
    model, _, _, _ = adapted("lora", targets=["first"])
    x = torch.randn(60, 24, dtype=torch.float64)
    weights = {p.data_ptr() for p in model.parameters()}
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.first(x)
    assert {t.data_ptr() for t in kept} - weights == {x.data_ptr()}


def test_bf16_makes_no_cast_of_activations_and_starts_as_the_base():
    model, adapter, _, _ = adapted("pissa", dtype=torch.bfloat16, rank=4)
    x = torch.randn(60, 24, dtype=torch.bfloat16, requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        model(x).float().sum().backward()
    casts = [e for e in profile.key_averages(group_by_input_shape=True) if e.key == "aten::_to_copy"]
    assert casts and all(e.input_shapes[0] in ([60, 20], []) or 60 not in e.input_shapes[0] for e in casts)
    fresh = Net().to(torch.bfloat16)
    expected = fresh(x)
    attach(fresh, "pissa", targets=["first", "qkv[q]", "last"], rank=4)
    assert torch.equal(fresh(x), expected)


def test_a_hook_that_came_first_keeps_the_base_s_output_and_its_gradient():
    torch.manual_seed(0)
    model, seen, gradients = nn.Sequential(nn.Linear(8, 6)), [], []

    def watch(module, args, output):
        seen.append((output, output.detach().clone()))
        output.register_hook(lambda g: gradients.append(g))

    model[0].register_forward_hook(watch)
    adapter = attach(model, "lora", targets=["0"], rank=2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(1.0)
    x = torch.randn(30, 8, requires_grad=True)
    model(x).sum().backward()
    held, copy = seen[0]
    assert torch.equal(held, copy) and len(gradients) == 1
    with adapter.merged():
        other = x.detach().clone().requires_grad_(True)
        model(other).sum().backward()
    close(x.grad, other.grad, 1e-6)


def test_an_exception_in_the_layer_leaves_its_weight_alone():
    model, _, _, _ = adapted("lora", targets=["first"])
    weight = model.first.weight
    model.first.bias.data = torch.zeros(5, dtype=torch.float64)  # of no fitting shape
    with pytest.raises(RuntimeError):
        model.first(torch.randn(400, 24, dtype=torch.float64))
    assert model.first.weight is weight and "vislora_ready" not in vars(model.first)


def test_transforms_of_torch_func_take_the_plain_way():
    model, adapter, _, _ = adapted("lora", targets=["first"])
    x = torch.randn(3, 24, dtype=torch.float64)
    one_by_one = torch.stack([model(row) for row in x])
    close(torch.func.vmap(model)(x), one_by_one, 1e-12)
    _, slope = torch.func.jvp(lambda v: model(v), (x,), (torch.ones_like(x),))
    assert (slope - (model(x + 1e-6) - model(x - 1e-6)) / 2e-6).abs().max() < 1e-6
    assert LowRank.__name__ in type(model.first(x).grad_fn).__name__


def test_checkpointed_layers_compare_no_versions_in_the_backward(monkeypatch):
    model, adapter, x, closure = adapted("nb_lora", rank=2)
    closure()
    plain = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    (part,) = adapter.parts.values()
    own = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: checkpoint(own, self, x, use_reentrant=False))
    loss = model(x).square().mean()
    monkeypatch.setattr(type(part), "_version", lambda self: pytest.fail("compared"))
    loss.backward()
    for p, gradient in zip(adapter.parameters(), plain, strict=True):
        close(p.grad, gradient, 1e-12)


@pytest.mark.parametrize("method", ["lora", "nb_lora", "pissa", "dora"])
def test_factors_that_are_cast_together_get_their_gradients(monkeypatch, method):
    """float32 factors on a bf16 base: up to bf16's rounding what the plain way's casts, one by one, give."""
    ways = [found(monkeypatch, plain, method, dtype=torch.bfloat16)[0] for plain in (True, False)]
    assert len(ways[0]) == len(ways[1]) > 2
    for plain, quick in zip(*ways, strict=True):
        assert plain.dtype == quick.dtype
        close(plain.float(), quick.float(), 0.1)
