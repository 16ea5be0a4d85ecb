"""Handles: what `attach` and `load` return, whatever trains. An adapter is one; `vislora.baselines` has the others."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .errors import InputError

_held: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # models that one handle has to itself: its method


class Handle(ABC):
    """What scripts hold of a model that trains: the tensors, the switch back to the base, files.

    name: the adapter's name. method_name: the word of --adapter; method: its options, a frozen dataclass.
    roots: {component name: module}, one with the empty name where a bare module was given.
    """

    def __init__(self, name: str, method_name: str, method: Any, roots: dict[str, nn.Module], seed: int):
        self.name, self.method_name, self.method, self.roots, self.seed = name, method_name, method, roots, seed
        self.step = 0
        self.total_steps = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self._max_lr: float | None = None
        self._first_lr = 0.0
        self._step_hook = None
        self._is_merged = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy of model and handle together is whole, but follows no optimizer until it is bound to one.
        return {**self.__dict__, "optimizer": None, "_step_hook": None}

    # ---- what trains

    @abstractmethod
    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(qualified name, tensor) for everything that must be kept: parameters and fixed tensors."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(qualified name, parameter) for every trainable tensor."""
        return ((name, t) for name, t in self.named_tensors() if isinstance(t, nn.Parameter))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable tensors alone."""
        return (parameter for _, parameter in self.named_parameters())

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite every tensor from `named_tensors` of an equal handle. Raises InputError for any difference."""
        from .io import require_same_tensors

        own = dict(self.named_tensors())
        require_same_tensors(own, tensors, "adapter")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def param_groups(self, lr: float, component_lr: dict[str, float] | None = None) -> list[dict[str, Any]]:
        """Optimizer groups, one for each component.

        component_lr gives single components, such as "text_encoder", a rate of their own.
        """
        groups = []
        for component in self.roots:
            prefix = f"{component}." if component else ""
            own = [p for name, p in self.named_parameters() if name.startswith(prefix)]
            groups.append({"params": own, "lr": (component_lr or {}).get(component, lr), "name": component or "model"})
        return groups

    def bind(self, optimizer: torch.optim.Optimizer, total_steps: int, first_lr: float | None = None) -> None:
        """Follow the optimizer's steps: scheduled methods act after each by themselves.

        Reads the largest learning rate, which penalties are scaled by. Takes accelerate's wrapped optimizers too.
        first_lr: the schedule's first non-zero rate, where a warm-up holds the optimizer's at zero now.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        self.optimizer = inner
        self._first_lr = first_lr or max(float(g["lr"]) for g in inner.param_groups)
        rates = [float(g.get("initial_lr", g["lr"])) for g in inner.param_groups]
        self._max_lr, self.total_steps = max(rates), total_steps
        if self._step_hook is not None:
            self._step_hook.remove()
        self._step_hook = inner.register_step_post_hook(lambda optimizer, args, kwargs: self._after_step(optimizer))

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        # A gradient scaler lets fused optimizers run and leave everything as it is, where it makes others wait.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():
            self._stepped(optimizer)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """The bound optimizer has made a step; gradients are still there."""
        self.step += 1

    def prepare(self, closure: Callable[[], Tensor]) -> None:  # noqa: B027  (most have no such start)
        """Run the method's data-driven start, if it has one. closure() runs forward and backward, returns the loss."""

    def penalty(self) -> Tensor:
        """The method's regulariser, a weighted scalar; 0 for most."""
        root = next(iter(self.roots.values()))
        return torch.zeros((), device=next(root.parameters()).device)

    # ---- what it does to the model

    @abstractmethod
    def deltas(self) -> dict[str, Tensor]:
        """{module name: W_adapted - W_base, float32, of the weight's shape}, at the present strength."""

    @abstractmethod
    def base_weights(self) -> Iterator[tuple[str, list[int], Callable[[], Tensor]]]:
        """(name, shape, how to read it) of every base weight that is adapted; it is read as float32 or float64."""

    @property
    def weight(self) -> float:
        """Strength: what the delta is multiplied by."""
        return 1.0

    @weight.setter
    def weight(self, value: float) -> None:
        if value != 1:
            raise InputError("weight", f"{self.method_name} has no strength, got {value:g}", "leave it at 1")

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the model computes what the base computes, bit for bit."""

    def merge(self) -> None:
        """Fold the delta into the weights; `unmerge` puts the untouched originals back."""
        if self._is_merged:
            raise InputError("merge", f"{self.name!r} is merged already", "unmerge it first")
        self._fold()
        self._is_merged = True

    def unmerge(self) -> None:
        """Take the delta out of the weights again, bit for bit."""
        if not self._is_merged:
            raise InputError("unmerge", f"{self.name!r} is not merged", "call merge first")
        self._unfold()
        self._is_merged = False

    @abstractmethod
    def _fold(self) -> None:
        """Put the delta into the weights, or raise and leave them as they are."""

    @abstractmethod
    def _unfold(self) -> None:
        """Undo `_fold`."""

    @contextlib.contextmanager
    def merged(self):
        """Folded into the weights inside; exact on leaving, after an exception too."""
        self.merge()
        try:
            yield
        finally:
            self.unmerge()

    def _require_unmerged(self, what: str) -> None:
        if self._is_merged:
            raise InputError(what, f"{self.name!r} is merged into the weights", "unmerge it first")

    @abstractmethod
    def detach(self, merge: bool = False) -> None:
        """Let go of the model. merge=False: the base model bit for bit. True: the delta stays in the weights."""

    # ---- files

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Write `folder`, enough for `vislora.load` to rebuild it. Returns the file's, or the folder's, path."""

    @abstractmethod
    def check_exportable(self, rank: int | None = None) -> None:
        """Raise InputError if `export` to `rank` would refuse; cheap, so it can run before training."""

    @abstractmethod
    def export(self, folder: str | Path, format: str = "diffusers", rank: int | None = None) -> Path | None:
        """Write what stock tools load, squeezed to `rank`; returns its path. InputError for what it cannot hold.

        None, and one logged line, where what was trained has no such form.
        """

    @property
    @abstractmethod
    def sites(self) -> list[str]:
        """The qualified name of everything that is adapted."""

    @abstractmethod
    def summary(self) -> str:
        """One line for each site: name, shape, trainable parameters."""

    @property
    def quantized(self) -> bool:
        """Whether any of the base weights is kept in a few bits."""
        return False

    @property
    def base_copy(self) -> int:
        """Bytes held to be able to return to the base."""
        return 0


