"""Faults and bad input in every script: what the other rooms try on one of them, or on the parts, is tried on all."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from data.test_images import BAD
from PIL import Image
from reliability.forks import load
from reliability.plays import SCRIPTS, USUAL, play, play_one_step, require_equal, stage, state
from safetensors.torch import load_file, save_file
from tiny_vit import coloured, hf_vit, image_folder, timm_vit

from vislora.training import checkpoint, resume
from vislora.training.run import RunFolder
from vislora.vision import task

case = pytest.mark.case
FOUR = ("--max_train_steps", "4")
RESUME = ("--resume_from_checkpoint", "latest")
BATCH = dict(zip(SCRIPTS, ("--train_batch_size",) * 2 + ("--per_device_train_batch_size",) * 2, strict=True))
# other targets; near one that is; a layer of a type that has no weight matrix
TARGETS = dict(zip(SCRIPTS, ("to_k", "fc1", "q_proj", "q_proj"), strict=True))
NEAR = dict(zip(SCRIPTS, ("to_qq", "fc_1", "q_prj", "q_prj"), strict=True))
NORMS = dict(zip(SCRIPTS, ("conv_norm_out", "norm1", "input_layernorm", "input_layernorm"), strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


module = functools.cache(load)
_whole: dict[str, dict] = {}


def whole(name: str) -> dict[str, torch.Tensor]:
    """The last state of the script's run that nothing happens to, whose folder is NAME-whole."""
    if name not in _whole:
        play(module(name), *FOUR, "--output_dir", f"{name}-whole")
        _whole[name] = state(f"{name}-whole", 4)
    return _whole[name]


