"""Sites: the places of a model where an update can go, and how targets name them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import InputError, near
from .quantized import require_readable

_SLICES = ("q", "k", "v")  # the three equal row blocks of a fused projection, in timm's order


@dataclass
class Site:
    """A weight of a module, or a block of its rows, that one update is added to.

    name: the module's qualified name, with "[q]", "[k]" or "[v]" for a row block of a fused projection.
    path: the module's qualified name. rows: the block's rows, None for all.
    """

    name: str
    path: str
    module: nn.Linear
    rows: slice | None = None

    @property
    def m(self) -> int:
        """Outputs."""
        return self.module.out_features if self.rows is None else self.rows.stop - self.rows.start

    @property
    def n(self) -> int:
        """Inputs."""
        return self.module.in_features

    def weight(self) -> Tensor:
        """The base weight (m, n), detached, float32 or float64, also while adapters are merged into the module.

        A quantized one is dequantised in float32.
        """
        from .tap import base_weight

        weight = base_weight(self.module)
        weight = weight if self.rows is None else weight[self.rows]
        return weight if weight.dtype == torch.float64 else weight.float()


def qualified(component: str, name: str) -> str:
    """A site's or module's name, led by its component's name where there is one."""
    return f"{component}.{name}" if component else name


def _pattern(*leaves: str) -> re.Pattern[str]:
    return re.compile(r"(.*\.)?(" + "|".join(leaves) + ")")


# Each preset is a pattern over site names; "attention" and the linears need the model and are handled in `find`.
PRESETS: dict[str, re.Pattern[str] | None] = {
    "unet-attention": _pattern("to_q", "to_k", "to_v", r"to_out\.0", "add_q_proj", "add_k_proj", "add_v_proj"),
    "text-encoder-attention": _pattern(r"self_attn\.(q|k|v|out)_proj"),
    "vit-qv": _pattern(r"qkv\[[qv]\]", r"attention\.(query|value)", r"attention\.(q|v)_proj"),
    "llm-linear": None,
    "all-linear": None,
    "attention": None,
}
_ATTENTION = (
    PRESETS["unet-attention"],
    _pattern(r"self_attn\.(q|k|v|o|out)_proj"),
    _pattern(r"qkv\[[qkv]\]", r"attn\.proj"),
    _pattern(r"attention\.(query|key|value)", r"attention\.output\.dense", r"attention\.(q|k|v|o)_proj"),
)


def find(model: nn.Module, targets: str | Iterable[str] | None) -> list[Site]:
    """The sites of `model` that `targets` names, in the model's own order.

    targets: a preset, a list of name suffixes, a regular expression for whole names, or None for the model's preset.
    Raises InputError if nothing matches (with near misses), or if a target names something that is not a linear, or
    one whose weight cannot be read.
    """
    sites = _candidates(model)
    if targets is None:
        targets = _own_preset(model, sites)
    found = _select(model, sites, targets)
    if not found:
        raise InputError("targets", f"{targets!r} matches no layer", _remedy(model, sites, targets))
    twice = {s.path for s in found if s.rows is None} & {s.path for s in found if s.rows is not None}
    if twice:
        wrong = f"{min(twice)} is named whole and by a slice"
        raise InputError("targets", wrong, "name the whole matrix or its slices, not both")
    for site in found:
        require_readable(site.name, site.module)
    return found


def _candidates(model: nn.Module) -> dict[str, Site]:
    """Every place that can be named: linears, and the row blocks of fused projections."""
    sites = {}
    parents = dict(model.named_modules())
    for path, module in parents.items():
        parent = parents.get(path.rpartition(".")[0])
        # The projection inside nn.MultiheadAttention is never called as a module; its weight is read.
        if not isinstance(module, nn.Linear) or isinstance(parent, nn.MultiheadAttention) or not path:
            continue
        sites[path] = Site(path, path, module)
        if path.rpartition(".")[2] == "qkv" and module.out_features % 3 == 0:
            third = module.out_features // 3
            for i, label in enumerate(_SLICES):
                name = f"{path}[{label}]"
                sites[name] = Site(name, path, module, slice(i * third, (i + 1) * third))
    return sites


def _select(model: nn.Module, sites: dict[str, Site], targets: str | Iterable[str]) -> list[Site]:
    if isinstance(targets, str) and targets in PRESETS:
        return _preset(model, sites, targets)
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
            wrong = f"{name} is a {type(module).__name__}, not a linear layer"
            raise InputError("targets", wrong, "name linear layers")


def _preset(model: nn.Module, sites: dict[str, Site], preset: str) -> list[Site]:
    if preset == "attention":
        for pattern in _ATTENTION:
            hits = [s for s in sites.values() if pattern.fullmatch(s.name)]
            if hits:
                return hits
        return []
    if PRESETS[preset] is not None:
        return [s for s in sites.values() if PRESETS[preset].fullmatch(s.name)]
    whole = [s for s in sites.values() if s.rows is None]
    return whole if preset == "all-linear" else [s for s in whole if s.module is not _output_head(model, whole)]


def _output_head(model: nn.Module, linears: list[Site]) -> nn.Module | None:
    """The module that makes logits: transformers says which; elsewhere a top-level linear with a head's name."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None:
        named = [s.module for s in linears if s.path in ("lm_head", "output", "head", "classifier", "score", "fc")]
        head = named[0] if named else None
    return head


def _own_preset(model: nn.Module, sites: dict[str, Site]) -> str:
    for preset in ("unet-attention", "vit-qv"):
        if any(PRESETS[preset].fullmatch(name) for name in sites):
            return preset
    get = getattr(model, "get_output_embeddings", None)
    if callable(get) and get() is not None:
        return "llm-linear"
    if any(PRESETS["text-encoder-attention"].fullmatch(name) for name in sites):
        return "text-encoder-attention"
    return "all-linear"


def _remedy(model: nn.Module, sites: dict[str, Site], targets) -> str:
    leaves = sorted({_leaf(name) for name in sites})
    words = [targets] if isinstance(targets, str) else list(targets)
    hint = "".join(near(w, list(PRESETS) + leaves) for w in words)
    names = ", ".join(leaves[:24]) or "none at all"
    return f"linear layers of {type(model).__name__}{hint}: {names}; presets: {', '.join(PRESETS)}"


def _leaf(name: str) -> str:
    """The last part of a name that is not a number: "to_out.0" and "to_q" of longer names."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() and len(parts) > 1 else parts[-1]


def find_named(model: nn.Module, names: Iterable[str]) -> list[Site]:
    """The sites with exactly these names, in the model's order; names that the model lacks are left out.

    Raises InputError for a weight that cannot be read.
    """
    wanted = set(names)
    found = [site for name, site in _candidates(model).items() if name in wanted]
    for site in found:
        require_readable(site.name, site.module)
    return found
