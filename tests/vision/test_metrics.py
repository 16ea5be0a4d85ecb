"""Scores and the measures of forgetting, against plain numpy and known cases."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from tiny_vit import timm_vit

import vislora
from vislora.vision import forgetting, metrics, plots


def test_scores_are_counted_by_hand():
    rows = [[2, 1, 0, 0, 0, 0, 0], [0, 3, 1, 0, 0, 0, 0], [0, 3, 1, 0, 0, 0, -9], [1, 2, 3, 4, 5, 6, 0]]
    logits = torch.tensor(rows, dtype=torch.float32)
    labels = torch.tensor([0, 1, 2, 6])
    s = metrics.scores(logits, labels)
    assert (s.n, s.top1, s.top5) == (4, 0.5, 0.75)
    assert s.per_class[:3].tolist() == [1, 1, 0] and math.isnan(s.per_class[3])
    assert s.confusion[2, 1] == 1 and s.confusion[6, 5] == 1 and s.confusion.sum() == 4
    assert s.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics.scores(logits[:, :3], torch.tensor([0, 1, 2, 2])).top5 == 1


def test_calibration_error_is_the_mean_gap_of_its_bins():
    rng = np.random.default_rng(0)
    confidence, right = rng.uniform(0, 1, 500), rng.uniform(0, 1, 500) < 0.6
    edges, gap = np.linspace(0, 1, 16), 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert metrics.calibration_error(torch.tensor(confidence), torch.tensor(right)) == pytest.approx(gap, abs=1e-9)
    sure = torch.full((10,), 0.7)
    assert metrics.calibration_error(sure, torch.arange(10) < 7) == pytest.approx(0, abs=1e-6)


def test_per_class_tables(tmp_path):
    s = metrics.scores(torch.eye(3), torch.tensor([0, 1, 1]))
    metrics.write_per_class(tmp_path / "a.csv", ["x", "y", "z"], {"accuracy": s.per_class}, s.confusion.sum(-1))
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [r["images"] for r in rows] == ["1", "2", "0"]
    assert [r["accuracy"] for r in rows] == ["1.000000", "0.500000", "nan"]


def test_neighbours_vote_by_similarity():
    bank = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [-1, 0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    votes = forgetting.knn_logits(bank, labels, torch.tensor([[2.0, 0.1], [0, 5.0], [-3, 0.0]]), 3, k=3, chunk=2)
    assert votes.argmax(-1).tolist() == [0, 1, 2]
    near = torch.nn.functional.normalize(bank, dim=-1) @ torch.tensor([0, 1.0])
    best = near.topk(3)
    assert votes[1, 1] == pytest.approx((best.values[labels[best.indices] == 1] / 0.07).exp().sum().item(), rel=1e-5)
    turned = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))[0]
    again = forgetting.knn_logits(bank @ turned, labels, torch.tensor([[2.0, 0.1]]) @ turned, 3, k=3)
    torch.testing.assert_close(again, votes[:1], rtol=1e-4, atol=1e-4)  # blind to a rotation of the features


def test_cka_knows_rotation_scale_and_strangers():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=g)
    turned = torch.linalg.qr(torch.randn(8, 8, generator=g))[0]
    assert forgetting.linear_cka(x, 3 * x @ turned + 5) == pytest.approx(1)
    assert forgetting.linear_cka(x, torch.randn(200, 8, generator=g)) < 0.15
    y = x + torch.randn(200, 8, generator=g)
    k, m = (t - t.mean(0) for t in (x.double(), y.double()))
    k, m = k @ k.T, m @ m.T  # Gram matrices of centred features: HSIC by traces
    assert forgetting.linear_cka(x, y) == pytest.approx(((k * m).sum() / (k.norm() * m.norm())).item(), rel=1e-9)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_update_norms_are_those_of_the_matrices(method):
    model = timm_vit()
    model.reset_classifier(0)
    before = model.blocks[1].attn.qkv.weight.detach().clone()
    adapter = vislora.attach(model, method, **({} if method == "full" else {"rank": 2}))
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    found = forgetting.update_norms(adapter)
    delta = adapter.deltas()["blocks.1.attn.qkv"]
    rows, name = (slice(None), "blocks.1.attn.qkv") if method == "full" else (slice(48, 72), "blocks.1.attn.qkv[v]")
    for norm, p in (("nuclear", "nuc"), ("frobenius", "fro"), ("spectral", 2)):
        size, base = (torch.linalg.matrix_norm(t[rows], p).item() for t in (delta, before))
        assert found[name][norm] == pytest.approx(size, rel=1e-4)
        assert found[name][f"{norm}_ratio"] == pytest.approx(size / base, rel=1e-4)
    largest = forgetting.NuclearRatio(adapter)
    assert largest() == largest() == pytest.approx(max(row["nuclear_ratio"] for row in found.values()), rel=1e-4)


def test_means_and_the_pareto_front(tmp_path):
    assert forgetting.geometric_mean(0.8, 0.2) == pytest.approx(0.4)
    points = [(0.9, 0.3), (0.5, 0.5), (0.4, 0.4), (0.1, 0.9), (0.1, 0.8), (0.9, 0.3)]
    assert plots.pareto_front(points) == [3, 1, 0, 5]
    groups = {"a": points[:3], "b": points[3:]}
    file = plots.trade_off(tmp_path / "a.png", groups, {"a": [(0.01, 0.02)] * 3})
    assert file.stat().st_size > 1000
