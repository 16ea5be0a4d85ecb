"""Heads over one tower's features: the new one that trains, and the source's, kept as it was."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vislora.errors import InputError
from vislora.training.random import generator
from vislora.vision.models import Tower

TEMPLATES = ("simple", "openai")
_WNID = re.compile(r"n\d{8}")  # WordNet's numbers, as which ImageNet's folders are called
_NO_NAME = re.compile(r"(label )?\d+")  # transformers' LABEL_0, and plain numbers
log = logging.getLogger("vislora")


class ZeroShot(nn.Module):
    """A CLIP's zero-shot classifier as a head: 100 times the cosine to each class's text embedding."""

    def __init__(self, weight: Tensor):
        """weight: (width, classes), columns of unit length, as open_clip's builder gives it."""
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        return 100 * nn.functional.normalize(features, dim=-1) @ self.weight


class Classifier(nn.Module):
    """A tower and two heads. Calling it gives the new head's logits (B, classes); `all` gives everything.

    whole: the tower's own parameters train. Else its normalisation keeps the statistics it came with, and where
    nothing of it trains it stays in eval mode, so that the source's accuracy is a matter of the adapter alone.
    """

    def __init__(self, tower: Tower, classes: int, source: nn.Module | None, seed: int, whole: bool, frozen: bool):
        super().__init__()
        self.tower, self.head, self.source = tower, new_head(tower.width, classes, seed), source
        self.whole, self.frozen = whole, frozen
        if source is not None:
            source.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tower(images))

    def all(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(features (B, width), the new head's logits, the source head's logits or None)."""
        features = self.tower(images)
        return features, self.head(features), None if self.source is None else self.source(features)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        elif not self.whole:
            for module in self.tower.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def new_head(width: int, classes: int, seed: int) -> nn.Linear:
    """A linear head, its weight N(0, 0.02^2) by the seed, its bias zero."""
    head = nn.Linear(width, classes)
    with torch.no_grad():
        head.weight.normal_(0, 0.02, generator=generator(seed, "head"))
        head.bias.zero_()
    return head


def source_head(tower: Tower, classes: Sequence[str], templates: str) -> nn.Module | None:
    """The head that knows the source's classes: the model's own, or a CLIP's zero-shot one; None for a bare model, and
    without classes (a source without labels).

    Where the model says what its classes are called, its head's rows are brought into the order of `classes`; names
    that differ are told of in a warning, and both orders then trusted to agree.
    Raises InputError where the model's head has another number of classes than the source data.
    """
    if not classes:
        return None
    if tower.clip is not None:
        return zero_shot(tower, classes, templates)
    if templates != "openai":
        wrong = f"{templates} beside a model that is no CLIP: nothing reads it"
        raise InputError("--zero_shot_templates", wrong, "leave it out")
    head = tower.source_head
    if head is not None and head.out_features != len(classes):
        wrong = f"has {len(classes)} classes, the model's own head {head.out_features}"
        remedy = "name the data that the model was trained on, or --source_unlabelled"
        raise InputError("--source_dataset_name", wrong, remedy)
    return head if head is None else _in_order(head, tower.source_classes, classes)


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether these are ImageNet-1k's classes in its own order, by WordNet's numbers."""
    return len(classes) == 1000 and all(map(_WNID.fullmatch, classes)) and list(classes) == sorted(classes)


def _in_order(head: nn.Linear, known: Sequence[str], classes: Sequence[str]) -> nn.Linear:
    """`head` (of classes called `known`) with its rows as `classes` has them, where both hold the same names."""
    own, asked = ([name.replace("_", " ").strip().lower() for name in names] for names in (known, classes))
    if own == asked or is_imagenet(classes) or not own:
        return head
    if sorted(own) != sorted(asked) or len(set(own)) < len(own):
        if all(map(_NO_NAME.fullmatch, own)):
            return head
        some = ", ".join([name for name in asked if name not in own][:3]) or "repeated names"
        log.warning("--source_dataset_name: its classes are not called as the model's (%s); their order is taken to be "
                    "the model's -> check it, or the source's accuracy means nothing", some)  # fmt: skip
        return head
    order, found = [own.index(name) for name in asked], nn.Linear(head.in_features, len(asked), head.bias is not None)
    found.to(head.weight.device, head.weight.dtype)
    with torch.no_grad():
        for name, p in found.named_parameters():
            p.copy_(getattr(head, name)[order])
    return found


def _alike(classes: Sequence[str], names: Sequence[str]) -> bool:
    """Whether most of `classes` begin with the names at the same places: ImageNet's own ("tench, Tinca tinca")."""
    same = sum(c.partition(",")[0].lower() == n.lower() for c, n in zip(classes, names, strict=False))
    return len(classes) == len(names) and same > len(names) / 2


@torch.no_grad()
def zero_shot(tower: Tower, classes: Sequence[str], templates: str) -> ZeroShot:
    """By open_clip's own builder. templates: "simple", "openai", or a file with a template a line, {} for the class."""
    import open_clip
    from open_clip import zero_shot_metadata as words

    clip, name = tower.clip
    if is_imagenet(classes) or _alike(classes, words.IMAGENET_CLASSNAMES):
        classes = words.IMAGENET_CLASSNAMES  # without its folders' numbers, and clearer than its own names
    known = {"simple": words.SIMPLE_IMAGENET_TEMPLATES, "openai": words.OPENAI_IMAGENET_TEMPLATES}
    names = [c.replace("_", " ") for c in classes]
    weight = open_clip.build_zero_shot_classifier(
        clip.eval(), open_clip.get_tokenizer(name), names, known.get(templates) or _templates(templates),
        device=next(clip.parameters()).device,
    )  # fmt: skip
    return ZeroShot(weight.float().clone())


def _templates(file: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        wrong = f"cannot be read ({error})"
        raise InputError(f"--zero_shot_templates {file}", wrong, "take simple or openai") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or any("{}" not in line for line in lines):
        raise InputError(f"--zero_shot_templates {file}", "has a line without {}", "write a template a line")
    return lines
