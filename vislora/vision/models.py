"""Image towers of timm, transformers and open_clip by one path: a model that gives features, and what it wants to see.

The library's own classifier is taken out of its model and kept as the source head; modules and their names stay as the
library made them, so an adapter trained here loads into the stock model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vislora.errors import InputError, near
from vislora.pretrained import whole
from vislora.training.random import generator

LIBRARIES = ("timm", "transformers", "open_clip")
_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the model's input: side in pixels, per-channel mean and std of values in [0, 1].

    The short side is resized to size / crop_pct and the middle cut out; `squash` resizes both sides to `size` instead.
    """

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    squash: bool = False


class Tower(nn.Module):
    """`model` is the library's, its classifier replaced by the identity; calling the tower gives features (B, width).

    source_head: the classifier that was taken out, features -> logits of `source_classes`; None where there was none.
    clip: the whole CLIP and its name, of which a zero-shot source head can be made; None for other models.
    """

    def __init__(self, model: nn.Module, library: str, width: int, preprocess: Preprocess,
                 source_head: nn.Module | None = None, source_classes: tuple[str, ...] = (),
                 clip: tuple[nn.Module, str] | None = None):  # fmt: skip
        super().__init__()
        self.model, self.library, self.width, self.preprocess = model, library, width, preprocess
        self.source_classes = source_classes
        self._aside: tuple = (source_head, clip)  # in a tuple: no children, the tower is what trains

    @property
    def source_head(self) -> nn.Module | None:
        return self._aside[0]

    @property
    def clip(self) -> tuple[nn.Module, str] | None:
        return self._aside[1]

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, size, size), normalised -> features (B, width)."""
        out = self.model(images)
        if self.library == "transformers":
            return out.logits
        return out[0] if isinstance(out, tuple) else out  # open_clip gives (pooled, tokens) where asked for tokens

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward."""
        name = "gradient_checkpointing_enable" if self.library == "transformers" else "set_grad_checkpointing"
        switch = getattr(self.model, name, None)
        if switch is None:
            wrong = f"{type(self.model).__name__} has no gradient checkpointing"
            raise InputError("--gradient_checkpointing", wrong, "leave it out")
        switch()


@dataclass(frozen=True)
class _Choice:
    library: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def load(name: str, library: str | None = None, pretrained: str | None = None, seed: int = 0) -> Tower:
    """The image tower that `name` means, in float32, in eval mode, on the CPU.

    name: a folder in timm's, transformers' or open_clip's format, a name of timm or open_clip, or a hub id ("timm/…"
    is timm's, another is transformers' unless `library` says otherwise).
    pretrained: for timm's and open_clip's names the weights: "random", a .safetensors file, or for open_clip a tag;
    None is the name's own weights, of which open_clip's names have none.
    seed: random weights are a function of it; torch's global generator stays as it was.
    Raises InputError for what cannot be had.
    """
    choice = _choose(name, library)
    try:
        with torch.random.fork_rng(devices=[]):  # libraries draw from the global generator
            torch.manual_seed(generator(seed, "random weights").initial_seed())
            tower = _LOADERS[choice.library](choice.name, pretrained)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        wrong = f"could not be loaded by {choice.library} ({reason})"
        remedy = "name a local folder, or a model that can be had"
        raise InputError(f"--model_name_or_path {name}", wrong, remedy) from None
    return tower.float().eval()


def _choose(name: str, library: str | None) -> _Choice:
    if library is not None and library not in LIBRARIES:
        raise InputError("--library", f"{library!r} is none{near(library, LIBRARIES)}", f"take {', '.join(LIBRARIES)}")
    folder = Path(name)
    if folder.is_dir():
        return _Choice(library or _format_of(folder), str(folder))
    if library is not None:
        return _Choice(library, name)
    import timm

    if name.startswith(("timm/", "hf-hub:", "hf_hub:")):
        return _Choice("timm", name if ":" in name else f"hf-hub:{name}")
    if timm.is_model(name.partition(".")[0]):
        return _Choice("timm", name)
    import open_clip

    if name in open_clip.list_models():
        return _Choice("open_clip", name)
    if name.count("/") == 1 and not folder.exists() and not name.startswith((".", "/")) and (
        not folder.parent.exists()
    ):
        return _Choice("transformers", name)
    hint = near(name, [*timm.list_models(), *open_clip.list_models()])
    wrong = f"is no folder, no model of timm or open_clip{hint} and no hub id"
    raise InputError(f"--model_name_or_path {name}", wrong, "name one of these")


def _format_of(folder: Path) -> str:
    """Which library wrote the folder, by its configuration."""
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if "architecture" in config:
        return "timm"
    if "model_type" in config:
        return "transformers"
    wrong = "holds no configuration of timm, transformers or open_clip"
    raise InputError(f"--model_name_or_path {folder}", wrong, "name a folder with config.json or open_clip_config.json")


