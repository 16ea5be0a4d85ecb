"""Training steps that take turns in one process, so that ratios of their times mean something; and what they hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import vislora

# Operations of a product that is added in place, which torch's counter knows nothing of.
IN_PLACE = {torch.ops.aten.addmm_: lambda into, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}


class Trainee:
    """A frozen model with one adapter and AdamW; `step()` is one whole training step.

    start_seconds: attaching and, where the method has one, the data-driven start.
    """

    def __init__(self, build: Callable[[], nn.Module], loss: Callable[[nn.Module], torch.Tensor], method: str,
                 steps: int = 1000, **options):
        self.model, self.loss = build(), loss
        began = now(self.model)
        self.adapter = vislora.attach(self.model, method, **options)
        self.optimizer = torch.optim.AdamW(self.adapter.param_groups(1e-4), weight_decay=0.0)
        self.adapter.bind(self.optimizer, steps, first_lr=1e-4)
        self.model.train()
        self.adapter.prepare(self.backward)
        self.start_seconds = now(self.model) - began

    def backward(self) -> torch.Tensor:
        loss = self.loss(self.model) + self.adapter.penalty()
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> int:
        """At the end of a forward: weights, gradients and moments of what trains, and what is kept for the backward.

        On a GPU the allocator's own peak over one step instead.
        """
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.step()
            return torch.cuda.max_memory_allocated(device)
        weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                   for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def keep(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = self.loss(self.model) + self.adapter.penalty()
            trained = sum(p.numel() * p.element_size() for p in self.adapter.parameters())
            size = sum(weights.values()) + sum(kept.values()) + 3 * trained
            del loss
        return size


def now(model: nn.Module) -> float:
    """The clock, once the model's device has nothing left to do."""
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(trainees: dict[str, Trainee], repeats: int) -> dict[str, float]:
    """{name: median seconds of a step}, the variants taking turns so that a slow moment meets them all."""
    times: dict[str, list[float]] = {name: [] for name in trainees}
    for turn in range(repeats + 2):
        for name, trainee in trainees.items():
            began = now(trainee.model)
            trainee.step()
            if turn >= 2:  # the first two warm up
                times[name].append(now(trainee.model) - began)
    return {name: statistics.median(values) for name, values in times.items()}


def in_turns_seconds(steps: dict[str, Callable[[], object]], pairs: int, device: str = "cpu") -> dict[str, list[float]]:
    """{name: seconds of each call}, the order turning round every time; two warm up.

    On a CPU this thread's processor time; on a GPU what the clock shows until the device is done, since a step that
    opens a photo or reads a loss makes it wait.
    """
    clock = time.thread_time if device == "cpu" else _when_done
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(pairs + 2):
        for name in list(steps) if turn % 2 else list(steps)[::-1]:
            began = clock()
            steps[name]()
            if turn >= 2:
                seconds[name].append(clock() - began)
    return seconds


def _when_done() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
