"""What a script computes with: its device, and how many CPU threads."""

from __future__ import annotations

import os

import torch

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


def require_device(whole_model: bool = False) -> None:
    """InputError where a launcher started more processes on this machine than it has GPUs; with `whole_model`, also
    where it would keep the model in shards."""
    mine, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    sharding = [name for name in ("FSDP", "DeepSpeed") if whole_model and _is_set(f"ACCELERATE_USE_{name.upper()}")]
    if sharding:
        wrong = f"{sharding[0]} is not served: each process of this script holds the whole model"
        raise InputError("accelerate launch", wrong, "take DDP, as in configs/accelerate/ddp.yaml")
    if there and mine >= there and not _is_set("ACCELERATE_USE_CPU"):
        wrong = f"process {mine + 1} of this machine has no GPU: there are {there}"
        raise InputError("--num_processes", wrong, f"launch {there} a machine, or add --cpu to the launcher's flags")
