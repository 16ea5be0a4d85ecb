"""Measures against plain decompositions of the dense matrices, and against matrices whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from vislora.spectrum import plots
from vislora.spectrum.measures import Change, Original, base_row, condition, measure, moved, off_orthonormal
from vislora.update import Update


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(m: int, n: int, r: int) -> tuple[torch.Tensor, Change]:
    return randn(m, n), Change(0.3 * randn(m, r, seed=1), randn(r, n, seed=2), rank=r)


@pytest.mark.parametrize(("m", "n", "r"), [(9, 7, 2), (5, 8, 3), (6, 6, 6), (4, 9, 8)])
def test_factored_equals_dense(m, n, r):
    weight, change = made(m, n, r)
    factored = measure(change, Original(weight), principal_rank=3)
    dense = measure(Change(dense=change.up @ change.down), Original(weight), principal_rank=3)
    assert factored.keys() == dense.keys()
    shorter = min(len(factored["values"]), len(dense["values"]))
    assert factored.pop("values")[:shorter] == pytest.approx(dense.pop("values")[:shorter], abs=1e-12)
    assert factored == pytest.approx(dense, rel=1e-9, abs=1e-12)


def test_values_are_those_of_the_dense_decomposition():
    weight, change = made(9, 7, 2)
    update, row = change.up @ change.down, measure(change, Original(weight))
    S = torch.linalg.svdvals(update)
    assert row["values"] == pytest.approx(S[:2].tolist())
    norms = [torch.linalg.matrix_norm(update, ord=kind).item() for kind in (2, "fro", "nuc")]
    assert [row["spectral"], row["frobenius"], row["nuclear"]] == pytest.approx(norms)
    shares = S[:2] / S[:2].sum()
    assert row["effective_rank"] == pytest.approx(math.exp(-(shares * shares.log()).sum().item()))
    assert row["condition"] == pytest.approx(torch.linalg.cond(weight + update).item())
    assert row["ratio"] == pytest.approx((update.norm() / weight.norm()).item())
    U, S, Vh = torch.linalg.svd(weight)
    principal = U[:, :2] @ torch.diag(S[:2]) @ Vh[:2] + update
    found = torch.linalg.svdvals(principal)
    assert row["condition_principal"] == pytest.approx((found[0] / found[1]).item())
    adapted = torch.linalg.svdvals(weight + update)
    assert row["weight_nuclear"] == pytest.approx(adapted.sum().item())


def test_changes_are_equations_1_to_4():
    weight, change = made(6, 8, 2)
    adapted = weight + change.up @ change.down
    (U, S, Vh), (U2, S2, Vh2) = (torch.linalg.svd(w, full_matrices=False) for w in (weight, adapted))
    row, k = measure(change, Original(weight)), 6
    assert row["d_sigma"] == pytest.approx(sum(abs(S2[i] - S[i]).item() for i in range(k)) / k)
    cosines = [abs(U[:, i] @ U2[:, i]).item() + abs(Vh[i] @ Vh2[i]).item() for i in range(k)]
    assert row["d_vectors"] == pytest.approx(1 - sum(cosines) / (2 * k))


def test_changes_that_are_known():
    U, V = (torch.linalg.qr(randn(5, 5, seed=seed)).Q for seed in (3, 4))
    S = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).double()
    weight = U @ torch.diag(S) @ V.mT
    stretched = measure(Change(U[:, :1] * 2, V[:, :1].mT), Original(weight))  # the largest value grows by 2
    assert stretched["d_sigma"] == pytest.approx(2 / 5) and stretched["d_vectors"] == pytest.approx(0, abs=1e-12)
    assert stretched["condition"] == pytest.approx(7)
    swapped = U @ torch.diag(S) @ V[:, [1, 0, 2, 3, 4]].mT  # two right vectors change places
    row = measure(Change(dense=swapped - weight), Original(weight))
    assert row["d_sigma"] == pytest.approx(0, abs=1e-12) and row["d_vectors"] == pytest.approx(2 / 10)
    still = torch.linalg.svd(weight, full_matrices=False)
    assert moved(still, still) == (0, pytest.approx(0, abs=1e-12))


def test_an_update_of_nothing_is_the_base():
    weight, _ = made(6, 5, 2)
    none = measure(Change(torch.zeros(6, 2), torch.zeros(2, 5), rank=2), Original(weight))
    base = base_row(Original(weight), 2)
    assert none.keys() - {"values"} == base.keys() - {"values"}
    assert all(none[key] == pytest.approx(base[key], abs=1e-12) for key in base if key != "values")


def test_dora_goes_by_its_magnitude():
    weight, change = made(6, 5, 2)
    magnitude = torch.rand(6, generator=torch.Generator().manual_seed(5)).double() + 1
    row = measure(Change(change.up, change.down, magnitude=magnitude, rank=2), Original(weight))
    update = Update(change.up, change.down, magnitude=magnitude)
    dense = update.with_row_scale(weight).dense(weight)
    assert torch.linalg.vector_norm(weight + dense, dim=1).tolist() == pytest.approx(magnitude.tolist())
    assert row["values"] == pytest.approx(torch.linalg.svdvals(dense).tolist())


def test_bounds_and_bases():
    _, change = made(6, 5, 2)
    Q = torch.linalg.qr(randn(6, 3)).Q
    held = Change(change.up, change.down, bound=(1.0, 10.0), bases={"Q": Q, "2Q": 2 * Q})
    row = measure(held, None)
    assert row["share"] == pytest.approx(row["nuclear"] / 10) and "condition" not in row
    assert row["off_orthonormal_by_basis"] == pytest.approx({"Q": 0, "2Q": 3 * 3**0.5}, abs=1e-12)
    assert off_orthonormal(2 * Q) == pytest.approx(torch.linalg.matrix_norm(3 * torch.eye(3)).item())


def test_a_singular_weight_has_an_infinite_condition():
    assert condition(torch.tensor([2.0, 0.0])) == math.inf
    assert condition(torch.tensor([3.0, 2.0, 1.5])) == 2


def test_histograms_count_every_value():
    values = randn(500).abs().tolist() + [0.0] * 7
    edges = torch.logspace(-1, math.log10(max(values)) + 1e-6, 21).tolist()
    below, counts = plots.counted(values, edges)
    assert below == sum(v < edges[0] for v in values) >= 7
    assert len(counts) == 20 and below + sum(counts) == len(values)


def test_summaries():
    rows = [{"run": "a", "step": s, "x": v} for s, v in ((0, 1.0), (5, 4.0), (5, 16.0))] + [{"run": "b", "step": 1}]
    assert plots.by_step(rows, "x", plots.mean) == {"a": [(0, 1.0), (5, 10.0)]}
    assert plots.median([3.0, 1.0, math.inf]) == 3
    assert plots.rolling([1.0, 2.0, 3.0, 7.0], 2) == [1.0, 1.5, 2.5, 5.0]
    assert plots.rolling([1.0, 2.0], 1) == [1.0, 2.0]
