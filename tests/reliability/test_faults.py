"""Faults brought about in this process while the DreamBooth script runs: how it ends, and how it goes on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import accelerate.optimizer
import pytest
import torch
from PIL import Image
from reliability.plays import require_equal, state
from script_runs import lines

from vislora.errors import EnvironmentFault, fault_of
from vislora.training import checkpoint, processes, telemetry
from vislora.training import run as run_module

case = pytest.mark.case
USUAL = ("--checkpointing_steps", "1", "--max_train_steps", "4", "--learning_rate", "0.01", "--lr_scheduler", "linear")
RESUME = ("--resume_from_checkpoint", "latest")


_kept: dict[str, torch.Tensor] = {}


@pytest.fixture
def whole(run) -> dict[str, torch.Tensor]:
    """The last state of the run that nothing happens to; photos and model are the same in every test here."""
    if not _kept:
        run(*USUAL, "--output_dir", "whole")
        _kept.update(state("whole", 4))
    return _kept


def ends(run, capsys, *flags: str, status: int) -> str:
    """The script's run into "out" ends with this status, with one line of ours and no traceback; that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*USUAL, "--output_dir", "out", *flags)
    said = capsys.readouterr().err
    assert stop.value.code == status and "Traceback" not in said
    own = [line for line in said.splitlines() if line.startswith("vislora: ")]
    assert len([line for line in own if line.startswith("vislora: error:")]) == (status not in (130, 143))
    return own[-1]


def goes_on(run, whole) -> None:
    run(*USUAL, "--output_dir", "out", *RESUME)
    require_equal(whole, state("out", 4))


def at_call(number: int, act):
    """A wrapper of functions that calls `act` before their so-manieth call."""

    def wrap(whole_function):
        calls = []

        def watched(*arguments, **named):
            calls.append(0)
            if len(calls) == number:
                act()
            return whole_function(*arguments, **named)

        return watched

    return wrap


def in_backward(losses, act):
    """The loss of the second call acts in the middle of its backward."""
    calls = []

    def watched(self, position):
        terms = losses(self, position)
        calls.append(0)
        if len(calls) == 2:
            terms["total"].register_hook(lambda gradient: act())
        return terms

    return watched


@pytest.mark.parametrize("moment, number, status", [
    pytest.param("forward", signal.SIGTERM, 143, marks=case("F09")),
    pytest.param("backward", signal.SIGTERM, 143, marks=case("F10")),
    pytest.param("optimizer", signal.SIGTERM, 143, marks=case("F11")),
    pytest.param("save", signal.SIGTERM, 143, marks=case("F12")),
    pytest.param("forward", signal.SIGINT, 130, marks=case("F13")),
])  # fmt: skip
def test_a_signal_at_any_moment_costs_no_step(run, script, capsys, whole, monkeypatch, moment, number, status):
    def act():
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        if moment == "backward":
            patch.setattr(script.Denoising, "losses", in_backward(script.Denoising.losses, act))
        else:
            holder, name = {"forward": (script.Denoising, "losses"), "save": (checkpoint, "_write"),
                            "optimizer": (accelerate.optimizer.AcceleratedOptimizer, "step")}[moment]  # fmt: skip
            patch.setattr(holder, name, at_call(2, act)(getattr(holder, name)))
        line = ends(run, capsys, "--checkpointing_steps", "1" if moment == "save" else "9", status=status)
    assert "to go on, add --output_dir out --resume_from_checkpoint latest" in line
    names = sorted(path.name for path in Path("out/checkpoints").iterdir())
    # a signal during the save of step 2 is seen after it, or after the step that follows
    assert names in ([["checkpoint-2"]] if moment != "save" else
                     [["checkpoint-1", "checkpoint-2"], ["checkpoint-1", "checkpoint-2", "checkpoint-3"]])  # fmt: skip
    assert not Path("out/adapter").exists()
    goes_on(run, whole)


def failing(whole_function, wanted, error):
    """Fails where `wanted` says so of its arguments."""

    def watched(*arguments, **named):
        if wanted(*arguments):
            raise error
        return whole_function(*arguments, **named)

    return watched


FULL, READ_ONLY = OSError(28, "No space left on device"), OSError(30, "Read-only file system")
DISK = {
    "adapter": (checkpoint, "save_file", lambda tensors, path: path.name == "adapter.safetensors", FULL),
    "optimizer": (checkpoint, "save_file", lambda tensors, path: path.name == "optimizer.safetensors", FULL),
    "manifest": (checkpoint, "write_synced", lambda path, text, *_: path.name == "manifest.json", FULL),
    "rename": (checkpoint.os, "rename", lambda here, there: Path(there).name == "checkpoint-2", FULL),
    "read-only": (checkpoint.Path, "mkdir", lambda path, *_: path.name.startswith(".checkpoint-"), READ_ONLY),
}  # fmt: skip


