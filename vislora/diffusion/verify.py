"""Does an exported file do in stock diffusers what the adapter does here? Asked at the end of every run."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vislora.baselines.full import FullHandle
from vislora.distributed import is_sharded
from vislora.errors import EnvironmentFault
from vislora.export import component_name, squeezed_for
from vislora.handle import Handle
from vislora.io import LORA_FILE
from vislora.site import Site
from vislora.tap import base_weight
from vislora.update import Update

_NAME = "vislora_check"
log = logging.getLogger("vislora")


@torch.no_grad()
def exported_error(
    pipeline, adapter: Handle, folder: Path, tolerance: float = 1e-3, rank: int | None = None
) -> float | None:
    """The error of what `adapter.export(folder, rank=rank)` wrote as stock tools read it.

    None where it wrote nothing, or DoRA's magnitudes for weights in shards, of which PEFT's layers would take norms.

    Load folder/pytorch_lora_weights.safetensors by `pipeline.load_lora_weights`, compare, and unload it again.

    The pipeline is the one that `adapter` (on its UNet, perhaps its text encoder) is attached to. Returns the largest
    relative difference, over all modules, between the delta that diffusers applies and the one that was exported, the
    adapter's at strength 1, squeezed to `rank`; both from factors in the precision that diffusers casts the file to.
    Of full fine-tuning each component is read by its library's `from_pretrained`, and every tensor must be equal.
    EnvironmentFault if it exceeds `tolerance`, or if diffusers skipped a module.
    """
    if isinstance(adapter, FullHandle):
        return max(_component_error(root, folder / component_name(c, root)) for c, root in adapter.roots.items())
    if not (folder / LORA_FILE).is_file():
        return None
    updates = squeezed_for(adapter, "diffusers", rank).updates
    sites = {name: site for name, site, _, _ in adapter.site_updates()}
    if any(update.magnitude is not None and is_sharded(sites[name].parameter) for name, update in updates.items()):
        return None
    with adapter.disabled(), adapter.hidden(), _quiet_loaders():
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=_NAME)
        try:
            theirs = _loaded_deltas(pipeline, adapter)
        finally:
            pipeline.unload_lora_weights()
    missing = sorted(updates.keys() - theirs.keys())
    file = str(folder / LORA_FILE)
    if missing:
        wrong = f"diffusers did not load {len(missing)} of {len(updates)} modules: {missing[0]}"
        raise EnvironmentFault(file, wrong, "report it; the adapter/ folder is whole")
    errors = []
    for name, update in updates.items():
        delta, dtype = theirs[name]
        errors.append(_difference(_rounded(update, sites[name], dtype).dense(sites[name].weight()), delta))
    worst = max(errors)
    if not all(error <= tolerance for error in errors):
        wrong = f"diffusers applies a delta {worst:.1e} off"
        raise EnvironmentFault(file, wrong, "report it; the adapter/ folder is whole")
    return worst


def _component_error(root: nn.Module, folder: Path) -> float:
    """0 if `from_pretrained` gives back every tensor of `root` bit for bit; EnvironmentFault otherwise."""
    theirs = type(root).from_pretrained(folder, local_files_only=True).state_dict()
    ours = root.state_dict()
    off = [n for n in ours.keys() | theirs.keys() if n not in ours or n not in theirs]
    off += [n for n in ours.keys() & theirs.keys() if not torch.equal(ours[n].cpu(), theirs[n].cpu())]
    if off:
        wrong = f"{len(off)} of {len(ours)} tensors differ when read back: {min(off)}"
        raise EnvironmentFault(str(folder), wrong, "report it; the adapter/ folder is whole")
    return 0.0


def _loaded_deltas(pipeline, adapter: Handle) -> dict[str, tuple[Tensor, torch.dtype]]:
    """{module name as in `Adapter.deltas`: the delta that PEFT's layer applies, float32, and its factors' dtype}."""
    found = {}
    for component, root in adapter.roots.items():
        where = root if component in ("", "unet") else getattr(pipeline, component)
        for name, module in where.named_modules():
            if _NAME not in getattr(module, "lora_A", {}):
                continue
            key = f"{component}.{name}" if component else name
            found[key] = _layer_delta(module), module.lora_A[_NAME].weight.dtype
    return found


def _rounded(update: Update, site: Site, dtype: torch.dtype) -> Update:
    """The update of the exported factors as they are after a cast to `dtype`, in float32."""
    up, down = (factor.to(dtype).float() for factor in update.factors())
    magnitude = None if update.magnitude is None else update.magnitude.to(dtype).float()
    return Update(up, down, magnitude=magnitude).with_row_scale(site.weight())


def _layer_delta(layer: nn.Module) -> Tensor:
    """W_adapted - W of a PEFT LoRA or DoRA layer from the tensors it loaded, float32."""
    up, down = layer.lora_B[_NAME].weight.float(), layer.lora_A[_NAME].weight.float()
    delta = float(layer.scaling[_NAME]) * (up @ down)
    if _NAME not in layer.lora_magnitude_vector:
        return delta
    weight = base_weight(layer.get_base_layer()).float()
    moved = weight + delta
    return layer.lora_magnitude_vector[_NAME].weight.float()[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight


def _difference(a: Tensor, b: Tensor) -> float:
    size = a.norm().item()
    return (a - b).norm().item() / size if size > 1e-12 else (a - b).norm().item()


@contextmanager
def _quiet_loaders():
    """diffusers logs a warning for every component that a file says nothing of, which a UNet's file always does."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
