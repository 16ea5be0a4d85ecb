"""The scan before a run: odd files are passed over, warned of or refused, each by its name."""

import io
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vislora.data import images
from vislora.data.images import read, scan, verify
from vislora.errors import DataChanged, InputError

RAMP = np.stack(np.broadcast_arrays(np.arange(0, 240, 5)[:, None], np.arange(0, 192, 4)[None], 77), -1).astype(np.uint8)
PHOTO = Image.fromarray(RAMP)  # 48x48, no symmetry


@pytest.fixture
def folder(tmp_path):
    """A folder with one good photo."""
    PHOTO.save(tmp_path / "a.png")
    return tmp_path


case = pytest.mark.case  # the numbers of the catalogue in tests/reliability


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.case("I08")
def test_photos_come_sorted_with_hash_size_mode_and_format(tmp_path, caplog):
    for name in ("b.jpg", "a.png", "C.WEBP", "d.tif", "e.bmp", "f.gif"):
        Image.fromarray(np.roll(RAMP, ord(name[0]), 0)[:, :40]).save(tmp_path / name)
    PHOTO.save(tmp_path / "g.jpg", "PNG")  # a PNG named .jpg
    photos = scan(tmp_path, 32)
    assert [p.path.name for p in photos] == ["C.WEBP", "a.png", "b.jpg", "d.tif", "e.bmp", "f.gif", "g.jpg"]
    assert [p.format for p in photos] == ["WEBP", "PNG", "JPEG", "TIFF", "BMP", "GIF", "PNG"]
    assert {p.size for p in photos[:6]} == {(40, 48)} and len({p.sha256 for p in photos}) == 7
    assert said(caplog) == []
    assert scan(tmp_path, 32) == photos


@pytest.mark.case("I04")
def test_what_is_no_photo_is_passed_over(folder, caplog):
    for name in (".DS_Store", "Thumbs.db", ".hidden.png", "a.txt", "metadata.jsonl", "labels.json"):
        (folder / name).write_bytes(b"\0not an image")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "sub.png").mkdir()
    assert [p.path.name for p in scan(folder, 32)] == ["a.png"] and said(caplog) == []
    (folder / "notes.md").write_text("x")
    assert len(scan(folder, 32)) == 1 and "1 files that are no photos passed over: notes.md" in said(caplog)[0]


@pytest.mark.case("I01", "I02", "I03")
def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(InputError, match="missing: no such folder"):
        scan(tmp_path / "missing", 32)
    with pytest.raises(InputError, match="is empty"):
        scan(tmp_path, 32)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="holds no photo among its 1 files"):
        scan(tmp_path, 32)
    with pytest.raises(InputError, match="a.txt: is not a folder"):
        scan(tmp_path / "a.txt", 32)


