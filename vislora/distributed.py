"""Several processes that train one model: means over them, and tensors that must be equal on all of them.

They are those of torch.distributed's default group. With one process, or none started, every function returns at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as group


def processes() -> int:
    """How many processes train together."""
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


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
def from_first(tensor: Tensor) -> None:
    """Overwrite `tensor` with the first process's, in place.

    What comes from an SVD or a QR needs it: signs, and bases of equal values, may differ between devices.
    """
    if processes() > 1:
        group.broadcast(tensor.detach(), src=0)
