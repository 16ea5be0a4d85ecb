"""The classification script, whole, on random ViTs of 16 pixels and sets of noisy colours."""

from __future__ import annotations

import csv
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from script_runs import REPOSITORY, compiles, opened, refused
from tiny_vit import coloured, image_folder, parquet_folder, save_clip, save_timm

import vislora
from vislora import config
from vislora.errors import run_script
from vislora.io import read
from vislora.training import checkpoint
from vislora.vision import evaluate, heads, models
from vislora.vision.options import ClassificationOptions


@pytest.fixture(scope="module")
def script():
    return opened("train_scripts/classification.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a target set of three classes, and the source set of four that the model's own head names."""
    place = tmp_path_factory.mktemp("world")
    save_timm(place / "vit")
    image_folder(place / "target", 3, seed=5)
    parquet_folder(place / "source")
    return place


@pytest.fixture
def run(script, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*flags: str, without: tuple[str, ...] = ()) -> None:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        usual = {
            "--model_name_or_path": str(world / "vit"), "--dataset_name": str(world / "target"),
            "--source_dataset_name": str(world / "source"), "--max_train_steps": "4", "--train_batch_size": "6",
            "--train_val_split": "0.2", "--eval_steps": "2", "--logging_steps": "1", "--report_to": "none",
            "--adapter": "lora",
        }  # fmt: skip
        given = {*without, *(flag for flag in flags if flag.startswith("--"))}
        argv = [word for flag, value in usual.items() if flag not in given for word in (flag, value)]
        state = torch.random.get_rng_state()
        try:
            run_script(script.main, [*argv, *flags])
        finally:
            torch.random.set_rng_state(state)

    return call


def lines(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def metrics(folder: str) -> dict:
    return json.loads((Path(folder) / "metrics.json").read_text())


def test_a_run_leaves_everything_and_can_be_run_again(run, world):
    flags = ("--adapter", "nb_lora", "--rank", "2", "--p", "1", "--delta_ratio", "0.1", "--report_to", "tensorboard")
    run(*flags, "--knn")
    run("--config", "runs/0001/config.yaml", "--adapter", "nb_lora")
    for name in ("config.yaml", "adapter/adapter.safetensors", "head.safetensors", "best/head.safetensors", "curve.png",
                 "confusion.png", "confusion.csv", "per_class.csv", "source_per_class.csv", "metrics.json",
                 "README.md"):  # fmt: skip
        assert (Path("runs/0001") / name).is_file(), name
    assert any(Path("runs/0001/logs").iterdir())
    for name in ("adapter/adapter.safetensors", "head.safetensors"):
        first, second = (read(Path(f"runs/{n}") / name)[0] for n in ("0001", "0002"))
        assert all(torch.equal(t, second[k]) for k, t in first.items())

    said = metrics("runs/0001")
    assert said["trainable_parameters"] == 4 * (2 * (24 + 24) + 2) and said["head_parameters"] == 24 * 3 + 3
    assert said["geometric_mean"] == pytest.approx((said["source_accuracy"] * said["target_accuracy"]) ** 0.5)
    assert said["forgetting"] == pytest.approx(said["source_accuracy_before"] - said["source_accuracy"])
    assert 0 < said["nuclear_ratio"] <= 0.1 * 1.00001 and 0 < said["source_feature_cka"] <= 1 + 1e-9
    assert said["images_per_second"] > 0 and said["peak_memory_mib"] > 0
    knn = said["source_knn20_accuracy"]
    assert said["geometric_mean_knn20"] == pytest.approx((knn * said["target_accuracy"]) ** 0.5)
    assert said["arithmetic_mean_knn20"] == pytest.approx((knn + said["target_accuracy"]) / 2)
    with open("runs/0001/source_per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["class"] for r in rows] == [f"thing{i}" for i in range(4)]
    assert sum(float(r["forgetting"]) for r in rows) / 4 == pytest.approx(said["forgetting"], abs=1e-5)
    lost = said["source_knn20_accuracy_before"] - knn
    assert sum(float(r["knn20_forgetting"]) for r in rows) / 4 == pytest.approx(lost, abs=1e-5)
    curve = [e for e in lines("runs/0001") if "source_accuracy" in e]
    assert [e["step"] for e in curve] == [0, 2, 4]
    assert curve[0]["source_accuracy"] == said["source_accuracy_before"]
    assert curve[0]["source_knn20_accuracy"] == said["source_knn20_accuracy_before"]  # all of it is few enough here
    assert curve[-1]["source_knn20_accuracy"] == knn and knn > 1 / 4
    assert curve[0]["source_feature_cka"] == pytest.approx(1, abs=1e-6)
    assert curve[-1]["source_feature_cka"] == pytest.approx(said["source_feature_cka"], abs=1e-9)
    both = curve[-1]["validation_accuracy"] * knn
    assert curve[-1]["geometric_mean_knn20"] == pytest.approx(both**0.5)
    card = Path("runs/0001/README.md").read_text()
    assert said["preprocess"]["size"] == 16 and said["preprocess"]["squash"] is False
    assert "short side to 16, middle 16 pixels, bicubic, mean (0.5, 0.5, 0.5)" in card
    assert "curve.png" in card and "0.1 times the weight's own norm" in card and "source accuracy after" in card

    # what the card says to do gives the scores of the run
    tower = models.load(str(world / "vit"))
    vislora.load(tower.model, "runs/0001/adapter")
    head = load_file("runs/0001/head.safetensors")
    from vislora.vision import augment, data

    test, fit = data.load(str(world / "target"), "test"), augment.evaluation(tower.preprocess)
    with torch.no_grad():
        x = torch.stack([fit(test.read(i)) for i in range(len(test))])
        guess = (tower(x) @ head["weight"].T + head["bias"]).argmax(-1)
    assert (guess == torch.tensor(test.labels)).double().mean().item() == pytest.approx(said["target_accuracy"])


def test_the_linear_probe_leaves_the_source_exactly_as_it_was(run):
    run("--adapter", "none", "--learning_rate", "0.05", "--max_train_steps", "8")
    said = metrics("runs/0001")
    assert said["source_accuracy"] == said["source_accuracy_before"] and said["forgetting"] == 0
    assert {e["source_accuracy"] for e in lines("runs/0001") if "source_accuracy" in e} == {said["source_accuracy"]}
    assert said["trainable_parameters"] == 0 and said["source_feature_cka"] == pytest.approx(1, abs=1e-12)
    assert not Path("runs/0001/adapter").exists() and said["target_accuracy"] > 1 / 3
    losses = [e["loss"] for e in lines("runs/0001") if "loss" in e]
    assert losses[-1] < losses[0]


def test_full_fine_tuning_trains_all_and_moves_the_source(run, world):
    run("--adapter", "full", "--learning_rate", "0.01", "--max_train_steps", "6")
    said = metrics("runs/0001")
    tower = models.load(str(world / "vit"))
    assert said["trainable_parameters"] == sum(p.numel() for p in tower.model.parameters())
    assert said["source_feature_cka"] < 0.999 and said["nuclear_ratio"] > 0
    vislora.load(tower.model, "runs/0001/adapter")


def test_the_cards_code_loads_the_weights_that_the_run_began_with(run, tmp_path):
    run("--model_name_or_path", "test_vit", "--pretrained", "random", "--seed", "7", "--adapter", "none",
        "--source_unlabelled", "--max_train_steps", "1", "--output_dir", "run")  # fmt: skip
    code = Path("run/README.md").read_text().split("```python\n")[1].split("```")[0]
    found = {"images": torch.zeros(1, 3, 160, 160)}
    assert "models.load('test_vit', pretrained='random', seed=7)" in code
    torch.rand(3)
    exec(compile(code, "README.md", "exec"), found)
    same = models.load("test_vit", pretrained="random", seed=7).state_dict()
    assert all(torch.equal(t, same[n]) for n, t in found["tower"].state_dict().items())
    assert found["logits"].shape == (1, 3)


def test_writing_checkpoints_is_no_part_of_a_steps_time(run, script, monkeypatch):
    save = script.Tuned.save
    monkeypatch.setattr(script.Tuned, "save", lambda *words: (time.sleep(2), save(*words)))
    run("--checkpointing_steps", "1", "--max_train_steps", "2", "--output_dir", "run")
    assert all(6 / e["images_per_second"] < 2 for e in lines("run") if "images_per_second" in e)


@pytest.fixture(scope="module")
def kept():
    return {}


def losses(run, script, monkeypatch, *flags: str) -> tuple[list[float], heads.Classifier]:
    """Of a short run without source data: the loss of each step, and the model as it stood after the last."""
    models_of = []
    monkeypatch.setattr(script.Run, "finish", lambda self, *words: models_of.append(self.model))
    run("--max_train_steps", "3", "--train_val_split", "0", "--eval_steps", "3", "--learning_rate", "0.05", *flags,
        without=("--source_dataset_name",))  # fmt: skip
    last = max(Path("runs").iterdir())
    return [e["loss"] for e in lines(str(last)) if "loss" in e], models_of[-1]


@pytest.mark.parametrize("flags", [
    ("--label_smoothing", "0.3"), ("--head_weight_decay", "9"), ("--head_lr", "0.5"), ("--random_erasing", "1"),
    ("--crop_scale", "0.3"), ("--auto_augment", "randaugment"), ("--hflip", "1"), ("--mixup_alpha", "1"),
    ("--cutmix_alpha", "1"), ("--mixed_precision", "bf16"), ("--warmup_steps", "2"), ("--seed", "1"),
], ids=lambda flags: flags[0])  # fmt: skip
def test_an_option_changes_the_losses(run, script, monkeypatch, kept, flags):
    if not kept:
        kept["losses"] = losses(run, script, monkeypatch)[0]
    found = losses(run, script, monkeypatch, *flags)[0]
    assert len(found) == 3 and found != pytest.approx(kept["losses"], abs=1e-6)


def test_layout_and_checkpointing_change_how_losses_come_about_and_not_the_losses(run, script, monkeypatch):
    plain, model = losses(run, script, monkeypatch)
    layout = {"memory_format": torch.channels_last}
    assert not model.tower.model.patch_embed.proj.weight.is_contiguous(**layout)
    found, model = losses(run, script, monkeypatch, "--channels_last")
    assert found == pytest.approx(plain, rel=1e-4) and model.tower.model.patch_embed.proj.weight.is_contiguous(**layout)
    found, model = losses(run, script, monkeypatch, "--gradient_checkpointing")
    assert found == pytest.approx(plain, rel=1e-4) and model.tower.model.grad_checkpointing


EVERYTHING = ("--adapter", "lora", "--rank", "2", "--dropout", "0.3", "--gradient_accumulation_steps", "2",
              "--auto_augment", "randaugment", "--hflip", "0.5", "--crop_scale", "0.5", "--random_erasing", "0.3",
              "--mixup_alpha", "0.2", "--cutmix_alpha", "1.0", "--label_smoothing", "0.1", "--ema_decay", "0.9",
              "--lr_scheduler", "cosine", "--head_lr", "0.02", "--head_weight_decay", "0.1", "--channels_last",
              "--gradient_checkpointing", "--learning_rate", "0.01", "--checkpointing_steps", "1",
              "--checkpoints_total_limit", "9", "--eval_steps", "1")  # fmt: skip


def test_resuming_at_any_step_is_exact(run):
    run(*EVERYTHING, "--output_dir", "whole")
    run(*EVERYTHING, "--output_dir", "parts")
    for step in (2, 3, 4):  # cut back to step 1, then go on
        for file in Path(f"parts/checkpoints/checkpoint-{step}").iterdir():
            file.unlink()
        Path(f"parts/checkpoints/checkpoint-{step}").rmdir()
    run(*EVERYTHING, "--output_dir", "parts", "--resume_from_checkpoint", "latest")
    whole, parts = (checkpoint.load(Path(f) / "checkpoints/checkpoint-4") for f in ("whole", "parts"))
    assert whole.tensors.keys() == {"tuned", "optimizer_adapter", "optimizer_head", "ema", "best"}
    for stem, tensors in whole.tensors.items():
        assert tensors.keys() == parts.tensors[stem].keys()
        assert all(torch.equal(t, parts.tensors[stem][k]) for k, t in tensors.items()), stem
    assert whole.state["best"] == parts.state["best"]
    for name in ("adapter/adapter.safetensors", "head.safetensors", "best/head.safetensors"):
        one, two = (load_file(Path(f) / name) for f in ("whole", "parts"))
        assert all(torch.equal(t, two[k]) for k, t in one.items()), name
    drop = ("images_per_second",)
    assert [{k: v for k, v in e.items() if k not in drop} for e in lines("whole")] == [
        {k: v for k, v in e.items() if k not in drop} for e in lines("parts")
    ]
    rates = [(e["adapter_lr"], e["head_lr"]) for e in lines("whole") if "head_lr" in e]
    assert all(head == pytest.approx(2 * own) for own, head in rates)
    saved = load_file("whole/head.safetensors")["weight"]  # the average, not the last step's
    assert torch.equal(saved, whole.tensors["ema"]["average|head.weight"])


def test_names_of_other_scripts_are_taken(run, script):
    words = ("--lr_warmup_steps", "3", "--label_smoothing_factor", "0.2", "--optim", "adamw", "--tf32", "--save_steps",
             "7", "--weight_decay", "0.3", "--max_steps", "4", "--per_device_train_batch_size", "6")  # fmt: skip
    o, _ = script.parse(["--model", "x", "--dataset_name", "y", *words])
    assert (o.warmup_steps, o.label_smoothing, o.allow_tf32, o.checkpointing_steps) == (3, 0.2, True, 7)
    assert o.warmup(12) == 0.25 and o.warmup(2) == 1 and ClassificationOptions().warmup(12) == 0.1
    run("--warmup_steps", "3", "--lr_scheduler", "linear", "--learning_rate", "0.3", "--output_dir", "run")
    rates = [e["adapter_lr"] for e in lines("run") if "adapter_lr" in e]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_another_run_is_not_gone_on_with(run, capsys):
    run("--output_dir", "run", "--checkpointing_steps", "2")
    resume = ("--output_dir", "run", "--resume_from_checkpoint", "latest")
    assert "mixup_alpha was 0.0, is 0.5" in refused(run, capsys, *resume, "--mixup_alpha", "0.5")
    assert "max_train_steps" in refused(run, capsys, *resume, "--max_train_steps", "9")


def test_neighbours_may_be_asked_for_by_a_resumed_run_and_other_labels_are_told(run, tmp_path, capsys):
    image_folder(tmp_path / "target", 3, seed=5)
    flags = ("--dataset_name", str(tmp_path / "target"), "--output_dir", "run", "--max_train_steps", "2")
    run(*flags, "--checkpointing_steps", "1")
    for file in Path("run/checkpoints/checkpoint-2").iterdir():
        file.unlink()
    Path("run/checkpoints/checkpoint-2").rmdir()
    resume = (*flags, "--checkpointing_steps", "1", "--resume_from_checkpoint", "latest")
    (tmp_path / "target/train/class0/0.png").rename(tmp_path / "target/train/class1/x.png")
    said = refused(run, capsys, *resume, "--knn")
    assert "has other classes or labels, or another order, in train" in said
    (tmp_path / "target/train/class1/x.png").rename(tmp_path / "target/train/class0/0.png")
    run(*resume, "--knn")
    assert "source_knn20_accuracy" in metrics("run")


def test_the_gradient_probe_is_logged_and_changes_neither_adapter_nor_head(run):
    usual = ("--gradient_accumulation_steps", "2", "--mixup_alpha", "0.2")
    for place, more in (("plain", ()), ("probed", ("--probe_steps", "1"))):
        run(*usual, *more, "--output_dir", place)
    for file in ("adapter/adapter.safetensors", "head.safetensors"):
        plain, probed = (read(Path(place) / file)[0] for place in ("plain", "probed"))
        assert all(torch.equal(t, probed[k]) for k, t in plain.items())
    said = [line for line in lines("probed") if "cosine" in line]
    assert [line["step"] for line in said] == [1, 2, 3] and all(-1 <= line["cosine"] <= 1 for line in said)


def test_the_gradient_probe_refuses_what_has_no_low_rank_update(run, capsys):
    assert "--probe_steps" in refused(run, capsys, "--adapter", "full", "--probe_steps", "1")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


def test_a_clips_zero_shot_accuracy_is_above_chance(run, tmp_path):
    world = REPOSITORY / "assets" / "world"
    (tmp_path / "words.txt").write_text("a photo of a {}\n")
    run("--model_name_or_path", str(world / "tiny-clip"), "--source_dataset_name", str(world / "objects"), "--adapter",
        "none", "--zero_shot_templates", str(tmp_path / "words.txt"), "--max_train_steps", "1", "--eval_steps", "1",
        "--max_source_samples", "48", "--output_dir", "run")  # fmt: skip
    said = metrics("run")
    assert said["source_accuracy_before"] == said["source_accuracy"] > 5 / 48


@pytest.mark.parametrize("method", ["lora", "nb_lora", "full", "none"])
def test_a_clip_tower_trains_and_its_zero_shot_accuracy_is_the_source(run, clip, method):
    flags = () if method == "none" else ("--learning_rate", "0.02")
    run("--model_name_or_path", str(clip), "--adapter", method, "--zero_shot_templates", "simple", *flags)
    said = metrics("runs/0001")
    assert lines("runs/0001")[0]["source_accuracy"] == said["source_accuracy_before"] and said["source_images"] == 16
    assert (said["source_feature_cka"] == pytest.approx(1, abs=1e-12)) == (method == "none")
    assert said["head_parameters"] == 12 * 3 + 3
    if method == "none":
        assert said["source_accuracy"] == said["source_accuracy_before"]
    if method == "lora":
        rank, sites = 16, 4
        assert said["trainable_parameters"] == sites * rank * (24 + 24)


@pytest.mark.slow
def test_two_processes_train_what_one_does(run, world, tmp_path):
    flags = ["--model_name_or_path", str(world / "vit"), "--dataset_name", str(world / "target"), "--adapter", "lora",
             "--source_dataset_name", str(world / "source"), "--max_train_steps", "3", "--train_val_split", "0.2",
             "--report_to", "none", "--cpu_threads", "1", "--eval_steps", "2", "--mixed_precision", "no"]  # fmt: skip
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    loopback = next((name for name in os.listdir("/sys/class/net") if name.startswith("lo")), "lo")
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
              "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
              "GLOO_SOCKET_IFNAME": loopback}  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "train_scripts/classification.py"), *flags, "--train_batch_size", "3",
               "--output_dir", str(tmp_path / "two")]  # fmt: skip
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE, text=True)
        for r in ("0", "1")
    ]
    try:
        errors = [rank.communicate(timeout=400)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)[-3000:]
    run(*flags, "--train_batch_size", "6", "--output_dir", "one")
    for name in ("adapter/adapter.safetensors", "head.safetensors"):
        one, two = load_file(Path("one") / name), load_file(tmp_path / "two" / name)
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=1e-3)
    one, two = metrics("one"), metrics(str(tmp_path / "two"))
    for name in ("target_images", "source_images", "source_accuracy", "target_accuracy"):
        assert two[name] == pytest.approx(one[name], abs=1e-9), name


