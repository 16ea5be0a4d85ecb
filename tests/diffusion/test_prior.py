"""Class images: as many as asked, the same set after an interruption, and no file of the user's touched."""

import os

import pytest
from PIL import Image
from tiny_sd import tiny_sd

from vislora.diffusion import prior as module
from vislora.diffusion.models import load
from vislora.diffusion.prior import ensure_class_images
from vislora.errors import EnvironmentFault, InputError

PROMPT = "a photo of a dog"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return load(tiny_sd(tmp_path_factory.mktemp("tiny-sd")))


def make(models, folder, count, **changes):
    options = {"seed": 1, "batch_size": 2, "steps": 2, "progress": False} | changes
    return ensure_class_images(models, folder, options.pop("prompt", PROMPT), count, **options)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """The folder of an uninterrupted run: five images."""
    folder = tmp_path_factory.mktemp("whole") / "class"
    files = make(models, folder, 5)
    assert sorted(files) == sorted(folder.iterdir()) and len(set(files)) == 5
    return folder


def test_names_hold_index_and_hash_and_images_differ(whole):
    names = sorted(contents(whole))
    assert [name[:13] for name in names] == [f"class-{i:06d}-" for i in range(5)]
    seen = set()
    for file in whole.iterdir():
        with Image.open(file) as image:
            assert image.size == (32, 32)
            seen.add(image.tobytes())
    assert len(seen) == 5


def test_a_full_folder_makes_nothing(models, whole, monkeypatch):
    monkeypatch.setattr(module, "render", lambda *_, **__: pytest.fail("rendered"))
    before = contents(whole)
    assert make(models, whole, 5) == sorted(whole.iterdir())
    assert make(models, whole, 3) == sorted(whole.iterdir())[:3]
    assert contents(whole) == before


@pytest.mark.parametrize("lost", [[0], [1, 4], [0, 1, 2, 3, 4]])
def test_missing_images_are_made_again_to_the_bit(models, whole, tmp_path, lost):
    for i, (name, content) in enumerate(sorted(contents(whole).items())):
        if i not in lost:
            (tmp_path / name).write_bytes(content)
    make(models.pipeline(), tmp_path, 5)
    assert contents(tmp_path) == contents(whole)


def test_an_interrupted_run_goes_on_to_the_same_set(models, whole, tmp_path, monkeypatch):
    real, calls = module.render, []

    def interrupted(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(module, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(models, tmp_path, 5)
    assert len(contents(tmp_path)) == 2
    make(models, tmp_path, 5)
    assert contents(tmp_path) == contents(whole)


def test_a_crash_while_writing_leaves_no_half_image(models, whole, tmp_path, monkeypatch):
    def crash(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            make(models, tmp_path, 5)
    assert contents(tmp_path) == {}
    make(models, tmp_path, 5)
    assert contents(tmp_path) == contents(whole)


def test_the_users_files_count_and_stay_as_they_are(models, whole, tmp_path):
    Image.new("RGB", (40, 30), (1, 2, 3)).save(tmp_path / "rex.jpg")
    Image.new("RGB", (40, 30), (3, 2, 1)).save(tmp_path / "fido.PNG")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "broken.png").write_bytes((tmp_path / "rex.jpg").read_bytes()[:200])
    (tmp_path / "folder.png").mkdir()
    mine = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    files = make(models, tmp_path, 4)
    assert [file.name for file in files[:2]] == ["fido.PNG", "rex.jpg"]
    assert [file.name for file in files[2:]] == sorted(contents(whole))[:2]
    assert all(file.read_bytes() == content for file, content in mine.items())
    assert make(models, tmp_path, 1) == files[:1]


def test_a_truncated_image_of_ours_is_replaced(models, whole, tmp_path):
    for name, content in contents(whole).items():
        (tmp_path / name).write_bytes(content[: 300 if "000003" in name else None])
    make(models, tmp_path, 5)
    assert contents(tmp_path) == contents(whole)


def test_an_edited_image_of_ours_is_the_users(models, whole, tmp_path):
    for name, content in contents(whole).items():
        (tmp_path / name).write_bytes(content)
    edited = sorted(tmp_path.iterdir())[2]
    Image.new("RGB", (32, 32), (9, 9, 9)).save(edited)
    content = edited.read_bytes()
    files = make(models, tmp_path, 5)
    assert files[0] == edited and edited.read_bytes() == content and len(set(files)) == 5


def test_seed_and_prompt_decide(models, whole, tmp_path):
    make(models, tmp_path, 2, seed=2)
    assert not set(contents(tmp_path)) & set(contents(whole))
    with pytest.raises(InputError, match="holds class images of 'a photo of a dog', and 'a cat' is wanted"):
        make(models, whole, 5, prompt="a cat")


def test_bad_arguments(models, tmp_path):
    with pytest.raises(InputError, match="count=0"):
        make(models, tmp_path, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        make(models, tmp_path / "file", 1)
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        make(models, tmp_path / "file" / "below", 1)
