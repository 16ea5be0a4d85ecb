"""Bounded layers as NB-LoRA's free parameters, by the inverse of its map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.nb_lora import NBLoRA
from ..errors import InputError
from .lora import Layer, Names, Stored
from .ours import site_name, stored_as
from .shrink import svd

_EMPTY = 1e-7  # singular values below this share of the largest are rounding


@torch.no_grad()
def as_nb_lora(
    layers: list[Layer],
    p: float,
    delta: float | None,
    delta_ratio: float | None,
    bounds: Mapping[str, float],
    norms: Mapping[Names, float],
    rank: int | None,
    out: Path,
) -> dict[Path, Stored]:
    """Our own file, not yet on disk, of layers whose Schatten p-norms are below `bounds` {layer: delta}.

    norms: of base weights, by which a base is recognised; {} for none. rank: of the parameters, one for all layers;
    None takes the largest that a layer needs. Raises InputError for a rank that a layer is too small for.
    """
    spectra = {layer.name: svd(layer) for layer in layers}
    rank = rank or max(int((S > _EMPTY * S[0]).sum()) for _, S, _ in spectra.values()) or 1
    small = min(layers, key=lambda layer: min(layer.shape))
    if rank > min(small.shape):
        wrong = f"{rank} is larger than {small.name} ({small.shape[0]} x {small.shape[1]})"
        raise InputError("--rank", wrong, f"take {min(small.shape)} or less")
    method = NBLoRA(rank=rank, p=p, delta=delta, delta_ratio=delta_ratio)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        U, S, V = (_of_rank(x, rank) for x in spectra[layer.name])
        bound, name = bounds[layer.name], site_name(layer)
        s = torch.full_like(S, bound)
        if p < math.inf:
            free = method.scale_for(S, bound)
            s = bound * torch.softmax(free / rank**0.5, 0) ** (1 / p)
            tensors[f"{name}.s"] = free.float()
        A, B = method.invert(U, S, V, s)
        tensors[f"{name}.A"], tensors[f"{name}.B"] = A.float(), B.float()
        tensors[f"{name}.delta"] = torch.tensor(bound)
    kinds = {"A": True, "B": True, "delta": False, **({"s": True} if p < math.inf else {})}
    known = {(la.component, la.path): site_name(la) for la in layers}
    norms = {known[names]: norm for names, norm in norms.items()}
    return stored_as(method, "nb_lora", kinds, layers, tensors, norms, {}, out)


def _of_rank(x: Tensor, rank: int) -> Tensor:
    """Singular values (k,) cut or filled with zeros, vectors (m, k) cut or completed to orthonormal ones."""
    lacking = rank - x.shape[-1]
    if lacking <= 0:
        return x[..., :rank]
    if x.dim() == 1:
        return torch.cat([x, x.new_zeros(lacking)])
    # Beside an identity the columns span everything: those of Q behind x's own are orthogonal to it.
    Q = torch.linalg.qr(torch.cat([x, torch.eye(len(x), dtype=x.dtype)], 1)).Q
    return torch.cat([x, Q[:, x.shape[1] : rank]], 1)
