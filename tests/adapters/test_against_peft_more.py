"""OLoRA, VeRA and AdaLoRA against the installed PEFT: starts, outputs, gradients; AdaLoRA's scores and budget too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from torch import nn

from vislora import attach

SITES = ("0", "2")


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8))


def layers_of(peft):
    return {name: peft.base_model.model.get_submodule(name) for name in SITES}


def backward_both(model, peft, seed=1):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours, theirs = model(x), peft(x)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.square().sum().backward()
    theirs.square().sum().backward()


def shake(tensors, size=0.3, seed=2):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in tensors:
            t.add_(size * torch.randn(t.shape, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [4, 6])
def test_olora(alpha):
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=list(SITES), init_lora_weights="olora")
    peft = get_peft_model(chain(), config).double()
    model = chain().double()
    adapter = attach(model, "olora", rank=4, alpha=alpha)
    t = dict(adapter.named_tensors())
    for name, layer in layers_of(peft).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        sign = (t[f"{name}.B"] * B).sum(dim=0).sign()  # a QR's columns are fixed up to these
        assert torch.allclose(t[f"{name}.B"] * sign, B, atol=1e-5)
        assert torch.allclose(t[f"{name}.A"] * sign[:, None], A, atol=1e-5)
        assert torch.allclose(t[f"{name}.B0"] @ t[f"{name}.A0"], B @ A, atol=1e-5)
    factors = {f"{name}.{key}": getattr(layer, f"lora_{key}")["default"].weight
               for name, layer in layers_of(peft).items() for key in "AB"}  # fmt: skip
    with torch.no_grad():
        for name, theirs in factors.items():  # the same start on both sides, then away from it
            t[f"{name}0"].copy_(theirs)
        shake(factors.values())
        for name, theirs in factors.items():
            t[name].copy_(theirs)
    backward_both(model, peft)
    for name, theirs in factors.items():
        assert torch.allclose(t[name].grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_vera():
    config = VeraConfig(r=6, target_modules=list(SITES), d_initial=0.1, projection_prng_key=0)
    peft = get_peft_model(chain(), config).double()
    model = chain().double()
    adapter = attach(model, "vera", rank=6)
    common = adapter.parts[""].common.all()
    A, B = (getattr(peft.base_model, f"vera_{side}")["default"] for side in "AB")
    assert common["A"].shape == A.shape and common["B"].shape == B.shape
    for ours, theirs in ((common["A"], A), (common["B"], B)):
        assert 0.6 < ours.std() / theirs.std() < 1.6  # one law, other draws
        ours.data = theirs.clone()
    t = dict(adapter.named_parameters())
    pairs = [(t[f"{name}.{key}"], getattr(layer, f"vera_lambda_{key}")["default"])
             for name, layer in layers_of(peft).items() for key in "bd"]  # fmt: skip
    assert all(torch.allclose(mine.double(), theirs) for mine, theirs in pairs)
    shake([theirs for _, theirs in pairs])
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs)
    backward_both(model, peft)
    for mine, theirs in pairs:
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-8, atol=1e-10)


class WithLoss(nn.Module):
    """PEFT adds its penalty to an output's `loss` alone, and where `base_model` is called, not a PeftModel."""

    def __init__(self):
        super().__init__()
        self.chain = chain()

    def forward(self, x):
        out = self.chain(x)
        return SimpleNamespace(out=out, loss=out.square().mean())


def adalora_pair(total=30, tinit=2, tfinal=5, delta_t=3, **more):
    """Our model, PEFT's, our adapter, and (ours, theirs) for each trained tensor, equal by now."""
    words = dict(init_r=4, target_r=2, tinit=tinit, tfinal=tfinal, deltaT=delta_t, total_step=total, lora_alpha=8)
    config = AdaLoraConfig(target_modules=["chain.0", "chain.2"], beta1=0.8, beta2=0.9, **words)
    peft = get_peft_model(WithLoss(), config).double()
    model = WithLoss().double()
    adapter = attach(model, "adalora", targets=["chain.0", "chain.2"], rank=2, init_r=4, alpha=8.0, tinit=tinit,
                     tfinal=tfinal, deltaT=delta_t, beta1=0.8, beta2=0.9)  # fmt: skip
    t = dict(adapter.named_parameters())
    pairs = {}
    for name in SITES:
        layer = peft.base_model.model.chain.get_submodule(name)
        for key in "AEB":
            pairs[f"chain.{name}.{key}"] = t[f"chain.{name}.{key}"], getattr(layer, f"lora_{key}")["default"]
    shake([theirs for _, theirs in pairs.values()])
    with torch.no_grad():
        for mine, theirs in pairs.values():
            mine.copy_(theirs.view(mine.shape))
    return model, peft, adapter, pairs


def test_adalora_outputs_gradients_and_penalty():
    model, peft, adapter, pairs = adalora_pair()
    adapter.bind(torch.optim.SGD(adapter.param_groups(0.1)), 30)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = model(x), peft.base_model(x)
    assert torch.allclose(ours.out, theirs.out, rtol=1e-4, atol=1e-5)  # PEFT divides by r + 1e-5
    loss = ours.loss + adapter.penalty()
    assert torch.isclose(loss, theirs.loss, rtol=1e-5)
    assert torch.isclose(adapter.penalty(), theirs.loss - theirs.out.square().mean(), rtol=1e-8)
    loss.backward()
    theirs.loss.backward()
    for mine, other in pairs.values():
        assert torch.allclose(mine.grad, other.grad.view(mine.shape), rtol=1e-4, atol=1e-6)


def test_adalora_scores_budget_and_choice_over_several_steps():
    total, tinit, tfinal = 30, 2, 5
    model, peft, adapter, pairs = adalora_pair(total, tinit, tfinal)
    optimizers = [torch.optim.SGD([pair[side] for pair in pairs.values()], 0.05) for side in range(2)]
    adapter.bind(optimizers[0], total)
    allocator = peft.base_model.rankallocator
    pruned = 0
    # The last choice is left out: PEFT takes the scores of the step before it there, and the paper its own.
    for step in range(1, total - tfinal):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(6, 12, generator=g, dtype=torch.float64)
        (model(x).loss + adapter.penalty()).backward()
        peft.base_model(x).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        peft.base_model.update_and_allocate(step)
        own = dict(adapter.named_tensors())
        for name, (mine, other) in pairs.items():
            key = next(n for n, p in peft.base_model.model.named_parameters() if p is other)
            for ours, theirs in ((f"{name}_importance", allocator.exp_avg_ipt[key]),
                                 (f"{name}_variation", allocator.exp_avg_unc[key])):  # fmt: skip
                assert torch.allclose(own[ours], theirs.view(mine.shape), rtol=2e-3, atol=1e-9), (step, ours)
            assert torch.allclose(mine, other.view(mine.shape), rtol=1e-3, atol=1e-5), (step, name)
            if name.endswith("E"):
                assert torch.equal(mine == 0, other.view(-1) == 0), step
        budget, masks = allocator.budget_schedule(step)
        assert budget == adapter.method.budget(step, total, 2)
        pruned += masks
        for optimizer in optimizers:
            optimizer.zero_grad()
    zeros = sum(int((mine == 0).sum()) for name, (mine, _) in pairs.items() if name.endswith("E"))
    assert pruned == 8 and zeros == 4  # every third step from the third on; half of all triplets
