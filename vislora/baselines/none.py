"""The frozen base: nothing trains, and everything that is asked of an adapter is answered for no change at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..handle import Dense, require_no_rank
from ..site import Site
from ._baseline import Baseline, Found


@dataclass(frozen=True)
class Frozen(Baseline):
    """No training: what any adapter is compared with."""

    word: ClassVar[str] = "none"
    trains: ClassVar[bool] = False

    def find(self, root: nn.Module, targets) -> list[Site]:
        if targets is not None:
            raise InputError("targets", f"{targets!r} beside none, which trains nothing", "leave them out")
        return []

    def build(self, found: Found, name: str, seed: int) -> FrozenHandle:
        return FrozenHandle(name, self, found, seed)


class FrozenHandle(Dense):
    """The frozen model. Its files do not exist: `save` and `export` refuse."""

    def __init__(self, name: str, method: Frozen, found: Found, seed: int):
        super().__init__(name, method.word, method, {component: root for component, (root, _) in found.items()}, seed)
        self._thawed = [p for root in self.roots.values() for p in root.parameters() if p.requires_grad]
        for parameter in self._thawed:
            parameter.requires_grad_(False)
        self.hold()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def bind(self, optimizer: torch.optim.Optimizer, total_steps: int, first_lr: float | None = None) -> None:
        raise InputError("bind", "none trains nothing that an optimizer could step", "take another adapter")

    def changes(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        return iter(())

    def base_weights(self) -> Iterator:
        return iter(())

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _fold(self) -> None:
        """There is no delta."""

    def _unfold(self) -> None:
        """There was none."""

    def detach(self, merge: bool = False) -> None:
        for parameter in self._thawed:
            parameter.requires_grad_(True)
        self.release()

    def save(self, folder: str | Path) -> Path:
        raise InputError("save", "none has nothing to save", "load the base itself")

    def check_exportable(self, rank: int | None = None) -> None:
        require_no_rank(self, rank)

    def export(self, folder: str | Path, format: str = "diffusers", rank: int | None = None) -> Path | None:
        raise InputError("export", "none has nothing to export", "load the base itself")

    @property
    def sites(self) -> list[str]:
        return []

    def summary(self) -> str:
        return "nothing trains"