def test_a_signal_ends_the_run_with_a_checkpoint(run, script, monkeypatch):
    run("--output_dir", "whole")
    original, calls = script.Run.backward, []

    def kill(self, batches):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "backward", kill)
        with pytest.raises(SystemExit) as stop:
            run("--output_dir", "cut")
    assert stop.value.code == 143 and Path("cut/checkpoints/checkpoint-2").is_dir() and not Path("cut/adapter").exists()
    run("--output_dir", "cut", "--resume_from_checkpoint", "latest")
    one, two = (load_file(f"{f}/adapter/adapter.safetensors") for f in ("whole", "cut"))
    assert all(torch.equal(t, two[k]) for k, t in one.items())


@pytest.mark.parametrize("flags", [
    ("--adapter", "lora_sb", "--rank", "2", "--init_batches", "2"),
    ("--adapter", "od_lora", "--rank", "2", "--init_rounds", "2", "--init_steps", "3"),
    ("--adapter", "sorsa", "--rank", "2", "--lr_scheduler", "cosine"),
    ("--adapter", "adalora", "--rank", "2", "--init_r", "3", "--tinit", "1", "--tfinal", "1"),
    ("--adapter", "lora", "--optimizer", "lora_pro", "--mixed_precision", "bf16"),
    ("--adapter", "vera", "--targets", "all-linear"),
])  # fmt: skip
def test_every_kind_of_method_trains(run, flags):
    run(*flags)
    said = metrics("runs/0001")
    assert said["trainable_parameters"] > 0 and said["largest_norm"] > 0
    losses = [e["loss"] for e in lines("runs/0001") if "loss" in e]
    assert len(losses) == 4 and all(loss == loss for loss in losses)


