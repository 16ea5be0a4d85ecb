"""How many CPU threads a script computes with."""

from __future__ import annotations

import os

import torch


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
