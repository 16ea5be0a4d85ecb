"""Steps that are not finite: what trains and its optimizer are as if they had not been; the means, the end of a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import vislora
from vislora import optim
from vislora.errors import InputError
from vislora.training.meter import LIMIT, Meter


def value(x: float) -> torch.Tensor:
    return torch.tensor(float(x))


class Play:
    """A small model that trains by `name`; gradients of the steps in `bad` are spoiled."""

    def __init__(self, name: str, method: str = "lora", fused: bool = True, scaler: object = None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(80, 64), nn.GELU(), nn.Linear(64, 72))
        self.adapter = vislora.attach(self.model, method, rank=8)  # bitsandbytes wants 4,096 values, or keeps 32 bits
        self.optimizer = optim.build(name, self.adapter, 1.0 if name == "prodigy" else 0.01, fused=fused)
        self.adapter.bind(self.optimizer, 20)
        self.meter = Meter([self.optimizer], scaler)

    def step(self, number: int, bad: float | None = None) -> None:
        x, y = (torch.randn(4, width, generator=torch.Generator().manual_seed(number)) for width in (80, 72))
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        own = list(self.adapter.parameters())
        if bad is not None:
            own[0].grad[0, 0] = bad
        norm = nn.utils.clip_grad_norm_(own, 1.0)
        self.meter.add({"loss": loss, "grad_norm": norm})
        self.optimizer.step()
        self.optimizer.zero_grad()

    def everything(self) -> dict[str, torch.Tensor]:
        held = {n: p.detach().clone() for n, p in self.adapter.named_parameters()}
        for n, p in self.adapter.named_parameters():
            state = self.optimizer.state[p]
            held |= {f"{n}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
        return held


KINDS = [*((name, True) for name in optim.names()), ("adamw", False)]


@pytest.mark.parametrize(("name", "fused"), KINDS, ids=lambda v: v if isinstance(v, str) else f"fused={v}")
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_step_that_is_not_finite_has_not_been(name, fused, bad):
    torch.manual_seed(0)
    one, other = Play(name, fused=fused), Play(name, fused=fused)
    for number in range(3):
        one.step(number)
        other.step(number)
    before = other.everything()
    other.step(99, bad)
    after = other.everything()
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    one.step(3)
    other.step(3)
    assert any(not torch.equal(t, before[n]) for n, t in other.everything().items())
    assert all(torch.equal(t, one.everything()[n]) for n, t in other.everything().items())


def test_adalora_takes_no_importance_from_such_a_step():
    for name in ("adamw", "adamw8bit"):
        play = Play(name, "adalora")
        play.step(0)
        play.step(1, math.nan)
        assert all(t.isfinite().all() for _, t in play.adapter.named_tensors())
        play.step(2)
        assert all(t.isfinite().all() for _, t in play.adapter.named_tensors())


def test_means_are_of_finite_steps_and_the_others_are_counted():
    meter = Meter()
    for loss, norm in ((1, 2), (5, math.inf), (3, 4)):
        meter.add({"loss": value(loss), "grad_norm": value(norm)})
    seen = meter.read(lambda x: 10 * x)
    assert seen.pop("seconds_per_step") > 0
    assert seen == {"loss": 20.0, "grad_norm": 30.0, "skipped_steps": 1.0}
    meter.add({"loss": value(7), "grad_norm": value(1)})
    assert meter.read().keys() == {"loss", "grad_norm", "seconds_per_step"}
    meter.add({"loss": value(math.nan), "grad_norm": value(math.nan)})
    seen = meter.read()
    assert math.isnan(seen["loss"]) and seen["skipped_steps"] == 1


def test_a_penalty_that_came_after_the_norm_is_watched_too():
    meter = Meter()
    meter.add({"loss": value(1), "grad_norm": value(1), "penalty": value(math.inf)})
    assert meter.read()["skipped_steps"] == 1


def test_only_steps_in_a_row_end_a_run_also_across_readings():
    meter = Meter()
    for _ in range(2):
        for norm in [math.nan] * (LIMIT - 1) + [1.0]:
            meter.add({"loss": value(1), "grad_norm": value(norm)})
    meter.read()
    for _ in range(LIMIT - 1):
        meter.add({"loss": value(1), "grad_norm": value(math.nan)})
        meter.read()
    meter.add({"loss": value(1), "grad_norm": value(math.nan)})
    meter.add({"loss": value(1), "grad_norm": value(1)})  # too late
    with pytest.raises(InputError, match=f"--learning_rate.*{LIMIT} steps in a row.*lower it"):
        meter.read()


def test_a_loss_scale_skips_by_itself_and_only_losses_end_the_run():
    play = Play("adamw", fused=False, scaler=object())
    play.step(0, math.inf)
    assert any(p.isnan().any() for p in play.adapter.parameters())  # nobody kept it out: that is the scaler's task
    meter = Meter(scaler=object())
    for _ in range(LIMIT):
        meter.add({"loss": value(1), "grad_norm": value(math.inf)})
    assert meter.read()["skipped_steps"] == LIMIT
    for _ in range(LIMIT):
        meter.add({"loss": value(math.inf), "grad_norm": value(math.inf)})
    with pytest.raises(InputError, match="in a row"):
        meter.read()


def test_nothing_waits_for_the_device_under_a_fused_optimizer(monkeypatch):
    play = Play("adamw")
    play.step(0)

    def waits(self):
        raise AssertionError("a number was read")

    with monkeypatch.context() as patch:
        for name in ("__bool__", "__float__", "__int__", "item", "tolist"):
            patch.setattr(torch.Tensor, name, waits)
        play.meter.add({"loss": torch.ones(()), "grad_norm": torch.ones(())})
