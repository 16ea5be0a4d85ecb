"""configs/accelerate: read by accelerate's own loader and launcher, and started where a CPU can."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from reliability.plays import require_equal, stage, state, words
from script_runs import REPOSITORY

from vislora import adapters
from vislora.baselines import BASELINES
from vislora.errors import InputError
from vislora.training import checkpoint, processes, zero

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
    assert f"configs/accelerate/{name}.yaml" in file.read_text() or name == "ddp_nodes"
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "x.py"]))
    assert arguments.mixed_precision == "bf16" and arguments.multi_gpu == name.startswith("ddp")
    assert arguments.use_fsdp == (name == "fsdp2") and arguments.use_deepspeed == name.startswith("deepspeed")
    if name == "fsdp2":
        known = {action.dest for action in launch_command_parser()._actions}
        assert arguments.fsdp_version == 2 and set(settings.fsdp_config) <= known
    if arguments.use_deepspeed:
        assert arguments.zero_stage == 2 and arguments.offload_optimizer_device == "none"


@pytest.mark.parametrize("environment, package, wrong", [
    ({"DEEPSPEED_ZERO_STAGE": "3"}, True, "stage 3, the base in shards.*fsdp2.yaml"),
    ({"DEEPSPEED_ZERO_STAGE": "0"}, True, "zero_stage 0 shares nothing.*ddp.yaml"),
    ({"DEEPSPEED_CONFIG_FILE": "ds.json"}, True, "deepspeed_config_file is not read"),
    ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, True, "offload_optimizer_device cpu is not served"),
    ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, True, "offload_param_device nvme is not served"),
    ({"GRADIENT_CLIPPING": "1.0"}, True, "gradient_clipping 1.0.*--max_grad_norm"),
    ({"GRADIENT_ACCUMULATION_STEPS": "8"}, True, "gradient_accumulation_steps 8.*--gradient_accumulation_steps"),
    ({}, False, "its package is missing -> pip install"),
])  # fmt: skip
def test_what_deepspeed_would_not_heed_is_said_before_anything_starts(monkeypatch, environment, package, wrong):
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: object() if package else None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(InputError, match=f"DeepSpeed: .*{wrong}"):
        processes.start("no", takes_zero=True)
    with pytest.raises(InputError, match="DeepSpeed: only the scripts for language models take it"):
        processes.start("no")


def test_one_process_has_nothing_to_share_by_deepspeed(monkeypatch):
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert processes.start("no", takes_zero=True).zero_stage is None


@pytest.mark.parametrize("method, options, wrong", [
    ("od_lora", {}, "ODLoRA changes single factors"), ("adalora", {}, "AdaLoRA changes single factors"),
    ("full", {}, "base's own weights"), ("lora", {"optimizer": "lora_pro"}, "--optimizer lora_pro.*adamw"),
    ("lora", {"probe_steps": 5}, "--probe_steps"), ("sorsa", {"penalty_unclipped": True}, "--penalty_unclipped"),
    ("lora", {"compile": True}, "--compile"),
])  # fmt: skip
def test_what_strips_cannot_do_is_said_before_anything_is_loaded(method, options, wrong):
    plain = {"optimizer": "adamw", "probe_steps": None, "penalty_unclipped": False, "compile": False}
    accelerator = SimpleNamespace(mixed_precision="bf16")
    own = (BASELINES["full"] if method == "full" else adapters.get(method))()
    with pytest.raises(InputError, match=f"DeepSpeed: .*{wrong}"):
        zero.require_fit(accelerator, own, SimpleNamespace(**plain | options))
    for served in (adapters.get("sorsa")(), adapters.get("rslora")(), adapters.get("nb_lora")()):
        zero.require_fit(accelerator, served, SimpleNamespace(**plain))
    with pytest.raises(InputError, match="RsLoRA changes single factors"):
        zero.require_fit(accelerator, adapters.get("rslora")(optimal_gradient=True), SimpleNamespace(**plain))


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
    for _ in range(4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(("--num_processes", "2", "--main_process_port", str(free.getsockname()[1])))
    strips = ["strips"] if importlib.util.find_spec("deepspeed") else []
    for out, name, each in (
        ("single", "single", [()]), ("ddp", "ddp", [ports[0]]), ("shards", "fsdp2", [ports[2]]),
        *((out, "deepspeed_zero2", [ports[3]]) for out in strips),
        ("nodes", "ddp_nodes", [(*ports[1], "--machine_rank", rank) for rank in ("0", "1")]),
    ):  # fmt: skip
        started = [launch(place, out, name, *flags) for flags in each]
        said = [process.communicate(timeout=300)[1] for process in started]
        assert not any(process.returncode for process in started), "\n".join(text[-2000:] for text in said)
    counts = [checkpoint.load(place / out / "checkpoints" / "checkpoint-3").state["processes"]
              for out in ("single", "ddp", "shards", "nodes", *strips)]  # fmt: skip
    assert counts == [1] + [2] * (len(counts) - 1)
    require_equal(state(place / "ddp", 3), state(place / "nodes", 3))
    copies, *others = (state(place / out, 3) for out in ("ddp", "shards", *strips))
    for other in others:
        assert copies.keys() == other.keys()
        assert all((t - other[key]).abs().max() < 1e-4 for key, t in copies.items() if key.startswith("adapter"))
