"""How updates reach a model: one hook on the attached root, one tap on each adapted module.

Before the root's forward its adapters compute every update once, for all layers; a tap then adds its module's share
to what the module returns. Weights are not written and modules are not replaced, so names, types and state-dict keys
of the base stay what they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError
from .quantized import dequantized, is_quantized

if TYPE_CHECKING:
    from .part import Part


class Tap:
    """The forward hook of one adapted module, shared by all adapters on it."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.parts: list[Part] = []  # in the order in which they were attached
        self.merged: list[Part] = []  # those folded into the weight at present
        self.base: Tensor | None = None  # the weight's own storage while something is merged
        self.handle = module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        active = [part for part in self.parts if part.active and part not in self.merged]
        if not active:
            return output
        x = args[0] if args else kwargs["input"]
        total = output
        for part in active:
            total = total + self._delta(part, x, output)
        return total

    def _delta(self, part: Part, x: Tensor, output: Tensor) -> Tensor:
        """One part's share (..., m): its row blocks laid out over the module's outputs, zeros between."""
        part.called.add(self.module)
        dropout = part.method.input_dropout if self.module.training else 0.0
        strength = part.strength
        blocks, at = [], 0
        bias, updates, frozen = self.module.bias, part.updates_of(self.module), output
        if self.base is not None and any(update.row_scale is not None for _, update in updates):
            # A magnitude scales what the base makes of x, and `output` holds another adapter's merged delta.
            frozen = F.linear(x, self.base, bias)
        for site, update in updates:
            if site.rows is None:
                return update.apply(x, frozen, bias, strength, dropout).to(output.dtype)
            if site.rows.start > at:
                blocks.append(output.new_zeros(*output.shape[:-1], site.rows.start - at))
            rows_bias = None if bias is None else bias[site.rows]
            blocks.append(update.apply(x, frozen[..., site.rows], rows_bias, strength, dropout).to(output.dtype))
            at = site.rows.stop
        if at < output.shape[-1]:
            blocks.append(output.new_zeros(*output.shape[:-1], output.shape[-1] - at))
        return torch.cat(blocks, dim=-1)

    def merge(self, part: Part) -> None:
        """Fold a part into the weight. The base weight's storage is kept aside, untouched."""
        self.merged.append(part)
        self._rewrite()

    def unmerge(self, part: Part) -> None:
        """Take a part out again; with the last one the kept storage returns, bit for bit."""
        self.merged.remove(part)
        self._rewrite()

    @torch.no_grad()
    def _rewrite(self) -> None:
        weight = self.module.weight
        if self.base is None:
            self.base = weight.data
        if not self.merged:
            weight.data, self.base = self.base, None
            return
        # Summed in float32 and cast once: adding and subtracting in bf16 loses small updates for good.
        total = self._sum_of_deltas()
        weight.data = (self.base.to(total.dtype) + total).to(self.base.dtype)

    @torch.no_grad()
    def keep(self, part: Part) -> float:
        """Make a merged part's delta permanent. Returns the share of its norm lost to the weight's precision."""
        others = [p for p in self.merged if p is not part]
        self.merged = [part]
        self._rewrite()
        wide = self.module.weight.data.double() - self.base.double()
        delta = self._sum_of_deltas().double()
        lost = ((wide - delta).norm() / delta.norm().clamp_min(1e-30)).item()
        self.base, self.merged = None, others
        if others:
            self._rewrite()
        return lost

    def _sum_of_deltas(self) -> Tensor:
        """What the merged parts add to the weight (out, in), float32 or float64."""
        base = self.base
        total = torch.zeros(base.shape, dtype=torch.promote_types(base.dtype, torch.float32), device=base.device)
        for part in self.merged:
            for site, update in part.updates_of(self.module):
                rows = slice(None) if site.rows is None else site.rows
                total[rows] += part.adapter_weight * update.dense(site.weight()).to(total.dtype)
        return total

    def remove(self, part: Part) -> None:
        """Forget a part; the last one takes the hook with it."""
        self.parts.remove(part)
        if not self.parts:
            self.handle.remove()


def tap_of(module: nn.Module) -> Tap | None:
    """The module's tap, if it has one."""
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, Tap)), None)


def taps_of(part: Part) -> list[Tap]:
    """The taps that a part acts through, one for each adapted module."""
    return [tap_of(module) for module in dict.fromkeys(site.module for site in part.sites)]


def base_weight(module: nn.Module) -> Tensor:
    """The module's weight (out, in) as it was before anything was merged, detached, in its own dtype.

    Of a quantized module: what it computes with, float32, made anew at every call.
    """
    tap = tap_of(module)
    if tap is not None and tap.base is not None:
        return tap.base
    return dequantized(module) if is_quantized(module) else module.weight.detach()


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
        self.part.refresh(_call_scale(kwargs))
        self.part.called.clear()
        self.part.inside = True

    def leave(self, module: nn.Module, args: tuple, output) -> None:
        """The forward has ended, by an exception too."""
        self.part.inside = False

    def after(self, module: nn.Module, args: tuple, output) -> None:
        if self.checked or not module.training or not torch.is_grad_enabled() or not self.part.active:
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
    """Raise InputError if an adapted weight is quantized: rounding it anew would lose the delta."""
    for site in part.sites:
        if is_quantized(site.module):
            wrong = f"the weight of {site.name} is quantized ({type(site.module).__name__})"
            raise InputError("merge", wrong, "load the base in bf16 or fp32 and the adapter into it, then merge")


def require_untied(root: nn.Module, part: Part) -> None:
    """Raise InputError if an adapted weight serves another module too, which merging would change with it."""
    adapted = {id(site.module.weight): site for site in part.sites}
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
    for module in dict.fromkeys(site.module for site in part.sites):
        (tap_of(module) or Tap(module)).parts.append(part)
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
