"""AdaLoRA: the budget, the recursions of importance, what is pruned, the penalty's size."""

from __future__ import annotations

import torch
from torch import nn

from vislora import attach
from vislora.adapters.adalora import AdaLoRA


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16)).train()


def started(total=20, **options):
    model = net()
    adapter = attach(model, "adalora", **{"rank": 2, "init_r": 4, **options})
    optimizer = torch.optim.AdamW(adapter.param_groups(0.02))
    adapter.bind(optimizer, total)
    g = torch.Generator().manual_seed(1)

    def step():
        x, y = torch.randn(8, 12, generator=g), torch.randn(8, 16, generator=g)
        ((model(x) - y).square().mean() + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return adapter, step


def values(adapter):
    return torch.stack([t for n, t in adapter.named_parameters() if n.endswith("E")])


def test_budget_is_cubic_monotone_and_exact_at_its_ends():
    method = AdaLoRA(rank=8, init_r=12, tinit=100, tfinal=200)
    table = [method.budget(t, 1000, 10) for t in range(1, 1001)]
    assert table[:100] == [120] * 100 and table[799:] == [80] * 201
    assert table == sorted(table, reverse=True)
    assert table[449] == int(80 + 40 * (1 - 350 / 700) ** 3)


def test_as_many_values_are_left_as_the_budget_says():
    adapter, step = started(total=20, tinit=3, tfinal=5)
    left = []
    for _ in range(20):
        step()
        left.append(int((values(adapter) != 0).sum()))
    assert left[:3] == [8] * 3 and left[14:] == [4] * 6
    assert left == [adapter.method.budget(t, 20, 2) for t in range(1, 21)]


def test_the_choice_stands_in_the_last_phase():
    adapter, step = started(total=20, tfinal=8)
    for _ in range(12):
        step()
    chosen = values(adapter) != 0
    for _ in range(8):
        step()
        assert torch.equal(values(adapter) != 0, chosen)


def test_importance_follows_the_recursions(monkeypatch):
    adapter, step = started(total=100, tinit=100)
    seen = []
    original = AdaLoRA.on_step

    def watch(self, handle, index, optimizer):
        seen.append({n: (p * p.grad).abs().detach().clone() for n, p in handle.named_parameters()})
        original(self, handle, index, optimizer)

    monkeypatch.setattr(AdaLoRA, "on_step", watch)
    for _ in range(3):
        step()
    t = dict(adapter.named_tensors())
    for name in seen[0]:
        importance = variation = torch.zeros_like(seen[0][name])
        for entry in seen:
            importance = 0.85 * importance + 0.15 * entry[name]
            variation = 0.85 * variation + 0.15 * (entry[name] - importance).abs()
        assert torch.allclose(t[f"{name}_importance"], importance, atol=1e-7)
        assert torch.allclose(t[f"{name}_variation"], variation, atol=1e-7)


def test_penalty_at_the_start():
    model = nn.Sequential(nn.Linear(768, 768))
    adapter = attach(model, "adalora", rank=8, init_r=12)
    adapter.bind(torch.optim.SGD(adapter.param_groups(0.1)), 10)
    size = adapter.penalty().item() / 0.5
    assert abs(size - 0.69 * 12**0.5) < 0.1  # diagonal entries of the Gram matrices are 768 x 0.02^2 = 0.307


def test_a_budget_that_keeps_everything_prunes_nothing():
    adapter, step = started(total=5, rank=4, init_r=4)
    for _ in range(5):
        step()
    assert (values(adapter) != 0).all()
