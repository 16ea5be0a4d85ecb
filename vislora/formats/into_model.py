"""Adapters folded into a model's own files: a whole folder that the model's library loads, without building a model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import EnvironmentFault, InputError
from ..io import write
from ..linalg import precise
from ..update import Update
from .base import Base, Place
from .lora import Layer, LoraFile

# Copies of the weights in other forms and precisions, which would not be the merged ones.
_STALE = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", ".tflite"}


@dataclass(frozen=True)
class Merged:
    """What was written.

    weights: how many changed. lost: the largest share of a delta's Frobenius norm that rounding took, in `layer`.
    """

    weights: int
    lost: float
    layer: str


@torch.no_grad()
def merge_into(base: Base, files: list[LoraFile], strengths: list[float], out: Path) -> Merged:
    """Write the base with strength * delta of every adapter added to its weights as `out`: a folder, or a file for a
    base of one file.

    Sums are of float32 or wider and rounded once to each weight's own type. All that is no weight is copied; copies of
    changed weights in other forms and precisions are left out. Raises InputError where `out` exists, for a quantized
    base, and where a DoRA shares a layer with another adapter; nothing is left behind then.
    """
    if out.exists():
        raise InputError(f"-o {out}", "exists already", "choose another name")
    if base.is_file != (out.suffix == ".safetensors"):
        kind = "a file: name OUT.safetensors" if base.is_file else "a folder"
        raise InputError(f"-o {out}", f"does not fit the base {base.label}", f"give {kind}")
    wanted = _by_place(base, files, strengths)
    _require_room(base, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        sources = base.weight_files({layer.component for added in wanted.values() for _, layer, _ in added})
        target = temporary / out.name
        if not base.is_file:
            _copy(base.folder, target, {file.parent for file in sources})
        lost = {}
        for file in sources:
            here = {place.name: wanted[file, place.name] for place in _places(wanted, file)}
            destination = target if base.is_file else target / file.relative_to(base.folder)
            lost |= _rewrite(file, destination, here)
        target.rename(out)
    except OSError as error:
        raise EnvironmentFault(str(out), f"cannot be written ({error})", "free space or choose another") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    worst = max(lost, key=lost.get)
    return Merged(len(wanted), lost[worst], worst)


_Wanted = dict[tuple[Path, str], list[tuple[Place, Layer, float]]]


def _by_place(base: Base, files: list[LoraFile], strengths: list[float]) -> _Wanted:
    """{(weight file, tensor): what is added to it}. Raises InputError for what has no place."""
    wanted: _Wanted = {}
    for file, strength in zip(files, strengths, strict=True):
        for layer in file.layers:
            place = base.place(layer.component, layer.path)
            if not place.floating:
                wrong = f"{layer.name} is quantized there ({place.dtype})"
                raise InputError(base.label, wrong, "give the model in bf16, fp16 or fp32")
            wanted.setdefault((place.file, place.name), []).append((place, layer, strength))
    for added in wanted.values():
        names = [layer.name for _, layer, _ in added]
        if any(layer.magnitude is not None and names.count(layer.name) > 1 for _, layer, _ in added):
            wrong = f"{names[0]} is adapted by DoRA and by another adapter, which do not add up"
            raise InputError("vislora merge", wrong, "merge the DoRA first, and the other into the result")
    return wanted


def _places(wanted: _Wanted, file: Path) -> Iterator[Place]:
    return (added[0][0] for (where, _), added in wanted.items() if where == file)


def _require_room(base: Base, out: Path) -> None:
    size = sum(file.stat().st_size for file in base.files())
    home = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(home).free
    if free < size:
        wrong = f"{size / 1e9:.1f} GB are needed and {free / 1e9:.1f} free"
        raise EnvironmentFault(str(out), wrong, "free space or choose another disk")


def _copy(source: Path, target: Path, changed: set[Path]) -> None:
    """All files of a model's folder but its changed components' weights; links become what they point to."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        weights = [n for n in names if Path(folder) in changed and Path(n).suffix in _STALE]
        return weights + [n for n in names if n.startswith(".")]

    shutil.copytree(source, target, ignore=left_out)
    for index in target.rglob("*.index.json"):
        if source / index.relative_to(target).parent in changed and ".safetensors." not in index.name:
            index.unlink()  # of shards that were left out


def _rewrite(source: Path, target: Path, added: dict[str, list[tuple[Place, Layer, float]]]) -> dict[str, float]:
    """Write one weight file anew; {layer: the share of its delta that rounding took}."""
    tensors, lost = {}, {}
    with safe_open(source, framework="pt") as opened:
        header = opened.metadata() or {"format": "pt"}
        for name in opened.keys():
            tensors[name] = weight = opened.get_tensor(name)
            if name in added:
                tensors[name], share = _sum(weight, added[name])
                lost[added[name][0][1].name] = share
    write(tensors, header, target)
    return lost


def _sum(weight: Tensor, added: list[tuple[Place, Layer, float]]) -> tuple[Tensor, float]:
    wide = precise(weight).flatten(1)
    delta = torch.zeros_like(wide)
    for place, layer, strength in added:
        rows = slice(None) if place.rows is None else place.rows
        delta[rows] += strength * delta_of(layer, wide[rows]).to(wide.dtype)
    new = (wide + delta).view(weight.shape).to(weight.dtype)
    norm = torch.linalg.vector_norm(delta.double())
    off = torch.linalg.vector_norm(precise(new).flatten(1).double() - wide.double() - delta.double())
    return new, (off / norm).item() if norm else 0.0


def delta_of(layer: Layer, weight: Tensor) -> Tensor:
    """What a layer adds to its base weight (m, n): its product, or with magnitudes the rescaled weight's change."""
    up, down = layer.factors()
    if layer.magnitude is None:
        return up @ down
    update = Update(up, down, magnitude=layer.magnitude.flatten().double())
    return update.with_row_scale(weight.double()).dense(weight.double())


@torch.no_grad()
def folded_dora(layer: Layer, weight: Tensor) -> Layer:
    """A DoRA layer as a plain one of full rank and scale 1: the whole change of its base weight (m, n)."""
    U, S, Vh = torch.linalg.svd(delta_of(layer, weight), full_matrices=False)
    root = S.sqrt()
    plain = replace(layer, scale=1.0, magnitude=None, keys=None)
    return plain.with_factors((U * root).float(), (root[:, None] * Vh).float())
