"""Files for other tools: adapters as plain LoRA, in the layouts of diffusers, kohya and PEFT."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .adapter import Adapter
from .errors import InputError, near
from .formats import Layer, store, written
from .formats.lora import neutral_path
from .io import read
from .measure import certificate
from .site import qualified
from .squeeze import Squeezed, squeeze

# Components of SD 1.x/2.x by class name, for adapters on a bare module.
_COMPONENT_OF = {"UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder"}
_COMPONENTS = ("unet", "text_encoder")
FORMATS = ("diffusers", "kohya", "peft")
CERTIFICATE = "vislora.certificate"


def export(adapter: Adapter, folder: Path, format: str, rank: int | None = None) -> Path:
    """Write `adapter` at strength 1 for other tools and return the file, of PEFT's the folder.

    folder: or, but for PEFT, the .safetensors file.
    format: "diffusers" or "kohya", read by `pipe.load_lora_weights` for SD 1.x and 2.x; "peft", read by
    `PeftModel.from_pretrained` for any model, in `folder` or, where components have names, in `folder`/<component>.
    rank: squeeze every update to this rank, if it has a larger one; None loses nothing (see `vislora.squeeze`).
    The whole scale is folded into the factors and a component has one rank, so that every reader's default
    (alpha = rank) is right; the header carries the measured certificate under a key that other tools ignore, with the
    norm that `rank` cost. What stands under the files' names is replaced.
    Raises InputError for a format, a rank, a component or a method that the file cannot hold.
    """
    check_exportable(adapter, format)
    squeezed = squeeze(adapter, rank)
    header = {CERTIFICATE: json.dumps(certificate(adapter, squeezed))}
    layers = _layers(adapter, squeezed, format)
    if format != "peft":
        files = written([layer for own in layers.values() for layer in own], format, header, folder)
        store(files)
        return next(iter(files))
    files = {}
    for component, own in layers.items():
        parts = written(own, format, header, folder / component)
        with adapter.hidden():
            root = adapter.roots[component]
            files |= {file: replace(part, config=_exact(part.config, root)) for file, part in parts.items()}
    store(files)
    return folder


def _layers(adapter: Adapter, squeezed: Squeezed, format: str) -> dict[str, list[Layer]]:
    """{component: its layers}. PEFT's keys are the model's own names, without a component."""
    layers: dict[str, list[Layer]] = {}
    for component, part in adapter.parts.items():
        named = "" if format == "peft" else component_name(component, adapter.roots[component], format)
        layers[component] = []
        for site in part.sites:
            update = squeezed.updates[qualified(component, site.name)]
            up, down = (factor.float().cpu() for factor in update.factors())
            magnitude = None if update.magnitude is None else update.magnitude.float().cpu()
            layers[component].append(Layer(named, neutral_path(named, site.path), up, down, magnitude=magnitude))
    return layers


def _exact(config: dict[str, Any], root: nn.Module) -> dict[str, Any]:
    """PEFT's configuration, naming its modules by a pattern where PEFT would take others of `root` for them by their
    ends."""
    names = config["target_modules"]
    ends, own = tuple(f".{name}" for name in names), set(names)
    if not any(name.endswith(ends) and name not in own for name, _ in root.named_modules()):
        return config
    return {**config, "target_modules": "|".join(re.escape(name) for name in names)}


def read_certificate(file: Path) -> dict[str, Any]:
    """What `export` stated in its file's header: `vislora.measure.certificate` of what the file holds.

    Raises InputError for a file that has none.
    """
    _, header = read(file)
    if CERTIFICATE not in header:
        raise InputError(str(file), "holds no certificate", "give a file that adapter.export wrote")
    return json.loads(header[CERTIFICATE])


def component_name(component: str, root: nn.Module, format: str = "diffusers") -> str:
    """A component's folder or prefix in the layouts of SD 1.x; a bare module's goes by its class.

    Raises InputError for one that has no place there.
    """
    kind = type(root).__name__
    name = component or _COMPONENT_OF.get(kind, kind)
    if name not in _COMPONENTS:
        raise InputError("export", f"the {format} layout has no place for {name}", "export it as peft, or adapter.save")
    return name


def check_exportable(adapter: Adapter, format: str = "diffusers") -> None:
    """Raise InputError if the layout cannot hold this adapter; cheap, so it can run before training."""
    if format not in FORMATS:
        raise InputError("format", f"{format!r} is not written{near(format, FORMATS)}", f"take {', '.join(FORMATS)}")
    has_magnitudes = "magnitude" in adapter.method.roles.values()
    for component, part in adapter.parts.items():
        prefix = component if format == "peft" else component_name(component, adapter.roots[component], format)
        if any(site.rows is not None for site in part.sites):
            wrong = f"slices of a fused matrix have no place in the {format} layout"
            raise InputError("export", wrong, "use adapter.save")
        if format == "diffusers" and prefix != "unet" and has_magnitudes:
            wrong = f"diffusers drops {adapter.method_name}'s magnitudes in the {prefix}"
            raise InputError("export", wrong, "export it as peft, adapt the UNet alone, or take another adapter")
        if format == "kohya" and has_magnitudes:
            wrong = f"readers of kohya's files drop {adapter.method_name}'s magnitudes or read them otherwise"
            raise InputError("export", wrong, "export it as diffusers or peft, or take another adapter")
