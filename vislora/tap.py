"""How updates reach a model: one tap on each adapted weight.

Before the root's forward its adapters compute every update once, for all layers (`vislora.root`); a tap then adds its
share to what the module returns, or to the weight where no call of the module shows it. Weights are not written and
modules are not replaced, so names and state-dict keys of the base stay what they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import reading
from .distributed import is_sharded, whole
from .layer import layer_of
from .linalg import without_autocast
from .lowrank import Ready, adapted_weight, gather, is_first, merges, takes
from .offload import is_hooked, kept
from .quantized import dequantized, is_quantized

_READY = "vislora_ready"  # what a tap has made ready for the layer's running forward, in the module's own dictionary

if TYPE_CHECKING:
    from .part import Part
    from .site import Site


class Tap:
    """Where all adapters reach one weight. This one acts by a forward hook on the module that uses it."""

    def __init__(self, site: Site):
        self.module, self.tensor = site.key
        self.parts: list[Part] = []  # in the order in which they were attached
        self.merged: list[Part] = []  # those folded into the weight at present
        self.base: Tensor | None = None  # the weight's own storage while something is merged
        self._install()

    def _install(self) -> None:
        plain = type(self.module) is nn.Linear
        self.handles = [self.module.register_forward_hook(self, with_kwargs=True, always_call=plain)]
        if plain:
            self.handles.append(self.module.register_forward_pre_hook(self.before, with_kwargs=True))

    def _uninstall(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _active(self) -> list[Part]:
        return [part for part in self.parts if part.disabled == 0 and part not in self.merged]

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Choose the quick way where it can be gone; where the adapted weight is cheapest, the layer shall use that."""
        active, x = self._active(), args[0] if args else kwargs["input"]
        if not active or not takes(module, x) or (module.training and any(p.method.input_dropout for p in active)):
            return
        weight, alone, merged = module._parameters["weight"], is_first(module, self), False
        shares = [(site.rows, pieces, part.strength) for part in active
                  for site, _, pieces in part.updates_of(module, self.tensor)]  # fmt: skip
        found = gather(shares, weight.dtype)
        if found is None or (found[2] is not None and (self.base is not None or not alone)):
            return
        terms, factors, shift = found
        if alone and shift is None and merges(x, weight, terms, factors):
            with torch.no_grad():
                adapted, merged = adapted_weight(weight, terms, factors), True
            module.__dict__["weight"] = adapted  # found before the parameter, which stays where it is
        module.__dict__[_READY] = Ready(terms, factors, shift, merged, alone)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | None) -> Tensor | None:
        """The layer has returned, or raised an exception, and then what is returned here is dropped."""
        found = None
        if not is_compiling():
            found = module.__dict__.pop(_READY, None)
            if found is not None and found.merged:
                module.__dict__.pop("weight", None)
        if output is None:
            return None
        active = self._active()
        if not active:
            return output
        x = args[0] if args else kwargs["input"]
        if found is not None:
            for part in active:
                part.saw(module)
            return found.finish(module, x, output)
        total = output
        for part in active:
            total = total + self._delta(part, x, output)
        return total

    def _delta(self, part: Part, x: Tensor, output: Tensor) -> Tensor:
        """One part's share, like output: its row blocks laid out over the module's outputs, zeros between."""
        part.saw(self.module)
        dropout = part.method.input_dropout if self.module.training else 0.0
        strength, layer = part.strength, layer_of(self.module)
        blocks, at = [], 0
        bias, updates, frozen = self.module.bias, part.updates_of(self.module, self.tensor), output
        if bias is not None and is_hooked(self.module):  # by now it may be gone again
            bias = (kept(self.module, "bias") if bias.is_meta else bias).to(output.device)
        if self.base is not None and any(update.row_scale is not None for _, update, _ in updates):
            # A magnitude scales what the base makes of x, and `output` holds another adapter's merged delta.
            frozen = layer.whole(x, self.base, bias)
        for site, update, _ in updates:
            if site.rows is None:
                return update.apply(x, frozen, bias, strength, dropout, layer).to(output.dtype)
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
        weight = self.module._parameters[self.tensor]
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
        wide = self.module._parameters[self.tensor].data.double() - self.base.double()
        delta = self._sum_of_deltas().double()
        lost = ((wide - delta).norm() / delta.norm().clamp_min(1e-30)).item()
        self.base, self.merged = None, others
        if others:
            self._rewrite()
        return lost

    def _sum_of_deltas(self) -> Tensor:
        """What the merged parts add to the weight, of its shape, float32 or float64."""
        base = self.base
        total = torch.zeros(base.shape, dtype=torch.promote_types(base.dtype, torch.float32), device=base.device)
        for part in self.merged:
            for site, update, _ in part.updates_of(self.module, self.tensor):
                rows = slice(None) if site.rows is None else site.rows
                total.flatten(1)[rows] += part.adapter_weight * update.dense(site.weight()).to(total.dtype)
        return total

    def remove(self, part: Part) -> None:
        """Forget a part; the last one takes the tap with it."""
        self.parts.remove(part)
        if not self.parts:
            self._uninstall()


