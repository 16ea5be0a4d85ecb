"""What data-driven starts are made from: gradients of the frozen weights, gathered through a closure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import distributed
from .errors import InputError
from .part import Part
from .site import Site, qualified

if TYPE_CHECKING:
    from .adapter import Adapter


def weight_gradients(
    adapter: Adapter, closure: Callable[[], Tensor], calls: int
) -> Iterator[tuple[Part, Site, Tensor]]:
    """(part, site, dL/dW (m, n)) of every site, L the mean loss of `calls` calls of closure(); W itself stays frozen.

    closure() runs forward and backward. Gradients are moved to the CPU and freed layer by layer while the backward
    runs, so that the device holds one layer's at a time; they are float32 sums. Afterwards requires_grad, .grad of
    all weights, the adapter's gradients and the global random state are what they were.
    Of several processes, each with a loss of its own, it is the gradient of their mean; DDP leaves that of frozen
    weights alone.
    Raises InputError for weights that have no gradient: quantized ones, and layers that the loss does not reach, on
    every process if it is so on one.
    """
    modules = {site.module: part for part in adapter.parts.values() for site in part.sites}
    for module in modules:
        if not module.weight.is_floating_point():
            wrong = f"a weight of {module.weight.dtype} has no gradient"
            raise InputError(adapter.method_name, wrong, "load the base unquantized for this start")
    sums: dict[nn.Module, Tensor] = {}
    with _watched(modules, sums), torch.random.fork_rng(_devices(modules)):
        for _ in range(calls):
            closure()
    for parameter in adapter.parameters():
        parameter.grad = None
    _require_reached(adapter, sums)
    for module in modules:
        sums[module] = distributed.mean(sums[module] / calls, module.weight.device)
    for part in adapter.parts.values():
        for site in part.sites:
            yield part, site, sums[site.module] if site.rows is None else sums[site.module][site.rows]


def _require_reached(adapter: Adapter, sums: dict[nn.Module, Tensor]) -> None:
    """Raise InputError for the first site without a gradient, on all processes alike: one that waits would hang."""
    sites = [site for part in adapter.parts.values() for site in part.sites]
    reached = torch.tensor([float(site.module in sums) for site in sites])
    for site, share in zip(sites, distributed.mean(reached, sites[0].module.weight.device).tolist(), strict=True):
        if share < 1:
            raise InputError(site.name, "got no gradient from the closure", "leave that layer out of the targets")


@contextmanager
def _watched(modules: dict[nn.Module, Part], sums: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Inside, weights collect gradients, which are added to `sums` and freed as soon as they are whole."""
    kept = {module: module.weight.grad for module in modules}

    def collect(module: nn.Module) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            gradient = weight.grad.detach().to("cpu", torch.float32)
            sums[module] = sums[module] + gradient if module in sums else gradient.clone()
            weight.grad = None

        return take

    handles = []
    for module in modules:
        module.weight.grad = None
        module.weight.requires_grad_(True)
        handles.append(module.weight.register_post_accumulate_grad_hook(collect(module)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, gradient in kept.items():
            module.weight.requires_grad_(False)
            module.weight.grad = gradient


@contextmanager
def at_largest_rate(adapter: Adapter) -> Iterator[torch.optim.Optimizer]:
    """For a start that trains: the bound optimizer, at each group's largest learning rate inside.

    Raises InputError before `bind`.
    """
    groups = _bound(adapter).param_groups
    now = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = group.get("initial_lr", group["lr"])
    try:
        yield adapter.optimizer
    finally:
        for group, rate in zip(groups, now, strict=True):
            group["lr"] = rate


def largest_rate(adapter: Adapter) -> float:
    """The largest learning rate of the bound optimizer's schedule. Raises InputError before `bind`."""
    return max(float(group.get("initial_lr", group["lr"])) for group in _bound(adapter).param_groups)


def _bound(adapter: Adapter) -> torch.optim.Optimizer:
    if adapter.optimizer is None:
        wrong = f"{adapter.method_name}'s start goes by the optimizer"
        raise InputError("prepare", wrong, "call adapter.bind first")
    return adapter.optimizer


def start_generator(adapter: Adapter, part: Part, site: Site) -> torch.Generator:
    """A CPU generator of a site's data-driven start: of the seed and the site's name alone, other than `init`'s."""
    from .attach import _generator

    component = next(name for name, own in adapter.parts.items() if own is part)
    return _generator(adapter.seed, f"start/{qualified(component, site.name)}")


def _devices(modules: dict[nn.Module, Part]) -> list[torch.device]:
    return [d for d in {module.weight.device for module in modules} if d.type == "cuda"]


@torch.no_grad()
def assign(part: Part, site: Site, tensors: dict[str, Tensor]) -> None:
    """Overwrite some of a site's own tensors in place, on every process with the first one's."""
    own = part.own_tensors(site)
    for name, value in tensors.items():
        own[name].copy_(value)
        distributed.from_first(own[name])
