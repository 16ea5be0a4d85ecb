"""NB-LoRA: Norm-Bounded Low-Rank Adaptation (Wang et al. 2025, arXiv 2501.19050), equations 6 to 8 and 25."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import InputError
from ..update import Update
from ._method import Bound, Method, require, require_fit, require_rank
from ._start import kaiming

# Shares of a weight's norm where no bound is given, by the model's kind and whether p < 2. The embedded world's sweeps
# bear them out but for (encoder, False), which has the images' factor (docs/methods.md, "Choosing delta").
DEFAULTS = {
    ("image", True): 0.1, ("image", False): 0.2, ("language", True): 0.1, ("language", False): 0.2,
    ("encoder", True): 0.02, ("encoder", False): 0.04,
}  # fmt: skip


def kind_of(models: Sequence[nn.Module]) -> str:
    """What DEFAULTS goes by: "language" for models that read tokens alone and say the next ones, "encoder" for those
    that only read them, "image" for all others, also where just one of several is another."""
    if not all(map(reads_tokens, models)):
        return "image"
    heads = [getattr(model, "get_output_embeddings", lambda: None)() for model in models]
    return "encoder" if None in heads else "language"


def reads_tokens(model: nn.Module) -> bool:
    """Whether the model's input is tokens alone, by the embedding that transformers asks of its models."""
    if not hasattr(model, "get_input_embeddings") or hasattr(model, "vision_model"):
        return False
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except NotImplementedError:  # what transformers' models without one embedding raise
        return False


@dataclass(frozen=True)
class NBLoRA(Method):
    """Every singular value of the update stays below a bound, by construction, and every such update is reachable.

    Equation: dW = 2 B^T diag(s) A, [A B] = Cayley([At Bt]), s = delta softmax(st / sqrt(r))^(1/p), so |dW|_Sp <= delta.
    Parameters per layer: r (m + n) + r, or r (m + n) for p = inf.
    Export rank: r.
    Differs from the paper: equation 25's sign error is mended (see vislora.linalg); At starts Kaiming-uniform, which
    is how "small random" reads for LoRA (a tiny At would put A on the first r inputs); computed in float32.
    A rank above the layer's smaller side is refused: dW would not start at zero.
    """

    batched: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, str]] = {"A": "down", "B": "up", "s": "core"}

    rank: int = 16
    p: float = 1.0  # which Schatten norm is bounded: 1 nuclear, 2 Frobenius, inf spectral
    delta: float | None = None  # the bound, in the norm's own unit
    delta_ratio: float | None = None  # the bound as a share of the base weight's norm; DEFAULTS if neither is given
    bounded: bool = True  # False: s itself is trained, with the same start and no bound
    start: Literal["kaiming", "orthogonal"] = "kaiming"  # of At; orthogonal: orthonormal rows
    backward: Literal["custom", "autodiff"] = "custom"  # of the Cayley map

    def check(self) -> None:
        require_rank(self.rank)
        require(self.p >= 1, "p", f"{self.p} is below 1", "take 1 (nuclear), 2 (Frobenius) up to inf (spectral)")
        both = self.delta is not None and self.delta_ratio is not None
        require(not both, "delta", f"{self.delta} given beside delta_ratio {self.delta_ratio}", "give one of the two")
        for option in ("delta", "delta_ratio"):
            value = getattr(self, option)
            good = value is None or (value > 0 and math.isfinite(value))
            require(good, option, f"{value} is not a positive number", "take a positive one, such as 6 or 0.1")
        starts, backwards = ("kaiming", "orthogonal"), ("custom", "autodiff")
        require(self.start in starts, "start", f"{self.start!r} is unknown", f"take {' or '.join(starts)}")
        require(self.backward in backwards, "backward", f"{self.backward!r} is unknown", "take custom or autodiff")

    def for_models(self, models: Sequence[nn.Module]) -> NBLoRA:
        """With the default of these models' kind, so that saved options say which bound it was."""
        if self.delta is not None or self.delta_ratio is not None:
            return self
        return replace(self, delta_ratio=DEFAULTS[kind_of(models), self.p < 2])

    def init(self, site, generator: torch.Generator) -> dict[str, Tensor]:
        require_fit(self.rank, site)
        A = kaiming(self.rank, site.n, generator)
        if self.start == "orthogonal":
            A = linalg.orthonormal(torch.randn(site.n, self.rank, generator=generator)).mT.contiguous()
        tensors = {"A": nn.Parameter(A), "B": nn.Parameter(torch.zeros(self.rank, site.m))}
        delta = torch.tensor(self.delta if self.delta is not None else self._ratio_of(site))
        equal = delta * self.rank ** (-1 / self.p)  # every s_j when st = 0; r^0 = 1 for p = inf
        if not self.bounded:
            return {**tensors, "s": nn.Parameter(equal.repeat(self.rank))}
        tensors["delta"] = delta
        if self.p < math.inf:
            tensors["s"] = nn.Parameter(0.01 * torch.randn(self.rank, generator=generator))
        return tensors

    def _ratio_of(self, site) -> float:
        norm = linalg.schatten(torch.linalg.svdvals(site.weight()), self.p).item()
        if self.delta_ratio is None:
            raise InputError("delta_ratio", "neither it nor delta is set", "give one, or let attach choose")
        wrong = f"{self.delta_ratio} of the norm of {site.name} is {self.delta_ratio * norm}"
        require(0 < norm < math.inf, "delta_ratio", wrong, "give an absolute delta for that layer's model")
        return self.delta_ratio * norm

    def singular_bounds(self, t: SimpleNamespace) -> Tensor:
        """s (..., r): the j-th largest singular value of dW is at most the j-th largest of s."""
        if not self.bounded:
            return t.s
        if self.p == math.inf:
            return t.delta[..., None].expand(*t.delta.shape, self.rank)
        return t.delta[..., None] * torch.softmax(linalg.precise(t.s) / self.rank**0.5, -1) ** (1 / self.p)

    def factors(self, t: SimpleNamespace) -> Update:
        A, B = linalg.cayley(t.A, t.B, self.backward)  # (..., r, n), (..., r, m)
        return Update(up=B.mT * (2 * self.singular_bounds(t)[..., None, :]), down=A)

    def bound(self, t: SimpleNamespace) -> Bound | None:
        return Bound(p=self.p, delta=t.delta) if self.bounded else None

    def bases(self, t: SimpleNamespace) -> dict[str, Tensor]:
        return {"A, B": torch.cat(linalg.cayley(t.A, t.B), dim=-1).mT}

    @staticmethod
    def invert(U: Tensor, sigma: Tensor, V: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Free A (r, n) and B (r, m) whose update is U diag(sigma) V^T under the bounds s (theorem 4.2).

        U (m, r) and V (n, r) have orthonormal columns, also where sigma (r,) is 0; 0 <= sigma <= s, s (r,) > 0.
        """
        J = (sigma / s).clamp(0, 1)
        plus, minus = (1 + J).sqrt(), (1 - J).sqrt()
        return linalg.cayley_inverse((V * ((plus + minus) / 2)).mT, (U * ((plus - minus) / 2)).mT)

    def scale_for(self, sigma: Tensor, delta: float) -> Tensor:
        """The tensor `s` whose singular bounds lie above sigma (r,), which has a p-norm below delta; for p < inf.

        What the ball has left is shared out evenly, so that every bound is positive and the map smooth there.
        """
        shares = (sigma.double() / delta).pow(self.p)
        return self.rank**0.5 * (shares + (1 - shares.sum()) / self.rank).log()
