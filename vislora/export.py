"""Files for other tools: adapters as plain LoRA, in the layouts of diffusers, kohya and PEFT."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import linalg
from .adapter import Adapter
from .distributed import class_name
from .errors import InputError, near
from .formats import Layer, store, written
from .formats.family import ARCHITECTURE, FAMILIES, PREDICTION, of_models
from .formats.kohya import NO_MAGNITUDES, SGM
from .formats.lora import COMPONENTS, TEXT_ENCODERS, neutral_path
from .handle import Handle
from .io import read
from .measure import certificate
from .part import Part
from .site import Site, qualified
from .squeeze import Squeezed, squeeze
from .tap import base_weight
from .update import Update

log = logging.getLogger("vislora")
# Components by class name, for adapters on a bare module; an encoder with a projection may be SDXL's second or SD3's
# first.
_COMPONENT_OF = {
    "UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder", "SD3Transformer2DModel": "transformer",
    "FluxTransformer2DModel": "transformer",
}  # fmt: skip
FORMATS = ("diffusers", "kohya", "peft")
CERTIFICATE = "vislora.certificate"


def export(
    adapter: Adapter, folder: Path, format: str, rank: int | None = None, words: Mapping[str, str] | None = None
) -> Path:
    """Write `adapter` at strength 1 for other tools and return the file, of PEFT's the folder.

    folder: or, but for PEFT, the .safetensors file.
    format: "diffusers", read by `pipe.load_lora_weights` for SD 1.x, 2.x, XL, 3 and Flux; "kohya", read by ComfyUI,
    A1111 and, but for SD 3, by diffusers; "peft", read by `PeftModel.from_pretrained` for any model, in `folder` or,
    where components have names, in `folder`/<component>.
    rank: squeeze every update to this rank, if it has a larger one; None loses nothing (see `vislora.squeeze`). Updates
    of row blocks (q and v of a fused qkv) are squeezed one by one and become one of the whole matrix, of their ranks'
    sum, which PEFT's layout alone has a place for. DoRA's
    magnitudes stay beside it in PEFT's layout and in diffusers' of a denoiser; elsewhere the whole change of the weight
    is squeezed, and without a rank it is refused.
    words: entries for the header, such as modelspec.title.
    The whole scale is folded into the factors and a component has one rank, so that every reader's default
    (alpha = rank) is right; the header carries the measured certificate under a key that other tools ignore, with the
    norm that `rank` cost. What stands under the files' names is replaced.
    Raises InputError for a format, a rank, a component or a method that the file cannot hold.
    """
    check_exportable(adapter, format, rank)
    squeezed = squeezed_for(adapter, format, rank)
    stated = _of_weights(certificate(adapter, squeezed), adapter, squeezed)
    header = {**(words or {}), CERTIFICATE: json.dumps(stated), **_model_words(adapter, format)}
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


def kohya_copy(
    handle: Handle, folder: Path, rank: int | None = None, prediction_type: str | None = None
) -> Path | None:
    """Write `folder`/lora.safetensors for ComfyUI and A1111 beside a diffusers export, and return it.

    None, and one logged line that says why, where that layout cannot hold what was trained. prediction_type: the
    scheduler's, for the header. A folder's pytorch_lora_weights.safetensors stays what diffusers loads of it.
    """
    words = {PREDICTION: {"v_prediction": "v"}.get(prediction_type, prediction_type)} if prediction_type else {}
    try:
        if not isinstance(handle, Adapter):
            return handle.export(folder, "kohya", rank)
        return export(handle, folder, "kohya", rank, words)
    except InputError as error:
        log.info("no kohya copy is written: %s", error)
        return None


def _model_words(adapter: Adapter, format: str) -> dict[str, str]:
    """What the models at hand say of their family."""
    family = of_models(adapter.roots)
    words = {} if family is None else {ARCHITECTURE: f"{FAMILIES[family].architecture}/lora"}
    layers = {getattr(getattr(root, "config", None), "layers_per_block", 2) for root in adapter.roots.values()}
    # The original names count blocks by two layers each, as all that were released have.
    return words | ({SGM: "no"} if format == "kohya" and layers != {2} else {})


def squeezed_for(adapter: Adapter, format: str, rank: int | None) -> Squeezed:
    """The updates as a layout's file holds them: at their rank, magnitudes folded in where it has no place for them."""
    return squeeze(adapter, rank, _without_magnitudes(adapter, format))


def _without_magnitudes(adapter: Adapter, format: str) -> list[str]:
    """Components whose magnitudes a layout cannot hold."""
    if format == "peft" or "magnitude" not in adapter.method.roles.values():
        return []
    named = {c: component_name(c, root, format) for c, root in adapter.roots.items()}
    return [c for c, name in named.items() if format == "kohya" or name in TEXT_ENCODERS]


def _layers(adapter: Adapter, squeezed: Squeezed, format: str) -> dict[str, list[Layer]]:
    """{component: its layers}. PEFT's keys are the model's own names, without a component."""
    layers: dict[str, list[Layer]] = {}
    for component, part in adapter.parts.items():
        named = "" if format == "peft" else component_name(component, adapter.roots[component], format)
        layers[component] = []
        for blocks in _by_weight(component, part, squeezed):
            site = blocks[0][0]
            up, down, magnitude = _whole(blocks)
            if len(site.shape) == 4:
                up, down = up[:, :, None, None], down.reshape(-1, *site.shape[1:])
                magnitude = None if magnitude is None else magnitude[None, :, None, None]
            layers[component].append(Layer(named, neutral_path(named, site.path), up, down, magnitude=magnitude))
    return layers


