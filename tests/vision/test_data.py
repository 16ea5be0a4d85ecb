"""Image sets from every kind of place, and the parts of them."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_vit import image_folder, parquet_folder

from vislora.errors import DataChanged, InputError
from vislora.vision import data


def idx(folder, pixels: np.ndarray, labels: np.ndarray, stem: str = "train", packed: bool = True) -> None:
    for name, values in ((f"{stem}-images-idx3-ubyte", pixels), (f"{stem}-labels-idx1-ubyte", labels)):
        head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        body = head + values.astype(np.uint8).tobytes()
        file = folder / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(body) if packed else body)


def test_class_folders(tmp_path):
    folder = image_folder(tmp_path / "set", classes=3, train=4, test=2)
    train, test = data.load(str(folder), "train"), data.load(str(folder), "test")
    assert (len(train), len(test)) == (12, 6) and train.classes == test.classes == ("class0", "class1", "class2")
    assert train.labels == (0,) * 4 + (1,) * 4 + (2,) * 4 and train.read(5).mode == "RGB"
    (folder / "test").rename(folder / "val")
    assert data.load(str(folder), "test").labels == test.labels
    assert len(data.load(str(folder), "train+val")) == 18
    with pytest.raises(InputError, match="no split 'trian'.*did you mean train"):
        data.load(str(folder), "trian")


def test_parquet_is_read_with_its_class_names(tmp_path):
    folder = parquet_folder(tmp_path / "set", classes=2, train=3, test=2)
    train, test = data.load(str(folder), "train"), data.load(str(folder), "test")
    assert train.classes == ("thing0", "thing1") and train.labels == (0, 0, 0, 1, 1, 1) and len(test) == 4
    assert np.asarray(train.read(0)).shape == (20, 16, 3)
    with pytest.raises(InputError, match="one of image, label"):
        data.load(str(folder), "train", label_column="class")


def test_what_datasets_saved_is_the_same_as_its_parquet(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = parquet_folder(tmp_path / "set", classes=2, train=3, test=2)
    datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache")).save_to_disk(str(tmp_path / "saved"))
    for split in ("train", "test"):
        one, two = data.load(str(folder), split), data.load(str(tmp_path / "saved"), split)
        assert one.classes == two.classes and one.labels == two.labels
        assert all(np.array_equal(one.read(i), two.read(i)) for i in range(len(one)))


def test_what_a_set_does_not_read_is_refused(tmp_path):
    folder = image_folder(tmp_path / "set", classes=2, train=1, test=1)
    for words, said in (({"config": "en"}, "dataset config"), ({"image_column": "x"}, "image column"),
                        ({"label_column": "x"}, "label column")):  # fmt: skip
        with pytest.raises(InputError, match=f"has no {said}"):
            data.load(str(folder), "train", **words)
    with pytest.raises(InputError, match="has no label column"):
        data.load("svhn", "train", root=str(tmp_path), label_column="x")
    with pytest.raises(InputError, match="has no partitions"):
        data.load("cub200", "train", root=str(tmp_path), config="2")


def test_images_without_labels(tmp_path):
    from pyarrow import parquet

    (tmp_path / "flat" / "deep").mkdir(parents=True)
    for name in ("b.png", "a.png", "deep/c.png"):
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(tmp_path / "flat" / name)
    with pytest.raises(InputError, match="no split 'test'"):
        data.load(str(tmp_path / "flat"), "test")
    found = data.load(str(tmp_path / "flat"), "test", labelled=False)
    assert found.classes == () and found.labels == (0, 0, 0) and found.read(2).getpixel((0, 0)) == (10, 0, 0)
    folder = image_folder(tmp_path / "set", classes=2, train=3, test=1)
    assert [len(data.load(str(folder), s, labelled=False)) for s in ("train", "test", "train+test")] == [6, 2, 8]
    folder = parquet_folder(tmp_path / "parquet", classes=2, train=3, test=2)
    file = folder / "data" / "validation-00000-of-00001.parquet"
    parquet.write_table(parquet.read_table(file).drop_columns(["label"]), file)
    with pytest.raises(InputError, match="none of the columns label"):
        data.load(str(folder), "test")
    found = data.load(str(folder), "test", labelled=False)
    assert found.classes == () and len(found) == 4 and found.read(3).size == (16, 20)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        data.load(str(tmp_path / "none"), "test", labelled=False)


def test_one_saved_split_is_no_other(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [np.full((4, 4, 3), i, dtype=np.uint8) for i in range(3)], "label": [0, 1, 1]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    for split, there in ((datasets.Split.TEST, "test"), (None, "train")):
        place = str(tmp_path / there)
        datasets.Dataset.from_dict(columns, features=features, split=split).save_to_disk(place)
        assert data.load(place, there).labels == (0, 1, 1)
        with pytest.raises(InputError, match=f"it has {there}"):
            data.load(place, {"test": "train", "train": "test"}[there])


def test_idx_and_json_digits(tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 28, 28)), np.arange(6) % 3
    for packed in (True, False):
        place = tmp_path / f"idx{packed}"
        place.mkdir()
        idx(place, pixels, labels, packed=packed)
        found = data.load(str(place), "train")
        assert found.labels == tuple(labels) and np.array_equal(np.asarray(found.read(4))[..., 1], pixels[4])
        with pytest.raises(InputError, match="has neither t10k-images"):
            data.load(str(place), "test")
    (tmp_path / "idxFalse" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0" * 20)
    with pytest.raises(InputError, match="its header does not fit"):
        data.load(str(tmp_path / "idxFalse"), "train")

    place = tmp_path / "package" / "src" / "digits"
    place.mkdir(parents=True)
    for digit in range(10):
        values = np.zeros((10, 28, 28))
        values[:, 3, 4] = 0.5
        (place / f"{digit}.json").write_text(json.dumps({"data": values.ravel().tolist()}))
    train, test = (data.load(str(tmp_path / "package"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (80, 20) and np.asarray(train.read(0))[3, 4, 0] == 128
    assert set(train.labels) == set(range(10))


def test_validation_is_carved_by_class_and_seed(tmp_path):
    whole = data.load(str(image_folder(tmp_path / "set", classes=3, train=10)), "train")
    rest, held = whole.carve(0.2, seed=0)
    assert len(rest) == 24 and sorted(held.labels) == [0, 0, 1, 1, 2, 2]
    assert whole.carve(0.2, 0)[1].labels == held.labels
    pictures = {rest.read(i).tobytes() for i in range(len(rest))} | {held.read(i).tobytes() for i in range(len(held))}
    assert len(pictures) == 30  # no image is in both
    other = whole.carve(0.2, seed=1)[1]
    assert {other.read(i).tobytes() for i in range(6)} != {held.read(i).tobytes() for i in range(6)}
    assert len(whole.carve(0.0, 0)[1]) == 0
    with pytest.raises(InputError, match="not one image a class"):
        whole.carve(0.01, 0)
    few = whole.sample(7, 0)
    assert len(few) == 7 and few.labels == whole.sample(7, 0).labels and whole.sample(None, 0) is whole


def test_sets_whose_links_are_dead_say_what_to_fill(tmp_path):
    for name, words in {"SUN397": "Partitions/Training_01.txt", "StanfordCars": "cars_test_annos_withlabels.mat",
                        "CUB200": "image_class_labels.txt", "imagenet": "ILSVRC2012"}.items():  # fmt: skip
        with pytest.raises(InputError) as error:
            data.load(name, "train", root=str(tmp_path))
        assert f"fill {tmp_path}/" in str(error.value) and words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="is no folder and no set of torchvision.*did you mean cifar100"):
        data.load("cifar_1000", "train")


def make_svhn(root):
    scipy = pytest.importorskip("scipy.io")
    pixels = np.zeros((32, 32, 3, 3), dtype=np.uint8)
    pixels[..., 1] = 9
    scipy.savemat(root / "test_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [3]])})  # 10 stands for the digit 0


def make_cifar100(root):
    place = root / "cifar-100-python"
    place.mkdir()
    pixels = np.zeros((3, 3072), dtype=np.uint8)
    pixels[1] = 9
    body = {"data": pixels, "fine_labels": [1, 0, 3], "coarse_labels": [0, 0, 0]}
    names = {"fine_label_names": ["apple", "fish", "bee", "cup"]}
    for file, values in (("test", body), ("meta", names)):
        (place / file).write_bytes(pickle.dumps(values))


def make_food101(root):
    place = root / "food-101"
    (place / "meta").mkdir(parents=True)
    files = {"apple": ["apple/b"], "bread": ["bread/a"], "soup": [], "tart": ["tart/c"]}
    (place / "meta" / "test.json").write_text(json.dumps({k: files[k] for k in ("bread", "apple", "tart", "soup")}))
    for name in ("bread/a", "apple/b", "tart/c"):
        (place / "images" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (9, 9, 9)).save(place / "images" / f"{name}.jpg")


def make_dtd(root):
    place = root / "dtd" / "dtd"
    (place / "labels").mkdir(parents=True)
    lines = ["dotted/a.jpg", "banded/b.jpg", "wavy/c.jpg"]
    (place / "labels" / "test2.txt").write_text("\n".join(lines))
    for name in lines:
        (place / "images" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (9, 9, 9)).save(place / "images" / name)


def make_pcam(root):
    (root / "pcam").mkdir()
    for kind in "xy":
        (root / "pcam" / f"camelyonpatch_level_2_split_test_{kind}.h5").touch()


class H5:
    """What PCAM asks of h5py: three images of 96 pixels, and a label of each."""

    def __init__(self, file):
        pixels, labels = np.zeros((3, 96, 96, 3), dtype=np.uint8), np.array([1, 0, 1]).reshape(3, 1, 1, 1)
        pixels[1] = 9
        self.held = {"x": pixels, "y": labels}

    def __enter__(self):
        return self.held

    def __exit__(self, *error):
        pass


@pytest.mark.parametrize("make, labels, classes, config", [
    (make_svhn, (1, 0, 3), ("0", "1", "2", "3"), None),
    (make_cifar100, (1, 0, 3), ("apple", "fish", "bee", "cup"), None),
    (make_food101, (1, 0, 3), ("apple", "bread", "soup", "tart"), None),
    (make_dtd, (1, 0, 2), ("banded", "dotted", "wavy"), "2"),
    (make_pcam, (1, 0, 1), ("0", "1"), None),
])  # fmt: skip
def test_sets_of_torchvision_are_read(tmp_path, monkeypatch, make, labels, classes, config):
    from torchvision import datasets

    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=H5))
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)  # which asks for the real files' hashes
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *words: True)
    make(tmp_path)
    found = data.load(make.__name__.removeprefix("make_"), "test", root=str(tmp_path), config=config)
    assert found.labels == labels and found.classes == classes
    assert found.read(1).mode == "RGB" and abs(found.read(1).getpixel((0, 0))[0] - 9) <= 2


def test_an_image_file_of_torchvisions_is_named_when_it_is_damaged_or_gone(tmp_path):
    make_food101(tmp_path)
    found = data.load("food101", "test", root=str(tmp_path))
    file = tmp_path / "food-101" / "images" / "bread" / "a.jpg"
    about, content = file.stat(), file.read_bytes()
    file.write_bytes(b"x" * len(content))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))  # nothing tells until it is decoded
    with pytest.raises(InputError, match=r"bread/a.jpg: cannot be decoded") as caught:
        found.read(0)
    assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(DataChanged, match=r"bread/a.jpg: is gone since the run began"):
        found.read(0)
    with pytest.raises(InputError, match=r"bread/a.jpg: cannot be read \(No such file"):
        data.load("food101", "test", root=str(tmp_path))


@pytest.mark.case("F21")
def test_other_images_are_told_from_those_of_before(tmp_path):
    """By their files' sizes, or a checksum of what is in memory; sets that datasets reads have neither."""
    folder = image_folder(tmp_path / "set", classes=2, train=3, test=1)
    (tmp_path / "idx").mkdir()
    pixels, labels = np.zeros((4, 28, 28)), np.arange(4) % 2
    idx(tmp_path / "idx", pixels, labels, packed=False)
    tables = parquet_folder(tmp_path / "tables", classes=2, train=3, test=2)
    before = {name: data.load(str(tmp_path / name), "train") for name in ("set", "idx", "tables")}
    for name, own in before.items():
        again = data.load(str(tmp_path / name), "train")
        assert again.fingerprint_of_images() == own.fingerprint_of_images() is not None
        assert own.subset([2, 0]).marks == (own.marks[2], own.marks[0])
        assert data.join([own, own]).marks == own.marks * 2
    Image.new("RGB", (16, 20)).save(folder / "train" / "class1" / "0.png")
    pixels[3, 0, 0] = 1
    idx(tmp_path / "idx", pixels, labels, packed=False)
    shutil.rmtree(tables)
    parquet_folder(tables, classes=3, train=2)
    for name, own in before.items():
        assert data.load(str(tmp_path / name), "train").fingerprint_of_images() != own.fingerprint_of_images(), name
    assert data.load(str(folder), "train").fingerprint() == before["set"].fingerprint()
    with pytest.raises(DataChanged, match="class1/0.png: has changed"):
        before["set"].read(3)


