"""What a script computes with: its device, how many CPU threads, and whether in compiled graphs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings

import torch
from torch import nn

from vislora.errors import InputError


def use_cores(processes: int, threads: int | None) -> None:
    """Compute with `threads` threads; with None, share the machine's cores among `processes`.

    Without a GPU `accelerate launch` holds each process to one thread, whatever the machine has. None leaves a script
    that was started without it as it is.
    """
    if threads is None:
        if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # what `accelerate launch` always sets
            return
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
    torch.set_num_threads(threads)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def require_device() -> None:
    """InputError where a launcher started more processes on this machine than it has GPUs."""
    mine, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if there and mine >= there and not _is_set("ACCELERATE_USE_CPU"):
        wrong = f"process {mine + 1} of this machine has no GPU: there are {there}"
        raise InputError("--num_processes", wrong, f"launch {there} a machine, or add --cpu to the launcher's flags")


def use_compiler(model: nn.Module) -> None:
    """From its next call on, compute `model` (a network behind whatever wraps it) in graphs by torch.compile.

    InputError where what writes their kernels is missing: a C++ compiler for a CPU, triton for a GPU.
    """
    if next(model.parameters()).device.type == "cpu":
        if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
            raise InputError("--compile", "needs a C++ compiler, and there is none", "install g++, or leave it out")
    elif importlib.util.find_spec("triton") is None:
        raise InputError("--compile", "needs the package triton", "pip install triton, or leave it out")
    # Said by dynamo's own look at the updates that hooks on the root hand to the graph behind them, and at the cached
    # questions for versions in diffusers' checkpointing.
    for said in ("The .grad attribute of a Tensor that is not a leaf", "Dynamo detected a call to a `functools.lru"):
        warnings.filterwarnings("ignore", said)
    model.compile()
