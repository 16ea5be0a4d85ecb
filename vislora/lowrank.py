"""The quick way of a linear layer's updates: one autograd function that keeps the layer's input and nothing else.

It adds the update's two thin products into what the layer returned, or the layer multiplies by the adapted weight at
once; it makes the gradients of input and factors together, the frozen layer's included. Which of the ways has the
fewest operations depends on width, rank and tokens (RunLoRA, Cherniuk et al. 2023, arXiv 2312.03415, chooses so too).
Methods know nothing of it, and `vislora.update.Update.apply` stays as the plain way, which everything that this one
does not take goes through: convolutions, dropout on inputs, quantized and offloaded weights, torch.compile, which fuses
by itself, torch.func and forward-mode derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional as F

from .offload import is_hooked
from .update import Update

_PASS = 16  # what reading and writing one number of a matrix costs, in operations of a product


_autocasts = cache(torch.amp.is_autocast_available)


class Term(NamedTuple):
    """One update on a layer: its rows (None: all), its strength, and whether a fixed start is taken off."""

    rows: slice | None
    strength: float
    minus: bool

    def of(self, matrix: Tensor) -> Tensor:
        """The columns of outputs (T, m) that it acts on."""
        return matrix if self.rows is None else matrix[:, self.rows]


def takes(module: nn.Module, x: Tensor) -> bool:
    """Whether the layer is a plain one, frozen, in one precision, and nothing watches that must see each operator."""
    if is_compiling() or type(module) is not nn.Linear:
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(weight) is not nn.Parameter:
        return False
    kind = x.device.type
    autocast = _autocasts(kind) and torch.is_autocast_enabled(kind)
    computes_in = torch.get_autocast_dtype(kind) if autocast else x.dtype
    return (
        weight.dtype == computes_in
        and weight.device == x.device
        and x.shape[-1] == weight.shape[1]
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
        and not is_hooked(module)
        and "forward" not in module.__dict__
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_first(module: nn.Module, hook: object) -> bool:
    """Whether nobody sees what the layer itself returns before this hook of it does."""
    return next(iter(module._forward_hooks.values())) is hook and not nn.modules.module._global_forward_hooks


def adapted_weight(weight: Tensor, terms: list[Term], factors: list[Tensor]) -> Tensor:
    """The weight (m, n) with all updates; exactly the weight where an update's two products are equal."""
    if len(terms) == 1 and terms[0].rows is None and not terms[0].minus:
        return torch.addmm(weight, factors[0], factors[1], alpha=terms[0].strength)
    total, left = weight.clone(), iter(factors)
    for term in terms:
        rows = total if term.rows is None else total[term.rows]
        up, down = next(left), next(left)
        if term.minus:
            rows.add_((up @ down).sub_(next(left) @ next(left)), alpha=term.strength)
        else:
            rows.addmm_(up, down, alpha=term.strength)
    return total


