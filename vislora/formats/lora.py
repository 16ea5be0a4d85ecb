"""The neutral description of a LoRA file: layers in the names of diffusers' modules, whatever the file's own keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..linalg import precise

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = ("unet", "transformer", *TEXT_ENCODERS)
Names = tuple[str, str]  # (component, module path)


@dataclass(frozen=True)
class Layer:
    """One module's update: scale * up @ down, for convolutions after flattening both to matrices.

    component: one of COMPONENTS, or "" in a file that names none. path: the module's, in it.
    up: (m, r) or (m, r, 1, 1); down: (r, n) or (r, n, k, k), as stored. magnitude: DoRA's row norms, of m numbers.
    keys: the stored keys of up and down; None where the file holds other tensors that they are made of.
    source: which of the file's stored parts holds them.
    """

    component: str
    path: str
    up: Tensor
    down: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None
    keys: tuple[str, str] | None = None
    source: str = ""

    @property
    def name(self) -> str:
        return f"{self.component}.{self.path}" if self.component else self.path

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the update as a matrix; n counts a convolution's inputs times its taps."""
        return self.up.shape[0], self.down[0].numel()

    def factors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """up (m, r) with the scale folded in, and down (r, n)."""
        return self.up.flatten(1).to(dtype) * self.scale, self.down.flatten(1).to(dtype)

    def with_factors(self, up: Tensor, down: Tensor) -> Layer:
        """The same layer with new factors (m, r), (r, n) in the shapes that its own have; the scale stays."""
        rank = down.shape[0]
        up = up.reshape(self.up.shape[0], rank, *self.up.shape[2:])
        return replace(self, up=up, down=down.reshape(rank, *self.down.shape[1:]))


@dataclass(frozen=True)
class Stored:
    """One safetensors file as it stands: tensors, header, and for PEFT the configuration beside it."""

    tensors: dict[str, Tensor]
    header: dict[str, str]
    config: dict | None = None


@dataclass(frozen=True)
class LoraFile:
    """A file, or a folder of files, read and checked. `about`: what the format says of it, for people.

    bounds: {layer name: (p, delta)} that the file's method keeps by construction; {} for most.
    """

    path: Path
    format: str
    layers: list[Layer]
    stored: dict[str, Stored] = field(default_factory=dict)
    about: str = ""
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def header(self) -> dict[str, str]:
        """The header of the first stored part; {} for a file that is yet to be written."""
        return next((part.header for part in self.stored.values()), {})

    @property
    def has_magnitudes(self) -> bool:
        return any(layer.magnitude is not None for layer in self.layers)


def neutral_path(component: str, path: str) -> str:
    """CLIP encoders' paths with the leading `text_model` that transformers 5.6 took out of CLIPTextModel."""
    bare = component in TEXT_ENCODERS and path.startswith(("encoder.layers.", "embeddings."))
    return f"text_model.{path}" if bare else path


def split_component(name: str) -> Names:
    """(component, neutral path) of a name that may be led by a component."""
    head, _, rest = name.partition(".")
    return (head, neutral_path(head, rest)) if head in COMPONENTS else ("", name)


