"""The handle of an adapter: what users hold after `attach` or `load`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Method
from .errors import InputError
from .handle import Handle
from .part import Part
from .quantized import is_quantized
from .root import RootHook, install, part_holder, require_float_weights, require_untied, uninstall
from .site import Site, qualified
from .tap import taps_of
from .update import Update

log = logging.getLogger("vislora")


class Adapter(Handle):
    """The handle that `attach` and `load` return.

    parts: {component name: Part}; one part with the empty name where a bare module was adapted.
    """

    def __init__(
        self, name: str, method_name: str, method: Method, parts: dict[str, tuple[nn.Module, Part]], seed: int
    ):
        super().__init__(name, method_name, method, {component: root for component, (root, _) in parts.items()}, seed)
        self.parts = {component: part for component, (_, part) in parts.items()}
        self._preparing = False
        self._hooks: list[RootHook] = []
        for root, part in parts.values():
            self._hooks.append(install(root, part))

    # ---- what trains

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """("<site>.<tensor>", tensor) for everything that must be kept: parameters and fixed tensors."""
        for component, part in self.parts.items():
            for site in part.sites:
                for name, tensor in part.own_tensors(site).items():
                    yield f"{qualified(component, site.name)}.{name}", tensor

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors)
        for part in self.parts.values():
            part.prepared = True
        self._clear()

    def param_groups(self, lr: float, component_lr: dict[str, float] | None = None) -> list[dict[str, Any]]:
        """Optimizer groups: one for each component and each rate that the method's roles ask for (LoRA+ has two).

        component_lr gives single components, such as "text_encoder", a rate of their own.
        """
        groups: dict[tuple[str, float], dict[str, Any]] = {}
        for component, part in self.parts.items():
            rate = (component_lr or {}).get(component, lr)
            for site in part.sites:
                for name, tensor in part.own_tensors(site).items():
                    if isinstance(tensor, nn.Parameter):
                        ratio = self.method.lr_ratio(self.method.roles.get(name, ""))
                        own = {"params": [], "lr": rate * ratio, "name": f"{component or 'model'} x{ratio:g}"}
                        groups.setdefault((component, ratio), own)["params"].append(tensor)
        return list(groups.values())

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._preparing:
            super()._stepped(optimizer)
            self.method.on_step(self, self.step, optimizer)
        self._clear()

    def first_lr(self) -> float:
        """The schedule's first non-zero learning rate. Raises InputError where it is not known."""
        if not self._first_lr:
            wrong = f"{self.method_name} needs the schedule's first non-zero rate"
            raise InputError("prepare", wrong, "give it to adapter.bind as first_lr, or set init_lr")
        return self._first_lr

    def prepare(self, closure: Callable[[], Tensor]) -> None:
        """Run the method's data-driven start, if it has one. closure() runs forward and backward, returns the loss."""
        for part in self.parts.values():
            part.prepared = True
        self._preparing = True
        try:
            self.method.prepare(self, closure)
        finally:
            self._preparing = False
        self._clear()

    def penalty(self) -> Tensor:
        """The method's regulariser, a weighted scalar; 0 for most methods.

        Raises InputError before `bind` for a method that has one.
        """
        if not self.method.has_penalty():
            return super().penalty()
        if self._max_lr is None:
            raise InputError("penalty", f"{self.method_name} scales it by a learning rate", "call adapter.bind first")
        sites = [part.tensors_of(site) for part in self.parts.values() for site in part.sites]
        return self.method.penalty(sites, self._max_lr)

    # ---- what it does to the model

    @torch.no_grad()
    def site_updates(self) -> Iterator[tuple[str, Site, SimpleNamespace, Update]]:
        """(qualified site name, site, its tensors, its Update) for every site, without gradient, at strength 1."""
        for component, part in self.parts.items():
            for site, update in zip(part.sites, part(), strict=True):
                yield qualified(component, site.name), site, part.tensors_of(site), update.detach()

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """{module name: W_adapted - W_base, float32, of the weight's shape}, at the present strength."""
        out: dict[str, Tensor] = {}
        for component, part in self.parts.items():
            for site, update in zip(part.sites, part(), strict=True):
                key = qualified(component, site.path)
                if key not in out:
                    out[key] = torch.zeros(site.shape, device=site.parameter.device)
                rows = slice(None) if site.rows is None else site.rows
                out[key].flatten(1)[rows] += part.adapter_weight * update.dense(site.weight()).float()
        return out

    def base_weights(self) -> Iterator[tuple[str, list[int], Callable[[], Tensor]]]:
        for component, part in self.parts.items():
            for site in part.sites:
                yield qualified(component, site.name), [site.m, site.n], site.weight

    @property
    def weight(self) -> float:
        """Strength: what the delta is multiplied by."""
        return next(iter(self.parts.values())).adapter_weight

    @weight.setter
    def weight(self, value: float) -> None:
        if self._is_merged:
            raise InputError("weight", f"{self.name!r} is merged", "unmerge it, set the weight, merge it again")
        for part in self.parts.values():
            part.adapter_weight = float(value)

    @contextlib.contextmanager
    def disabled(self):
        """Inside, the model computes what the base computes, bit for bit."""
        self._require_unmerged("disabled")
        for part in self.parts.values():
            part.disabled += 1
        try:
            yield
        finally:
            for part in self.parts.values():
                part.disabled -= 1

    @contextlib.contextmanager
    def hidden(self):
        """Inside, the adapter is no child of the model: loaders that walk the model see the base alone."""
        holders = [(part_holder(self.roots[c], part.sites[0].module), part) for c, part in self.parts.items()]
        for holder, part in holders:
            delattr(holder, f"vislora_{part.adapter_name}")
        try:
            yield
        finally:
            for holder, part in holders:
                holder.add_module(f"vislora_{part.adapter_name}", part)

    def _fold(self) -> None:
        for component, part in self.parts.items():
            require_float_weights(part)
            require_untied(self.roots[component], part)
        for part in self.parts.values():
            for tap in taps_of(part):
                tap.merge(part)

    def _unfold(self) -> None:
        for part in self.parts.values():
            for tap in taps_of(part):
                tap.unmerge(part)

    def detach(self, merge: bool = False) -> None:
        """Remove the adapter. merge=False: the base model bit for bit. True: the delta stays in the weights."""
        if merge and not self._is_merged:
            self.merge()
        elif self._is_merged and not merge:
            self.unmerge()
        if self._step_hook is not None:
            self._step_hook.remove()
        for hook in self._hooks:
            hook.remove()
        lost = max(tap.keep(part) for part in self.parts.values() for tap in taps_of(part)) if merge else 0.0
        if lost > 0.1:
            words = "merging lost %.0f %% of a delta to the weights' precision -> merge into a float32 copy"
            log.warning(words, 100 * lost)
        for component, part in self.parts.items():
            uninstall(self.roots[component], part)
        self.parts, self.roots, self._hooks = {}, {}, []

    # ---- files

    def save(self, folder: str | Path) -> Path:
        """Write `folder`/adapter.safetensors, complete with its configuration. Returns the file's path."""
        from .io import save

        return save(self, Path(folder))

    def check_exportable(self, rank: int | None = None) -> None:
        from .export import check_exportable

        check_exportable(self, rank=rank)

    def export(self, folder: str | Path, format: str = "diffusers", rank: int | None = None) -> Path:
        """Write what stock tools load, squeezed to `rank` where that is smaller. Returns the file, PEFT's folder.

        format: "diffusers", "kohya" or "peft". Raises InputError for what it cannot hold.
        """
        from .export import export

        return export(self, Path(folder), format, rank)

    @property
    def quantized(self) -> bool:
        return any(is_quantized(site.module) for part in self.parts.values() for site in part.sites)

    @property
    def sites(self) -> list[str]:
        """The qualified name of every adapted matrix or row block."""
        return [qualified(component, site.name) for component, part in self.parts.items() for site in part.sites]

    def summary(self) -> str:
        """One line for each site: name, shape, trainable parameters."""
        lines = []
        for component, part in self.parts.items():
            for site in part.sites:
                count = sum(t.numel() for t in part.own_tensors(site).values() if isinstance(t, nn.Parameter))
                lines.append(f"{qualified(component, site.name)}  {site.m} x {site.n}  {count:,}")
        return "\n".join(lines)

    def _clear(self) -> None:
        for part in self.parts.values():
            part.clear()