def test_the_best_on_validation_can_be_the_result(run):
    steps = ("--eval_steps", "1", "--max_train_steps", "8")
    run("--final_model", "best", "--learning_rate", "0.3", "--head_lr", "3.0", *steps)
    best, final = load_file("runs/0001/best/head.safetensors"), load_file("runs/0001/head.safetensors")
    assert all(torch.equal(t, best[k]) for k, t in final.items())
    said, scores = metrics("runs/0001"), [e for e in lines("runs/0001") if "validation_accuracy" in e]
    top = max(e["validation_accuracy"] for e in scores)
    assert said["best_validation_accuracy"] == top
    assert said["best_step"] == next(e["step"] for e in scores if e["validation_accuracy"] == top)


@pytest.mark.parametrize("ema", [(), ("--ema_decay", "0.5")])
def test_last_and_best_are_both_kept_and_scored_whichever_is_reported(run, ema):
    steps = ("--max_train_steps", "3", "--eval_steps", "1", "--learning_rate", "0.3", "--head_lr", "3.0")
    for final, other in (("last", "best"), ("best", "last")):
        run("--final_model", final, "--output_dir", final, *steps, *ema)
        assert Path(final, "last").is_dir() == (final == "best") and Path(final, "best").is_dir()
        assert {"target", "source"} == {k.split("_")[1] for k in metrics(final) if k.startswith(f"{other}_")
                                        and k.endswith("_accuracy") and k != "best_validation_accuracy"}  # fmt: skip
    for file in ("adapter/adapter.safetensors", "head.safetensors"):
        for one, two in (("last", "best/last"), ("best", "last/best"), ("best", "best/best")):
            first, second = (load_file(Path(place) / file) for place in (one, two))
            assert all(torch.equal(t, second[k]) for k, t in first.items()), (one, two, file)
    for name, other in (("last", "best"), ("best", "last")):
        for task in ("target", "source"):
            assert metrics(name)[f"{task}_accuracy"] == metrics(other)[f"{name}_{task}_accuracy"]