def layers_of(
    file: Path,
    stored: Stored,
    found: Mapping[Names, Mapping[str, str]],
    scale: Callable[[Names, int, float | None], float],
    source: str = "",
) -> list[Layer]:
    """Layers from {names: {"up" | "down" | "magnitude" | "alpha": key}}, checked.

    scale(names, rank, alpha): the layer's factor; alpha is None where no tensor says it.
    Raises InputError for half pairs, whole numbers, NaN, and factors that make no matrix.
    """
    lacking = [".".join(filter(None, names)) for names, keys in found.items() if not {"up", "down"} <= keys.keys()]
    if lacking:
        wrong = f"{len(lacking)} of {len(found)} layers lack one of their two factors: {', '.join(lacking[:3])}"
        raise InputError(str(file), wrong, "copy or train it again")
    require_numbers(file, {key: t for key, t in stored.tensors.items() if not key.endswith(".alpha")})
    layers = []
    for (component, path), keys in found.items():
        up, down = stored.tensors[keys["up"]], stored.tensors[keys["down"]]
        _require_product(file, keys, up, down)
        magnitude = stored.tensors[keys["magnitude"]] if "magnitude" in keys else None
        # A row (1, n) is LyCORIS' norm along inputs; a convolution's in PEFT is (1, m, 1, 1).
        if magnitude is not None and (magnitude.numel() != up.shape[0] or _is_row(magnitude)):
            wrong = f"{keys['magnitude']} is {tuple(magnitude.shape)} for {up.shape[0]} outputs"
            raise InputError(str(file), wrong, "use a file whose magnitudes are one an output")
        alpha = _alpha(file, keys["alpha"], stored.tensors[keys["alpha"]]) if "alpha" in keys else None
        factor = scale((component, path), down.shape[0], alpha)
        layers.append(Layer(component, path, up, down, factor, magnitude, (keys["up"], keys["down"]), source))
    return layers


def _is_row(magnitude: Tensor) -> bool:
    return magnitude.dim() == 2 and magnitude.shape[0] == 1 < magnitude.shape[1]


def require_numbers(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError unless all tensors hold finite floating-point numbers; names how many do not, and the first."""
    whole = [key for key, t in tensors.items() if not t.is_floating_point()]
    if whole:
        wrong = f"{whole[0]} is of {str(tensors[whole[0]].dtype).removeprefix('torch.')}"
        raise InputError(str(file), wrong, "save it in a floating-point type")
    off = [key for key, t in tensors.items() if not torch.isfinite(precise(t)).all()]
    if off:
        wrong = f"{len(off)} of {len(tensors)} tensors hold NaN or infinity: {', '.join(off[:3])}"
        raise InputError(str(file), wrong, "go back to an earlier checkpoint")


def _require_product(file: Path, keys: Mapping[str, str], up: Tensor, down: Tensor) -> None:
    plain = up.dim() == down.dim() and up.dim() in (2, 4) and set(up.shape[2:]) <= {1}
    if not plain or up.shape[1] != down.shape[0] or not up.numel() or not down.numel():
        wrong = f"{keys['up']} {tuple(up.shape)} and {keys['down']} {tuple(down.shape)} make no update"
        raise InputError(str(file), wrong, "use a LoRA of linear layers and convolutions, whole")


def _alpha(file: Path, key: str, tensor: Tensor) -> float:
    value = tensor.item() if tensor.numel() == 1 else float("nan")
    if not abs(value) < float("inf"):
        raise InputError(str(file), f"{key} is no single finite number", "save it again with alpha = rank")
    return float(value)


def folded(layers: list[Layer]) -> list[Layer]:
    """The same updates with scale 1 and one rank a component, so that every reader's default (alpha = rank) is right.

    The scale goes into `up`, in the stored type where that is exact and in float32 elsewhere; ranks grow by zeros.
    """
    ranks: dict[str, int] = {}
    for layer in layers:
        ranks[layer.component] = max(ranks.get(layer.component, 0), layer.rank)
    return [_folded(layer, ranks[layer.component]) for layer in layers]


def _folded(layer: Layer, rank: int) -> Layer:
    exact = layer.up.double() * layer.scale
    up = exact.to(layer.up.dtype)
    if not torch.equal(up.double(), exact):
        up = exact.float()
    lacking = rank - layer.rank
    if lacking:
        up = torch.cat([up, up.new_zeros(up.shape[0], lacking, *up.shape[2:])], 1)
    down = torch.cat([layer.down, layer.down.new_zeros(lacking, *layer.down.shape[1:])]) if lacking else layer.down
    return replace(layer, up=up, down=down, scale=1.0)
