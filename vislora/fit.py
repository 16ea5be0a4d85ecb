"""Does a file belong to the model at hand? Its components are found in it, and its base is compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Method
from .errors import InputError

_NORM_TOLERANCE = 0.01  # bf16 and fp16 copies of a base pass, another model does not
_QUANTIZED_TOLERANCE = 0.04  # nf4 and fp4 move most norms by 0.1 %, those of small or evenly spread weights by 2.6 %
_MOST_SHARED = 2**26  # numbers of a matrix that all layers share: rank 256 on a vocabulary of 262,144


def place(parts: dict[str, nn.Module], prefixes: list[str], fits: Callable[[nn.Module], bool], file: Path):
    """{prefix in the file: (component, root)} of a model's components for a file's. fits: are its layers in a root?

    A file of a bare module finds its component in a pipeline; one of a single component loads into a bare module.
    """
    if len(prefixes) == 1 and (prefixes[0] not in parts):
        if list(parts) == [""]:
            return {prefixes[0]: ("", parts[""])}
        if prefixes == [""]:
            fit = [c for c, root in parts.items() if fits(root)]
            if len(fit) == 1:
                return {"": (fit[0], parts[fit[0]])}
    missing = [prefix for prefix in prefixes if prefix not in parts]
    if missing:
        wrong = f"adapts {', '.join(p or 'a bare module' for p in prefixes)}; the model given has {_named(parts)}"
        raise InputError(str(file), wrong, "give the whole pipeline, or the component it was trained on")
    return {prefix: (prefix, parts[prefix]) for prefix in prefixes}


def _named(parts: dict[str, nn.Module]) -> str:
    return ", ".join(component or type(root).__name__ for component, root in parts.items())


def require_base(
    saved: dict[str, float], weights: dict[str, Callable[[], Tensor]], file: Path, quantized: bool = False
) -> None:
    """Raise InputError unless the base weights, read by name, have the norms that were saved.

    quantized: whether the base at hand or the one of the file is.
    """
    tolerance = _QUANTIZED_TOLERANCE if quantized else _NORM_TOLERANCE
    off = []
    for name, norm in saved.items():
        own = torch.linalg.vector_norm(weights[name]()).item()
        if not math.isclose(own, norm, rel_tol=tolerance):
            off.append(f"{name} has norm {own:.4g}, the adapter's base {norm:.4g}")
    if off:
        wrong = f"was trained on another base ({len(off)} of {len(saved)} weights differ: {off[0]})"
        raise InputError(str(file), wrong, "load that base, or pass allow_other_base=True")


def require_modest(method: Any, shapes: Mapping[str, Sequence[int]], file: Path) -> None:
    """Raise InputError where what all layers share, which no file holds, would be larger than any released adapter's.

    shapes: {site: (m, n)} as the file's header says, which may be anything.
    """
    side = max((max(shape) for shape in shapes.values()), default=0)
    if type(method).shared is not Method.shared and method.rank * side > _MOST_SHARED:
        wrong = f"says rank {method.rank} for a weight with a side of {side}, more than {_MOST_SHARED} numbers to share"
        raise InputError(str(file), wrong, "copy it again")
