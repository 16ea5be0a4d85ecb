"""A base model's weights, read straight from its safetensors files; no model is built."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError, near
from ..linalg import precise
from .lora import COMPONENTS, Layer, Names, neutral_path

_SLICE = re.compile(r"(?P<path>.+)\[(?P<which>[qkv])\]")  # a third of a fused projection's rows
_FINGERPRINT = 16  # weights
_NORM_TOLERANCE = 0.01  # bf16, fp16 and 4-bit copies of a base pass; another model does not


@dataclass(frozen=True)
class Place:
    """Where a module's weight is stored: the file, the tensor's name in it, the rows of a slice, its type as stored."""

    file: Path
    name: str
    rows: slice | None
    dtype: str

    @property
    def floating(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


class Base:
    """A diffusers folder (a sub-folder for each component), one of transformers, timm or open_clip (weights in it), or
    one safetensors file."""

    def __init__(self, folder: Path):
        """Raises InputError for a folder that holds no safetensors weights."""
        self.folder, self.label = folder, str(folder)
        self.is_file = folder.is_file() and folder.suffix == ".safetensors"
        if not folder.is_dir() and not self.is_file:
            raise InputError(f"--base {folder}", "is no folder", "give a diffusers or transformers model's folder")
        self._files: dict[str, dict[str, tuple[safe_open, str, Path]]] = {}  # by component
        self._alone = self.is_file or bool(list(folder.glob("*.safetensors")))
        if not self._alone and not any((folder / c).is_dir() for c in COMPONENTS):
            wrong = "holds no safetensors weights and no component of a pipeline"
            raise InputError(f"--base {folder}", wrong, "give a model's folder; convert .bin weights first")

    def weight_files(self, components: Iterable[str]) -> list[Path]:
        """The files that hold components' weights. Raises InputError for a missing folder or shard."""
        found: dict[Path, None] = {}
        for component in components:
            folder = self.folder if self._alone or not component else self.folder / component
            if not folder.exists():
                raise InputError(f"--base {self.folder}", f"has no {component}", "give the base it was trained on")
            found |= dict.fromkeys([folder] if self.is_file else _weight_files(folder))
        return list(found)

    def files(self) -> list[Path]:
        """All files of the model."""
        return [self.folder] if self.is_file else [file for file in self.folder.rglob("*") if file.is_file()]

    def _index(self, component: str) -> dict[str, tuple[safe_open, str, Path]]:
        """{neutral tensor name: (opened file, its name there, its path)}. Raises InputError as `weight_files` does."""
        if component not in self._files:
            found: dict[str, tuple[safe_open, str, Path]] = {}
            for file in self.weight_files([component]):
                try:
                    opened = safe_open(file, framework="pt")
                    found |= {neutral_path(component, name): (opened, name, file) for name in opened.keys()}
                except (SafetensorError, OSError) as error:
                    wrong = f"is no whole safetensors file ({error})"
                    raise InputError(str(file), wrong, "fetch the model again") from None
            self._files[component] = found
        return self._files[component]

    def paths(self, component: str) -> list[str]:
        """Paths of the modules that have a weight."""
        return [name.removesuffix(".weight") for name in self._index(component) if name.endswith(".weight")]

    def weight(self, component: str, path: str) -> Tensor:
        """A module's weight as a matrix (m, n), float32 or float64. Raises InputError where the base lacks it."""
        place = self.place(component, path)
        opened, _, _ = self._find(component, path)
        weight = precise(opened.get_tensor(place.name)).flatten(1)
        return weight if place.rows is None else weight[place.rows]

    def place(self, component: str, path: str) -> Place:
        """Where a module's weight is. Raises InputError where the base lacks it."""
        part = _SLICE.fullmatch(path)
        opened, stored, file = self._find(component, path)
        seen = opened.get_slice(stored)
        third = seen.get_shape()[0] // 3
        at = "qkv".index(part["which"]) * third if part else 0
        return Place(file, stored, slice(at, at + third) if part else None, seen.get_dtype())

    def shape(self, component: str, path: str) -> tuple[int, int]:
        """(m, n) of `weight`, without reading it."""
        part = _SLICE.fullmatch(path)
        opened, stored, _ = self._find(component, path)
        m, *rest = opened.get_slice(stored).get_shape()
        return (m // 3 if part else m), math.prod(rest)

    def _find(self, component: str, path: str) -> tuple[safe_open, str, Path]:
        """The opened file that holds a module's weight, the weight's name in it, and the file's path."""
        part, index = _SLICE.fullmatch(path), self._index(component)
        path = part["path"] if part else path
        name = path if path in index else f"{path}.weight"  # raw parameters go by their own names
        if name not in index:
            wrong = f"has no {component + ' ' if component else ''}weight {name}{near(name, index)}"
            remedy = "give the base that the adapter was trained on"
            if self._alone:  # transformers renames the weights of some models as it loads them
                remedy += ", or merge the loaded model: adapter.detach(merge=True), model.save_pretrained"
            raise InputError(f"--base {self.folder}", wrong, remedy)
        return index[name]

    def norms(self, layers: list[Layer]) -> dict[Names, float]:
        """{(component, path): Frobenius norm of the weight} of a few layers, by which the base can be recognised."""
        some = layers[:: max(1, len(layers) // _FINGERPRINT)][:_FINGERPRINT]
        weights = {(layer.component, layer.path): self.weight(layer.component, layer.path) for layer in some}
        return {names: torch.linalg.vector_norm(weight).item() for names, weight in weights.items()}

    def require(self, file: Path, layers: list[Layer], norms: Mapping[Names, float]) -> None:
        """Raise InputError unless every layer's weight has its shape, and weights the norms that the file states.

        norms: {(component, path): Frobenius norm}, a few of them or none.
        """
        for layer in layers:
            (m, n), shape = layer.shape, self.shape(layer.component, layer.path)
            if shape != (m, n):
                wrong = f"{layer.name} is {m} x {n}, the base's weight {shape[0]} x {shape[1]}"
                raise InputError(str(file), wrong, "give the base that it was trained on")
        off = []
        for names, stated in norms.items():
            norm = torch.linalg.vector_norm(self.weight(*names)).item()
            if not abs(norm - stated) <= _NORM_TOLERANCE * stated:
                off.append(f"{'.'.join(filter(None, names))} has norm {norm:.4g}, the adapter's base {stated:.4g}")
        if off:
            wrong = f"was trained on another base ({len(off)} of {len(norms)} weights differ: {off[0]})"
            raise InputError(str(file), wrong, "give that base")


def _weight_files(folder: Path) -> list[Path]:
    """The folder's weight files: those that its index names, or all of full precision, or all."""
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda file: len(file.name))
    if indexes:
        try:
            names = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(str(indexes[0]), f"is damaged ({error!r})", "fetch the model again") from None
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise InputError(str(folder), f"lacks the shard {missing[0]}", "fetch the model again")
        return [folder / name for name in sorted(names)]
    files = sorted(folder.glob("*.safetensors"), key=lambda file: len(file.name))
    if not files:
        raise InputError(str(folder), "holds no safetensors weights", "fetch the model again, or convert its .bin")
    return files[:1]  # variants (".fp16.") bear longer names
