"""Faults that end processes: kills in a save, a second SIGINT, loaders and other processes of a run that die."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time

import numpy as np
import pytest
import torch
from PIL import Image
from reliability.campaign import SCRIPTS as CAMPAIGNS
from reliability.campaign import Campaign
from reliability.forks import Server
from reliability.plays import SCRIPTS, require_equal, stage, state, words
from safetensors.torch import load_file
from script_runs import lines
from tiny_families import build
from tiny_vit import hf_vit, image_folder, save_clip, save_conv, timm_vit

from vislora import world
from vislora.training import checkpoint

case = pytest.mark.case
RESUME = ("--resume_from_checkpoint", "latest")
SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what accelerate launch sets for FSDP2
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}  # and for DeepSpeed
UNEQUAL = ("layers", "seconds_per_step", "images_per_second", "tokens_per_second", "memory_mib")
BATCH = {"causal_lm": "--per_device_train_batch_size", "sequence_classification": "--per_device_train_batch_size"}
SAVE = dict.fromkeys(BATCH, "--save_steps")


@pytest.fixture(scope="module")
def server():
    with Server("causal_lm") as server:
        yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return stage(tmp_path_factory.mktemp("stage"))


def start_two(server, place, name, *flags, faults=((), ()), env=None) -> list[int]:
    """Two processes of one run, by gloo; the faults of each. env: of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loopback = next((word for word in os.listdir("/sys/class/net") if word.startswith("lo")), "lo")
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": loopback,
           **(env or {})}  # fmt: skip
    argv = [*words(name, *flags), "--cpu_threads", "1"]
    ranks = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return [server.start(name, argv, place, faults=own, env=rank) for own, rank in zip(faults, ranks, strict=True)]


def two(server, place, name, *flags, env=None) -> None:
    """The same, and both end well."""
    pids = start_two(server, place, name, *flags, env=env)
    assert [server.wait(pid) for pid in pids] == [0, 0], "\n".join(server.log(pid)[-2000:] for pid in pids)


def error_of(said: str) -> str:
    """The one line that a run has ended with."""
    found = [line for line in said.splitlines() if line.startswith("vislora: error:")]
    assert len(found) == 1 and "Traceback" not in said, said[-2000:]
    return found[0]


@case("F01", "F02", "F03", "F04", "F05", "F06", "F07", "F08")
def test_kills_at_file_boundaries_lose_nothing(server, tmp_path):
    """One kill at each class of boundary; `python tests/reliability/campaign.py` makes all of them."""
    campaign = Campaign(server, "causal_lm", tmp_path / "runs")
    kinds = [event[1:3] for event in campaign.events]
    folder, rename = (
        next(n for n, (kind, name) in enumerate(kinds, 1) if kind == word and name.startswith(".checkpoint-3"))
        for word in ("os.mkdir", "os.rename")
    )
    inside = {kinds[n - 1][1]: n for n in range(rename - 1, folder, -1)}  # the first event of each file of step 3's
    points = [
        (folder, "before"), (inside["adapter.safetensors"], "before"), (inside["optimizer.safetensors"], "torn"),
        (inside["state.json"], "unsynced"), (inside["manifest.json"], "torn"), (rename, "before"),
        (rename + 1, "unsynced"), (rename + 2, "before"),
    ]  # fmt: skip
    assert kinds[rename][0] == "shutil.rmtree"  # the oldest goes after the newest stands
    for point in points:
        campaign.kill_at(*point)
    assert campaign.verdict.kills.total() == len(points) and not campaign.verdict.lost + campaign.verdict.wrong


def test_the_judge_sees_a_lost_checkpoint_and_a_wrong_resume(server, tmp_path, monkeypatch):
    campaign = Campaign(server, "causal_lm", tmp_path / "runs")
    run = server.run

    def spoiled(script, argv, place, faults=()):
        done = run(script, argv, place, faults)
        if not faults and "resumed" in done[1]:
            return done[0], done[1].replace("at step 2", "at step 1")
        return done

    monkeypatch.setattr(server, "run", spoiled)
    campaign.whole["log"] = []
    renames = [n for n, event in enumerate(campaign.events, 1) if event[1] == "os.rename"]
    event = next(n for n in renames if campaign.events[n - 1][2].startswith(".checkpoint-3"))
    campaign.kill_at(event, "before")
    assert len(campaign.verdict.lost) == 1 and "2 was complete" in campaign.verdict.lost[0]
    assert campaign.verdict.wrong == [f"before-{event}: another result"]


