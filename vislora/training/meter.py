"""From one line of the log to the next: the means of what each step gives, and no step that is not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vislora.errors import InputError

LIMIT = 3  # steps in a row that are not finite and end a run


class Meter:
    """Takes in each step's scalars between backward and the optimizers' step, and waits for the device only when read.

    A step whose "grad_norm" (or "penalty") is not finite moves nothing: fused optimizers are told by `found_inf`, on
    the device, as a loss scale tells them, and keep their moments and step counts; from others the gradients are taken
    away, which reads one number a step. Its scalars are in no mean. Where a loss scale skips steps by itself, nothing
    is done but to leave them out of the means, and only losses that are not finite count towards LIMIT.

    optimizers: torch's or accelerate's; scaler: accelerate's loss scale, or None. Every process must give the same
    gradients' norm, as they do once gradients are averaged.
    """

    def __init__(self, optimizers: Iterable[Any] = (), scaler: Any = None):
        self._optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
        self._scaler = scaler
        self._row: Tensor | float = 0.0  # steps in a row that are not finite, up to the last
        self._worst: Tensor | float = 0.0
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._taken, self._since = 0, 0.0, time.perf_counter()

    @torch.no_grad()
    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Take in a step's scalars: "loss", "grad_norm" and others, of which "penalty" is watched too."""
        finite = torch.stack([parts[name].float() for name in ("grad_norm", "penalty") if name in parts]).isfinite()
        good = finite.all().float()
        if self._scaler is None:
            self._keep_out(1 - good)
            lost = 1 - good
        else:
            lost = 1 - parts["loss"].isfinite().float()
        self._row = (self._row + lost) * lost
        self._worst = torch.maximum(torch.as_tensor(self._worst, device=lost.device), self._row)
        for name, value in parts.items():
            value = torch.where(good > 0, value.detach().float(), 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._taken = self._taken + good
        self._steps += 1

    def _keep_out(self, lost: Tensor) -> None:
        for optimizer in self._optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer.found_inf = lost
            elif bool(lost):
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None

    def read(self, mean: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The means over the finite steps since the last reading (NaN without one), "seconds_per_step" over all, and
        "skipped_steps" where there were any; begins anew.

        mean: over processes. InputError where LIMIT steps in a row were not finite: the run has diverged, and what
        trains is as it was before them.
        """
        taken, worst = int(self._taken), int(self._worst)
        sums = {name: float(value if mean is None else mean(value)) for name, value in self._sums.items()}
        if worst >= LIMIT:
            wrong = f"the loss or its gradient was not finite for {worst} steps in a row: the run diverged"
            raise InputError("--learning_rate", wrong, "lower it, or warm up longer; what was saved is finite")
        values = {name: value / taken if taken else math.nan for name, value in sums.items()}
        values["seconds_per_step"] = (time.perf_counter() - self._since) / self._steps
        if taken < self._steps:
            values["skipped_steps"] = float(self._steps - taken)
        self._begin()
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Seconds inside are no step's."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start
