"""Target presets: patterns over site names, and which of them fits a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from .layer import CONVOLUTIONS

if TYPE_CHECKING:
    from .site import Site


def _pattern(*leaves: str) -> re.Pattern[str]:
    return re.compile(r"(.*\.)?(" + "|".join(leaves) + ")")


_RAW = (r"in_proj_weight\[[qkv]\]", r"(q|k|v)_proj_weight")  # nn.MultiheadAttention's own parameters
_JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # the text's side of a joint attention
_T5 = r"(Self|EncDec)Attention\.(q|k|v|o)"

# None: "attention" and the linears need the model and are handled in `choose`.
PRESETS: dict[str, re.Pattern[str] | None] = {
    "unet-attention": _pattern("to_q", "to_k", "to_v", r"to_out\.0", *_JOINT),
    "text-encoder-attention": _pattern(r"self_attn\.(q|k|v|out)_proj", _T5, *_RAW, r"\w*(attn|attention)\.out_proj"),
    "vit-qv": _pattern(
        r"qkv\[[qv]\]", r"attention\.(query|value)", r"attention\.(q|v)_proj", r"vision_model\..*self_attn\.(q|v)_proj",
        r"in_proj_weight\[[qv]\]", r"(q|v)_proj_weight",
    ),
    "llm-linear": None,
    "all-linear": None,
    "attention": None,
}  # fmt: skip
_ATTENTION = (
    PRESETS["unet-attention"],
    _pattern(r"self_attn\.(q|k|v|o|out)_proj", _T5, *_RAW, r"\w*(attn|attention)\.out_proj", r"visual\..*attn\.proj",
             r"visual\..*qkv\[[qkv]\]"),
    _pattern(r"qkv\[[qkv]\]", r"attn\.proj"),
    _pattern(r"attention\.(query|key|value)", r"attention\.output\.dense", r"attention\.(q|k|v|o)_proj"),
)  # fmt: skip
_CLIP_QV = _pattern(r"self_attn\.(q|v)_proj")  # transformers' CLIP names its image tower's layers as its text's
_VISION = ("visual", "vision_model")  # the image's tower in a model that has one for text beside it
_HEADS = ("lm_head", "output", "head", "classifier", "score", "fc")


def choose(model: nn.Module, sites: dict[str, Site], preset: str) -> list[Site]:
    """The sites that a preset stands for; perhaps none."""
    if preset == "attention":
        hits = ([s for s in sites.values() if pattern.fullmatch(s.name)] for pattern in _ATTENTION)
        return next((found for found in hits if found), [])
    if PRESETS[preset] is not None:
        found = [s for s in sites.values() if PRESETS[preset].fullmatch(s.name)]
        if preset == "vit-qv" and not found and _has(model, *CONVOLUTIONS):
            found = [s for s in sites.values() if _CLIP_QV.fullmatch(s.name)]
        return _of_tower(found, preset) if preset in ("vit-qv", "text-encoder-attention") else found
    whole = [s for s in sites.values() if s.rows is None and not isinstance(s.module, CONVOLUTIONS)]
    head = None if preset == "all-linear" else _output_head(model, whole)
    return [s for s in whole if s.module is not head]


def _of_tower(found: list[Site], preset: str) -> list[Site]:
    """Of a model with towers for images and for text, the sites of the preset's own."""
    vision = [s for s in found if any(part in _VISION for part in s.name.split("."))]
    if preset == "vit-qv":
        return vision or found
    return [s for s in found if s not in vision] or found


def _output_head(model: nn.Module, linears: list[Site]) -> nn.Module | None:
    """The module that makes logits: transformers says which; elsewhere a top-level linear with a head's name."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None:
        named = [s.module for s in linears if s.path in _HEADS]
        head = named[0] if named else None
    return head


def own_preset(model: nn.Module, names: Iterable[str]) -> str:
    """The preset of a model for which no targets are given."""
    names = list(names)

    def fits(preset: str) -> bool:
        return any(PRESETS[preset].fullmatch(name) for name in names)

    if fits("unet-attention"):
        return "unet-attention"
    get = getattr(model, "get_output_embeddings", None)
    if callable(get) and get() is not None:  # before names: RWKV's attention has a value, as a ViT's
        return "llm-linear"
    # nn.MultiheadAttention's names say nothing of what it attends to: patches come from a convolution, words from a
    # table of embeddings.
    raw = any(name.endswith(("in_proj_weight", "q_proj_weight")) for name in names)
    if fits("vit-qv") and (not raw or _has(model, *CONVOLUTIONS)):
        return "vit-qv"
    if fits("text-encoder-attention") and (not raw or _has(model, nn.Embedding)):
        return "text-encoder-attention"
    return "all-linear"


def _has(model: nn.Module, *kinds: type[nn.Module]) -> bool:
    return any(isinstance(module, kinds) for module in model.modules())
