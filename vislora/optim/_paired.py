"""What the gradient methods share: AdamW over pairs of factors, and the spectra of their Gram matrices."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import Adapter
from ..adapters import Pair
from ..errors import InputError
from ..linalg import precise
from ..part import Part

# Bare of the wrapper that torch hangs on a class's `step`: that would run the step hooks a second time.
_adamw_step = inspect.unwrap(torch.optim.AdamW.step)


def pairs_of(adapter: Adapter) -> list[Pair]:
    """The pair of factors of every site of a LoRA-shaped adapter."""
    parts: list[Part] = list(adapter.parts.values())
    return [adapter.method.pair(part.tensors_of(site)) for part in parts for site in part.sites]


class PairedAdamW(torch.optim.AdamW):
    """AdamW that lets a subclass treat each pair of factors first; every other parameter gets torch's AdamW.

    params: parameter groups, as `Adapter.param_groups` gives them, that hold the pairs' factors among others; each
    parameter goes by its own group's lr and weight_decay. damping: added to the eigenvalues of Gram matrices before
    they are inverted, in their unit (that of a squared factor). Raises InputError for a damping below 0.
    """

    def __init__(self, params, pairs: Sequence[Pair], *, damping: float, lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2):  # fmt: skip
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if not 0 <= damping < math.inf:
            raise InputError("damping", f"{damping} is negative or not finite", "take 0 or more")
        self.pairs, self.damping = list(pairs), damping
        held = {p for group in self.param_groups for p in group["params"]}
        if not held.issuperset(t for pair in self.pairs for t in (pair.down, pair.up)):
            raise InputError("params", "a factor is in no parameter group", "give adapter.param_groups(lr)")

    def treat(self, pairs: list[Pair]) -> None:
        """Replace the factors' gradients by what AdamW shall see, or move the factors and leave None there."""
        raise TypeError(f"{type(self).__name__} does not define treat")

    @torch.no_grad()
    def step(self, closure=None):
        """One optimizer step; closure(), if given, runs forward and backward and returns the loss.

        Gradients are afterwards what they were. Raises InputError where one factor of a pair has a gradient and the
        other has none.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [(t, t.grad) for pair in self.pairs for t in (pair.down, pair.up)]
        try:
            self.treat([pair for pair in self.pairs if self._has_gradients(pair)])
            _adamw_step(self)
        finally:
            for tensor, gradient in given:
                tensor.grad = gradient
        return loss

    def _has_gradients(self, pair: Pair) -> bool:
        down, up = pair.down.grad is not None, pair.up.grad is not None
        if down != up:
            wrong = "one factor of a pair has a gradient and the other has none"
            raise InputError(type(self).__name__, wrong, "train both, or take AdamW")
        return down

    def _group_of(self) -> dict[Tensor, dict]:
        """The group of every parameter."""
        return {p: group for group in self.param_groups for p in group["params"]}


def descend(tensor: Tensor, direction: Tensor, group: dict) -> None:
    """tensor <- (1 - lr weight_decay) tensor - lr direction, in float32 or float64, rounded once."""
    tensor.copy_(precise(tensor) * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction)


def unbiased(moment: Tensor, beta: float, step: int) -> Tensor:
    """A moment that began at zero, over its share of the weights; step counts from 1."""
    return moment / (1 - beta**step)


@dataclass(frozen=True)
class Spectrum:
    """values (r,), none below 0, and orthonormal vectors (r, r) of a Gram matrix F^T F, F (k, r)."""

    values: Tensor
    vectors: Tensor

    def inverse(self, damping: float) -> Tensor:
        """(F^T F + damping I)^-1 (r, r), pseudo-inverse in directions where rounding is all there is."""
        values = self.values + damping
        noise = self.values.max() * len(values) * torch.finfo(values.dtype).eps
        return (self.vectors * torch.where(values > noise, 1 / values, 0)) @ self.vectors.mT


def spectra(factors: Sequence[Tensor]) -> list[Spectrum]:
    """The Spectrum of each F (k, r), in float32 or float64. Those of equal r are decomposed in one call.

    Raises InputError for factors that are not finite.
    """
    grams = [F.mT @ F for F in map(precise, factors)]
    kinds: dict[tuple, list[int]] = {}
    for i, gram in enumerate(grams):
        kinds.setdefault((gram.shape, gram.dtype, gram.device), []).append(i)
    found: list[Spectrum] = [None] * len(grams)
    for members in kinds.values():
        try:
            values, vectors = torch.linalg.eigh(torch.stack([grams[i] for i in members]))
        except torch.linalg.LinAlgError:
            raise InputError("optimizer", "a factor is no longer finite", "take a lower learning rate") from None
        for i, v, U in zip(members, values.clamp_min(0), vectors, strict=True):
            found[i] = Spectrum(v, U)
    return found
