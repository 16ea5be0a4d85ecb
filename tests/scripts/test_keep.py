"""--drift_steps and --keep best: each seen in what a run leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from script_runs import lines, refused, state

import vislora
from vislora import world
from vislora.io import LORA_FILE, read
from vislora.metrics.subjects import of_world as of_the_world
from vislora.sweep import keep as rule

BEST = ("--adapter", "lora", "--learning_rate", "0.02", "--max_train_steps", "5", "--instance_prompt", "a x dog",
        "--class_prompt", "a dog", "--validation_prompt", "x dog, near", "a cat", "x dog, far", "a x dog",
        "--num_validation_images", "1", "--validation_inference_steps", "1", "--checkpointing_steps", "2",
        "--keep", "best")  # fmt: skip


@pytest.fixture
def of_world(small_world, model, monkeypatch):
    """The random Stable Diffusion is the world's, whose tiny-dino is random too."""
    monkeypatch.setattr(world, "TINY_SD", model)


@pytest.fixture
def pipe_of(model):
    from diffusers import StableDiffusionPipeline

    return lambda: StableDiffusionPipeline.from_pretrained(model, safety_checker=None, feature_extractor=None)


def kept_in(folder: str) -> tuple[int, list[dict]]:
    told = json.loads(Path(folder, "metrics.json").read_text())
    return told["kept_step"], told["keep_curve"]


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return read(Path(folder) / "adapter/adapter.safetensors")[0]


def saved(folder: str, step: int, average: bool = False) -> dict[str, torch.Tensor]:
    stem, prefix = ("ema", "average|") if average else ("adapter", "")
    found = read(Path(folder, f"checkpoints/checkpoint-{step}/{stem}.safetensors"))[0]
    return {name.removeprefix(prefix): t for name, t in found.items() if name != "steps"}


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())


def export_equals(pipe_of, folder: str) -> None:
    """The file for stock tools holds what the folder's adapter does."""
    ours, theirs = (vislora.load(pipe_of(), Path(folder, part)).deltas() for part in ("adapter", LORA_FILE))
    assert ours.keys() == theirs.keys() and len(ours) == 32
    assert all(torch.allclose(delta, theirs[name], rtol=1e-4, atol=1e-7) for name, delta in ours.items())
    assert any(delta.norm() > 0 for delta in ours.values())


def drifts(folder: str) -> dict[int, float]:
    return {line["step"]: line["drift_denoising"] for line in lines(folder) if "drift_denoising" in line}


def test_drift_is_logged_and_changes_nothing(run):
    usual = ("--adapter", "pissa", "--learning_rate", "0.01", "--max_train_steps", "4", "--checkpointing_steps", "2",
             "--train_text_encoder")  # fmt: skip
    run(*usual, "--output_dir", "plain")
    run(*usual, "--output_dir", "watched", "--drift_steps", "2", "--logging_steps", "3")
    assert equal(state("plain", 4), state("watched", 4)) and equal(tensors("plain"), tensors("watched"))
    found = drifts("watched")
    assert list(found) == [2, 4] and 0 < found[2] < found[4] and not drifts("plain")
    shutil.rmtree("watched/checkpoints/checkpoint-4")
    run(*usual, "--output_dir", "watched", "--drift_steps", "1", "--resume_from_checkpoint", "latest")
    again = drifts("watched")
    assert list(again) == [2, 3, 4] and again[4] == pytest.approx(found[4], rel=1e-5)
    assert equal(state("plain", 4), state("watched", 4))


