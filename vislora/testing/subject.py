"""A Subject, a method on a host, and the assertions that checks are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..adapters import Method
from ..attach import attach
from ..errors import InputError


@dataclass(frozen=True)
class Host:
    """A small model to adapt: `build(seed)` makes it, `targets` names its sites, `run(model, seed)` calls it."""

    name: str
    build: Callable[[int], nn.Module]
    targets: Any
    run: Callable[[nn.Module, int], Tensor]


@dataclass
class Subject:
    """A method on a host, with the model built and nothing attached."""

    method: Method
    host: Host
    model: nn.Module = field(init=False)

    def __post_init__(self):
        self.model = self.host.build(0).eval()

    def attach(self, name: str = "default", seed: int = 0, model: nn.Module | None = None) -> Adapter:
        return attach(model or self.model, self.method, targets=self.host.targets, name=name, seed=seed)

    def run(self, seed: int = 0, model: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            return self.host.run(model or self.model, seed)

    def train(self, adapter: Adapter, steps: int = 3, lr: float = 0.05) -> None:
        """A few optimizer steps that move every tensor visibly."""
        optimizer = torch.optim.AdamW(adapter.param_groups(lr), weight_decay=0.0)
        self.bind(adapter, optimizer, steps)
        for step in range(steps):
            self.backward(adapter, step)
            optimizer.step()
            optimizer.zero_grad()

    def bind(self, adapter: Adapter, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Bind the optimizer, and run a start that needs data on the first step's."""
        adapter.bind(optimizer, steps)
        if not all(part.prepared for part in adapter.parts.values()):
            adapter.prepare(lambda: self.backward(adapter, 0))

    def backward(self, adapter: Adapter, step: int) -> Tensor:
        """Forward and backward on a step's own data; returns the loss."""
        out = self.host.run(self.model, step)
        # Towards an uneven target: a model that ends in a LayerNorm has no gradient towards a constant one.
        target = torch.linspace(-1, 1, out.numel()).view_as(out)
        loss = (out.float() - target).square().mean() + adapter.penalty()
        loss.backward()
        return loss


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter that a key of `deltas()` stands for: a module's weight, or a parameter of another name."""
    owner, _, leaf = name.rpartition(".")
    parameters = model.get_submodule(owner)._parameters
    return parameters[leaf] if leaf in parameters else model.get_submodule(name).weight


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Assert that a and b differ by at most `tolerance` of the larger one's greatest entry."""
    scale = max(a.abs().max().item(), b.abs().max().item(), 1e-30)
    off = (a.double() - b.double()).abs().max().item() / scale
    assert off <= tolerance, f"differ by {off:.2e} of the largest entry, {tolerance:.0e} allowed"


def refused(call: Callable[[], Any], *words: str) -> None:
    """Assert that call() raises InputError and that its message holds every word."""
    try:
        call()
    except InputError as error:
        for word in words:
            assert word in str(error), f"{word!r} is not in {str(error)!r}"
    else:
        raise AssertionError(f"was accepted; an error with {words} was due")
