"""CONTRIBUTING's worked example: its two blocks are all that a new method needs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from script_runs import opened
from torch import nn

import vislora
from vislora import adapters
from vislora.adapters._table import table
from vislora.testing import CHECKS, METHOD_CHECKS, Subject, check, hosts

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The config's path, with the method's file in a folder that the registry reads as its own."""
    (code,), (config,) = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S) for kind in ("python", "yaml"))
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "lora_fa.py").write_text(code, encoding="utf-8")
    (tmp_path / "lora_fa.yaml").write_text(config, encoding="utf-8")
    assert "lora_fa" not in vislora.methods()
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(tmp_path / "methods")])
    yield tmp_path / "lora_fa.yaml"
    sys.modules.pop("vislora.adapters.lora_fa", None)
    vars(adapters).pop("lora_fa", None)


def test_the_file_is_a_method(example):
    assert "lora_fa" in vislora.methods()
    method = adapters.get("lora_fa")(rank=4)
    assert check(method) == len(METHOD_CHECKS) + len(hosts()) * len(CHECKS)
    assert "| `lora_fa` | dW = (alpha / r) B A" in table()


def test_it_learns_with_a_fixed_inner_factor(example):
    model = nn.Sequential(nn.Linear(12, 20))
    adapter = vislora.attach(model, "lora_fa", rank=4, alpha=8)
    fixed = {n: t.clone() for n, t in adapter.named_tensors()}["0.A"]
    x, g = torch.randn(5, 12), torch.randn(5, 20)
    (model(x) * g).sum().backward()
    t = dict(adapter.named_tensors())
    assert torch.allclose(t["0.B"].grad, 2 * g.mT @ x @ fixed.mT, rtol=1e-4, atol=1e-5)
    assert [n for n, _ in adapter.named_parameters()] == ["0.B"] and torch.equal(t["0.A"], fixed)


def test_the_checks_would_notice_a_broken_method(example, tmp_path):
    file = tmp_path / "methods" / "lora_fa.py"
    file.write_text(file.read_text().replace("nn.Parameter(torch.zeros(", "nn.Parameter(torch.ones("))
    start = next(one for one in CHECKS if one.__name__ == "starts_as_the_base")
    with pytest.raises(AssertionError):
        start(Subject(adapters.get("lora_fa")(rank=4), hosts()[0]))


def test_the_entry_starts_a_run(example, tmp_path, monkeypatch, capsys):
    script = opened("train_scripts/dreambooth.py")
    options, method = script.parse(["--config", str(example)])
    assert options.adapter == "lora_fa" and options.learning_rate == 1e-3
    assert method == adapters.get("lora_fa")(rank=16, alpha=16.0)
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state()
    PartialState._reset_state()
    threads = torch.get_num_threads()
    try:
        script.main(["--config", str(example), "--dry_run", "--rank", "8"])
    finally:
        torch.set_num_threads(threads)
    assert "lora_fa {'rank': 8, 'alpha': 16.0}: 56 layers" in capsys.readouterr().out
