"""Two gloo processes with half the rows each make the steps of one process with all of them, whole or in shards."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from script_runs import REPOSITORY, lines
from tiny_lm import folder, sums, write_rows

from vislora import adapters
from vislora.baselines import BASELINES
from vislora.distributed import average_gradients
from vislora.errors import InputError
from vislora.io import read
from vislora.training.processes import require_served

FLAGS = ["--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--prompt_template", "qa", "--rank", "2",
         "--max_train_steps", "3", "--logging_steps", "1", "--report_to", "none", "--learning_rate", "0.01",
         "--max_length", "128", "--validation_split_percentage", "20", "--cpu_threads", "1", "--adapter", "sorsa",
         "--gradient_accumulation_steps", "2", "--eval_answers", "2", "--max_new_tokens", "4", "--merge",
         "--save_steps", "2"]  # fmt: skip
LORA = adapters.get("lora")()
SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what accelerate launch sets for FSDP2
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}  # and for DeepSpeed


def train(place: Path, out: str, processes: int, *more: str, **environment: str) -> None:
    """causal_lm.py in `place` on one gloo process or several, with four rows a step."""
    loopback = next(name for name in os.listdir("/sys/class/net") if name.startswith("lo"))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": loopback,
                   "PYTHONPATH": str(REPOSITORY), **environment}  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_addr",
               "127.0.0.1", "--master_port", port] if processes > 1 else [sys.executable]  # fmt: skip
    script = str(REPOSITORY / "train_scripts" / "causal_lm.py")
    rows = ["--per_device_train_batch_size", str(2 // processes), "--output_dir", out]
    done = subprocess.run([*command, script, *FLAGS, *rows, *more], cwd=place, env=environment, capture_output=True,
                          timeout=400)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model, the rows and the run of one process."""
    place = tmp_path_factory.mktemp("processes")
    folder(place / "model")
    write_rows(place / "rows.jsonl", sums())
    train(place, "one", 1)
    return place


def same(place: Path, out: str) -> None:
    """The run of two processes is that of one, to rounding: what it logged, the adapter, PEFT's form, the model."""
    pairs = zip(lines(str(place / "one")), lines(str(place / out)), strict=True)
    for key, a, b in ((key, a, b) for a, b in pairs for key in ("loss", "grad_norm", "eval_loss", "largest_norm")):
        assert (key in a) == (key in b) and (key not in a or abs(a[key] - b[key]) < 1e-4 * abs(a[key]))
    for file in ("adapter/adapter", "export/peft/adapter_model", "model/model", "checkpoints/checkpoint-2/adapter"):
        one, two = (read(place / run / f"{file}.safetensors")[0] for run in ("one", out))
        assert one.keys() == two.keys()
        assert all(torch.allclose(tensor, two[name], atol=1e-4) for name, tensor in one.items()), file


@pytest.mark.slow
@pytest.mark.parametrize("out, how", [
    ("ddp", {}), ("fsdp2", SHARDS), ("zero2", ZERO), ("zero1", {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}),
])  # fmt: skip
def test_two_processes_make_the_steps_of_one(place, out, how):
    if out.startswith("zero"):
        pytest.importorskip("deepspeed")
    train(place, out, 2, **how)
    same(place, out)
    shutil.rmtree(place / out / "model")
    first = {name: t.clone() for name, t in read(place / out / "adapter/adapter.safetensors")[0].items()}
    train(place, out, 2, "--resume_from_checkpoint", "checkpoint-2", **how)
    again = read(place / out / "adapter/adapter.safetensors")[0]
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_a_checkpoint_of_copies_is_gone_on_with_in_strips(place):
    pytest.importorskip("deepspeed")
    train(place, "mixed", 2)
    first = {name: t.clone() for name, t in read(place / "mixed" / "adapter/adapter.safetensors")[0].items()}
    train(place, "mixed", 2, "--resume_from_checkpoint", "checkpoint-2", **ZERO)
    again = read(place / "mixed" / "adapter/adapter.safetensors")[0]
    assert all(torch.allclose(tensor, again[name], atol=1e-6) for name, tensor in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora_sb", "lora_ga", "od_lora"])
def test_a_start_from_data_is_the_same_in_shards(place, method):
    """Its bases come from the gradients of all rows, which no process holds alone, of weights that none holds whole."""
    train(place, f"one_{method}", 1, "--adapter", method)
    train(place, f"shards_{method}", 2, "--adapter", method, **SHARDS)
    one, two = (read(place / f"{run}_{method}" / "adapter/adapter.safetensors")[0] for run in ("one", "shards"))
    assert one.keys() == two.keys() and any(t.abs().max() > 1e-3 for t in one.values())
    seen = [lines(str(place / f"{run}_{method}")) for run in ("one", "shards")]
    for a, b in zip(*seen, strict=True):
        assert all(abs(a[k] - b[k]) < 1e-3 * abs(a[k]) for k in ("loss", "grad_norm", "eval_loss") if k in a)


def launched(**more) -> SimpleNamespace:
    """What the scripts ask of accelerate's Accelerator."""
    return SimpleNamespace(**{"num_processes": 2, "distributed_type": DistributedType.MULTI_GPU,
                              "mixed_precision": "no", **more})  # fmt: skip


@pytest.mark.parametrize("environment, method, quantized, wrong", [
    ({"FSDP_VERSION": "1"}, LORA, False, "FSDP 1"),
    ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, LORA, False, "fsdp_cpu_ram_efficient_loading: false"),
    ({"FSDP_OFFLOAD_PARAMS": "true"}, LORA, False, "fsdp_offload_params: false"),
    ({}, LORA, True, "quantized"),
    ({}, BASELINES["full"](), False, "base's own weights"), ({}, BASELINES["none"](), False, "none trains nothing"),
])  # fmt: skip
def test_what_shards_cannot_do_is_said_before_anything_is_loaded(monkeypatch, environment, method, quantized, wrong):
    for name, value in {**SHARDS, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=wrong):
        require_served(launched(), method, quantized)
    require_served(launched(num_processes=1), method, quantized)  # one process holds it all
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    require_served(launched(), method, quantized)


def test_other_ways_of_the_launcher_are_refused():
    with pytest.raises(InputError, match="MEGATRON_LM is not served"):
        require_served(launched(distributed_type=DistributedType.MEGATRON_LM), LORA, False)


def test_without_a_gradient_the_mean_takes_zeros():
    a, b = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(2))
    a.grad = torch.arange(6.0).view(2, 3)
    average_gradients([a, b], torch.device("cpu"))
    assert torch.equal(a.grad, torch.arange(6.0).view(2, 3)) and torch.equal(b.grad, torch.zeros(2))
