"""The engine: hooks under unusual callers, steps under accumulation, seams that no built-in method needs yet."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hosts import run_unet, timm_vit, unet
from torch import nn

from vislora import Method, attach
from vislora.errors import InputError
from vislora.update import Update


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def randomise(adapter):
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))


def test_rows_that_are_not_adapted_keep_their_bits():
    model = timm_vit().eval()
    x = torch.randn(2, 5, 16)
    before = model.blocks[0].attn.qkv(x)
    weight = model.blocks[0].attn.qkv.weight.clone()
    adapter = attach(model, "lora", rank=2, targets="vit-qv")
    randomise(adapter)
    after = model.blocks[0].attn.qkv(x)
    assert torch.equal(before[..., 16:32], after[..., 16:32])
    assert (before[..., :16] != after[..., :16]).all() and (before[..., 32:] != after[..., 32:]).all()
    delta = adapter.deltas()["blocks.0.attn.qkv"]
    assert not delta[16:32].any() and delta[:16].any() and delta[32:].any()
    with adapter.merged():
        merged = model.blocks[0].attn.qkv.weight
        assert torch.equal(merged[16:32], weight[16:32])
        assert torch.equal(merged, weight + delta)


def test_calls_that_bypass_the_root_see_the_present_parameters():
    model = timm_vit()
    adapter = attach(model, "nb_lora", rank=2, delta=1.0, targets="vit-qv")
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        start = model.blocks[0](x)
    randomise(adapter)
    with torch.no_grad():
        moved = model.blocks[0](x)
    assert not torch.equal(start, moved)
    model.blocks[0](x).square().sum().backward()  # factors made without gradient are made again
    grads = [p.grad for n, p in adapter.named_parameters() if n.startswith("blocks.0")]
    assert all(g is not None and g.any() for g in grads)


def test_factors_are_computed_once_for_unchanged_parameters_without_gradient(monkeypatch):
    model, x = chain(), torch.randn(2, 6)
    adapter = attach(model, "lora", rank=2)
    calls = []
    part = adapter.parts[""]
    original = part.forward
    monkeypatch.setattr(part, "forward", lambda: calls.append(1) or original())
    with torch.no_grad():
        model(x), model(x)
        assert len(calls) == 1
        next(adapter.parameters()).add_(1.0)
        model(x)
        assert len(calls) == 2
    model(x)
    model(x)
    assert len(calls) == 4


def test_a_layer_whose_weight_is_read_without_a_call_is_named():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) @ self.read.weight

    model = Reads().train()
    attach(model, "lora", rank=2)
    with pytest.raises(InputError, match=r"1 adapted layers took no part in the forward: read"):
        model(torch.randn(2, 4))


def test_diffusers_scale_of_one_call_acts_on_ours():
    model = unet().eval()
    adapter = attach(model, "lora", rank=2)
    randomise(adapter)
    g = [torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12)]

    def run(**kwargs):
        with torch.no_grad():
            return model(*g, **kwargs).sample

    full = run()
    half = run(cross_attention_kwargs={"scale": 0.5})
    adapter.weight = 0.5
    assert torch.equal(half, run()) and not torch.equal(full, half)
    adapter.weight = 1.0
    assert torch.equal(full, run())
    with adapter.disabled():
        base = run()
    assert torch.equal(run(cross_attention_kwargs={"scale": 0.0}), base)


def test_gradient_checkpointing_of_diffusers_gives_equal_gradients():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = unet().train()
        adapter = attach(model, "nb_lora", rank=2, delta=1.0)
        randomise(adapter)
        if checkpointing:
            model.enable_gradient_checkpointing()
        run_unet(model, 0).square().mean().backward()
        grads.append([p.grad for p in adapter.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_shared_weights_are_not_merged():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].weight = model[0].weight
    adapter = attach(model, "lora", rank=2, targets=["0"])
    with pytest.raises(InputError, match="shared with another module"):
        adapter.merge()


def test_merging_into_bf16_warns_of_a_delta_that_is_rounded_away(caplog):
    model = chain().bfloat16()
    adapter = attach(model, "lora", rank=2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(2e-3)
    adapter.detach(merge=True)
    assert "lost" in caplog.text and "float32" in caplog.text


def test_two_magnitudes_on_one_module_add_in_every_state():
    model, x = chain(), torch.randn(3, 6)
    one, two = attach(model, "dora", rank=2, name="one"), attach(model, "dora", rank=2, name="two")
    randomise(one), randomise(two)
    with torch.no_grad():
        free = model(x)
        for first, second in ((one, two), (two, one)):
            with first.merged():
                assert torch.allclose(model(x), free, atol=1e-5)
                with second.merged():
                    assert torch.allclose(model(x), free, atol=1e-5)


def test_adapter_trains_through_a_frozen_half_precision_base():
    for dtype in (torch.bfloat16, torch.float16):
        model = chain().to(dtype)
        for method in ("lora", "nb_lora", "dora", "pissa"):
            adapter = attach(model, method, rank=2)
            out = model(torch.randn(3, 6, dtype=dtype))
            assert out.dtype == dtype
            out.float().square().sum().backward()
            for name, p in adapter.named_parameters():
                assert p.dtype == torch.float32 and torch.isfinite(p.grad).all(), (method, name)
            adapter.detach()


@dataclass(frozen=True)
class Scheduled(Method):
    """A method with every seam in use: a penalty, a step counter, a data-driven start."""

    rank: int = 2

    def init(self, site, generator):
        return {"A": nn.Parameter(torch.randn(self.rank, site.n, generator=generator)),
                "B": nn.Parameter(torch.zeros(site.m, self.rank)), "steps": torch.zeros(())}  # fmt: skip

    def factors(self, t: SimpleNamespace) -> Update:
        return Update(up=t.B, down=t.A)

    def penalty(self, sites, max_lr):
        return sum(t.A.square().sum() for t in sites) / max_lr

    def prepare(self, adapter, closure):
        closure()
        for part in adapter.parts.values():
            for site in part.sites:
                part.tensors_of(site).B.data.fill_(0.5)

    def on_step(self, adapter, step, optimizer):
        assert all(p.grad is not None for p in adapter.parameters())
        for _, tensor in adapter.named_tensors():
            if tensor.dim() == 0:
                tensor.fill_(step)


def test_seams_for_methods_with_schedules_penalties_and_data():
    model, x = chain(), torch.randn(4, 6)
    adapter = attach(model, Scheduled())
    with pytest.raises(InputError, match="bind"):
        adapter.penalty()
    optimizer = torch.optim.SGD(adapter.param_groups(0.0))
    optimizer.param_groups[0]["initial_lr"] = 0.25  # as a warm-up leaves it
    adapter.bind(optimizer, 3)
    expected = sum(p.square().sum() for n, p in adapter.named_parameters() if n.endswith("A")) / 0.25
    assert torch.isclose(adapter.penalty(), expected)
    losses = []

    def closure():
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss)
        return loss

    adapter.prepare(closure)
    assert len(losses) == 1 and all((p == 0.5).all() for n, p in adapter.named_parameters() if n.endswith("B"))
    for micro in range(9):  # accumulation of three
        closure()
        if micro % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    counters = [t for n, t in adapter.named_tensors() if n.endswith("steps")]
    assert adapter.step == 3 and all(t == 3 for t in counters)


def test_bad_calls_say_what_is_wrong():
    model = chain()
    for call, words in (
        (lambda: attach(model, "nb_lorra"), ("nb_lorra", "nb_lora")),
        (lambda: attach(model, "lora", rank=2, name="a.b"), ("a.b",)),
        (lambda: attach(model, Scheduled(), rank=3), ("rank",)),
        (lambda: attach(model, "lora", rank=2.5), ("2.5",)),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert all(word in str(error.value) for word in words), error.value
    assert not any("vislora" in key for key in model.state_dict())


def test_a_forward_that_fails_leaves_no_stale_updates_behind():
    model = timm_vit()
    adapter = attach(model, "nb_lora", rank=2, delta=1.0, targets="vit-qv")  # whose updates are no views
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 3, 16, 16).double())
        start = model.blocks[0](torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0)))
        randomise(adapter)
        moved = model.blocks[0](torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(start, moved)


def test_a_step_that_a_scaler_takes_back_is_none_of_a_fused_optimizers():
    """Such an optimizer is called, and leaves everything as it is; others are not called at all."""
    adapter = attach(nn.Sequential(nn.Linear(6, 5)), "lora", targets="all-linear", rank=2)
    optimizer = torch.optim.AdamW(adapter.param_groups(0.1), fused=True)
    adapter.bind(optimizer, total_steps=4)
    scaler, x = torch.amp.GradScaler("cpu", init_scale=4.0), torch.ones(1, 6)
    for factor, steps in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        scaler.scale(factor * adapter.roots[""](x).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert adapter.step == steps
