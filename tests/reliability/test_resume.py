"""A run that is cut after any step, and after every one, goes on bit for bit: every method, every script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reliability.forks import load
from reliability.plays import SCRIPTS, play, play_one_step, require_equal, stage, state
from safetensors.torch import load_file
from torch import nn

import vislora
from vislora import adapters, attach
from vislora.training import checkpoint
from vislora.training.resume import load_state, save_state

TOTAL, EPOCH = 11, 5
OPTIONS = {
    "adalora": {"init_r": 4, "tinit": 2, "tfinal": 2}, "lora": {"dropout": 0.3}, "sorsa": {"gamma": 1.0},
    "lora_sb": {"init_batches": 2}, "lora_ga": {}, "od_lora": {"init_rounds": 2, "init_steps": 3},
    "rslora": {"optimal_gradient": True},
}  # fmt: skip
# Methods with a schedule, a penalty, a data-driven start or random masks: state of their own.
STATEFUL = list(OPTIONS)


class Toy:
    """A run of the library's parts alone: a small model, an adapter, an optimizer with a schedule."""

    def __init__(self, method: str):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16)).train()
        self.adapter = attach(self.model, method, rank=2, seed=3, **OPTIONS.get(method, {}))
        self.optimizer = torch.optim.AdamW(self.adapter.param_groups(0.02))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / 20)
        self.adapter.bind(self.optimizer, TOTAL)

    def backward(self, step: int) -> torch.Tensor:
        torch.manual_seed(step)  # dropout's
        g = torch.Generator().manual_seed(step % EPOCH)
        x, y = torch.randn(8, 12, generator=g), torch.randn(8, 16, generator=g)
        loss = (self.model(x) - y).square().mean() + self.adapter.penalty()
        loss.backward()
        return loss

    def begin(self) -> None:
        calls = iter(range(1000))
        self.adapter.prepare(lambda: self.backward(next(calls)))

    def resume(self, place: Path, step: int) -> None:
        saved = checkpoint.load(place / f"checkpoint-{step}")
        load_state(saved, self.adapter, self.optimizer, self.schedule, None)

    def step(self, number: int, place: Path) -> None:
        self.backward(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        save_state(place, number + 1, self.adapter, self.optimizer, self.schedule, None, {}, None)


def of(place: Path, step: int) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(place / f"checkpoint-{step}")
    return {f"{file}.{name}": t for file, tensors in saved.tensors.items() for name, t in tensors.items()}


@pytest.mark.case("F35")
@pytest.mark.parametrize("method", vislora.methods())
def test_every_method_goes_on_from_every_step(tmp_path, method):
    """From checkpoint k one step is made, and is step k + 1 of the run that was not cut: so for every k, all are."""
    whole = Toy(method)
    whole.begin()
    for step in range(TOTAL):
        whole.step(step, tmp_path / "whole")
    moved = [n for n, t in of(tmp_path / "whole", 1).items() if not torch.equal(t, of(tmp_path / "whole", TOTAL)[n])]
    assert moved, "nothing trains"
    for step in range(1, TOTAL):
        cut = Toy(method)
        cut.resume(tmp_path / "whole", step)
        cut.step(step, tmp_path / "cut")
        require_equal(of(tmp_path / "whole", step + 1), of(tmp_path / "cut", step + 1))
        one, two = (checkpoint.load(tmp_path / p / f"checkpoint-{step + 1}").state for p in ("whole", "cut"))
        assert one == two


def test_stateful_methods_are_all_of_those():
    """A method that takes a schedule, a penalty or a start on data has options here."""
    kinds = {n: adapters.get(n) for n in vislora.methods()}
    own = {n for n, m in kinds.items() if m.needs_prepare or vars(m).keys() & {"on_step", "penalty"}}
    assert own and own <= set(STATEFUL) and set(STATEFUL) <= set(FLAGS)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return stage(tmp_path_factory.mktemp("stage"))


FLAGS = {
    "adalora": ("--init_r", "3", "--tinit", "2", "--tfinal", "2"), "sorsa": (), "lora_sb": ("--init_batches", "2"),
    "lora_ga": (), "od_lora": ("--init_rounds", "2", "--init_steps", "3"), "lora": ("--dropout", "0.3"),
    "rslora": ("--optimal_gradient",), "scaled_adamw": ("--optimizer", "scaled_adamw"),
    "lora_pro": ("--optimizer", "lora_pro"), "alt_lora": ("--optimizer", "alt_lora", "--alt_lora_alternate"),
}  # fmt: skip
QUICK = dict(zip(SCRIPTS, ("od_lora", "adalora", "sorsa", "lora_sb"), strict=True))  # the others are slow
CHAINS = [
    pytest.param(script, method, marks=() if QUICK[script] == method else pytest.mark.slow)
    for script in SCRIPTS for method in FLAGS
]  # fmt: skip


@pytest.mark.case("F35", "F36")
@pytest.mark.parametrize("name, method", CHAINS)
def test_ten_resumes_in_a_chain(place, tmp_path, monkeypatch, name, method):
    """Each goes on for one step of two epochs and one; all that was saved after it is what the whole run saved.

    method: or an optimizer with a state of its own, which trains LoRA.
    """
    script = load(name)
    monkeypatch.chdir(place)
    flags = ("--adapter", method if method in STATEFUL else "lora", *FLAGS[method])
    whole, chain = str(tmp_path / "whole"), str(tmp_path / "chain")
    play(script, *flags, "--output_dir", whole)
    more: tuple[str, ...] = ()
    for step in range(1, TOTAL):
        assert play_one_step(script, monkeypatch, *flags, "--output_dir", chain, *more) == 143
        require_equal(state(whole, step), state(chain, step))
        more = ("--resume_from_checkpoint", "latest")
    play(script, *flags, "--output_dir", chain, *more)
    require_equal(state(whole, TOTAL), state(chain, TOTAL))
    for file in sorted(Path(whole).rglob("adapter.safetensors")) + sorted(Path(whole).rglob("head.safetensors")):
        require_equal(load_file(file), load_file(Path(chain) / file.relative_to(whole)))
    logs = [[json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
            for out in (whole, chain)]  # fmt: skip
    one, two = ([(e["step"], e["loss"], e.get("lr")) for e in log if "loss" in e] for log in logs)
    assert one == two and [step for step, *_ in one] == list(range(1, TOTAL + 1))
