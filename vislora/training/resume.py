"""Going on with a run: is it the same run, and how its state is put away and brought back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vislora.distributed import processes
from vislora.errors import InputError
from vislora.handle import Handle
from vislora.io import require_finite
from vislora.measure import fingerprint
from vislora.training import checkpoint
from vislora.training.optimizer_state import load_optimizer, optimizer_tensors


def require_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> None:
    """Raise InputError listing every setting that differs, except those in `free`, which no past step depended on.

    "adapter_options" holds the adapter's own, which are listed one by one.
    """
    saved, now = ({**about, **(about.get("adapter_options") or {}), "adapter_options": None} for about in (saved, now))
    keys = [key for key in {**saved, **now} if key not in free]
    off = [f"{key} was {saved.get(key)!r}, is {now.get(key)!r}" for key in keys if saved.get(key) != now.get(key)]
    if off:
        remedy = "give the run's own settings (--config RUN/config.yaml), or start a new run"
        raise InputError("--resume_from_checkpoint", f"{len(off)} settings changed: {'; '.join(off[:6])}", remedy)


def require_same_processes(saved: checkpoint.Checkpoint) -> None:
    """Raise InputError unless as many processes go on as began: with others, a step would be of other samples."""
    began = saved.state.get("processes", processes())
    if began != processes():
        wrong = f"the run has {began} processes, here are {processes()}"
        raise InputError(str(saved.path), wrong, f"start it with {began} processes")


def save_state(
    root: Path,
    step: int,
    adapter: Handle,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler | None,
    about: Mapping[str, Any],
    limit: int | None,
    more: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Commit a checkpoint of everything that `load_state` brings back; `about` is JSON-able and comes back as it is.

    more: {file's stem: tensors} of the script's own, such as an average's.
    Raises InputError, and writes nothing, where the adapter is not finite.
    """
    moments, rest = optimizer_tensors(optimizer, list(adapter.named_parameters()))
    state = {
        **about,
        "optimizer": rest,
        "schedule": {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"},
        "scaler": scaler.state_dict() if scaler is not None else None,
        "adapter_step": adapter.step,
        "base": fingerprint(adapter),
        "processes": processes(),
    }
    tensors = {"adapter": dict(adapter.named_tensors()), "optimizer": moments, **(more or {})}
    require_finite(tensors["adapter"], f"the adapter at step {step}")
    return checkpoint.save(root, step, tensors, state, limit)


def load_state(
    saved: checkpoint.Checkpoint,
    adapter: Handle,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Bring a run back to the step after which `saved` was made. Raises InputError if it is of another adapter."""
    require_same_processes(saved)
    adapter.load_tensors(saved.tensors["adapter"])
    load_optimizer(optimizer, list(adapter.named_parameters()), saved.tensors["optimizer"], saved.state["optimizer"])
    schedule = saved.state["schedule"]
    scheduler.load_state_dict({**schedule, "lr_lambdas": [None] * len(scheduler.base_lrs)})
    if scaler is not None and saved.state["scaler"] is not None:
        scaler.load_state_dict(saved.state["scaler"])
    adapter.step = saved.state["adapter_step"]