class LowRank(torch.autograd.Function):
    """(x, out, weight, bias, shift, terms, merged, alone, *factors) -> the adapted layer's output.

    x (..., n); out (..., m): what the layer made of x, by the adapted weight where `merged`.
    weight (m, n): the frozen layer's, with `out` outside the graph, so that its gradient is made here too; or None.
    shift (m,): what each output, less its bias, is multiplied by and added; with a weight alone. None: nothing.
    alone: nobody else holds `out`, so it may be written. factors: for each term up (m', r) and down (r, n), and those
    of its fixed start where it has one, all in x's dtype.
    """

    @staticmethod
    def forward(ctx, x: Tensor, out: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None,
                terms: list[Term], merged: bool, alone: bool, *factors: Tensor):  # fmt: skip
        ctx.terms, ctx.merged = terms, merged
        ctx.save_for_backward(x, weight, bias, shift, out if shift is not None else None, *factors)
        if shift is not None:
            out = torch.addcmul(out, out, shift)
            out = out if bias is None else out.sub_(shift * bias)
        elif not alone:
            out = out.clone()
        if merged:
            return out
        outputs, inputs, left = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), iter(factors)
        for term in terms:
            up, down, into = next(left), next(left), term.of(outputs)
            inner = inputs @ down.mT
            if term.minus:
                # Subtracted from each other before anything is added: the sum is exactly 0 where they are equal.
                fixed, start = next(left), next(left)
                into.add_((inner @ up.mT).sub_((inputs @ start.mT) @ fixed.mT), alpha=term.strength)
            else:
                into.addmm_(inner, up.mT, alpha=term.strength)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight, bias, shift, out, *factors = ctx.saved_tensors
        outputs, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        needs_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[8:]
        to_x, to_shift, grads, at = None, None, [], 0
        if needs_x and weight is not None:
            used = adapted_weight(weight, ctx.terms, factors) if ctx.merged else weight
            if shift is None:
                to_x = outputs @ used
            elif len(outputs) < used.shape[1]:  # whichever has fewer numbers is scaled
                to_x = torch.addcmul(outputs, outputs, shift) @ used
            else:
                to_x = outputs @ torch.addcmul(used, used, shift[:, None])
        if ctx.needs_input_grad[4]:
            if torch.is_grad_enabled():  # a second derivative must know where the layer's output comes from
                out = F.linear(x, weight, bias)
            to_shift = (outputs * out.reshape(outputs.shape)).sum(0)
            to_shift = to_shift if bias is None else to_shift.addcmul_(outputs.sum(0), bias, value=-1)
        for term in ctx.terms:
            own, whole = term.of(outputs), None
            for sign in (1, -1) if term.minus else (1,):
                up, down, (needs_up, needs_down) = factors[at], factors[at + 1], wanted[at : at + 2]
                scale, at = sign * term.strength, at + 2
                dense = (needs_up or needs_down) and _dense(len(inputs), *up.shape, down.shape[1])
                to_inner = None
                if (needs_x and not ctx.merged) or (needs_down and not dense):
                    to_inner = _scaled(own @ up, scale)
                if needs_x and not ctx.merged:
                    to_x = to_inner @ down if to_x is None else to_x.addmm_(to_inner, down)
                if dense:
                    whole = own.mT @ inputs if whole is None else whole
                    grads += [_scaled(whole @ down.mT, scale) if needs_up else None,
                              _scaled(up.mT @ whole, scale) if needs_down else None]  # fmt: skip
                else:
                    grads += [_scaled(own.mT @ (inputs @ down.mT), scale) if needs_up else None,
                              to_inner.mT @ inputs if needs_down else None]  # fmt: skip
        to_out = gradient if ctx.needs_input_grad[1] else None
        to_x = None if to_x is None else to_x.view(x.shape)
        return to_x, to_out, None, None, to_shift, None, None, None, *grads


def merges(x: Tensor, weight: Tensor, terms: list[Term], factors: list[Tensor]) -> bool:
    """Whether adding the updates to the weight costs less than two thin products for every input.

    Only where the sum keeps float32's precision: in bf16 a small update would be rounded away.
    """
    if x.dtype not in (torch.float32, torch.float64):
        return False
    m, n = weight.shape
    tokens, ranks = x.numel() // n, sum(down.shape[0] for down in factors[1::2])
    # Forward, and once more in the backward: the weight's products and passes against 2 T r (m + n) and 2 T r n.
    return 2 * m * n * (2 * ranks + _PASS * (1 + sum(term.minus for term in terms))) < 2 * tokens * ranks * (m + 2 * n)


def _scaled(product: Tensor, scale: float) -> Tensor:
    return product if scale == 1 else product.mul_(scale)


def _dense(tokens: int, m: int, rank: int, n: int) -> bool:
    """Whether the factors' gradients cost less by way of the weight's: 2 T m n + 4 m n r against 4 T r (m + n)."""
    return tokens * m * n + 2 * m * n * rank < 2 * tokens * rank * (m + n)


