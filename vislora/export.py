"""Files for other tools: adapters as plain LoRA in the layout that stock diffusers reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .adapters import get
from .attach import build, components
from .errors import InputError
from .fit import place
from .io import LORA_FILE, read, write
from .measure import certificate
from .site import find_named, qualified
from .squeeze import squeeze

# Components of SD 1.x/2.x by class name, for adapters on a bare module.
_COMPONENT_OF = {"UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder"}
_COMPONENTS = ("unet", "text_encoder")
_KEY = re.compile(
    r"(?P<component>unet|text_encoder)\.(?P<path>.+)\."
    r"(?P<kind>lora_A\.weight|lora_B\.weight|lora\.down\.weight|lora\.up\.weight|lora_magnitude_vector)"
)
_KINDS = {
    "lora_A.weight": "A", "lora.down.weight": "A", "lora_B.weight": "B", "lora.up.weight": "B",
    "lora_magnitude_vector": "c",
}  # fmt: skip
CERTIFICATE = "vislora.certificate"


def export(adapter: Adapter, folder: Path, format: str, rank: int | None = None) -> Path:
    """Write `adapter` at strength 1 for other tools and return the file.

    format: "diffusers", read by `pipe.load_lora_weights(folder)` for SD 1.x and 2.x.
    rank: squeeze every update to this rank, if it has a larger one; None loses nothing (see `vislora.squeeze`).
    The whole scale is folded into the factors, so that every reader's default (alpha = rank) is right; the header
    carries the measured certificate under a key that other tools ignore, with the norm that `rank` cost.
    Raises InputError for a format, a rank, a component or a method that the file cannot hold.
    """
    if format != "diffusers":
        raise InputError("format", f"{format!r} is not written", "take diffusers")
    check_exportable(adapter)
    squeezed = squeeze(adapter, rank)
    tensors: dict[str, Tensor] = {}
    for component, part in adapter.parts.items():
        prefix = component_name(component, adapter.roots[component])
        for site in part.sites:
            update = squeezed.updates[qualified(component, site.name)]
            up, down = update.factors()
            key = f"{prefix}.{_written_path(prefix, site.path)}"
            # One rank for a whole component: readers guess the scale from a single one.
            tensors[f"{key}.lora_A.weight"] = _padded(down, 0, squeezed.ranks[component])
            tensors[f"{key}.lora_B.weight"] = _padded(up, 1, squeezed.ranks[component])
            if update.magnitude is not None:
                tensors[f"{key}.lora_magnitude_vector"] = update.magnitude.float().cpu().contiguous()
    header = {"format": "pt", CERTIFICATE: json.dumps(certificate(adapter, squeezed))}
    return write(tensors, header, folder / LORA_FILE)


def read_certificate(file: Path) -> dict[str, Any]:
    """What `export` stated in its file's header: `vislora.measure.certificate` of what the file holds.

    Raises InputError for a file that has none.
    """
    _, header = read(file)
    if CERTIFICATE not in header:
        raise InputError(str(file), "holds no certificate", "give a file that adapter.export wrote")
    return json.loads(header[CERTIFICATE])


def component_name(component: str, root: nn.Module) -> str:
    """A component's folder or prefix in diffusers' layout of SD 1.x; a bare module's goes by its class.

    Raises InputError for one that has no place there.
    """
    kind = type(root).__name__
    name = component or _COMPONENT_OF.get(kind, kind)
    if name not in _COMPONENTS:
        raise InputError("export", f"the diffusers layout has no place for {name}", "use adapter.save")
    return name


def check_exportable(adapter: Adapter) -> None:
    """Raise InputError if the diffusers layout cannot hold this adapter; cheap, so it can run before training."""
    for component, part in adapter.parts.items():
        prefix = component_name(component, adapter.roots[component])
        if any(site.rows is not None for site in part.sites):
            wrong = "slices of a fused matrix have no place in the diffusers layout"
            raise InputError("export", wrong, "use adapter.save")
        if prefix != "unet" and "magnitude" in adapter.method.roles.values():
            wrong = f"diffusers drops {adapter.method_name}'s magnitudes in the {prefix}"
            raise InputError("export", wrong, "adapt the UNet alone, or take another adapter")


def _written_path(prefix: str, path: str) -> str:
    """CLIP encoders are written with `text_model.` always: every reader takes it, and some need it."""
    return path if prefix == "unet" or path.startswith("text_model.") else f"text_model.{path}"


def _padded(tensor: Tensor, dim: int, rank: int) -> Tensor:
    tensor = tensor.float().cpu()
    lacking = rank - tensor.shape[dim]
    if lacking:
        shape = list(tensor.shape)
        shape[dim] = lacking
        tensor = torch.cat([tensor, torch.zeros(shape)], dim=dim)
    return tensor.contiguous()


def from_diffusers(model: Any, file: Path, tensors: dict[str, Tensor], header: dict[str, str], name: str) -> Adapter:
    """Attach a LoRA (or, with magnitudes, DoRA) file in the diffusers layout of SD 1.x/2.x to `model`.

    Raises InputError for a key of another layout, a half pair, a layer the model lacks, or a shape that does not fit.
    """
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            wrong = f"{key!r} is no key of the diffusers layout of SD 1.x"
            raise InputError(str(file), wrong, "give a file that pipe.save_lora_weights or vislora wrote")
        layers.setdefault((match["component"], match["path"]), {})[_KINDS[match["kind"]]] = tensor
    scales = _scales(file, header, {component for component, _ in layers})
    magnitudes = ["c" in layer for layer in layers.values()]
    for (component, path), layer in layers.items():
        if not {"A", "B"} <= layer.keys() or ("c" in layer) != magnitudes[0]:
            raise InputError(str(file), f"{component}.{path} has only {sorted(layer)}", "copy it again")
        if layer["A"].dim() != 2 or layer["B"].dim() != 2 or layer["A"].shape[0] != layer["B"].shape[1]:
            shapes = [tuple(layer[k].shape) for k in "AB"]
            raise InputError(str(file), f"{component}.{path} has factors {shapes}", "give a LoRA of linear layers")
    found, values = {}, {}
    prefixes = sorted({component for component, _ in layers})
    for prefix, (component, root) in place(components(model), prefixes, lambda root: True, file).items():
        written = {p: layer for (c, p), layer in layers.items() if c == prefix}
        flat = {_read_path(root, prefix, path): layer for path, layer in written.items()}
        sites = find_named(root, list(flat))
        if len(sites) != len(flat):
            missing = sorted(flat.keys() - {s.name for s in sites})
            wrong = f"{len(missing)} of its {len(flat)} layers are not in {type(root).__name__}: {missing[0]}"
            raise InputError(str(file), wrong, "load it into the model it was trained on")
        found[component], values[component] = (root, sites), []
        for site in sites:
            layer = flat[site.name]
            A, B = layer["A"].float(), layer["B"].float() * scales.get(prefix, 1.0)
            if (B.shape[0], A.shape[1]) != (site.m, site.n) or ("c" in layer and layer["c"].numel() != site.m):
                wrong = f"{site.name} is {(B.shape[0], A.shape[1])} in the file, {(site.m, site.n)} in the model"
                raise InputError(str(file), wrong, "load it into the model it was trained on")
            values[component].append({"A": nn.Parameter(A), "B": nn.Parameter(B)})
            if "c" in layer:
                values[component][-1]["c"] = nn.Parameter(layer["c"].float().flatten())
    method_name = "dora" if magnitudes[0] else "lora"
    rank = max(layer["A"].shape[0] for layer in layers.values())
    return build(name, method_name, get(method_name)(rank=rank), found, values, seed=0)


def _read_path(root: nn.Module, prefix: str, path: str) -> str:
    """transformers 5.6 took `text_model` out of CLIPTextModel; files keep it."""
    flat = prefix != "unet" and "text_model" not in root._modules
    return path.removeprefix("text_model.") if flat else path


def _scales(file: Path, header: dict[str, str], prefixes: set[str]) -> dict[str, float]:
    """{component: alpha / rank} from diffusers' own header; 1 where nothing is stored."""
    text = header.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        stored = dict(json.loads(text))
        out = {}
        for prefix in prefixes:
            if stored.get(f"{prefix}.rank_pattern") or stored.get(f"{prefix}.alpha_pattern"):
                wrong = f"gives the layers of {prefix} ranks or alphas of their own in its header"
                raise InputError(str(file), wrong, "fold them into the weights and save it again")
            rank, alpha = stored.get(f"{prefix}.r"), stored.get(f"{prefix}.lora_alpha")
            if rank and alpha is not None:
                out[prefix] = alpha / (rank**0.5 if stored.get(f"{prefix}.use_rslora") else rank)
        return out
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(file), f"has a damaged lora_adapter_metadata ({error})", "save it again") from None
