"""Updates at the rank that a file holds them at: the least that is exact, or a smaller one by truncated SVD."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import linalg
from .adapters._method import require_rank
from .site import Site
from .update import Update

if TYPE_CHECKING:
    from .adapter import Adapter

_EXACT = 1e-6  # of a product's Frobenius norm: about what rounding its factors to float32 changes


@dataclass(frozen=True)
class Squeezed:
    """An adapter's updates by qualified site name, at one rank a component.

    ranks: {component: rank}. lost: {site: Frobenius norm of what was cut off up @ down, over that of the whole}; a
    magnitude beside it is kept as it is.
    """

    updates: dict[str, Update]
    ranks: dict[str, int]
    lost: dict[str, float]


@torch.no_grad()
def squeeze(adapter: Adapter, rank: int | None = None, fold: Container[str] = ()) -> Squeezed:
    """The updates at strength 1, at most of rank `rank`, which is best in every Schatten norm (Eckart and Young).

    A component gets the least rank that holds all its products to a relative 1e-6, so that what a method keeps in more
    columns than it needs does not reach the file. Factors that are no wider than that are left as they are.
    fold: components in which magnitudes become a part of the product: it is then the whole change of the weight, whose
    rank is no longer the factors', and `lost` tells what of it does not fit.
    Raises InputError for a rank that is no positive whole number.
    """
    if rank is not None:
        require_rank(rank)
    updates, ranks, lost = {}, {}, {}
    whole: dict[str, dict[str, tuple[Site, Update]]] = {component: {} for component in adapter.roots}
    for name, site, _, update in adapter.site_updates():
        component = name.partition(".")[0] if "" not in whole else ""
        whole[component][name] = (site, _folded(update, site) if component in fold else update)
    for component, of_component in whole.items():
        held = max(update.factors()[0].shape[-1] for _, update in of_component.values())
        # nothing can be said of updates of zeros
        needed = max(_needed(update) for _, update in of_component.values()) or held
        ranks[component] = min(held, needed, held if rank is None else rank)
        for name, (site, update) in of_component.items():
            updates[name], lost[name] = _truncated(update, ranks[component], site)
    return Squeezed(updates, ranks, lost)


def _folded(update: Update, site: Site) -> Update:
    """The change that an update with magnitudes makes to the site's weight, as a product of full rank."""
    if update.magnitude is None:
        return update
    weight = site.weight()
    U, S, Vh = torch.linalg.svd(update.dense(weight).double(), full_matrices=False)
    root = S.sqrt()
    return Update(up=(U * root).to(weight.dtype), down=(root[:, None] * Vh).to(weight.dtype))


def _needed(update: Update) -> int:
    """The least rank whose best approximation of the product is exact; 0 for a product of zeros."""
    up, down = update.factors()
    values = linalg.product_singular_values(up.double(), down.double())
    tail = values.square().flip(0).cumsum(0).flip(0).sqrt()  # of the values from each on
    return int((tail > _EXACT * tail[0]).sum())


def _truncated(update: Update, rank: int, site: Site) -> tuple[Update, float]:
    """The update with its product's `rank` largest triplets, split evenly between the factors, and what that loses."""
    up, down = update.factors()
    if up.shape[-1] <= rank:
        return update, 0.0
    U, S, V = linalg.product_svd(up.double(), down.double(), up.shape[-1])
    root = S[:rank].sqrt()  # in both factors: half-precision readers have few small numbers
    factors = {"up": (U[:, :rank] * root).to(up.dtype), "down": (V[:, :rank] * root).mT.to(down.dtype)}
    smaller = replace(update, **factors, minus=None, row_scale=None).with_row_scale(site.weight())
    return smaller, _share(S[rank:], S)


def _share(part: Tensor, whole: Tensor) -> float:
    size = torch.linalg.vector_norm(whole).item()
    return torch.linalg.vector_norm(part).item() / size if size else 0.0
