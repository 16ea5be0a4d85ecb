"""What several processes may be: copies of the whole model, by DDP, or holders of its shards, by FSDP2. DeepSpeed's
ZeRO (zero.py) is between them: the base whole, gradients and moments of what trains in shards.

Under FSDP2 the base is in shards, the adapter and a classifier's head are whole on every process, and their gradients
are averaged here. So checkpoints and optimizers are those of one process; but whatever reads a base weight gathers it,
and must be called by all.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, convert_outputs_to_fp32
from torch import nn

from vislora import Method, distributed
from vislora.errors import InputError
from vislora.training import zero
from vislora.training.cores import require_device
from vislora.training.run import InterruptFlag, RunFolder

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)  # which FSDP's hooks would wait for in vain
_SERVED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether the launcher asks for FSDP; of accelerate itself it serves no CPU."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return accelerator.num_processes > 1 and (asked or accelerator.distributed_type is DistributedType.FSDP)


def is_zero(accelerator: Accelerator) -> bool:
    """Whether the launcher asks for DeepSpeed, of a script that takes it."""
    return getattr(accelerator, "zero_stage", None) is not None


def start(mixed_precision: str | None, takes_zero: bool = False) -> Accelerator:
    """accelerate's Accelerator. takes_zero: whether the script can go by DeepSpeed. InputError for what it cannot."""
    require_device()
    if takes_zero:
        return zero.start(mixed_precision)
    zero.refuse()  # before accelerate looks for its package
    return Accelerator(mixed_precision=mixed_precision)


def require_served(accelerator: Accelerator, method: Any, quantized: bool, compiled: bool = False) -> None:
    """Raise InputError, before anything is loaded, for a configuration of accelerate's that cannot train `method`, on a
    `quantized` base or, `compiled`, in graphs."""
    kind = accelerator.distributed_type
    if kind not in _SERVED:
        remedy = "take DDP, as in configs/accelerate/ddp.yaml, or FSDP2"
        raise InputError("accelerate launch", f"{kind.value} is not served", remedy)
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
    elif compiled:
        wrong, remedy = "--compile is not served: graphs would break at every gathering of shards", "leave it out"
    elif accelerator.mixed_precision == "fp16":
        wrong, remedy = "fp16 is not served under FSDP", "take bf16 or no"
    elif not isinstance(method, Method):
        wrong, remedy = zero.no_adapter(method), "take DDP"
    if wrong:
        raise InputError("FSDP", wrong, remedy)


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, own: Iterable[nn.Parameter]
) -> tuple[nn.Module, Any]:
    """accelerate's `prepare`; where FSDP is asked for, the model in shards, but for what trains: `own` stays whole.
    With DeepSpeed the model is itself, and the optimizer a `zero.ZeroOptimizer`."""
    if is_zero(accelerator):
        return network(accelerator, model, None), zero.ZeroOptimizer(accelerator, optimizer, accelerator.zero_stage)
    if not is_sharding(accelerator):
        return accelerator.prepare(model, optimizer)
    return network(accelerator, model, model, own), accelerator.prepare_optimizer(optimizer)


