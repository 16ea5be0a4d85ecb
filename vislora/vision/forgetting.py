"""What tuning on a target cost on the source: by the kept head, by neighbours, by the drift of features.

Shares are in [0, 1]. The kept head is NB-LoRA's measure (section 5.2), neighbours are Bafghi et al.'s; the first sees
a rotation of the features as forgetting, the second does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vislora import linalg
from vislora.adapter import Adapter
from vislora.handle import Dense, Handle
from vislora.measure import singular_values

KNN_K = (10, 20, 100, 200)


def geometric_mean(source: float, target: float) -> float:
    """sqrt(source target), as NB-LoRA's Figure 7."""
    return math.sqrt(source * target)


def means(values: Mapping[str, float], target: str) -> dict[str, float]:
    """The geometric mean of `values[target]` and each source accuracy in `values`: "geometric_mean" of the kept head's,
    "geometric_mean_knn20" of 20 neighbours', and so on. Nothing without `target`."""
    names = {"source_accuracy": "geometric_mean"}
    names |= {f"source_knn{k}_accuracy": f"geometric_mean_knn{k}" for k in KNN_K}
    both = {name: key for key, name in names.items() if key in values and target in values}
    return {name: geometric_mean(values[key], values[target]) for name, key in both.items()}


def knn_logits(
    bank: Tensor, bank_labels: Tensor, features: Tensor, classes: int, k: int = 20, temperature: float = 0.07,
    chunk: int = 1024,
) -> Tensor:  # fmt: skip
    """Votes (n, classes) of each row's k nearest by cosine among `bank` (m, d), each worth exp(cosine / temperature).

    Instance discrimination's weighted vote (Wu et al. 2018, arXiv 1805.01978, section 3.4). k is at most m.
    """
    bank, k = F.normalize(bank.float(), dim=-1), min(k, len(bank))
    found = []
    for part in features.split(chunk):
        near, place = (F.normalize(part.float(), dim=-1) @ bank.T).topk(k, dim=-1)
        votes = torch.zeros(len(part), classes, device=part.device)
        found.append(votes.scatter_add_(1, bank_labels[place], (near / temperature).exp()))
    return torch.cat(found)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features (n, d) and (n, e) of the same n images: 1 for equal up to rotation
    and scale, 0 for unrelated (Kornblith et al. 2019, arXiv 1905.00414, section 3). The biased estimate, as there."""
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    cross = torch.linalg.matrix_norm(x.T @ y).square()
    own = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return (cross / own).item() if own > 0 else float("nan")


@torch.no_grad()
def update_norms(adapter: Handle) -> dict[str, dict[str, float]]:
    """{adapted matrix or row block: its update's nuclear, Frobenius and spectral norm and each one's ratio to the same
    norm of the base weight}. All singular values are computed, so this takes a while on large models."""
    return {name: _row(change(), _values(weight())) for name, weight, change in _matrices(adapter)}


def _matrices(adapter: Handle) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """(name, how to get the base weight (m, n), how to get the singular values of its change) of all that is adapted.

    Nothing of what PEFT cannot say."""
    if isinstance(adapter, Dense):
        for name, weight, delta in adapter.changes() if adapter.measurable else ():
            yield name, lambda w=weight: w.flatten(1), lambda d=delta: _values(d.flatten(1))
    elif isinstance(adapter, Adapter):
        for name, site, _, update in adapter.site_updates():
            yield name, site.weight, lambda u=update, s=site: abs(adapter.weight) * singular_values(u, s)


def _values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double() if min(matrix.shape) <= 256 else matrix.float())


def _row(change: Tensor, weight: Tensor) -> dict[str, float]:
    row = {}
    for name, p in (("nuclear", 1.0), ("frobenius", 2.0), ("spectral", math.inf)):
        size, base = linalg.schatten(change, p).item(), linalg.schatten(weight, p).item()
        row |= {name: size, f"{name}_ratio": size / base if base else math.inf}
    return row


class NuclearRatio:
    """The largest |update|_S1 / |weight|_S1 over all that is adapted (NB-LoRA, Figure 6, top right), again and again:
    the base weights' singular values are taken once."""

    def __init__(self, adapter: Handle):
        self.adapter = adapter
        self._base: dict[str, float] = {}

    @torch.no_grad()
    def __call__(self) -> float:
        largest = 0.0
        for name, weight, change in _matrices(self.adapter):
            if name not in self._base:
                self._base[name] = _values(weight()).sum().item()
            largest = max(largest, change().sum().item() / (self._base[name] or math.inf))
        return largest
