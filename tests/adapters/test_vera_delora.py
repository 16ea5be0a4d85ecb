"""VeRA's shared matrices, and DeLoRA's three forms with their bounds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vislora
from vislora import attach, linalg
from vislora.errors import InputError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8))


def shake(adapter, size=0.5):
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=g))


def test_vera_layers_take_leading_parts_of_one_pair(tmp_path):
    model = net()
    adapter = attach(model, "vera", rank=30, seed=5)
    part = adapter.parts[""]
    one, two = (part.tensors_of(site) for site in part.sites)
    assert one.A.data_ptr() == two.A.data_ptr() and one.B.data_ptr() == two.B.data_ptr()
    assert one.A.shape == (30, 12) and two.A.shape == (30, 20) and two.B.shape == (8, 30)
    whole = two.A
    assert whole.abs().max() <= (6 / 20) ** 0.5 and abs(whole.var().item() * 3 / (6 / 20) - 1) < 0.2
    assert sum(p.numel() for p in adapter.parameters()) == 20 + 30 + 8 + 30
    x, g = torch.randn(5, 12), torch.randn(5, 20)
    (model[0](x) * g).sum().backward()
    p = dict(adapter.named_parameters())
    expected = (g * (x @ one.A.mT * 0.1 @ one.B.mT)).sum(0)
    assert torch.allclose(p["0.b"].grad, expected, rtol=1e-4, atol=1e-5) and not p["0.d"].grad.any()
    shake(adapter)
    deltas = adapter.deltas()
    file = adapter.save(tmp_path)
    assert set(vislora.io.read(file)[0]) == {"0.b", "0.d", "2.b", "2.d"}
    adapter.detach()
    again = vislora.load(model, tmp_path)
    assert all(torch.equal(d, deltas[k]) for k, d in again.deltas().items())
    other = attach(net(), "vera", rank=30, seed=6).parts[""]
    assert not torch.equal(other.tensors_of(other.sites[0]).A, one.A)


@pytest.mark.parametrize("form", ["residual", "zero"])
def test_delora_strength_bounds_the_update(form):
    model = net()
    adapter = attach(model, "delora", rank=4, delora_lambda=3.0, form=form)
    assert all(not d.any() for d in adapter.deltas().values())
    shake(adapter)
    tensors = dict(adapter.named_tensors())
    for name, delta in adapter.deltas().items():
        columns = model.get_submodule(name).weight.norm(dim=0)
        assert torch.equal(tensors[f"{name}.columns"], columns.detach())
        limit = tensors[f"{name}.strength"].abs() * (2 if form == "residual" else 1)
        assert (delta / columns).norm() <= limit * (1 + 1e-5)
    if form == "residual":
        assert tensors["0.A0"].data_ptr() != tensors["0.A"].data_ptr()


def test_delora_is_free_of_the_scale_of_its_factors_and_linear_in_strength():
    model = net()
    adapter = attach(model, "delora", rank=4, form="zero")
    shake(adapter)
    before = adapter.deltas()
    p = dict(adapter.named_parameters())
    x, g = torch.randn(5, 12), torch.randn(5, 20)
    (model[0](x) * g).sum().backward()
    slope = ((g.mT @ x) * before["0"]).sum() / p["0.strength"]
    assert torch.isclose(p["0.strength"].grad, slope, rtol=1e-4)
    with torch.no_grad():
        for n, t in p.items():
            t.mul_({"A": 5.0, "B": 0.3}.get(n[-1], 1.0))
    assert all(torch.allclose(d, before[k], atol=1e-5) for k, d in adapter.deltas().items())


def test_bounded_delora_stays_inside_the_nuclear_norm_ball():
    model = net()
    adapter = attach(model, "delora", rank=4, form="bounded", delta=2.0)
    assert all(not d.any() for d in adapter.deltas().values())
    assert {n.rpartition(".")[2] for n, _ in adapter.named_parameters()} == {"A", "B"}
    for size in (0.1, 1.0, 100.0):
        shake(adapter, size)
        for delta in adapter.deltas().values():
            assert linalg.schatten(torch.linalg.svdvals(delta), 1) <= 2.0 * (1 + 1e-5)


def test_bad_options_are_refused():
    for options, word in (
        ({"form": "bounded"}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"form": "new"}, "new"),
        ({"delora_lambda": 0.0}, "0.0"),
    ):
        with pytest.raises(InputError, match=word):
            attach(net(), "delora", rank=4, **options)
