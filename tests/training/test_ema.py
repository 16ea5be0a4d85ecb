"""The moving average: its numbers, the way in and back, and through a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vislora import attach
from vislora.errors import InputError
from vislora.training import checkpoint
from vislora.training.ema import EMA


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))


def drift(parameters, step: int) -> None:
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))


def test_it_is_torchs_average_of_a_whole_model():
    model = net()
    ema = EMA(model.named_parameters(), 0.9)
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    torchs.update_parameters(model)  # the first call copies
    for step in range(5):
        drift(model.parameters(), step)
        ema.update()
        torchs.update_parameters(model)
    for name, p in torchs.module.named_parameters():
        torch.testing.assert_close(ema.average[name], p)


def test_only_what_trains_is_held_and_swapping_is_exact():
    model = net()
    adapter = attach(model, "lora", rank=2)
    ema = EMA(adapter.named_parameters(), 0.5)
    assert len(ema.average) == len(list(adapter.parameters()))
    x = torch.randn(3, 6)
    before = model(x).detach()
    drift(adapter.parameters(), 0)
    ema.update()
    trained = model(x).detach()
    own = [p.detach().clone() for p in adapter.parameters()]
    with pytest.raises(KeyError), ema.swapped():
        inside = model(x).detach()
        raise KeyError
    assert not torch.equal(inside, trained) and not torch.equal(inside, before)
    assert all(torch.equal(a, b) for a, b in zip(own, adapter.parameters(), strict=True))
    assert torch.equal(model(x), trained)


def test_warmup_forgets_the_start():
    (p,) = (nn.Parameter(torch.zeros(1)),)
    plain, ramp = EMA([("p", p)], 0.999), EMA([("p", p)], 0.999, warmup=True)
    with torch.no_grad():
        p.fill_(1.0)
    for _ in range(50):
        plain.update()
        ramp.update()
    assert plain.average["p"] < 0.06 and ramp.average["p"] > 0.99
    assert ramp.rate(1) == 0.1 and ramp.rate(10**6) == 0.999


def test_half_precision_is_averaged_in_float32():
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = EMA([("p", p)], 0.999)
    with torch.no_grad():
        p.fill_(2.0)
    ema.update()
    assert ema.average["p"].dtype == torch.float32 and abs(float(ema.average["p"]) - 1.001) < 1e-6


def test_a_checkpoint_carries_it_bit_for_bit(tmp_path):
    model = net()
    ema = EMA(model.named_parameters(), 0.9, warmup=True)
    for step in range(3):
        drift(model.parameters(), step)
        ema.update()
    path = checkpoint.save(tmp_path, 3, {"ema": ema.state()}, {}, None)
    again = EMA(net().named_parameters(), 0.9, warmup=True)
    again.load_state(checkpoint.load(path).tensors["ema"])
    assert again.steps == 3 and all(torch.equal(t, again.average[n]) for n, t in ema.average.items())
    with pytest.raises(InputError, match="do not fit"):
        EMA(nn.Linear(2, 2).named_parameters(), 0.9).load_state(ema.state())
    with pytest.raises(InputError, match=r"not in \[0, 1\)"):
        EMA([], 1.0)