class ReadTap(Tap):
    """The tap of a weight that is read: it gives its readers the weight with every active part's delta added.

    That is a matrix product of the weight's size at every reading, and its gradient a matrix of that size.
    """

    def _install(self) -> None:
        reading.put(self.module, self.tensor, self)

    def _uninstall(self) -> None:
        reading.take(self.module, self.tensor)

    def adapted(self, weight: Tensor) -> Tensor:
        """The weight (out, ...) with the deltas, in its own dtype; summed in float32 or float64.

        Shards are left as they are: their owner looks after them, and gathers them before a forward reads the weight.
        """
        if is_sharded(weight):
            return weight
        total = weight
        with without_autocast(weight.device):
            for part in self._active():
                part.saw(self.module)
                delta = self._laid_out(part, weight)
                total = (total.to(delta.dtype) + delta).to(weight.dtype)
        return total

    def _laid_out(self, part: Part, weight: Tensor) -> Tensor:
        """One part's delta of the weight's shape: its row blocks, zeros between."""
        blocks, at = [], 0
        for site, update, _ in part.updates_of(self.module, self.tensor):
            delta = update.dense(site.weight())
            delta = delta if part.strength == 1.0 else part.strength * delta
            if site.rows is None:
                return delta.view(weight.shape)
            blocks += [delta.new_zeros(site.rows.start - at, site.n)] if site.rows.start > at else []
            blocks.append(delta)
            at = site.rows.stop
        blocks += [delta.new_zeros(len(weight) - at, site.n)] if at < len(weight) else []
        return torch.cat(blocks)


def tap_of(module: nn.Module, tensor: str = "weight") -> Tap | None:
    """The tap on a module's weight, if it has one."""
    if tensor in reading.taps(module):
        return reading.taps(module)[tensor]
    hooks = module._forward_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Tap) and hook.tensor == tensor), None)


def taps_of(part: Part) -> list[Tap]:
    """The taps that a part acts through, one for each adapted weight."""
    return [tap_of(*key) for key in dict.fromkeys(site.key for site in part.sites)]


def base_weight(module: nn.Module, tensor: str = "weight") -> Tensor:
    """The module's weight as it was before anything was merged, detached, of its own shape and dtype.

    Of a quantized module: what it computes with, float32, made anew at every call.
    """
    tap = tap_of(module, tensor)
    if tap is not None and tap.base is not None:
        return tap.base
    if is_quantized(module):
        return dequantized(module)
    weight = (getattr(module, tensor) if tap is None else module._parameters[tensor]).detach()
    return kept(module, tensor) if weight.is_meta and kept(module, tensor) is not None else whole(weight)
