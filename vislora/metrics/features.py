"""One pass over images: each is read once and looked at by every network that lacks it, in float32 everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from vislora.data.images import read
from vislora.metrics.backbones import Backbone
from vislora.metrics.cache import Cache
from vislora.metrics.perceptual import Perceptual, distances
from vislora.metrics.pictures import Picture

Share = Callable[[dict], dict]  # puts the dicts of all processes together


@contextmanager
def exact() -> Iterator[None]:
    """No TF32 within."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


def embed(
    pictures: Sequence[Picture], backbones: Sequence[Backbone], cache: Cache, batch_size: int = 32,
    part: tuple[int, int] = (0, 1), share: Share = dict,
) -> None:
    """Put every picture's features by every backbone into `cache`, under (backbone.view, picture.sha256).

    part: (this process, processes); each embeds its own pictures, and `share` brings the features together, and before
    that what each process lacks: their caches may differ.
    """  # fmt: skip
    distinct = {p.sha256: p for p in pictures}  # equal files are one
    wanted = {(b.view, sha): None for sha in distinct for b in backbones if cache.get(b.view, sha) is None}
    wanted = share(wanted)
    lacking = {sha: [b for b in backbones if (b.view, sha) in wanted] for sha in sorted(distinct)}
    todo = [sha for sha, own in lacking.items() if own][part[0] :: part[1]]
    found: dict[tuple[str, str], Tensor] = {}
    with exact():
        for start in range(0, len(todo), batch_size):
            chunk = todo[start : start + batch_size]
            images = {sha: read(distinct[sha].path) for sha in chunk}
            for backbone in backbones:
                own = [sha for sha in chunk if backbone in lacking[sha]]
                if not own:
                    continue
                device = next(backbone.network.parameters()).device
                batch = torch.stack([backbone.transform(images[sha]) for sha in own]).to(device)
                for sha, value in zip(own, backbone.images(batch).cpu(), strict=True):
                    found[backbone.view, sha] = value
    for (view, sha), value in share(found).items():
        cache.put(view, sha, value)


def matrix(pictures: Sequence[Picture], backbone: Backbone, cache: Cache) -> np.ndarray:
    """(n, d) unit features in float64, of pictures that `embed` has seen."""
    found = np.stack([cache.get(backbone.view, p.sha256).double().numpy() for p in pictures])
    return found / np.linalg.norm(found, axis=1, keepdims=True)  # of length 1 in float64 too


Pairs = tuple[Sequence[Picture], Sequence[Picture]]


def compare(
    groups: Sequence[Pairs], network: Perceptual, cache: Cache, part: tuple[int, int] = (0, 1), share: Share = dict,
) -> list[np.ndarray]:
    """LPIPS (n, m) in float64 of each group's first pictures with its second ones; processes take groups in turn, of
    those that any of them lacks.

    Groups with pictures in common should stand side by side: activations are kept for the last few dozen pictures.
    """  # fmt: skip
    keys = [" ".join([*(p.sha256 for p in first), "to", *(p.sha256 for p in second)]) for first, second in groups]
    wanted = share({key: None for key in keys if cache.get(network.view, key) is None})
    lacking = [(key, pair) for key, pair in dict(zip(keys, groups, strict=True)).items() if key in wanted]
    held: dict[str, tuple[Tensor, Tensor]] = {}

    def activations(picture: Picture) -> tuple[Tensor, Tensor]:
        if picture.sha256 in held:
            held[picture.sha256] = held.pop(picture.sha256)  # the last to go
        else:
            device = next(network.network.parameters()).device
            vectors, weights = network.embed(network.transform(read(picture.path))[None].to(device))
            held[picture.sha256] = vectors[0], weights
            while len(held) > 64:
                held.pop(next(iter(held)))
        return held[picture.sha256]

    found = {}
    with exact():
        for key, (first, second) in lacking[part[0] :: part[1]]:
            rows = torch.zeros(len(first), len(second))
            for i, a in enumerate(first):
                for j, b in enumerate(second):
                    if a.sha256 != b.sha256:
                        (x, weights), (y, _) = activations(a), activations(b)
                        rows[i, j] = distances(x, y[None], weights)[0]
            found[key] = rows
    for key, value in share(found).items():
        cache.put(network.view, key, value)
    return [cache.get(network.view, key).double().numpy() for key in keys]
