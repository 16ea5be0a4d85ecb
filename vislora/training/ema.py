"""An exponential moving average of what trains: of nothing else, so it costs one copy of the trainable tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from vislora.errors import InputError


class EMA:
    """Averages of named parameters, in float32 or wider, updated once an optimizer step.

    After step t (from 1): average = d average + (1 - d) parameter, d = decay, or with `warmup` min(decay, t / (t + 9)),
    so that early averages forget the start (the ramp (1 + n) / (10 + n) of TensorFlow's, n steps before this one).
    `state` and `load_state` carry it through a checkpoint bit for bit.
    """

    def __init__(self, parameters: Iterable[tuple[str, Parameter]], decay: float, warmup: bool = False):
        """parameters: (name, parameter) pairs, kept as they are. Raises InputError unless 0 <= decay < 1."""
        if not 0 <= decay < 1:
            raise InputError("--ema_decay", f"{decay} is not in [0, 1)", "0.999 is usual, 0 follows the last step")
        self.decay, self.warmup, self.steps = decay, warmup, 0
        self.live = dict(parameters)
        wide = torch.float32
        self.average = {n: p.detach().to(torch.promote_types(p.dtype, wide), copy=True) for n, p in self.live.items()}

    def rate(self, step: int) -> float:
        """The share of the old average that step `step` (from 1) keeps."""
        return min(self.decay, step / (step + 9)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are after an optimizer step."""
        self.steps += 1
        share = 1 - self.rate(self.steps)
        for name, average in self.average.items():
            average.lerp_(self.live[name].detach().to(average.dtype), share)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the parameters hold their averages; their own values come back bit for bit, after an error too."""
        own = {name: p.detach().clone() for name, p in self.live.items()}
        self.copy_(self.average)
        try:
            yield
        finally:
            self.copy_(own)

    @torch.no_grad()
    def copy_(self, values: dict[str, Tensor]) -> None:
        """Write `values` into the parameters, in place, so that whoever caches by version sees that they moved."""
        for name, parameter in self.live.items():
            parameter.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """{"steps": int64 scalar, "average|<name>": tensor}: a file of a checkpoint."""
        flat = {f"average|{name}": tensor for name, tensor in self.average.items()}
        return {"steps": torch.tensor(self.steps), **flat}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave. Raises InputError, and changes nothing, unless names and shapes agree."""
        own = self.state()
        odd = sorted(own.keys() ^ state.keys()) or [n for n, t in own.items() if state[n].shape != t.shape]
        if odd:
            remedy = "resume with the settings that the run began with"
            raise InputError("EMA state", f"{len(odd)} tensors do not fit, first {odd[0]}", remedy)
        self.steps = int(state["steps"])
        for name, average in self.average.items():
            average.copy_(state[f"average|{name}"])