class Dense(Handle):
    """A handle whose change of the weights is known as whole matrices, not as factors."""

    @abstractmethod
    def changes(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module name, base weight, W_adapted - W_base), float32 or float64, of one adapted matrix after another."""

    @property
    def measurable(self) -> bool:
        """Whether `changes` can be known at all."""
        return True

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        return {name: delta.float() for name, _, delta in self.changes()}

    def hold(self) -> None:
        """Have the models to itself: nothing else attaches until `release`."""
        for root in self.roots.values():
            _held[root] = self.method_name

    def release(self) -> None:
        """Forget the optimizer and the models."""
        if self._step_hook is not None:
            self._step_hook.remove()
        for root in self.roots.values():
            del _held[root]
        self.roots = {}


def require_no_rank(handle: Handle, rank: int | None) -> None:
    """Raise InputError for a rank to squeeze to, where the export has none."""
    if rank is not None:
        raise InputError("export_rank", f"{rank} beside {handle.method_name}, whose export has no rank", "leave it out")


def require_free(root: nn.Module) -> None:
    """Raise InputError if a handle has the model to itself."""
    if root in _held:
        wrong = f"{type(root).__name__} is trained by {_held[root]!r}, beside which nothing attaches"
        raise InputError("attach", wrong, "detach that first")
