"""vislora's own files: a method's tensors, "<site>.<tensor>", and its configuration in the header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..adapters import Method, get
from ..adapters.lora import LoRA
from ..attach import shared_tensors
from ..errors import InputError
from ..fit import require_modest
from ..io import _FORMAT as VERSION
from ..io import FILE
from ..site import qualified
from .lora import Layer, LoraFile, Stored, folded, layers_of, neutral_path, require_numbers
from .vocabulary import component_of

HEADER = "vislora"


@dataclass(frozen=True)
class _Place:
    """What a method asks of a site that has no module."""

    name: str
    m: int
    n: int


def recognise(keys: set[str], header: Mapping[str, str]) -> bool:
    return HEADER in header


def read(file: Path, stored: Stored) -> LoraFile:
    """The updates that the method makes of the file's tensors. Raises InputError unless they are exactly its own."""
    config = header_of(file, stored)
    method_name = config["method"]
    try:
        method = get(method_name).from_options(method_name, config["options"])
    except (TypeError, AttributeError, OverflowError) as error:  # text where a number belongs
        raise InputError(str(file), f"has damaged options ({error})", "copy it again") from None
    plain = isinstance(method, LoRA) and set(config["kinds"]) <= {"A", "B", "c"}  # the factors themselves are stored
    sites = {name: _split(name, config["components"]) for name in config["shapes"]}
    if len({(component, neutral_path(component, path)) for component, path in sites.values()}) != len(sites):
        raise InputError(str(file), "names a layer twice", "copy it again")
    wanted = {f"{name}.{key}" for name in sites for key in config["kinds"]}
    odd = sorted(wanted ^ stored.tensors.keys())
    if odd:
        side = "is missing" if odd[0] in wanted else "belongs to no layer"
        wrong = f"{odd[0]} {side}, and so for {len(odd)} tensors"
        raise InputError(str(file), wrong, "train or copy it again")
    require_numbers(file, stored.tensors)
    places: dict[str, tuple[None, list[_Place]]] = {}
    for name, (component, path) in sites.items():
        places.setdefault(component, (None, []))[1].append(_Place(path, *config["shapes"][name]))
    require_modest(method, config["shapes"], file)
    shared = shared_tensors(method, places, config["seed"])
    if plain:
        found = {
            (component, neutral_path(component, path)): {
                "down": f"{name}.A", "up": f"{name}.B", **({"magnitude": f"{name}.c"} if "c" in config["kinds"] else {})
            }
            for name, (component, path) in sites.items()
        }  # fmt: skip
        layers = layers_of(file, stored, found, lambda names, rank, alpha: method.scale)
    else:
        layers = [_made(file, method, shared, config, stored, name, *names) for name, names in sites.items()]
    for layer, (m, n) in zip(layers, config["shapes"].values(), strict=True):
        if layer.shape != (m, n):
            wrong = f"{layer.name} is {layer.shape[0]} x {layer.shape[1]} by its tensors, {m} x {n} by the header"
            raise InputError(str(file), wrong, "train or copy it again")
        if plain and (layer.rank > method.rank or (layer.rank < method.rank and method.scale != 1)):
            wrong = f"{layer.name} has rank {layer.rank} and the header says {method.rank}, which its scale depends on"
            raise InputError(str(file), wrong, "copy it again")
    layers = [_kernel(file, la, config["kernels"].get(name)) for la, name in zip(layers, sites, strict=True)]
    stated = ", ".join(f"{k} {v}" for k, v in method.options().items() if v is not None)
    bounds = {}
    for layer, name in zip(layers, sites, strict=True):
        bound = method.bound(SimpleNamespace(**{key: stored.tensors[f"{name}.{key}"] for key in config["kinds"]}))
        if bound is not None:
            bounds[layer.name] = (bound.p, bound.delta.item())
    return LoraFile(file, "vislora", layers, {"": stored}, f"{method_name}: {stated}", bounds)


def _kernel(file: Path, layer: Layer, kernel: list[int] | None) -> Layer:
    """A convolution's layer in the shapes that other layouts store."""
    if kernel is None:
        return layer
    if math.prod(kernel) != layer.shape[1]:
        wrong = f"{layer.name} has {layer.shape[1]} inputs and the header's kernel {kernel}"
        raise InputError(str(file), wrong, "copy it again")
    ones = [1] * (len(kernel) - 1)
    up, down = layer.up.reshape(*layer.up.shape, *ones), layer.down.reshape(-1, *kernel)
    return replace(layer, up=up, down=down, keys=None)


