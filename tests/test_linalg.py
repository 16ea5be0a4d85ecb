"""Bases by Gram matrices, which a GPU takes: the ones that QR makes, or a word that they are not."""

from __future__ import annotations

import pytest
import torch

from vislora import linalg


def columns(n: int, condition: float, r: int = 6) -> torch.Tensor:
    """Three matrices (n, r) whose singular values fall from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(n)
    U, _ = torch.linalg.qr(torch.randn(3, n, r, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(3, r, r, generator=generator, dtype=torch.float64))
    return U * torch.logspace(0, -torch.tensor(condition).log10(), r, dtype=torch.float64) @ V


@pytest.mark.parametrize("n", [6, 50, 700])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_the_basis_of_qr(n, condition):
    x = columns(n, condition)
    Q, fits = linalg.orthonormal_by_gram(x)
    assert fits.tolist() == [True] * 3
    assert (Q.mT @ Q - torch.eye(6, dtype=Q.dtype)).abs().max() < 1e-13
    torch.testing.assert_close(Q, linalg.orthonormal(x), atol=1e-14 * condition**1.5, rtol=0)
    assert (Q @ (Q.mT @ x) - x).abs().max() < 1e-14


def test_columns_of_any_length_and_float32():
    x = (columns(50, 10.0) * torch.logspace(-18, 18, 6, dtype=torch.float64)).float()
    Q, fits = linalg.orthonormal_by_gram(x)
    assert Q.dtype == torch.float32 and fits.all()
    torch.testing.assert_close(Q, linalg.orthonormal(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spoil", ["zero", "equal", "near", "nan"])
def test_dependent_columns_are_named_and_their_neighbours_are_not(spoil):
    x = columns(50, 10.0)
    x[1] = {"zero": torch.zeros(50, 6), "equal": x[1][:, [0, 0, 1, 2, 3, 4]], "near": columns(50, 1e12)[1],
            "nan": torch.full((50, 6), torch.nan)}[spoil].double()  # fmt: skip
    Q, fits = linalg.orthonormal_by_gram(x)
    assert fits.tolist() == [True, False, True]
    torch.testing.assert_close(Q[::2], linalg.orthonormal(x)[::2], atol=1e-10, rtol=0)
