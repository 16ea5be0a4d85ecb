"""What tests of scripts share: photos to train on, refusals, and what a run has left."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partialmethod
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

from vislora.io import read

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "train_scripts" / "dreambooth.py"


def opened(place: str) -> ModuleType:
    """The module of a file of this repository, such as eval/sweep.py, made anew."""
    spec = importlib.util.spec_from_file_location(f"opened_{Path(place).stem}", REPOSITORY / place)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def photograph(folder: Path, count: int = 3, seed: int = 0) -> Path:
    folder.mkdir()
    noise = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(noise.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def refused(run, capsys, *flags: str) -> str:
    """The one line that the script ends with, exit status 2 and no run folder."""
    before = {p.name for p in Path("runs").iterdir()} if Path("runs").exists() else set()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vislora: error:")]
    assert len(lines) == 1 and "->" in lines[0]
    assert before == ({p.name for p in Path("runs").iterdir()} if Path("runs").exists() else set())
    return lines[0]


def lines(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def state(folder: str, step: int) -> dict[str, torch.Tensor]:
    place = Path(folder) / "checkpoints" / f"checkpoint-{step}"
    return {f"{f}.{k}": v for f in ("adapter", "optimizer") for k, v in read(place / f"{f}.safetensors")[0].items()}


def compiles(run, monkeypatch, *flags: str) -> None:
    """The script's --compile trains in graphs, few of them, and comes to the losses of the run without it."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")  # all but the compiler of kernels
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=graphs))
        run("--compile", "--output_dir", "in_graphs", "--max_train_steps", "4", *flags)
    assert 0 < graphs.frame_count <= 4
    torch._dynamo.reset()
    run("--output_dir", "plainly", "--max_train_steps", "4", *flags)
    losses = [[line["loss"] for line in lines(folder) if "loss" in line] for folder in ("in_graphs", "plainly")]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-3)
