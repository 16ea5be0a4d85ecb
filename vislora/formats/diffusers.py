"""The layout of `pipe.save_lora_weights`: "unet.<path>.lora_A.weight", alphas in the header or nowhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..io import LORA_FILE
from .family import is_t5
from .lora import COMPONENTS, TEXT_ENCODERS, Layer, LoraFile, Names, Stored, folded, layers_of, neutral_path

NO_COMPONENT = "export it as peft, or name its folder after the component: unet, text_encoder, text_encoder_2"
METADATA = "lora_adapter_metadata"
# What makes a pattern of a file's own slow on a name of its own: a repeated group, a reference, and many repeats.
_SLOW, _REPEATS = re.compile(r"\)[*+?{]|\\[1-9]|\(\?"), re.compile(r"[*+?{]")
# Spellings of five years: PEFT's, diffusers' own two, and those of its attention processors.
_KEY = re.compile(
    r"(?P<component>[^.]+)\.(?P<path>.+?)"
    r"(?:\.(?P<a>lora_A|lora\.down|lora_linear_layer\.down|lora_B|lora\.up|lora_linear_layer\.up)\.weight"
    r"|\.(?P<c>lora_magnitude_vector)(?:\.weight)?"
    r"|\.processor\.(?P<leaf>to_(?:q|k|v|out))_lora\.(?P<b>down|up)\.weight)"
)


def recognise(keys: set[str], header: Mapping[str, str]) -> bool:
    return any(_KEY.fullmatch(key) for key in keys) and not any(k.startswith("base_model.model.") for k in keys)


def read(file: Path, stored: Stored) -> LoraFile:
    """Raises InputError for keys of no component of ours, and for a header that contradicts the tensors."""
    found: dict[Names, dict[str, str]] = {}
    for key in stored.tensors:
        match = _KEY.fullmatch(key)
        if match is None or match["component"] not in COMPONENTS:
            led = f"is led by {match['component']!r}" if match else "is no key of the diffusers layout"
            raise InputError(str(file), f"{key} {led}", f"the layout's components are {', '.join(COMPONENTS)}")
        path = match["path"]
        if match["leaf"]:
            path += f".{match['leaf']}" + (".0" if match["leaf"] == "to_out" else "")
        names = (match["component"], neutral_path(match["component"], path))
        kind = match["a"] or match["b"] or match["c"]
        role = "magnitude" if match["c"] else "down" if kind.endswith(("lora_A", "down")) else "up"
        if role in found.setdefault(names, {}):
            raise InputError(str(file), f"{key} says again what {found[names][role]} does", "keep one of the two")
        found[names][role] = key
    metadata = _metadata(file, stored.header)

    def scale(names: Names, rank: int, alpha: float | None) -> float:
        component, path = names
        own = {k.removeprefix(f"{component}."): v for k, v in metadata.items() if k.startswith(f"{component}.")}
        return scale_of(file, own, path, rank) if own else 1.0

    return LoraFile(file, "diffusers", layers_of(file, stored, found, scale), {"": stored})


def scale_of(file: Path, config: Mapping[str, Any], path: str, rank: int) -> float:
    """A layer's factor from a PEFT configuration, by PEFT's own matching of patterns.

    Raises InputError where the configuration is damaged or its rank is not the tensors'.
    """
    try:
        stated = _of_pattern(config.get("rank_pattern"), path, config.get("r", rank))
        alpha = _of_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", rank))
        if stated != rank:
            wrong = f"{path} has rank {rank} and the configuration says {stated}"
            raise InputError(str(file), wrong, "correct r and rank_pattern, or copy it again")
        scale = float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
        if not math.isfinite(scale):
            raise InputError(str(file), f"{path} has alpha {alpha}", "correct lora_alpha and alpha_pattern")
        return scale
    except (TypeError, AttributeError, OverflowError, re.error) as error:
        raise InputError(str(file), f"has a damaged configuration ({error})", "save it again") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(file), f"has a damaged configuration ({error})", "save it again") from None


def _of_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    bare = path.removeprefix("text_model.")  # patterns may name either tree
    for pattern, value in (patterns or {}).items():
        if _SLOW.search(pattern) or len(_REPEATS.findall(pattern)) > 2:
            raise ValueError(f"the pattern {pattern} may take for ever to match")
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (path, bare)):
            return value
    return default


def _metadata(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    text = header.get(METADATA)
    if text is None:
        return {}
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(str(file), f"has a damaged {METADATA} ({error})", "save it again") from None


def parts(layers: list[Layer], header: Mapping[str, str], out: Path) -> dict[Path, Stored]:
    """What to write for `layers`. Raises InputError for layers that stock diffusers would drop or misread."""
    for layer in layers:
        if layer.component not in COMPONENTS:
            raise InputError("export", f"{layer.name} belongs to no component of a pipeline", NO_COMPONENT)
        if is_t5(layer.path):
            raise InputError("export", f"diffusers reads no LoRA of a T5 encoder ({layer.name})", "export it as kohya")
        if layer.magnitude is not None and layer.component in TEXT_ENCODERS:
            wrong = f"diffusers drops DoRA's magnitudes in the {layer.component}"
            raise InputError("export", wrong, "export it as peft")
    require_one_kind(layers)
    tensors: dict[str, Tensor] = {}
    for layer in folded(layers):
        tensors[f"{layer.name}.lora_A.weight"] = layer.down
        tensors[f"{layer.name}.lora_B.weight"] = layer.up
        if layer.magnitude is not None:
            tensors[f"{layer.name}.lora_magnitude_vector"] = layer.magnitude
    file = out if out.suffix == ".safetensors" else out / LORA_FILE
    return {file: Stored(tensors, {"format": "pt", **header})}


def require_one_kind(layers: list[Layer]) -> None:
    """Raise InputError for a component of which a part is DoRA: loaders switch it on for all or for none."""
    for component in {layer.component for layer in layers}:
        kinds = {layer.magnitude is None for layer in layers if layer.component == component}
        if len(kinds) > 1:
            wrong = f"some layers of {component or 'the model'} have magnitudes and some have none"
            raise InputError("export", wrong, "train all of them as DoRA, or none")
