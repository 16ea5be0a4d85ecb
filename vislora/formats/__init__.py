"""LoRA files of four layouts read into one description, and written from it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .. import io
from ..errors import EnvironmentFault, InputError, VisloraError
from ..linalg import product_singular_values
from . import diffusers, kohya, ours, peft
from .base import Base
from .disk import write_bytes
from .family import ARCHITECTURE, FAMILIES, family_of
from .lora import Layer, LoraFile, Stored

__all__ = ["FORMATS", "Base", "Layer", "LoraFile", "Stored", "parse", "read", "rewritten", "save", "store", "written"]

FORMATS = {"vislora": ours, "diffusers": diffusers, "kohya": kohya, "peft": peft}
# Adapters that are no LoRA, by a pattern of their keys.
_OTHERS = {
    r"\.hada_": "LoHa", r"\.lokr_": "LoKr", r"\.lora_mid\.": "a LoCon with a middle factor", r"\.oft_": "OFT",
    r"\.boft_": "BOFT", r"\.ia3_|\.on_input$": "IA3", r"\.diff(_b)?$": "a full difference of weights",
    r"\.a1\.weight$": "GLoRA", "vera_lambda": "VeRA", r"\.lora_embedding_": "a LoRA of embeddings",
    r"\.lora_E": "AdaLoRA", "^string_to_param|^emb_params$": "textual inversion",
}  # fmt: skip


def read(path: Path, base: Base | None = None) -> LoraFile:
    """The adapter in a file or folder, whichever layout it has, every tensor checked.

    base: names modules where a layout is ambiguous without it (kohya's).
    Raises InputError, one line, for anything else: another kind of adapter, pickles, damage, halves, NaN.
    """
    if path.is_dir() and peft.recognise(path):
        return peft.read(path)
    if path.name == peft.FILE and peft.recognise(path.parent):
        return peft.read(path.parent)
    file = io.locate(path)
    return parse(file, Stored(*io.read(file)), base)


def parse(file: Path, stored: Stored, base: kohya.Modules | None = None) -> LoraFile:
    """`read` of one file whose tensors and header are in memory."""
    keys = set(stored.tensors)
    if not keys:
        raise InputError(str(file), "holds no tensors", "train or copy it again")
    if ours.recognise(keys, stored.header):
        return ours.read(file, stored)
    for key in sorted(keys):
        for pattern, kind in _OTHERS.items():
            if re.search(pattern, key):
                raise InputError(str(file), f"is {kind}, by its key {key}", "give a LoRA")
    if kohya.recognise(keys, stored.header):
        return kohya.read(file, stored, base)
    if diffusers.recognise(keys, stored.header):
        return diffusers.read(file, stored)
    if any(key.startswith("base_model.model.") for key in keys):
        raise InputError(str(file), f"is PEFT's, without its {peft.CONFIG}", "give the folder that holds both")
    raise InputError(str(file), f"holds no adapter's keys, the first is {min(keys)}", "give a LoRA file")


def written(layers: list[Layer], format: str, header: Mapping[str, str], out: Path) -> dict[Path, Stored]:
    """The files, not yet on disk, that hold `layers` in another layout: scales folded, alpha = rank.

    header: what is kept of it tells SD3 from Flux and so on where the layers do not; the family is written into the new.
    """
    stale = {diffusers.METADATA} | ({ours.HEADER} if format != "vislora" else set())
    kept = {key: text for key, text in header.items() if key not in stale and not key.startswith("ss_")}
    family = family_of(layers, header)
    if family and any(layer.component for layer in layers):
        kept[ARCHITECTURE] = f"{FAMILIES[family].architecture}/lora"
    return FORMATS[format].parts(layers, kept, out)


def rewritten(
    file: LoraFile, changed: Mapping[str, Layer], header: Mapping[str, str], out: Path
) -> dict[Path, Stored]:
    """The files, not yet on disk, of `file` with some layers' factors replaced: all else is kept bit for bit.

    changed: {layer name: the layer with factors of the same rank}. header: entries to add or replace.
    """
    files = {}
    for source, part in file.stored.items():
        tensors: dict[str, Tensor] = dict(part.tensors)
        for layer in changed.values():
            if layer.source == source:
                tensors[layer.keys[0]], tensors[layer.keys[1]] = layer.up, layer.down
        name = peft.FILE if file.format == "peft" else file.path.name
        target = out if out.suffix == ".safetensors" else out / source / name
        files[target] = replace(part, tensors=tensors, header={**part.header, **header})
    return files


def store(files: Mapping[Path, Stored]) -> None:
    """Write what `written` or `rewritten` made, PEFT's configurations beside it; files of these names are replaced."""
    for target, part in files.items():
        io.require_finite(part.tensors, str(target))
    for file, part in files.items():
        io.write({key: t.detach().contiguous() for key, t in part.tensors.items()}, part.header, file)
        if part.config is not None:
            write_bytes(file.parent / peft.CONFIG, (json.dumps(part.config, indent=2) + "\n").encode())


def save(files: Mapping[Path, Stored], layers: list[Layer], base: Base | None = None) -> tuple[Path, float]:
    """Write what `written` or `rewritten` made, read it back and compare it with `layers`.

    Returns the file (of several, their common folder) and the largest relative error. Raises InputError if a file
    exists already, and EnvironmentFault, files removed, for what cannot be written or does not come back.
    """
    beside = [target.parent / peft.CONFIG for target, part in files.items() if part.config is not None]
    for target in [*files, *beside]:
        if target.exists():
            raise InputError(f"-o {target}", "exists already", "choose another name")
    target = next(iter(files)) if len(files) == 1 else Path(os.path.commonpath(list(files)))
    try:
        store(files)
        return target, verify(layers, target, base)
    except VisloraError:
        for file in [*files, *beside]:
            file.unlink(missing_ok=True)
        raise


def verify(layers: list[Layer], target: Path, base: Base | None = None, tolerance: float = 1e-5) -> float:
    """The largest relative error, over layers, of what a written file says when it is read back.

    Raises EnvironmentFault for an error above `tolerance`, or a layer on one side alone.
    """
    again = {layer.name: layer for layer in read(target, base).layers}
    if again.keys() != {layer.name for layer in layers}:
        odd = sorted(again.keys() ^ {layer.name for layer in layers})
        raise EnvironmentFault(str(target), f"{len(odd)} layers did not come back: {odd[0]}", "report this")
    worst = 0.0
    for layer in layers:
        (up, down), (up2, down2) = layer.factors(), again[layer.name].factors()
        off = product_singular_values(torch.cat([up, -up2], 1), torch.cat([down, down2]))
        norm = torch.linalg.vector_norm(product_singular_values(up, down))
        worst = max(worst, (torch.linalg.vector_norm(off) / norm).item() if norm else off.max().item())
    if worst > tolerance:
        raise EnvironmentFault(str(target), f"came back {worst:.1e} off", "report this")
    return worst