def test_where_the_last_is_the_best_the_test_images_are_scored_once(run, monkeypatch):
    scored = []
    whole = evaluate.Evaluator.target
    monkeypatch.setattr(evaluate.Evaluator, "target", lambda self, images: scored.append(images) or whole(self, images))
    run("--max_train_steps", "1", "--eval_steps", "1", "--learning_rate", "0.3", "--head_lr", "3.0")
    said = metrics("runs/0001")
    assert said["best_step"] == said["steps"] == 1
    assert [images is scored[-1] for images in scored].count(True) == 1 < len(scored)  # the others are of validation
    assert said["best_target_accuracy"] == said["target_accuracy"]
    assert said["best_source_accuracy"] == said["source_accuracy"]


def test_without_source_data_or_validation(run):
    run("--dry_run")
    assert not Path("runs").exists()
    argv = ["--max_train_steps", "2", "--train_val_split", "0"]
    run(*argv, without=("--source_dataset_name",))
    said = metrics("runs/0001")
    assert "source_accuracy" not in said and said["best_step"] == 0 and not Path("runs/0001/best").exists()


@pytest.fixture
def photos(tmp_path):
    """Images without labels, in no order."""
    (tmp_path / "photos").mkdir()
    for i in range(8):
        coloured(i % 4, i, 7).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def test_a_source_without_labels_is_watched_by_its_features(run, photos, capsys):
    flags = ("--source_dataset_name", str(photos), "--source_unlabelled", "--learning_rate", "0.05")
    run(*flags, "--checkpointing_steps", "2", "--output_dir", "run")
    said, drift = metrics("run"), [e["source_feature_cka"] for e in lines("run") if "source_feature_cka" in e]
    assert "source_accuracy" not in said and said["source_images"] == 8 and "linear CKA" in capsys.readouterr().out
    assert drift[0] == pytest.approx(1, abs=1e-6) and drift[-1] == pytest.approx(said["source_feature_cka"], abs=1e-9)
    assert len(drift) == 3 and drift[-1] < 0.9999
    for file in Path("run/checkpoints/checkpoint-4").iterdir():
        file.unlink()
    Path("run/checkpoints/checkpoint-4").rmdir()
    run(*flags, "--checkpointing_steps", "2", "--output_dir", "run", "--resume_from_checkpoint", "latest")
    assert [e["source_feature_cka"] for e in lines("run") if "source_feature_cka" in e] == drift
    assert "leave one of them out" in refused(run, capsys, *flags, "--knn")