@pytest.mark.parametrize("place_of_fault", [
    pytest.param("adapter", marks=case("F15")), pytest.param("optimizer", marks=case("F16")),
    pytest.param("manifest", marks=case("F17")), pytest.param("rename", marks=case("F18")),
    pytest.param("read-only", marks=case("F19")),
])  # fmt: skip
def test_a_disk_that_refuses_stops_the_run_and_the_older_checkpoint_stays(
    run, capsys, whole, monkeypatch, place_of_fault
):
    module, name, wanted, error = DISK[place_of_fault]
    real = getattr(module, name)
    two = failing(real, lambda *a: wanted(*a) and Path("out/checkpoints/checkpoint-1").exists(), error)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, two)
        line = ends(run, capsys, status=3)
    assert f"checkpoint-2: could not be written ({error.strerror}) -> make room or restore write access" in line
    assert [path.name for path in Path("out/checkpoints").iterdir()] == ["checkpoint-1"]
    goes_on(run, whole)


@pytest.mark.parametrize("what, words", [
    pytest.param("deleted", "is gone since the run began", marks=case("F20")),
    pytest.param("changed", "has changed since the run began", marks=case("F21")),
])  # fmt: skip
def test_a_photo_that_does_not_stay_as_it_was_ends_the_run(run, script, capsys, monkeypatch, what, words):
    def act():
        for photo in sorted(Path("photos").iterdir()):
            photo.unlink()
            if what == "changed":
                Image.new("RGB", (48, 40)).save(photo)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "backward", at_call(3, act)(script.Run.backward))
        line = ends(run, capsys, "--no_cache_latents", status=4)
    assert words in line and "photos/" in line
    assert checkpoint.resolve(Path("out/checkpoints"), "latest").name == "checkpoint-2"


@case("F27")
@pytest.mark.parametrize("logging", ["1", "100"])
def test_losses_that_are_nan_end_a_run_that_keeps_what_it_had(run, script, capsys, whole, monkeypatch, logging):
    losses, calls = script.Denoising.losses, []

    def spoiled(self, position):
        calls.append(0)
        return {k: v * (float("nan") if len(calls) > 1 else 1) for k, v in losses(self, position).items()}

    with monkeypatch.context() as patch:
        patch.setattr(script.Denoising, "losses", spoiled)
        line = ends(run, capsys, "--logging_steps", logging, status=2)
    assert "--learning_rate: the loss or its gradient was not finite for 3 steps in a row" in line
    saved = [checkpoint.load(Path(f"out/checkpoints/checkpoint-{step}")) for step in (1, 2, 3)]
    for later in saved[1:]:
        require_equal(saved[0].tensors["adapter"], later.tensors["adapter"])
        require_equal(saved[0].tensors["optimizer"], later.tensors["optimizer"])
    assert all(t.isfinite().all() for t in state("out", 3).values())
    run(*USUAL, "--output_dir", "out", "--resume_from_checkpoint", "checkpoint-1")
    require_equal(whole, state("out", 4))


@case("F27")
def test_one_loss_that_is_nan_is_passed_over_and_counted(run, script, monkeypatch):
    losses, calls = script.Denoising.losses, []

    def spoiled(self, position):
        calls.append(0)
        return {k: v * (float("nan") if len(calls) == 3 else 1) for k, v in losses(self, position).items()}

    with monkeypatch.context() as patch:
        patch.setattr(script.Denoising, "losses", spoiled)
        run(*USUAL, "--output_dir", "out", "--logging_steps", "2")
    saved = [checkpoint.load(Path(f"out/checkpoints/checkpoint-{step}")).tensors["adapter"] for step in (2, 3, 4)]
    require_equal(saved[0], saved[1])
    assert any(not torch.equal(t, saved[2][n]) for n, t in saved[1].items())
    assert [line.get("skipped_steps") for line in lines("out")] == [None, 1.0]
    assert all(isinstance(line["loss"], float) for line in lines("out"))


@case("F28")
def test_an_overflow_of_scaled_gradients_is_skipped_and_no_step_of_the_schedule(run, script, monkeypatch):
    """With a scaler as fp16 has it. The third backward overflows: its step moves neither the adapter nor the rate."""

    class Scaled(processes.Accelerator):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    losses, calls = script.Denoising.losses, []

    def spoiled(self, position):
        terms = losses(self, position)
        calls.append(0)
        if len(calls) == 3:
            terms["total"].register_hook(lambda gradient: gradient * float("inf"))
        return terms

    with monkeypatch.context() as patch:
        patch.setattr(processes, "Accelerator", Scaled)
        patch.setattr(script.Denoising, "losses", spoiled)
        run(*USUAL, "--output_dir", "out")
        saved = [checkpoint.load(Path(f"out/checkpoints/checkpoint-{step}")) for step in (1, 2, 3, 4)]
        require_equal(saved[1].tensors["adapter"], saved[2].tensors["adapter"])
        assert any(not torch.equal(t, saved[3].tensors["adapter"][n]) for n, t in saved[2].tensors["adapter"].items())
        assert [entry["lr"] for entry in lines("out")] == [0.01, 0.0075, 0.005, 0.005]
        assert [s.state["scaler"]["scale"] for s in saved] == [4.0, 4.0, 2.0, 2.0]
        shutil.rmtree("out/checkpoints/checkpoint-4")
        run(*USUAL, "--output_dir", "out", *RESUME)
        last = {f"{file}.{name}": t for file, own in saved[3].tensors.items() for name, t in own.items()}
        require_equal(state("out", 4), last)


