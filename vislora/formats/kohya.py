"""kohya's layout: "lora_unet_<path with underscores>.lora_down.weight", an alpha tensor beside each pair."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError, near
from ..io import KOHYA_FILE as FILE
from .diffusers import NO_COMPONENT
from .lora import Layer, LoraFile, Names, Stored, folded, layers_of
from .vocabulary import by_flat_name, flat, from_ldm, known


class Modules(Protocol):
    """What a file's names may stand for: a `Base`, or a model at hand. label: what messages call it."""

    label: str

    def paths(self, component: str) -> list[str]: ...


_KEY = re.compile(
    r"(?P<prefix>lora_(?:unet|te[123]?))_(?P<name>[^.]+)"
    r"\.(?P<kind>lora_down\.weight|lora_up\.weight|alpha|dora_scale)"
)
_ROLES = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "magnitude"}
_COMPONENTS = {
    "lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2",
}  # fmt: skip


def recognise(keys: set[str], header: Mapping[str, str]) -> bool:
    return any(_KEY.fullmatch(key) for key in keys)


def read(file: Path, stored: Stored, base: Modules | None = None) -> LoraFile:
    """Raises InputError for a name of no module of the vocabulary (of the base, where one is given), or of two."""
    found: dict[Names, dict[str, str]] = {}
    for key in stored.tensors:
        match = _KEY.fullmatch(key)
        if match is None or match["prefix"] not in _COMPONENTS:
            raise InputError(str(file), f"{key} is no key of kohya's layout for SD 1.x, 2.x and XL", "convert it first")
        component = _COMPONENTS[match["prefix"]]
        names = (component, _path(file, component, match["name"], base))
        role = _ROLES[match["kind"]]
        if role in found.setdefault(names, {}):
            raise InputError(str(file), f"{key} says again what {found[names][role]} does", "keep one of the two")
        found[names][role] = key

    def scale(names: Names, rank: int, alpha: float | None) -> float:
        return 1.0 if alpha is None else alpha / rank

    return LoraFile(file, "kohya", layers_of(file, stored, found, scale), {"": stored})


def _path(file: Path, component: str, name: str, base: Modules | None) -> str:
    names = known(component) if base is None else by_flat_name(base.paths(component))
    # diffusers' converter leaves text_model out since transformers 5.6; kohya's SDXL files name LDM's blocks.
    other = from_ldm(name) if component == "unet" else f"text_model_{name}"
    paths = names.get(name) or names.get(other) or []
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise InputError(str(file), f"{name} may be {' or '.join(paths[:3])}", "convert it with the tool that made it")
    where = f"the {component} of {base.label}" if base else f"the {component} of SD 1.x, 2.x and XL"
    remedy = "give the base that it was trained on" if base else "give its model's folder as --base"
    raise InputError(str(file), f"{name} is no module of {where}{near(name, names)}", remedy)


def parts(layers: list[Layer], header: Mapping[str, str], out: Path) -> dict[Path, Stored]:
    """What to write for `layers`. Raises InputError for what the layout cannot hold, or not without ambiguity."""
    xl = is_xl(layers)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}
    tensors: dict[str, Tensor] = {}
    for layer in folded(layers):
        if layer.component not in prefixes:
            wrong = f"{layer.name} belongs to no component of SD 1.x, 2.x or XL"
            raise InputError("export", wrong, NO_COMPONENT)
        if layer.magnitude is not None:
            wrong = f"{layer.name} has DoRA's magnitudes, which readers of kohya's files drop or read otherwise"
            raise InputError("export", wrong, "export it as diffusers or peft")
        key = f"{prefixes[layer.component]}_{flat(layer.path)}"
        if f"{key}.alpha" in tensors:
            raise InputError("export", f"two modules would be written as {key}", "export it as diffusers")
        tensors[f"{key}.lora_down.weight"] = layer.down
        tensors[f"{key}.lora_up.weight"] = layer.up
        tensors[f"{key}.alpha"] = torch.tensor(float(layer.rank))
    rank = str(max(layer.rank for layer in layers))
    own = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": "sdxl_base_v1-0" if xl else "sd_v1",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora" if xl else "stable-diffusion-v1/lora",
        "modelspec.implementation": "vislora",
    }
    return {out if out.suffix == ".safetensors" else out / FILE: Stored(tensors, {**header, **own})}


def is_xl(layers: list[Layer]) -> bool:
    """Whether the layers are SDXL's: a second text encoder, or text of 2048 numbers a token."""
    return any(
        layer.component == "text_encoder_2" or (layer.path.endswith("attn2.to_k") and layer.shape[1] == 2048)
        for layer in layers
    )