def test_a_bare_backbone_is_watched_by_neighbours(run, tmp_path):
    save_timm(tmp_path / "bare", classes=0)
    run("--model_name_or_path", str(tmp_path / "bare"), "--knn", "--max_source_samples", "12", "--output_dir", "run")
    said, curve = metrics("run"), [e for e in lines("run") if "source_knn10_accuracy" in e]
    assert [e["step"] for e in curve] == [0, 2, 4] and "source_accuracy" not in said
    assert all("source_knn20_accuracy" not in e for e in curve)  # among 12 on the way, all 24 at the end
    assert said["source_knn20_accuracy_before"] > 1 / 4 and "geometric_mean_knn20" in said
    header = Path("run/source_per_class.csv").read_text().splitlines()[0]
    assert header == "class,images,knn20_before,knn20_after,knn20_forgetting"


def test_neighbours_need_a_bank_of_the_same_task(run, tmp_path, capsys):
    few = parquet_folder(tmp_path / "few", train=2)
    flags = ("--knn", "--source_dataset_name")
    assert "gives 8 images to look for neighbours among, fewer than 10" in refused(run, capsys, *flags, str(few))
    other = parquet_folder(tmp_path / "other")
    for split, file in (("train", parquet_folder(tmp_path / "less", classes=3)), ("", None)):
        if file:
            name = f"data/{split}-00000-of-00001.parquet"
            (other / name).write_bytes((file / name).read_bytes())
    assert "has 3 classes in train, others in test (4)" in refused(run, capsys, *flags, str(other))


