"""How much memory a computation takes, counted without doing it: on fake tensors, by their storages' lives.

torch's fake tensors have shapes, types and devices and no numbers; running a step on them makes and frees every
tensor that the step would, on CPU and CUDA alike. What is counted is what tensors hold. What is not: workspaces inside
kernels, the allocator's rounding and fragments, the CUDA context.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

STEP, BEFORE = "training", "encoding photos"  # phases of a run: its steps, and the one with no optimizer's state yet


@dataclass(frozen=True)
class Estimate:
    """Bytes of tensors on the device: `models` with what trains, kept all along; `optimizer`'s state and an average;
    and what each phase needs on top of `models`, and of the optimizer's but in the one before it. `copy`: of `models`,
    the base's own values, which full fine-tuning keeps beside those that it trains."""

    models: int
    optimizer: int
    phases: dict[str, int]
    copy: int = 0

    def __str__(self) -> str:
        parts = self._parts()
        worst = max(parts, key=parts.get)
        phases = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items())
        copy = f" ({_mib(self.copy)} of the base's values)" if self.copy else ""
        return (f"memory: {_mib(parts[worst])} at its peak, while {worst}: {_mib(self.models)} of models and adapter"
                f"{copy}, {_mib(self.optimizer)} of optimizer state, the rest activations and gradients ({phases}); "
                "Python, libraries and the kernels' own workspaces come on top")  # fmt: skip

    @property
    def peak(self) -> int:
        return max(self._parts().values())

    def _parts(self) -> dict[str, int]:
        return {name: self.models + more + (0 if name == BEFORE else self.optimizer)
                for name, more in self.phases.items()}  # fmt: skip


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


class _Lives(TorchDispatchMode):
    """Bytes of the storages that are made inside and still alive: now, and the most at any time. Real tensors that
    come in become the mode's fake ones, and are no storages that were made."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake, self.now, self.most = fake, 0, 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Tensor, self._taken_in, (args, kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _taken_in(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key in given or key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _forget(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]


def peak_of(compute: Callable[[], object]) -> int:
    """Bytes of tensors that `compute` makes, at the moment when they are most. It runs on fake tensors: numbers in its
    tensors cannot be read, and what it makes is of no use outside."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _Lives(fake) as lives:
        compute()
        return lives.most


def peak_of_step(loss: Callable[[], Tensor], parameters: list[nn.Parameter], micros: int = 1) -> int:
    """As `peak_of`, of a forward and the backward to `parameters`; of several before an optimizer step (`micros`), the
    gradients of those before are there as well."""
    held = sum(p.nbytes for p in parameters) if micros > 1 else 0
    return held + peak_of(lambda: torch.autograd.grad(loss(), parameters, allow_unused=True))


def held_by(models: Iterable[nn.Module]) -> int:
    """Bytes of the parameters and buffers of modules, shared ones once."""
    storages = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@torch.no_grad()
def optimizer_state(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an optimizer keeps beside its parameters: known by a step of it, at rate 0 on gradients of 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.copy_(value)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    held = {id(t): t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)}
    return sum(held.values())