@case("F14")
def test_a_second_interrupt_ends_at_once_and_the_checkpoint_before_it_stands(server, place):
    argv = words("causal_lm", "--max_train_steps", "5", "--output_dir")
    assert server.run("causal_lm", [*argv, "calm"], place)[0] == 0
    twice = ["signals_at", {"step": 2, "numbers": [2, 2]}]
    status, said = server.run("causal_lm", [*argv, "torn"], place, faults=[twice])
    assert status == 130 and "Traceback" not in said
    assert checkpoint.resolve(place / "torn" / "checkpoints", "latest").name == "checkpoint-2"
    assert server.run("causal_lm", [*argv, "torn", *RESUME], place)[0] == 0
    require_equal(state(place / "calm", 5), state(place / "torn", 5))


@case("F30")
def test_a_loader_that_is_killed_ends_the_run_in_one_line(server, place):
    argv = words("classification", "--max_train_steps", "6", "--dataloader_num_workers", "1", "--output_dir")
    assert server.run("classification", [*argv, "loaded"], place)[0] == 0
    start = time.monotonic()
    pid = server.start("classification", [*argv, "killed"], place, faults=[["loader_dies", {"position": 14}]])
    assert server.wait(pid, 60) == 3 and time.monotonic() - start < 30
    assert "--dataloader_num_workers: a loader process ended" in error_of(server.log(pid))
    assert server.run("classification", [*argv, "killed", *RESUME], place)[0] == 0
    require_equal(state(place / "loaded", 6), state(place / "killed", 6))


@case("F31", "F33")
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name == "causal_lm" else pytest.mark.slow) for name in SCRIPTS
])  # fmt: skip
def test_a_process_that_dies_ends_the_others_and_only_as_many_go_on(server, place, name):
    flags, both, widowed = ("--max_train_steps", "5", "--output_dir"), f"{name}-both", f"{name}-widowed"
    two(server, place, name, *flags, both)
    start = time.monotonic()
    pids = start_two(server, place, name, *flags, widowed, faults=((), [["dies_at", {"step": 3}]]))
    assert [server.wait(pid, 90) for pid in pids] == [3, -9] and time.monotonic() - start < 60
    assert "another process of this run: ended, or is not heard of any more" in error_of(server.log(pids[0]))
    assert checkpoint.resolve(place / widowed / "checkpoints", "latest").name == "checkpoint-3"
    status, said = server.run(name, words(name, *flags, widowed, *RESUME), place)
    assert status == 2 and "the run has 2 processes, here are 1 -> start it with 2 processes" in error_of(said)
    two(server, place, name, *flags, widowed, *RESUME)
    require_equal(state(place / both, 5), state(place / widowed, 5))