def test_the_columns_of_the_source_can_be_named(run, tmp_path):
    from pyarrow import parquet

    folder = parquet_folder(tmp_path / "renamed")
    for file in (folder / "data").iterdir():
        parquet.write_table(parquet.read_table(file).rename_columns(["picture", "kind"]), file)
    columns = ("--source_image_column_name", "picture", "--source_label_column_name", "kind")
    run("--source_dataset_name", str(folder), *columns, "--max_train_steps", "1")
    assert metrics("runs/0001")["source_images"] == 16


def test_refusals_before_anything_is_made(run, world, capsys):
    assert "no split" in refused(run, capsys, "--test_split", "tset")
    other = ("--source_dataset_name", str(world / "target"))
    assert "has 3 classes, the model's own head 4" in refused(run, capsys, *other)
    bare = functools.partial(run, without=("--source_dataset_name",))
    assert "--knn: has no source data" in refused(bare, capsys, "--knn")
    assert "matches no layer" in refused(run, capsys, "--targets", "to_q")
    bare = functools.partial(run, without=("--dataset_name",))
    assert "give both the model and the data" in refused(bare, capsys)


def test_the_worlds_settings_are_options_of_the_script():
    file = REPOSITORY / "configs/world/classification.yaml"
    settings = config.read_yaml(file)
    options, _ = config.parse(ClassificationOptions, ["--config", str(file)], prog="x")
    assert options.dataset_name == settings["dataset_name"] and options.max_train_steps <= 200
    for name in ("dataset_name", "source_dataset_name"):
        assert (REPOSITORY / settings[name] / "data").is_dir()


