"""ZeRO, by DeepSpeed: what trains has its gradients and AdamW's moments in shards, one a process; the base is whole.

DeepSpeed is given the parameters that train and nothing else, so that it neither copies nor casts the base. It joins
them in flat strips, one for each group of the optimizer, which AdamW cannot tell from the tensors in them. Hence what
reads single gradients or moments is refused by name.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vislora import Method, distributed
from vislora.baselines.none import Frozen
from vislora.errors import InputError

_ASKS = "ACCELERATE_USE_DEEPSPEED"


def start(mixed_precision: str | None) -> Accelerator:
    """accelerate's Accelerator, with `zero_stage`: the stage that the launcher asks for; None without DeepSpeed, or
    with one process, which has nothing to share.

    accelerate itself is asked for copies of the model on as many processes. By its own way to DeepSpeed, each process
    on a CPU would be the only one, and bf16 would be the base's and the adapter's.
    InputError for settings of DeepSpeed's that would do nothing here.
    """
    stage = _asked()
    on_cpu = stage is not None and not torch.cuda.is_available()
    os.environ.pop(_ASKS, None)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpu)
    if stage is not None:  # else it looks for devices itself, whichever accelerate was told to take
        os.environ.setdefault("DS_ACCELERATOR", accelerator.device.type)
    accelerator.zero_stage = stage if accelerator.num_processes > 1 else None
    return accelerator


def _is_asked() -> bool:
    return os.environ.get(_ASKS, "false").lower() in ("1", "true", "yes")


def refuse() -> None:
    """InputError where the launcher asks for DeepSpeed."""
    if _is_asked():
        remedy = "take DDP, as in configs/accelerate/ddp.yaml, or FSDP2"
        raise InputError("DeepSpeed", "only the scripts for language models take it", remedy)


def _asked() -> int | None:
    if not _is_asked():
        return None
    stage = _setting("DEEPSPEED_ZERO_STAGE", "2")
    wrong = remedy = None
    if _setting("DEEPSPEED_CONFIG_FILE"):
        wrong, remedy = "deepspeed_config_file is not read", "set zero_stage in accelerate's file, and leave it out"
    elif stage == "3":
        wrong, remedy = "stage 3, the base in shards, is not served", "take configs/accelerate/fsdp2.yaml"
    elif stage not in ("1", "2"):
        wrong, remedy = f"zero_stage {stage} shares nothing", "take configs/accelerate/ddp.yaml, or zero_stage 2"
    elif (place := _setting("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")) != "none":
        wrong, remedy = f"offload_optimizer_device {place} is not served", "set it to none: adapters are small"
    elif (place := _setting("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")) != "none":
        wrong, remedy = f"offload_param_device {place} is not served", "set it to none"
    elif (clip := _setting("GRADIENT_CLIPPING", "none")) != "none":
        wrong, remedy = f"gradient_clipping {clip} in accelerate's file is not read", "leave it to --max_grad_norm"
    elif (steps := _setting("GRADIENT_ACCUMULATION_STEPS", "1")) not in ("1", "auto"):
        wrong = f"gradient_accumulation_steps {steps} in accelerate's file is not read"
        remedy = "leave it to --gradient_accumulation_steps"
    elif importlib.util.find_spec("deepspeed") is None:
        wrong, remedy = "its package is missing", "pip install deepspeed"
    if wrong:
        raise InputError("DeepSpeed", wrong, remedy)
    return int(stage)


def _setting(name: str, default: str = "") -> str:
    """As `accelerate launch` puts it into the environment."""
    return (os.environ.get(f"ACCELERATE_{name}") or default).lower()


def no_adapter(method: Any) -> str:
    """Why a baseline, which is none of our adapters, has nothing to put into shards."""
    if isinstance(method, Frozen):
        return "--adapter none trains nothing"
    return "trains or replaces the base's own weights"


def require_fit(accelerator: Accelerator, method: Any, options: Any) -> None:
    """InputError for what cannot be had of gradients and moments that are in shards."""
    wrong = remedy = None
    if not isinstance(method, Method):
        wrong, remedy = no_adapter(method), "take DDP"
    elif method.acts_on_steps():
        wrong, remedy = f"{type(method).__name__} changes single factors or moments after steps", "take DDP or FSDP2"
    elif options.optimizer != "adamw":
        wrong, remedy = f"--optimizer {options.optimizer} knows what a tensor is, and sees strips", "take adamw, or DDP"
    elif options.probe_steps:
        wrong, remedy = "--probe_steps reads whole gradients", "leave it out, or take DDP or FSDP2"
    elif getattr(options, "penalty_unclipped", False):
        wrong, remedy = "--penalty_unclipped adds to gradients that are clipped", "leave it out, or take DDP or FSDP2"
    elif options.compile:
        wrong, remedy = "--compile is not served", "leave it out, or take DDP"
    elif accelerator.mixed_precision == "fp16":
        wrong, remedy = "fp16 is not served", "take bf16 or no"
    if wrong:
        raise InputError("DeepSpeed", wrong, remedy)


class ZeroOptimizer:
    """In the place of accelerate's wrapped optimizer: the same AdamW, its steps made by DeepSpeed.

    `optimizer` is that AdamW. Its groups keep their parameters, and their settings hold; its moments are empty, but
    inside `whole`, and after a checkpoint was loaded until `begin`. Before `begin`, gradients are whole and each
    process's own: a data-driven start averages what it reads.
    """

    def __init__(self, accelerator: Accelerator, optimizer: Optimizer, stage: int):
        self.accelerator, self.optimizer, self.stage = accelerator, optimizer, stage
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        off = next((p.dtype for p in self.parameters if p.dtype != torch.float32), None)
        if off is not None:
            raise InputError("DeepSpeed", f"what trains is {off}, and its strips are float32", "take DDP")
        self.engine = self.strips = None

    def begin(self) -> None:
        """Divide everything among the processes, as it is now. The values are the first process's."""
        import deepspeed  # seconds

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        largest = sum(p.numel() for p in self.parameters)  # its buffers would be of 2 GB, whatever trains
        inner = AdamW([dict(group) for group in self.optimizer.param_groups])
        self.engine, self.strips, *_ = deepspeed.initialize(
            model=nn.ParameterList(self.parameters), optimizer=inner, dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 10**12,
                "zero_optimization": {
                    "stage": self.stage, "reduce_bucket_size": largest, "allgather_bucket_size": largest,
                },
            },
        )  # fmt: skip
        rank = torch.distributed.get_rank()
        for group, strip in self._groups():
            states = {p: self.optimizer.state.get(p, {}) for p in group}
            for key, value in next(filter(None, states.values()), {}).items():
                if value.dim():
                    flat = torch.cat([state.get(key, torch.zeros_like(p)).flatten() for p, state in states.items()])
                    flat = nn.functional.pad(flat, (0, strip.numel() * distributed.processes() - flat.numel()))
                    value = flat.view(-1, strip.numel())[rank].clone()
                inner.state[strip][key] = value
        self.optimizer.state.clear()

    def _groups(self) -> Iterator[tuple[list[nn.Parameter], Tensor]]:
        """(a group's parameters, this process's strip of them)"""
        return zip(self.strips.bit16_groups, self.strips.single_partition_of_fp32_groups, strict=True)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add to the gradients; last: whether the optimizer steps next."""
        if self.engine is None:
            self.accelerator.backward(loss)
            return
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def clip(self, most: float) -> Tensor:
        """Have the next step clip to the norm `most`; the gradients' norm over all processes, NaN if not finite."""
        self.strips.clip_grad = most if math.isfinite(most) else 0.0
        norm = torch.as_tensor(self.strips.scaled_global_norm(), device=self.accelerator.device)
        return torch.where(norm < 0, torch.nan, norm)

    def step(self) -> None:
        """DeepSpeed's step, which leaves everything as it is where the norm is not finite."""
        for group, own in zip(self.optimizer.param_groups, self.strips.optimizer.param_groups, strict=True):
            own.update({key: value for key, value in group.items() if key != "params"})
        self.engine.step()
        self.optimizer.step()  # no parameter has a gradient now: it moves nothing, and calls who follows its steps

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @contextmanager
    def whole(self) -> Iterator[Optimizer]:
        """Inside, `optimizer` has its moments, gathered from all processes, which must all come here."""
        for group, strip in self._groups() if self.engine else ():
            for key, value in self.strips.optimizer.state[strip].items():
                parts = [value] * len(group)
                if value.shape == strip.shape:
                    pieces = [torch.empty_like(value) for _ in range(distributed.processes())]
                    torch.distributed.all_gather(pieces, value)
                    sizes = [p.numel() for p in group]
                    parts = torch.cat(pieces)[: sum(sizes)].split(sizes)
                for parameter, part in zip(group, parts, strict=True):
                    self.optimizer.state[parameter][key] = part.view(parameter.shape) if part.dim() else part.clone()
        yield self.optimizer
        if self.engine:
            self.optimizer.state.clear()
