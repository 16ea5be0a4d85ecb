"""What data-driven starts are made from: gradients of the frozen weights, gathered through a closure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import distributed
from .errors import InputError
from .part import Part
from .quantized import is_quantized
from .site import Site, qualified

if TYPE_CHECKING:
    from .adapter import Adapter

Key = tuple[nn.Module, str]  # a weight: its module and its name there


def weight_gradients(
    adapter: Adapter, closure: Callable[[], Tensor], calls: int
) -> Iterator[tuple[Part, Site, Tensor]]:
    """(part, site, dL/dW (m, n)) of every site, L the mean loss of `calls` calls of closure(); W itself stays frozen.

    closure() runs forward and backward. Gradients are moved to the CPU and freed layer by layer while the backward
    runs, so that the device holds one layer's at a time; they are float32 sums. Afterwards requires_grad, .grad of
    all weights, the adapter's gradients and the global random state are what they were.
    Of a quantized weight it is the gradient of the weight that it stands for. Of several processes, each with a loss
    of its own, it is the gradient of their mean; DDP leaves that of frozen weights alone.
    Raises InputError for layers that the loss does not reach, on every process if it is so on one.
    """
    weights = {site.key: site for part in adapter.parts.values() for site in part.sites}
    sums: dict[Key, Tensor] = {}

    def add(site: Site, gradient: Tensor) -> None:
        gradient = distributed.whole(gradient).to("cpu", torch.float32)
        sums[site.key] = sums[site.key] + gradient if site.key in sums else gradient.clone()

    with watched(weights.values(), add), torch.random.fork_rng(devices(weights.values())):
        for _ in range(calls):
            closure()
    for parameter in adapter.parameters():
        parameter.grad = None
    _require_reached(adapter, sums)
    for key, site in weights.items():
        sums[key] = distributed.mean(sums[key] / calls, site.parameter.device).flatten(1)
    for part in adapter.parts.values():
        for site in part.sites:
            yield part, site, sums[site.key] if site.rows is None else sums[site.key][site.rows]


def _require_reached(adapter: Adapter, sums: dict[Key, Tensor]) -> None:
    """Raise InputError for the first site without a gradient, on all processes alike: one that waits would hang."""
    sites = [site for part in adapter.parts.values() for site in part.sites]
    reached = torch.tensor([float(site.key in sums) for site in sites])
    for site, share in zip(sites, distributed.mean(reached, sites[0].parameter.device).tolist(), strict=True):
        if share < 1:
            raise InputError(site.name, "got no gradient from the closure", "leave that layer out of the targets")


@contextmanager
def watched(sites: Iterable[Site], add: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Inside, every backward hands add(site, dL/dW) as soon as a weight's gradient is whole, and frees it.

    sites: one for each weight; dL/dW is the whole weight's, in its own shape, of a quantized one (m, n); of one in
    shards it is in shards too, and the mean over the processes.
    """
    kept = [(site.parameter, site.parameter.grad) for site in sites if not is_quantized(site.module)]

    def collect(site: Site) -> RemovableHandle:
        def take(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            add(site, gradient.detach())

        def watch(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            x = args[0] if args else kwargs["input"]
            return _Outer.apply(output, x, torch.empty(0, requires_grad=True), partial(add, site))

        if is_quantized(site.module):  # before the tap, which adds to what the module itself returns
            return site.module.register_forward_hook(watch, prepend=True, with_kwargs=True)
        site.parameter.grad = None
        site.parameter.requires_grad_(True)
        return site.parameter.register_post_accumulate_grad_hook(take)

    handles = [collect(site) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, gradient in kept:
            weight.requires_grad_(False)
            weight.grad = gradient


class _Outer(torch.autograd.Function):
    """The identity on a linear's output (..., m), whose backward hands dL/dW (m, n) to `add`, for inputs (..., n).

    The sum over tokens of outer(dL/dy, x) is what autograd would give a weight that it could differentiate by. The
    input is kept as any saved tensor is, so that gradient checkpointing drops it too. `anchor`, an empty tensor that
    requires a gradient, has the backward run where nothing before the layer does.
    """

    @staticmethod
    def forward(ctx, output: Tensor, x: Tensor, anchor: Tensor, add: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return output.view_as(output)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            ctx.add(dy.reshape(-1, dy.shape[-1]).float().mT @ x.reshape(-1, x.shape[-1]).float())
        return dy, None, None, None


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


def devices(sites: Iterable[Site]) -> list[torch.device]:
    """The GPUs that the sites' weights are on, whose generators a closure may move."""
    return [d for d in {site.parameter.device for site in sites} if d.type == "cuda"]


@torch.no_grad()
def assign(part: Part, site: Site, tensors: dict[str, Tensor]) -> None:
    """Overwrite some of a site's own tensors in place, on every process with the first one's."""
    own = part.own_tensors(site)
    for name, value in tensors.items():
        distributed.overwrite(own[name], value)
