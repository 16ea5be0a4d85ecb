"""What PEFT's AdaLoRA does beside its layers: a penalty in its model's loss, and a budget that follows the steps."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor

from ..errors import InputError

_ANY_LENGTH = 2**31  # PEFT needs the number of steps before it is known; `bind` puts the real one in its place


class Schedule:
    """The budget of one component, with a state that can be saved: PEFT keeps it in a dict and in the configuration."""

    def __init__(self, model: PeftModel, name: str, pattern: dict | None):
        """pattern: what a training has left of the budget, None for a fresh start."""
        self.tuner, self.name = model.base_model, name
        self.config = model.peft_config[name]
        self.allocator, self.config.rank_pattern = self.tuner.rankallocator, pattern
        if self.config.init_r <= self.config.target_r:
            wrong = f"init_r {self.config.init_r} is not above target_r {self.config.target_r}, PEFT has none to prune"
            raise InputError("peft_config", wrong, "raise init_r")

    def bind(self, total: int) -> None:
        """Take `total` for the number of steps, unless the configuration gave its own."""
        if self.config.rank_pattern is not None:
            wrong = "this AdaLoRA has spent its budget: what it has pruned is gone"
            raise InputError("bind", wrong, "use it as it is, or train a new one")
        if self.config.total_step != _ANY_LENGTH:
            return
        if self.config.tinit + self.config.tfinal >= total:
            wrong = f"tinit {self.config.tinit} and tfinal {self.config.tfinal} leave none of {total} steps to prune in"
            raise InputError("peft_config", wrong, "lower them, or train longer")
        self.config.total_step = total

    def step(self, step: int) -> None:
        """Optimizer step number `step` (from 1) was made; gradients are still there."""
        self.tuner.update_and_allocate(step)

    def penalty(self) -> Tensor:
        """PEFT's own orthogonality term, by its own code: what its forward adds to a loss of 0."""
        output = SimpleNamespace(loss=torch.zeros((), device=next(self.tuner.parameters()).device))
        model = SimpleNamespace(forward=lambda: output, named_parameters=self.tuner.model.named_parameters)
        stand_in = SimpleNamespace(
            model=model, peft_config=self.tuner.peft_config, trainable_adapter_name=self.tuner.trainable_adapter_name
        )
        return AdaLoraModel.forward(stand_in).loss

    def _names(self) -> list[tuple[str, Tensor]]:
        return [(n, p) for n, p in self.tuner.model.named_parameters() if "lora_" in n and self.name in n]

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor): both averages of every adapter tensor, and which triplets are kept."""
        kept = self.config.rank_pattern or {}
        for name, parameter in self._names():
            for key, averages in (("ipt", self.allocator.exp_avg_ipt), ("unc", self.allocator.exp_avg_unc)):
                yield f"{name}.{key}", averages.get(name, torch.zeros_like(parameter)).detach()
            if f"lora_E.{self.name}" in name:
                pattern = kept.get(name, kept.get(name.replace(f".{self.name}", ""), [True] * len(parameter)))
                yield f"{name}.kept", torch.tensor(pattern)

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        pattern = {}
        for name, parameter in self._names():
            self.allocator.ipt[name] = torch.zeros_like(parameter)
            self.allocator.exp_avg_ipt[name] = state[f"{name}.ipt"].to(parameter.device, copy=True)
            self.allocator.exp_avg_unc[name] = state[f"{name}.unc"].to(parameter.device, copy=True)
            if f"{name}.kept" in state:
                pattern[name] = state[f"{name}.kept"].tolist()
        self.config.rank_pattern = pattern


def completed(settings: dict) -> dict:
    """The settings with a length, and no pattern: a saved one follows the layers, or PEFT would warn of it."""
    return {**settings, "total_step": settings.get("total_step") or _ANY_LENGTH, "rank_pattern": None}
