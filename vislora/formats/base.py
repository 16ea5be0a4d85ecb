"""A base model's weights, read straight from its safetensors files; no model is built."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
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


class Base:
    """A diffusers folder (a sub-folder for each component) or a transformers or timm folder (weights in it)."""

    def __init__(self, folder: Path):
        """Raises InputError for a folder that holds no safetensors weights."""
        self.folder, self.label = folder, str(folder)
        if not folder.is_dir():
            raise InputError(f"--base {folder}", "is no folder", "give a diffusers or transformers model's folder")
        self._files: dict[str, dict[str, tuple[safe_open, str]]] = {}  # by component
        self._alone = bool(list(folder.glob("*.safetensors")))
        if not self._alone and not any((folder / c).is_dir() for c in COMPONENTS):
            wrong = "holds no safetensors weights and no component of a pipeline"
            raise InputError(f"--base {folder}", wrong, "give a model's folder; convert .bin weights first")

    def _index(self, component: str) -> dict[str, tuple[safe_open, str]]:
        """{neutral tensor name: (opened file, its name there)}. Raises InputError for a missing folder or shard."""
        if component not in self._files:
            folder = self.folder if self._alone or not component else self.folder / component
            if not folder.is_dir():
                raise InputError(f"--base {self.folder}", f"has no {component}", "give the base it was trained on")
            found: dict[str, tuple[safe_open, str]] = {}
            for file in _weight_files(folder):
                try:
                    opened = safe_open(file, framework="pt")
                    found |= {neutral_path(component, name): (opened, name) for name in opened.keys()}
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
        part = _SLICE.fullmatch(path)
        opened, stored = self._find(component, part["path"] if part else path)
        weight = precise(opened.get_tensor(stored)).flatten(1)
        if part is None:
            return weight
        third = weight.shape[0] // 3
        return weight["qkv".index(part["which"]) * third :][:third]

    def shape(self, component: str, path: str) -> tuple[int, int]:
        """(m, n) of `weight`, without reading it."""
        part = _SLICE.fullmatch(path)
        opened, stored = self._find(component, part["path"] if part else path)
        m, *rest = opened.get_slice(stored).get_shape()
        return (m // 3 if part else m), math.prod(rest)

    def _find(self, component: str, path: str) -> tuple[safe_open, str]:
        """The opened file that holds a module's weight, and the weight's name in it."""
        index = self._index(component)
        name = path if path in index else f"{path}.weight"  # raw parameters go by their own names
        if name not in index:
            wrong = f"has no {component + ' ' if component else ''}weight {name}{near(name, index)}"
            raise InputError(f"--base {self.folder}", wrong, "give the base that the adapter was trained on")
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
