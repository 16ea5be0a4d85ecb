"""Memory counted on fake tensors: against bytes known by hand, and of an optimizer's state."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vislora.training.memory import held_by, optimizer_state, peak_of

KIB = 256 * 4  # bytes of 256 float32 numbers


def test_the_peak_is_the_most_that_lives_at_once():
    def chain():
        a = torch.empty(256)
        for _ in range(10):
            a = a + 1  # two at a time
        return a

    def kept():
        return [torch.empty(256) for _ in range(10)]

    assert peak_of(chain) == 2 * KIB and peak_of(kept) == 10 * KIB
    assert peak_of(lambda: torch.empty(256).view(16, 16).t().add_(1)) == KIB  # views and in-place hold nothing more
    assert peak_of(lambda: torch.empty(256, dtype=torch.bfloat16)) == KIB // 2


def test_a_backward_keeps_activations_and_checkpointing_does_not():
    layers = nn.Sequential(*(nn.Sequential(*(nn.Linear(256, 256), nn.Sigmoid()) * 4) for _ in range(4)))
    x = torch.randn(1024, 256)  # a real one counts for nothing
    rows, weights = 1024 * KIB, list(layers[0].parameters())

    def plain():
        torch.autograd.grad(layers(x).sum(), weights)

    def again():
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False)
        torch.autograd.grad(y.sum(), weights)

    # Sixteen sigmoids are kept; of checkpointed fours their inputs and one four. A few tensors more at the turn.
    assert 16 * rows <= peak_of(plain) <= 20 * rows
    assert 8 * rows <= peak_of(again) <= 12 * rows
    before = [w.clone() for w in layers.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, layers.parameters(), strict=True))
    assert torch.ones(2).sum() == 2  # real tensors are real again


def test_a_million_pixels_cost_no_memory_to_count():
    assert peak_of(lambda: torch.empty(2**20, 2**20)) == 4 * 2**40


def test_what_models_hold_counts_shared_tensors_once():
    one, two = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    assert held_by([one, two]) == 2 * KIB
    two.weight = one.weight
    assert held_by([one, two]) == KIB


def test_an_optimizers_state_is_known_and_nothing_is_changed():
    layer = nn.Linear(16, 16)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = torch.optim.AdamW([{"params": list(layer.parameters()), "lr": 0.1}])
    size = sum(p.nbytes for p in layer.parameters())
    assert 2 * size <= optimizer_state(optimizer) <= 2 * size + 16
    assert optimizer_state(torch.optim.SGD(layer.parameters(), lr=0.1)) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.1
