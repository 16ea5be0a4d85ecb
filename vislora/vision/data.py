"""Labelled images by name: torchvision's sets, folders of class folders, Hugging Face datasets, idx and JSON digits.

`load` gives one split as an `ImageSet`, whatever it was read from; nothing beyond labels is held in memory but for
what its reader holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from zlib import crc32

from PIL import Image

from vislora.data import images
from vislora.errors import InputError, near
from vislora.training.random import epoch_order
from vislora.vision.files import Files

_TESTS = ("test", "validation", "valid", "val", "dev")


@dataclass(frozen=True)
class ImageSet:
    """Item i is the RGB image read(i), of class labels[i], called classes[labels[i]].

    marks: what tells image i from others without reading it: its file's bytes, or a CRC-32 of what is in memory; None
    where nothing is known.
    """

    name: str
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    read: Callable[[int], Image.Image]
    marks: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, chosen: Sequence[int]) -> ImageSet:
        """The items at these places, in this order."""
        kept, read = list(chosen), self.read
        marks = None if self.marks is None else tuple(self.marks[i] for i in kept)
        labels = tuple(self.labels[i] for i in kept)
        return replace(self, labels=labels, read=lambda i: read(kept[i]), marks=marks)

    def sample(self, count: int | None, seed: int, stream: str = "subset") -> ImageSet:
        """`count` items by chance of `seed`, in their old order; all for None or a larger count."""
        if count is None or count >= len(self):
            return self
        return self.subset(sorted(epoch_order(seed, 0, len(self), stream)[:count]))

    def carve(self, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """(the rest, a share of every class) by chance of `seed`: validation that no test image has a part in."""
        order, by_class = epoch_order(seed, 0, len(self), "validation split"), {}
        for i in order:
            by_class.setdefault(self.labels[i], []).append(i)
        held = {i for own in by_class.values() for i in own[: round(share * len(own))]}
        if share > 0 and not held:
            wrong = f"{share:g} of {len(self)} images in {len(by_class)} classes is not one image a class"
            raise InputError("--train_val_split", wrong, "give more images, or a larger share")
        rest = [i for i in range(len(self)) if i not in held]
        return self.subset(rest), self.subset(sorted(held))

    def fingerprint(self) -> str:
        """Of the name, the classes, and every label in order: no image is read for it."""
        return _digest((Path(self.name).name, self.classes, self.labels))

    def fingerprint_of_images(self) -> str | None:
        """Of every image's mark in order; None where there are none."""
        return None if self.marks is None else _digest(self.marks)


def _digest(values: tuple) -> str:
    return sha256(repr(values).encode()).hexdigest()


def marks_of(pixels: Sequence) -> tuple[int, ...]:
    """The marks of images in memory: arrays, each contiguous, or their files' bytes."""
    return tuple(map(crc32, pixels))


def load(name: str, split: str, *, config: str | None = None, root: str = "data", image_column: str | None = None,
         label_column: str | None = None, labelled: bool = True) -> ImageSet:  # fmt: skip
    """One split of the dataset called `name`.

    name: a torchvision set (see `torchvision_sets.NAMES`), a folder, or a hub id. A folder may hold a dataset that
    `datasets` reads (save_to_disk's, or parquet), train/ and test/ of class folders, idx files, or JSON digits.
    split: "train", "test" (the folder's or hub's validation split where it has no test), or as it is called there;
    several joined by +. config: of a hub dataset, or the partition of a torchvision set that has several. root: where
    torchvision's sets lie or go. labelled: False for images alone, of which a folder may then hold any, in any depth;
    the set has no classes, and zeros for labels.
    Raises InputError, in one line, for what is missing, with the layout to fill.
    """
    words = {"config": config, "root": root, "image_column": image_column, "label_column": label_column}
    parts = [p for p in split.split("+") if p]
    if len(parts) > 1:
        return join([load(name, part, labelled=labelled, **words) for part in parts])
    found = _load(name, split, labelled=labelled, **words)
    return found if labelled else replace(found, classes=(), labels=(0,) * len(found))


