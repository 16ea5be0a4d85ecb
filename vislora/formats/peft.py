"""PEFT's folders: adapter_config.json beside adapter_model.safetensors, in one folder or in one for each component."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..io import PEFT_CONFIG as CONFIG
from ..io import PEFT_FILE as FILE
from ..io import read as read_tensors
from .diffusers import require_one_kind, scale_of
from .family import family_of, group
from .lora import COMPONENTS, TEXT_ENCODERS, Layer, LoraFile, Names, Stored, folded, layers_of, neutral_path
from .vocabulary import component_of

log = logging.getLogger("vislora")
_PREFIX = "base_model.model."
_KEY = re.compile(
    re.escape(_PREFIX) + r"(?P<path>.+)\.(?P<kind>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
_ROLES = {"lora_A.weight": "down", "lora_B.weight": "up"}
# Starts that take a part of the base weights into the factors: B A is then no update of the base as published.
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def recognise(path: Path) -> bool:
    """Whether `path` is such a folder, of one component or several."""
    return bool(_folders(path))


def _folders(path: Path) -> dict[str, Path]:
    """{component: folder with adapter_config.json}; the component is "" where the folder itself is one."""
    if (path / CONFIG).is_file():
        return {path.name if path.name in COMPONENTS else "": path}
    return {name: path / name for name in COMPONENTS if (path / name / CONFIG).is_file()}


def read(path: Path) -> LoraFile:
    """Raises InputError for another kind of adapter, a damaged configuration, pickled weights and strange keys."""
    layers, stored = [], {}
    folders = _folders(path)
    for component, folder in folders.items():
        file = folder / FILE
        if not file.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            wrong = f"holds {'weights that may run code when read' if pickled else f'no {FILE}'}"
            raise InputError(str(folder), wrong, "save it with safetensors")
        stored[component] = Stored(*read_tensors(file), _config(folder / CONFIG))
        found = _found(file, component, stored[component].tensors, stored[component].config)
        layers += layers_of(file, stored[component], found, _scale(file, stored[component].config), component)
    bases = {str(part.config.get("base_model_name_or_path")) for part in stored.values()} - {"None"}
    return LoraFile(path, "peft", layers, stored, f"base {', '.join(sorted(bases))}" if bases else "")


def _found(
    file: Path, component: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[Names, dict[str, str]]:
    """What a key is of which layer; modules that are saved whole beside the updates, as heads are, are left out."""
    saved = config.get("modules_to_save") or ()
    whole = tuple(f"{_PREFIX}{name}." for name in saved) if isinstance(saved, list | tuple) else ()
    if not tensors:
        raise InputError(str(file), "holds no tensors", "train or copy it again")
    found: dict[Names, dict[str, str]] = {}
    for key in tensors:
        match = _KEY.fullmatch(key)
        if match is None and whole and key.startswith(whole):
            log.warning("%s: %s is a module of its own and no update: it is not read", file, key)
            continue
        if match is None:
            raise InputError(str(file), f"{key} is no key of PEFT's LoRA", "use a LoRA without biases")
        if not component and component_of(match["path"]) == "unet":
            names = ("unet", match["path"])
        else:
            names = (component, neutral_path(component, match["path"]))
        found.setdefault(names, {})[_ROLES.get(match["kind"], "magnitude")] = key
    return found


def _scale(file: Path, config: Mapping[str, Any]):
    return lambda names, rank, alpha: scale_of(file, config, names[1], rank)


def _config(file: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(str(file), f"is no JSON of a configuration ({error})", "copy it again") from None
    kind, start = config.get("peft_type"), str(config.get("init_lora_weights")).lower()
    if kind != "LORA":
        raise InputError(str(file), f"is an adapter of the kind {kind}", "give a LoRA or DoRA")
    if start.startswith(_MOVED):
        wrong = f"started by {start}, which moves a part of the base weights into the factors"
        raise InputError(str(file), wrong, "save it by PEFT with path_initial_model_for_weight_conversion")
    return config


def parts(layers: list[Layer], header: Mapping[str, str], out: Path) -> dict[Path, Stored]:
    """What to write for `layers`: a sub-folder for each component, or `out` itself for a model without any."""
    if out.suffix == ".safetensors":
        raise InputError(str(out), "is a file", "PEFT reads folders: give a folder's name")
    if any(layer.path.endswith("]") for layer in layers):
        raise InputError("export", "slices of a fused matrix have no place in PEFT's layout", "keep our own format")
    require_one_kind(layers)
    projected = group(family_of(layers, header)) == "sd3"
    written = {}
    for component in dict.fromkeys(layer.component for layer in layers):
        own = folded([layer for layer in layers if layer.component == component])
        tensors: dict[str, Tensor] = {}
        for layer in own:
            key = _PREFIX + _native(layer, projected)
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = layer.down, layer.up
            if layer.magnitude is not None:
                tensors[f"{key}.lora_magnitude_vector"] = layer.magnitude
        config = {
            "peft_type": "LORA",
            "r": own[0].rank,
            "lora_alpha": own[0].rank,
            "target_modules": [_native(layer, projected) for layer in own],
            "bias": "none",
            "use_dora": own[0].magnitude is not None,
        }
        written[out / component / FILE] = Stored(tensors, {"format": "pt", **header}, config)
    return written


def _native(layer: Layer, projected: bool) -> str:
    """The module's path in the model as transformers 5.6 and later build it: CLIPTextModel has no text_model.

    projected: whether the first encoder is a CLIPTextModelWithProjection, as SD3's is; that has it still.
    """
    flat = layer.component == TEXT_ENCODERS[0] and not projected
    return layer.path.removeprefix("text_model.") if flat else layer.path
