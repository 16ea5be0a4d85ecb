"""Several processes that train one model: means over them, and tensors that must be equal on all of them.

They are those of torch.distributed's default group. With one process, or none started, every function returns at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as group


def processes() -> int:
    """How many processes train together."""
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the first of them, or the only one."""
    return processes() == 1 or group.get_rank() == 0


def mean(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` averaged over the processes, where it was; summed on `device`, which the group's backend must serve.

    Every process calls it equally often, with equal shapes.
    """
    if processes() == 1:
        return tensor
    total = tensor.to(device, copy=True)
    group.all_reduce(total)
    return (total / processes()).to(tensor.device)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Give every process the mean of all processes' gradients, by one message; what has none counts as zeros."""
    parameters = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    means = mean(flat, device).split([p.numel() for p in parameters])
    for p, value in zip(parameters, means, strict=True):
        p.grad = value.view_as(p).to(p.dtype, copy=True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether `fully_shard`, or another user of DTensor, holds it in shards. DTensor takes seconds to import, and where
    nothing has imported it no tensor can be one."""
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(tensor, library.DTensor)


def class_name(module: nn.Module) -> str:
    """The name of a module's class, without what `fully_shard` puts before it."""
    library = sys.modules.get("torch.distributed.fsdp")
    sharded = library is not None and isinstance(module, library.FSDPModule)
    return type(module).__mro__[2 if sharded else 0].__name__


def whole(tensor: Tensor) -> Tensor:
    """A tensor that `fully_shard` holds in shards, gathered; others as they are. A collective of the mesh.

    The gradient that a shard gets is the mean over the processes, as of parameters that the model itself gathers.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial, Replicate

    every = [Replicate()] * tensor.device_mesh.ndim
    gathered = tensor.redistribute(placements=every)
    if not tensor.requires_grad or not torch.is_grad_enabled():
        return gathered.to_local()
    local = gathered.to_local(grad_placements=[Partial()] * tensor.device_mesh.ndim)
    return _Shared.apply(local, tensor.device_mesh.size())


class _Shared(torch.autograd.Function):
    """The identity, whose gradient is one process's share of a mean over `count`."""

    @staticmethod
    def forward(ctx, tensor: Tensor, count: int) -> Tensor:
        ctx.count = count
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient / ctx.count, None


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """A whole `value`, equal on all processes, in the shards that `like` is in, if it is in any."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Give `tensor`, sharded or not, the first process's `value`, whole, in place.

    What comes from an SVD or a QR differs between devices: in signs, and in bases of equal values.
    """
    value = value.detach().to(tensor.device, tensor.dtype, copy=True)
    from_first(value)
    tensor.copy_(as_sharded(value, tensor))


def first_says(value: bool, device: torch.device) -> bool:
    """What the first process says, on all of them."""
    told = torch.tensor(int(value), device=device)
    from_first(told)
    return bool(told)


@torch.no_grad()
def from_first(tensor: Tensor) -> None:
    """Overwrite `tensor` with the first process's, in place."""
    if processes() > 1:
        group.broadcast(tensor.detach(), src=0)
