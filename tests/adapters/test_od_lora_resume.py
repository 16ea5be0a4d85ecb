"""OD-LoRA cut anywhere in its schedule and gone on with from a checkpoint: bit for bit the uninterrupted run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vislora import attach
from vislora.training import checkpoint
from vislora.training.resume import load_state, save_state

TOTAL, INIT_STEPS = 20, 4  # renewals after steps 6, 8, 9, 12, 16 and 20
FORMS = ("full", "limited_capacity", "suboptimal_gradient")


class Cut(Exception):
    """The run ends here."""


def run(place, form="full", stop=TOTAL, resume=False, cut_in_warm_up=None):
    """The tensors after step `stop`; the run leaves its checkpoint there. resume: go on from the last one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16)).train()
    adapter = attach(model, "od_lora", rank=4, init_rounds=2, init_steps=INIT_STEPS, form=form, seed=3)
    optimizer = torch.optim.AdamW(adapter.param_groups(0.02), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.04 * step)
    adapter.bind(optimizer, TOTAL)
    calls = []

    def backward(step):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 12, generator=g), torch.randn(8, 16, generator=g)
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    def warm_up():
        if len(calls) == cut_in_warm_up:
            raise Cut
        calls.append(0)
        return backward(len(calls))

    start = 0
    if resume:
        saved = checkpoint.load(checkpoint.resolve(place, "latest"))
        load_state(saved, adapter, optimizer, schedule, None)
        start = saved.step
    else:
        adapter.prepare(warm_up)
    for step in range(start, stop):
        backward(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    save_state(place, stop, adapter, optimizer, schedule, None, {}, None)
    moments = {f"{n}|{k}": v for n, p in adapter.named_parameters() for k, v in optimizer.state.get(p, {}).items()}
    return {**{n: t.detach().clone() for n, t in adapter.named_tensors()}, **moments}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "cut", [1, INIT_STEPS - 1, INIT_STEPS, INIT_STEPS + 1, 6, 10, 16, 19],
    ids=["first step", "before the rebalancing", "at the rebalancing", "after the rebalancing", "at the first renewal",
         "between renewals", "at a later renewal", "before the last renewal"],
)  # fmt: skip
def test_a_cut_run_goes_on_bit_for_bit(tmp_path, form, cut):
    whole = run(tmp_path / "whole", form)
    run(tmp_path / "cut", form, stop=cut)
    resumed = run(tmp_path / "cut", form, resume=True)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_warm_up_that_was_cut_begins_anew_and_ends_alike(tmp_path):
    whole = run(tmp_path / "whole", stop=1)
    with pytest.raises(Cut):
        run(tmp_path / "cut", cut_in_warm_up=6)
    assert not (tmp_path / "cut").exists()
    again = run(tmp_path / "cut", stop=1)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
