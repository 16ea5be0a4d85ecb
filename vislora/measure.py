"""What an update amounts to: norms, the share of a bound in use, certificates, and a base model's fingerprint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import linalg
from .distributed import class_name
from .handle import Dense, Handle
from .squeeze import Squeezed, squeeze
from .update import Update

if TYPE_CHECKING:
    from .site import Site

_FINGERPRINT_WEIGHTS = 16
_EXACT_SIDE = 128  # an exact spectrum of larger matrices would take longer than the steps between two measurements


@dataclass(frozen=True)
class Norms:
    """One site's update: its Frobenius and spectral norm, the weight's Frobenius norm, and their ratio.

    norm: its Schatten p-norm for the p of the method's bound (p = 2 where the method has none).
    bound: what the method promises for `norm`, None if nothing; share: norm / bound.
    up, down: the Frobenius norms of the two factors that train, as they are applied: all scale is in `up`, and what a
    start takes off is left out. None where the update has no factors (NB-LoRA, figures 4 and 5, with its alpha = r).
    """

    frobenius: float
    spectral: float
    weight: float
    p: float
    norm: float
    bound: float | None
    nuclear: float | None = None
    up: float | None = None
    down: float | None = None

    @property
    def ratio(self) -> float:
        """Frobenius norm of the update over that of the base weight."""
        return self.frobenius / self.weight if self.weight else math.inf

    @property
    def share(self) -> float | None:
        """How much of the bound is in use, 0 to 1."""
        return None if self.bound is None else self.norm / self.bound


@torch.no_grad()
def norms(adapter: Handle, instead: Mapping[str, Update] | None = None) -> dict[str, Norms]:
    """{site: Norms} for every site, of the update at strength 1, from float32 factors.

    instead: {site: Update} to measure in the place of the adapter's own, such as squeezed ones.
    Where the change is known as whole matrices alone, `spectral` of a large one is an estimate from below,
    and there are none where PEFT cannot say what its layers amount to.
    """
    out = {}
    if isinstance(adapter, Dense) and instead is None:
        for name, weight, delta in adapter.changes() if adapter.measurable else ():
            frobenius, size = torch.linalg.vector_norm(delta).item(), torch.linalg.vector_norm(weight).item()
            out[name] = Norms(frobenius, _largest_value(delta.flatten(1)), size, 2.0, frobenius, None)
        return out
    for name, site, tensors, update in adapter.site_updates():
        update = update if instead is None else instead[name]
        values = singular_values(update, site)
        bound = adapter.method.bound(tensors)
        p = 2.0 if bound is None else bound.p
        out[name] = Norms(
            frobenius=linalg.schatten(values, 2).item(),
            spectral=values.max().item(),
            weight=torch.linalg.vector_norm(site.weight()).item(),
            p=p,
            norm=linalg.schatten(values, p).item(),
            bound=None if bound is None else bound.delta.item(),
            nuclear=linalg.schatten(values, 1).item(),
            up=torch.linalg.vector_norm(update.up).item(),
            down=torch.linalg.vector_norm(update.down).item(),
        )
    return out


def _largest_value(matrix: Tensor) -> float:
    """The largest singular value of (m, n); where both are large, by subspace iteration from a fixed start."""
    if min(matrix.shape) <= _EXACT_SIDE:
        return torch.linalg.svdvals(matrix)[0].item()
    return linalg.top_svd(matrix, 1, niter=8, generator=torch.Generator().manual_seed(0))[1][0].item()


def singular_values(update, site: Site) -> Tensor:
    """Of the update, without forming it where it is a plain product of low rank."""
    up, down = update.factors()
    if update.row_scale is None and up.shape[-1] <= min(up.shape[-2], down.shape[-1]):
        return linalg.product_singular_values(up, down)
    return torch.linalg.svdvals(update.dense(site.weight()))


def certificate(adapter: Handle, squeezed: Squeezed | None = None) -> dict[str, Any]:
    """What the exported file states: method, options, each module's measured norm and bound, the base's fingerprint.

    squeezed: the updates that the file holds; None for those of its full rank. Norms are theirs, at strength 1; `lost`
    is the share of the adapter's own norm that they lack. `largest_share` is None for a method that promises no bound.
    """
    if squeezed is None and not isinstance(adapter, Dense):
        squeezed = squeeze(adapter)
    measured = norms(adapter, None if squeezed is None else squeezed.updates)
    lost = {} if squeezed is None else squeezed.lost
    shares = [n.share for n in measured.values() if n.share is not None]
    return {
        "method": adapter.method_name,
        "options": adapter.method.options(),
        "modules": {
            name: {
                "p": "inf" if n.p == math.inf else n.p, "norm": n.norm, "spectral": n.spectral, "bound": n.bound,
                "lost": lost.get(name, 0.0),
            }  # fmt: skip
            for name, n in measured.items()
        },
        "ranks": {} if squeezed is None else squeezed.ranks,
        "largest_norm": max((n.norm for n in measured.values()), default=0.0),
        "largest_spectral": max((n.spectral for n in measured.values()), default=0.0),
        "largest_share": max(shares) if shares else None,
        "largest_lost": max(lost.values(), default=0.0),
        "base": fingerprint(adapter),
    }


@torch.no_grad()
def fingerprint(adapter: Handle) -> dict[str, Any]:
    """What a base is recognised by: its adapted weights' shapes, and the norms of up to 16 of them.

    quantized: whether any of them is, so that norms are not expected to agree as closely.
    """
    weights = list(adapter.base_weights())
    step = max(1, len(weights) // _FINGERPRINT_WEIGHTS)
    chosen = weights[::step][:_FINGERPRINT_WEIGHTS]
    return {
        "classes": {component: class_name(root) for component, root in adapter.roots.items()},
        "shapes": {name: shape for name, shape, _ in weights},
        "quantized": adapter.quantized,
        "norms": {name: torch.linalg.vector_norm(read()).item() for name, _, read in chosen},
    }
