"""Bad input that no other room tests: archives, decoders that stay shut, large and many photos, tokens, devices."""

from __future__ import annotations

import io
import logging
import os
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script_runs import lines, photograph, refused

from vislora.data.captions import warn_of_token
from vislora.data.images import read, scan
from vislora.diffusion import dataset
from vislora.errors import InputError
from vislora.language import rows
from vislora.training import cores
from vislora.training.random import batch_indices
from vislora.vision import data

case = pytest.mark.case


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def zipped(path: Path, *members: tuple[str, bytes, int]) -> None:
    """A zip of (name, content, mode) members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, mode in members:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)


def devices(path: Path) -> None:
    """A tar with a device and a hard link to a file outside."""
    with tarfile.open(path, "w") as archive:
        for name, kind, target in (("null.png", tarfile.CHRTYPE, ""), ("a.png", tarfile.LNKTYPE, "/etc/passwd")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)


ARCHIVES = [
    pytest.param("up.zip", lambda p: zipped(p, ("../out.png", b"x", 0o644)), marks=case("I32")),
    pytest.param("link.zip", lambda p: zipped(p, ("/tmp/out.png", b"x", 0o644), ("l", b"/etc", 0o120777)),
                 marks=case("I33")),
    pytest.param("bomb.zip", lambda p: zipped(p, ("a.bmp", bytes(50_000_000), 0o644)), marks=case("I34")),
    pytest.param("devices.tar", devices, marks=case("I35")),
]  # fmt: skip


@pytest.mark.parametrize("name, make", ARCHIVES)
def test_archives_are_refused_and_never_unpacked(tmp_path, monkeypatch, name, make):
    """As the folder of photos, beside photos, as a set of classes and as a table of rows."""
    photograph(tmp_path / "photos", 1)
    make(tmp_path / name)
    (tmp_path / "photos" / name).write_bytes((tmp_path / name).read_bytes())
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        for module, word in ((zipfile, "ZipFile"), (tarfile, "open")):
            patch.setattr(module, word, lambda *_, **__: pytest.fail("an archive was opened"))
        for call in (lambda: scan(tmp_path / name, 32), lambda: scan(tmp_path / "photos", 32)):
            with pytest.raises(InputError, match=rf"{name}: is an archive, which is not unpacked"):
                call()
        with pytest.raises(InputError, match=name):
            data.load(str(tmp_path / name), "train")
        with pytest.raises(InputError, match=name):
            rows.read_rows(str(tmp_path / name))
    assert sorted(tmp_path.rglob("*")) == before


@case("I24")
@pytest.mark.parametrize("name", ["a.eps", "a.png", "a.jpg", "a.svg", "a.pdf"])
def test_the_decoders_of_documents_stay_shut(tmp_path, monkeypatch, name):
    Image.init()
    for kind in ("EPS", "PDF", "PSD", "WMF"):
        if kind in Image.OPEN:
            monkeypatch.setitem(Image.OPEN, kind, (lambda *_: pytest.fail("a decoder ran"), lambda _: True))
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match=f"{name}: is "):
        scan(tmp_path, 32)


@case("I23")
def test_large_photos_are_read_one_at_a_time(tmp_path):
    side = 5_000
    for i in range(3):
        Image.new("L", (side, side), i).save(tmp_path / f"{i}.png", compress_level=1)
    scan(tmp_path, 32)  # the allocator's arenas are grown by now
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    start = resident()
    photos = scan(tmp_path, 32)
    for photo in photos:
        assert read(photo.path).size == (side, side)
    grown = resident() - start
    assert grown < 5 * 3 * side**2 / 2**20, f"{grown:.0f} MiB"  # of the one photo's 72 MiB as RGB


def resident() -> float:
    """The most MiB that this process has held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def many(folder: Path, count: int) -> float:
    """CPU seconds of the scan of so many different photos."""
    folder.mkdir()
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "BMP")
    header = stream.getvalue()[:-8]
    for i in range(count):
        (folder / f"{i:06}.bmp").write_bytes(header + i.to_bytes(8, "big"))
    start = time.process_time()
    assert len(scan(folder, 32)) == count
    return time.process_time() - start