def _timm(name: str, pretrained: str | None) -> Tower:
    import timm

    words: dict[str, Any] = {"pretrained": pretrained != "random"}
    if pretrained not in (None, "random"):
        words["pretrained_cfg_overlay"] = {"file": str(_safetensors(pretrained))}
    model = timm.create_model(f"local-dir:{name}" if Path(name).is_dir() else name, **words)
    config = timm.data.resolve_model_data_config(model)
    head = model.get_classifier() if model.num_classes else None
    labels = model.pretrained_cfg.get("label_names") or ()
    if head is not None:
        if not isinstance(head, nn.Linear):
            wrong = f"its classifier is a {type(head).__name__}, not one linear layer"
            raise InputError(f"--model_name_or_path {name}", wrong, "take another model")
        model.reset_classifier(0)
    width = head.in_features if head is not None else getattr(model, "head_hidden_size", model.num_features)
    size = config["input_size"]
    preprocess = Preprocess(size[-1], tuple(config["mean"]), tuple(config["std"]), config["interpolation"],
                            config["crop_pct"], config.get("crop_mode") == "squash")  # fmt: skip
    return Tower(model, "timm", width, preprocess, head, tuple(labels))


def _transformers(name: str, pretrained: str | None) -> Tower:
    from transformers import AutoConfig, AutoModelForImageClassification

    if pretrained is not None and pretrained != "random":
        raise InputError("--pretrained", f"{pretrained} beside a model of transformers", "its folder holds its weights")
    config = AutoConfig.from_pretrained(name)
    classified = any("ForImageClassification" in kind for kind in config.architectures or ())
    if not classified:
        config.num_labels = 0  # its classifier is then the identity
    if pretrained == "random":
        model = AutoModelForImageClassification.from_config(config)
    else:
        model = whole(AutoModelForImageClassification, name, config=config)
    head = getattr(model, "classifier", None)
    if not isinstance(head, nn.Linear | nn.Identity):
        wrong = f"{type(model).__name__} has no single linear classifier"
        raise InputError(f"--model_name_or_path {name}", wrong, "take a ForImageClassification model that has")
    model.classifier = nn.Identity()
    preprocess = _processor(name, config)
    classes = tuple(config.id2label[i] for i in range(config.num_labels)) if isinstance(head, nn.Linear) else ()
    if isinstance(head, nn.Linear):
        return Tower(model, "transformers", head.in_features, preprocess, head, classes)
    with torch.no_grad():
        probe = model.eval()(torch.zeros(1, 3, preprocess.size, preprocess.size)).logits
    return Tower(model, "transformers", probe.shape[-1], preprocess)


def _processor(name: str, config: Any) -> Preprocess:
    """What transformers' image processor of the model does, read from its configuration."""
    from transformers import AutoImageProcessor

    try:
        p = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError):  # a folder without preprocessor_config.json
        return Preprocess(int(config.image_size), squash=True, interpolation="bilinear")
    size = dict(p.size) if not isinstance(p.size, int) else {"height": p.size, "width": p.size}
    crop = dict(p.crop_size) if getattr(p, "do_center_crop", False) and p.crop_size else None
    names = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    how = {"mean": tuple(p.image_mean), "std": tuple(p.image_std),
           "interpolation": names.get(int(p.resample), "bicubic")}  # fmt: skip
    if crop is None:
        return Preprocess(int(size.get("height") or size["shortest_edge"]), squash="height" in size, **how)
    side = size.get("shortest_edge") or size["height"]
    return Preprocess(int(crop["height"]), crop_pct=crop["height"] / side, **how)


def _open_clip(name: str, pretrained: str | None) -> Tower:
    import open_clip

    local = Path(name).is_dir()
    full = f"local-dir:{name}" if local else name
    if not local and pretrained is None and not name.startswith("hf-hub:"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)[:8])
        raise InputError("--pretrained", f"is needed by {name}", f"take one of {tags}, a .safetensors file, or random")
    if pretrained is not None and pretrained.endswith(".safetensors"):
        _safetensors(pretrained)
    words = {"pretrained": None if pretrained == "random" else pretrained}
    if pretrained == "openai" and "quickgelu" not in name.lower():
        wrong = "OpenAI's weights want QuickGELU"
        raise InputError(f"--model_name_or_path {name}", wrong, f"take {name}-quickgelu")
    if local:
        words["load_weights"] = pretrained != "random"
    clip = open_clip.create_model(full, **words)
    visual = clip.visual
    config = {"mean": _OPENAI_MEAN, "std": _OPENAI_STD, **getattr(visual, "preprocess_cfg", {})}
    size = visual.image_size
    preprocess = Preprocess(int(size[0] if isinstance(size, tuple | list) else size), tuple(config["mean"]),
                            tuple(config["std"]), config.get("interpolation", "bicubic"),
                            squash=config.get("resize_mode") == "squash")  # fmt: skip
    with torch.no_grad():
        out = visual.eval()(torch.zeros(1, 3, preprocess.size, preprocess.size))
    width = (out[0] if isinstance(out, tuple) else out).shape[-1]
    return Tower(visual, "open_clip", width, preprocess, clip=(clip, full))


def _safetensors(file: str) -> Path:
    path = Path(file)
    if path.suffix != ".safetensors" or not path.is_file():
        remedy = "give a .safetensors file, random, or for open_clip a tag"
        raise InputError("--pretrained", f"{file} is no such file", remedy)
    return path


_LOADERS = {"timm": _timm, "transformers": _transformers, "open_clip": _open_clip}
