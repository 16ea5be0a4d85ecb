"""The image sets of a run, all named and counted before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from vislora.errors import InputError
from vislora.vision import data
from vislora.vision.data import ImageSet
from vislora.vision.options import ClassificationOptions


@dataclass(frozen=True)
class Sets:
    """train and validation are parts of the training split, validation None where none is; test is scored last.

    source: the old task's test images, few a fixed part of them for scores on the way, bank its training images for
    neighbours; each None where it is not asked for.
    """

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet
    source: ImageSet | None
    few: ImageSet | None
    bank: ImageSet | None

    def fingerprints(self) -> dict[str, str]:
        """What a resumed run must find again."""
        return {name: s.fingerprint() for name, s in vars(self).items() if s is not None}


def load(o: ClassificationOptions) -> Sets:
    """The options' sets. Raises InputError for what is missing, and for splits whose classes differ."""
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
    return Sets(train, validation, test, *_source(o))


def _source(o: ClassificationOptions, bank: bool | None = None) -> tuple[ImageSet | None, ...]:
    """(test, few, bank)."""
    if o.source_dataset_name is None:
        return None, None, None
    words = {"config": o.source_config_name, "root": o.data_dir}
    test = data.load(o.source_dataset_name, o.source_test_split, **words)
    known = None
    if o.knn if bank is None else bank:
        known = data.load(o.source_dataset_name, o.source_train_split, **words)
        known = known.sample(o.max_source_bank, o.seed, "source bank")
    return test, test.sample(o.max_source_samples, o.seed, "source subset"), known


def with_bank(o: ClassificationOptions, sets: Sets) -> Sets:
    """The same with a bank for neighbours, where there is source data."""
    return Sets(sets.train, sets.validation, sets.test, *_source(o, bank=True))
