"""The networks that look at images: DINO through timm, CLIP through open_clip; the embedded world's, or the papers'.

The papers', by the names that protocols use, are loaded by their hub names or from files of these names in one folder.
Networks are frozen, in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import open_clip
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vislora import world
from vislora.diffusion.hub import brief
from vislora.errors import InputError, near
from vislora.metrics.transforms import IMAGENET, OPENAI, Transform

WORLD, PAPERS = "world", "papers"
DINO = {
    "s16": "vit_small_patch16_224.dino",
    "b16": "vit_base_patch16_224.dino",
    "s8": "vit_small_patch8_224.dino",
    "dinov2_s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_b": "vit_base_patch14_dinov2.lvd142m",
}
CLIP = {"L14": "ViT-L-14-quickgelu", "B32": "ViT-B-32-quickgelu"}  # the plain names build another activation
_HUB = {
    **{name: f"timm/{name}" for name in DINO.values()},
    "ViT-L-14-quickgelu": "timm/vit_large_patch14_clip_224.openai",
    "ViT-B-32-quickgelu": "timm/vit_base_patch32_clip_224.openai",
}


@dataclass
class Backbone:
    """A network and the transform before it. `identifier`: for the record; `view`: for the cache, the weights in it;
    `activations`: the names of its GELUs, for the record, since CLIP's weights fit either kind."""

    kind: str  # dino or clip
    identifier: str
    network: nn.Module
    transform: Transform
    tokenizer: object = None

    def __post_init__(self):
        self.network.requires_grad_(False).eval().float()
        self.view = f"{self.kind} {self.identifier} {weights_digest(self.network)} {self.transform.name}"
        if self.kind == "clip":
            self.view += f" {self.activations}"

    @property
    def activations(self) -> str:
        return " and ".join(_gelus(self.network)) or "none"

    @torch.no_grad()
    def images(self, batch: Tensor) -> Tensor:
        """Unit features (n, d), float32, of transformed images (n, 3, h, w)."""
        found = self.network.encode_image(batch) if self.kind == "clip" else self.network(batch)
        return nn.functional.normalize(found.float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit features (n, d), float32, on the CPU, of CLIP's text tower."""
        device = next(self.network.parameters()).device
        tokens = self.tokenizer(list(texts)).to(device)
        return nn.functional.normalize(self.network.encode_text(tokens).float(), dim=-1).cpu()


def weights_digest(network: nn.Module) -> str:
    """A short name of the weights: of the first 64 values of every tensor, which no two checkpoints share."""
    digest = sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.flatten()[:64].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def dino(name: str, how: str, source: str = WORLD, device: torch.device | str = "cpu") -> Backbone:
    """DINO for a protocol that asks for `name` (of `DINO`, a timm name, or a folder that timm loads) with the transform
    `how`, full or crop. source: WORLD (tiny-dino stands for every name), PAPERS, or a folder of weight files.

    InputError for a name, file or folder that is not there, saying what belongs where.
    """
    if source == WORLD and (name in DINO):
        folder = _world("tiny-dino", "model.safetensors")
        network = _made("tiny-dino", timm.create_model, f"local-dir:{folder}", pretrained=True, num_classes=0)
        side = network.pretrained_cfg["input_size"][-1]
        transform = Transform(side, "bilinear", None, *_statistics(network))
        return Backbone("dino", "world/tiny-dino", network.to(device), transform)
    if Path(name).is_dir():
        network = _made(name, timm.create_model, f"local-dir:{name}", pretrained=True, num_classes=0)
        statistics = _statistics(network)
    else:
        identifier = DINO.get(name, name)
        if not timm.is_model(identifier.split(".")[0]):
            wrong = f"{name!r} is no network that timm knows{near(name, DINO)}"
            raise InputError("--dino", wrong, f"one of {', '.join(DINO)}, a name of timm's, or a folder")
        extra = {"img_size": 224} if "dinov2" in identifier else {}
        if source not in (WORLD, PAPERS):
            extra["pretrained_cfg_overlay"] = {"file": str(_file(source, identifier)), "num_classes": 0}
        network = _made(identifier, timm.create_model, identifier, pretrained=True, num_classes=0, **extra)
        name, statistics = f"timm/{identifier}", IMAGENET
    side = network.pretrained_cfg["input_size"][-1] if "dinov2" not in name else 224
    resize = round(side * 256 / 224) if how == "crop" else None
    transform = Transform(side, "bicubic" if how == "crop" else "bilinear", resize, *statistics)
    return Backbone("dino", name, network.to(device), transform)


def clip(name: str, source: str = WORLD, device: torch.device | str = "cpu") -> Backbone:
    """CLIP for a protocol that asks for `name` (of `CLIP`, an open_clip name, or a folder that open_clip loads).

    source and errors as for `dino`. InputError where a network of OpenAI's has another activation than QuickGELU; a
    folder is of one of these where its path ends in a name with openai, as the hub has them; no file in it says so.
    """
    folder = _world("tiny-clip", "open_clip_model.safetensors") if source == WORLD and name in CLIP else Path(name)
    if folder.is_dir():
        where = f"local-dir:{folder}"
        network = _made(str(folder), open_clip.create_model, where)
        config = open_clip.get_model_preprocess_cfg(network)
        side = network.visual.image_size
        side = side if isinstance(side, int) else side[0]
        transform = Transform(side, "bicubic", side, tuple(config["mean"]), tuple(config["std"]))
        identifier = "world/tiny-clip" if name in CLIP else str(folder)
        if "openai" in "/".join(folder.resolve().parts[-3:]).lower():  # the hub's name, two above in its cache
            require_quickgelu(network, identifier)
        return Backbone("clip", identifier, network.to(device), transform, open_clip.get_tokenizer(where))
    identifier = CLIP.get(name, name)
    if identifier not in open_clip.list_models():
        wrong = f"{name!r} is no network that open_clip knows{near(name, [*CLIP, *open_clip.list_models()])}"
        raise InputError("--clip", wrong, f"one of {', '.join(CLIP)}, a name of open_clip's, or a folder")
    weights = "openai" if source in (WORLD, PAPERS) else str(_file(source, identifier))
    network = _made(identifier, open_clip.create_model, identifier, pretrained=weights)
    require_quickgelu(network, identifier)
    side = network.visual.image_size
    side = side if isinstance(side, int) else side[0]
    transform = Transform(side, "bicubic", side, *OPENAI)
    tokenizer = open_clip.get_tokenizer(identifier)
    return Backbone("clip", f"open_clip/{identifier}", network.to(device), transform, tokenizer)


def require_quickgelu(network: nn.Module, identifier: str) -> None:
    """InputError unless both towers hold QuickGELU, as OpenAI's weights were trained with, and no other GELU."""
    kinds = _gelus(network)
    if kinds != ["QuickGELU"]:
        wrong = f"{identifier} has {' and '.join(kinds) or 'no'} activations, OpenAI's weights need QuickGELU"
        remedy = f"take {' or '.join(CLIP.values())}, or set quick_gelu in the folder's open_clip_config.json"
        raise InputError("--clip", wrong, remedy)


def _gelus(network: nn.Module) -> list[str]:
    """The class names of its GELUs of any kind, open_clip's and timm's."""
    return sorted({name for module in network.modules() if (name := type(module).__name__).endswith("GELU")})


def _statistics(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    config = network.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def _world(name: str, file: str) -> Path:
    """The world's folder of that name. InputError, with the file and its place, where it is not whole."""
    folder = world.ROOT / "assets" / "world" / name
    if not (folder / file).is_file():
        remedy = "take a whole clone, build it by assets/build, or name the papers' networks by --backbones papers"
        raise InputError(str(folder / file), f"is not there, and {name} is needed to score", remedy)
    return folder


def _file(source: str, identifier: str) -> Path:
    """The weight file of a network in a folder of such."""
    file = Path(source) / f"{identifier}.safetensors"
    if not file.is_file():
        hub = _HUB.get(identifier)
        what = f"the safetensors file of the hub's {hub}" if hub else "its weights as safetensors"
        raise InputError(str(file), "no such file", f"put {what} there, under this name")
    return file


def _made(name: str, make, *args, **options) -> nn.Module:
    """The network that `make` gives. InputError where its weights cannot be had: broken, of another shape, offline."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="open_clip|timm")
            return make(*args, **options)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        hub = _HUB.get(name)
        where = f"DIR/{name}.safetensors, from the hub's {hub}, and give --backbones DIR" if hub else f"{name} whole"
        raise InputError(name, f"cannot be loaded ({brief(error)})", f"put {where}") from error
