"""The image sets of a run, all named and counted before a model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from vislora.errors import InputError
from vislora.vision import data, forgetting
from vislora.vision.data import ImageSet
from vislora.vision.options import ClassificationOptions

WHOLE = 10_000  # images that are decoded before a model loads: about ten seconds of photos


@dataclass(frozen=True)
class Sets:
    """train and validation are parts of the training split, validation None where none is; test is scored last.

    source: the old task's test images, without classes where it has no labels; few a fixed part of them for scores on
    the way, bank its training images for neighbours, few_bank a fixed part of those; each None where it is not asked
    for.
    """

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet
    source: ImageSet | None
    few: ImageSet | None
    bank: ImageSet | None
    few_bank: ImageSet | None

    def fingerprints(self) -> dict[str, str]:
        """What a resumed run must find again: classes, labels and their order, and the images' marks. Banks have no
        part in it, since no step is a function of them and --knn may be added later."""
        own = {name: s for name, s in vars(self).items() if s is not None and "bank" not in name}
        marks = {f"images of {name}": s.fingerprint_of_images() for name, s in own.items()}
        return {name: s.fingerprint() for name, s in own.items()} | {k: v for k, v in marks.items() if v is not None}

    def require_same(self, saved: Mapping[str, str]) -> None:
        """Raise InputError unless these are the sets whose fingerprints were `saved`."""
        for name, own in self.fingerprints().items():
            part = name.removeprefix("images of ")
            if own != saved.get(name):
                what = "classes or labels, or another order," if part == name else "images"
                wrong = f"has other {what} in {part} than the run began with"
                raise InputError(f"dataset {vars(self)[part].name}", wrong, "restore them, or start a new run")

    def require_readable(self) -> None:
        """Decode every image of the sets that have at most WHOLE. Raises InputError, naming it, for one that cannot
        be read; in a larger set that shows when it is drawn."""
        for part in (self.train, self.validation, self.test, self.source, self.bank):
            for i in range(len(part) if part is not None and len(part) <= WHOLE else 0):
                part.read(i)


def load(o: ClassificationOptions, offer_bank: bool = False) -> Sets:
    """The options' sets; offer_bank: neighbours too wherever the source has any, whether --knn is given or not.

    Raises InputError for what is missing, for splits whose classes differ, and as `Sets.require_readable`.
    """
    words = {"root": o.data_dir, "image_column": o.image_column_name, "label_column": o.label_column_name}
    train = data.load(o.dataset_name, o.train_split, config=o.dataset_config_name, **words)
    test = data.load(o.dataset_name, o.test_split, config=o.dataset_config_name, **words)
    if train.classes != test.classes:
        wrong = f"has {len(train.classes)} classes in {o.train_split}, others in {o.test_split} ({len(test.classes)})"
        raise InputError(f"dataset {o.dataset_name}", wrong, "name two splits of one task")
    train, held = train.carve(o.train_val_split, o.seed)
    train = train.sample(o.max_train_samples, o.seed, "train subset")
    validation = held if len(held) else None
    test = test.sample(o.max_eval_samples, o.seed, "test subset")
    sets = Sets(train, validation, test, *_source(o, offer_bank))
    sets.require_readable()
    return sets


def _source(o: ClassificationOptions, offer_bank: bool) -> tuple[ImageSet | None, ...]:
    """(test, few, bank, few_bank)."""
    if o.source_dataset_name is None:
        return None, None, None, None
    labelled = not o.source_unlabelled
    words = {"config": o.source_config_name, "root": o.data_dir, "image_column": o.source_image_column_name}
    words |= {"label_column": o.source_label_column_name, "labelled": labelled}
    test = data.load(o.source_dataset_name, o.source_test_split, **words)
    few = test.sample(o.max_source_samples, o.seed, "source subset")
    if not (o.knn or (offer_bank and labelled)):
        return test, few, None, None
    try:
        bank = _bank(o, test, words)
    except InputError as error:
        if o.knn:
            raise
        print(f"vislora: no scores by neighbours: {error.subject} {error.wrong}", file=sys.stderr)
        return test, few, None, None
    least = None if o.max_source_samples is None else max(o.max_source_samples, min(forgetting.KNN_K))
    return test, few, bank, bank.sample(least, o.seed, "source bank subset")


def _bank(o: ClassificationOptions, test: ImageSet, words: dict) -> ImageSet:
    """The source's training images, as many as are asked for."""
    name, least = o.source_dataset_name, min(forgetting.KNN_K)
    bank = data.load(name, o.source_train_split, **words)
    if bank.classes != test.classes:
        wrong = f"has {len(bank.classes)} classes in {o.source_train_split}, others in {o.source_test_split}"
        raise InputError(f"dataset {name}", f"{wrong} ({len(test.classes)})", "name two splits of one task")
    bank = bank.sample(o.max_source_bank, o.seed, "source bank")
    if len(bank) < least:
        wrong = f"gives {len(bank)} images to look for neighbours among, fewer than {least}"
        raise InputError(f"dataset {name}", wrong, "give more images, or leave --knn out")
    return bank