@case("F33")
def test_a_run_of_one_process_is_not_gone_on_with_by_two(server, place):
    name, out = "classification", "alone"
    assert server.run(name, words(name, "--max_train_steps", "2", "--output_dir", out), place)[0] == 0
    before = state(place / out, 2)
    pids = start_two(server, place, name, "--max_train_steps", "2", "--output_dir", out, *RESUME)
    assert server.wait(pids[0]) == 2 and server.wait(pids[1]) != 0
    assert "the run has 1 processes, here are 2" in error_of(server.log(pids[0]))
    require_equal(before, state(place / out, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_make_the_steps_of_one_with_twice_the_batch(server, place, name):
    flag = BATCH.get(name, "--train_batch_size")
    for out, batch in (("one", "4"), ("two", "2")):
        flags = ("--max_train_steps", "3", flag, batch, "--output_dir", f"{name}-{out}")
        if out == "two":
            two(server, place, name, *flags)
        else:
            assert server.run(name, words(name, *flags), place)[0] == 0
    same(*(state(place / f"{name}-{out}", 3) for out in ("one", "two")))


def same(one: dict, both: dict) -> None:
    """Two checkpoints are of the same state, to rounding; moments, whose rounding is larger, aside."""
    assert one.keys() == both.keys()
    for key, tensor in one.items():
        if "optimizer" not in key:
            assert (tensor - both[key]).abs().max() < 1e-4 * max(1.0, float(tensor.abs().max())), key


def in_shards(server, place, name, *flags, env=SHARDS) -> None:
    """Three steps of two processes, each with a half of the model, against one process with twice the batch; and the
    third step again, from the second checkpoint. env: what they share, and how."""
    out = f"{name}-shards"
    for which in ("one", "two"):
        shutil.rmtree(place / f"{out}-{which}", ignore_errors=True)
    batch, save = BATCH.get(name, "--train_batch_size"), SAVE.get(name, "--checkpointing_steps")
    flags = ("--max_train_steps", "3", save, "1", *flags, batch)
    assert server.run(name, words(name, *flags, "2", "--output_dir", f"{out}-one"), place)[0] == 0
    flags = (*flags, "1", "--output_dir", f"{out}-two")
    two(server, place, name, *flags, env=env)
    one, both = (state(place / f"{out}-{which}", 3) for which in ("one", "two"))
    same(one, both)
    files = [{str(f.relative_to(place / f"{out}-{which}")) for f in (place / f"{out}-{which}").rglob("*")}
             for which in ("one", "two")]  # fmt: skip
    assert files[0] == files[1]
    for picture in (name for name in files[0] if name.startswith("samples/step-0") and name.endswith(".png")):
        a, b = (np.asarray(Image.open(place / f"{out}-{which}" / picture), float) for which in ("one", "two"))
        assert abs(a - b).mean() < 1, picture
    for a, b in zip(*(lines(str(place / f"{out}-{which}")) for which in ("one", "two")), strict=True):
        a, b = ({key: value for key, value in line.items() if key not in UNEQUAL} for line in (a, b))
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    two(server, place, name, *flags, "--resume_from_checkpoint", "checkpoint-2", env=env)
    require_equal(both, state(place / f"{out}-two", 3))


def test_two_processes_with_half_of_an_image_model_each_make_the_steps_of_one(server, place):
    flags = ("--eval_steps", "2", "--ema_decay", "0.9", "--adapter", "sorsa", "--probe_steps", "1")
    in_shards(server, place, "classification", *flags)


@pytest.mark.parametrize("flags", [
    ("--adapter", "sorsa", "--probe_steps", "1"),
    pytest.param(("--adapter", "lora_sb", "--gradient_accumulation_steps", "2", "--merge", "--gradient_checkpointing",
                  "--head_learning_rate", "0.02"), marks=pytest.mark.slow),
], ids=["sorsa", "lora_sb"])  # fmt: skip
def test_two_processes_with_half_of_a_classifier_of_texts_each_make_the_steps_of_one(server, place, flags):
    in_shards(server, place, "sequence_classification", "--eval_steps", "2", *flags)
    metrics = [json.loads((place / f"sequence_classification-shards-{which}" / "metrics.json").read_text())
               for which in ("one", "two")]  # fmt: skip
    values = [{k: v for k, v in one.items() if k != "memory_mib" and v is not None} for one in metrics]
    assert values[0] == pytest.approx(values[1], rel=1e-3) and "best_eval_accuracy" in values[0]


@pytest.mark.slow
@pytest.mark.parametrize("name, flags, env", [
    ("sequence_classification", ("--eval_steps", "2", "--adapter", "sorsa"), {}),
    ("sequence_classification", ("--adapter", "lora_sb", "--gradient_accumulation_steps", "2", "--merge",
                                 "--gradient_checkpointing", "--head_learning_rate", "0.02"), {}),
    ("causal_lm", ("--adapter", "nb_lora", "--gradient_accumulation_steps", "2", "--eval_steps", "1"), {}),
    ("causal_lm", ("--adapter", "lora_plus", "--max_grad_norm", "0.1"),
     {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}),
])  # fmt: skip
def test_two_processes_with_half_of_the_moments_each_make_the_steps_of_one(server, place, name, flags, env):
    pytest.importorskip("deepspeed")
    in_shards(server, place, name, *flags, env={**ZERO, **env})


@pytest.mark.slow
def test_a_loss_that_is_nan_on_one_process_moves_no_strip(server, place):
    pytest.importorskip("deepspeed")
    flags = ("--max_train_steps", "4", "--save_steps", "1", "--logging_steps", "4", "--lr_scheduler_type", "constant",
             "--output_dir", "spoiled")  # fmt: skip
    pids = start_two(server, place, "causal_lm", *flags, faults=((), [["loss_is_nan", {"step": 2}]]), env=ZERO)
    assert [server.wait(pid) for pid in pids] == [0, 0], "\n".join(server.log(pid)[-2000:] for pid in pids)
    saved = [state(place / "spoiled", step) for step in (2, 3, 4)]
    require_equal(*saved[:2])
    assert any(not torch.equal(tensor, saved[2][name]) for name, tensor in saved[1].items() if "adapter" in name)
    assert all(tensor.isfinite().all() for tensor in saved[2].values())
    assert [line["skipped_steps"] for line in lines(str(place / "spoiled")) if "loss" in line] == [1.0]


DRAWN = ("--validation_prompt", "a b", "--num_validation_images", "1", "--validation_inference_steps", "1")
CHOSEN = ("--pretrained_model_name_or_path", str(world.TINY_SD), "--keep", "best", "--drift_steps", "2", "--adapter",
          "lora", "--learning_rate", "0.001", "--instance_prompt", "a x dog", "--class_prompt", "a dog",
          "--num_validation_images", "1", "--validation_inference_steps", "1", "--validation_prompt", "x dog, near",
          "x dog, far")  # fmt: skip


def test_two_processes_with_half_of_a_denoiser_each_make_the_steps_of_one(server, place):
    in_shards(server, place, "dreambooth", *DRAWN, "--validation_steps", "2", "--use_ema", "--adapter", "nb_lora",
              "--gradient_accumulation_steps", "2")  # fmt: skip
    report = json.loads((place / "dreambooth-shards-two" / "metrics.json").read_text())
    assert report["diffusers_export_error"] < 1e-6  # read back over shards


SIGNALS = {"ddp": ({}, 2, "checkpoint-4"), "the last step": ({}, 4, "checkpoint-5"), "fsdp2": (SHARDS, 3, None),
           "deepspeed": (ZERO, 2, "checkpoint-4")}  # fmt: skip


@case("F10")
@pytest.mark.parametrize("name, kind", [
    pytest.param(name, kind, marks=() if name == "causal_lm" and kind in ("ddp", "the last step") else pytest.mark.slow)
    for kind in SIGNALS for name in (BATCH if kind == "deepspeed" else SCRIPTS)
])  # fmt: skip
def test_a_signal_to_one_process_stops_both_after_the_same_step(server, place, name, kind):
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    (env, step, last), out, save = SIGNALS[kind], f"{name}-stopped", SAVE.get(name, "--checkpointing_steps")
    flags = ("--max_train_steps", "5", BATCH.get(name, "--train_batch_size"), "1", save, "9", "--output_dir", out)
    for folder in (out, f"{out}-not"):
        shutil.rmtree(place / folder, ignore_errors=True)
    signal = [["signals_at", {"step": step, "numbers": [15]}]]
    pids = start_two(server, place, name, *flags, faults=((), signal), env=env)
    assert [server.wait(pid) for pid in pids] == [143, 143], "\n".join(server.log(pid)[-2000:] for pid in pids)
    (saved,) = (place / out / "checkpoints").iterdir()  # of what it made before the signal, and a step more
    assert saved.name == last or (last is None and saved.name in ("checkpoint-3", "checkpoint-4"))
    two(server, place, name, *flags, *RESUME, env=env)
    two(server, place, name, *flags[:-1], f"{out}-not", env=env)
    for file in sorted((place / f"{out}-not" / "adapter").glob("*.safetensors")):
        require_equal(load_file(file), load_file(place / out / "adapter" / file.name))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    CHOSEN,
    ("--adapter", "dora", "--train_text_encoder", "--export_rank", "2", "--with_prior_preservation", "--class_prompt",
     "a", "--prior_source", "base_output", "--gradient_checkpointing"),
    ("--adapter", "sorsa", "--drift_steps", "1", "--probe_steps", "1", "--mixed_precision", "no"),
], ids=["keep", "dora", "sorsa"])  # fmt: skip
def test_half_a_denoiser_in_all_that_reads_it(server, place, flags):
    in_shards(server, place, "dreambooth", *flags)
    report = json.loads((place / "dreambooth-shards-two" / "metrics.json").read_text())
    assert (report["diffusers_export_error"] is None) == ("dora" in flags)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_half_of_a_transformer_that_denoises(server, place, kind, tmp_path):
    in_shards(server, place, "dreambooth", "--pretrained_model_name_or_path", str(build(kind, tmp_path / kind)), *DRAWN,
              "--adapter", "nb_lora", "--learning_rate", "0.001", "--gradient_checkpointing")  # fmt: skip


@pytest.mark.slow
def test_half_of_a_text_classifier(server, place):
    in_shards(server, place, "sequence_classification", "--eval_steps", "2", "--adapter", "sorsa")


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["vit", "transformers", "open_clip", "conv"])
def test_half_of_each_kind_of_image_model(server, place, tower, tmp_path):
    if tower == "transformers":
        hf_vit(timm_vit()).save_pretrained(tmp_path / tower)
    elif tower != "vit":
        (save_conv if tower == "conv" else save_clip)(tmp_path / tower)
    folder = place / tower if tower == "vit" else tmp_path / tower
    more = () if tower in ("open_clip", "conv") else ("--gradient_checkpointing",)
    more = (*more, "--targets", "fc1", "fc2") if tower == "conv" else more
    source = () if tower == "transformers" else ("--source_dataset_name", "source", "--knn")
    if source and not (place / "source").exists():
        image_folder(place / "source", 4, train=12, test=3)
    in_shards(server, place, "classification", "--model_name_or_path", str(folder), "--adapter", "dora", *more, *source,
              "--channels_last")  # fmt: skip


def test_what_the_campaign_runs_are_the_scripts():
    assert set(CAMPAIGNS) == set(SCRIPTS)
