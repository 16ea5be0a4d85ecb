"""A classification run's state: adapter, head, their optimizers and schedules, averages, the best so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vislora import optim
from vislora.distributed import processes
from vislora.errors import InputError
from vislora.handle import Handle
from vislora.io import require_finite
from vislora.measure import fingerprint
from vislora.training import checkpoint
from vislora.training.ema import EMA
from vislora.training.optimizer_state import load_optimizer, optimizer_tensors
from vislora.training.resume import require_same_processes
from vislora.training.schedule import by_name, first_rate
from vislora.vision.options import ClassificationOptions


@dataclass
class Best:
    """The highest accuracy on validation so far, after which step, and the tensors that had it."""

    accuracy: float = -1.0
    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Tuned:
    """Adapter and head as one thing that trains: two optimizers (the adapter's is None where it trains nothing)."""

    def __init__(self, adapter: Handle, head: nn.Module, options: ClassificationOptions, total: int):
        o = self.options = options
        self.adapter, self.head, self.total = adapter, head, total
        decay = o.adam_weight_decay if o.head_weight_decay is None else o.head_weight_decay
        self.optimizers: dict[str, Optimizer] = {}
        if next(adapter.parameters(), None) is not None:
            self.optimizers["adapter"] = optim.from_options(o, adapter)
        self.optimizers["head"] = AdamW(head.parameters(), lr=o.head_lr or o.learning_rate, weight_decay=decay,
                                        betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_epsilon, fused=True)  # fmt: skip
        shape = by_name(o.lr_scheduler, total, o.warmup(total))
        self.schedulers = {name: LambdaLR(optimizer, shape) for name, optimizer in self.optimizers.items()}
        if "adapter" in self.optimizers:
            adapter.bind(self.optimizers["adapter"], total, first_rate(self.schedulers["adapter"], total))
        self.ema = None if o.ema_decay is None else EMA(self.named_parameters(), o.ema_decay, o.ema_warmup)
        self.best = Best()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [*self._of("adapter"), *self._of("head")]

    def _of(self, name: str) -> list[tuple[str, nn.Parameter]]:
        own = self.adapter if name == "adapter" else self.head
        return [(f"{name}.{key}", p) for key, p in own.named_parameters()]

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is kept: the adapter's tensors and the head's, under their part's name."""
        own = {f"adapter.{n}": t for n, t in self.adapter.named_tensors()}
        return own | {f"head.{n}": p for n, p in self.head.named_parameters()}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite them all. Raises InputError where the adapter's do not fit."""
        self.adapter.load_tensors(
            {n.removeprefix("adapter."): t for n, t in tensors.items() if n.startswith("adapter.")}
        )
        for name, p in self.head.named_parameters():
            p.copy_(tensors[f"head.{name}"])

    def step(self) -> None:
        """One step of every optimizer and schedule, and of the average."""
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in self.schedulers.values():
            scheduler.step()
        if self.ema is not None:
            self.ema.update()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def consider(self, accuracy: float, step: int) -> None:
        """Keep what is in the model now if it is the best on validation so far; the earlier of equals stays."""
        if accuracy > self.best.accuracy:
            self.best = Best(accuracy, step, {n: t.detach().cpu().clone() for n, t in self.tensors().items()})

    def ends(self) -> list[tuple[str, dict[str, Tensor]]]:
        """("last" or "best", its tensors), of which the one that --final_model names comes at the end; without
        validation there is no best. The average takes the place of what trained first, where there is one."""
        if self.ema is not None:
            self.ema.copy_(self.ema.average)
        found = [("last", {name: t.detach().clone() for name, t in self.tensors().items()})]
        found += [("best", self.best.tensors)] if self.best.tensors else []
        return sorted(found, key=lambda end: end[0] == self.options.final_model)

    # ---- checkpoints

    def save(self, root: Path, step: int, about: Mapping[str, Any]) -> Path:
        """Commit a checkpoint of everything that `load` brings back; `about` is JSON-able and comes back as it is."""
        files: dict[str, dict[str, Tensor]] = {"tuned": self.tensors()}
        rest = {}
        for name, optimizer in self.optimizers.items():
            files[f"optimizer_{name}"], rest[name] = optimizer_tensors(optimizer, self._of(name))
        if self.ema is not None:
            files["ema"] = self.ema.state()
        if self.best.tensors:
            files["best"] = self.best.tensors
        state = {
            **about, "optimizers": rest, "adapter_step": self.adapter.step,
            "schedules": {
                name: {k: v for k, v in s.state_dict().items() if k != "lr_lambdas"}
                for name, s in self.schedulers.items()
            },
            "best": {"accuracy": self.best.accuracy, "step": self.best.step}, "base": fingerprint(self.adapter),
            "processes": processes(),
        }  # fmt: skip
        require_finite(files["tuned"], f"the model at step {step}")
        return checkpoint.save(root, step, files, state, self.options.checkpoints_total_limit)

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Bring the run back to the step after which `saved` was made. InputError if it is of another run."""
        if saved.state["optimizers"].keys() != self.optimizers.keys():
            raise InputError(str(saved.path), "is of a run that trains other parts", "resume with its own --adapter")
        require_same_processes(saved)
        self.load_tensors(saved.tensors["tuned"])
        for name, optimizer in self.optimizers.items():
            tensors = saved.tensors[f"optimizer_{name}"]
            load_optimizer(optimizer, self._of(name), tensors, saved.state["optimizers"][name])
            schedule, empty = self.schedulers[name], [None] * len(self.schedulers[name].base_lrs)
            schedule.load_state_dict({**saved.state["schedules"][name], "lr_lambdas": empty})
        if self.ema is not None:
            self.ema.load_state(saved.tensors["ema"])
        self.adapter.step = saved.state["adapter_step"]
        self.best = Best(**saved.state["best"], tensors=saved.tensors.get("best", {}))