@torch.no_grad()
def _made(
    file: Path, method: Method, shared: dict, config: dict, stored: Stored, name: str, component: str, path: str
) -> Layer:
    tensors = {key: stored.tensors[f"{name}.{key}"] for key in config["kinds"]}
    place = _Place(path, *config["shapes"][name])
    try:
        update = method.factors(SimpleNamespace(**method.share_of(shared, place), **tensors))
        up, down = update.factors()
        down = down.to(up.dtype)
    except (RuntimeError, IndexError, AttributeError, TypeError) as error:
        raise InputError(str(file), f"the tensors of {name} make no update ({error})", "copy it again") from None
    return Layer(component, neutral_path(component, path), up, down, magnitude=update.magnitude)


def header_of(file: Path, stored: Stored) -> dict[str, Any]:
    """The configuration in the header, its parts by plain names. Raises InputError for a damaged or a newer one."""
    try:
        config = json.loads(stored.header[HEADER])
        if config["format"] != VERSION:
            wrong = f"is of format {config['format']}, this vislora reads {VERSION}"
            raise InputError(str(file), wrong, "update vislora")
        out = {
            "method": str(config["method"]),
            "options": dict(config["options"]),
            "components": [str(component) for component in config["components"]],
            "shapes": {str(name): (int(m), int(n)) for name, (m, n) in config["base"]["shapes"].items()},
            "norms": {str(name): float(norm) for name, norm in config["base"]["norms"].items()},
            "kinds": [str(kind) for kind in config["tensors"].keys()],
            "kernels": {str(name): [int(k) for k in kernel] for name, kernel in config.get("kernels", {}).items()},
            "seed": int(config.get("seed", 0)),
        }
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(str(file), f"has a damaged header ({error!r})", "copy it again") from None
    if any(side < 1 for shape in out["shapes"].values() for side in shape):
        raise InputError(str(file), "has a damaged header (a side below 1)", "copy it again")
    if not out["shapes"]:
        raise InputError(str(file), "adapts no layer", "train or copy it again")
    return out


def _split(name: str, components: list[str]) -> tuple[str, str]:
    head, _, rest = name.partition(".")
    if head in components:
        return head, rest
    return ("unet" if component_of(name) == "unet" else "", name)


def site_name(layer: Layer) -> str:
    """The site's name in models as transformers 5.6 and later build them: CLIPTextModel has no text_model."""
    path = layer.path.removeprefix("text_model.") if layer.component == "text_encoder" else layer.path
    return qualified(layer.component, path)


def parts(layers: list[Layer], header: Mapping[str, str], out: Path) -> dict[Path, Stored]:
    """What to write for `layers` as our method `lora`. Raises InputError for what it does not adapt."""
    if any(layer.magnitude is not None for layer in layers):
        raise InputError("export", "our lora holds no magnitudes", "export it as diffusers or peft")
    rank = max(layer.rank for layer in layers)
    tensors = {}
    for layer in folded(layers):
        tensors[f"{site_name(layer)}.A"] = layer.down.flatten(1)
        tensors[f"{site_name(layer)}.B"] = layer.up.flatten(1)
    old = json.loads(header[HEADER])["base"]["norms"] if HEADER in header else {}
    norms = {site_name(layer): old[site_name(layer)] for layer in layers if site_name(layer) in old}
    return stored_as(LoRA(rank=rank), "lora", {"A": True, "B": True}, layers, tensors, norms, header, out)


def stored_as(
    method: Method,
    method_name: str,
    kinds: dict[str, bool],
    layers: list[Layer],
    tensors: dict[str, Tensor],
    norms: dict[str, float],
    header: Mapping[str, str],
    out: Path,
) -> dict[Path, Stored]:
    """Our own file of a method's tensors, as `vislora.load` reads it.

    kinds: {tensor name: whether it trains}. norms: {site: Frobenius norm of its base weight}, by which the base is
    recognised; {} lets any base of fitting shapes pass.
    """
    config = {
        "format": VERSION,
        "method": method_name,
        "options": method.options(),
        "seed": 0,
        "components": list(dict.fromkeys(layer.component for layer in layers)),
        "tensors": kinds,
        "kernels": {site_name(la): list(la.down.shape[1:]) for la in layers if la.down.dim() > 2},
        "base": {"classes": {}, "shapes": {site_name(la): list(la.shape) for la in layers}, "norms": norms},
    }
    kept = {key: text for key, text in header.items() if key != HEADER}
    file = out if out.suffix == ".safetensors" else out / FILE
    return {file: Stored(tensors, {"format": "pt", **kept, HEADER: json.dumps(config)})}