def ends(name: str, capsys, *flags: str, status: int) -> str:
    """The script ends with this status and one line, which names the remedy; that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        play(module(name), *flags)
    said = capsys.readouterr().err
    told = [line for line in said.splitlines() if line.startswith("vislora: error:")]
    assert stop.value.code == status and len(told) == 1 and "->" in told[0] and "Traceback" not in said, said[-3000:]
    return told[0]


def refused(name: str, capsys, *flags: str) -> str:
    """The same with status 2, and nothing was written."""
    before = sorted(Path().rglob("*"))
    line = ends(name, capsys, *flags, status=2)
    assert sorted(Path().rglob("*")) == before
    return line


@case("F15", "F16", "F17", "F18", "F19")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_full_disk_ends_it_and_the_checkpoint_before_stands(name, capsys, monkeypatch):
    wanted, real, out = whole(name), os.fsync, Path(f"{name}-full")

    def full(handle):
        file = os.readlink(f"/proc/self/fd/{handle}")
        if ".checkpoint-2.tmp" in file and file.endswith(".safetensors"):
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        line = ends(name, capsys, *FOUR, "--output_dir", str(out), status=3)
    assert "checkpoint-2: could not be written (No space left on device)" in line
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert not (out / "adapter").exists()
    play(module(name), *FOUR, "--output_dir", str(out), *RESUME)
    require_equal(wanted, state(out, 4))


@case("F27")
@pytest.mark.parametrize("name", SCRIPTS)
def test_gradients_that_are_nan_end_it_and_what_was_saved_is_finite(name, capsys, monkeypatch):
    script, out, calls = module(name), Path(f"{name}-nan"), []
    backward = script.Run.backward

    def spoiled(self, *arguments):
        found = backward(self, *arguments)
        calls.append(0)
        if len(calls) > 1:
            held = self.tuned if name == "classification" else self.adapter
            for p in held.parameters():
                p.grad.mul_(float("nan"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "backward", spoiled)
        line = ends(name, capsys, *FOUR, "--adapter", "lora", "--output_dir", str(out), status=2)
    assert "--learning_rate: the loss or its gradient was not finite for 3 steps in a row" in line
    first, last = state(out, 1), state(out, 3)
    assert all(t.isfinite().all() for t in last.values())
    kept = [key for key in first if not key.startswith("ema")]
    assert kept and all(torch.equal(first[key], last[key]) for key in kept)


_OPENED: list[str] = []
_LISTENS: list[bool] = []


def _hook(event: str, args: tuple) -> None:
    if _LISTENS and event in ("open", "pickle.find_class"):
        _OPENED.append(f"{event} {args[0]}")


@functools.cache
def _install() -> None:
    sys.addaudithook(_hook)


@case("F23", "F29", "F40")
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_goes_on_from_the_newest_whole_checkpoint_past_damage_and_pickles(name, capsys, monkeypatch, caplog):
    wanted, script, out, calls = whole(name), module(name), Path(f"{name}-damaged"), []
    backward = script.Run.backward

    def spoiled(self, *arguments):
        calls.append(0)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has …")
        return backward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "backward", spoiled)
        line = ends(name, capsys, *FOUR, "--output_dir", str(out), status=3)
    assert "memory: there is not enough" in line and RESUME[0] in line
    newest = out / "checkpoints" / "checkpoint-3"
    file = sorted(newest.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for folder in (out, out / "checkpoints", newest, out / "checkpoints" / "checkpoint-2"):
        for ending in ("pkl", "pt", "bin"):
            (folder / f"evil.{ending}").write_bytes(b"cos\nsystem\n(S'touch was_run'\ntR.")
    _install()
    _OPENED.clear()
    _LISTENS.append(True)
    try:
        play(script, *FOUR, "--output_dir", str(out), *RESUME)
    finally:
        _LISTENS.clear()
    assert any("checkpoint-2/state.json" in event for event in _OPENED) and not Path("was_run").exists()
    assert not [event for event in _OPENED if "evil" in event or event.startswith("pickle")]
    told = [r.getMessage() for r in caplog.records if "resuming from" in r.getMessage()]
    assert len(told) == 1 and f"{file.name} is not the file that was saved" in told[0] and "checkpoint-2" in told[0]
    require_equal(wanted, state(out, 4))


@case("C10", "C13", "F25", "F33")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_is_gone_on_with_as_it_began_or_not_at_all(name, capsys, monkeypatch):
    wanted, out = whole(name), f"{name}-whole"
    more = (*FOUR, "--output_dir", out)
    assert "holds another run" in refused(name, capsys, *more)
    assert "no run is named" in refused(name, capsys, *FOUR, *RESUME)
    changed = ("--rank", "1", "--seed", "7", BATCH[name], "4", "--targets", TARGETS[name])
    line = refused(name, capsys, *more, *RESUME, *changed)
    assert "4 settings changed" in line and "rank was 2, is 1" in line and "seed was 0, is 7" in line
    assert re.search(rf"{BATCH[name][2:]} was \d, is 4", line) and "targets was " in line and TARGETS[name] in line
    with monkeypatch.context() as patch:
        patch.setattr(resume, "processes", lambda: 2)
        assert "the run has 1 processes, here are 2" in refused(name, capsys, *more, *RESUME)
    with RunFolder.create(out, "latest"):
        before = sorted(Path().rglob("*"))
        assert f"is in use by process {os.getpid()} on" in ends(name, capsys, *more, *RESUME, status=3)
        assert sorted(Path().rglob("*")) == before
    require_equal(wanted, state(out, 4))


@case("C01", "C02", "C03", "C04", "C05", "C08", "C09", "C11", "C14")
@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_settings_are_refused(name, capsys):
    Path("tags.yaml").write_text("rank: !!python/object/apply:os.system ['touch was_run']\n")
    inside = Path({"dreambooth": "photos"}.get(name, "colours")) / "out"
    within = [(("--output_dir", str(inside)), (str(inside), "lies in the data folder"))]
    for flags, words in (
        (("--rank", "0"), ("rank", "0")),
        (("--rank", "5000"), ("5000",)),
        (("--targets", NEAR[name]), (NEAR[name], "did you mean", TARGETS[name][0])),
        (("--targets", NORMS[name]), (NORMS[name], "Norm")),
        (("--learning_rate", "nan"), ("--learning_rate", "nan")),
        (("--learning_rate", "-1"), ("--learning_rate", "-1")),
        (("--learningrate", "1"), ("--learningrate", "--learning_rate")),
        (("--mixed_precision", "fp16"), ("--mixed_precision", "fp16", "bf16")),
        (("--adapter", "nb_lora", "--delta", "0"), ("delta", "0.0")),
        (("--adapter", "nb_lora", "--p", "0.5"), ("p", "0.5")),
        (("--config", "tags.yaml"), ("tags.yaml",)),
        *(within if name in SCRIPTS[:2] else ()),  # rows are read by the names of their files, whatever lies beside
    ):
        line = refused(name, capsys, *flags)
        assert all(word in line for word in words), line
    assert not Path("was_run").exists()


@case("A19")
@pytest.mark.parametrize("name", [*SCRIPTS, "hf_vit"])
def test_a_base_that_lacks_something_is_refused_by_name(name, tmp_path, capsys):
    if name == "hf_vit":
        name = "classification"
        hf_vit(timm_vit()).save_pretrained(tmp_path / "base")
    else:
        shutil.copytree(next(iter(USUAL[name].values())), tmp_path / "base")
    flag, files = next(iter(USUAL[name])), sorted((tmp_path / "base").rglob("*.safetensors"))
    file = files[0] if len(files) == 1 else tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    content, tensors = file.read_bytes(), load_file(file)
    file.write_bytes(content[:-100])
    assert "base" in refused(name, capsys, flag, str(tmp_path / "base"))
    lost = next(key for key in sorted(tensors) if key.endswith("weight") and "head" not in key)
    save_file({key: t for key, t in tensors.items() if key != lost}, file, metadata={"format": "pt"})
    assert lost in refused(name, capsys, flag, str(tmp_path / "base"))
    file.unlink()
    assert "base" in refused(name, capsys, flag, str(tmp_path / "base"))


@case("C07")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_batch_may_be_larger_than_the_data(name):
    play(module(name), "--max_train_steps", "1", BATCH[name], "40", "--output_dir", f"{name}-large")
    assert state(f"{name}-large", 1)


# ---- images and captions, which two of the scripts read

BY_NAME = [pytest.param(name, *rest, marks=number, id=name) for name, number, *rest in BAD]
SMALL = ("thin.png", "tiny.png")  # a classifier's images are of any shape


@pytest.mark.parametrize("file, content, words", BY_NAME)
def test_an_image_that_cannot_be_used_is_refused_before_a_model_loads(
    tmp_path, capsys, monkeypatch, file, content, words
):
    for name in ("dreambooth", "classification"):
        monkeypatch.setattr(module(name).models, "load", lambda *_, **__: pytest.fail("loaded too soon"))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "photos" / "0.png")
    image_folder(tmp_path / "classes", 2, train=5, test=1)
    for folder in (tmp_path / "photos", tmp_path / "classes" / "train" / "class1"):
        (folder / file).write_bytes(content)
    line = refused("dreambooth", capsys, "--instance_data_dir", str(tmp_path / "photos"))
    assert re.search(f"photos/{file}: .*({words})", line), line
    if file not in SMALL:
        line = refused("classification", capsys, "--dataset_name", str(tmp_path / "classes"))
        assert re.search(f"class1/{file}: .*({words})", line), line


@pytest.mark.parametrize("file, content, words", [
    pytest.param("0.txt", "a dog".encode("utf-16"), "0.txt: is UTF-16", marks=case("P02")),
    pytest.param("0.txt", "Zoë".encode("cp1252"), "0.txt: is not UTF-8", marks=case("P03")),
    pytest.param("0.txt", b" ", "0.txt: is an empty caption", marks=case("P05")),
    pytest.param("0.txt", b"a\0dog", r"0.txt: .*U\+0000", marks=case("P07")),
    pytest.param("0.txt", b"a dog", "1 of 2 photos have no caption: 1.png", marks=case("P08")),
    pytest.param("metadata.jsonl", b'{"file_name": "0.png", "text": "a"}\n{', "metadata.jsonl:2: is not JSON",
                 marks=case("P10")),
])  # fmt: skip
def test_a_caption_that_cannot_be_used_is_refused(tmp_path, capsys, file, content, words):
    for i in range(2):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / file).write_bytes(content)
    line = refused("dreambooth", capsys, "--instance_data_dir", str(tmp_path))
    assert re.search(words, line), line


@case("I04")
def test_what_systems_and_editors_leave_is_no_class_and_no_image(tmp_path):
    folder = image_folder(tmp_path / "set", 2, train=3, test=1)
    for name in (".DS_Store", "Thumbs.db", "class0/.hidden.png", "class0/._0.png", ".ipynb_checkpoints/0.png",
                 "class1/.ipynb_checkpoints/0.png"):  # fmt: skip
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        (folder / "train" / name).write_bytes(b"\0no image")
    (folder / ".git" / "x").mkdir(parents=True)
    found = task.data.load(str(folder), "train")
    assert found.classes == ("class0", "class1") and len(found) == 6
    assert len(task.data.load(str(folder), "train", labelled=False)) == 6


@case("F20", "F21")
@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("what, words", [
    ("deleted", "is gone since the run began"), ("changed", "has changed since the run began"),
])  # fmt: skip
def test_an_image_that_does_not_stay_as_it_was_ends_the_classifier(tmp_path, capsys, monkeypatch, what, words, workers):
    script, folder, calls = module("classification"), image_folder(tmp_path / "set", 3, train=6, test=2), []
    backward = script.Run.backward

    def spoiled(self, *arguments):
        calls.append(0)
        if len(calls) == 3:
            for i, image in enumerate(sorted((folder / "train").rglob("*.png"))):
                image.unlink()
                if what == "changed":
                    coloured(i, 77).save(image)
        return backward(self, *arguments)

    flags = ("--dataset_name", str(folder), "--dataloader_num_workers", workers, "--output_dir", str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "backward", spoiled)
        line = ends("classification", capsys, *flags, status=4)
    assert words in line and re.search(r"set/train/class\d/\d.png: ", line)
    names = {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert "checkpoint-2" in names and not (tmp_path / "out" / "adapter").exists()
    if what == "changed":  # nor is the run gone on with
        line = ends("classification", capsys, *flags, *RESUME, status=2)
        assert "has other images in train than the run began with" in line


@case("F35")
def test_the_number_of_loaders_changes_nothing(tmp_path, monkeypatch):
    wanted, flags = whole("classification"), (*FOUR, "--output_dir", str(tmp_path / "out"))
    assert play_one_step(module("classification"), monkeypatch, *flags, "--dataloader_num_workers", "2") == 143
    play(module("classification"), *flags, *RESUME, "--dataloader_num_workers", "1")
    require_equal(wanted, state(tmp_path / "out", 4))


def test_larger_sets_are_not_read_whole_and_a_damaged_image_is_told_when_it_is_drawn(tmp_path, capsys, monkeypatch):
    folder = image_folder(tmp_path / "set", 3, train=6, test=2)
    for image in (folder / "train" / "class0").iterdir():
        image.write_bytes(b"no image")
    monkeypatch.setattr(task, "WHOLE", 5)
    for workers in ("0", "1"):
        flags = ("--dataset_name", str(folder), "--dataloader_num_workers", workers, "--train_val_split", "0")
        line = ends("classification", capsys, *flags, "--output_dir", str(tmp_path / workers), status=2)
        assert re.search(r"class0/\d.png: is not a JPEG, PNG", line)


def test_a_run_that_is_cut_after_a_checkpoint_makes_up_what_comes_after_it(tmp_path, monkeypatch):
    """Scores, replies and images of the step itself: their lines are there once, and the best score is the best."""
    images = ("--validation_prompt", "a b", "--num_validation_images", "1", "--validation_inference_steps", "1",
              "--validation_steps", "1")  # fmt: skip
    for name, flags in (
        ("dreambooth", images), ("sequence_classification", ("--eval_steps", "1")),
        ("causal_lm", ("--eval_steps", "1", "--validation_split_percentage", "20", "--max_new_tokens", "2")),
    ):
        flags, ends_of = ("--max_train_steps", "3", *flags, "--output_dir"), []
        play(module(name), *flags, str(tmp_path / f"{name}-whole"))
        out = tmp_path / f"{name}-cut"
        save = module(name).Run.save

        def cut(self, step, save=save):
            save(self, step)
            if step == 2:
                raise KeyboardInterrupt

        def at_the_end(self, metrics):
            raise KeyboardInterrupt

        for holder, word, act in ((module(name).Run, "save", cut), (RunFolder, "write_metrics", at_the_end)):
            with monkeypatch.context() as patch:
                patch.setattr(holder, word, act)
                with pytest.raises(KeyboardInterrupt):
                    play(module(name), *flags, str(out), *(RESUME if out.exists() else ()))
        play(module(name), *flags, str(out), *RESUME)
        for folder in (tmp_path / f"{name}-whole", out):
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            scored = [{k: v for k, v in e.items() if k == "step" or k.startswith("eval_")} for e in lines]
            metrics = json.loads((folder / "metrics.json").read_text())
            best = {k: v for k, v in metrics.items() if "eval_" in k}
            ends_of.append((scored, best, sorted(p.name for p in folder.glob("samples/*"))))
        assert ends_of[0] == ends_of[1], name
        assert ends_of[0][2] if name != "sequence_classification" else any("best" in key for key in ends_of[0][1])
