"""Two gloo processes with half the rows each make the steps of one process with all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from script_runs import REPOSITORY, lines
from tiny_lm import folder, sums, write_rows

from vislora.io import read


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", sums())
    loopback = next(name for name in os.listdir("/sys/class/net") if name.startswith("lo"))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": loopback,
                   "PYTHONPATH": str(REPOSITORY)}  # fmt: skip
    script = str(REPOSITORY / "train_scripts" / "causal_lm.py")
    flags = ["--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--prompt_template", "qa", "--rank", "2",
             "--max_train_steps", "3", "--logging_steps", "1", "--report_to", "none", "--learning_rate", "0.01",
             "--max_length", "128", "--validation_split_percentage", "20", "--cpu_threads", "1", "--adapter", "sorsa",
             "--gradient_accumulation_steps", "2"]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
                "--master_port", port]  # fmt: skip
    for command, rows, out in (([sys.executable], "2", "one"), (torchrun, "1", "two")):
        more = ["--per_device_train_batch_size", rows, "--output_dir", out]
        done = subprocess.run([*command, script, *flags, *more], env=environment, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
    for a, b in zip(lines("one"), lines("two"), strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            assert key not in a or abs(a[key] - b[key]) < 1e-4 * a[key]
    one, two = (read(tmp_path / out / "adapter/adapter.safetensors")[0] for out in ("one", "two"))
    assert all(torch.allclose(tensor, two[name], atol=1e-4) for name, tensor in one.items())
