"""The conformance suite: what every method must do on every host. Another package runs `check(MyMethod())`.

A check is a function of a Subject (a method on a host) that asserts; nothing in them names a method: what may differ
between methods is declared as a trait on the method. METHOD_CHECKS ask nothing of the host and run on the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..adapters import Method
from . import definition, equality, files, learning
from .subject import Host, Subject

__all__ = ["CHECKS", "METHOD_CHECKS", "Host", "Subject", "check", "feed", "hosts", "seeded"]

METHOD_CHECKS: tuple[Callable[[Subject], None], ...] = (
    definition.options_round_trip,
    definition.documented,
    definition.roles_name_every_trained_tensor,
    learning.factors_pass_gradcheck,
    learning.learns_a_planted_update,
)
CHECKS: tuple[Callable[[Subject], None], ...] = (
    definition.parameter_count_is_the_documented_one,
    definition.starts_as_the_base,
    definition.start_is_a_function_of_the_seed,
    definition.too_large_a_rank_is_refused_without_a_trace,
    equality.hook_equals_dense,
    equality.bf16_base_keeps_its_dtype,
    equality.autocast_agrees,
    equality.merged_equals_hook_and_restores,
    equality.disabled_is_the_base,
    equality.weight_scales_the_delta,
    learning.factors_batched_equal_single,
    learning.every_tensor_trains,
    learning.only_the_adapter_changes,
    learning.bound_holds_under_wild_steps,
    learning.checkpointing_gives_equal_gradients,
    files.saved_and_loaded_is_equal,
    files.damaged_files_are_refused_without_a_trace,
    files.two_adapters_add,
    files.detach_leaves_no_trace,
    files.copies_are_independent,
)


class _Attention(nn.Module):
    """A fused projection as timm names it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + self.proj((q @ k.mT / 4).softmax(-1) @ v)


class _Convolutions(nn.Module):
    """A strided, padded, grouped and pointwise chain of convolutions, the first reflecting at the borders."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 12, (3, 1), padding=(2, 0), dilation=(2, 1), groups=2, bias=False)
        self.last = nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.grouped(self.first(x))))


class _Multihead(nn.Module):
    """A block around nn.MultiheadAttention, which reads its weights and calls no module."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attn(h, h, h, need_weights=False)[0]


def seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return make


def feed(*shape: int) -> Callable[[nn.Module, int], Tensor]:
    def run(model: nn.Module, seed: int) -> Tensor:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(100 + seed))
        return model(x.to(next(model.parameters()).dtype))

    return run


def hosts() -> list[Host]:
    """The hosts that need torch alone: a chain of linears without and with bias, fused attention blocks, convolutions,
    and torch's own attention, whose weights are read."""
    chain = seeded(lambda: nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12, bias=False)))
    multihead = seeded(lambda: nn.Sequential(_Multihead(), _Multihead()))
    fused = seeded(lambda: nn.Sequential(_Attention(), _Attention()))
    return [
        Host("linear", chain, "all-linear", feed(3, 5, 12)),
        Host("fused_qkv", fused, ["qkv[q]", "qkv[v]"], feed(2, 6, 16)),
        Host("conv", seeded(_Convolutions), ["first", "grouped", "last"], feed(2, 4, 8, 8)),
        Host("mha", multihead, ["in_proj_weight[q]", "in_proj_weight[v]", "out_proj"], feed(2, 6, 16)),
    ]


def check(method: Method, on: Iterable[Host] | None = None) -> int:
    """Run every check of `method` on every host (the built-in ones by default). Returns how many ran."""
    ran = 0
    for i, host in enumerate(hosts() if on is None else on):
        for one in CHECKS if i else METHOD_CHECKS + CHECKS:
            one(Subject(method, host))
            ran += 1
    return ran