def _by_weight(component: str, part: Part, squeezed: Squeezed) -> Iterable[list[tuple[Site, Update]]]:
    """The updates of each weight of a part: one of it all, or one for each block of its rows."""
    weights: dict[Any, list[tuple[Site, Update]]] = {}
    for site in part.sites:
        weights.setdefault(site.key, []).append((site, squeezed.updates[qualified(component, site.name)]))
    return weights.values()


def _of_weights(stated: dict[str, Any], adapter: Adapter, squeezed: Squeezed) -> dict[str, Any]:
    """A certificate whose entries are of whole weights, as the file's layers are, where updates are of row blocks.

    Blocks with bounds b on their Schatten p-norms make an update of norm (sum b^e)^(1/e) at most, e = min(p, 2): for p
    up to 2 traces of powers p / 2 of the Gram matrices add up at most, for larger p their Schatten (p / 2)-norms.
    """
    modules: dict[str, Any] = stated["modules"]
    for component, part in adapter.parts.items():
        for blocks in _by_weight(component, part, squeezed):
            first = blocks[0][0]
            if first.rows is None:
                continue
            own = [modules.pop(qualified(component, site.name)) for site, _ in blocks]
            p, bounds = float(own[0]["p"]), [entry["bound"] for entry in own]
            up, down, magnitude = _whole(blocks)
            if magnitude is None:
                values = linalg.product_singular_values(up, down)
            else:
                weight = base_weight(*first.key).float().cpu()
                change = Update(up, down, magnitude=magnitude).with_row_scale(weight).dense(weight)
                values = torch.linalg.svdvals(change)
            power = min(p, 2.0)
            modules[qualified(component, first.path)] = {
                "p": own[0]["p"], "norm": linalg.schatten(values, p).item(), "spectral": values.max().item(),
                "bound": None if None in bounds else sum(b**power for b in bounds) ** (1 / power),
                "lost": max(entry["lost"] for entry in own),
            }  # fmt: skip
    shares = [entry["norm"] / entry["bound"] for entry in modules.values() if entry["bound"]]
    largest = {f"largest_{key}": max((m[key] for m in modules.values()), default=0.0) for key in ("norm", "spectral")}
    return {**stated, **largest, "largest_share": max(shares) if shares else None}


def _whole(blocks: list[tuple[Site, Update]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """up (m, r), down (r, n) and magnitude (m,) of a whole weight, of the updates of it or of blocks of its rows.

    Blocks stand one below the other in `up` and share no column, so r is the sum of their ranks.
    """
    first, update = blocks[0]
    ups, downs = zip(*((factor.float().cpu() for factor in update.factors()) for _, update in blocks), strict=True)
    if first.rows is None:
        return ups[0], downs[0], None if update.magnitude is None else update.magnitude.float().cpu()
    up, at = torch.zeros(first.shape[0], sum(part.shape[1] for part in ups)), 0
    for (site, _), part in zip(blocks, ups, strict=True):
        up[site.rows, at : at + part.shape[1]] = part
        at += part.shape[1]
    if update.magnitude is None:
        return up, torch.cat(downs), None
    magnitude = torch.linalg.vector_norm(base_weight(*first.key).float().cpu(), dim=1)
    for site, own in blocks:
        magnitude[site.rows] = own.magnitude.float().cpu()
    return up, torch.cat(downs), magnitude


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
    """A component's folder or prefix in the layouts of pipelines; a bare module's goes by its class.

    Raises InputError for one that has no place there.
    """
    kind = class_name(root)
    name = component or _COMPONENT_OF.get(kind, kind)
    if name not in COMPONENTS or (format == "diffusers" and kind == "T5EncoderModel"):
        raise InputError("export", f"the {format} layout has no place for {name}", "export it as peft, or adapter.save")
    return name


def check_exportable(adapter: Adapter, format: str = "diffusers", rank: int | None = None) -> None:
    """Raise InputError if the layout cannot hold this adapter at that rank; cheap, so it can run before training."""
    if format not in FORMATS:
        raise InputError("format", f"{format!r} is not written{near(format, FORMATS)}", f"take {', '.join(FORMATS)}")
    for component, part in adapter.parts.items():
        if format != "peft":
            component_name(component, adapter.roots[component], format)
        for site in part.sites:
            if site.rows is not None and (format != "peft" or site.tensor != "weight"):
                wrong = f"slices of a fused matrix have no place in the {format} layout"
                raise InputError("export", wrong, "use adapter.save")
            if site.tensor != "weight" or len(site.shape) not in (2, 4) or getattr(site.module, "groups", 1) > 1:
                wrong = f"{site.name} of a {type(site.module).__name__} has no place in the {format} layout"
                raise InputError("export", wrong, "use adapter.save, or leave that layer out")
    lacking = _without_magnitudes(adapter, format)
    if lacking and rank is None:
        if format == "kohya":
            wrong = f"readers of kohya's files drop {adapter.method_name}'s magnitudes or read them otherwise"
            raise InputError("export", wrong, NO_MAGNITUDES)
        wrong = f"diffusers drops {adapter.method_name}'s magnitudes in the {lacking[0] or 'text_encoder'}"
        raise InputError("export", wrong, "export it as peft, adapt the denoiser alone, or give a rank to fold it into")
