"""What methods share that renew bases of their factors during training: OD-LoRA and the ablations of its table 4."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..part import Part
    from ..site import Site


def renewal_due(step: int, total: int, phases: int = 5) -> bool:
    """Whether bases are renewed after `step` of `total` steps: every step at first, every `phases` steps at the end.

    OD-LoRA's algorithm 1 names the remainder alone, which would almost never hold at first; that it must be 0 is what
    its text says.
    """
    return step % math.ceil(phases * step / total) == 0


def each_site(adapter: Adapter) -> Iterator[tuple[Part, Site, SimpleNamespace]]:
    """(part, site, the site's tensors) over all parts."""
    for part in adapter.parts.values():
        for site in part.sites:
            yield part, site, part.tensors_of(site)