def encoded(fmt, image=PHOTO, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(side):
    """A small valid PNG header that claims side x side pixels of one bit."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


BAD = [  # name, case, content, words of the refusal
    ("zero.jpg", case("I05"), b"", "is empty .0 bytes"),
    ("text.jpg", case("I07"), b"hello world", "is not a JPEG, PNG"),
    ("vector.png", case("I24"), b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a JPEG, PNG"),
    ("script.jpg", case("I24"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a JPEG, PNG"),
    ("avif.png", case("I19"), encoded("AVIF"), "is not a JPEG, PNG"),
    ("photo.heic", case("I19"), b"\0\0\0\x18ftypheic", "is a .heic file"),
    ("doc.pdf", case("I24"), b"%PDF-1.4", "is a .pdf file"),
    ("bomb.png", case("I22"), bomb(12_000), "is 12000x12000, more than the limit of 89478485 pixels"),
    ("worse.png", case("I22"), bomb(60_000), "has more than the limit of 89478485 pixels"),
    ("float.tif", case("I16"), encoded("TIFF", Image.fromarray(np.ones((40, 40), np.float32))), "holds float values"),
    ("int.tif", case("I16"),
        encoded("TIFF", Image.fromarray(np.ones((40, 40), np.int32))), "holds signed or 32-bit values",
    ),
    ("lab.tif", (), encoded("TIFF", Image.new("LAB", (40, 40))), "holds CIELAB values"),
    ("thin.png", case("I21"),
        encoded("PNG", Image.new("RGB", (300, 32))), "is 300x32 pixels, longer than 1:8 -> crop it",
    ),
    ("tiny.png", case("I20"),
        encoded("PNG", Image.new("RGB", (40, 7))), "is 40x7 pixels, less than a quarter of --resolution 32",
    ),
    *(
        (f"cut.{fmt.lower()}", case("I06"), encoded(fmt)[: len(encoded(fmt)) // 2], "cannot be decoded|is not a JPEG")
        for fmt in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
    ),
]


@pytest.mark.parametrize(
    "name, data, words", [pytest.param(name, *rest, marks=number) for name, number, *rest in BAD]
)
def test_a_file_that_cannot_be_used_is_named(folder, name, data, words):
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: .*({words})") as caught:
        scan(folder, 32)
    assert "\n" not in str(caught.value)


def test_damaged_bytes_anywhere_give_a_photo_or_a_named_refusal(folder):
    """Fuzz: whatever a decoder raises, nothing but an InputError comes out."""
    draw, refused = np.random.default_rng(0), 0
    for fmt in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"):
        good = encoded(fmt, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
        for _ in range(40):
            data = bytearray(good)
            for place in draw.integers(0, min(len(data), 400), 4):
                data[place] = draw.integers(256)
            (folder / "fuzz.png").write_bytes(data)
            try:
                scan(folder, 32)
                read(folder / "fuzz.png")
            except InputError as error:
                assert "fuzz.png: " in str(error)
                refused += 1
    assert 20 < refused < 240


@pytest.mark.case("I25")
def test_links_and_special_files(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.png"
    PHOTO.save(outside)
    for name, target, words in (
        ("out.png", outside, "is a link out of the folder"),
        ("loop.png", folder / "loop.png", "is a broken or circular link"),
        ("gone.png", folder / "nothing", "is a broken or circular link"),
    ):
        (folder / name).symlink_to(target)
        with pytest.raises(InputError, match=f"{name}: {words}"):
            scan(folder, 32)
        (folder / name).unlink()
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(InputError, match="pipe.png: is not a regular file"):
        scan(folder, 32)


@pytest.mark.case("I26")
def test_an_unreadable_file_is_named(folder, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)  # a mode would not stop root
    with pytest.raises(InputError, match="a.png: cannot be read .Permission denied"):
        scan(folder, 32)


@pytest.mark.case("I28")
def test_names_of_every_kind(folder, caplog):
    names = ["🐶.png", "new\nline.png", "שלום.png", "x" * 251 + ".png", "a b'c\".png", "\x1b[31m.png"]
    for i, name in enumerate(names):
        Image.fromarray(np.roll(RAMP, i + 1, 1)).save(folder / name)
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write(encoded("PNG", Image.new("RGB", (40, 40))))
    assert len(scan(folder, 64)) == 8
    assert len(said(caplog)) == 8 and all(line.isprintable() for line in said(caplog))


def animation(fmt):
    frames = [PHOTO, Image.fromarray(RAMP[::-1].copy())]
    return encoded(fmt, frames[0], save_all=True, append_images=frames[1:], duration=50)


@pytest.mark.parametrize(
    "name, data, words",
    [
        pytest.param("x.gif", animation("GIF"), "holds several frames", marks=case("I18")),
        pytest.param("x.webp", animation("WEBP"), "holds several frames", marks=case("I18")),
        pytest.param("x.png", animation("PNG"), "holds several frames", marks=case("I18")),
        ("x.tif", animation("TIFF"), "holds several frames"),
        pytest.param(
            "x.png", encoded("PNG", Image.new("RGB", (40, 20))), "is 40x20 pixels, below --resolution 32",
            marks=case("I20"),
        ),
        pytest.param("x.png", encoded("PNG"), "is the same file as a.png", marks=case("I27")),
        pytest.param(
            "x.jpg", encoded("JPEG", exif=b"Exif\0\0garbage!"), "its EXIF block is damaged",
            marks=case("I31"),
        ),
        ("x.jpg", encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40), "its EXIF block is damaged"),
        pytest.param(
            "x.jpg", encoded("JPEG", icc_profile=b"rubbish" * 30), "its colour profile is damaged",
            marks=case("I31"),
        ),
        (
            "x.jpg",
            encoded("JPEG", PHOTO.convert("L"), icc_profile=images._SRGB.tobytes()),
            "its colour profile is damaged",
        ),
    ],
)
def test_a_usable_oddity_is_one_warning_by_name(folder, caplog, name, data, words):
    (folder / name).write_bytes(data)
    assert len(scan(folder, 32)) == 2
    assert len(said(caplog)) == 1 and f"/{name}: {words}" in said(caplog)[0]
    assert read(folder / name).mode == "RGB"


def test_a_phones_two_picture_file_is_no_animation(folder, caplog):
    (folder / "phone.jpg").write_bytes(encoded("MPO", PHOTO, save_all=True, append_images=[PHOTO.reduce(2)]))
    assert [p.format for p in scan(folder, 32)] == ["PNG", "MPO"] and said(caplog) == []


@pytest.mark.case("F20", "F21")
def test_verify_notices_a_changed_and_a_deleted_file(folder):
    (photo,) = scan(folder, 32)
    verify(photo)
    data = bytearray(photo.path.read_bytes())
    data[-20] ^= 1
    photo.path.write_bytes(data)
    with pytest.raises(DataChanged, match="a.png: has changed since the run began"):
        verify(photo)
    photo.path.unlink()
    with pytest.raises(DataChanged, match="a.png: is gone since the run began"):
        verify(photo)