def network(
    accelerator: Accelerator, model: nn.Module, part: nn.Module | None, own: Iterable[nn.Parameter] = ()
) -> nn.Module:
    """accelerate's `prepare` of a model; where FSDP or DeepSpeed is asked for, the model itself, its forward in the
    precision that accelerate asks for, and `part` of it in shards, None for nothing: all but `own`, which trains and
    stays whole.

    Weights are the first process's on all, as DDP has them.
    """
    if not (is_sharding(accelerator) or is_zero(accelerator)):
        return accelerator.prepare(model)
    model.to(memory_format=torch.contiguous_format)  # FSDP knows no other
    for parameter in model.parameters():
        distributed.from_first(parameter)
    if part is not None:
        _shard(part, accelerator, set(own))
    if accelerator.mixed_precision == "no":
        return model
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return plain(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(forward)  # as accelerate's own does
    model.forward.__signature__ = inspect.signature(plain)  # generate() reads it
    return model


def _shard(model: nn.Module, accelerator: Accelerator, own: set[nn.Parameter]) -> None:
    """Cut the model into shards over the processes: each block is a unit, the rest one more."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # What the model returns is read, here as everywhere; written to in place it would lose FSDP's hook on it.
    said = rf"FSDP2-wrapped module \(FSDP{type(model).__name__}\) returned a view"
    warnings.filterwarnings("ignore", said)
    for module in [*blocks(model), model]:
        fully_shard(module, mesh=mesh, ignored_params=own)


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time, inner before outer: the blocks that transformers and diffusers keep together, by
    name; of models that name none the members of lists and sequences of several composite modules of one class.
    """
    modules = [module for module in model.modules() if module is not model]
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = {module for module in modules if type(module).__name__ in names}
    if not found:
        rows = [list(row.children()) for row in model.modules() if isinstance(row, nn.ModuleList | nn.Sequential)]
        alike = [row for row in rows if len(row) > 1 and len({type(one) for one in row}) == 1]
        found = {one for row in alike for one in row if next(one.children(), None) is not None}
    return [module for module in reversed(modules) if module in found and not isinstance(module, _NEVER_CALLED)]


def begin_steps(optimizer: Any) -> None:
    """From here on gradients serve the optimizer's steps alone: DeepSpeed puts them into shards."""
    if isinstance(optimizer, zero.ZeroOptimizer):
        optimizer.begin()


def backward(accelerator: Accelerator, optimizer: Any, loss: torch.Tensor, last: bool) -> None:
    """accelerate's `backward`, or DeepSpeed's; last: whether the optimizer steps next."""
    if isinstance(optimizer, zero.ZeroOptimizer):
        optimizer.backward(loss, last)
    else:
        accelerator.backward(loss)


def clip_gradients(
    accelerator: Accelerator, optimizer: Any, parameters: Iterable[nn.Parameter], most: float
) -> torch.Tensor:
    """Clip to the norm `most` by accelerate or DeepSpeed. Returns the norm before, over all processes."""
    if isinstance(optimizer, zero.ZeroOptimizer):
        return optimizer.clip(most)
    return accelerator.clip_grad_norm_(list(parameters), most)


def whole(optimizer: Any) -> AbstractContextManager[torch.optim.Optimizer]:
    """torch's optimizer behind an accelerate's; inside, with its moments whole. DeepSpeed's processes must all call."""
    return optimizer.whole() if isinstance(optimizer, zero.ZeroOptimizer) else nullcontext(optimizer.optimizer)


def run_folder(accelerator: Accelerator, output_dir: str | None, resume: str | None) -> RunFolder:
    """The run's folder, as `RunFolder.create` makes and locks it on the main process; others get to know its path."""
    folder = RunFolder.create(output_dir, resume) if accelerator.is_main_process else None
    (path,) = broadcast_object_list([str(folder.path) if folder else None])
    return folder or RunFolder(Path(path))


@contextmanager
def written(folder: RunFolder, main: bool) -> Iterator[RunFolder]:
    """The run's folder on the main process; on others one that is thrown away, for work that all must do together and
    one speaks of."""
    if main:
        yield folder
        return
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nowhere:
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield RunFolder(Path(place))


def stopping(accelerator: Accelerator, stop: InterruptFlag) -> bool:
    """Whether the run ends here, since a signal came; of several processes to any, for all go on together or not at
    all. With copies of the model that is what `ends_step` found last."""
    if accelerator.num_processes > 1 and not is_sharding(accelerator):
        return stop.agreed
    return bool(distributed.mean(torch.tensor(float(bool(stop))), accelerator.device) > 0)


def ends_step(accelerator: Accelerator, stop: InterruptFlag, last: bool) -> bool:
    """`stopping` at the end of a step. All copies of the model get the same answer at the same step: whether a signal
    had come by the end of the step before, so that no device is waited for; after the `last` step, by now."""
    if accelerator.num_processes == 1 or is_sharding(accelerator):
        return stopping(accelerator, stop)
    if stop.sent is not None:
        work, told = stop.sent
        work.wait()
        stop.sent, stop.agreed = None, stop.agreed or bool(told)
    if last and not stop.agreed:
        stop.agreed = bool(distributed.mean(torch.tensor(float(bool(stop))), accelerator.device) > 0)
    elif not stop.agreed:
        told = torch.tensor(float(bool(stop)), device=accelerator.device)
        stop.sent = torch.distributed.all_reduce(told, async_op=True), told
    return stop.agreed


def leave(accelerator: Accelerator, stop: InterruptFlag, folder: RunFolder) -> None:
    """End the process, where a signal has stopped the run, and say how to go on with it."""
    if stopping(accelerator, stop):
        again = f"--output_dir {folder.path} --resume_from_checkpoint latest"
        print(f"vislora: stopped by a signal; to go on, add {again}", file=sys.stderr)
        raise SystemExit(stop.status or 128 + signal.SIGTERM)
