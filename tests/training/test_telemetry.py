"""What a logging step measures of the adapter, against whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vislora
from vislora.training import telemetry


def norm(matrix: torch.Tensor, kind: str | float) -> float:
    return torch.linalg.norm(matrix.detach().double(), kind).item()


@pytest.mark.parametrize("method", ["lora", "pissa", "nb_lora", "delora"])
def test_norms_of_update_and_factors(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5))
    bases = {"0": model[0].weight.detach().clone(), "1": model[1].weight.detach().clone()}
    alpha = {"alpha": 6} if method == "lora" else {}
    adapter = vislora.attach(model, method, targets="all-linear", rank=3, **alpha)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    by_site, largest = telemetry.layers(adapter)
    deltas = adapter.deltas()
    updates = {name: update for name, _, _, update in adapter.site_updates()}
    assert by_site.keys() == deltas.keys() and len(by_site) == 2
    for name, seen in by_site.items():
        delta, base = deltas[name], bases[name.rpartition(".")[2]]
        expected = {
            "norm": norm(delta, "fro"), "spectral": norm(delta, 2), "nuclear": norm(delta, "nuc"),
            "ratio": norm(delta, "fro") / norm(base, "fro"),
            "up": norm(updates[name].up, "fro"), "down": norm(updates[name].down, "fro"),
        }  # fmt: skip
        shared = {key: value for key, value in seen.items() if key != "share"}
        assert shared == pytest.approx(expected, rel=1e-4)
        assert ("share" in seen) == (method == "nb_lora")  # DeLoRA trains its bound
        if method == "lora":  # all scale, alpha / r = 2, is in B
            own = next(tensors for site, _, tensors, _ in adapter.site_updates() if site == name)
            assert seen["up"] == pytest.approx(2 * norm(own.B, "fro"), rel=1e-5)
            assert seen["down"] == pytest.approx(norm(own.A, "fro"), rel=1e-5)
    for key in ("norm", "spectral", "nuclear", "up", "down", "ratio"):
        assert largest[f"largest_{key}"] == max(seen[key] for seen in by_site.values())
