"""Convolutions and weights that are read: every kind of them against torch's own forward with the delta added."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from vislora import attach, load
from vislora.testing.subject import close, weight_of

CONVOLUTIONS = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 7)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "stride": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 8, 8)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 8, 8)),
    "circular": (lambda: nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="circular"), (2, 4, 8, 8)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 8, 8)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    "3d": (lambda: nn.Conv3d(4, 6, 3, groups=2), (2, 4, 5, 5, 5)),
    "own forward": (lambda: timm.layers.Conv2dSame(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "standardised": (lambda: timm.layers.StdConv2d(4, 6, 3), (2, 4, 7, 7)),
}


def randomise(adapter):
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))


def with_deltas(model, adapter):
    """The base model with the deltas added to its weights."""
    twin = copy.deepcopy(model)
    adapter_of_twin = [m for m in twin.modules() if "vislora_default" in m._modules]
    deltas = adapter.deltas()
    adapter.detach()
    plain = copy.deepcopy(model)
    for name, delta in deltas.items():
        assert weight_of(plain, name).shape == delta.shape and delta.any()
        weight_of(plain, name).data += delta
    assert len(adapter_of_twin) == 1
    return twin, plain


@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_every_convolution_computes_with_its_delta(case, method):
    build, shape = CONVOLUTIONS[case]
    torch.manual_seed(0)
    model, x = nn.Sequential(build()), torch.randn(*shape)
    base = model(x)
    adapter = attach(model, method, targets=["0"], rank=2)
    assert torch.equal(model(x), base) or method == "dora"
    randomise(adapter)
    twin, plain = with_deltas(model, adapter)
    assert torch.equal(model(x), base)
    close(twin(x), plain(x), 1e-5)
    assert (twin(x) - base).abs().max() > 1e-3


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, x):
        return self.attn(x, x[..., :6], x[..., :4])[0]


class Own(nn.Module):
    """torch's attention as callers vary it."""

    def __init__(self, **words):
        super().__init__()
        self.attn, self.words = nn.MultiheadAttention(8, 2, **words), words

    def forward(self, x):
        mask = torch.triu(torch.ones(x.shape[-2 if self.words.get("batch_first") else 0], 5, dtype=torch.bool), 1)
        return torch.cat([o for w in (True, False) for o in self.attn(x, x, x, need_weights=w, attn_mask=mask)[:1]])


ATTENTIONS = {
    "separate": (Cross, ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]),
    "batch first": (lambda: Own(batch_first=True), "attention"),
    "sequence first": (lambda: Own(bias=False), "attention"),
    "bias of keys": (lambda: Own(batch_first=True, add_bias_kv=True), "all-linear"),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "all-linear"),
    "decoder layer": (lambda: Decoder(), "attention"),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), "vit-qv"),
}


FUSED = {  # torch's kernels that evaluation runs
    "batch first": {"_native_multi_head_attention"},
    "encoder layer": {"_native_multi_head_attention"},  # for the adapter's hook is on it
    "decoder layer": {"_native_multi_head_attention"},
    "encoder": {"_transformer_encoder_layer_fwd"},
}


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.layer(x, x)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("case", ATTENTIONS)
def test_every_attention_computes_with_its_delta(case, method, monkeypatch):
    """In training, without gradient, and in evaluation by torch's fused kernel, which calls no module, and without."""
    build, targets = ATTENTIONS[case]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(5, 5, 8)
    keys = list(model.state_dict())
    adapter = attach(model, method, targets=targets, rank=2)
    assert [k for k in model.state_dict() if "vislora" not in k] == keys
    randomise(adapter)
    twin, plain = with_deltas(model, adapter)
    ran = []
    for kernel in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
        own = getattr(torch, kernel)
        monkeypatch.setattr(torch, kernel, lambda *a, own=own, kernel=kernel, **k: ran.append(kernel) or own(*a, **k))
    with torch.no_grad():
        twin(x)
    assert set(ran) == FUSED.get(case, set())
    for fused in (True, False):
        torch.backends.mha.set_fastpath_enabled(fused)
        try:
            with torch.no_grad():
                close(twin(x), plain(x), 1e-4)
            close(twin(x), plain(x), 1e-4)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}


def test_full_fine_tuning_of_a_raw_parameter_is_of_that_one_alone(tmp_path):
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(3, 5, 8)
    handle = attach(model, "full", targets=["in_proj_weight"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["self_attn.in_proj_weight"]
    randomise(handle)
    wanted = model(x)
    handle.save(tmp_path)
    assert list(handle.deltas()) == ["self_attn.in_proj_weight"]
    handle.detach()
    assert not torch.equal(model(x), wanted)
    load(model, tmp_path)
    assert torch.equal(model(x), wanted)


def test_a_residual_start_cancels_on_strided_inputs():
    """torch rounds a product of strided inputs by whether the factor trains, and the part taken off does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    x = torch.randn(2, 21, 8)[:, :5]
    before = model(x)
    attach(model, "pissa", targets="all-linear", rank=4)
    assert not x.is_contiguous() and torch.equal(before, model(x).detach())
