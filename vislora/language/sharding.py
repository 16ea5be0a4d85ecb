"""Training in several processes: the base replicated (DDP, ZeRO) or sharded (FSDP2), the adapter whole on each.

FSDP2 replaces the parameters that it shards. An adapter is small, and its tensors are read by name all over: it is left
out of the sharding, and its gradients are averaged here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from vislora import distributed
from vislora.adapter import Adapter
from vislora.adapters import Method
from vislora.errors import InputError
from vislora.handle import Handle


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the base's parameters lie in pieces on the processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def require_served(accelerator: Accelerator, options: Any, method: Any) -> None:
    """Raise InputError for what cannot be trained under accelerate's present configuration."""
    flag = "accelerate launch"
    if is_sharded(accelerator):
        if not accelerator.is_fsdp2:
            raise InputError(flag, "FSDP of version 1 mixes frozen and trained tensors", "take fsdp_version: 2")
        if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            wrong = "fsdp_cpu_ram_efficient_loading moves the adapter to the meta device"
            raise InputError(flag, wrong, "set it to false, as in configs/accelerate/fsdp2.yaml")
        if not isinstance(method, Method):
            raise InputError(flag, f"{method.word} under FSDP", "take DDP, or a method of vislora.methods()")
        if method.needs_prepare:
            wrong = "a start that is made from the base's gradients needs its weights whole"
            raise InputError(flag, wrong, "take DDP, or another method")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.state.deepspeed_plugin.zero_stage > 2:
            raise InputError(flag, "ZeRO-3 shards the weights that adapters read", "take stage 2, or FSDP2")
        if options.penalty_unclipped or options.optimizer != "adamw":
            raise InputError(flag, "DeepSpeed makes the step itself", "leave penalty_unclipped out, and take adamw")


@contextmanager
def plain_adapter(accelerator: Accelerator, adapter: Handle, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Around `accelerator.prepare`: the adapter's tensors are not sharded, and the optimizer keeps them."""
    if is_sharded(accelerator) and isinstance(adapter, Adapter):
        accelerator.state.fsdp_plugin.ignored_modules = [m for p in adapter.parts.values() for m in p.modules()]
    groups = [list(group["params"]) for group in optimizer.param_groups]
    yield
    if is_sharded(accelerator):
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = own


def complete(accelerator: Accelerator, adapter: Handle) -> None:
    """Average the adapter's gradients over the processes where nothing else does."""
    if is_sharded(accelerator):
        for parameter in adapter.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(distributed.mean(parameter.grad, accelerator.device))
