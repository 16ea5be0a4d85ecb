"""The quick way of a linear layer's updates: one autograd function that keeps the layer's input and nothing else.

It adds the update's two thin products into what the layer returned, or the layer multiplies by the adapted weight at
once; it makes the gradients of input and factors together, the frozen layer's included. Which of the ways has the
fewest operations depends on width, rank and tokens (RunLoRA, Cherniuk et al. 2023, arXiv 2312.03415, chooses so too).
Methods know nothing of it, and `vislora.update.Update.apply` stays as the plain way, which everything that this one
does not take goes through: convolutions, dropout on inputs, quantized and offloaded weights, torch.compile, which fuses
by itself, torch.func and forward-mode derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional as F

from .offload import is_hooked
from .update import Update

_PASS = 16  # what reading and writing one number of a matrix costs, in operations of a product


@dataclass(frozen=True)
class Term:
    """One update on a layer: its rows (None: all), its strength, and whether a fixed start is taken off."""

    rows: slice | None
    strength: float
    minus: bool

    def of(self, matrix: Tensor) -> Tensor:
        """The columns of outputs (T, m) that it acts on."""
        return matrix if self.rows is None else matrix[:, self.rows]


def takes(module: nn.Module, x: Tensor) -> bool:
    """Whether the layer is a plain one, frozen, in one precision, and nothing watches that must see each operator."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if is_compiling() or type(module) is not nn.Linear or type(weight) is not nn.Parameter:
        return False
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
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
            to_x = outputs @ (used if shift is None else torch.addcmul(used, used, shift[:, None]))
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
    m, n = weight.shape
    tokens, ranks = x.numel() // n, sum(down.shape[0] for down in factors[1::2])
    if x.dtype not in (torch.float32, torch.float64):
        return False
    # Forward, and once more in the backward: the weight's products and passes against 2 T r (m + n) and 2 T r n.
    return 2 * m * n * (2 * ranks + _PASS * (1 + sum(term.minus for term in terms))) < 2 * tokens * ranks * (m + 2 * n)


def _scaled(product: Tensor, scale: float) -> Tensor:
    return product if scale == 1 else product.mul_(scale)


def _dense(tokens: int, m: int, rank: int, n: int) -> bool:
    """Whether the factors' gradients cost less by way of the weight's: 2 T m n + 4 m n r against 4 T r (m + n)."""
    return tokens * m * n + 2 * m * n * rank < 2 * tokens * rank * (m + n)


@dataclass(frozen=True)
class Ready:
    """What a layer's forward needs for its updates.

    shift: (m,), what each output of the frozen layer, without bias, is multiplied by and added, or None.
    merged: the layer multiplies by the adapted weight. alone: nobody else sees what the layer itself returns.
    """

    terms: list[Term]
    factors: list[Tensor]
    shift: Tensor | None
    merged: bool = False
    alone: bool = False

    def finish(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The adapted layer's output, from the input and what the layer returned."""
        x, shift = x.to(out.dtype), None if self.shift is None else self.shift.to(out.dtype)
        rest = shift, self.terms, self.merged, self.alone, *self.factors
        if not self.alone:  # someone may hold the output, or wait for its gradient
            return LowRank.apply(x, out, None, None, *rest)
        return LowRank.apply(x, out.detach(), module.weight, module.bias, *rest)


def ready(shares: list[tuple[slice | None, Update, float]], dtype: torch.dtype) -> Ready | None:
    """(rows, update, strength) of every update as the function takes them: factors cast to the layer's dtype, r (m + n)
    numbers. None if one of them has no such form."""
    terms, factors, shift = [], [], None
    for rows, update, strength in shares:
        if update.minus is not None and update.minus.minus is not None:
            return None
        first = update.up
        if update.row_scale is not None:
            if rows is not None or update.minus is not None:
                return None
            # scale * (x W^T + x D^T U^T) is what the layer made, scale - 1 times it, and the update of scale * U.
            first = update.row_scale[:, None] * update.up
            own = strength * (update.row_scale - 1)
            shift = own if shift is None else shift + own
        terms.append(Term(rows, strength, update.minus is not None))
        factors += [first.to(dtype), update.down.to(dtype)]
        if update.minus is not None:
            factors += [update.minus.up.to(dtype), update.minus.down.to(dtype)]
    return Ready(terms, factors, shift)