def test_the_best_checkpoint_is_the_run(run, script, of_world, pipe_of, monkeypatch, capsys):
    run(*BEST, "--output_dir", "out", "--drift_steps", "1")
    step, curve = kept_in("out")
    assert [point["step"] for point in curve] == [2, 4, 5] and all(len(point["fidelity"]) == 2 for point in curve)
    logged = drifts("out")
    assert all(point["drift_denoising"] == pytest.approx(logged[point["step"]], rel=1e-5) for point in curve)
    points = [rule.Point(p["step"], tuple(p["fidelity"]), p["drift_denoising"]) for p in curve]
    assert step == rule.keep(points).step < 5
    assert equal(tensors("out"), saved("out", step)) and not equal(tensors("out"), saved("out", 5))
    export_equals(pipe_of, "out")
    assert f"after step {step}: its denoising drift" in Path("out/README.md").read_text()
    assert f"kept       step {step} of 5" in capsys.readouterr().out
    with Image.open("out/keep.png") as image:
        assert image.width > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 50

    backward = script.Run.backward

    def kill(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(self, step)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(script.Run, "backward", kill)
        run(*BEST, "--output_dir", "cut")
    assert Path("cut/checkpoints/checkpoint-3").is_dir()  # of the signal's, which is none to choose from
    shutil.rmtree("cut/samples/step-000002")  # as if the run had been killed before they were drawn
    run(*BEST, "--output_dir", "cut", "--resume_from_checkpoint", "latest")
    assert kept_in("cut") == (step, curve) and equal(tensors("cut"), tensors("out"))

    other = ("--validation_prompt", "x red dog", "x")  # beside the others
    run(*BEST, *other, "--output_dir", "cut", "--resume_from_checkpoint", "latest")  # at its end: all is drawn again
    run(*BEST, *other, "--output_dir", "fresh")
    assert kept_in("cut") == kept_in("fresh") and kept_in("cut")[1] != curve
    run(*BEST, "--keep", "last", "--output_dir", "cut", "--resume_from_checkpoint", "latest")
    assert "kept_step" not in json.loads(Path("cut/metrics.json").read_text()) and not Path("cut/keep.png").exists()
    assert equal(tensors("cut"), saved("out", 5))


@pytest.mark.parametrize("adapter", ["lora", "adalora", "full"])
def test_averages_and_every_kind_of_adapter_can_be_kept(run, of_world, pipe_of, monkeypatch, adapter):
    scores = {"step-000002": 0.2, "step-000004": 0.9, "step-000005": 0.9}
    seen = []

    def fidelity(stage, photos, prompts, dino, cache):
        seen.append((stage.name, len(photos), tuple(prompts), sorted(p.name for p in stage.iterdir())))
        return (scores[stage.name], scores[stage.name] / 2)

    monkeypatch.setattr(rule, "fidelity", fidelity)
    average = () if adapter == "adalora" else ("--use_ema", "--ema_decay", "0.5")
    run(*BEST, "--adapter", adapter, "--learning_rate", "0.001", *average, "--output_dir", "out")
    files = ["00-00.png", "01-00.png", "02-00.png", "03-00.png"]
    assert seen == [(name, 3, (0, 2), files) for name in scores]
    step, curve = kept_in("out")
    assert step == 4 and curve[1]["drift_denoising"] < curve[2]["drift_denoising"]
    own, expected = tensors("out"), saved("out", 4)
    if average:
        assert not equal(own, expected)
        expected |= saved("out", 4, average=True)
    assert equal(own, expected) and not equal(own, saved("out", 5))
    if adapter == "lora":
        export_equals(pipe_of, "out")
    assert json.loads(Path("out/metrics.json").read_text())["diffusers_export_error"] < 1e-3


def test_a_checkpoint_that_cannot_be_scored_is_left_out(run, of_world, caplog):
    run(*BEST, "--output_dir", "out")
    shutil.rmtree("out/checkpoints/checkpoint-4")
    Path("out/checkpoints/checkpoint-2/adapter.safetensors").write_bytes(b"cut")
    run(*BEST, "--output_dir", "out", "--resume_from_checkpoint", "checkpoint-5")
    assert kept_in("out")[0] == 5 and [point["step"] for point in kept_in("out")[1]] == [5]
    assert equal(tensors("out"), saved("out", 5))
    left = [r.getMessage() for r in caplog.records if "left out of the choice" in r.getMessage()]
    assert len(left) == 2 and "checkpoint-2" in left[0] and "checkpoint-4" in left[1]


def test_what_is_missing_is_one_line(run, capsys, of_world, monkeypatch, tmp_path):
    Path("one.json").write_text('[{"instance_data_dir": "photos", "instance_prompt": "a x dog"}]')
    for flags, words in (
        (("--validation_steps", "3"), ("every 3 steps", "every 2", "--validation_steps 2")),
        (("--checkpoints_total_limit", "2"), ("--checkpoints_total_limit 2",)),
        (("--class_prompt", "a x dog"), ("do not differ by a token",)),
        (("--drift_steps", "0"), ("--drift_steps", "below 1")),
        (("--keep", "bets"), ("bets", "best")),
    ):
        line = refused(run, capsys, *BEST, *flags)
        assert all(word in line for word in words), line
    start, end = BEST.index("--validation_prompt"), BEST.index("--num_validation_images")
    bare = (*BEST[:start], *BEST[end:])
    assert "give --validation_prompt" in refused(run, capsys, *bare)
    for prompts in (("a cat", "a box"), ("a cat", "a x dog.")):
        assert "holds the token 'x'" in refused(run, capsys, *bare, "--validation_prompt", *prompts)
    assert "needs --class_prompt" in refused(run, capsys, *(w for w in BEST if w not in ("--class_prompt", "a dog")))
    assert "trains nothing" in refused(run, capsys, "--adapter", "none", *BEST[4:])
    few = [word for word in BEST if word not in ("--instance_prompt", "a x dog", "--class_prompt", "a dog")]
    assert "several" in refused(run, capsys, *few, "--concepts_list", "one.json")
    with monkeypatch.context() as patch:
        patch.setattr(world, "TINY_SD", Path("elsewhere"))  # the papers' network then, and there is no hub
        assert "--keep best: vit_small_patch16_224.dino cannot be loaded" in refused(run, capsys, *BEST)
    monkeypatch.setattr(world, "ROOT", tmp_path)
    assert "tiny-dino is needed" in refused(run, capsys, *BEST)


def test_the_world_s_run_is_not_judged_by_prompts_that_are_reported():
    given = world.defaults("dreambooth")
    own = [p for p in given["validation_prompt"] if "sks" in p and p != given["instance_prompt"]]
    noun = given["class_prompt"].split()[-1]
    reported = {template.format(f"sks {noun}") for template in of_the_world()[0].templates}
    assert len(own) > 1 and not reported & set(own)