@case("I29")
def test_the_time_of_a_scan_goes_with_the_number_of_photos(tmp_path):
    few, more = many(tmp_path / "few", 500), many(tmp_path / "more", 2_000)
    assert more < 10 * few and more < 20  # four times as many: 16 times the time if it went with the square


@case("I29")
@pytest.mark.slow
def test_a_hundred_thousand_photos_are_scanned(tmp_path):
    spent = many(tmp_path / "photos", 100_000)
    print(f"\n100,000 photos: {spent:.0f} s of CPU time")
    assert spent < 300


@case("P11")
def test_captions_without_the_token_are_warned_of_once(run, place, caplog):
    for i, text in enumerate(("a sks dog", "a dog, sks.", "a dog", "my dog")):
        (place / "photos" / f"{i}.txt").write_text(text)
    photograph(place / "more", 1, seed=3)
    os.rename(place / "more" / "0.png", place / "photos" / "3.png")
    run("--instance_prompt", "a sks dog", "--class_prompt", "a dog", "--with_prior_preservation", "--prior_source",
        "base_output", "--dry_run")  # fmt: skip
    assert [line for line in said(caplog) if "token" in line] == [
        "photos: 2 of 4 captions lack the token 'sks', first 'a dog'"
    ]
    caplog.clear()
    warn_of_token(["a dog"], "a dog", "a dog", "photos")
    assert "has no word that the class prompt lacks" in said(caplog)[0]
    caplog.clear()
    warn_of_token(["a sks dog"], "a sks dog", "a dog", "photos")
    warn_of_token(["a cat"], "a sks dog", None, "photos")
    assert said(caplog) == []


@case("C07")
def test_a_batch_larger_than_the_data_takes_every_photo_as_often(run, monkeypatch, capsys):
    """No batch is dropped here, so none can be too large: it goes round the photos."""
    seen = []

    def watched(*arguments):
        found = batch_indices(*arguments)
        seen.extend(found)
        return found

    monkeypatch.setattr(dataset, "batch_indices", watched)
    run("--train_batch_size", "6", "--max_train_steps", "2", "--output_dir", "out")
    assert len(lines("out")) == 2 and sorted(seen) == sorted([0, 1, 2] * 4)
    line = refused(run, capsys, "--dataloader_drop_last")
    assert "--dataloader_drop_last: unknown flag" in line


@case("C11")
@pytest.mark.parametrize("out", ["photos/out", "photos", "photos/../photos/deep/er"])
def test_a_run_does_not_write_into_its_data(run, capsys, out):
    before = sorted(Path().rglob("*"))
    assert "lies in the data folder photos -> choose one outside" in refused(run, capsys, "--output_dir", out)
    assert sorted(Path().rglob("*")) == before


@case("C11")
def test_nor_do_numbered_runs(run, capsys, monkeypatch):
    monkeypatch.chdir("photos")
    assert "runs: lies in the data folder ." in refused(run, capsys, "--instance_data_dir", ".")
    assert not Path("runs").exists()


@case("C12")
def test_more_processes_than_gpus_are_refused(run, capsys, monkeypatch):
    monkeypatch.setattr(cores.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="--num_processes: process 3 of this machine has no GPU: there are 2"):
        cores.require_device()
    assert "launch 2 a machine" in refused(run, capsys, "--output_dir", "out") and not Path("out").exists()
    for name, value in (("LOCAL_RANK", "1"), ("ACCELERATE_USE_CPU", "true")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            cores.require_device()


def test_pixels_of_the_scan_are_those_of_the_file(tmp_path):
    """The maker of `many` writes photos, and different ones."""
    many(tmp_path / "photos", 3)
    hashes = {photo.sha256 for photo in scan(tmp_path / "photos", 32)}
    assert len(hashes) == 3 and np.asarray(read(tmp_path / "photos" / "000001.bmp")).shape == (32, 32, 3)
