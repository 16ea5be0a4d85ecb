"""What several processes may be: copies of the whole model, by DDP, or holders of its shards, by FSDP2.

Under FSDP2 the base is in shards, the adapter and a classifier's head are whole on every process, and their gradients
are averaged here. So checkpoints and optimizers are those of one process; but whatever reads a base weight gathers it,
and must be called by all.
"""

from __future__ import annotations

import functools
import inspect
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from vislora import Method, distributed
from vislora.errors import InputError
from vislora.training.run import RunFolder

_SERVED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether the launcher asks for FSDP; of accelerate itself it serves no CPU."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return accelerator.num_processes > 1 and (asked or accelerator.distributed_type is DistributedType.FSDP)


def require_served(accelerator: Accelerator, method: Any, quantized: bool) -> None:
    """Raise InputError, before anything is loaded, for a configuration of accelerate's that cannot train `method`."""
    kind = accelerator.distributed_type
    if kind not in _SERVED:
        wrong = f"{kind.value} is not served: its engine steps, clips and saves by itself, out of adapters' sight"
        raise InputError("accelerate launch", wrong, "take DDP, as in configs/accelerate/ddp.yaml, or FSDP2")
    if not is_sharding(accelerator):
        return
    wrong = remedy = None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        wrong, remedy = "FSDP 1 is not served", "set fsdp_version: 2"
    elif os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        wrong = "adapters start from weights that every process has read"
        remedy = "set fsdp_cpu_ram_efficient_loading: false"
    elif os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        wrong, remedy = "shards that wait on the CPU are not served", "set fsdp_offload_params: false"
    elif quantized:
        wrong, remedy = "quantized weights cannot be cut into shards", "take DDP: in 4 bits most models fit"
    elif accelerator.mixed_precision == "fp16":
        wrong, remedy = "fp16 is not served under FSDP", "take bf16 or no"
    elif not isinstance(method, Method):
        wrong, remedy = "trains or replaces the base's own weights", "take DDP"
    elif method.needs_prepare:
        wrong, remedy = "starts from gradients of whole weights, which FSDP cuts into shards", "take DDP"
    if wrong:
        raise InputError("FSDP", wrong, remedy)


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, own: Iterable[nn.Parameter]
) -> tuple[nn.Module, Any]:
    """accelerate's `prepare`; where FSDP is asked for, the model in shards, but for what trains: `own` stays whole.

    The blocks are those that transformers keeps together, each a unit, and the rest is one more.
    """
    if not is_sharding(accelerator):
        return accelerator.prepare(model, optimizer)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = set(getattr(model, "_no_split_modules", None) or ())
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    words = {"mesh": mesh, "ignored_params": set(own)}
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, **words)
    fully_shard(model, **words)
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return plain(*args, **kwargs)

    model.forward = forward
    model.forward.__signature__ = inspect.signature(plain)  # generate() reads it
    return model, accelerator.prepare_optimizer(optimizer)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Give every process the mean of all processes' gradients, by one message; what has none counts as zeros."""
    parameters = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    means = distributed.mean(flat, device).split([p.numel() for p in parameters])
    for p, mean in zip(parameters, means, strict=True):
        p.grad = mean.view_as(p).to(p.dtype, copy=True)


@contextmanager
def written(folder: RunFolder, main: bool) -> Iterator[RunFolder]:
    """The run's folder on the main process; on others one that is thrown away, for work that all must do together."""
    if main:
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        yield RunFolder(Path(place))