WORLD_SWEEPS = [REPOSITORY / f"configs/sweeps/figure{n}.yaml" for n in (6, 7)]
PAPER_SWEEPS = sorted((REPOSITORY / "configs/paper/vision").glob("*.yaml"))


@pytest.mark.parametrize(
    "file", [*WORLD_SWEEPS, *(pytest.param(f, marks=pytest.mark.slow) for f in PAPER_SWEEPS)], ids=lambda f: f.stem
)
def test_sweeps_hold_settings_of_the_script(script, file, tmp_path):
    plan = yaml.safe_load(file.read_text())
    methods, subjects = plan["methods"], list((plan.get("subjects") or {"": {}}).values())
    cells = [{**subjects[0], **method} for method in methods.values()]
    cells += [{**subject, **next(iter(methods.values()))} for subject in subjects[1:]]
    for name, values in (plan.get("factors") or {}).items():
        one = values if isinstance(values, dict) else {"values": values}
        label = one.get("methods", list(methods))[0]
        cells += [{**subjects[0], **methods[label], name: value} for value in one["values"]]
    assert len(cells) >= len(methods) >= 3
    for cell in cells:
        settings = {**plan.get("fixed", {}), **cell}
        (tmp_path / "cell.yaml").write_text(yaml.safe_dump(settings))
        options, chosen = script.parse(["--config", str(tmp_path / "cell.yaml")])
        said = {**config.to_dict(options), **chosen.options()}
        assert all(str(said[k]) == str(v) or float(said[k]) == float(v) for k, v in settings.items())


def test_compiled_graphs(run, monkeypatch):
    compiles(run, monkeypatch, "--adapter", "lora", "--eval_steps", "4")
