"""The linear algebra that methods share. Every function takes leading batch dimensions and works in float32 or
float64, never lower: torch has no half-precision inverse, QR or SVD, and a Cayley map with bf16 products is off
orthonormality by 1 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor


def without_autocast(device: torch.device):
    """A context in which products keep their operands' precision; tensors without storage have none to lose."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def precise(x: Tensor) -> Tensor:
    """`x` as float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


class _Cayley(torch.autograd.Function):
    """(down, up) -> (A, B) of `cayley`, saving one r x r inverse beside what came in.

    The backward is derived here from V = (I + K + Y Yᵀ)⁻¹, G = 2V - I, H = -2 V Y. It agrees with NB-LoRA's
    equation (25) once that equation's sign error is mended: the ½HM term of its gradient for Y is added. Y and H stay
    in the two parts that come in and go out; scales are on r x r matrices, so wide ones are passed over once.
    """

    @staticmethod
    def forward(ctx, down: Tensor, up: Tensor):
        r = down.shape[-2]
        square, rest = down[..., :r], down[..., r:]
        eye = torch.eye(r, dtype=down.dtype, device=down.device)
        # inv_ex does not wait for the device. No check is needed: the symmetric part of I + K + Y Yᵀ is at
        # least I, so the inverse exists and its norm is at most 1.
        N = _plus(_plus(eye + square - square.mT, rest, rest.mT), up, up.mT)
        V = torch.linalg.inv_ex(N).inverse
        ctx.save_for_backward(V, down, up)
        twice = -2 * V
        return torch.cat([-eye - twice, twice @ rest], dim=-1), twice @ up

    @staticmethod
    def backward(ctx, dA: Tensor, dB: Tensor):
        V, down, up = ctx.saved_tensors
        r = down.shape[-2]
        rest, dG, dH = down[..., r:], dA[..., :r], dA[..., r:]
        dV = dG - dH @ rest.mT - dB @ up.mT  # half of it
        twice = -2 * V.mT
        dN = twice @ dV @ V.mT
        both = dN + dN.mT
        to_rest = _plus(twice @ dH, both, rest)
        return torch.cat([dN - dN.mT, to_rest], dim=-1), _plus(twice @ dB, both, up)


def _plus(into: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """into + a b, in one pass for one matrix or a batch of them."""
    if into.dim() == 3:
        return torch.baddbmm(into, a, b)
    return torch.addmm(into, a, b) if into.dim() == 2 else into + a @ b


def cayley(down: Tensor, up: Tensor, backward: str = "custom") -> tuple[Tensor, Tensor]:
    """Orthonormalise two free matrices jointly by the Cayley transform of NB-LoRA (equations 6 to 8).

    down: (..., r, n), up: (..., r, m) with r <= n. Returns A (..., r, n) and B (..., r, m) with
    A Aᵀ + B Bᵀ = I, smooth in both, and B = 0 exactly where up = 0.
    backward: "custom" saves one r x r matrix a layer; "autodiff" differentiates the plain expression.

    Written row-wise: with [X; Y] the paper's split of [Ãᵀ; B̃ᵀ] after r rows, K is Xᵀ - X and `Y` here its Yᵀ, so
    that V below is the transposed inverse of the paper's I + Z and only one r x r system is solved.
    """
    r, n = down.shape[-2:]
    with without_autocast(down.device):
        down, up = precise(down), precise(up)
        if backward == "custom":
            return _Cayley.apply(down, up)
        K = down[..., :r] - down[..., :r].mT
        Y = torch.cat([down[..., r:], up], dim=-1)
        eye = torch.eye(r, dtype=K.dtype, device=K.device)
        V = torch.linalg.inv(eye + K + Y @ Y.mT)
        G, H = 2 * V - eye, -2 * (V @ Y)
        return torch.cat([G, H[..., : n - r]], dim=-1), H[..., n - r :]


def cayley_inverse(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Free matrices that `cayley` maps to P down and P up, P a diagonal of signs: up^T diag(s) down is the same.

    down: A (r, n), up: B (r, m), r <= n, with A A^T + B B^T = I. NB-LoRA's theorem 4.2. The signs keep I + G P regular
    (its condition stays small), one rank-one step at a time; each step divides by at least 1.
    """
    r, n = down.shape
    F = torch.cat([precise(down), precise(up)], dim=-1).mT  # (n + m, r)
    eye = torch.eye(r, dtype=F.dtype, device=F.device)
    inverse, signs = eye.clone(), torch.ones_like(F[0])
    for k in range(r):
        x = inverse @ F[:r, k]
        signs[k] = 1.0 if x[k] >= 0 else -1.0
        inverse = inverse - torch.outer(signs[k] * x, inverse[k]) / (1 + x[k].abs())
    F = F * signs
    Z = torch.linalg.solve(eye + F[:r], eye - F[:r])
    free = torch.cat([0.5 * Z, -0.5 * F[r:] @ (eye + Z)])  # X with X - X^T the skew part of Z
    return free[:n].mT.contiguous(), free[n:].mT.contiguous()