@case("F29")
def test_memory_that_runs_out_is_one_line_with_the_remedy(run, script, capsys, whole, monkeypatch):
    def act():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has …")

    with monkeypatch.context() as patch:
        patch.setattr(script.Denoising, "losses", at_call(3, act)(script.Denoising.losses))
        line = ends(run, capsys, status=3)
    assert "memory: there is not enough" in line and "smaller batches" in line and "--resume_from_checkpoint" in line
    goes_on(run, whole)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)  # the real error of a CPU
    assert isinstance(fault_of(caught.value), EnvironmentFault)
    with pytest.raises(RuntimeError) as caught:
        torch.linalg.svd(torch.full((3, 3), float("nan")))
    assert "the run diverged" in str(fault_of(caught.value))
    assert fault_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@case("F34")
def test_no_step_goes_by_the_clock(run, whole, monkeypatch):
    jumps = iter([1e9, 0.0, -1e6, 5.0, 3e9] * 100_000)
    with monkeypatch.context() as patch:
        for name in ("time", "perf_counter"):
            patch.setattr(time, name, lambda: next(jumps))
        run(*USUAL, "--output_dir", "out")
    require_equal(whole, state("out", 4))


class Broken(telemetry.GeneralTracker):
    """A tracker whose service is not reached, from the start or from the second step on."""

    name, requires_logging_directory = "wandb", False
    from_start = True
    calls: list[str] = []

    def __init__(self, project):
        super().__init__()

    @property
    def tracker(self):
        return self

    def _call(self, name):
        self.calls.append(name)
        if self.from_start or self.calls.count("log") > 1:
            raise ConnectionError("no route to host\nretry")

    def start(self):
        self._call("start")

    def store_init_configuration(self, values):
        self._call("settings")

    def log(self, values, step):
        self._call("log")

    def finish(self):
        self._call("finish")


@case("F37")
@pytest.mark.parametrize("from_start", [True, False])
def test_a_tracker_that_is_down_is_one_warning(run, whole, monkeypatch, caplog, from_start):
    monkeypatch.setattr(telemetry, "get_available_trackers", lambda: [telemetry.LoggerType.WANDB])
    monkeypatch.setitem(telemetry.LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    monkeypatch.setattr(telemetry, "filter_trackers", lambda kind, place: ["wandb"])
    Broken.from_start = from_start
    Broken.calls.clear()
    run(*USUAL, "--output_dir", "out", "--report_to", "wandb")
    require_equal(whole, state("out", 4))
    told = [r.getMessage() for r in caplog.records if "--report_to wandb" in r.getMessage()]
    assert len(told) == 1 and "the run goes on without it" in told[0] and "\n" not in told[0]
    assert Broken.calls == (["start"] if from_start else ["start", "settings", "log", "log"])


@case("F38")
def test_a_log_on_a_full_disk_is_one_warning(run, whole, monkeypatch, caplog):
    real = checkpoint.write_synced
    full = failing(real, lambda path, *_: path.name == "metrics.jsonl", FULL)
    with monkeypatch.context() as patch:
        patch.setattr(run_module.checkpoint, "write_synced", full)
        run(*USUAL, "--output_dir", "out")
    require_equal(whole, state("out", 4))
    told = [r.getMessage() for r in caplog.records if "metrics.jsonl" in r.getMessage()]
    assert len(told) == 1 and "No space left on device" in told[0]


@case("F39")
def test_a_base_that_vanishes_after_the_start_is_not_missed(run, script, model, whole, place, monkeypatch):
    shutil.copytree(model, "base")
    act = at_call(2, lambda: shutil.rmtree("base"))
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "backward", act(script.Run.backward))
        run(*USUAL, "--output_dir", "out", "--pretrained_model_name_or_path", "base", "--validation_prompt", "a b",
            "--num_validation_images", "1", "--validation_inference_steps", "1")  # fmt: skip
    assert not Path("base").exists() and Path("out/samples/grid.png").is_file()
    require_equal(whole, state("out", 4))


def test_a_disk_without_room_for_two_checkpoints_is_told_before_the_first_step(run, capsys, monkeypatch):
    real = shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda place: real._replace(free=4096))
        line = ends(run, capsys, status=3)
    assert "out: 0.0 MiB are free" in line and "are needed -> free some space" in line
    assert not list(Path("out").rglob("*.safetensors")) and not Path("out/metrics.jsonl").exists()
    run(*USUAL, "--output_dir", "out")
    assert len(lines("out")) == 4
