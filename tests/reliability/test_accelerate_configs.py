"""configs/accelerate: read by accelerate's own loader and launcher, and started where a CPU can."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from reliability.plays import require_equal, stage, state, words
from script_runs import REPOSITORY

from vislora.errors import InputError
from vislora.training import checkpoint
from vislora.training.cores import require_device

FOLDER = REPOSITORY / "configs" / "accelerate"
# file -> what it is: (kind, processes, machines)
EXPECTED = {
    "single": ("NO", 1, 1), "ddp": ("MULTI_GPU", 4, 1), "ddp_nodes": ("MULTI_GPU", 16, 2), "fsdp2": ("FSDP", 4, 1),
    "deepspeed_zero2": ("DEEPSPEED", 4, 1),
}  # fmt: skip


def test_there_is_one_for_every_set_up():
    assert {file.stem for file in FOLDER.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it_as_it_is_meant(name):
    file = FOLDER / f"{name}.yaml"
    settings = load_config_from_file(str(file))  # which refuses unknown keys
    assert (settings.distributed_type.value, settings.num_processes, settings.num_machines) == EXPECTED[name]
    assert f"configs/accelerate/{name}.yaml" in file.read_text() or name in ("ddp_nodes", "deepspeed_zero2")
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "x.py"]))
    assert arguments.mixed_precision == "bf16" and arguments.multi_gpu == name.startswith("ddp")
    assert arguments.use_fsdp == (name == "fsdp2") and arguments.use_deepspeed == name.startswith("deepspeed")
    if name == "fsdp2":
        known = {action.dest for action in launch_command_parser()._actions}
        assert arguments.fsdp_version == 2 and set(settings.fsdp_config) <= known
    if arguments.use_deepspeed:
        assert arguments.zero_stage == 2 and arguments.offload_optimizer_device == "none"


def test_deepspeed_is_refused_before_accelerate_looks_for_its_package(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    require_device()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="accelerate launch: DeepSpeed is not served.* -> take DDP"):
        require_device()


def launch(place: Path, out: str, name: str, *flags: str) -> subprocess.Popen:
    """The launcher by this configuration; the environment, not --cpu, puts its processes on the CPU (with that flag it
    starts but one)."""
    loopback = next((word for word in os.listdir("/sys/class/net") if word.startswith("lo")), "lo")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true",
                   "GLOO_SOCKET_IFNAME": loopback}  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml"),
               "--mixed_precision", "no", *(("--cpu",) if name == "single" else ()), *flags,
               str(REPOSITORY / "train_scripts" / "causal_lm.py"),
               *words("causal_lm", "--max_train_steps", "3", "--output_dir", out)]  # fmt: skip
    return subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_cpu_starts_one_process_two_two_with_half_a_model_each_and_two_machines_of_one(tmp_path):
    place, ports = stage(tmp_path), []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(("--num_processes", "2", "--main_process_port", str(free.getsockname()[1])))
    for out, name, each in (
        ("single", "single", [()]), ("ddp", "ddp", [ports[0]]), ("shards", "fsdp2", [ports[2]]),
        ("nodes", "ddp_nodes", [(*ports[1], "--machine_rank", rank) for rank in ("0", "1")]),
    ):  # fmt: skip
        started = [launch(place, out, name, *flags) for flags in each]
        said = [process.communicate(timeout=300)[1] for process in started]
        assert not any(process.returncode for process in started), "\n".join(text[-2000:] for text in said)
    processes = [checkpoint.load(place / out / "checkpoints" / "checkpoint-3").state["processes"]
                 for out in ("single", "ddp", "shards", "nodes")]  # fmt: skip
    assert processes == [1, 2, 2, 2]
    require_equal(state(place / "ddp", 3), state(place / "nodes", 3))
    copies, shards = (state(place / out, 3) for out in ("ddp", "shards"))
    assert copies.keys() == shards.keys()
    assert all((t - shards[key]).abs().max() < 1e-4 for key, t in copies.items() if key.startswith("adapter"))
