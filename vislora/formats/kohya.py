"""kohya's layout: "lora_unet_<path with underscores>.lora_down.weight", an alpha tensor beside each pair."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError, near
from ..io import KOHYA_FILE as FILE
from .diffusers import NO_COMPONENT
from .family import FAMILIES, PREDICTION, family_of, group, is_t5, stated
from .lora import Layer, LoraFile, Names, Stored, folded, layers_of
from .original import by_flat, fused, named_in, split, to_ldm, whole_of
from .vocabulary import by_flat_name, flat, from_ldm, known


class Modules(Protocol):
    """What a file's names may stand for: a `Base`, or a model at hand. label: what messages call it."""

    label: str

    def paths(self, component: str) -> list[str]: ...


SGM = "vislora.sgm"  # of a header that is yet to be written
NO_MAGNITUDES = "export it as diffusers or peft, merge it into the model, or give a rank to fold it into"


_KEY = re.compile(
    r"(?:(?P<prefix>lora_(?:unet|transformer|te[123]?))_(?P<name>[^.]+)|diffusion_model\.(?P<dotted>.+?))"
    r"\.(?P<kind>lora_down\.weight|lora_up\.weight|lora_A\.weight|lora_B\.weight|alpha|dora_scale)"
)
_ROLES = {
    "lora_down.weight": "down", "lora_A.weight": "down", "lora_up.weight": "up", "lora_B.weight": "up",
    "alpha": "alpha", "dora_scale": "magnitude",
}  # fmt: skip
_COMPONENTS = {"lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}


def recognise(keys: set[str], header: Mapping[str, str]) -> bool:
    """Whether any key is kohya's, or ComfyUI's spelling of one of an original checkpoint."""
    matches = [match for match in map(_KEY.fullmatch, keys) if match]
    return any(match["prefix"] or named_in(flat(match["dotted"])) for match in matches)


def read(file: Path, stored: Stored, base: Modules | None = None) -> LoraFile:
    """Raises InputError for a name of no module of the vocabulary (of the base, where one is given), or of two."""
    matches = {key: _KEY.fullmatch(key) for key in stored.tensors}
    strange = [key for key, match in matches.items() if match is None]
    if strange:
        raise InputError(str(file), f"{strange[0]} is no key of kohya's layout", "convert it first")
    family = _family(matches.values(), stored.header)
    found: dict[Names, dict[str, str]] = {}
    for key, match in matches.items():
        names = _names(file, match, family, base)
        role = _ROLES[match["kind"]]
        if role in found.setdefault(names, {}):
            raise InputError(str(file), f"{key} says again what {found[names][role]} does", "keep one of the two")
        found[names][role] = key

    def scale(names: Names, rank: int, alpha: float | None) -> float:
        return 1.0 if alpha is None else alpha / rank

    layers = layers_of(file, stored, found, scale)
    if family is not None:
        whole = [layer for layer in layers if layer.component == _ORIGINAL]
        layers = [layer for layer in layers if layer.component != _ORIGINAL]
        layers += split(file, [replace(layer, component="transformer") for layer in whole], family)
    return LoraFile(file, "kohya", layers, {"": stored})


_ORIGINAL = "transformer, original names"


def _family(matches: Iterable[re.Match], header: Mapping[str, str]) -> str | None:
    """"sd3" or "flux" where names or the header say so, None for UNets."""
    said = {named_in(_name(match)) for match in matches if match["prefix"] in ("lora_unet", None)} - {None}
    told = group(stated(header))
    return min(said) if said else told if told in ("sd3", "flux") else None


def _name(match: re.Match) -> str:
    return match["name"] or flat(match["dotted"])


def _names(file: Path, match: re.Match, family: str | None, base: Modules | None) -> Names:
    prefix, name = match["prefix"], _name(match)
    if prefix == "lora_te3":
        component = "text_encoder_2" if family == "flux" else "text_encoder_3"
    elif prefix == "lora_transformer":  # OneTrainer's, with diffusers' names
        component = "transformer"
    elif prefix in _COMPONENTS:
        component = _COMPONENTS[prefix]
    elif family is not None and name in by_flat(family):
        return _ORIGINAL, by_flat(family)[name]
    else:
        component = "transformer" if family else "unet"
    return component, _path(file, component, name, base)


def _path(file: Path, component: str, name: str, base: Modules | None) -> str:
    if base is not None:
        names = by_flat_name(base.paths(component))
    elif component == "transformer":
        names = by_flat_name(whole_of("sd3") | whole_of("flux"))
    else:
        names = known(component)
    # diffusers' converter leaves text_model out since transformers 5.6; kohya's SDXL files name LDM's blocks.
    other = from_ldm(name) if component == "unet" else f"text_model_{name}"
    paths = names.get(name) or names.get(other) or []
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise InputError(str(file), f"{name} may be {' or '.join(paths[:3])}", "convert it with the tool that made it")
    models = "SD3 and Flux" if component in ("transformer", "text_encoder_3") else "SD 1.x, 2.x and XL"
    where = f"the {component} of {base.label}" if base else f"the {component} of {models}"
    remedy = "give the base that it was trained on" if base else "give its model's folder as --base"
    raise InputError(str(file), f"{name} is no module of {where}{near(name, names)}", remedy)


def parts(layers: list[Layer], header: Mapping[str, str], out: Path) -> dict[Path, Stored]:
    """What to write for `layers`. Raises InputError for what the layout cannot hold, or not without ambiguity.

    SDXL's blocks bear the original checkpoint's names, as kohya's trainer writes them, where all layers have one;
    header: with SGM "no" they keep diffusers' names, for models of another number of layers a block.
    """
    family = family_of(layers, header)
    tensors: dict[str, Tensor] = {}
    for prefix, path, layer in _placed(folded(layers), family, header.get(SGM) != "no"):
        if layer.magnitude is not None:
            wrong = f"{layer.name} has DoRA's magnitudes, which readers of kohya's files drop or read otherwise"
            raise InputError("export", wrong, NO_MAGNITUDES)
        key = f"{prefix}_{flat(path)}"
        if f"{key}.alpha" in tensors:
            raise InputError("export", f"two modules would be written as {key}", "export it as diffusers")
        tensors[f"{key}.lora_down.weight"] = layer.down
        tensors[f"{key}.lora_up.weight"] = layer.up
        tensors[f"{key}.alpha"] = torch.tensor(float(layer.rank))
    kept = {key: text for key, text in header.items() if key != SGM}
    return {out if out.suffix == ".safetensors" else out / FILE: Stored(tensors, kept | _words(family, tensors, header))}


def _words(family: str | None, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, str]:
    """What kohya's tools and user interfaces read of a header."""
    words = FAMILIES[family or "sd1"]
    rank = str(max(t.shape[0] for key, t in tensors.items() if key.endswith(".lora_down.weight")))
    return {
        "format": "pt",
        "ss_network_module": words.module,
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_args": "{}",
        "ss_base_model_version": words.version,
        "ss_v2": str(group(family) == "sd2"),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{words.architecture}/lora",
        "modelspec.implementation": "vislora",
        "modelspec.title": header.get("modelspec.title", "LoRA"),
        "modelspec.resolution": header.get("modelspec.resolution", f"{words.resolution}x{words.resolution}"),
        **({PREDICTION: "v"} if family == "sd2-v" else {}),
    }


def _placed(layers: list[Layer], family: str | None, sgm: bool) -> Iterator[tuple[str, str, Layer]]:
    """(prefix, path in the layout's names, layer) for each tensor pair to write."""
    small = group(family) in ("sd1", "sd2")
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te" if small else "lora_te1", "text_encoder_2": "lora_te2"}
    blocks = [layer.path for layer in layers if layer.component == "unet"]
    sgm = sgm and group(family) == "sdxl" and all(flat(path) in known("unet") for path in blocks)
    transformer = [layer for layer in layers if layer.component == "transformer"]
    if transformer and group(family) not in ("sd3", "flux"):
        wrong = f"{transformer[0].name} may be SD3's or Flux's, which this layout names differently, or another's"
        raise InputError("export", wrong, "export it as diffusers or peft, or from the model by adapter.export")
    for layer in layers:
        if is_t5(layer.path) and layer.component in ("text_encoder_2", "text_encoder_3"):
            yield "lora_te3", layer.path, layer
        elif layer.component in prefixes:
            original = sgm and layer.component == "unet"
            yield prefixes[layer.component], to_ldm(layer.path) if original else layer.path, layer
        elif layer.component != "transformer":
            wrong = f"{layer.name} belongs to no component of SD 1.x, 2.x, XL, SD3 or Flux"
            raise InputError("export", wrong, NO_COMPONENT)
    yield from (("lora_unet", layer.path, layer) for layer in (fused(transformer, group(family)) if transformer else ()))
