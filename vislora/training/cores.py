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


def require_device() -> None:
    """InputError where a launcher started more processes on this machine than it has GPUs."""
    mine, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if there and mine >= there and not on_cpu:
        wrong = f"process {mine + 1} of this machine has no GPU: there are {there}"
        raise InputError("--num_processes", wrong, f"launch {there} a machine, or add --cpu to the launcher's flags")