@pytest.mark.case("I14", "I11")
def test_images_in_tables_are_read_as_files_are(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    datasets = pytest.importorskip("datasets")
    deep = Image.fromarray((np.arange(400, dtype=np.uint32).reshape(20, 20) * 160).astype(np.uint16))
    clear = Image.new("RGBA", (20, 20), (200, 0, 0, 0))
    rows = [{"bytes": encoded(image), "path": None} for image in (deep, clear)] + [{"bytes": b"no image", "path": None}]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    (tmp_path / "tables").mkdir()
    parquet.write_table(pa.table({"image": image, "label": pa.array([0, 1, 0])}), tmp_path / "tables/train-0.parquet")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["0", "1"]))
    columns = {"image": rows, "label": [0, 1, 0]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
    for place in ("tables", "saved"):
        found = data.load(str(tmp_path / place), "train")
        assert np.abs(np.asarray(found.read(0))[..., 0] - np.asarray(deep) / 257).max() <= 0.5
        assert found.read(1).getpixel((3, 3)) == (255, 255, 255)
        with pytest.raises(InputError, match=f"{place}, row 2: is not a JPEG, PNG"):
            found.read(2)


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_filled_layouts_are_read(tmp_path):
    sun = tmp_path / "SUN397"
    (sun / "Partitions").mkdir(parents=True)
    for k, side in enumerate(("Training", "Testing")):
        lines = []
        for name in ("a/abbey", "b/beach"):
            (sun / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (k, 0, 0)).save(sun / name / f"{side}.jpg")
            lines.append(f"/{name}/{side}.jpg")
        (sun / "Partitions" / f"{side}_02.txt").write_text("\n".join(lines))
    found = data.load("sun397", "test", root=str(tmp_path), config="2")
    assert found.classes == ("a/abbey", "b/beach") and found.labels == (0, 1) and found.read(1).size == (8, 8)

    cub = tmp_path / "CUB_200_2011"
    (cub / "images" / "001.Crow").mkdir(parents=True)
    (cub / "images.txt").write_text("1 001.Crow/a.jpg\n2 001.Crow/b.jpg\n")
    (cub / "image_class_labels.txt").write_text("1 1\n2 1\n")
    (cub / "train_test_split.txt").write_text("1 1\n2 0\n")
    (cub / "classes.txt").write_text("1 001.Crow\n")
    Image.new("RGB", (8, 8), (7, 7, 7)).save(cub / "images" / "001.Crow" / "b.jpg")
    found = data.load("cub200", "test", root=str(tmp_path))
    assert found.classes == ("Crow",) and len(found) == 1 and found.read(0).getpixel((0, 0))[0] in range(5, 10)
