"""Datasets in Hugging Face's formats: parquet files of a local folder directly, the rest through `datasets`.

Reading parquet needs neither that package, which takes seconds to import, nor a copy in its cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vislora.data import images
from vislora.errors import InputError
from vislora.vision.data import ImageSet, marks_of, pick_split

_IMAGES, _LABELS = ("image", "img"), ("label", "labels", "fine_label")
_SPLIT = re.compile(r"[A-Za-z_]+")


def recognise(folder: Path) -> bool:
    return bool(_files(folder)) or _saved(folder)


def _saved(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def _files(folder: Path) -> dict[str, list[Path]]:
    """{split: its parquet files}; a split is the first word of a file's name (train-00000-of-00001.parquet)."""
    found: dict[str, list[Path]] = {}
    for file in sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]):
        word = _SPLIT.match(file.name)
        if word:
            found.setdefault(word[0].strip("_"), []).append(file)
    return found


def load(name: str, split: str, config: str | None, *columns: str | None) -> ImageSet:
    """A split of the folder or hub id `name`. columns: of images and labels, None for the usual names of each; with
    the first alone no labels are read, and all are 0."""
    folder = Path(name)
    if folder.is_dir() and not _saved(folder) and (files := _files(folder)) and config is None:
        return _parquet(folder, files[pick_split(split, list(files), name)], *columns)
    return _datasets(name, split, config, *columns)


def _parquet(folder: Path, files: Sequence[Path], image: str | None, *labels: str | None) -> ImageSet:
    """Images are {bytes, path} or bytes; class names come from the `huggingface` metadata where it is there."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = pyarrow.concat_tables([parquet.read_table(file) for file in files])
        about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(str(files[0]), f"cannot be read ({reason})", "copy it again") from None
    image = _column(str(folder), table.column_names, image, _IMAGES, "image")
    label = _column(str(folder), table.column_names, labels[0], _LABELS, "label") if labels else None
    names = about.get("info", {}).get("features", {}).get(label, {}).get("names")
    pictures = table.column(image)

    def held(i: int) -> bytes:
        cell = pictures[i].as_py()
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if data is None:
            raise InputError(str(folder), f"row {i} holds no image's bytes", "save it with the images in it")
        return data

    values = table.column(label).to_pylist() if labels else [0] * len(table)
    marks = marks_of(map(held, range(len(table))))
    return _labelled(str(folder), values, names, lambda i: images.decode(held(i), f"{folder}, row {i}"), marks)


def _datasets(name: str, split: str, config: str | None, image: str | None, *labels: str | None) -> ImageSet:
    try:
        import datasets
    except ImportError:
        wrong = "needs the package datasets, which is not installed"
        raise InputError(f"dataset {name}", wrong, "pip install datasets") from None
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(name) if _saved(Path(name)) else datasets.load_dataset(name, config)
    except Exception as error:  # of many kinds, a hub's and a parser's among them
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"dataset {name}", f"cannot be read ({reason})", "name a dataset that can be had") from None
    finally:
        if not bars:
            datasets.enable_progress_bars()
    if not isinstance(found, dict):  # one split, which may know its name; datasets calls such a one train
        found = {str(found.split or "train"): found}
    table = found[pick_split(split, list(found), name)]
    image = _column(name, table.column_names, image, _IMAGES, "image")
    label = _column(name, table.column_names, labels[0], _LABELS, "label") if labels else None
    pictures = table.select_columns([image])
    if isinstance(table.features[image], datasets.Image):  # which would decode by rules of its own
        pictures = pictures.cast_column(image, datasets.Image(decode=False))

    def read(i: int) -> Image.Image:
        cell = pictures[i][image]
        if isinstance(cell, dict):
            held = cell["bytes"]
            return images.read(cell["path"]) if held is None else images.decode(held, f"dataset {name}, row {i}")
        return cell.convert("RGB")

    names = getattr(table.features[label], "names", None) if labels else None
    values = list(table[label]) if labels else [0] * len(table)
    return _labelled(name, values, names, read, None)


def _labelled(name: str, values: list, names: Sequence[str] | None, read, marks: tuple[int, ...] | None) -> ImageSet:
    """Classes are the names; without any, the values in order."""
    if names is None:
        known = sorted(set(values), key=lambda v: (isinstance(v, str), v))
        place = {v: i for i, v in enumerate(known)}
        values, names = [place[v] for v in values], [str(v) for v in known]
    if not values or min(values) < 0:
        raise InputError(f"dataset {name}", "has images without a label in this split", "name a split that has labels")
    return ImageSet(name, tuple(names), tuple(values), read, marks)


def _column(name: str, there: Sequence[str], asked: str | None, usual: Sequence[str], what: str) -> str:
    found = [asked] if asked in there else [] if asked else [word for word in usual if word in there]
    if not found:
        wrong = f"has no column {asked!r}" if asked else f"has none of the columns {', '.join(usual)}"
        raise InputError(f"dataset {name}", wrong, f"give --{what}_column_name, one of {', '.join(there)}")
    return found[0]