def orthonormal(x: Tensor) -> Tensor:
    """Orthonormal basis (..., n, r) of the columns of x (..., n, r) by QR, signs fixed so that diag(R) >= 0.

    Without the fixed signs the basis of a slightly changed x may jump by a column's sign. A GPU's own QR takes one
    matrix of a batch after the other, so there Gram matrices are used where the columns allow it.
    """
    x = precise(x)
    if not x.is_cuda:
        return _householder(x)
    Q, fits = orthonormal_by_gram(x)
    if not fits.all():
        Q[~fits] = _householder(x[~fits])
    return Q


def _householder(x: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(x)
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return Q * sign[..., None, :]


def orthonormal_by_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """The basis that `orthonormal` makes of x (..., n, r), in a handful of operators for a whole batch; and fits (...):
    False where the columns are too near to dependence for it, and the basis there means nothing.

    CholeskyQR2 (Fukaya et al. 2014): x times the inverse of the Cholesky factor of its Gram matrix, twice; that
    factor's diagonal is positive. In float64, on columns of length 1: conditions up to about 1e7 are fine.
    """
    Q = x.double()
    Q = Q / torch.linalg.vector_norm(Q, dim=-2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    R, wrong = torch.linalg.cholesky_ex(Q.mT @ Q, upper=True)
    Q = torch.linalg.solve_triangular(R, Q, upper=True, left=False)
    gram = Q.mT @ Q
    off = (gram - torch.eye(x.shape[-1], dtype=Q.dtype, device=Q.device)).abs().amax(dim=(-2, -1))
    R, still_wrong = torch.linalg.cholesky_ex(gram, upper=True)
    fits = (wrong == 0) & (still_wrong == 0) & (off < 0.1)
    Q = torch.linalg.solve_triangular(R, Q, upper=True, left=False)
    return Q.to(x.dtype), fits


def orthonormal_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`orthonormal` of every (n, r) in `tensors`. Equal shapes are decomposed in one call."""
    groups: dict[tuple, list[int]] = {}
    for i, x in enumerate(tensors):
        groups.setdefault((x.shape, x.dtype, x.device), []).append(i)
    found = list(tensors)
    for members in groups.values():
        for i, Q in zip(members, orthonormal(torch.stack([tensors[i] for i in members])).unbind(), strict=True):
            found[i] = Q
    return found


def top_svd(
    weight: Tensor, rank: int, niter: int | None = None, generator: torch.Generator | None = None, oversample: int = 8
):
    """The `rank` largest singular triplets of weight (m, n): U (m, r), S (r,), V (n, r), in float32 or float64.

    niter: None for the exact decomposition; an integer for randomised subspace iteration (Halko et al. 2011,
    algorithm 4.4) with that many rounds and `oversample` more directions than asked for, which is far quicker for
    large weights.
    """
    weight = precise(weight)
    if niter is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :rank].contiguous(), S[:rank].contiguous(), Vh[:rank].mT.contiguous()
    width = min(rank + oversample, *weight.shape)
    probe = torch.randn(weight.shape[1], width, generator=generator, dtype=weight.dtype).to(weight.device)
    Q = orthonormal(weight @ probe)
    for _ in range(niter):
        Q = orthonormal(weight @ orthonormal(weight.mT @ Q))
    U, S, Vh = torch.linalg.svd(Q.mT @ weight, full_matrices=False)
    return (Q @ U[:, :rank]).contiguous(), S[:rank].contiguous(), Vh[:rank].mT.contiguous()


def product_singular_values(up: Tensor, down: Tensor) -> Tensor:
    """Singular values (..., r), largest first, of up @ down for up (..., m, r), down (..., r, n), never forming it."""
    R_up = torch.linalg.qr(precise(up), mode="r").R
    R_down = torch.linalg.qr(precise(down).mT, mode="r").R
    return torch.linalg.svdvals(R_up @ R_down.mT)


def product_svd(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest triplets U (m, r), S (r,), V (n, r) of up @ down for up (m, k), down (k, n), k >= rank.

    From the k x k core between two QR decompositions; U and V are orthonormal also where the product has a lower rank.
    """
    Q_up, R_up = torch.linalg.qr(precise(up))
    Q_down, R_down = torch.linalg.qr(precise(down).mT)
    U, S, Vh = torch.linalg.svd(R_up @ R_down.mT, full_matrices=False)
    return (Q_up @ U)[:, :rank], S[:rank], (Q_down @ Vh.mT)[:, :rank]


def schatten(values: Tensor, p: float) -> Tensor:
    """Schatten p-norm (...) from singular values (..., r): p = 1 nuclear, 2 Frobenius, inf spectral."""
    if p in (1, 2, math.inf):
        return torch.linalg.vector_norm(values, ord=p, dim=-1)
    largest = values.detach().amax(-1, keepdim=True)  # 0.01 to the 200th power is 0
    unit = torch.where(largest > 0, largest, 1.0)
    return torch.linalg.vector_norm(values / unit, ord=p, dim=-1) * unit[..., 0]