class Pieces(NamedTuple):
    """One update as the function takes it: up (m, r), down (r, n), then those of its fixed start where it has one.

    shift: (m,), what each output of the frozen layer, without bias, is multiplied by and added, or None.
    """

    factors: tuple[Tensor, ...]
    shift: Tensor | None


class Ready(NamedTuple):
    """What a layer's forward needs for its updates.

    shift: (m,), the sum of its updates', or None. merged: the layer multiplies by the adapted weight. alone: nobody
    else sees what the layer itself returns.
    """

    terms: list[Term]
    factors: list[Tensor]
    shift: Tensor | None
    merged: bool
    alone: bool

    def finish(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The adapted layer's output, from the input and what the layer returned."""
        x, shift = x.to(out.dtype), None if self.shift is None else self.shift.to(out.dtype)
        rest = shift, self.terms, self.merged, self.alone, *self.factors
        if not self.alone:  # someone may hold the output, or wait for its gradient
            return LowRank.apply(x, out, None, None, *rest)
        own = module._parameters
        return LowRank.apply(x, out.detach(), own["weight"], own["bias"], *rest)


def pieces(rows: slice | None, update: Update) -> Pieces | None:
    """An update on these rows of a layer in pieces, in its own dtype; None where it has no such form."""
    if update.row_scale is not None:
        if rows is not None or update.minus is not None:
            return None
        # scale * (x W^T + x D^T U^T) is what the layer made, scale - 1 times it, and the update of scale * U.
        return Pieces((update.row_scale[:, None] * update.up, update.down), update.row_scale - 1)
    if update.minus is None:
        return Pieces((update.up, update.down), None)
    if update.minus.minus is not None:
        return None
    return Pieces((update.up, update.down, update.minus.up, update.minus.down), None)


class _Cast(torch.autograd.Function):
    """(dtype, *tensors) -> all of them in dtype, by one call and not one for each; their gradients likewise."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [t.dtype for t in tensors]
        return tuple(_cast(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        found = [i for i, g in enumerate(gradients) if g is not None]
        back = iter(_cast([gradients[i] for i in found], [ctx.dtypes[i] for i in found]))
        return None, *(None if g is None else next(back) for g in gradients)


def _cast(tensors: Sequence[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    if not torch.is_grad_enabled():  # always, but for a second derivative
        made = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
        if made:
            torch._foreach_copy_(made, list(tensors))
        return made
    return [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]


def cast_all(found: list[Pieces | None], weights: list[Tensor]) -> list[Pieces | None]:
    """The pieces of many layers, factors in the dtype of each layer's weight; all those of one device together."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, int]]] = {}
    for i, (piece, weight) in enumerate(zip(found, weights, strict=True)):
        for j, factor in enumerate(() if piece is None else piece.factors):
            if factor.dtype != weight.dtype and factor.device == weight.device:
                groups.setdefault((weight.device, weight.dtype), []).append((i, j))
    if not groups:
        return found
    factors = [None if piece is None else list(piece.factors) for piece in found]
    for (_, dtype), places in groups.items():
        for (i, j), tensor in zip(places, _Cast.apply(dtype, *(factors[i][j] for i, j in places)), strict=True):
            factors[i][j] = tensor
    return [None if piece is None else Pieces(tuple(own), piece.shift)
            for piece, own in zip(found, factors, strict=True)]  # fmt: skip


def gather(shares: list[tuple[slice | None, Pieces | None, float]], dtype: torch.dtype):
    """(terms, factors, shift) of a layer's updates (rows, pieces, strength); None if one of them has no such form."""
    terms, factors, shift = [], [], None
    for rows, piece, strength in shares:
        if piece is None:
            return None
        if piece.shift is not None:
            own = strength * piece.shift
            shift = own if shift is None else shift + own
        terms.append(Term(rows, strength, len(piece.factors) == 4))
        factors += [f if f.dtype is dtype else f.to(dtype) for f in piece.factors]
    return terms, factors, shift
