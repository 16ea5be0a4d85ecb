"""Runs as a training script leaves them, of a network of two layers whose base lies on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import vislora
from vislora.baselines import BASELINES
from vislora.training.resume import save_state

STEPS = (2, 4)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(12, 10), nn.Linear(10, 9)

    def forward(self, x):
        return self.value(torch.tanh(self.query(x)))


class Runs:
    """`runs("sorsa", rank=3)` trains and returns the run's folder; `handles` keeps what was trained."""

    def __init__(self, place: Path):
        self.place, self.base, self.handles = place, place / "base", {}
        torch.manual_seed(0)
        weights = Network().state_dict()
        self.base.mkdir()
        save_file(weights, self.base / "model.safetensors")
        self.deltas: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def __call__(self, method: str, name: str = "", **options) -> Path:
        run = self.place / (name or method)
        torch.manual_seed(1)
        model, x, y = Network(), torch.randn(7, 12), torch.randn(7, 9)
        model.load_state_dict(_weights(self.base))
        plan = method if method not in BASELINES else BASELINES[method]()
        handle = vislora.attach(model, plan, targets=None if method == "full" else ["query", "value"], **options)
        optimizer = torch.optim.Adam(handle.param_groups(1e-2))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        handle.bind(optimizer, STEPS[-1], 1e-2)

        def backward():
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        handle.prepare(backward)
        config = {"adapter": method, "adapter_options": handle.method.options() if method != "full" else {}, "seed": 0,
                  "pretrained_model_name_or_path": str(self.base), "max_train_steps": STEPS[-1]}  # fmt: skip
        optimizer.zero_grad()
        for step in range(1, STEPS[-1] + 1):
            backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in STEPS:
                save_state(run / "checkpoints", step, handle, optimizer, schedule, None, {"config": config}, None)
                self.deltas[run.name, step] = {k: v.clone() for k, v in handle.deltas().items()}
        handle.save(run / "adapter")
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run / "metrics.json").write_text(json.dumps({"steps": STEPS[-1]}))
        self.handles[run.name] = handle
        return run


def _weights(base: Path) -> dict[str, torch.Tensor]:
    from vislora.io import read

    return read(base / "model.safetensors")[0]


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)
