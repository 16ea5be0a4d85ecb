"""LoRA files of other tools as adapters: the layers that `vislora.formats` reads, put onto a model's modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .adapters import get
from .attach import build, components
from .errors import InputError
from .fit import place
from .formats import Layer, LoraFile, Stored, parse
from .formats.lora import TEXT_ENCODERS, neutral_path
from .formats.vocabulary import known
from .io import require_all
from .layer import CONVOLUTIONS
from .site import Site, find_named


class _Modules:
    """The names that a kohya file's may stand for: those of the model at hand, and of Stable Diffusion's modules."""

    def __init__(self, parts: dict[str, nn.Module]):
        self._parts = parts
        self.label = f"{', '.join(type(root).__name__ for root in parts.values())} or of SD 1.x, 2.x and XL"

    def paths(self, component: str) -> list[str]:
        """Neutral paths of the modules that the component may have, each once."""
        root = self._parts.get(component, self._parts.get("", nn.Module()))
        own = [name for name, module in root.named_modules() if isinstance(module, (nn.Linear, *CONVOLUTIONS))]
        usual = [path for paths in known(component).values() for path in paths]
        return list(dict.fromkeys([neutral_path(component, path) for path in own] + usual))


def load(model: Any, file: Path, stored: Stored, name: str) -> Adapter:
    """Attach what a diffusers or kohya file holds to `model`, as method `lora`, or `dora` where it has magnitudes.

    Raises InputError, the model untouched, unless every layer has its linear in the model, of its shape.
    """
    parts = components(model)
    lora = parse(file, stored, _Modules(parts))
    method_name = "dora" if _is_dora(lora) else "lora"
    found: dict[str, tuple[nn.Module, list[Site]]] = {}
    values: dict[str, list[dict[str, Tensor]]] = {}
    prefixes = sorted({layer.component for layer in lora.layers})
    for prefix, (component, root) in place(parts, prefixes, lambda root: True, file).items():
        layers = {_own_path(root, layer): layer for layer in lora.layers if layer.component == prefix}
        sites = find_named(root, layers)
        require_all(list(layers), sites, root, file)
        found[component] = (root, sites)
        values[component] = [_tensors(layers[site.name], site, file) for site in sites]
    return build(name, method_name, get(method_name)(rank=max(la.rank for la in lora.layers)), found, values, seed=0)


def _is_dora(file: LoraFile) -> bool:
    """Raises InputError for a file of which a part is DoRA."""
    without = [layer.name for layer in file.layers if layer.magnitude is None]
    if 0 < len(without) < len(file.layers):
        wrong = f"{len(without)} of its {len(file.layers)} layers have no magnitude and the others have: {without[0]}"
        raise InputError(str(file.path), wrong, "copy it again, or give a file that is DoRA or LoRA throughout")
    return not without


def _own_path(root: nn.Module, layer: Layer) -> str:
    """The module's path in the model: transformers 5.6 took `text_model` out of CLIPTextModel, files keep it."""
    flat = layer.component in TEXT_ENCODERS and "text_model" not in root._modules
    return layer.path.removeprefix("text_model.") if flat else layer.path


def _tensors(layer: Layer, site: Site, file: Path) -> dict[str, Tensor]:
    """The method's tensors for a site, the file's scale folded into B."""
    kernel = tuple(layer.down.shape[1:])
    pointwise = set(kernel[1:]) | set(site.shape[2:]) <= {1}  # of a linear as of a convolution
    if layer.shape != (site.m, site.n) or (kernel != site.shape[1:] and not pointwise):
        wrong = f"{site.name} is {(layer.shape[0], *kernel)} in the file, {site.shape} in the model"
        raise InputError(str(file), wrong, "load it into the model it was trained on")
    if getattr(site.module, "groups", 1) > 1:
        raise InputError(str(file), f"{site.name} is a convolution in groups", "use a LoRA without that layer")
    up, down = layer.factors(torch.float32)
    tensors = {"A": down, "B": up}
    if layer.magnitude is not None:
        tensors["c"] = layer.magnitude.float().flatten()
    return {key: nn.Parameter(tensor) for key, tensor in tensors.items()}
