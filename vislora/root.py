"""Where a part of an adapter meets the model that it was attached to: one hook on the root, one child of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.compiler import is_compiling

from .distributed import is_sharded
from .errors import InputError
from .layer import is_read
from .offload import is_hooked, require_readable
from .quantized import is_quantized
from .tap import ReadTap, Tap, tap_of, taps_of

if TYPE_CHECKING:
    from .part import Part


class RootHook:
    """Before the root's forward: compute the updates of one part. After it, once: was every tap reached?"""

    def __init__(self, root: nn.Module, part: Part):
        self.part = part
        self.checked = False
        self.handles = (
            root.register_forward_pre_hook(self.before, with_kwargs=True),
            root.register_forward_hook(self.after),
            root.register_forward_hook(self.leave, always_call=True),
        )

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.part.prepared and module.training and torch.is_grad_enabled():
            wrong = f"{self.part.adapter_name!r} starts from data that it has not seen"
            raise InputError("prepare", wrong, "call adapter.bind, then adapter.prepare(closure), before training")
        hooked = is_hooked(module) or is_hooked(self.part.sites[0].module)
        if hooked and "magnitude" in self.part.method.roles.values():
            require_readable(module, self.part.adapter_name)
        if is_hooked(module):
            self.part.defer(_call_scale(kwargs))
        else:
            self.part.refresh(_call_scale(kwargs))
        if is_compiling():
            self.part.compiled = self.part.traced = True
        else:
            self.part.called.clear()
        self.part.inside = True

    def leave(self, module: nn.Module, args: tuple, output) -> None:
        """The forward has ended, by an exception too."""
        self.part.inside = False
        if is_compiling():  # what a graph leaves behind is an output of it, and an input of the next call
            self.part.traced = False
            self.part.clear()

    def after(self, module: nn.Module, args: tuple, output) -> None:
        if is_compiling() or self.part.compiled or self.checked or not self.part.active:
            return
        if not module.training or not torch.is_grad_enabled():
            return
        self.checked = True
        missed = [s.name for s in self.part.sites if s.module not in self.part.called and not self.part.is_merged(s)]
        if missed:
            wrong = f"{len(missed)} adapted layers took no part in the forward: {', '.join(missed[:5])}"
            remedy = "the model reads their weights without calling them; leave them out of the targets"
            raise InputError("targets", wrong, remedy)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _call_scale(kwargs: dict) -> float:
    """The strength that diffusers' callers pass for one call, `cross_attention_kwargs={"scale": s}` and its kin."""
    for key in ("cross_attention_kwargs", "joint_attention_kwargs"):
        given = kwargs.get(key)
        if given and "scale" in given:
            return float(given["scale"])
    return 1.0


def part_holder(root: nn.Module, first: nn.Module) -> nn.Module:
    """The module that a part becomes a child of: the root, unless the root runs its children one after another."""
    return first if isinstance(root, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) else root


def require_float_weights(part: Part) -> None:
    """Raise InputError if an adapted weight is quantized, since rounding it anew would lose the delta, or in shards."""
    for site in part.sites:
        if is_sharded(site.parameter):
            remedy = "save the adapter, load it into a whole copy of the model and merge there"
            raise InputError("merge", f"the weight of {site.name} is in shards", remedy)
        if is_quantized(site.module):
            wrong = f"the weight of {site.name} is quantized ({type(site.module).__name__})"
            raise InputError("merge", wrong, "load the base in bf16 or fp32 and the adapter into it, then merge")


def require_untied(root: nn.Module, part: Part) -> None:
    """Raise InputError if an adapted weight serves another module too, which merging would change with it."""
    adapted = {id(site.parameter): site for site in part.sites}
    owners: dict[int, set[int]] = {}
    for module in root.modules():
        for parameter in module._parameters.values():
            if id(parameter) in adapted:
                owners.setdefault(id(parameter), set()).add(id(module))
    for key, modules in owners.items():
        if len(modules) > 1:
            wrong = f"the weight of {adapted[key].name} is shared with another module"
            raise InputError("merge", wrong, "leave that layer out of the targets, or keep the adapter unmerged")


def install(root: nn.Module, part: Part) -> RootHook:
    """Freeze the root and let the part act on it."""
    own = {id(p) for other in parts_of(root) for p in other.parameters()}
    part.frozen = [p for p in root.parameters() if p.requires_grad and id(p) not in own]
    for parameter in part.frozen:
        parameter.requires_grad_(False)
    part_holder(root, part.sites[0].module).add_module(f"vislora_{part.adapter_name}", part)
    for site in {site.key: site for site in part.sites}.values():
        tap = tap_of(*site.key) or (ReadTap if is_read(site.module) else Tap)(site)
        tap.parts.append(part)
    return RootHook(root, part)


def uninstall(root: nn.Module, part: Part) -> None:
    """Undo `install`; what it froze thaws with the last part."""
    for tap in taps_of(part):
        tap.remove(part)
    delattr(part_holder(root, part.sites[0].module), f"vislora_{part.adapter_name}")
    others = parts_of(root)
    if others:
        others[0].frozen += part.frozen
    else:
        for parameter in part.frozen:
            parameter.requires_grad_(True)


def parts_of(root: nn.Module) -> list[Part]:
    """The parts that adapters have in a model, in the order in which they were attached."""
    from .part import Part

    return [module for module in root.modules() if isinstance(module, Part)]
