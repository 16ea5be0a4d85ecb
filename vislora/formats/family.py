"""Which family of models a LoRA belongs to: by what its header says, else by what its layers look like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..distributed import class_name
from .lora import Layer

ARCHITECTURE = "modelspec.architecture"
PREDICTION = "modelspec.prediction_type"
_WIDTHS = {3072: "flux", 1536: "sd3", 2432: "sd3"}  # of the two transformers' released sizes
_TEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # of a token, as the UNet's cross-attention sees it


@dataclass(frozen=True)
class Family:
    """The words by which kohya's files and the model specification name a family.

    version: of ss_base_model_version. resolution: its pixels, where nothing else is said.
    """

    architecture: str
    version: str
    module: str = "networks.lora"
    resolution: int = 512


FAMILIES = {
    "sd1": Family("stable-diffusion-v1", "sd_v1"),
    "sd2": Family("stable-diffusion-v2-512", "sd_v2"),
    "sd2-v": Family("stable-diffusion-v2-768-v", "sd_v2_v", resolution=768),
    "sdxl": Family("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", resolution=1024),
    "sd3": Family("stable-diffusion-3-3-medium", "3-medium", "networks.lora_sd3", 1024),
    "sd3.5-medium": Family("stable-diffusion-3-3-5-medium", "3-5-medium", "networks.lora_sd3", 1024),
    "sd3.5-large": Family("stable-diffusion-3-3-5-large", "3-5-large", "networks.lora_sd3", 1024),
    "flux": Family("flux-1-dev", "flux1", "networks.lora_flux", 1024),
    "flux-schnell": Family("flux-1-schnell", "flux1", "networks.lora_flux", 1024),
}
# The start of what headers say, the longest first.
_SAID = sorted(
    [(word.architecture, name) for name, word in FAMILIES.items()]
    + [(word.version, name) for name, word in FAMILIES.items() if name != "flux-schnell"]
    + [("stable-diffusion-3", "sd3"), ("sd3", "sd3"), ("flux", "flux")]
    + [("stable-diffusion-xl", "sdxl"), ("sdxl", "sdxl")],
    key=lambda pair: -len(pair[0]),
)  # fmt: skip
_CLASSES = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}


def group(family: str | None) -> str | None:
    """Without what tells the sizes and variants of one family apart: "sd1", "sd2", "sdxl", "sd3", "flux"."""
    return None if family is None else family.partition("-")[0].partition(".")[0]


def family_of(layers: list[Layer], header: Mapping[str, str]) -> str | None:
    """A name of FAMILIES; None for a transformer that may be either of the two, or another.

    What has nothing that tells, such as a first text encoder alone, counts as SD 1.x.
    """
    found = stated(header) or _by_layers(layers)
    return "sd2-v" if found == "sd2" and header.get(PREDICTION) == "v" else found


def _by_layers(layers: list[Layer]) -> str | None:
    if any(layer.component == "transformer" for layer in layers):
        return _of_transformer([layer for layer in layers if layer.component == "transformer"])
    if any(layer.component == "text_encoder_3" for layer in layers):
        return "sd3"
    if any(layer.component == "text_encoder_2" for layer in layers):
        return "flux" if any(is_t5(layer.path) for layer in layers) else "sdxl"
    for layer in layers:
        if layer.path.endswith(("attn2.to_k", "attn2.to_v")):
            return _TEXT.get(layer.shape[1], "sd1")
    wide = any(layer.component == "text_encoder" and layer.shape[1] == 1024 for layer in layers)
    return "sd2" if wide else "sd1"


def _of_transformer(layers: list[Layer]) -> str | None:
    if any(layer.path.startswith(("single_transformer_blocks.", "time_text_embed.guidance")) for layer in layers):
        return "flux"
    widths = {layer.shape[1] for layer in layers if layer.path.endswith((".to_q", ".add_q_proj", ".to_k", ".to_v"))}
    found = {_WIDTHS.get(width) for width in widths}
    if any(".attn2." in layer.path for layer in layers):
        return "sd3.5-medium"
    if found == {"sd3"} or any(layer.path.startswith("pos_embed.") for layer in layers):
        return "sd3.5-large" if 2432 in widths else "sd3"
    return "flux" if found == {"flux"} else None


def stated(header: Mapping[str, str]) -> str | None:
    """The family that a header names: by its architecture, kohya's version, or the classes of our own configuration."""
    for key in (ARCHITECTURE, "ss_base_model_version"):
        for start, name in _SAID:
            if header.get(key, "").startswith(start):
                return name
    for key in ("vislora", "vislora.certificate"):
        try:
            classes = dict(json.loads(header[key])["base"]["classes"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        for kind in classes.values():
            if kind in _CLASSES:
                return _CLASSES[kind]
    return None


def of_models(roots: Mapping[str, Any]) -> str | None:
    """The family of models by their classes and configurations; None where they do not tell.

    roots: {component: module}, or {"": module}.
    """
    for root in roots.values():
        kind, config = class_name(root), getattr(root, "config", None)
        if kind == "FluxTransformer2DModel":
            return "flux" if config.guidance_embeds else "flux-schnell"
        if kind == "SD3Transformer2DModel":
            large = config.num_attention_heads * config.attention_head_dim == 2432
            return "sd3.5-large" if large else "sd3.5-medium" if config.dual_attention_layers else "sd3"
        if kind == "UNet2DConditionModel":
            xl = config.addition_embed_type == "text_time"
            return "sdxl" if xl else "sd2" if config.cross_attention_dim == 1024 else "sd1"
    return None


def is_t5(path: str) -> bool:
    """Whether a module's path is one of a T5 encoder."""
    return path.startswith("encoder.block.")
