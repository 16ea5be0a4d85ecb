"""Counter-based randomness: every draw is a pure function of (seed, stream, counters).

A run keeps no generator state. Noise of step 412 comes from `generator(seed, "noise", 412)`, and the order of
epoch 3 from `epoch_order(seed, 3, n)`, so a resumed run draws what an uninterrupted one draws, whatever the number of
loader workers. Nothing here reads or moves the global generators of torch, numpy or `random`.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

import torch


def generator(seed: int, stream: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device` for the draws named by `stream` ("noise", "crop", …) at `counters` (step, rank, …).

    Equal arguments give equal draws; any other argument gives an unrelated sequence. Draws on a GPU differ from
    those on a CPU: where they must agree, draw on the CPU and move the tensor.
    """
    key = repr((int(seed), str(stream), tuple(int(c) for c in counters)))
    # 64 bits go in; torch's CPU generator keeps the low 32, so two given keys coincide with chance 2e-10.
    return torch.Generator(device).manual_seed(int.from_bytes(sha256(key.encode()).digest()[:8], "big"))


@lru_cache(maxsize=8)  # a batch touches one or two epochs, and a run has few streams
def _order(seed: int, epoch: int, n: int, stream: str) -> tuple[int, ...]:
    return tuple(torch.randperm(n, generator=generator(seed, stream, epoch, n)).tolist())


def epoch_order(seed: int, epoch: int, n: int, stream: str = "order") -> list[int]:
    """The permutation of range(n) in which `epoch` (from 0) visits the samples. ValueError when n < 1 or epoch < 0."""
    if n < 1 or epoch < 0:
        raise ValueError(f"epoch_order needs n >= 1 and epoch >= 0, got n={n}, epoch={epoch}")
    return list(_order(seed, epoch, n, stream))


def batch_indices(seed: int, position: int, batch: int, n: int, stream: str = "order") -> list[int]:
    """Sample indices at global positions position … position + batch - 1.

    Position q is place q % n of epoch q // n: a batch may cross an epoch's end, and each epoch visits every one of
    the `n` samples once. ValueError when n < 1 or position < 0.
    """
    if n < 1 or position < 0:
        raise ValueError(f"batch_indices needs n >= 1 and position >= 0, got n={n}, position={position}")
    return [_order(seed, q // n, n, stream)[q % n] for q in range(position, position + batch)]


def first_position(step: int, micro: int, rank: int, *, batch: int, accumulation: int = 1, world: int = 1) -> int:
    """Global position of the first sample that `rank` reads at micro-step `micro` of optimizer step `step`, all from 0.

    One optimizer step consumes the batch * accumulation * world positions that follow those of the step before it,
    in any split: runs with equal products read equal samples at every step.
    """
    return ((step * accumulation + micro) * world + rank) * batch
