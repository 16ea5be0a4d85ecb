"""Sites: the places of a model where an update can go, and how targets name them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .errors import InputError, near
from .layer import CONVOLUTIONS
from .presets import PRESETS, choose, own_preset
from .quantized import require_readable

_SLICES = ("q", "k", "v")  # the three equal row blocks of a fused projection, in timm's order and in torch's
_FUSED = "in_proj_weight"
_RAW = (_FUSED, "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention


@dataclass
class Site:
    """A weight of a module, or a block of its rows, that one update is added to, as a matrix (m, n).

    A convolution's weight (out, in / groups, *kernel) is the matrix (out, n) with n = in / groups x the kernel's size.
    name: the module's qualified name, with "[q]", "[k]" or "[v]" for a row block of a fused projection.
    path: the module's qualified name. rows: the block's rows, None for all.
    tensor: the parameter's name in the module. Where it is not "weight", it ends `path` and `name` too, as in
    "attn.in_proj_weight[q]" of nn.MultiheadAttention.
    """

    name: str
    path: str
    module: nn.Module
    rows: slice | None = None
    tensor: str = "weight"

    @property
    def key(self) -> tuple[nn.Module, str]:
        """What the sites on one weight have in common: the module and its parameter's name."""
        return self.module, self.tensor

    @property
    def parameter(self) -> Tensor:
        """The module's live parameter, as the base has it or with what is merged; of a quantized one in its codes."""
        held = self.module._parameters.get(self.tensor)
        return getattr(self.module, self.tensor) if held is None else held

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole weight's shape, of a quantized one that of what it stands for."""
        if isinstance(self.module, nn.Linear):
            return self.module.out_features, self.module.in_features
        return tuple(self.parameter.shape)

    @property
    def m(self) -> int:
        """Outputs."""
        return self.shape[0] if self.rows is None else self.rows.stop - self.rows.start

    @property
    def n(self) -> int:
        """Inputs."""
        return math.prod(self.shape[1:])

    def weight(self) -> Tensor:
        """The base weight (m, n), detached, float32 or float64, also while adapters are merged into the module.

        A quantized one is dequantised in float32.
        """
        from .tap import base_weight

        weight = base_weight(self.module, self.tensor).flatten(1)
        weight = weight if self.rows is None else weight[self.rows]
        return weight if weight.dtype == torch.float64 else weight.float()


def qualified(component: str, name: str) -> str:
    """A site's or module's name, led by its component's name where there is one."""
    return f"{component}.{name}" if component else name


def find(model: nn.Module, targets: str | Iterable[str] | None) -> list[Site]:
    """The sites of `model` that `targets` names, in the model's own order.

    targets: a preset, a list of name suffixes, a regular expression for whole names, or None for the model's preset.
    Convolutions are taken where a suffix or an expression names them; presets have linear layers alone.
    Raises InputError if nothing matches (with near misses), or if a target names something that is no linear layer or
    convolution, or one whose weight cannot be read.
    """
    sites = candidates(model)
    if targets is None:
        targets = own_preset(model, sites)
    found = _select(model, sites, targets)
    if not found:
        raise InputError("targets", f"{targets!r} matches no layer", _remedy(model, sites, targets))
    twice = {s.path for s in found if s.rows is None} & {s.path for s in found if s.rows is not None}
    if twice:
        wrong = f"{min(twice)} is named whole and by a slice"
        raise InputError("targets", wrong, "name the whole matrix or its slices, not both")
    for site in found:
        require_readable(site.name, site.parameter, site.module)
    return found


def candidates(model: nn.Module) -> dict[str, Site]:
    """Every place that can be named: linears, convolutions, the parameters of nn.MultiheadAttention, and the row
    blocks of fused projections."""
    sites = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            names = [(qualified(path, tensor), tensor) for tensor in _RAW if module._parameters.get(tensor) is not None]
        else:
            names = [(path, "weight")] if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and path else []
        for name, tensor in names:
            sites[name] = site = Site(name, name, module, tensor=tensor)
            if tensor == _FUSED or (name.rpartition(".")[2] == "qkv" and isinstance(module, nn.Linear)):
                for label, rows in _thirds(site.m).items():
                    sites[f"{name}[{label}]"] = replace(site, name=f"{name}[{label}]", rows=rows)
    return sites


def _thirds(m: int) -> dict[str, slice]:
    """The row blocks of a fused projection with m outputs; none where they are not equal."""
    return {} if m % 3 else {label: slice(i * m // 3, (i + 1) * m // 3) for i, label in enumerate(_SLICES)}


def _select(model: nn.Module, sites: dict[str, Site], targets: str | Iterable[str]) -> list[Site]:
    if isinstance(targets, str) and targets in PRESETS:
        return choose(model, sites, targets)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError("targets", f"{targets!r} is no regular expression ({error})", "mend it") from None
        hits = [s for s in sites.values() if pattern.fullmatch(s.name)]
        if hits:
            whole = {s.path for s in hits if s.rows is None}  # a loose pattern matches qkv and qkv[q]: take the whole
            return [s for s in hits if s.rows is None or s.path not in whole]
    for word in wanted:
        if word in PRESETS:
            raise InputError("targets", f"the preset {word!r} stands in a list", "give a preset alone, as a string")
        if not any(_ends(s.name, word) for s in sites.values()):
            _refuse_other_kind(model, word)
            if len(wanted) > 1:
                raise InputError("targets", f"{word!r} matches no layer", _remedy(model, sites, word))
    return [s for s in sites.values() if any(_ends(s.name, word) for word in wanted)]


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _refuse_other_kind(model: nn.Module, word: str) -> None:
    for name, module in model.named_modules():
        if name and _ends(name, word) and next(module.parameters(), None) is not None:
            wrong = f"{name} is a {type(module).__name__}, not a linear layer or convolution"
            raise InputError("targets", wrong, "name linear layers and convolutions")


def _remedy(model: nn.Module, sites: dict[str, Site], targets) -> str:
    leaves = sorted({_leaf(name) for name in sites})
    words = [targets] if isinstance(targets, str) else list(targets)
    hint = "".join(near(w, list(PRESETS) + leaves) for w in words)
    names = ", ".join(leaves[:24]) or "none at all"
    return f"layers of {type(model).__name__}{hint}: {names}; presets: {', '.join(PRESETS)}"


def _leaf(name: str) -> str:
    """The last part of a name that is not a number: "to_out.0" and "to_q" of longer names."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() and len(parts) > 1 else parts[-1]


def find_named(model: nn.Module, names: Iterable[str]) -> list[Site]:
    """The sites with exactly these names, in the model's order; names that the model lacks are left out.

    Raises InputError for a weight that cannot be read.
    """
    wanted = set(names)
    found = [site for name, site in candidates(model).items() if name in wanted]
    for site in found:
        require_readable(site.name, site.parameter, site.module)
    return found
