"""torchvision's datasets by name, downloaded where that still works, and the layouts to fill where it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vislora.data import images
from vislora.errors import InputError
from vislora.vision.data import ImageSet, marks_of, pick_split
from vislora.vision.files import Files

Words = dict[str, Any]


@dataclass(frozen=True)
class _Set:
    """One class of torchvision: keywords by split, the keyword of its partition, whether it can be downloaded."""

    kind: str
    splits: dict[str, Words] = field(default_factory=lambda: {s: {"split": s} for s in ("train", "test")})
    partition: str | None = None
    download: bool = True


def _named(*splits: str) -> dict[str, Words]:
    return {s: {"split": s} for s in splits}


_FLAG = {"train": {"train": True}, "test": {"train": False}}
_THREE = _named("train", "val", "test")
_SETS = {
    "svhn": _Set("SVHN", _named("train", "test", "extra")),
    "cifar10": _Set("CIFAR10", _FLAG),
    "cifar100": _Set("CIFAR100", _FLAG),
    "mnist": _Set("MNIST", _FLAG),
    "fashionmnist": _Set("FashionMNIST", _FLAG),
    "kmnist": _Set("KMNIST", _FLAG),
    "food101": _Set("Food101"),
    "dtd": _Set("DTD", _THREE, partition="partition"),
    "flowers102": _Set("Flowers102", _THREE),
    "oxfordiiitpet": _Set("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "fgvcaircraft": _Set("FGVCAircraft", _named("train", "val", "trainval", "test")),
    "stl10": _Set("STL10"),
    "gtsrb": _Set("GTSRB"),
    "pcam": _Set("PCAM", _THREE),
    "country211": _Set("Country211", _named("train", "valid", "test")),
    "stanfordcars": _Set("StanfordCars", download=False),
    "imagenet": _Set("ImageNet", {"train": {"split": "train"}, "val": {"split": "val"}}, download=False),
}
_LAYOUTS = {
    "stanfordcars": "stanford_cars/ with devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat",
    "imagenet": "ILSVRC2012's train/ and val/ of class folders (name that folder), or its devkit's and image tar files",
    "sun397": "SUN397/ with a/abbey/*.jpg and so on, and Partitions/Training_01.txt and Testing_01.txt",
    "cub200": "CUB_200_2011/ with images/, images.txt, image_class_labels.txt, train_test_split.txt and classes.txt",
}


def load(name: str, split: str, root: str, partition: str | None) -> ImageSet:
    """A split of the set called `name` under `root`. InputError, with the layout to fill, where it cannot be had."""
    key = _key(name)
    if key == "cub200" and partition is not None:
        wrong = f"{partition!r} beside {name}, which has no partitions"
        raise InputError("--dataset_config_name", wrong, "leave it out")
    if key in _LISTED:
        return _LISTED[key](Path(root), split, partition or "01")
    from torchvision import datasets

    entry = _SETS[key]
    words = dict(entry.splits[pick_split(split, list(entry.splits), name)])
    if partition is not None:
        if entry.partition is None or not partition.isdigit():
            wrong = f"{partition!r} beside {name}, which has {'numbers' if entry.partition else 'no partitions'}"
            raise InputError("--dataset_config_name", wrong, "leave it out")
        words[entry.partition] = int(partition)
    make = getattr(datasets, entry.kind)
    try:
        found = _open(make, root, words, entry.download)
    except Exception as error:  # of the network, an archive, or a missing scipy
        reason = " ".join(str(error).split())[:200]
        remedy = f"fill {root}/{_LAYOUTS[key]}" if key in _LAYOUTS else f"put it under --data_dir {root} yourself"
        raise InputError(f"dataset {name}", f"is not there and cannot be downloaded ({reason})", remedy) from None
    labels = tuple(int(label) for label in _labels(found))
    said = getattr(found, "classes", None) or [str(c) for c in range(max(labels) + 1)]
    classes = tuple(c[0] if isinstance(c, tuple) else str(c) for c in said)
    files = _files(found)
    pixels = np.ascontiguousarray(found.data) if hasattr(found, "data") else None
    marks = files.sizes if files else None if pixels is None else marks_of(pixels)
    return ImageSet(name, classes, labels, lambda i: _image(name, found, files, i), marks)


def _files(found) -> Files | None:
    """The files of a set of torchvision's; None where it has its images in memory, or in one file."""
    held = next((h for a in ("_image_files", "_images", "_samples", "samples") if (h := getattr(found, a, None))), None)
    return held and Files.of(Path(entry[0] if isinstance(entry, tuple) else entry) for entry in held)


def _image(name: str, found, files: Files | None, i: int) -> Image.Image:
    """Image i by torchvision's own reader. InputError where it is damaged, DataChanged where its file has changed."""
    where = str(files.unchanged(i)) if files else f"dataset {name}, image {i}"
    try:
        return found[i][0].convert("RGB")
    except (*images.DAMAGED, *images.BOMB) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(where, f"cannot be decoded ({reason})", "replace or remove it") from error


def _labels(found) -> Sequence[int]:
    """The labels of a set of torchvision's, without reading its images."""
    where = next((a for a in ("targets", "labels", "_labels") if hasattr(found, a)), None)
    if where:
        return getattr(found, where)
    if hasattr(found, "_samples"):
        return [c for _, c in found._samples]
    with found.h5py.File(found._base_folder / found._FILES[found._split]["targets"][0]) as file:  # PCAM
        return file["y"][:].ravel()


def _open(make: Callable, root: str, words: Words, download: bool):
    """The set as it lies there; downloaded only where it does not."""
    try:
        return make(root, **words)
    except RuntimeError:
        if not download:
            raise
    return make(root, **words, download=True)


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def known(name: str) -> bool:
    return _key(name) in NAMES


def _missing(name: str, root: Path, what: Path) -> InputError:
    return InputError(f"dataset {name}", f"has no {what}, and its own link is dead", f"fill {root}/{_LAYOUTS[name]}")


def _lines(name: str, root: Path, file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:
        raise _missing(name, root, file) from None


def _sun397(root: Path, split: str, partition: str) -> ImageSet:
    """By the authors' list of one of ten partitions, of 19,850 images a side."""
    base = root / "SUN397"
    word = {"train": "Training", "test": "Testing"}[pick_split(split, ["train", "test"], "sun397")]
    files = _lines("sun397", root, base / "Partitions" / f"{word}_{partition.zfill(2)}.txt")
    names = [str(Path(file).parent).strip("/") for file in files]
    classes = sorted(set(names))
    found = Files.of(base / file.lstrip("/") for file in files)
    return ImageSet("sun397", tuple(classes), tuple(map(classes.index, names)), found.read, found.sizes)


def _cub200(root: Path, split: str, partition: str) -> ImageSet:
    """By the authors' split of 5,994 and 5,794 images."""
    base = root / "CUB_200_2011"
    tables = [dict(line.split(maxsplit=1) for line in _lines("cub200", root, base / f"{stem}.txt"))
              for stem in ("images", "image_class_labels", "train_test_split", "classes")]  # fmt: skip
    files, labels, training, names = tables
    side = "1" if pick_split(split, ["train", "test"], "cub200") == "train" else "0"
    own = [key for key in files if training[key] == side]
    found = Files.of(base / "images" / files[key] for key in own)
    classes = tuple(name.partition(".")[2] or name for name in names.values())
    return ImageSet("cub200", classes, tuple(int(labels[key]) - 1 for key in own), found.read, found.sizes)


_LISTED = {"sun397": _sun397, "cub200": _cub200}
NAMES = tuple(sorted([*_SETS, *_LISTED]))