def _load(name: str, split: str, config: str | None, root: str, image_column: str | None, label_column: str | None,
          labelled: bool) -> ImageSet:  # fmt: skip
    """One split, by what `name` turns out to be."""
    from vislora.vision import digits, tables, torchvision_sets

    columns = (image_column, label_column) if labelled else (image_column,)
    folder = Path(name)
    read_by_datasets = folder.is_dir() and tables.recognise(folder) and not digits.recognise(folder)
    if torchvision_sets.known(name) and not folder.is_dir():
        _require_unread(name, image_column=image_column, label_column=label_column)
        return torchvision_sets.load(name, split, root, config)
    if not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")) or folder.parent.is_dir():
            sets = torchvision_sets.NAMES
            wrong = f"is no folder and no set of torchvision{near(name.lower(), sets)}"
            raise InputError(f"dataset {name}", wrong, f"name a folder, a hub id, or {', '.join(sets)}")
        return tables.load(name, split, config, *columns)
    if read_by_datasets:
        return tables.load(name, split, config, *columns)
    _require_unread(name, dataset_config=config, image_column=image_column, label_column=label_column)
    if digits.recognise(folder):
        return digits.load(folder, split)
    return _class_folders(folder, split) if labelled else _images(folder, split)


def _require_unread(name: str, **words: str | None) -> None:
    """Raise InputError for one of these that is given: the set called `name` knows no such thing."""
    for word, value in words.items():
        if value is not None:
            wrong = f"has no {word.replace('_', ' ')} ({value!r} was given)"
            raise InputError(f"dataset {name}", wrong, f"leave --{word}_name out")


def join(sets: Sequence[ImageSet]) -> ImageSet:
    """Several sets of the same classes as one, in order."""
    first = sets[0]
    if any(s.classes != first.classes for s in sets):
        raise InputError(f"dataset {first.name}", "its splits have different classes", "join splits that agree")
    starts = [sum(len(s) for s in sets[:k]) for k in range(len(sets))]

    def read(i: int) -> Image.Image:
        k = max(k for k, start in enumerate(starts) if start <= i)
        return sets[k].read(i - starts[k])

    marks = None if any(s.marks is None for s in sets) else tuple(mark for s in sets for mark in s.marks)
    return replace(first, labels=tuple(label for s in sets for label in s.labels), read=read, marks=marks)


def pick_split(asked: str, there: Sequence[str], name: str) -> str:
    """The split of `there` that `asked` means; "test" falls back on a validation split. InputError if there is none."""
    if asked in there:
        return asked
    if asked in _TESTS:
        found = [word for word in _TESTS if word in there]
        if found:
            return found[0]
    wrong = f"has no split {asked!r}{near(asked, there)}"
    raise InputError(f"dataset {name}", wrong, f"it has {', '.join(there) or 'none'}")


def _images(folder: Path, split: str) -> ImageSet:
    """Every image under folder/SPLIT, or under the folder where it has no such split, by path."""
    splits = [p.name for p in _folders(folder)]
    there = split in splits or (split in _TESTS and any(word in splits for word in _TESTS))
    place = folder / pick_split(split, splits, str(folder)) if there else folder
    found = _below(place)
    if not found:
        raise InputError(str(place), "holds no image", "put them there")
    files = Files.of(found)
    return ImageSet(str(folder), (), (0,) * len(found), files.read, files.sizes)


def _folders(place: Path) -> list[Path]:
    """The folders in `place`, by name; hidden ones are passed over, here and below: they are of editors and systems."""
    return sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))


def _below(place: Path) -> list[Path]:
    """Every image under `place`, in any depth, by path. InputError for one of a kind that is not read."""
    files = (f for f in sorted(place.rglob("*")) if not any(p.startswith(".") for p in f.relative_to(place).parts))
    return [file for file in files if images.is_image(file)]


def _class_folders(folder: Path, split: str) -> ImageSet:
    """folder/SPLIT/CLASS/*.png and the like; classes are sorted by name, and the same in every split."""
    splits = sorted(p.name for p in _folders(folder) if _folders(p))
    own = folder / pick_split(split, splits, str(folder))
    classes = sorted({p.name for s in splits for p in _folders(folder / s)})
    found = [(file, classes.index(place.name)) for place in _folders(own) for file in _below(place)]
    if not found:
        raise InputError(str(own), "holds no image in any class folder", "put them into SPLIT/CLASS/")
    files = Files.of(file for file, _ in found)
    return ImageSet(str(folder), tuple(classes), tuple(c for _, c in found), files.read, files.sizes)
